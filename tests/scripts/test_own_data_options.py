"""Options of data that would have no effect are refused."""

import pytest
from options import DataArguments, load_data, saved_data_arguments
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


def test_the_options_that_a_run_has_kept_are_read_under_the_names_of_today(tmp_path, caplog):
    (tmp_path / "_audit").mkdir()
    saved = tmp_path / "_audit" / "dataset.json"
    saved.write_text('{"dataset": "photos", "quarantine": "list.jsonl", "noise_draw": "exact", "noise_seed": 3}')
    found = saved_data_arguments(tmp_path)
    assert (found.dataset, found.exclude, found.noise_seed) == ("photos", "list.jsonl", 3)
    assert "options that there are no more are left out: noise_draw" in caplog.text
    for content in ("[1]", "{", '"x"'):
        saved.write_text(content)
        with pytest.raises(ValueError, match="does not hold the options of a dataset .* Restore it, or delete it"):
            saved_data_arguments(tmp_path)
    saved.unlink()
    with pytest.raises(FileNotFoundError, match="dataset.json is missing, so it is not known what was audited"):
        saved_data_arguments(tmp_path)
