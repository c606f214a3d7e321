"""Which rows a page shows, in which order, and what the answers say of the noise rate."""

import threading

import numpy as np
import pyarrow as pa
import pytest
from reports import make_table
from reviews import make_run

from hnml_hf.audit.review.queue import (
    Query,
    ReviewQueue,
    common_folder,
    estimate_rate,
    informative_order,
    order_of_ids,
    rate_strata,
    read_rows,
)


@pytest.fixture
def table(tmp_path):
    return make_run(tmp_path, 60, images=False)


@pytest.fixture
def queue(table, tmp_path):
    rows, summary = read_rows(tmp_path / "run" / "_audit" / "noise_scores.parquet")
    return ReviewQueue(rows, summary["class_names"], root=common_folder(rows))


def answer(queue, row, annotation="wrong", name="dog", annotator="anna"):
    queue.take(
        [
            {
                "index": int(queue.index[row]),
                "annotation": annotation,
                "new_label_name": name,
                "annotator": annotator,
            }
        ]
    )


def test_views_are_what_pandas_selects(queue, table):
    issues = table[table["noise_score"] >= 0.5]
    assert queue.index[queue.view(Query())].tolist() == issues["index"].tolist()
    some = table[(table["label"] == 1) & (table["suggested_label"] == 2) & (table["noise_score"] >= 0.3)]
    query = Query(scope="all", given=1, suggested=2, least=0.3)
    assert queue.index[queue.view(query)].tolist() == some["index"].tolist()
    named = table[table["path"].str.contains("CAT/00", case=False)]
    assert queue.index[queue.view(Query(scope="all", text="CAT/00"))].tolist() == named["index"].tolist()
    folder = table[table["label_name"] == "dog"]
    assert queue.index[queue.view(Query(scope="all", folder="dog"))].tolist() == folder["index"].tolist()
    assert len(queue.view(Query(folder="no such folder"))) == 0
    by_id = queue.index[queue.view(Query(scope="all", order="index"))]
    assert by_id.tolist() == sorted(table["index"])


@pytest.mark.parametrize("typed", ["über", "u\u0308ber", "ÜBER"])
def test_a_search_finds_names_with_accents_of_either_kind(typed, table, tmp_path):
    rows, summary = read_rows(tmp_path / "run" / "_audit" / "noise_scores.parquet")
    names = ["a/Über.jpg", "a/u\u0308ber.jpg", *["a/uber.jpg"] * 58]
    queue = ReviewQueue(rows.set_column(rows.column_names.index("path"), "path", [names]), summary["class_names"])
    assert queue.view(Query(scope="all", text=typed)).tolist() == [0, 1]
    assert queue.view(Query(scope="all", text="UBER")).tolist() == list(range(2, 60))


def test_no_annotation_comes_into_the_middle_of_a_page(queue, monkeypatch):
    """One of somebody else, while the page lists those of a row."""
    answer(queue, 0), answer(queue, 0, annotator="bo")
    others = []

    def listed(entry):
        others.append(threading.Thread(target=answer, args=(queue, 0, "right", "cat", f"other {len(others)}")))
        others[-1].start()
        others[-1].join(0.1)
        return entry["annotator"]

    monkeypatch.setattr("hnml_hf.audit.review.queue.short_entry", listed)
    assert queue.page(Query(status="any"), size=1)["items"][0]["annotations"] == ["anna", "bo"]
    for other in others:
        other.join()
    assert len(queue.annotations[0]) == 4


def test_groups_lie_together_and_those_with_most_errors_come_first(queue, table):
    view = queue.view(Query(group="pair"))
    pairs = list(zip(queue.label[view].tolist(), queue.suggested[view].tolist(), strict=True))
    assert len(set(pairs)) == 1 + sum(a != b for a, b in zip(pairs[1:], pairs[:-1], strict=True))
    issues = table[table["noise_score"] >= 0.5]
    sums = issues.groupby(["label", "suggested_label"])["noise_score"].sum().sort_values(ascending=False)
    assert list(dict.fromkeys(pairs)) == list(sums.index)
    page = queue.page(Query(group="pair"), size=5)
    first = page["groups"][page["items"][0]["group"]]
    assert first["count"] == (issues.groupby(["label", "suggested_label"]).size()[sums.index[0]])
    assert first["wrong"] == pytest.approx(sums.iloc[0], abs=0.06)


def test_what_is_decided_leaves_the_view_at_once(queue):
    total, first = len(queue.view(Query())), queue.view(Query())[0]
    answer(queue, first)
    assert len(queue.view(Query())) == total - 1 and first not in queue.view(Query())
    assert queue.view(Query(status="wrong")).tolist() == [first]
    assert first in queue.view(Query(status="mine"), "bo") and first not in queue.view(Query(status="mine"), "anna")
    answer(queue, first, "right", annotator="bo")
    assert queue.view(Query(status="split")).tolist() == [first] and queue.progress()["split"] == 1
    answer(queue, first, None)
    assert queue.view(Query(status="split")).tolist() == [] and queue.view(Query(status="right")).tolist() == [first]
    answer(queue, first, None, annotator="bo")
    assert len(queue.view(Query())) == total


