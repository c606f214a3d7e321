import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hnml_hf import noise


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- neighbor_labels ----------------------------------------------------------------------------------------------


def test_nearest_neighbor_by_hand():
    """
    Points on a line at 0, 1, 3, 7, labels 0, 1, 2, 3, every row perturbed, one neighbour.
    Nearest: 0 -> 1 (1 away), 1 -> 0 (1 against 2), 3 -> 1 (2 against 3), 7 -> 3 (4 away). So labels 1, 0, 1, 2.
    """
    features = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    drawn = noise.neighbor_labels(
        features,
        torch.tensor([0, 1, 2, 3]),
        num_neighbors=1,
        perturb_ratio=1.0,
        num_draws=3,
        generator=make_generator(),
    )
    assert drawn.tolist() == [[1, 0, 1, 2]] * 3
    assert drawn.dtype == torch.int64


def test_two_neighbors_are_drawn_uniformly():
    """
    Points 0, 1, 3, 7 with labels 0..3. The two nearest: 0 -> {1, 3}, 1 -> {0, 3}, 3 -> {1, 0}, 7 -> {3, 1}.
    4000 draws: each of the two has probability 1/2, standard deviation sqrt(.25 / 4000) = 0.0079; 5 of them = 0.04.
    """
    features = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    labels = torch.arange(4)
    drawn = noise.neighbor_labels(
        features, labels, num_neighbors=2, perturb_ratio=1.0, num_draws=4000, generator=make_generator()
    )
    for row, allowed in enumerate([(1, 2), (0, 2), (1, 0), (2, 1)]):
        counts = drawn[:, row].bincount(minlength=4) / 4000
        torch.testing.assert_close(counts[list(allowed)], torch.tensor([0.5, 0.5]), atol=0.04, rtol=0)
        assert counts.sum() == counts[list(allowed)].sum()


def test_every_draw_perturbs_exactly_the_share():
    """All labels differ, so every picked row changes: round(0.5 * 7) = round(3.5) = 4 rows in each draw."""
    features = torch.randn(7, 3, generator=make_generator())
    labels = torch.arange(7)
    drawn = noise.neighbor_labels(
        features, labels, num_neighbors=3, perturb_ratio=0.5, num_draws=50, generator=make_generator()
    )
    changed = drawn != labels
    assert changed.sum(dim=1).tolist() == [4] * 50
    assert len({tuple(row.tolist()) for row in changed}) > 10  # the subset is drawn anew
    assert changed.any(dim=0).all()


