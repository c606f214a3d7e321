"""`audit_run`: the table, its files, the evidence and the report of a dataset with scores."""

import json

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hnml_hf import (
    TimmCAMForImageClassification,
    audit_run,
    clean_dataset,
    create_transforms,
    load_audit,
    noise_scores,
)
from hnml_hf.audit.dynamics import run_dynamics
from hnml_hf.audit.export import cleanlab_issues
from hnml_hf.audit.gallery import collect_evidence, num_issues
from hnml_hf.audit.table import check_unchanged


NAMES = ["left", "right", "bottom"]


def build_model():
    torch.manual_seed(0)
    return TimmCAMForImageClassification.from_timm(
        "test_resnet", id2label=dict(enumerate(NAMES)), image_size=32, output_stride=8
    )


def test_audit_of_a_run_and_its_report(tiny_dataset, scored, tmp_path):
    model = build_model()
    _, transform = create_transforms(model.config.pretrained_cfg)
    table = audit_run(
        tmp_path, scored, tiny_dataset, transform=transform, model=model, source="tiny", provenance="test"
    )
    wrong = set(
        np.array(tiny_dataset["index"])[np.array(tiny_dataset["label"]) != np.array(tiny_dataset["clean_label"])]
    )
    assert set(table.loc[table["noise_score"] >= 0.5, "index"]) == wrong
    assert {p.name for p in (tmp_path / "_audit").iterdir()} == {"noise_scores.parquet", "summary.json", "report.html"}
    loaded = load_audit(tmp_path)
    pd.testing.assert_frame_equal(loaded, table)
    assert loaded.attrs == table.attrs == json.loads((tmp_path / "_audit" / "summary.json").read_text())
    pd.testing.assert_frame_equal(load_audit(tmp_path / "_audit" / "noise_scores.parquet"), table)
    page = (tmp_path / "_audit" / "report.html").read_text()
    assert page.count('"maps"') == 48 + 1 and "tiny" in page  # and whether there are any


