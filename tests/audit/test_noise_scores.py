"""Rates, channels and scores on simulated runs whose wrong labels are known."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from hnml_hf import NonFiniteError, TrainingDynamics, load_audit, noise_scores
from hnml_hf.audit import noise_model as noise_estimate
from hnml_hf.audit.dynamics import score_predictions
from hnml_hf.audit.noise_model import estimate_noise, estimate_noise_rate
from hnml_hf.audit.report import render_report
from hnml_hf.audit.table import write_audit


def simulate(rate, *, n=3000, k=5, epochs=15, pair=False, seed=0, difficulty=1.0, memorized=0.0, held_out=0.0):
    """Noisy labels, a teacher that did not learn them by heart, and a student right as often as of one mind.

    Each sample has a true posterior from a softmax of Gaussian logits around its class. The teacher sees it tempered
    by half (a network on noisy labels is less sure than right); the student votes from it. Both repeat the given label
    of a share `memorized` of what they say, but not of the samples held out.
    """
    generator = np.random.default_rng(seed)
    clean = generator.integers(0, k, n)
    logits = generator.normal(size=(n, k)) * 1.2 * difficulty
    logits[np.arange(n), clean] += 4 * generator.random(n) ** 0.5
    posterior = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    cumulated = posterior.cumsum(-1)[:, :-1]

    def draw():
        return (generator.random((n, 1)) > cumulated).sum(-1)

    clean = draw()
    wrong = generator.random(n) < rate
    shift = np.ones(n, int) if pair else generator.integers(1, k, n)
    labels = np.where(wrong, (clean + shift) % k, clean)
    soft = posterior**0.5
    soft /= soft.sum(-1, keepdims=True)
    spared = np.arange(n) < held_out * n
    known = memorized * ~spared[:, None]
    soft = (1 - known) * soft + known * np.eye(k)[labels]
    dynamics = TrainingDynamics(np.arange(n) * 3 + 7, labels, k, held_out=spared)
    for epoch in range(epochs):
        student_predictions = np.where(np.random.default_rng(epoch).random(n) < known[:, 0], labels, draw())
        dynamics.update(dynamics.ids, soft, epoch=epoch, student_predictions=student_predictions)
    return dynamics.records, clean, labels


@pytest.mark.parametrize("epochs", [2, 5, 20])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_few_epochs_do_not_raise_the_noise_rate(rate, epochs):
    """Of few predictions the most frequent one is more frequent than it is probable, which looks like certainty."""
    records, clean, labels = simulate(rate, epochs=epochs)
    assert abs(estimate_noise_rate(records, 5) - (clean != labels).mean()) < 0.035


def test_predictions_drawn_worked_by_hand():
    prior, weights = np.array([[0.5, 0.3, 0.2]]), noise_estimate._prediction_weights(np.array([3]))
    np.testing.assert_allclose(weights, np.array([[1, 0.9, 0.81]]) / 2.71)
    found = noise_estimate._drawn(prior, weights, np.array([[0.1, 0.9, 0.6]]))  # labels 0, 2, 1
    np.testing.assert_allclose(found, np.array([[1, 0.81, 0.9]]) / 2.71)


def test_one_iteration_of_the_fit_worked_sample_by_sample():
    """However the samples lie in memory."""
    records, _, _ = simulate(0.3, n=60)
    k, dynamics = 5, noise_estimate.SampleDynamics(records, 5)
    matrix = np.full((k, k), 0.3 / (k - 1))
    np.fill_diagonal(matrix, 0.7)
    counts, found, expected = np.eye(k), np.ones(k), np.ones(k)
    for record in records:
        classes = [record["label"], *record["top_labels"]]
        prior = (np.array([record["given"], *record["top_probabilities"]], float) + 1e-6) ** 1.5
        prior /= prior.sum()
        resolved = prior * matrix[classes, record["label"]]
        resolved /= resolved.sum()
        for label, before, after in zip(classes, prior, resolved, strict=True):
            counts[label, record["label"]] += after
            found[label], expected[label] = found[label] + after, expected[label] + before
    fitted, offsets = dynamics.fit_transitions(1.5, iterations=1)
    np.testing.assert_allclose(fitted, counts / counts.sum(-1, keepdims=True), rtol=1e-10)
    np.testing.assert_allclose(offsets, 0.5 * np.log(found / expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_labels_held_out_tell_the_rate_of_a_run_that_knows_the_others_by_heart(rate):
    records, clean, labels = simulate(rate, memorized=0.6, held_out=0.15)
    wrong = clean != labels
    table = noise_scores(records, list("abcde"))
    low, high = table.attrs["noise_rate_interval"]
    assert abs(table.attrs["noise_rate"] - wrong.mean()) < 0.06 and low <= wrong.mean() <= high
    assert abs(table["noise_score"].mean() - table.attrs["noise_rate"]) < 1e-6
    matrix = np.array(table.attrs["transition_matrix"])
    assert abs(1 - matrix.diagonal().mean() - wrong.mean()) < 0.08
    blind = records.copy()
    blind["held_out"] = False
    fooled = noise_scores(blind, list("abcde"))
    assert fooled.attrs["noise_rate"] < wrong.mean() - 0.1
    assert (fooled["rank"] == table["rank"]).all()  # the order is the same, what it means is not


@pytest.mark.parametrize("known", [{}, {"memorized": 0.6, "held_out": 0.15}])
def test_the_rate_alone_is_that_of_the_whole_estimate(known):
    records, _, _ = simulate(0.3, **known)
    assert abs(estimate_noise_rate(records, 5) - estimate_noise(records, 5).noise_rate) < 1e-9


def test_the_rate_of_many_samples_is_read_from_some_and_from_all_held_out(monkeypatch):
    records, clean, labels = simulate(0.3, memorized=0.6, held_out=0.15)
    whole = estimate_noise_rate(records, 5)
    monkeypatch.setattr("hnml_hf.audit.noise_model.FIT_ON", 600)
    seen, original = [], noise_estimate.SampleDynamics
    monkeypatch.setattr(
        noise_estimate, "SampleDynamics", lambda records, k: seen.append(len(records)) or original(records, k)
    )
    assert abs(estimate_noise_rate(records, 5) - whole) < 0.03
    assert 900 < seen[0] < 1000  # 450 held out, and about 510 others


def test_where_nothing_is_known_by_heart_all_labels_tell_the_rate():
    """Those held out are then a small sample of the same."""
    records, _, _ = simulate(0.3, held_out=0.15)
    blind = records.copy()
    blind["held_out"] = False
    table, other = noise_scores(records, list("abcde")), noise_scores(blind, list("abcde"))
    pd.testing.assert_frame_equal(table, other)
    assert table.attrs["noise_rate"] == other.attrs["noise_rate"]


@pytest.mark.parametrize(("rate", "pair"), [(0.0, False), (0.2, False), (0.5, False), (0.35, True)])
def test_rate_matrix_and_scores_are_right_without_being_told_a_rate(rate, pair):
    records, clean, labels = simulate(rate, pair=pair)
    table = noise_scores(records, list("abcde"))
    wrong = clean != labels
    low, high = table.attrs["noise_rate_interval"]
    assert abs(table.attrs["noise_rate"] - wrong.mean()) < 0.06
    assert low <= table.attrs["noise_rate"] <= high
    matrix = np.array(table.attrs["transition_matrix"])
    true = np.stack([np.bincount(labels[clean == c], minlength=5) / (clean == c).sum() for c in range(5)])
    np.testing.assert_allclose(matrix.sum(-1), 1)
    assert np.abs(matrix - true).max() < 0.12
    bounds = np.array(table.attrs["transition_matrix_interval"])
    assert (bounds[0] <= matrix).all() and (matrix <= bounds[1]).all()
    score = table["noise_score"].to_numpy()
    assert ((score >= 0) & (score <= 1)).all()
    assert sorted(table["rank"]) == list(range(1, len(table) + 1))
    bins = np.minimum((score * 10).astype(int), 9)
    calibration = sum(abs(score[bins == b].mean() - wrong[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert calibration < 0.08
    if rate:
        margin = records["top_probabilities"].max(-1) - records["given"]
        ours = roc_auc_score(wrong, -table["rank"])
        assert ours > 0.85 and ours >= roc_auc_score(wrong, margin) - 0.01


@pytest.mark.parametrize("held_out", [0.0, 0.1])
def test_a_run_that_has_learned_nothing_yet_says_that_its_rate_tells_nothing(held_out, tmp_path):
    names = list("abcde")
    records, _, labels = simulate(0.3, held_out=held_out)
    assert noise_scores(records, names).attrs["caution"] is None
    dynamics = TrainingDynamics(records["index"], labels, 5, held_out=records["held_out"])
    soft = np.random.default_rng(1).dirichlet(np.full(5, 50.0), len(labels))
    soft[~records["held_out"]] += held_out * np.eye(5)[labels[~records["held_out"]]]  # memorized, which does not count
    dynamics.update(dynamics.ids, soft / soft.sum(1, keepdims=True), epoch=0)
    table = noise_scores(dynamics.records, names)
    assert "The noise rate cannot be trusted: predictions agree with" in table.attrs["caution"]
    page = render_report(table, table.attrs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert table.attrs["caution"] in page


def test_the_channel_beats_the_margin_where_one_class_is_renamed():
    """Half of class 0 is called 1: the channel learns that a 1 may be a 0, the margin does not know."""
    records, clean, labels = simulate(0.4, pair=True, seed=1)
    table = noise_scores(records, list("abcde"))
    margin = records["top_probabilities"].max(-1) - records["given"]
    wrong = clean != labels
    assert roc_auc_score(wrong, -table["rank"]) > roc_auc_score(wrong, margin)
    found = table["suggested_label"].to_numpy()[wrong] == clean[wrong]
    assert found.mean() > 0.7


def test_scores_do_not_depend_on_the_order_of_rows_and_repeat():
    records, _, _ = simulate(0.3, n=400)
    one, two = noise_scores(records, list("abcde")), noise_scores(records, list("abcde"))
    pd.testing.assert_frame_equal(one, two)
    assert one.attrs == two.attrs
    assert (one.sort_values("rank")["noise_score"].diff().dropna() <= 1e-12).all()


def test_unseen_samples_get_the_rate_and_the_last_ranks():
    records, _, _ = simulate(0.3, n=400)
    records = records.copy()
    records["times_seen"][:5] = 0
    table = noise_scores(records, list("abcde"))
    assert (table["noise_score"][:5] == table.attrs["noise_rate"]).all()
    assert set(table["rank"][:5]) == set(range(396, 401))
    assert table["given_probability"][:5].isna().all()
    assert (table["suggested_label"][:5] == table["label"][:5]).all()


def test_more_classes_than_are_followed():
    generator = np.random.default_rng(0)
    k, n = 40, 800
    clean = generator.integers(0, k, n)
    labels = np.where(generator.random(n) < 0.25, generator.integers(0, k, n), clean)
    dynamics = TrainingDynamics(np.arange(n), labels, k)
    for epoch in range(6):
        p = generator.dirichlet(np.full(k, 0.3), n) * 0.5
        p[np.arange(n), clean] += 0.5
        dynamics.update(np.arange(n), p, epoch=epoch)
    table = noise_scores(dynamics.records, [str(i) for i in range(k)])
    assert roc_auc_score(labels != clean, table["noise_score"]) > 0.95
    assert abs(table.attrs["noise_rate"] - (labels != clean).mean()) < 0.06


@pytest.mark.parametrize("held_out", [0.0, 0.15])
def test_the_pairs_that_occur_give_what_all_cells_give(monkeypatch, held_out):
    """Beyond a number of classes only these are worked on; sums are then rounded otherwise, and no pair has an
    interval."""
    records, _, _ = simulate(0.4, memorized=0.6 if held_out else 0.0, held_out=held_out)
    dense = estimate_noise(records, 5)
    monkeypatch.setattr("hnml_hf.audit.noise_model.DENSE", 4)
    few = estimate_noise(records, 5)
    assert few.transition_matrix_interval is None
    np.testing.assert_allclose(few.transition_matrix, dense.transition_matrix, rtol=1e-9)
    np.testing.assert_allclose(few.log_odds, dense.log_odds, rtol=1e-9)
    np.testing.assert_allclose(few.noise_rate_interval, dense.noise_rate_interval, rtol=1e-9)


def test_thousands_of_classes_take_a_few_matrices(tmp_path):
    """Of 1,500 classes; those of all replicates, with their quantiles, would be more than twenty. With 5,000 classes
    and 100,000 samples `noise_scores` took 15 s of processor time and 700 MB beside what imports take."""
    k, n = 1_500, 3_000
    generator = np.random.default_rng(0)
    records = TrainingDynamics(np.arange(n), np.arange(n) % k, k).records
    records["top_labels"] = (records["label"][:, None] + generator.integers(1, k, (n, 9))) % k
    records["times_seen"], records["given"], records["given_frequency"] = 2, 0.6, 0.9
    records["top_probabilities"] = records["top_frequencies"] = 0.01
    tracemalloc.start()
    table = noise_scores(records, [f"c{i}" for i in range(k)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 8 * k * k
    matrix = table.attrs["transition_matrix"]
    np.testing.assert_allclose(matrix.sum(-1), 1, rtol=1e-5)
    assert table.head(3).attrs["transition_matrix"] is matrix  # not copied by every step
    assert table.attrs["transition_matrix_interval"] is None

    loaded = load_audit(write_audit(tmp_path, table))
    pd.testing.assert_frame_equal(loaded, table)
    np.testing.assert_array_equal(loaded.attrs["transition_matrix"], matrix)
    assert loaded.attrs["transition_matrix"][2][2] == matrix[2, 2]
    assert {name: loaded.attrs[name] for name in loaded.attrs if name != "transition_matrix"} == {
        name: table.attrs[name] for name in table.attrs if name != "transition_matrix"
    }
    assert (tmp_path / "summary.json").stat().st_size < 100_000
    page = render_report(loaded, loaded.attrs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Point at a cell" not in page and "The 20 classes with most wrong labels of 1500" in page

    (tmp_path / "transition_matrix.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="transition_matrix.npy is not a transition matrix"):
        load_audit(tmp_path)
    (tmp_path / "transition_matrix.npy").unlink()
    with pytest.raises(FileNotFoundError, match="transition_matrix.npy belongs to .* keep them in one folder"):
        load_audit(tmp_path)


def test_runs_without_scores_and_bad_records():
    records, _, _ = simulate(0.3, n=50)
    with pytest.raises(ValueError, match="not one was seen"):
        noise_scores(TrainingDynamics(np.arange(3), np.zeros(3, int), 2).records, ["a", "b"])
    with pytest.raises(ValueError, match="has label 4, but the model knows 3 classes|has label 3, but"):
        noise_scores(records, ["a", "b", "c"])
    twice = np.concatenate([records, records[:1]])
    with pytest.raises(ValueError, match="Sample id 7 occurs more than once"):
        noise_scores(twice, list("abcde"))


def cross_validated(clean, labels, ids, *, temper=0.4, k=5, seed=3):
    """One prediction of each sample by a classifier that never saw its label: less sure than it is right."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(len(clean), k))
    logits[np.arange(len(clean)), clean] += 4  # P(class | logits) is a softmax of 4 times them
    soft = np.exp(temper * 4 * logits)
    return score_predictions(ids, labels, soft / soft.sum(-1, keepdims=True), held_out=True)


