"""Options of data that would have no effect are refused."""

import pytest
from options import DataArguments, load_data
from PIL import Image


def test_held_out_labels_beside_a_validation_split_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for row in range(count):
                Image.new("RGB", (8, 8), (row, 0, 0)).save(folder / f"{row}.png")
    source = {"dataset": "imagefolder", "data_dir": str(tmp_path / "photos")}
    with pytest.raises(ValueError, match="`--validation_fraction 0.5` .* split `validation` of 4 rows already"):
        load_data(DataArguments(**source, validation_fraction=0.5))
    assert {split: len(rows) for split, rows in load_data(DataArguments(**source)).items()} == {
        "train": 8,
        "validation": 4,
    }
    data = load_data(DataArguments(**source, splits='{"train": "train"}', validation_fraction=0.5))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 4, "validation": 4}
