import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch.utils._python_dispatch import TorchDispatchMode

from hnml_hf.audit import judge
from hnml_hf.audit.judge import (
    Discriminants,
    FoldStatistics,
    NoiseModel,
    assign_folds,
    identical_rows,
    judge_labels,
    nearest_neighbors,
    neighbor_posteriors,
    rate_margin,
)
from hnml_hf.audit.noise_model import doubt_of_rate


K, D = 4, 12


def clusters(n: int = 600, k: int = K, d: int = D, *, seed: int = 0, spread: float = 1.0):
    """Features around one center per class, not centered and of different scales, and the true labels."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(n) % k)
    centers = generator.normal(size=(k, d))
    scale = generator.uniform(0.1, 10, d)
    return ((centers[labels] + spread * generator.normal(size=(n, d))) * scale + 5).astype(np.float32), labels


def flipped(labels: np.ndarray, rate: float, k: int = K, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    wrong = generator.random(len(labels)) < rate
    return np.where(wrong, (labels + generator.integers(1, k, len(labels))) % k, labels)


def statistics_of(features, labels, fold, k=K, weights=None):
    return FoldStatistics.of_labels(
        features, torch.from_numpy(labels), fold, k, weights=weights, device=torch.device("cpu")
    )


def test_each_feature_counts_alike_whatever_its_unit():
    """A column of 10^7 beside others of 1, as an area in pixels, must not make these count for nothing."""
    features, labels = clusters()
    given, large = flipped(labels, 0.2), np.random.default_rng(3).normal(size=(len(labels), 1)).astype(np.float32)
    constant, shifted = np.full((len(labels), 1), 1e7 / 3, np.float32), features[:, :1] / 100 + 1000
    scores = [
        judge_labels(np.hstack([features, more]), given, num_labels=K, device="cpu").noise_scores
        for more in (large, 1e10 * large)
    ]
    assert roc_auc_score(given != labels, scores[0]) > 0.95
    np.testing.assert_allclose(scores[1], scores[0], atol=2e-3)
    fold = assign_folds(labels, np.arange(len(labels)), folds=3, seed=0)
    deviation = statistics_of(np.hstack([features, constant, shifted]), labels, fold).deviation.numpy()
    np.testing.assert_allclose(deviation[:D], features.std(0), rtol=1e-5)
    assert deviation[D] == 1 and deviation[D + 1] == pytest.approx(shifted.std(), rel=1e-3)


@pytest.mark.parametrize("shrinkage", [0.1, 0.6])
def test_each_fold_is_judged_by_scikit_learns_discriminant_of_the_other_folds(shrinkage):
    features, labels = clusters()
    fold = assign_folds(labels, np.arange(len(labels)), folds=3, seed=0)
    solved = statistics_of(features, labels, fold).solve(shrinkage)
    logits, top_labels = solved.top_logits(features, torch.from_numpy(labels), fold)
    assert (top_labels.numpy() == np.arange(K)).all()
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    for number in range(3):
        there = fold == number
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
        reference.fit(scaled[~there], labels[~there])
        expected = reference.decision_function(scaled[there])
        found = logits[torch.from_numpy(there)].numpy()
        np.testing.assert_allclose(found - found[:, :1], expected - expected[:, :1], rtol=1e-3, atol=1e-3)


def test_finds_the_flipped_labels_their_share_and_the_true_classes():
    features, true = clusters(2000)
    given = flipped(true, 0.3)
    judgement = judge_labels(features, given, num_labels=K)
    assert roc_auc_score(given != true, judgement.log_odds) > 0.99
    assert abs(judgement.noise_rate - (given != true).mean()) < 0.02
    assert (judgement.predicted_labels == true).mean() > 0.97
    np.testing.assert_allclose(judgement.posterior.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(judgement.transition_matrix.sum(1), 1, atol=1e-5)
    assert abs(np.diag(judgement.transition_matrix).mean() - 0.7) < 0.04
    logits = features @ judgement.head.weight.numpy().T + judgement.head.bias.numpy()
    assert (logits.argmax(1) == true).mean() > 0.97


def pair_flips(n: int = 2000):
    """Each class is given the label of the next one in 45 of 100 cases."""
    features, true = clusters(n, spread=1.5)
    return features, true, np.where(np.random.default_rng(1).random(n) < 0.45, (true + 1) % K, true)


def confusable_classes(n: int = 2000, k: int = 50, d: int = 16):
    """Families of five classes that overlap; a wrong label is of the class that the sample is second most like."""
    generator = np.random.default_rng(0)
    true = generator.permutation(np.arange(n) % k)
    centers = generator.normal(size=(k // 5, d)).repeat(5, 0) + 0.7 * generator.normal(size=(k, d))
    features = centers[true] + generator.normal(size=(n, d))
    distances = ((features[:, None] - centers) ** 2).sum(2)
    distances[np.arange(n), true] = np.inf
    given = np.where(generator.random(n) < 0.4, distances.argmin(1), true)
    return features.astype(np.float32), true, given


@pytest.mark.parametrize(("made", "rounds"), [(pair_flips, 2), (confusable_classes, 0)])
def test_posteriors_take_the_place_of_labels_where_that_finds_more(made, rounds, monkeypatch):
    features, true, given = made()
    options = {"num_labels": int(true.max()) + 1, "neighbors": 0, "device": "cpu"}
    chosen = judge_labels(features, given, **options)
    monkeypatch.setattr(judge, "_rounds_help", lambda *_: rounds == 0)
    other = judge_labels(features, given, **options)
    assert (chosen.rounds, other.rounds) == (rounds, judge.ROUNDS - rounds)
    assert roc_auc_score(given != true, chosen.log_odds) > roc_auc_score(given != true, other.log_odds)


@pytest.mark.parametrize(
    ("rate", "count", "undecided", "margin"),
    [
        (0.5, 400, 1.0, 0.049 + 0.0225),  # 1.96 * 0.5 / 20, and 3 * 3 / 400
        (0.1, 45, 1.0, 1.96 * 0.3 / 45**0.5 + 0.2),
        (0.0, 90, 1.0, 0.1),
        (0.5, 400, 0.5, 0.03575),
        (0.5, 400, 0.0, 0.01),
        (0.5, 1_000_000, 1.0, 0.01),
    ],
)
def test_the_margin_of_the_range_by_hand(rate, count, undecided, margin):
    assert rate_margin(rate, count, 3, undecided=undecided) == pytest.approx(margin)


def test_the_range_spans_likeliest_and_six_times_as_sharp_predictions(monkeypatch):
    """Mistakes that follow the image look like doubt, so that the likeliest predictions are too soft."""
    features, true, given = confusable_classes(k=10)
    options = {"num_labels": 10, "neighbors": 0, "device": "cpu"}
    found, rates = judge_labels(features, given, **options), {}
    for factor in (1.0, 6.0):
        monkeypatch.setattr(judge, "SHARPENED", factor)
        rates[factor] = judge_labels(features, given, **options).noise_rate
    margin = rate_margin(found.noise_rate, len(given), 10)
    assert rates[1.0] < found.noise_rate < rates[6.0]
    assert found.noise_rate_range == pytest.approx((rates[1.0] - margin, rates[6.0] + margin), abs=2e-3)


def test_the_range_of_few_labels_holds_the_true_rate():
    """With 15 labels of each class and more features than labels the judge takes doubt for mistakes."""
    features, true = clusters(45, k=3, d=200, spread=6.0)
    given = np.where(np.arange(45) < 3, (true + 1) % 3, true)
    judgement = judge_labels(features, given, num_labels=3, device="cpu")
    low, high = judgement.noise_rate_range
    assert 0 <= low <= 3 / 45 <= high <= 1 and high - low > 0.25
    reviewed = judge_labels(features, given, num_labels=3, known=true, device="cpu")
    assert reviewed.noise_rate_range == pytest.approx((3 / 45 - 0.01, 3 / 45 + 0.01), abs=1e-6)


def test_no_label_is_judged_by_itself():
    features, true = clusters(400, k=2)
    before = judge_labels(features, true, num_labels=2, neighbors=0)
    fold = assign_folds(true, np.arange(len(true)), folds=5, seed=0)
    changed = true.copy()
    changed[0] = 1 - changed[0]
    logits = []
    for labels in (true, changed):
        solved = statistics_of(features, labels, fold, k=2).solve(0.3)
        logits.append(solved.top_logits(features, torch.from_numpy(labels), fold)[0])
    same = torch.from_numpy(fold == fold[0])
    assert torch.equal(logits[0][same], logits[1][same])
    assert not torch.equal(logits[0][~same], logits[1][~same])
    assert before.posterior.shape == (400, 2)


def test_many_classes_have_top_labels_and_few_have_all():
    features, true = clusters(1500, k=300, d=40, spread=0.3)
    given = flipped(true, 0.2, k=300)
    judgement = judge_labels(features, given, num_labels=300, neighbors=5)
    assert judgement.posterior.shape == judgement.top_labels.shape == (1500, 32)
    assert (judgement.top_labels == given[:, None]).any(1).all()
    assert roc_auc_score(given != true, judgement.log_odds) > 0.9
    few = judge_labels(*clusters(300, k=40), num_labels=40)
    assert few.posterior.shape == (300, 40) and (few.top_labels == np.arange(40)).all()


def test_top_logits_of_many_classes_by_hand():
    """Rows of mixed folds and a known class; the given class is there though it is none of the likeliest."""
    n, k = 50, 70
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, k, D, generator=generator), torch.randn(3, k, generator=generator)
    features, center = torch.randn(n, D, generator=generator).numpy(), torch.randn(D, generator=generator)
    fold = np.random.default_rng(0).integers(0, 3, n)
    expected = torch.stack(
        [weight[f] @ (torch.from_numpy(row) - center) + bias[f] for row, f in zip(features, fold, strict=True)]
    )
    labels, known = expected.argmin(1), torch.full((n,), -1)
    known[4] = 9
    expected[4] = torch.full((k,), judge.DOUBTLESS).index_fill_(0, torch.tensor([9]), 0)
    logits, top_labels = Discriminants(weight, bias, center).top_logits(features, labels, fold, known=known)
    assert logits.shape == (n, 32) and (top_labels.diff(dim=1) > 0).all()
    torch.testing.assert_close(logits, expected.gather(1, top_labels), atol=1e-5, rtol=1e-5)
    assert (top_labels == labels[:, None]).any(1).all() and (top_labels[4] == 9).any()
    best = expected.topk(31, dim=1).indices
    for row in set(range(n)) - {4}:
        assert set(best[row].tolist()) <= set(top_labels[row].tolist())


@pytest.mark.parametrize("weighted", [False, True])
def test_soft_targets_of_many_classes_take_no_room_for_the_others(weighted):
    n, k, c = 400, 3_000, 32
    generator = np.random.default_rng(0)
    features = generator.normal(size=(n, D)).astype(np.float32)
    fold, labels = np.arange(n) % 3, generator.integers(0, k, n)
    top_labels = np.sort(np.stack([generator.choice(k, c, replace=False) for _ in range(n)]), 1)
    posterior = generator.dirichlet(np.ones(c), n).astype(np.float32)
    weights = generator.uniform(size=n).astype(np.float32) if weighted else None
    before = statistics_of(features, labels, fold, k)
    given = torch.from_numpy(posterior), torch.from_numpy(top_labels)
    with Sizes() as sizes:
        found = before.with_targets(features, *given, fold, weights=weights)
    targets = np.zeros((n, k))
    np.put_along_axis(targets, top_labels, posterior * (np.ones(n) if weights is None else weights)[:, None], 1)
    standardized = (features - before.center.numpy()) / before.deviation.numpy()
    for number in range(3):
        there = fold == number
        np.testing.assert_allclose(found.counts[number], targets[there].sum(0), atol=1e-6)
        np.testing.assert_allclose(found.sums[number], targets[there].T @ standardized[there], atol=1e-5)
    assert sizes.largest <= n * c * D < n * k


def test_the_noise_model_is_the_same_batch_by_batch(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    n, k, c = 3_000, 60, 32
    logits = [torch.randn(n, c, generator=generator) * 3 for _ in range(2)]
    top_labels = torch.rand(n, k, generator=generator).topk(c, dim=1).indices.sort(1).values
    labels = top_labels[torch.arange(n), logits[0].argmax(1)]
    whole = NoiseModel.fit(logits, top_labels, labels, k, iterations=10)
    monkeypatch.setattr(judge, "FIT_ON", 700)
    parts = NoiseModel.fit(logits, top_labels, labels, k, iterations=10)
    torch.testing.assert_close(parts.weights, whole.weights, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts.offsets, whole.offsets, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(parts.transition_matrix(), whole.transition_matrix(), atol=1e-5)
    found, expected = (model.posterior(logits, top_labels, labels) for model in (parts, whole))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_mistake_that_the_noise_model_has_not_seen_is_no_proof():
    """By hand: the samples that it is fitted to show no 2 for a 0. T[0, 0] is then the share of right labels of class
    0 with one sure sample, and a 2 for a 0 as probable as half of the rest."""
    top_labels, sure = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[30.0, 0.0]])
    which = torch.tensor([0] * 10 + [1] * 10)
    logits = sure.expand(20, 2).clone()
    labels = torch.tensor([0] * 7 + [1] * 3 + [1] * 10)
    model = NoiseModel.fit([logits], top_labels[which], labels, 3, weights=torch.ones(1))
    assert model.transition_matrix()[0] == pytest.approx([8 / 11, 3 / 11, 0], abs=1e-4)
    posterior = model.posterior([torch.tensor([[3.0, 0.0]])], torch.tensor([[0, 2]]), torch.tensor([2]))
    prior = torch.softmax(torch.tensor([3.0 + model.offsets[0], model.offsets[2]]), 0)
    wrong, right = float(prior[0]) * 3 / 11 / 2, float(prior[1]) * float(model.transition_matrix()[2, 2])
    assert float(posterior[0, 0]) == pytest.approx(wrong / (wrong + right), rel=1e-3)


def test_wrong_labels_beyond_the_sample_of_the_noise_model_are_found(monkeypatch):
    """100 classes make 10,000 pairs. A sample of 5,000 rows, each with 4 top labels, shows few of them."""
    for name, value in {"FIT_ON": 1_000, "TOP_LABELS": 4, "ALL_CLASSES": 16}.items():
        monkeypatch.setattr(judge, name, value)
    features, true = clusters(9_000, k=100, d=24)
    given = flipped(true, 0.1, k=100)
    judgement = judge_labels(features, given, num_labels=100, neighbors=10, device="cpu")
    assert roc_auc_score(given != true, judgement.log_odds) > 0.95
    assert judgement.noise_rate == pytest.approx(0.1, abs=0.03)


def test_of_a_class_with_one_sample_only_the_rate_is_said():
    features, labels = clusters(300)
    labels[7] = K
    judgement = judge_labels(features, labels, num_labels=K + 2)  # the last class has none
    assert np.flatnonzero(~judgement.judged).tolist() == [7]
    assert judgement.noise_scores[7] == pytest.approx(judgement.noise_rate)
    assert judgement.posterior[7, K] == pytest.approx(1 - judgement.noise_rate, abs=1e-6)
    assert torch.isfinite(judgement.head.bias).all()


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_so_few_samples_that_those_of_a_class_are_alike(n):
    """The classifier of a fold knows one sample of each class, or of one class alone: nothing varies within them."""
    features = np.random.default_rng(0).normal(size=(n, D)).astype(np.float32)
    judgement = judge_labels(features, np.arange(n) * 2 // n, num_labels=2)
    assert judgement.judged.any() and 0 <= judgement.noise_rate <= 1
    assert np.isfinite(judgement.noise_scores).all() and np.isfinite(judgement.posterior).all()
    assert torch.isfinite(judgement.head.weight).all()


def test_a_sample_without_weight_is_judged_and_teaches_nothing():
    features, true = clusters(600)
    given = true.copy()
    given[:200] = (true[:200] + 1) % K
    weights = (np.arange(600) >= 200).astype(np.float32)
    judgement = judge_labels(features, given, num_labels=K, weights=weights)
    assert (judgement.noise_scores[:200] > 0.5).mean() > 0.95
    fold = np.arange(600) % 2
    kept = statistics_of(features, given, fold, weights=weights)
    alone = statistics_of(features[200:], given[200:], fold[200:])
    torch.testing.assert_close(kept.counts, alone.counts)
    for name in ("center", "deviation", "sums"):
        torch.testing.assert_close(getattr(kept, name), getattr(alone, name), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(kept.moments.tril(), alone.moments.tril(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("k", [K, 50])  # with all classes as top_labels and with some
def test_what_people_have_decided_is_beyond_doubt_and_is_learned_from(k):
    features, true = clusters(1000, k=k, d=40, spread=3.0)
    given = flipped(true, 0.4, k=k)
    before = judge_labels(features, given, num_labels=k)
    known = np.where(np.arange(1000) % 2, true, -1)
    after = judge_labels(features, given, num_labels=k, known=known)
    decided = known >= 0
    np.testing.assert_allclose(after.noise_scores[decided], (given != true)[decided], atol=1e-6)
    assert (after.predicted_labels[decided] == true[decided]).all()
    auroc = [roc_auc_score((given != true)[~decided], found.log_odds[~decided]) for found in (before, after)]
    assert auroc[1] > auroc[0]
    nobody = judge_labels(features, given, num_labels=k, known=np.full(1000, -1))
    np.testing.assert_array_equal(nobody.log_odds, before.log_odds)


def test_folds_are_stratified_and_keep_groups_together():
    labels = np.repeat([0, 1], [50, 10])
    groups = np.arange(60)
    groups[[0, 1, 2]] = 0
    fold = assign_folds(labels, groups, folds=5, seed=3)
    assert len(set(fold[:3])) == 1
    assert all(np.bincount(fold[labels == 1], minlength=5) == 2)
    assert (assign_folds(labels, groups, folds=5, seed=3) == fold).all()
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    assert identical_rows(rows).tolist() == [0, 1, 0]
    assert identical_rows(np.array([[0.0, -0.0], [-0.0, 0.0], [0.0, 1.0]], np.float32)).tolist() == [0, 0, 1]


def test_samples_of_one_group_are_no_neighbors():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.9, 0.1], [0.0, 1.0]]), dim=1)
    nearest, cosines = nearest_neighbors(vectors, np.array([0, 0, 1, 2]), 2)
    torch.testing.assert_close(cosines[0], vectors[[2, 3]] @ vectors[0])
    assert nearest.tolist() == [[2, 3], [2, 3], [1, 0], [2, 1]]
    posterior = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8], [0.0, 1.0]])
    means = neighbor_posteriors(nearest, posterior, torch.arange(2).expand(4, 2), 2).exp() - 1e-4
    torch.testing.assert_close(means[0], torch.tensor([0.1, 0.9]))  # of rows 2 and 3
    torch.testing.assert_close(means[2], torch.tensor([0.75, 0.25]))  # of rows 1 and 0
    few, cosines = nearest_neighbors(vectors, np.array([0, 0, 0, 2]), 2)
    assert few.tolist()[0] == [3, -1] and cosines[0, 1] == -1


def test_beyond_the_limit_neighbors_are_sought_in_lists(monkeypatch):
    """Clusters with copies among them: nearly all that an exact search finds, every copy, the same cosines."""
    features, true = clusters(1600, k=20, d=16)
    features[800:810] = features[:10] + 1e-3
    given = flipped(true, 0.3, k=20)
    exact = judge_labels(features, given, num_labels=20, neighbors=10)
    monkeypatch.setattr(judge, "NEIGHBOR_LIMIT", 1599)
    found = judge_labels(features, given, num_labels=20, neighbors=10)
    assert found.nearest.dtype == exact.nearest.dtype and found.nearest.shape == exact.nearest.shape
    assert found.nearest[:10, 0].tolist() == list(range(800, 810))
    again, _ = nearest_neighbors(found.projection(features), np.arange(1600), 10)
    np.testing.assert_array_equal(found.nearest, again)
    assert np.mean([np.isin(*pair).mean() for pair in zip(exact.nearest, found.nearest, strict=True)]) > 0.98
    same = found.nearest == exact.nearest
    np.testing.assert_allclose(found.similarities[same], exact.similarities[same], atol=1e-3)
    wrong = given != true
    assert roc_auc_score(wrong, found.log_odds) == pytest.approx(roc_auc_score(wrong, exact.log_odds), abs=1e-3)


@pytest.mark.parametrize("limit", [0, 100])
def test_neighbors_of_copies_of_nothing_and_of_few_rows(limit, monkeypatch):
    monkeypatch.setattr(judge, "NEIGHBOR_LIMIT", limit)
    vectors = torch.zeros(40, 2)
    vectors[:30, 0], vectors[30], vectors[31, 1] = 1, torch.tensor([0.8, 0.6]), -1  # the others are zero vectors
    nearest, cosines = nearest_neighbors(vectors, np.arange(40), 5)
    assert (nearest[:30] < 30).all() and (cosines[:30] == 1).all() and (nearest != torch.arange(40)[:, None]).all()
    assert (nearest[30] < 30).all() and cosines[30].tolist() == pytest.approx([0.8] * 5)
    assert (cosines[31:] == 0).all()
    groups = np.r_[np.zeros(30, int), np.arange(1, 11)]  # the copies are known as such, and more than are sought
    nearest, cosines = nearest_neighbors(vectors, groups, 5)
    assert (nearest[:30, 0] == 30).all() and cosines[:30, 0].tolist() == pytest.approx([0.8] * 30)
    few, cosines = nearest_neighbors(vectors[30:32], np.arange(2), 5)
    assert few[:, :2].tolist() == [[1, -1], [0, -1]] and cosines[0, 1] == -1


class Sizes(TorchDispatchMode):
    """How many numbers the largest tensor has that anything inside makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_centers_of_lists_take_no_more_memory_than_the_vectors(monkeypatch):
    """Of a million vectors the cosines of all that are clustered with all centers would be 256 MB."""
    monkeypatch.setattr(judge, "BATCH", 64)
    vectors = torch.nn.functional.normalize(torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    with Sizes() as sizes:
        centers = judge.cluster_centers(vectors, 40)
    assert centers.shape == (40, 4) and sizes.largest <= vectors.numel()


def test_the_noise_model_recovers_a_planted_matrix_and_temperature():
    generator = torch.Generator().manual_seed(0)
    planted = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.6, 0.4], [0.2, 0.0, 0.8]])
    logits = 6 * torch.randn(20_000, 3, generator=generator)
    true = torch.multinomial((0.5 * logits).softmax(1), 1, generator=generator)[:, 0]
    given = torch.multinomial(planted[true], 1, generator=generator)[:, 0]
    model = NoiseModel.fit([logits], torch.arange(3).expand(20_000, 3), given, 3)
    np.testing.assert_allclose(model.transition_matrix(), planted.numpy(), atol=0.03)
    assert float(model.weights[0]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 1, 5] * 100)}, "Row 2 has label 5"),
        ({"labels": np.zeros(3, dtype=int)}, "must have the shape"),
        ({"folds": 1}, "at least 2"),
        ({"labels": np.arange(300), "num_labels": 300}, "No class has two different samples"),
        ({"known": np.full(300, K)}, "`known` must hold a class in"),
        ({"features": np.full((300, D), np.nan, dtype=np.float32)}, "not finite"),
        ({"features": np.full((300, D), 1e20)}, "row 0 are not finite, or not below"),
    ],
)
def test_bad_input_is_named(change, message):
    features, labels = clusters(300)
    with pytest.raises(ValueError, match=message):
        judge_labels(**{"features": features, "labels": labels, "num_labels": K, **change})


