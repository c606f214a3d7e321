import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from reports import CURVES, EVIL, make_evidence, make_table

from hnml_hf import render_report
from hnml_hf.audit.report import Evidence


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
    import base64
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
    assert "cat labelled dog: 10.0 % (9.0 to 11.0)" in page
    assert "accuracy on held-out labels ends at 60 %" in page  # not the 90 % of another split at the same epoch


def test_payload_has_every_row_and_every_suspect(page):
    table, data = make_table(), payload(page)
    import base64

    ids = np.frombuffer(base64.b64decode(data["rows"]["index"]), "<i8")
    assert ids.tolist() == table["index"].tolist()
    score = np.frombuffer(base64.b64decode(data["rows"]["score"]), "<f4")
    np.testing.assert_allclose(score, table["noise_score"], rtol=1e-6)
    assert len(data["suspects"]) == 11
    assert data["suspects"][9]["image"] is None and EVIL in data["suspects"][9]["reason"]
    assert data["suspects"][10]["image"] and "given_map" not in data["suspects"][10]
    assert data["suspects"][0]["image"].startswith("data:image/png") and data["suspects"][0]["given_map"]["shape"] == [
        4,
        4,
    ]


def test_many_classes_show_the_noisiest(tmp_path):
    names = [f"class {i}" for i in range(60)]
    table = make_table(200, names)
    matrix = np.eye(60)
    matrix[42, 42], matrix[42, 7] = 0.3, 0.7
    table.attrs["transition_matrix"] = matrix.tolist()
    table.attrs["transition_matrix_interval"] = [matrix.tolist(), matrix.tolist()]
    page = render_report(table, table.attrs, tmp_path / "r.html").read_text()
    assert page.count('<th scope="row"') == 20 and "class 42 labelled class 7: 70.0 %" in page
    assert "of 60" in page


def test_a_million_rows_make_a_page_of_some_megabytes(tmp_path):
    n = 1_000_000
    one = make_table(1, ("a", "b"))
    table = pd.DataFrame({name: np.repeat(one[name].to_numpy(), n) for name in one})
    table["index"], table["rank"] = np.arange(n), np.arange(1, n + 1)
    path = render_report(table, one.attrs, tmp_path / "r.html", evidence=make_evidence(5))
    assert path.stat().st_size < 32 * 2**20


def test_large_pictures_shrink(tmp_path):
    table = make_table(3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8))
    path = render_report(table, table.attrs, tmp_path / "r.html", evidence=[Evidence(image)])
    source = payload(path.read_text())["suspects"][0]["image"]
    assert source.startswith("data:image/jpeg") and len(source) < 40_000


def test_more_evidence_than_rows_is_an_error(tmp_path):
    table = make_table(2)
    with pytest.raises(ValueError, match="3 suspects come with evidence, but the table has 2 rows"):
        render_report(table, table.attrs, tmp_path / "r.html", evidence=make_evidence(3))
