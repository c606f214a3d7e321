import json

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Image
from PIL import Image as Pillow
from safetensors.torch import save_file

from hnml_hf import find_label_issues
from hnml_hf.audit.findings import (
    between_classes,
    findings,
    near_duplicates,
    neighbor_columns,
    strangers,
    write_findings,
)
from hnml_hf.data.checks import apply_exclusions, load_exclusions


def test_columns_worked_by_hand():
    nearest = np.array([[2, 1], [2, 0], [1, 0], [0, -1]])
    similarities = np.array([[0.9, 0.5], [0.96, 0.5], [0.96, 0.9], [0.2, -1]])
    found = neighbor_columns(np.array([10, 11, 12, 13]), nearest, similarities, np.array([0, 1, 2, 0]))
    assert found["nearest_index"].tolist() == [13, 12, 11, 10]  # rows 0 and 3 have the same content
    assert found["nearest_similarity"].tolist() == [1, 0.96, 0.96, 1]
    np.testing.assert_allclose(found["typicality"], [0.7, 0.73, 0.93, 0.2])


def make_table(**columns) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    plain = {"index": range(n), "label_name": ["a"] * n, "noise_score": [0.1] * n, "path": [""] * n}
    return pd.DataFrame({**plain, **columns})


def test_of_near_duplicates_the_most_plausible_label_is_kept():
    table = make_table(
        nearest_index=[1, 2, 1, 4, 3, 0, -1],
        nearest_similarity=[0.97, 0.99, 0.99, 1.0, 1.0, 0.94, -1.0],
        noise_score=[0.9, 0.1, 0.5, 0.3, 0.2, 0.0, 0.0],
    )
    found = near_duplicates(table)
    assert found["index"].tolist() == [1, 2, 0, 4, 3] and found["group"].tolist() == [0, 0, 0, 1, 1]
    assert found["keep"].tolist() == [True, False, False, True, False]
    assert len(near_duplicates(table, threshold=0.98)) == 4
    assert near_duplicates(table.iloc[5:]).empty


def test_strangers_lie_beyond_the_far_fence_and_images_between_classes_have_two_of_them():
    typicality = np.r_[np.linspace(0.6, 0.8, 40), 0.1, 0.2, 0.5]
    found = strangers(make_table(typicality=typicality))
    assert found["index"].tolist() == [40, 41]  # quartiles 0.64 and 0.75: the fence is at 0.31
    table = make_table(given_probability=[0.9, 0.35, np.nan, 0.45], suggested_probability=[0.1, 0.6, np.nan, 0.5])
    assert between_classes(table)["index"].tolist() == [3, 1]
    assert between_classes(table.iloc[[0, 2]]).empty  # none is none, not all


@pytest.mark.parametrize("copies", [0, 3])
def test_copies_are_found_in_an_audit_and_left_out_by_their_list(copies, tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "model.safetensors")
    generator, rows = np.random.default_rng(0), []
    for row in range(40 + copies):
        pixels = generator.integers(0, 255, (4, 4, 3)) if row < 40 else np.asarray(rows[row - 40]["image"])
        image = Pillow.fromarray(pixels.astype(np.uint8))
        if row < 40:
            image = image.resize((64, 64), Pillow.BICUBIC)
        elif row == 41:  # the same but for one pixel
            image.putpixel((0, 0), (0, 0, 0))
        rows.append({"image": image, "label": row % 2})
    data = Dataset.from_list(rows).cast_column("image", Image()).cast_column("label", ClassLabel(names=["a", "b"]))
    table = find_label_issues(
        data, backbone="test_resnet", pretrained=tmp_path / "model.safetensors", image_size=64, num_workers=0
    )
    found = near_duplicates(table, threshold=0.999)
    assert {tuple(sorted(part["index"])) for _, part in found.groupby("group")} == {(i, 40 + i) for i in range(copies)}
    lists = findings(table)
    lists["near_duplicates"] = found[~found["keep"]]
    written = {path.name: path for path in write_findings(tmp_path, lists)}
    assert set(written) == {"near_duplicates.jsonl", "strangers.jsonl", "between_classes.jsonl"}
    lines = [json.loads(line) for line in written["near_duplicates.jsonl"].read_text().splitlines()]
    assert len(lines) == copies and all(line["reason"].startswith("copies") for line in lines)
    if copies:
        whole = {"train": data.add_column("index", range(len(data)))}
        kept = apply_exclusions(whole, load_exclusions(written["near_duplicates.jsonl"]))["train"]
        assert len(kept) == 40


def test_features_alone_give_them_too_and_a_training_run_none(tmp_path):
    features = np.random.default_rng(0).normal(size=(60, 8))
    features[:30, 0] += 5
    features[31] = features[30]
    table = find_label_issues((features, np.arange(60) // 30))
    assert set(near_duplicates(table)["index"]) == {30, 31}
    (tmp_path / "strangers.jsonl").write_text("of an earlier audit")
    assert write_findings(tmp_path, findings(table.drop(columns="nearest_index"))) == []
    assert not list(tmp_path.iterdir())
