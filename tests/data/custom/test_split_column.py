"""Tables that say in a column to which split a row belongs."""

import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from tables import write_table

from hnml_hf.data.schema import column


WHICH = ["train", "test", "Train", "val", "train", "TEST"]
LABELS = ["a", "b", "b", "a", "a", "a"]


def labels_of(dataset):
    names = dataset["train"].features["label"].names
    return {split: [names[label] for label in column(rows, "label")] for split, rows in dataset.items()}


DIVIDED = {"train": ["a", "b", "a"], "validation": ["a"], "test": ["b", "a"]}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["split", "Subset", "set", "Usage", "data_split", "dataset"])
def test_rows_go_to_the_split_that_a_column_says(images, load, caplog, suffix, name):
    root, names = images
    write_table(root / f"all{suffix}", ["image", "label", name], list(zip(names, LABELS, WHICH, strict=False)))
    with caplog.at_level(logging.WARNING):
        dataset = load(str(root / f"all{suffix}"))
    assert labels_of(dataset) == DIVIDED
    assert "rows go to the splits that a column says: 3 train, 1 validation, 2 test" in caplog.text
    paths = [cell["path"] for cell in dataset["test"].data.column("image").to_pylist()]
    assert paths == [f"{root}/{names[1]}", f"{root}/{names[5]}"]


def test_a_column_of_another_name_and_values_of_other_names(images, load, caplog):
    root, names = images
    which = ["fit", "holdout", "fit", "unused", "fit", "holdout"]
    table = root / "all.csv"
    write_table(table, ["image", "label", "part"], list(zip(names, LABELS, which, strict=False)))
    assert list(load(str(table))) == ["train"]
    with pytest.raises(ValueError, match="all.csv:2: the column of the splits says 'fit', which is none.*`--splits"):
        load(str(table), split_column="part")
    splits = {"train": "fit", "test": "holdout"}
    with caplog.at_level(logging.WARNING):
        dataset = load(str(table), split_column="part", splits=splits)
    assert labels_of(dataset) == {"train": ["a", "b", "a"], "test": ["b", "a"]}
    assert "1 rows of no split, left out: unused" in caplog.text
    with pytest.raises(ValueError, match="one table, .* or the column of these values by `split_column`"):
        load(str(table), splits=splits)
    with pytest.raises(ValueError, match="no split column `fold`"):
        load(str(table), split_column="fold")


def test_a_column_that_is_only_called_so(images, load):
    root, names = images
    write_table(
        root / "train.csv", ["image", "label", "set"], [(names[0], "a", "crockery"), (names[1], "b", "cutlery")]
    )
    assert list(load(str(root))) == ["train"]
    write_table(root / "train.csv", ["image", "label", "set"], [(names[0], "a", "train"), (names[1], "b", "cutlery")])
    with pytest.raises(ValueError, match=r"train.csv:3: the column of the splits says 'cutlery', which is none"):
        load(str(root))
    assert labels_of(load(str(root), split_column="none")) == {"train": ["a", "b"]}


def test_of_several_columns_the_one_whose_values_are_splits(images, load):
    root, names = images
    rows = list(zip(names, LABELS, "ababab", WHICH, strict=False))
    for first, second in (("subset", "split"), ("split", "partition")):
        write_table(root / "all.csv", ["image", "label", first, second], rows)
        assert labels_of(load(str(root / "all.csv"))) == DIVIDED


@pytest.mark.parametrize("name", ["is_valid", "is_test", "Is_Validation", "is_val"])
def test_a_flag_of_a_split_is_said_and_can_be_heeded(images, load, caplog, name):
    root, names = images
    flags = [False, False, True, False, False, True]
    for suffix in (".csv", ".parquet"):
        write_table(root / f"flags{suffix}", ["image", "label", name], list(zip(names, LABELS, flags, strict=False)))
        path = str(root / f"flags{suffix}")
        caplog.clear()
        assert list(load(path)) == ["train"]
        assert caplog.text.count(f"the column `{name}` is not read") == 1 and f"--split_column {name}" in caplog.text
        caplog.clear()
        divided = load(path, split_column=name, splits={"train": "False", "validation": "True"})
        assert labels_of(divided) == {"train": ["a", "b", "a", "a"], "validation": ["b", "a"]}
        assert "is not read" not in caplog.text
        load(path, split_column="none")
        assert "is not read" not in caplog.text


def test_classes_in_a_column_that_is_called_so(images, load):
    root, names = images
    write_table(root / "train.csv", ["image", "subset"], [(names[0], "train"), (names[1], "bus")])
    assert labels_of(load(str(root), label_column="subset")) == {"train": ["train", "bus"]}


@pytest.mark.parametrize("saved", [True, False])
def test_splits_that_are_ids_with_names(tmp_path, load, pictures, saved):
    names = {"label": ClassLabel(names=["a", "b"]), "split": ClassLabel(names=["test", "train"])}
    values = {"image": pictures.images[:4], "label": [0, 1, 1, 0], "split": [1, 1, 0, 0]}
    dataset = Dataset.from_dict(values, features=Features({"image": Image(), **names}))
    if saved:
        dataset.save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        dataset.to_parquet(tmp_path / "data" / "train.parquet")
    assert labels_of(load(str(tmp_path / "data"))) == {"train": ["a", "b"], "test": ["b", "a"]}


