import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hnml_hf import noise
from hnml_hf.noise.draws import invert_cdf


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- neighbor_labels ----------------------------------------------------------------------------------------------


def test_nearest_neighbor_by_hand():
    """Points on a line at 0, 1, 3, 7, labels 0, 1, 2, 3, every row perturbed, one neighbor.
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
    """Points 0, 1, 3, 7 with labels 0..3. The two nearest: 0 -> {1, 3}, 1 -> {0, 3}, 3 -> {1, 0}, 7 -> {3, 1}.
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
    """All points coincide: the neighbor is the first *other* row, never the row itself."""
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


# ---- transition matrices ------------------------------------------------------------------------------------------


def test_transition_matrices_by_hand():
    """k = 4. Symmetric r = 0.3: excluded 0.7 and 0.3 / 3 = 0.1; included 0.7 + 0.3 / 4 = 0.775 and 0.075.
    Pair flip r = 0.45: 0.55 on the diagonal, 0.45 one to the right, circular. Flips 1 -> 3 at 0.4: one row changes.
    """
    excluded = noise.symmetric_transition_matrix(4, 0.3, include_true=False)
    included = noise.symmetric_transition_matrix(4, 0.3, include_true=True)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(excluded, 0.1 + 0.6 * eye)
    torch.testing.assert_close(included, 0.075 + 0.7 * eye)
    assert noise.pair_flip_transition_matrix(4, 0.45).tolist() == [
        [0.55, 0.45, 0, 0],
        [0, 0.55, 0.45, 0],
        [0, 0, 0.55, 0.45],
        [0.45, 0, 0, 0.55],
    ]
    assert noise.flip_transition_matrix(4, 0.4, flips={1: 3}).tolist() == [
        [1, 0, 0, 0],
        [0, 0.6, 0, 0.4],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_cifar10_table():
    """40 % of five of ten balanced classes flip: 20 % of all labels. Cat and dog swap (3 <-> 5)."""
    matrix = noise.flip_transition_matrix(10, 0.4, flips=noise.CIFAR10_FLIPS)
    assert 1 - matrix.diagonal().mean().item() == pytest.approx(0.2)
    for true_class, noisy_class in [(9, 1), (2, 0), (4, 7), (3, 5), (5, 3)]:
        assert matrix[true_class, noisy_class] == 0.4
    assert matrix.diagonal()[[0, 1, 6, 7, 8]].tolist() == [1] * 5


def test_cifar100_tables():
    """
    The superclass table stays inside the true superclass, the legacy one does so for 6 of its 100 flips only. Aquatic
    mammals (coarse 0) are beaver 4, dolphin 30, otter 55, seal 72, whale 95: the circle 4, 30, 55, 72, 95, 4.
    """
    coarse = noise.CIFAR100_SUPERCLASSES
    assert sorted(coarse) == sorted(list(range(20)) * 5)
    tables = {scheme: noise.cifar100_flips(scheme) for scheme in ("superclass", "legacy_block5")}
    for table in tables.values():
        assert sorted(table) == sorted(table.values()) == list(range(100))
    inside = {name: sum(coarse[i] == coarse[j] for i, j in table.items()) for name, table in tables.items()}
    assert inside == {"superclass": 100, "legacy_block5": 6}
    assert [tables["superclass"][i] for i in (4, 30, 55, 72, 95)] == [30, 55, 72, 95, 4]
    assert [tables["legacy_block5"][i] for i in (5, 6, 7, 8, 9)] == [6, 7, 8, 9, 5]
    with pytest.raises(ValueError, match="superclass"):
        noise.cifar100_flips("coarse")


@settings(max_examples=50, deadline=None)
@given(num_classes=st.integers(2, 30), rate=st.floats(0, 1))
def test_rows_sum_to_one(num_classes, rate):
    for matrix in (
        noise.symmetric_transition_matrix(num_classes, rate, include_true=True),
        noise.symmetric_transition_matrix(num_classes, rate, include_true=False),
        noise.pair_flip_transition_matrix(num_classes, rate),
    ):
        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(num_classes, dtype=torch.float64))
        noise.check_transition_matrix(matrix)
    excluded = noise.symmetric_transition_matrix(num_classes, rate, include_true=False)
    included = noise.symmetric_transition_matrix(num_classes, rate, include_true=True)
    torch.testing.assert_close(1 - excluded.diagonal().mean().item(), rate)
    torch.testing.assert_close(1 - included.diagonal().mean().item(), rate * (1 - 1 / num_classes))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.0, 0.0]], "square"),
        ([[0.5, 0.4], [0.5, 0.5]], "Row 0 .* 0.9"),
        ([[0.7, 0.2], [0.3, 0.8]], "Transpose"),
        ([[1.1, -0.1], [0.0, 1.0]], "row 0, column 0"),
        ([[1.0, 0.0], [float("nan"), 1.0]], "row 1, column 0"),
    ],
)
def test_check_transition_matrix_refuses(matrix, message):
    with pytest.raises(ValueError, match=message):
        noise.check_transition_matrix(torch.tensor(matrix))