def test_evidence_follows_the_order_and_survives_bad_images(tiny_dataset, scored, tmp_path):
    for row, image in enumerate(tiny_dataset["image"]):
        image.save(tmp_path / f"{row}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes((tmp_path / "4.png").read_bytes()[:200])
    paths = [str(tmp_path / f"{row}.png") for row in range(48)]
    dataset = tiny_dataset.remove_columns("image").add_column("image", paths).cast_column("image", datasets.Image())
    model = build_model()
    _, transform = create_transforms(model.config.pretrained_cfg)
    table = audit_run(tmp_path, scored, dataset, transform=transform, model=model)
    assert table.set_index("index").loc[dataset["index"][5], "path"] == paths[5]
    evidence = collect_evidence(dataset, table, transform=transform, model=model, batch_size=7)
    at = dict(zip(table["index"], evidence, strict=True))
    for row, reason in ((1, "UnidentifiedImageError"), (2, "FileNotFoundError"), (3, "")):
        assert at[dataset["index"][row]].image is None and reason in at[dataset["index"][row]].reason
    good = at[dataset["index"][5]]
    assert np.array_equal(np.asarray(good.image), np.asarray(tiny_dataset[5]["image"]))
    model.eval()
    with torch.no_grad():
        given = torch.tensor([tiny_dataset[5]["label"]])
        cams = model(pixel_values=transform(tiny_dataset[5]["image"])[None], cam_classes=given).cams[0].relu()
    np.testing.assert_allclose(good.given_map, cams / (cams.max() + 1e-5), atol=1e-5)
    page = (tmp_path / "_audit" / "report.html").read_text()
    assert page.count("FileNotFoundError") == 1


def test_a_dataset_that_has_changed_is_refused(tiny_dataset, scored, tmp_path):
    table = noise_scores(scored, NAMES)
    check_unchanged(table, tiny_dataset)
    check_unchanged(table, tiny_dataset.shuffle(seed=1))
    with pytest.raises(ValueError, match="has changed since it was scored: scored rows that are gone: 2, new ones: 0"):
        check_unchanged(table, tiny_dataset.select(range(46)))
    labels = [(tiny_dataset[0]["label"] + 1) % 3, *tiny_dataset["label"][1:]]
    other = tiny_dataset.remove_columns("label").add_column("label", labels, feature=tiny_dataset.features["label"])
    with pytest.raises(ValueError, match="new ones: 0, other labels: 1"):
        check_unchanged(table, other)
    renamed = tiny_dataset.cast_column("label", datasets.ClassLabel(names=["x", "y", "z"]))
    with pytest.raises(ValueError, match="its classes are"):
        check_unchanged(table, renamed)
    with pytest.raises(ValueError, match="has changed"):
        audit_run(tmp_path, scored, other, transform=lambda image: image)


def test_files_that_are_no_audit(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no `_audit/noise_scores.parquet`"):
        load_audit(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no scores of samples"):
        run_dynamics(tmp_path)
    (tmp_path / "noise_scores.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a table of noise scores"):
        load_audit(tmp_path)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "noise_scores.parquet")
    with pytest.raises(ValueError, match="is not a table of noise scores"):
        load_audit(tmp_path)
    damaged = pa.table({"a": [1]}).replace_schema_metadata({b"noise_audit": b"{}", b"pandas": b"\xff"})
    pq.write_table(damaged, tmp_path / "noise_scores.parquet")
    with pytest.raises(ValueError, match="noise_scores.parquet is not a table of noise scores"):
        load_audit(tmp_path)


@pytest.mark.parametrize(("crop_mode", "colors"), [("center", 2), ("squash", 4)])
def test_the_picture_is_what_the_transform_looks_at(crop_mode, colors):
    """Four stripes side by side: the central square has two of them, the whole image all four."""
    stripes = np.repeat(np.array([[0, 80, 160, 240]], np.uint8), 20, axis=0).repeat(10, axis=1)
    dataset = datasets.Dataset.from_dict({"image": [Image.fromarray(stripes)], "index": [7]})
    dataset, suspects = dataset.cast_column("image", datasets.Image()), pd.DataFrame({"index": [7]})
    (shown,) = collect_evidence(dataset, suspects, transform=None, crop_mode=crop_mode)
    assert shown.image.size == (20, 20)
    middles = np.asarray(shown.image)[10, 20 // colors // 2 :: 20 // colors, 0].tolist()
    assert middles == {2: [80, 160], 4: [0, 80, 160, 240]}[colors]


def test_number_of_suspects():
    table = pd.DataFrame({"noise_score": np.linspace(0, 1, 1000), "times_seen": 1})
    assert num_issues(table) == 500 and num_issues(table, 100) == 100
    assert num_issues(table.head(30)) == 30 and num_issues(table.head(300)) == 48
    table.loc[970:, "times_seen"] = 0
    assert num_issues(table) == 470 and num_issues(table.tail(40)) == 10


def test_rows_that_no_model_saw_are_no_suspects(tiny_dataset, scored, tmp_path):
    """Their score is the rate of all, which says nothing of them: here it is above the threshold."""
    records = scored.copy()
    by_index = tiny_dataset.to_pandas().set_index("index").loc[records["index"]]
    wrong = (by_index["label"] != by_index["clean_label"]).to_numpy()
    right = np.flatnonzero(~wrong)
    records["times_seen"][right[4:]] = 0
    table = audit_run(tmp_path, records, tiny_dataset, transform=lambda image: image)
    unseen = set(table.loc[table["times_seen"] == 0, "index"])
    assert table.attrs["noise_rate"] > 0.5 and len(unseen) == 26
    for how in ("drop", "relabel"):
        cleaned = clean_dataset(tiny_dataset, table, how=how).to_pandas().set_index("index")
        assert unseen <= set(cleaned.index) and set(cleaned.loc[list(unseen), "audit_action"]) == {"unjudged"}
    issues = cleanlab_issues(table)
    assert set(issues.index[issues["is_label_issue"]]) == set(records["index"][wrong])
    page = (tmp_path / "_audit" / "report.html").read_text(encoding="utf-8")
    assert '<span class="soft">Labels probably wrong</span><b class="num">18</b>' in page
    assert page.count('"issue": true') == 18  # of 22 with a picture
    assert "4 samples below 0.1" in page


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(600, 1), (1, 600), (1, 1), (3, 900)])
def test_a_thin_image_is_shown(size, crop_mode, tiny_dataset, scored, tmp_path):
    """Of 600 x 1 pixels the middle seven eighths, rounded, were none at all."""
    thin = Image.new("RGB", size, "red")
    rows = [{**row, "image": thin} if row["index"] == 100 else row for row in tiny_dataset]
    dataset = datasets.Dataset.from_list(rows, features=tiny_dataset.features)
    table = audit_run(tmp_path, scored, dataset, transform=None, crop_pct=0.875, crop_mode=crop_mode)
    assert 100 in table.nsmallest(num_issues(table), "rank")["index"].tolist()
    assert "data:image/" in (tmp_path / "_audit/report.html").read_text()


def test_evidence_that_fails_is_a_reason_or_a_picture_without_maps(tiny_dataset, scored, tmp_path, caplog):
    table = noise_scores(scored, tiny_dataset.features["label"].names)
    suspects = table.nsmallest(4, "rank")
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=64)

    def refuse(image):
        raise RuntimeError("no such transform")

    found = collect_evidence(tiny_dataset, suspects, transform=refuse, model=model)
    assert {shown.reason for shown in found} == {"cannot be shown (RuntimeError: no such transform)"}
    found = collect_evidence(tiny_dataset, suspects, transform=lambda image: torch.zeros(1, 64, 64), model=model)
    assert all(shown.image is not None and shown.given_map is None for shown in found)
    assert "4 images without activation maps" in caplog.text
