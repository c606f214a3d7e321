import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from reports import CURVES, EVIL, make_evidence, make_table

from hnml_hf.audit.report import Evidence, _storage_id, picture_side, render_report, row_reasons, score_text
from hnml_hf.audit.review.queue import ReviewQueue


def payload(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))


@pytest.fixture
def page(tmp_path):
    evidence = [*make_evidence(9), Evidence(reason=f"FileNotFoundError: {EVIL}"), Evidence(make_evidence(1)[0].image)]
    path = render_report(
        make_table(), make_table().attrs, tmp_path / "a" / "report.html", evidence=evidence, curves=CURVES
    )
    return path.read_text(encoding="utf-8")


def test_names_and_paths_with_html_are_text(page):
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<img src=x" not in page
    assert "alert(1)" in page  # it is there, escaped
    assert payload(page)["classes"][2] == EVIL


def test_it_asks_nothing_of_the_network(page):
    outside = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?(?!data:|#)([a-z]+:)?//[^"')\s]*""", page)
    assert outside == [] and "@import" not in page and "<link" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
    assert "default-src 'none'" in policy and "img-src data:" in policy and "unsafe-eval" not in policy


def test_the_policy_names_the_script_that_is_there(page):
    import hashlib

    script = re.search(r"<script>(.*)</script>", page, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in page.replace("&#43;", "+")


def test_curves_of_several_evaluation_splits_are_drawn(tmp_path):
    history = [
        {"epoch": epoch, "eval_validation_accuracy": 0.25 * epoch, "eval_test_accuracy": 0.4 * epoch}
        for epoch in (1.0, 2.0)
    ]
    path = render_report(make_table(), make_table().attrs, tmp_path / "report.html", curves=history)
    page = path.read_text()
    assert "accuracy on held-out labels ends at 50 %; accuracy on the test set ends at 80 %" in page
    assert page.count("<polyline") == 2


def test_summary_says_rate_interval_matrix_and_curves(page):
    assert "30.0 %" in page and "25.0 % to 36.0 %" in page
    assert page.count('<th scope="row"') == 3
    assert "cat labeled dog: 10.0 % (9.0 to 11.0)" in page
    assert "accuracy on held-out labels ends at 60 %" in page  # not the 90 % of another split at the same epoch


def test_payload_has_every_row_and_every_issue(page):
    table, data = make_table(), payload(page)
    items = data["items"]
    assert [item["id"] for item in items] == table["index"].tolist() and data["total"] == 30
    moved = table.assign(path=["/elsewhere/" + path.rpartition("/")[2] for path in table["path"]])
    other = table.assign(path=[table["path"][0] + ".png", *table["path"][1:]])
    ids = [_storage_id(rows, table.attrs) for rows in (moved, other)]
    assert ids[0] == data["id"] != ids[1]
    np.testing.assert_allclose([item["score"] for item in items], table["noise_score"], atol=1e-6)
    assert sum(item["issue"] for item in items) == 11
    rest = table["noise_score"][11:][table["noise_score"][11:] >= 0.5]
    assert data["elsewhere"] == {"issues": len(rest), "expected": pytest.approx(rest.sum())}
    assert items[9]["image"] is None and EVIL in items[9]["reason"]
    assert items[10]["image"] and "maps" not in items[10]
    assert items[0]["image"].startswith("data:image/png") and items[0]["maps"][0]["shape"] == [4, 4]
    assert items[20]["image"] is None and "not stored" in items[20]["reason"]


def test_reasons_are_sentences_and_scores_have_digits(page):
    row = {"given_probability": 0.06, "suggested_probability": 0.91, "foreground_agreement": float("nan")}
    assert row_reasons(row, "church", "golf ball") == ["looks like golf ball (0.91); 0.06 for church"]
    sure = {**row, "given_probability": 1e-9, "suggested_probability": 1 - 1e-9}
    assert row_reasons(sure, "church", "golf ball")[0] == "looks like golf ball (> 0.99); < 0.01 for church"
    row |= {"times_seen": 3, "last_epoch_learned": -1, "foreground_agreement": 0.5}
    assert row_reasons(row, "church", "golf ball")[1:] == [
        "its foreground alone is seen as the same class 50 % of the time",
        "its label was never predicted in training",
    ]
    texts = [score_text(score) for score in (0.5, 0.97, 0.995, 0.9997, 1.0, 0.05, 1e-5)]
    assert texts == ["50 %", "97 %", "99.5 %", "99.97 %", "> 99.9999 %", "5 %", "< 0.01 %"]
    assert score_text(1.0, log_odds=12.0) == "99.9994 %"  # the doubt is exp(-12) = 6e-6
    assert "teacher" not in page.lower()


def test_rows_that_were_decided_before_are_no_issues(tmp_path):
    table = make_table()
    decided = table["index"][:3].tolist()
    path = render_report(table, table.attrs, tmp_path / "r.html", evidence=make_evidence(4), decided=decided)
    items = payload(path.read_text())["items"]
    assert [item["id"] for item in items if item["issue"]] == table["index"][3:7].tolist()
    assert [item["id"] for item in items if item["before"]] == decided


def test_pictures_are_as_large_as_all_of_them_may_be(tmp_path):
    assert [picture_side(count) for count in (0, 300, 600, 1000, 100_000)] == [640, 640, 480, 320, 320]
    table = make_table(30)
    evidence = make_evidence(30, side=200)
    path = render_report(table, table.attrs, tmp_path / "r.html", evidence=evidence, max_bytes=200_000)
    items = payload(path.read_text())["items"]
    stored = [item for item in items if item["image"]]
    assert 1 < len(stored) < 30 and sum(len(item["image"]) for item in stored) <= 200_000
    issues = [item["issue"] for item in items]  # those without a picture can be decided as well
    assert issues == (table["noise_score"] >= 0.5).tolist()


def test_what_has_a_picture_and_is_probably_right_is_no_issue(tmp_path):
    """As `hnml review` counts: the report shows 48 pictures at least, also where there are fewer issues."""
    table = make_table(30)
    table.loc[1, "times_seen"] = 0  # nothing is known of it
    path = render_report(table, table.attrs, tmp_path / "r.html", evidence=make_evidence(30))
    data = payload(path.read_text())
    queue = ReviewQueue(pa.Table.from_pandas(table), list(table.attrs["class_names"]))
    assert sum(item["issue"] for item in data["items"]) == queue.progress()["issues"] < 29
    assert all(item["image"] for item in data["items"]) and data["elsewhere"]["issues"] == 0


def test_cells_of_the_matrix_lead_to_their_issues(page):
    assert page.count("data-pair=") >= 6 and 'data-pair="1,0"' in page


def test_many_classes_show_the_noisiest(tmp_path):
    names = [f"class {i}" for i in range(60)]
    table = make_table(200, names)
    matrix = np.eye(60)
    matrix[42, 42], matrix[42, 7] = 0.3, 0.7
    table.attrs["transition_matrix"] = matrix.tolist()
    table.attrs["transition_matrix_interval"] = [matrix.tolist(), matrix.tolist()]
    page = render_report(table, table.attrs, tmp_path / "r.html").read_text()
    assert page.count('<th scope="row"') == 20 and "class 42 labeled class 7: 70.0 %" in page
    assert "of 60" in page


def test_a_million_rows_make_a_page_of_some_megabytes(tmp_path):
    n = 1_000_000
    one = make_table(1, ("a", "b"))
    table = pd.DataFrame({name: np.repeat(one[name].to_numpy(), n) for name in one})
    table["index"], table["rank"] = np.arange(n), np.arange(1, n + 1)
    path = render_report(table, one.attrs, tmp_path / "r.html", evidence=make_evidence(5))
    assert path.stat().st_size < 8 * 2**20
    data = payload(path.read_text())
    assert len(data["items"]) == 10_000 and data["total"] == n


def test_large_pictures_shrink(tmp_path):
    table = make_table(3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8))
    path = render_report(table, table.attrs, tmp_path / "r.html", evidence=[Evidence(image)])
    source = payload(path.read_text())["items"][0]["image"]
    assert source.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as stored:
        assert stored.size == (640, 640)


def test_more_evidence_than_rows_is_an_error(tmp_path):
    table = make_table(2)
    with pytest.raises(ValueError, match="3 label issues come with evidence, but the table has 2 rows"):
        render_report(table, table.attrs, tmp_path / "r.html", evidence=make_evidence(3))


def test_the_report_says_what_else_was_found_and_how_many_are_expected_to_be_wrong(tmp_path):
    table = make_table(20)
    table["noise_score"] = np.r_[np.full(10, 0.75), np.full(10, 0.25)]
    table.attrs["check"] = {"truncated": 3}
    rows = table.iloc[:7]
    path = render_report(
        table,
        table.attrs,
        tmp_path / "report.html",
        evidence=make_evidence(4),
        decided=[int(table["index"].iloc[0])],
        found={"near_duplicates": rows, "strangers": rows.iloc[:0]},
    )
    page = path.read_text(encoding="utf-8")
    assert "about 3 are expected to be wrong" in page  # four issues of 0.75, without the one that is decided
    assert "about 8 of them are expected to be wrong" in page  # ten of 0.75
    assert "near_duplicates.jsonl" in page and "strangers.jsonl" not in page and EVIL not in page.split("<body>")[1]
    assert "truncated" in page and "(range 25 % to 36 %)" in page.replace("25.0", "25").replace("36.0", "36")
