"""Tables beside the images of a folder, wherever they lie: a row counts, not the name of the folder."""

import logging

import pytest
from tables import write_table

from hnml_hf.data.schema import column


HEADER = ["file_name", "label"]


def labels_of(dataset, split="train"):
    names = dataset[split].features["label"].names
    paths = [cell["path"].split("/folder/")[1] for cell in dataset[split].data.column("image").to_pylist()]
    return {path: names[label] for path, label in zip(paths, column(dataset[split], "label"), strict=True)}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables_in_class_folders_are_read(folder, load, caplog, suffix):
    write_table(folder / f"train/10/metadata{suffix}", HEADER, [("0.jpg", "good"), ("1.jpg", "bad")])
    write_table(folder / f"train/2/metadata{suffix}", HEADER, [("0.jpg", "bad")])
    write_table(folder / f"val/2/metadata{suffix}", HEADER, [("0.jpg", "good")])
    with caplog.at_level(logging.WARNING):
        dataset = load(str(folder))
    assert labels_of(dataset) == {"train/10/0.jpg": "good", "train/10/1.jpg": "bad", "train/2/0.jpg": "bad"}
    assert labels_of(dataset, "validation") == {"val/2/0.jpg": "good"}
    assert column(dataset["train"], "index").tolist() == [0, 1, 2]
    assert f"6 images without a row in metadata{suffix}, left out, first: train/10/2.jpg" in caplog.text


def test_a_table_above_the_split_folders_is_read(folder, load, caplog):
    rows = [("train/10/0.jpg", "good"), ("train/2/0.jpg", "bad"), ("val/2/0.jpg", "good")]
    write_table(folder / "metadata.csv", HEADER, rows)
    dataset = load(str(folder))
    assert labels_of(dataset) == {"train/10/0.jpg": "good", "train/2/0.jpg": "bad"}
    assert labels_of(dataset, "validation") == {"val/2/0.jpg": "good"}


def test_a_table_above_them_with_the_splits_that_the_folders_say(folder, load):
    rows = [("train/10/0.jpg", "good", "train"), ("train/2/0.jpg", "bad", "train"), ("val/2/0.jpg", "good", "val")]
    write_table(folder / "metadata.csv", [*HEADER, "split"], rows)
    assert labels_of(load(str(folder)), "validation") == {"val/2/0.jpg": "good"}
    write_table(folder / "metadata.csv", [*HEADER, "split"], [(*row[:2], "train") for row in rows])
    with pytest.raises(ValueError, match="metadata.csv:4: .* says 'train', but the file is the split validation"):
        load(str(folder))


def test_captions_in_class_folders_are_no_labels_and_that_is_said(folder, load, caplog):
    write_table(folder / "train/10/metadata.csv", ["file_name", "text"], [("0.jpg", "a ten")])
    with caplog.at_level(logging.WARNING):
        dataset = load(str(folder))
    assert len(dataset["train"]) == 9
    assert "1 tables without a label column, not read, first: " in caplog.text
    assert "The folders are the labels" in caplog.text
    write_table(folder / "train/2/metadata.csv", HEADER, [("0.jpg", "two")])
    with pytest.raises(ValueError, match=r"10/metadata.csv:1: no label column"):
        load(str(folder))


def test_an_image_with_a_row_in_two_tables_is_refused(folder, load):
    write_table(folder / "train/metadata.csv", HEADER, [("10/0.jpg", "good"), ("2/0.jpg", "bad")])
    for table in ("train/metadata.jsonl", "train/10/metadata.csv"):
        name = "10/0.jpg" if table.endswith("jsonl") else "0.jpg"
        write_table(folder / table, HEADER, [(name, "bad")])
        with pytest.raises(ValueError, match="metadata.* and .*metadata.* both have a row for train/10/0.jpg"):
            load(str(folder))
        (folder / table).unlink()


def test_a_table_that_appears_is_read_at_the_next_load(folder, load):
    assert len(load(str(folder))["train"]) == 9
    write_table(folder / "train/10/metadata.csv", HEADER, [("0.jpg", "good"), ("1.jpg", "bad")])
    (folder / "val/10").rename(folder / "val/good")
    for name in ("2", "cat, wild"):
        (folder / "val" / name / "0.jpg").unlink()
    assert labels_of(load(str(folder))) == {"train/10/0.jpg": "good", "train/10/1.jpg": "bad"}
