import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hnml_hf.modeling.cam import class_activation_maps, head_gradient_activation, normalize_cams
from hnml_hf.objectives.hnml import foreground_mask


def test_class_activation_maps_by_hand():
    """Two channels on a 1 x 2 map: A = [[1, 2], [3, 4]], w = (10, 1): CAM = 10 (1, 2) + 1 (3, 4) = (13, 24)."""
    feature_maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    assert_close(class_activation_maps(feature_maps, torch.tensor([[10.0, 1.0]])), torch.tensor([[[13.0, 24.0]]]))


def test_mean_of_the_map_is_the_logit_without_bias(generator):
    feature_maps = torch.randn(4, 6, 3, 5, generator=generator)
    weights = torch.randn(4, 6, generator=generator)
    logits = (feature_maps.mean((2, 3)) * weights).sum(-1)
    assert_close(class_activation_maps(feature_maps, weights).mean((1, 2)), logits)


def test_several_classifiers_at_once(generator):
    feature_maps, weights = torch.randn(4, 6, 3, 5, generator=generator), torch.randn(2, 4, 6, generator=generator)
    expected = torch.stack([class_activation_maps(feature_maps, rows) for rows in weights])
    assert_close(class_activation_maps(feature_maps, weights), expected)


def test_gradient_form_equals_the_closed_form_for_a_mean(generator):
    feature_maps, weights = torch.randn(4, 6, 3, 5, generator=generator), torch.randn(4, 6, generator=generator)
    evidence = head_gradient_activation(feature_maps, lambda maps: maps.mean((2, 3)), weights)
    assert_close(evidence.sum(1) * 15, class_activation_maps(feature_maps, weights))


def test_gradient_form_is_differentiable_and_leaves_no_graph_without_gradients(generator):
    feature_maps = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.double, requires_grad=True)
    weights = torch.randn(2, 3, generator=generator, dtype=torch.double)

    def maps(a):
        return head_gradient_activation(a, lambda m: m.mean((2, 3)).tanh(), weights)

    assert torch.autograd.gradcheck(maps, feature_maps)
    with torch.no_grad():
        assert not maps(feature_maps).requires_grad


def test_normalize_cams_by_hand():
    """Maximum 4: (-2, 1, 4) -> (0, 1, 4) / 4.00001; a map without positive cells -> 0."""
    cams = torch.tensor([[[-2.0, 1.0, 4.0]], [[-2.0, -1.0, 0.0]]])
    assert_close(normalize_cams(cams), torch.tensor([[[0.0, 1.0, 4.0]], [[0.0, 0.0, 0.0]]]) / 4.00001)


@given(scale=st.floats(0.5, 100))
def test_foreground_is_invariant_to_the_scale_of_the_map(scale):
    cams = torch.linspace(-1, 1, 25).view(1, 5, 5)
    masks = [foreground_mask(normalize_cams(cams * factor), threshold=0.33) for factor in (1, scale)]
    assert_close(masks[0], masks[1])


@pytest.mark.parametrize("side", [4, 7])
def test_a_map_that_is_hardly_positive_marks_no_foreground(side):
    faint = normalize_cams(torch.full((1, side, side), 1e-6))
    assert 0 < faint.max() < 0.3
    assert_close(foreground_mask(faint, threshold=0.3), torch.ones(1, side, side))


def test_foreground_mask_by_hand():
    """20 cells with values 0, 1/19, ..., 1: those from 0.5 on (10 of them) are foreground."""
    maps = torch.linspace(0, 1, 20).view(1, 4, 5)
    mask = foreground_mask(maps, threshold=0.5)
    assert mask.sum() == 10 and set(mask.unique().tolist()) == {0.0, 1.0}


def test_small_maps_get_the_soft_mask():
    maps = torch.linspace(0, 1, 16).view(1, 4, 4)
    assert_close(foreground_mask(maps, threshold=0.5), maps)


@pytest.mark.parametrize("side", [3, 5])
def test_a_map_without_evidence_masks_nothing(side):
    assert_close(foreground_mask(torch.zeros(1, side, side), threshold=0.3), torch.ones(1, side, side))


def test_the_mask_stops_gradients():
    maps = torch.rand(1, 3, 3, requires_grad=True)
    assert not foreground_mask(maps, threshold=0.3).requires_grad