def test_matrix_builders_refuse():
    with pytest.raises(ValueError, match="num_classes"):
        noise.symmetric_transition_matrix(1, 0.1, include_true=False)
    with pytest.raises(ValueError, match="rate"):
        noise.pair_flip_transition_matrix(3, -0.1)
    with pytest.raises(ValueError, match="2 -> 3"):
        noise.flip_transition_matrix(3, 0.1, flips={2: 3})
    with pytest.raises(ValueError, match="1 -> 1"):
        noise.flip_transition_matrix(3, 0.1, flips={1: 1})


# ---- draws --------------------------------------------------------------------------------------------------------


def test_inverse_cdf_by_hand():
    """p = (0, 0.25, 0, 0.75, 0), cumulative 0, 0.25, 0.25, 1, 1. The drawn class is the first whose cumulative value
    exceeds u: u = 0 -> 1 (never class 0 with p = 0), 0.2 -> 1, 0.25 -> 3 (never class 2), 0.9999999999999999 -> 3.
    """
    probabilities = torch.tensor([0, 0.25, 0, 0.75, 0], dtype=torch.float64)
    uniform = torch.tensor([0, 0.2, 0.25, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(probabilities, uniform).tolist() == [1, 1, 3, 3]


def test_rounding_never_draws_an_impossible_class():
    """Ten times 0.1 adds up to 1 - 2^-53 in floating point; the last class, of probability 0, stays out."""
    probabilities = torch.tensor([0.1] * 10 + [0.0], dtype=torch.float64)
    assert probabilities.cumsum(0)[-1] < 1
    assert invert_cdf(probabilities, torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 9


def test_fixed_seed_gives_these_labels():
    """Recorded once with this code: the stream of a seed must not change between versions or machines."""
    labels = torch.arange(12) % 3
    matrix = noise.symmetric_transition_matrix(3, 0.6, include_true=False)
    drawn = noise.corrupt_labels(labels, matrix, generator=make_generator(42))
    assert drawn.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 1]
    flips = noise.symmetric_transition_matrix(3, 1.0, include_true=False)
    drawn = noise.corrupt_labels_exact(labels, flips, rate=0.5, generator=make_generator(42))
    assert drawn.tolist() == [1, 0, 1, 0, 1, 2, 2, 2, 1, 0, 1, 2]


def test_measured_rates_follow_the_matrix():
    """20,000 samples a class: 5 standard deviations of a share are at most 5 sqrt(.25 / 20000) = 0.018."""
    matrix = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.9, 0.0, 0.1]], dtype=torch.float64)
    labels = torch.arange(60_000) % 3
    drawn = noise.corrupt_labels(labels, matrix, generator=make_generator(3))
    measured = torch.stack([drawn[labels == i].bincount(minlength=3) / 20_000 for i in range(3)]).double()
    torch.testing.assert_close(measured, matrix, atol=0.018, rtol=0)
    assert (measured[matrix == 0] == 0).all()


