import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from hnml_hf.modeling.cam import normalize_cams
from hnml_hf.objectives import OBJECTIVES, sigmoid_rampup
from hnml_hf.objectives.cross_entropy import cross_entropy
from hnml_hf.objectives.elr import early_learning_regularizer
from hnml_hf.objectives.gce import generalized_cross_entropy
from hnml_hf.objectives.hnml import mask_guided_loss
from hnml_hf.objectives.mean_teacher import Evidence, balance_loss, consistency_loss, label_trust, refurbishment
from hnml_hf.objectives.mlnt import batch_confusion, draw_synthetic_labels


# p = (3/4, 1/4) everywhere below
LOGITS = torch.tensor([[math.log(3.0), 0.0]])


def test_cross_entropy_by_hand():
    assert_close(cross_entropy(LOGITS, torch.tensor([1])), torch.tensor([math.log(4)]))


def test_weights_of_samples_scale_the_loss_on_the_label():
    """1/4 log 4, and 1/4 of GCE's (1 - 1/2) / (1/2); ELR's regulariser, which asks for no label, stays."""
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


def test_label_trust_by_hand():
    """q = (0.6, 0.3, 0.1): the likeliest class has 0.6 / (0.6 + 0.3), the second 0.3 / 0.9, the last 0.1 / 0.7."""
    q = torch.tensor([[0.6, 0.3, 0.1]]).expand(3, 3)
    assert_close(label_trust(q, torch.tensor([0, 1, 2])), torch.tensor([2 / 3, 1 / 3, 1 / 7]))
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert_close(label_trust(sure, torch.tensor([0, 1])), torch.tensor([1.0, 0.0]))


@given(st.floats(0, 1))
def test_refurbishment_leads_from_given_to_refurbished_labels(weight):
    """CE(y) + s (1 - w) (KL(q||p) - CE(y)) has the gradient of the cross-entropy of y mixed with q by s (1 - w)."""
    q, labels, trust = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([0]), torch.tensor([0.4])
    logits = torch.tensor([[0.3, -0.2, 1.0]], requires_grad=True)
    base = cross_entropy(logits, labels)
    loss = base + weight * refurbishment(base, consistency_loss(logits, q), trust)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    share = weight * (1 - trust[:, None])
    target = (1 - share) * F.one_hot(labels, 3) + share * q
    assert_close(gradient, logits.softmax(-1) - target, atol=1e-6, rtol=1e-5)


def test_balance_by_hand():
    """Mean of (3/4, 1/4) and (1/4, 3/4) is uniform; against pi = (1/4, 3/4): 1/4 ln(1/2) + 3/4 ln(3/2)."""
    logits = torch.cat([LOGITS, LOGITS.flip(-1)])
    assert_close(balance_loss(logits, torch.tensor([0.5, 0.5])), torch.zeros(2), atol=1e-6, rtol=0)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert_close(balance_loss(logits, torch.tensor([0.25, 0.75])), torch.full((2,), expected))
    assert balance_loss(torch.tensor([[200.0, 0.0]]), torch.tensor([0.5, 0.5])).isfinite().all()


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