@pytest.mark.parametrize("rate", [0.02, 0.25, 0.5])
def test_cross_validated_predictions_tell_the_rate_by_themselves(rate):
    _, clean, labels = simulate(rate)
    table = noise_scores(cross_validated(clean, labels, np.arange(3000)), list("abcde"))
    low, high = table.attrs["noise_rate_interval"]
    wrong = clean != labels
    assert abs(table.attrs["noise_rate"] - wrong.mean()) < 0.03 and low <= wrong.mean() <= high
    assert high - low < 0.2
    assert table.attrs["inverse_temperature"] == pytest.approx(1 / 0.4, rel=0.35)
    assert roc_auc_score(wrong, table["noise_score"]) > 0.98
    records = cross_validated(clean, labels, np.arange(3000))
    records["held_out"] = False  # the labels may have been learned: the same rate, with more doubt
    taught = noise_scores(records, list("abcde"))
    low_taught, high_taught = taught.attrs["noise_rate_interval"]
    assert taught.attrs["noise_rate"] == table.attrs["noise_rate"] and high_taught - low_taught > high - low


def test_a_run_that_knows_its_labels_takes_the_rate_of_the_probe_before_it():
    """Rate and matrix are those of the cross-validation, of a part of the samples too; the scores are of both."""
    records, clean, labels = simulate(0.4, memorized=0.9)
    wrong = clean != labels
    fooled = noise_scores(records, list("abcde"))
    assert fooled.attrs["noise_rate"] < 0.1
    part = np.random.default_rng(0).permutation(3000)[:2000]
    before = cross_validated(clean[part], labels[part], records["index"][part])
    table = noise_scores(records, list("abcde"), cross_validated=before)
    low, high = table.attrs["noise_rate_interval"]
    assert abs(table.attrs["noise_rate"] - wrong.mean()) < 0.03 and low <= wrong.mean() <= high
    assert abs(table["noise_score"].mean() - table.attrs["noise_rate"]) < 1e-6
    assert abs(1 - np.diag(table.attrs["transition_matrix"]).mean() - wrong.mean()) < 0.05
    alone = np.setdiff1d(np.arange(3000), part)
    order = [scores["noise_score"][alone].to_numpy().argsort() for scores in (fooled, table)]
    assert (order[0] == order[1]).all()
    own = fooled["noise_score"][part]
    assert roc_auc_score(wrong[part], table["noise_score"][part]) > roc_auc_score(wrong[part], own) + 0.05
    unseen = records.copy()
    unseen["times_seen"][part[:500]] = 0  # by the run: nothing is said of them
    assert noise_scores(unseen, list("abcde"), cross_validated=before)["noise_score"][part[:500]].nunique() == 1
    few = noise_scores(records, list("abcde"), cross_validated=before[:99])
    assert few.attrs["noise_rate"] == fooled.attrs["noise_rate"]  # too few to tell


def test_a_probe_of_other_samples_or_labels_is_refused():
    records, clean, labels = simulate(0.4, n=300)
    before = cross_validated(clean, labels, records["index"])
    for change in ("index", "label"):
        other = before.copy()
        other[change][7] += 1
        with pytest.raises(ValueError, match="other samples, labels or classes"):
            noise_scores(records, list("abcde"), cross_validated=other)
    other = cross_validated(clean, labels, records["index"], k=6)
    with pytest.raises(ValueError, match="other samples, labels or classes"):
        noise_scores(records, list("abcde"), cross_validated=other)


@pytest.mark.parametrize("name", ["given", "top_probabilities", "margin"])
def test_records_that_are_not_finite_are_refused(name, scored):
    records = scored.copy()
    records[name][0] = np.nan
    with pytest.raises(NonFiniteError, match=f"have a `{name}` that is not finite"):
        noise_scores(records, ["a", "b", "c"])