def test_progress_says_how_many_of_the_remaining_are_wrong(queue, table):
    issues = table[table["noise_score"] >= 0.5]
    for row in range(4):
        answer(queue, row)
    progress = queue.progress()
    assert (progress["decided"], progress["issues"], progress["wrong"]) == (4, len(issues), 4)
    assert progress["expected"] == pytest.approx(issues["noise_score"].iloc[4:].mean())


def test_rows_of_an_earlier_round_are_no_issues(table, tmp_path):
    rows, summary = read_rows(tmp_path / "run" / "_audit" / "noise_scores.parquet")
    first = int(table["index"][0])
    queue = ReviewQueue(rows, summary["class_names"], decided=[first])
    assert first not in queue.index[queue.view(Query())] and first not in queue.index[queue.view(Query(scope="all"))]
    assert queue.index[queue.view(Query(status="before"))].tolist() == [first]


def test_pages_start_where_they_should(queue):
    page = queue.page(Query(scope="all"), start=50, size=24)
    assert (page["start"], page["total"], len(page["items"])) == (50, 60, 10)
    assert queue.page(Query(scope="all"), start=60, size=24)["start"] == 48  # beyond the end: the last page
    assert page["items"][0]["path"].startswith(page["items"][0]["folder"])


def test_queries_that_make_no_sense(queue):
    for words in ({"scope": "x"}, {"status": "x"}, {"order": "x"}, {"group": "x"}, {"least": 2}):
        with pytest.raises(ValueError, match=next(iter(words))):
            Query(**words)
    with pytest.raises(KeyError):
        queue.find(np.array([5]))


def test_likely_errors_and_uncertain_labels_come_by_turns():
    score = np.array([0.99, 0.9, 0.8, 0.55, 0.5, 0.1])
    assert informative_order(score).tolist() == [0, 4, 1, 3, 2, 5]


def test_the_sample_measures_the_rate_within_three_points():
    """Scores that are wrong by a tenth everywhere: the sample still finds the true rate."""
    generator = np.random.default_rng(0)
    errors = []
    for seed in range(40):
        score = np.sort(generator.beta(0.3, 0.6, 20_000))[::-1]
        wrong = generator.random(20_000) < np.clip(score + 0.1 * np.sin(20 * score), 0, 1)
        strata = rate_strata(score, np.ones(20_000, bool), seed=seed)
        state = np.zeros(20_000, np.int8)
        size = sum(strata.sizes)
        assert size < 1000 and sorted(strata.sample.tolist()) == list(range(20_000))
        state[strata.sample[:size]] = np.where(wrong[strata.sample[:size]], 1, 2)
        found = estimate_rate(strata, state)
        assert found["annotated"] == found["needed"] == size
        assert found["margin"] < 0.04
        errors.append(abs(found["rate"] - wrong.mean()) <= found["margin"])
    assert np.mean(errors) >= 0.85


def test_the_estimate_sharpens_with_every_annotation_and_is_exact_at_the_end():
    score = np.linspace(1, 0, 200)
    strata, state = rate_strata(score, np.ones(200, bool)), np.zeros(200, np.int8)
    assert estimate_rate(strata, state)["rate"] is None
    wrong, margins = score > 0.6, []
    for row in strata.sample:
        state[row] = 1 if wrong[row] else 2
        found = estimate_rate(strata, state)
        if found["rate"] is not None:
            margins.append(found["margin"])
    assert found["rate"] == pytest.approx(wrong.mean()) and margins[-1] == 0
    assert margins[0] > margins[len(margins) // 2] > margins[-1]


def test_rows_that_no_model_saw_are_in_no_stratum():
    strata = rate_strata(np.full(10, 0.5), np.arange(10) < 4)
    assert sum(len(rows) for rows in strata.draw) == 4


def test_a_table_in_another_order_is_sorted(tmp_path, table):
    shuffled = table.sample(frac=1, random_state=0)
    shuffled.attrs = table.attrs
    from hnml_hf.audit.table import write_audit

    rows, _ = read_rows(write_audit(tmp_path / "other", shuffled) / "noise_scores.parquet")
    assert isinstance(rows, pa.Table) and rows["rank"].to_pylist() == list(range(1, 61))


@pytest.mark.parametrize("ids", [[], [3, 0, 1], [7, 2, 0, 5], [-3, 9, 0], [10**12, 5]])
def test_ids_are_sorted(ids):
    ids = np.array(ids, np.int64)
    np.testing.assert_array_equal(order_of_ids(ids), np.argsort(ids))


def test_folders_of_paths_that_are_missing():
    table = make_table(3)
    rows = pa.Table.from_pandas(table.assign(path=["photos/cat/1.png", None, "2.png"]))
    codes, names = ReviewQueue(rows, list(table.attrs["class_names"]), root="photos").folders
    assert [names[code] for code in codes] == ["cat", "", ""]
