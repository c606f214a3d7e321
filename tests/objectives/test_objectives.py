import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from hnml_hf.objectives import OBJECTIVES
from hnml_hf.objectives.cross_entropy import cross_entropy
from hnml_hf.objectives.elr import early_learning_regularizer
from hnml_hf.objectives.gce import generalized_cross_entropy
from hnml_hf.objectives.hnml import mask_guided_loss
from hnml_hf.objectives.mean_teacher import consistency_loss


# p = (3/4, 1/4) everywhere below
LOGITS = torch.tensor([[math.log(3.0), 0.0]])


def test_cross_entropy_by_hand():
    assert_close(cross_entropy(LOGITS, torch.tensor([1])), torch.tensor([math.log(4)]))


def test_weights_of_samples_scale_the_loss_on_the_label():
    """1/4 log 4, and 1/4 of GCE's (1 - 1/2) / (1/2); ELR's regularizer, which asks for no label, stays."""
    labels, weights = torch.tensor([1]), torch.tensor([0.25])
    assert_close(cross_entropy(LOGITS, labels, weights), torch.tensor([math.log(4) / 4]))
    assert_close(generalized_cross_entropy(LOGITS, labels, weights, q=0.5), torch.tensor([0.25]))
    remember = {"remember": lambda probabilities: torch.tensor([[1.0, 0.0]]), "elr_weight": 2.0}
    terms, _ = OBJECTIVES["elr"](student_of(LOGITS), labels, **remember, sample_weights=weights)
    assert_close(terms["base"], torch.tensor([math.log(4) / 4 - 2 * math.log(4)]))


def test_gce_by_hand():
    """q = 1/2, p_y = 1/4: (1 - 1/2) / (1/2) = 1. q = 1: 1 - 1/4."""
    labels = torch.tensor([1])
    assert_close(generalized_cross_entropy(LOGITS, labels, q=0.5), torch.tensor([1.0]))
    assert_close(generalized_cross_entropy(LOGITS, labels, q=1.0), torch.tensor([0.75]))


def test_gce_tends_to_cross_entropy(generator):
    logits, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])
    assert_close(
        generalized_cross_entropy(logits, labels, q=1e-4), cross_entropy(logits, labels), rtol=1e-3, atol=1e-3
    )


def test_elr_by_hand():
    """t = (1, 0): log(1 - 3/4) = -log 4."""
    assert_close(early_learning_regularizer(LOGITS, torch.tensor([[1.0, 0.0]])), torch.tensor([-math.log(4)]))


def test_elr_objective_asks_for_targets_with_probabilities_and_adds_the_regularizer():
    asked = []

    def remember(probabilities):
        asked.append(probabilities)
        return torch.tensor([[1.0, 0.0]])

    terms, _ = OBJECTIVES["elr"](student_of(LOGITS), torch.tensor([1]), remember=remember, elr_weight=2.0)
    assert_close(asked[0], torch.tensor([[0.75, 0.25]]))
    assert_close(terms["base"], torch.tensor([math.log(4) - 2 * math.log(4)]))


def test_consistency_by_hand():
    """q = (1/2, 1/2): KL = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)."""
    assert_close(consistency_loss(LOGITS, torch.tensor([[0.5, 0.5]])), torch.tensor([0.5 * math.log(4 / 3)]))


@given(st.integers(0, 10**6), st.floats(0.1, 30))
def test_consistency_is_a_divergence(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits, other = scale * torch.randn(2, 5, 4, generator=generator)
    assert (consistency_loss(logits, other.softmax(-1)) > -1e-4).all()
    assert_close(consistency_loss(logits, logits.softmax(-1)), torch.zeros(5), atol=1e-4, rtol=0)


def test_consistency_with_a_certain_teacher_is_finite():
    assert_close(consistency_loss(LOGITS, torch.tensor([[0.0, 1.0]])), torch.tensor([math.log(4)]))


def masked(maps=None, teacher_maps=None, foreground=None, cam_weight=0.0):
    """Mask-guided loss of one image on a 1 x 2 map."""
    ones = torch.ones(1, 1, 2)
    return mask_guided_loss(
        LOGITS,
        ones if maps is None else maps,
        torch.tensor([[0.5, 0.5]]),
        ones if teacher_maps is None else teacher_maps,
        ones if foreground is None else foreground,
        cam_weight=cam_weight,
    ).item()


def test_foreground_term_by_hand():
    """omega = max q = 1/2 times KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 x 1/2 ln(4/3)."""
    assert_close(masked(), 0.25 * math.log(4 / 3))


def test_map_term_by_hand():
    """Student map (1/2, 1), teacher (1, 1), foreground on the first cell only: |1/2 - 1| / 1."""
    maps, foreground = torch.tensor([[[0.5, 1.0]]]), torch.tensor([[[1.0, 0.0]]])
    difference = masked(maps=maps, foreground=foreground, cam_weight=3.0) - masked()
    assert_close(difference, 0.5 * 3 * 0.5, rtol=1e-4, atol=1e-5)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(generator):
    maps, logits = torch.rand(5, 4, 4, generator=generator), torch.randn(5, 3, generator=generator)
    loss = mask_guided_loss(logits, maps, logits.softmax(-1), maps, torch.ones(5, 4, 4))
    assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)


class Output:
    def __init__(self, logits):
        self.logits = logits


def student_of(logits):
    return lambda **requests: Output(logits)


@pytest.mark.parametrize("name", ["hnml", "hnml_synthetic", "mlnt", "mean_teacher"])
def test_without_active_terms_nothing_but_cross_entropy_is_computed(name):
    """No teacher pass, no draw, no request: each would raise here."""
    objective = OBJECTIVES[name]
    needed = objective.__kwdefaults__ or {}
    parameters = objective.__code__.co_varnames[2 : 2 + objective.__code__.co_kwonlyargcount]
    options = {parameter: None for parameter in parameters if parameter not in needed}
    terms, _ = objective(student_of(LOGITS), torch.tensor([0]), **{**options, "active_terms": {"base"}})
    assert set(terms) == {"base"}
    assert_close(terms["base"], F.cross_entropy(LOGITS, torch.tensor([0]), reduction="none"))