@settings(max_examples=50, deadline=None)
@given(
    batch_size=st.integers(2, 12),
    num_neighbors=st.integers(1, 15),
    perturb_ratio=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_labels_come_from_allowed_neighbors_only(batch_size, num_neighbors, perturb_ratio, seed):
    generator = make_generator(seed)
    features = torch.randn(batch_size, 4, generator=generator)
    labels = torch.arange(batch_size)  # the label names the row it came from
    drawn = noise.neighbor_labels(
        features,
        labels,
        num_neighbors=num_neighbors,
        perturb_ratio=perturb_ratio,
        num_draws=5,
        generator=generator,
    )
    distances = (features[:, None] - features).norm(dim=2)
    for i in range(batch_size):
        others = sorted((j for j in range(batch_size) if j != i), key=lambda j: distances[i, j].item())
        assert set(drawn[:, i].tolist()) <= {i, *others[: min(num_neighbors, batch_size - 1)]}
    assert ((drawn != labels).sum(dim=1) == round(perturb_ratio * batch_size)).all()


def test_permuting_the_batch_permutes_the_labels():
    generator = make_generator()
    features, labels = torch.randn(40, 64, generator=generator), torch.randint(5, (40,), generator=generator)
    permutation = torch.randperm(40, generator=generator)
    options = {"num_neighbors": 1, "perturb_ratio": 1.0, "num_draws": 1}
    drawn = noise.neighbor_labels(features, labels, generator=make_generator(), **options)
    permuted = noise.neighbor_labels(features[permutation], labels[permutation], generator=make_generator(), **options)
    assert torch.equal(drawn[:, permutation], permuted)


def test_ties_and_duplicates_exclude_the_row_itself():
    """All points coincide: the neighbour is the first *other* row, never the row itself."""
    drawn = noise.neighbor_labels(
        torch.zeros(4, 2),
        torch.arange(4),
        num_neighbors=1,
        perturb_ratio=1.0,
        num_draws=2,
        generator=make_generator(),
    )
    assert drawn.tolist() == [[1, 0, 0, 0]] * 2


def test_close_neighbors_far_from_the_origin_keep_their_order():
    """4096 + (0, 1, 3): |x|^2 = 1.7e7 eats the digits of the distance in the matrix-product form."""
    features = torch.full((30, 2), -9000.0)
    features[:3] = 4096 + torch.tensor([0.0, 0.25, 0.75])[:, None]
    drawn = noise.neighbor_labels(
        features,
        torch.arange(30),
        num_neighbors=1,
        perturb_ratio=1.0,
        num_draws=1,
        generator=make_generator(),
    )
    assert drawn[0, :3].tolist() == [1, 0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_are_nobodys_neighbor(bad):
    """0, 1, 3 and a bad row: the good rows choose among themselves; the bad row takes a label of the batch."""
    features = torch.tensor([[bad], [0.0], [1.0], [3.0]])
    drawn = noise.neighbor_labels(
        features,
        torch.tensor([7, 0, 1, 2]),
        num_neighbors=2,
        perturb_ratio=1.0,
        num_draws=200,
        generator=make_generator(),
    )
    assert 7 not in drawn
    assert set(drawn[:, 1].tolist()) == {1, 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_agree_with_float32(dtype):
    """Small integers are exact in every dtype, so the draws are the same."""
    features = torch.randint(-8, 8, (16, 4), generator=make_generator())
    labels = torch.arange(16)
    options = {"num_neighbors": 4, "perturb_ratio": 0.5, "num_draws": 3}
    expected = noise.neighbor_labels(features.float(), labels, generator=make_generator(), **options)
    drawn = noise.neighbor_labels(features.to(dtype), labels, generator=make_generator(), **options)
    assert torch.equal(drawn, expected)


def test_seed_decides_the_draws_and_arguments_stay_untouched():
    features, labels = torch.randn(8, 3, generator=make_generator(), requires_grad=True), torch.arange(8)
    options = {"num_neighbors": 3, "perturb_ratio": 0.5, "num_draws": 4}
    first = noise.neighbor_labels(features, labels, generator=make_generator(1), **options)
    assert torch.equal(first, noise.neighbor_labels(features, labels, generator=make_generator(1), **options))
    assert not torch.equal(first, noise.neighbor_labels(features, labels, generator=make_generator(2), **options))
    assert labels.tolist() == list(range(8))


@pytest.mark.parametrize("batch_size", [0, 1])
def test_no_neighbors_no_noise(batch_size):
    drawn = noise.neighbor_labels(
        torch.zeros(batch_size, 3),
        torch.full((batch_size,), 5),
        num_neighbors=10,
        perturb_ratio=1.0,
        num_draws=3,
        generator=make_generator(),
    )
    assert drawn.tolist() == [[5] * batch_size] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4, 2, 2)}, "shape"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "shape"),
        ({"num_neighbors": 0}, "at least 1"),
        ({"num_draws": 0}, "at least 1"),
        ({"perturb_ratio": 1.5}, "perturb_ratio"),
        ({"perturb_ratio": float("nan")}, "perturb_ratio"),
    ],
)
def test_neighbor_labels_refuses(change, message):
    arguments = {
        "features": torch.zeros(4, 2),
        "labels": torch.zeros(4, dtype=torch.int64),
        "num_neighbors": 1,
        "perturb_ratio": 0.5,
        "num_draws": 1,
    } | change
    with pytest.raises(ValueError, match=message):
        noise.neighbor_labels(
            arguments.pop("features"), arguments.pop("labels"), generator=make_generator(), **arguments
        )


@pytest.mark.gpu
def test_cpu_and_gpu_draw_the_same():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    features = torch.randn(64, 512, generator=make_generator())
    labels = torch.randint(10, (64,), generator=make_generator(1))
    options = {"num_neighbors": 10, "perturb_ratio": 0.5, "num_draws": 10}
    on_cpu = noise.neighbor_labels(features, labels, generator=make_generator(), **options)
    on_gpu = noise.neighbor_labels(features.cuda(), labels.cuda(), generator=make_generator(), **options)
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_cpu, on_gpu.cpu())
