import csv
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hnml_hf import export_audit, noise_scores
from hnml_hf.audit.export import cleanlab_issues, escape_formula, export_csv


NAMES = ["left", "right", "bottom"]


def test_formulas_are_escaped(tiny_dataset, scored, tmp_path):
    table = noise_scores(scored, ["=1+1", "@x", "plain"])
    table["path"] = "-b.png"
    for value in ("=1", "+1", "-1", "@a", "\tx", "\rx"):
        assert escape_formula(value) == f"'{value}"
    assert escape_formula("a=1") == "a=1" and escape_formula(-1) == -1
    with open(export_csv(table, tmp_path / "t.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48 and rows[0]["rank"] == "1"
    for row in rows:
        assert row["path"] == "'-b.png"
        assert row["label_name"] in ("'=1+1", "'@x", "plain")


def test_exports_for_other_tools(tiny_dataset, scored, tmp_path):
    table = noise_scores(scored, NAMES)
    files = export_audit(table, tiny_dataset, tmp_path / "exports")
    assert all(file.exists() for file in files) and len(files) == 6
    issues = pd.read_csv(tmp_path / "exports" / "cleanlab_issues.csv", index_col="index")
    wrong = np.array(tiny_dataset["label"]) != np.array(tiny_dataset["clean_label"])
    assert set(issues.index[issues["is_label_issue"]]) == set(np.array(tiny_dataset["index"])[wrong])
    assert (issues["label_score"][issues["is_label_issue"]] < 0.5).all()

    labels = json.loads((tmp_path / "exports" / "fiftyone" / "labels.json").read_text())
    where = json.loads((tmp_path / "exports" / "fiftyone" / "data.json").read_text())
    assert labels["classes"] == NAMES and len(labels["labels"]) == 48 and set(where) == set(labels["labels"])
    first = str(tiny_dataset[0]["index"])
    assert labels["labels"][first]["label"] == tiny_dataset[0]["label"]
    with Image.open(where[first]) as image:
        assert np.array_equal(np.asarray(image), np.asarray(tiny_dataset[0]["image"]))

    content = json.loads((tmp_path / "exports" / "datumaro" / "annotations" / "default.json").read_text())
    assert [c["name"] for c in content["categories"]["label"]["labels"]] == NAMES
    item = next(item for item in content["items"] if item["id"] == first)
    assert item["annotations"][0]["label_id"] == tiny_dataset[0]["label"] and item["image"]["path"] == where[first]
    with pytest.raises(ValueError, match="none of csv, cleanlab, fiftyone, datumaro"):
        export_audit(table, tiny_dataset, tmp_path, ["excel"])


def test_cleanlab_columns_are_those_of_datalab(tiny_dataset, scored):
    cleanlab = pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    table = noise_scores(scored, NAMES).set_index("index").loc[tiny_dataset["index"]].reset_index()
    labels, probabilities = np.array(tiny_dataset["label"]), np.full((48, 3), 0.1)
    probabilities[np.arange(48), tiny_dataset["clean_label"]] = 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, on pandas
        lab = cleanlab.Datalab({"label": labels}, label_name="label", task="classification", verbosity=0)
        lab.find_issues(pred_probs=probabilities, issue_types={"label": {}})
    theirs, ours = lab.get_issues("label"), cleanlab_issues(table)
    assert theirs.dtypes.to_dict() == ours.dtypes.to_dict() and list(theirs.columns) == list(ours.columns)
    assert (theirs["is_label_issue"].to_numpy() == ours["is_label_issue"].to_numpy()).all()
    assert (theirs["predicted_label"].to_numpy() == ours["predicted_label"].to_numpy()).all()