def test_batch_confusion_by_hand():
    """Class 0: q sums to (1.1, 0.6, 0.3), of which (0, 2/3, 1/3) is other; class 1 is taken for 1 alone."""
    q = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])
    expected = torch.tensor([[0, 2 / 3, 1 / 3], [0.5, 0, 0.5], [0.5, 0.5, 0]], dtype=torch.float64)
    assert_close(batch_confusion(q, torch.tensor([0, 0, 1])), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label_draw", ["uniform", "confusion"])
def test_drawn_labels_are_other_ones_of_the_share_asked_for(label_draw, generator):
    labels = torch.arange(40) % 4
    q = torch.full((40, 4), 0.2).scatter(1, ((labels + 1) % 4)[:, None], 0.4)
    q[:, 3] = 0  # the teacher takes nothing for class 3
    options = {"num_neighbors": 1, "perturb_ratio": 0.5, "num_draws": 3, "generator": generator}
    drawn = draw_synthetic_labels(Evidence(q, None, None), labels, label_draw=label_draw, **options)
    assert drawn.shape == (3, 40) and ((drawn != labels).sum(1) == 20).all()
    assert not torch.equal(drawn[0], drawn[1])
    assert bool((drawn[drawn != labels] == 3).any()) == (label_draw == "uniform")


def test_rampup_by_hand():
    assert sigmoid_rampup(0) == math.exp(-5) and sigmoid_rampup(1) == 1 == sigmoid_rampup(7)
    assert_close(sigmoid_rampup(0.5), math.exp(-1.25))


MASK_OPTIONS = {"cam_weight": 0.0, "background_weight": 0.0, "temperature": 1.0}


def masked(cams=None, teacher_maps=None, foreground=None, regions=None, q=(0.5, 0.5), **options):
    """Mask-guided loss of one image on a 1 x 2 map."""
    ones = torch.ones(1, 1, 2)
    return mask_guided_loss(
        LOGITS[None] if regions is None else regions,
        ones if cams is None else cams,
        torch.tensor([q]),
        ones if teacher_maps is None else teacher_maps,
        ones if foreground is None else foreground,
        **{**MASK_OPTIONS, **options},
    ).item()


def test_foreground_term_by_hand():
    """omega = max q = 1/2 times KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 x 1/2 ln(4/3)."""
    assert_close(masked(), 0.25 * math.log(4 / 3))


def test_sharpening_by_hand():
    """T = 1/2 squares q = (3/4, 1/4) to (9/10, 1/10), while omega stays 3/4."""
    kl = 0.9 * math.log(0.9 / 0.75) + 0.1 * math.log(0.1 / 0.25)
    assert_close(masked(q=(0.75, 0.25), temperature=0.5), 0.75 * kl)


def test_map_term_by_hand():
    """Student map (1, 2) normalised to (1/2, 1), teacher (1, 1), foreground on the first cell only: |1/2 - 1| / 1."""
    cams, foreground = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.0]]])
    difference = masked(cams=cams, foreground=foreground, cam_weight=3.0) - masked()
    assert_close(difference, 0.5 * 3 * 0.5, rtol=1e-4, atol=1e-5)


def test_background_term_by_hand():
    """KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 ln(4/3), without the factor omega."""
    regions = torch.cat([LOGITS, LOGITS])[:, None]
    assert_close(masked(regions=regions, background_weight=2.0) - masked(), math.log(4 / 3))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(generator):
    cams, logits = torch.rand(5, 4, 4, generator=generator), torch.randn(1, 5, 3, generator=generator)
    loss = mask_guided_loss(
        logits, cams, logits[0].softmax(-1), normalize_cams(cams), torch.ones(5, 4, 4),
        cam_weight=1.0, background_weight=0.0, temperature=1.0,
    )  # fmt: skip
    assert_close(loss, torch.zeros(5), atol=1e-6, rtol=0)


class Output:
    def __init__(self, logits):
        self.logits = logits


def student_of(logits):
    return lambda **requests: Output(logits)


@pytest.mark.parametrize("name", ["hnml", "mlnt", "mean_teacher"])
def test_without_wanted_terms_nothing_but_cross_entropy_is_computed(name):
    """No teacher pass, no draw, no request: each would raise here."""
    objective = OBJECTIVES[name]
    needed = objective.__kwdefaults__ or {}
    parameters = objective.__code__.co_varnames[2 : 2 + objective.__code__.co_kwonlyargcount]
    options = {parameter: None for parameter in parameters if parameter not in needed}
    terms, _ = objective(student_of(LOGITS), torch.tensor([0]), **{**options, "wanted": {"base"}})
    assert set(terms) == {"base"}
    assert_close(terms["base"], F.cross_entropy(LOGITS, torch.tensor([0]), reduction="none"))