@pytest.mark.parametrize(
    ("spread", "rate", "said"),
    [
        (0.5, 0.0, None),
        (0.5, 0.5, None),
        (0.5, 0.75, "most labels are wrong, or"),  # of 4 classes: the labels are drawn anew
        (100.0, 0.0, "most labels are wrong, or"),  # features that know nothing
        (2.5, 0.0, "estimated to tell the class of only"),
    ],
)
def test_a_rate_that_nothing_tells_is_said(spread, rate, said):
    features, true = clusters(1200, spread=spread)
    labels = flipped(true, rate)
    judgement = judge_labels(features, labels, num_labels=K)
    caution = doubt_of_rate(judgement.agreement, labels, judgement.confidence)
    assert caution is None if said is None else said in caution


def test_agreement_and_confidence_are_of_labels_that_nobody_has_decided():
    features, true = clusters(600, spread=100.0)
    known = np.where(np.arange(600) < 300, true, -1)
    judgement = judge_labels(features, true, num_labels=K, known=known)
    assert judgement.agreement < 0.4 and judgement.confidence < 0.6


@pytest.mark.parametrize("width", [4, 200])
@pytest.mark.parametrize("count", [6, 19])
@pytest.mark.parametrize("kept", [1, 2, 3, 5])
def test_labels_are_judged_by_the_few_that_count(kept, count, width):
    """People have found that the other images are of no class: some folds have nothing to learn from."""
    features = np.random.default_rng(width).normal(size=(count, width)).astype(np.float32)
    weights = (np.arange(count) < kept).astype(np.float32)
    judgement = judge_labels(features, np.arange(count) % 3, num_labels=3, weights=weights, device="cpu")
    assert np.isfinite(judgement.noise_scores).all() and np.isfinite(judgement.posterior).all()


@pytest.mark.parametrize("width", [4, 300, 1500])
def test_classes_without_any_scatter_are_told_apart(width):
    """Images of one color each: what differs within a class is rounding."""
    generator, labels = np.random.default_rng(0), np.arange(40) % 2
    centers = generator.normal(size=(2, width)) * 10.0 ** generator.integers(-3, 4, width)
    features = (centers[labels] * (1 + 1e-7 * generator.normal(size=(40, width)))).astype(np.float32)
    given = np.where(np.arange(40) < 3, 1 - labels, labels)
    judgement = judge_labels(features, given, num_labels=2, groups=np.arange(40), device="cpu")
    assert np.isfinite(judgement.noise_scores).all()
    assert set(np.argsort(-judgement.noise_scores)[:3]) == {0, 1, 2}
