"""What holds of the maths for any input: shapes, dtypes, order of batch and classes, extreme logits, half floats."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hnml_hf.audit.dynamics import TrainingDynamics
from hnml_hf.modeling.cam import class_activation_maps, normalize_cams
from hnml_hf.noise import neighbor_labels
from hnml_hf.objectives.cross_entropy import cross_entropy
from hnml_hf.objectives.elr import early_learning_regularizer
from hnml_hf.objectives.gce import generalized_cross_entropy
from hnml_hf.objectives.hnml import foreground_mask, mask_guided_loss
from hnml_hf.objectives.inner_step import head_step_logits, label_residuals
from hnml_hf.objectives.mean_teacher import consistency_loss


PROPERTIES = settings(max_examples=60, deadline=None)
SIZES = {"b": st.integers(1, 9), "k": st.integers(2, 12), "seed": st.integers(0, 2**31)}
SCALES = st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])  # of logits; 1e4 is near the end of float16
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def draw(b: int, k: int, seed: int, scale: float = 1.0):
    """Logits, labels and a teacher's probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(b, k, generator=generator)
    labels = torch.randint(k, (b,), generator=generator)
    return logits, labels, (3 * torch.randn(b, k, generator=generator)).softmax(-1)


LOSSES = {  # name: per-example loss of logits, labels and a teacher's probabilities
    "cross_entropy": lambda z, y, q: cross_entropy(z, y),
    "gce": lambda z, y, q: generalized_cross_entropy(z, y, q=0.7),
    "elr": lambda z, y, q: early_learning_regularizer(z, q),
    "consistency": lambda z, y, q: consistency_loss(z, q),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_finite_per_example_and_have_finite_gradients(name):
    @PROPERTIES
    @given(**SIZES, scale=SCALES, dtype=DTYPES)
    def run(b, k, seed, scale, dtype):
        logits, labels, q = draw(b, k, seed, scale)
        logits = logits.to(dtype).clamp(-6e4, 6e4).requires_grad_()
        loss = LOSSES[name](logits, labels, q)
        assert loss.shape == (b,) and loss.dtype == torch.float32 and loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.dtype == dtype and gradient.isfinite().all()
        if name != "elr":
            assert (loss >= -1e-5).all()

    run()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_follow_a_permutation_of_batch_and_classes(name):
    @PROPERTIES
    @given(**SIZES, scale=SCALES)
    def run(b, k, seed, scale):
        logits, labels, q = draw(b, k, seed, scale)
        expected, function = LOSSES[name](logits, labels, q), LOSSES[name]
        generator = torch.Generator().manual_seed(seed)
        rows, classes = torch.randperm(b, generator=generator), torch.randperm(k, generator=generator)
        # ELR's is the logarithm of at least 1e-4, a difference of two numbers near 1 that are right to 1e-7
        tolerance = {"rtol": 1e-5, "atol": 5e-3 if name == "elr" else 1e-5}
        assert_close(function(logits[rows], labels[rows], q[rows]), expected[rows], **tolerance)
        renamed = classes.argsort()[labels]  # class c is now called classes.argsort()[c]
        assert_close(function(logits[:, classes], renamed, q[:, classes]), expected, **tolerance)

    run()


@pytest.mark.parametrize("name", ["cross_entropy", "gce", "consistency"])
def test_losses_do_not_see_a_constant_added_to_the_logits(name):
    @PROPERTIES
    @given(**SIZES, shift=st.floats(-100, 100))
    def run(b, k, seed, shift):
        logits, labels, q = draw(b, k, seed)
        assert_close(LOSSES[name](logits + shift, labels, q), LOSSES[name](logits, labels, q), rtol=1e-3, atol=1e-4)

    run()


@PROPERTIES
@given(**SIZES, scale=SCALES, lr=st.floats(0, 1), draws=st.integers(1, 3))
def test_the_head_step_follows_a_permutation(b, k, seed, scale, lr, draws):
    """And a step of length 0 changes nothing; m label sets at once are m steps."""
    logits, _, _ = draw(b, k, seed, min(scale, 30.0))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(b, 5, generator=generator)
    labels = torch.randint(k, (draws, b), generator=generator)
    residuals = label_residuals(logits, labels)
    assert residuals.shape == (draws, b, k)
    assert_close(residuals.sum(-1), torch.zeros(draws, b), rtol=0, atol=1e-4)
    stepped = head_step_logits(logits, features, features, residuals, lr=lr)
    assert stepped.shape == (draws, b, k) and stepped.isfinite().all()
    assert_close(head_step_logits(logits, features, features, residuals, lr=0.0), logits.expand(draws, b, k))
    rows, tolerance = torch.randperm(b), {"rtol": 1e-4, "atol": 1e-4}
    mixed = head_step_logits(logits[rows], features[rows], features[rows], residuals[:, rows], lr=lr)
    assert_close(mixed, stepped[:, rows], **tolerance)
    for one in range(draws):
        alone = head_step_logits(logits, features, features, residuals[one : one + 1], lr=lr)
        assert_close(alone[0], stepped[one], **tolerance)


@PROPERTIES
@given(b=st.integers(1, 5), side=st.integers(1, 7), seed=st.integers(0, 2**31), scale=SCALES, dtype=DTYPES)
def test_maps_and_masks_stay_in_their_range(b, side, seed, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(b, 4, side, side, generator=generator)
    weights = torch.randn(b, 4, generator=generator)
    cams = class_activation_maps((scale * maps).to(dtype), weights.to(dtype))
    assert cams.shape == (b, side, side)
    normalized = normalize_cams(cams.clamp(-6e4, 6e4))
    assert normalized.dtype == torch.float32 and ((normalized >= 0) & (normalized <= 1)).all()
    mask = foreground_mask(normalized, threshold=0.3)
    assert mask.shape == normalized.shape and ((mask >= 0) & (mask <= 1)).all()
    assert (mask.flatten(1).amax(1) > 0).all()  # no image is masked away
    rows = torch.randperm(b)
    assert torch.equal(foreground_mask(normalized[rows], threshold=0.3), mask[rows])


@PROPERTIES
@given(**SIZES, side=st.integers(1, 6), scale=SCALES)
def test_mask_guided_loss_is_finite_and_at_least_zero(b, k, seed, side, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(b, k, generator=generator)
    cams = (scale * torch.randn(b, side, side, generator=generator)).requires_grad_()
    maps, teacher_maps = normalize_cams(cams), normalize_cams(torch.randn(b, side, side, generator=generator))
    q = (scale * torch.randn(b, k, generator=generator)).softmax(-1)
    mask = foreground_mask(teacher_maps, threshold=0.3)
    loss = mask_guided_loss(logits, maps, q, teacher_maps, mask)
    assert loss.shape == (b,) and loss.isfinite().all() and (loss >= -1e-4).all()
    (gradient,) = torch.autograd.grad(loss.sum(), cams)
    assert gradient.isfinite().all()
    rows = torch.randperm(b)
    mixed = mask_guided_loss(logits[rows], maps[rows], q[rows], teacher_maps[rows], mask[rows])
    assert_close(mixed, loss[rows], rtol=1e-4, atol=1e-4)


@PROPERTIES
@given(
    b=st.integers(3, 12),
    k=st.integers(2, 8),
    seed=st.integers(0, 2**31),
    dtype=DTYPES,
    ratio=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_synthetic_labels_are_labels_of_the_batch(b, k, seed, dtype, ratio):
    generator = torch.Generator().manual_seed(seed)
    features, labels = torch.randn(b, 4, generator=generator).to(dtype), torch.randint(k, (b,), generator=generator)
    drawn = neighbor_labels(
        features, labels, num_neighbors=2, perturb_ratio=ratio, num_draws=3, generator=generator.manual_seed(seed)
    )
    assert drawn.shape == (3, b) and drawn.dtype == torch.int64
    assert set(drawn.unique().tolist()) <= set(labels.tolist())
    assert ratio or (drawn == labels).all()


@PROPERTIES
@given(
    n=st.integers(2, 12),
    k=st.integers(2, 14),
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
def test_training_dynamics_do_not_depend_on_how_predictions_are_cut(n, k, seed, cuts):
    """Three epochs of predictions in one call or several, as between checkpoints; some samples come twice an epoch."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, k, n)
    index = np.concatenate([np.append(order := random.permutation(n), order[:2]) for _ in range(3)])
    epoch = np.repeat(np.arange(3), n + 2)
    probabilities = random.dirichlet(np.ones(k), len(index)).astype(np.float32)
    whole, parts = (TrainingDynamics(np.arange(n), labels, k) for _ in range(2))
    whole.update(index, probabilities, epoch=epoch)
    bounds = sorted({0, len(index), *(cut for cut in cuts if cut < len(index))})
    for start, end in zip(bounds, bounds[1:], strict=False):
        parts.update(index[start:end], probabilities[start:end], epoch=epoch[start:end])
    assert (whole.records["times_seen"] == 3).all()
    assert whole.records.tobytes() == parts.records.tobytes()