@settings(max_examples=30, deadline=None)
@given(num_samples=st.integers(0, 300), rate=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_exact_draw_counts(num_samples, rate, seed):
    generator = make_generator(seed)
    labels = torch.randint(7, (num_samples,), generator=generator)
    flips = noise.symmetric_transition_matrix(7, 1.0, include_true=False)
    drawn = noise.corrupt_labels_exact(labels, flips, rate=rate, generator=generator)
    assert (drawn != labels).sum().item() == int(rate * num_samples + 1e-9)
    assert ((drawn >= 0) & (drawn < 7)).all()


def test_exact_draw_reads_the_rate_as_written():
    """0.29 * 100 = 28.999999999999996 in floating point: 29 labels are wrong."""
    flips = noise.symmetric_transition_matrix(10, 1.0, include_true=False)
    labels = torch.zeros(100, dtype=torch.int64)
    drawn = noise.corrupt_labels_exact(labels, flips, rate=0.29, generator=make_generator())
    assert (drawn != 0).sum() == 29


def test_including_the_true_class_lowers_the_rate():
    """r (1 - 1/k) = 0.5 * 0.9 = 0.45 of 50,000; 5 standard deviations: 5 sqrt(25000 * .1 * .9) / 50000 = 0.005."""
    labels = torch.arange(50_000) % 10
    flips = noise.symmetric_transition_matrix(10, 1.0, include_true=True)
    drawn = noise.corrupt_labels_exact(labels, flips, rate=0.5, generator=make_generator())
    assert (drawn != labels).double().mean().item() == pytest.approx(0.45, abs=0.005)


def test_draws_leave_the_clean_labels_alone():
    labels = torch.arange(100) % 10
    noise.corrupt_labels(labels, noise.pair_flip_transition_matrix(10, 0.4), generator=make_generator())
    noise.corrupt_labels_exact(
        labels, noise.pair_flip_transition_matrix(10, 1.0), rate=0.4, generator=make_generator()
    )
    assert torch.equal(labels, torch.arange(100) % 10)


@pytest.mark.parametrize("labels", [torch.tensor([0, -1]), torch.tensor([0, 3]), torch.tensor([0.0, 1.0])])
def test_draws_refuse_bad_labels(labels):
    with pytest.raises(ValueError, match="`labels` must"):
        noise.corrupt_labels(labels, noise.pair_flip_transition_matrix(3, 0.1), generator=make_generator())


# ---- instance-dependent noise -------------------------------------------------------------------------------------


def draw_instance_dependent(pixels, labels, **options):
    options = {"num_classes": 4, "num_pixels": pixels.shape[1], "rate": 0.3, "generator": make_generator(5)} | options
    return noise.instance_dependent_labels(lambda rows: pixels[rows], labels, **options)


def test_instance_dependent_rates():
    """Symmetric truncation keeps the mean at 0.5; at 0.2 the left tail below 0 (2.3 %) moves it to
    0.2 + 0.1 phi(-2) / (1 - Phi(-2)) = 0.2 + 0.1 * 0.05399 / 0.97725 = 0.2055. 20,000 samples: 5 sd = 0.018.
    """
    pixels = torch.randint(256, (20_000, 12), generator=make_generator(), dtype=torch.uint8)
    labels = torch.arange(20_000) % 4
    for rate, expected in [(0.2, 0.2055), (0.5, 0.5)]:
        drawn = draw_instance_dependent(pixels, labels, rate=rate)
        assert (drawn != labels).double().mean().item() == pytest.approx(expected, abs=0.018)


def test_same_pixels_same_alternative():
    """Raw pixels make the softmax one-hot: all wrong labels of one class's identical images are the same class."""
    pixels = torch.randint(256, (1, 300), generator=make_generator()).expand(400, 300)
    labels = torch.arange(400) % 4
    drawn = draw_instance_dependent(pixels, labels, rate=0.5)
    for true_class in range(4):
        flipped = drawn[(labels == true_class) & (drawn != labels)]
        assert len(flipped) > 20
        assert len(flipped.unique()) == 1


def test_pixel_scaling_changes_what_flips_mean():
    """Bright images with small differences: unscaled, the mean image decides; standardized, each image does."""
    pixels = 200 + torch.randint(20, (4000, 48), generator=make_generator())
    labels = torch.arange(4000) % 4

    def largest_share(scaling):
        drawn = draw_instance_dependent(pixels, labels, pixel_scaling=scaling, rate=0.5)
        flips = drawn[(labels == 0) & (drawn != labels)].bincount()
        return (flips.max() / flips.sum()).item()

    assert largest_share("raw") > 0.9
    assert largest_share("standardized") < 0.6
    assert draw_instance_dependent(pixels, labels, pixel_scaling="unit").unique().tolist() == [0, 1, 2, 3]


def test_instance_dependent_noise_does_not_depend_on_the_chunks():
    pixels = torch.randint(256, (300, 12), generator=make_generator(), dtype=torch.uint8)
    labels = torch.randint(4, (300,), generator=make_generator(1))
    whole = draw_instance_dependent(pixels, labels, chunk_size=1000)
    assert torch.equal(whole, draw_instance_dependent(pixels, labels, chunk_size=7))
    assert not torch.equal(whole, draw_instance_dependent(pixels, labels, generator=make_generator(6)))


def test_every_image_is_loaded_once_and_absent_classes_are_fine():
    pixels = torch.randint(256, (100, 12), generator=make_generator(), dtype=torch.uint8)
    seen = []

    def load_pixels(rows):
        seen.extend(rows.tolist())
        return pixels[rows]

    labels = torch.tensor([0, 2, 3, 3]).repeat(25)
    noise.instance_dependent_labels(
        load_pixels, labels, num_classes=4, num_pixels=12, rate=0.3, generator=make_generator(5)
    )
    assert sorted(seen) == list(range(100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "strictly between"),
        ({"rate": 1.0}, "strictly between"),
        ({"rate_std": 0.0}, "rate_std"),
        ({"pixel_scaling": "imagenet"}, "pixel_scaling"),
        ({"num_pixels": 13}, r"\(4, 12\)"),
    ],
)
def test_instance_dependent_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        draw_instance_dependent(torch.zeros(4, 12), torch.zeros(4, dtype=torch.int64), **change)


class OtherDevice:
    """Stands for a generator that is not on the CPU."""

    device = torch.device("meta")


def test_generators_off_the_cpu_are_refused():
    labels, matrix = torch.zeros(4, dtype=torch.int64), noise.pair_flip_transition_matrix(3, 0.1)
    with pytest.raises(ValueError, match="on the CPU"):
        noise.corrupt_labels(labels, matrix, generator=OtherDevice())
    with pytest.raises(ValueError, match="on the CPU"):
        noise.corrupt_labels_exact(labels, matrix, rate=0.1, generator=OtherDevice())
    with pytest.raises(ValueError, match="on the CPU"):
        noise.neighbor_labels(
            torch.zeros(4, 1), labels, num_neighbors=1, perturb_ratio=0.5, num_draws=1, generator=OtherDevice()
        )