def test_a_column_that_contradicts_the_name_of_its_file(images, load):
    root, names = images
    for split in ("train", "test"):
        write_table(
            root / f"{split}.csv", ["image", "label", "split"], [(names[0], "a", split), (names[1], "b", split)]
        )
    assert labels_of(load(str(root))) == {"train": ["a", "b"], "test": ["a", "b"]}
    write_table(root / "train.csv", ["image", "label", "split"], [(names[0], "a", "train"), (names[1], "b", "test")])
    with pytest.raises(
        ValueError, match="train.csv:3: .* says 'test', but the file is the split train. .*split_column"
    ):
        load(str(root))
    both = load(str(root), split_column="split", label_names=["a", "b"])
    assert labels_of(both) == {"train": ["a"], "test": ["b", "a", "b"]}
    assert column(both["test"], "index").tolist() == [0, 1, 2]
    assert labels_of(load(str(root), split_column="none")) == {"train": ["a", "b"], "test": ["a", "b"]}


def test_no_row_for_training(images, load):
    root, names = images
    write_table(root / "train.csv", ["image", "label", "split"], [(names[0], "a", "test"), (names[1], "b", "val")])
    with pytest.raises(ValueError, match="no row is of the split train, only of validation, test"):
        load(str(root))


def test_splits_whose_labels_lie_in_different_columns(images, load):
    """As in sets whose test labels alone were checked."""
    root, names = images
    rows = [(*row, "b", split) for *row, split in zip(names, LABELS, WHICH, strict=False)]
    write_table(root / "all.csv", ["image", "noisy", "truth", "split"], rows)
    dataset = load(str(root / "all.csv"), label_column="noisy", test_label_column="truth")
    assert labels_of(dataset) == {"train": ["a", "b", "a"], "validation": ["b"], "test": ["b"] * 2}


@pytest.mark.parametrize("saved", [True, False])
def test_embedded_images_follow_their_rows(tmp_path, load, pictures, saved):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"]), "split": Value("string")})
    content = {"image": pictures.images[:6], "label": [0, 1, 1, 0, 0, 0], "split": WHICH}
    rows = Dataset.from_dict(content, features=features)
    rows.save_to_disk(tmp_path / "saved") if saved else rows.to_parquet(tmp_path / "train.parquet")
    dataset = load(str(tmp_path / "saved" if saved else tmp_path))
    assert labels_of(dataset) == DIVIDED
    for split, positions in {"train": [0, 2, 4], "validation": [3], "test": [1, 5]}.items():
        assert column(dataset[split], "index").tolist() == [*range(len(positions))]
        for row, position in enumerate(positions):
            assert np.array_equal(np.asarray(dataset[split][row]["image"]), np.asarray(pictures.images[position]))


def test_saved_splits_that_a_column_divides_anew(tmp_path, load, pictures):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"]), "fold": Value("int64")})
    rows = {"image": pictures.images[:3], "label": [0, 1, 1], "fold": [0, 1, 2]}
    part = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    dataset = load(str(tmp_path / "saved"), split_column="fold", splits={"train": "0", "validation": "1", "test": "2"})
    assert labels_of(dataset) == {"train": ["a", "a"], "validation": ["b", "b"], "test": ["b", "b"]}
    assert column(dataset["train"], "index").tolist() == [0, 1]


def test_a_folder_whose_table_has_the_column(folder, load):
    """The table beside all images; the class folders do not count."""
    (folder / "train").rename(folder / "pool")
    rows = [("pool/10/0.jpg", "a", "train"), ("pool/2/1.jpg", "b", "test"), ("val/2/0.jpg", "b", "train")]
    (folder / "val").rename(folder / "more")
    rows[2] = ("more/2/0.jpg", "b", "train")
    write_table(folder / "metadata.csv", ["file_name", "label", "split"], rows)
    assert labels_of(load("imagefolder", data_dir=folder)) == {"train": ["a", "b"], "test": ["b"]}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_names_of_splits_in_a_column_of_any_name_are_said(images, load, caplog, suffix):
    root, names = images
    table, which = root / f"all{suffix}", ["train", "test", "Train", "val", "train", "TEST"]
    write_table(table, ["image", "label", "tvt"], list(zip(names, LABELS, which, strict=False)))
    with caplog.at_level(logging.WARNING):
        assert list(load(str(table))) == ["train"]
    assert f"{table}: the column `tvt` holds names of splits" in caplog.text and "--split_column tvt" in caplog.text
    assert labels_of(load(str(table), split_column="tvt")) == DIVIDED
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(str(table), split_column="none")
    assert "names of splits" not in caplog.text


@pytest.mark.parametrize("which", [["train"] * 6, ["train", "test", "bus", "train", "test", "train"]])
def test_other_words_are_no_splits(images, load, caplog, which):
    root, names = images
    write_table(root / "all.csv", ["image", "label", "tvt"], list(zip(names, LABELS, which, strict=False)))
    with caplog.at_level(logging.WARNING):
        load(str(root / "all.csv"))
    assert "names of splits" not in caplog.text


def test_names_of_splits_in_a_saved_dataset_are_said(images, load, caplog, tmp_path):
    root, names = images
    cells = [{"bytes": (root / name).read_bytes(), "path": None} for name in names[:6]]
    data = Dataset.from_dict({"image": cells, "label": LABELS, "tvt": WHICH}).cast_column("image", Image())
    data.save_to_disk(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        load(str(tmp_path / "saved"))
    assert "saved (train): the column `tvt` holds names of splits" in caplog.text
