"""Class names belong to each column of each file: an id stands for its own name there, never for another's."""

import logging
import unicodedata
from decimal import Decimal

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from tables import write_table

from hnml_hf.data.schema import column


PETS, SWAPPED = ClassLabel(names=["cat", "dog"]), ClassLabel(names=["dog", "cat"])


@pytest.fixture
def rows(pictures):
    """A dataset of some columns beside its images: name -> (feature, values)."""

    def make(**columns):
        count = len(next(iter(columns.values()))[1])
        features = {"image": Image(), **{name: feature for name, (feature, _) in columns.items()}}
        content = {"image": pictures.images[:count], **{name: values for name, (_, values) in columns.items()}}
        return Dataset.from_dict(content, features=Features(features))

    return make


def named(dataset, name="label"):
    """A column as class names; `None` is unknown."""
    names = dataset.features[name].names
    return [None if label < 0 else names[label] for label in column(dataset, name).tolist()]


def test_splits_whose_files_number_the_classes_otherwise(tmp_path, load, rows):
    rows(label=(PETS, [0, 1, 1])).to_parquet(tmp_path / "train.parquet")
    rows(label=(SWAPPED, [0, 1, 1])).to_parquet(tmp_path / "test.parquet")
    dataset = load(str(tmp_path))
    assert dataset["train"].features == dataset["test"].features
    assert named(dataset["train"]) == ["cat", "dog", "dog"]
    assert named(dataset["test"]) == ["dog", "cat", "cat"]


def test_shards_that_number_the_classes_otherwise(tmp_path, load, rows):
    for shard, names in enumerate((PETS, SWAPPED, ClassLabel(names=["dog"]))):
        rows(label=(names, [0, 0])).to_parquet(tmp_path / f"train-{shard}.parquet")
    assert named(load(str(tmp_path))["train"]) == ["cat", "cat", "dog", "dog", "dog", "dog"]


def test_a_clean_column_with_names_of_its_own(tmp_path, load, rows):
    """The true labels agree with the given ones in all rows but the last."""
    rows(label=(PETS, [0, 1, 1]), clean_label=(SWAPPED, [1, 0, 1])).to_parquet(tmp_path / "train.parquet")
    dataset = load(str(tmp_path))["train"]
    assert named(dataset) == ["cat", "dog", "dog"]
    assert named(dataset, "clean_label") == ["cat", "dog", "cat"]


def test_unknown_clean_labels_of_a_named_column(tmp_path, load, rows):
    rows(label=(PETS, [0, 1, 1]), clean_label=(SWAPPED, [-1, None, 1])).to_parquet(tmp_path / "train.parquet")
    assert named(load(str(tmp_path))["train"], "clean_label") == [None, None, "cat"]


def test_ids_beside_a_named_clean_column_count_in_its_order(tmp_path, load, rows):
    rows(noisy=(Value("int64"), [0, 1, 1]), label=(SWAPPED, [0, 0, 1])).to_parquet(tmp_path / "train.parquet")
    dataset = load(str(tmp_path), label_column="noisy", clean_label_column="label")["train"]
    assert named(dataset) == ["dog", "cat", "cat"] and named(dataset, "clean_label") == ["dog", "dog", "cat"]


def test_saved_splits_that_number_the_classes_otherwise(tmp_path, load, rows):
    train = rows(label=(PETS, [0, 1]), clean_label=(SWAPPED, [1, 0]))
    DatasetDict({"train": train, "test": rows(label=(SWAPPED, [0, 1]))}).save_to_disk(tmp_path / "saved")
    dataset = load(str(tmp_path / "saved"))
    assert named(dataset["train"]) == named(dataset["train"], "clean_label") == ["cat", "dog"]
    assert named(dataset["test"]) == ["dog", "cat"]


@pytest.mark.parametrize("saved", [True, False])
def test_the_users_names_order_those_of_the_data(tmp_path, load, rows, saved):
    train = rows(label=(PETS, [0, 1, 1]))
    train.save_to_disk(tmp_path / "data") if saved else train.to_parquet(tmp_path / "train.parquet")
    dataset = load(str(tmp_path / "data" if saved else tmp_path), label_names=["dog", "cat", "cow"])["train"]
    assert dataset.features["label"].names == ["dog", "cat", "cow"]
    assert named(dataset) == ["cat", "dog", "dog"]


def test_the_users_names_rename_no_names(tmp_path, load, rows):
    rows(label=(PETS, [0, 1])).to_parquet(tmp_path / "train.parquet")
    for names in (["Katze", "Hund"], ["cat", "Hund"]):
        with pytest.raises(ValueError, match="label '(cat|dog)' of train is none of the 2 classes: .*gives all of"):
            load(str(tmp_path), label_names=names)


@pytest.mark.parametrize("digits", [["0", "1"], ["1", "2"]])
def test_the_users_names_rename_digits_in_order(tmp_path, load, rows, digits):
    rows(label=(ClassLabel(names=digits), [0, 1, 1])).to_parquet(tmp_path / "train.parquet")
    rows(label=(ClassLabel(names=digits[::-1]), [0, 1])).to_parquet(tmp_path / "test.parquet")
    dataset = load(str(tmp_path), label_names=["cat", "dog"])
    assert named(dataset["train"]) == ["cat", "dog", "dog"]
    assert named(dataset["test"]) == ["dog", "cat"]


@pytest.mark.parametrize("digits", [["1", "0"], ["0", "2", "10"], ["0", "1", "10", "2"]])
def test_digits_whose_order_leaves_a_doubt_are_not_renamed(tmp_path, load, rows, digits):
    rows(label=(ClassLabel(names=digits), [0, 1])).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="is none of the .* classes: a, b"):
        load(str(tmp_path), label_names=["a", "b", "c", "d"][: 4 if len(digits) == 3 else len(digits)])


def test_a_name_that_training_lacks_is_refused(tmp_path, load, rows):
    rows(label=(PETS, [0, 1])).to_parquet(tmp_path / "train.parquet")
    rows(label=(ClassLabel(names=["cow", "cat"]), [1, 0])).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="test.parquet:2: label 'cow' of test is none of the 2 classes: cat, dog"):
        load(str(tmp_path))
    assert named(load(str(tmp_path), label_names=["cat", "cow", "dog"])["test"]) == ["cat", "cow"]


def test_ids_without_names_beside_names_of_two_orders_are_refused(images, load, rows):
    """Whose order do they follow?"""
    root, names = images
    rows(label=(PETS, [0, 1])).to_parquet(root / "train.parquet")
    write_table(root / "test.csv", ["image", "label"], [(names[0], 1)])
    assert named(load(str(root))["test"]) == ["dog"]
    with pytest.raises(ValueError, match=r"test.csv:2: label 1 of test is an id without a name, and those of .*train"):
        load(str(root), label_names=["dog", "cat"])
    write_table(root / "test.csv", ["image", "label"], [(names[0], "dog")])
    assert named(load(str(root), label_names=["dog", "cat"])["test"]) == ["dog"]


def test_an_id_that_its_own_column_does_not_name_is_refused(tmp_path, load, rows):
    rows(label=(PETS, [0, 1])).to_parquet(tmp_path / "train.parquet")
    rows(label=(PETS, [0, -1])).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="test.parquet:2: label -1 of test is out of range.*left out by `splits`"):
        load(str(tmp_path))
    assert list(load(str(tmp_path), splits={"train": "train.parquet"})) == ["train"]


def test_a_table_of_names_beside_a_table_with_named_ids(images, load, rows):
    root, names = images
    rows(label=(SWAPPED, [0, 1])).to_parquet(root / "train.parquet")
    write_table(root / "test.csv", ["image", "label"], [(names[0], "cat"), (names[1], " dog ")])
    assert named(load(str(root))["test"]) == ["cat", "dog"]


def test_accents_may_be_composed_or_not(images, load, rows):
    """macOS decomposes what Windows and Linux keep together; both look the same."""
    root, names = images
    composed, apart = (unicodedata.normalize(form, "caffè") for form in ("NFC", "NFD"))
    write_table(root / "train.csv", ["image", "label"], [(names[0], apart), (names[1], composed), (names[2], "tè")])
    write_table(root / "test.jsonl", ["image", "label"], [(names[0], composed)])
    rows(label=(ClassLabel(names=[apart, "tè"]), [0, 1])).to_parquet(root / "validation.parquet")
    dataset = load(str(root))
    assert dataset["train"].features["label"].names == [composed, "tè"]
    assert [named(dataset[split])[0] for split in dataset] == [composed] * 3
    assert named(load(str(root), label_names=["tè", apart])["train"]) == [composed, composed, "tè"]


def test_folders_and_files_whose_accents_are_composed_or_not(folder, load):
    composed, apart = (unicodedata.normalize(form, "Grün") for form in ("NFC", "NFD"))
    (folder / "train/2").rename(folder / "train" / apart)
    (folder / "val/2").rename(folder / "val" / composed)
    dataset = load(str(folder))
    assert named(dataset["validation"]) == ["10", composed, "cat, wild"]
    assert named(dataset["train"]).count(composed) == 3
    path = folder / "train" / apart / f"{apart}.jpg"
    (folder / "train" / apart / "0.jpg").rename(path)
    write_table(folder / "table.csv", ["image", "label"], [(f"train/{composed}/{composed}.jpg", "a")])
    table = load(str(folder / "table.csv"))["train"]
    assert table.data.column("image")[0].as_py()["path"] == str(path) and table[0]["image"].size == (28, 28)


def test_names_that_are_the_same_but_for_blanks_and_accents_are_refused(tmp_path, load, rows):
    rows(label=(ClassLabel(names=["cat", "cat "]), [0, 1])).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="different names, at least one; got cat, cat"):
        load(str(tmp_path))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_floats_that_are_whole_numbers_are_ids(images, load, suffix):
    """pandas makes floats of integers where a cell is empty."""
    root, names = images
    cells = [(0.0, 1.0), (1.0, None), (2.0, float("nan")), (0.0, -1.0)]
    if suffix == ".csv":
        cells = [(label, "" if clean in (None, cells[2][1]) else clean) for label, clean in cells]
    table = [(name, *pair, 3.0 + row) for row, (name, pair) in enumerate(zip(names, cells, strict=False))]
    write_table(root / f"train{suffix}", ["image", "label", "clean_label", "index"], table)
    dataset = load(str(root))["train"]
    assert dataset.features["label"].names == ["0", "1", "2"]
    assert column(dataset, "label").tolist() == [0, 1, 2, 0]
    assert column(dataset, "clean_label").tolist() == [1, -1, -1, -1]
    assert column(dataset, "index").tolist() == [3, 4, 5, 6]
    assert named(load(str(root), label_names=["a", "b", "c"])["train"]) == ["a", "b", "c", "a"]


def test_decimals_that_are_whole_numbers_are_ids(images, load):
    root, names = images
    write_table(root / "train.parquet", ["image", "label"], [(names[0], Decimal("1.0")), (names[1], Decimal("0"))])
    assert column(load(str(root))["train"], "label").tolist() == [1, 0]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_booleans_are_ids(images, load, suffix):
    root, names = images
    write_table(root / f"train{suffix}", ["image", "label"], [(names[0], True), (names[1], False)])
    write_table(root / "test.csv", ["image", "label"], [(names[0], "True"), (names[1], "false")])
    dataset = load(str(root))
    assert dataset["train"].features["label"].names == ["0", "1"]
    assert column(dataset["train"], "label").tolist() == column(dataset["test"], "label").tolist() == [1, 0]


def test_booleans_as_text_are_names_that_booleans_have(images, load):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], True), (names[1], False)])
    write_table(root / "test.jsonl", ["image", "label"], [(names[0], True), (names[1], False)])
    dataset = load(str(root))
    assert named(dataset["train"]) == named(dataset["test"]) == ["True", "False"]


@pytest.mark.parametrize("index", [["a", "b"], [0, 0], [-1, 5], [0.5, 1]])
def test_a_column_called_index_that_is_none_can_be_ignored(images, load, index):
    root, names = images
    write_table(root / "train.csv", ["image", "label", "index"], list(zip(names, "ab", index, strict=False)))
    with pytest.raises(ValueError, match=r"train.csv:[23]: the index .*`--index_column none`\) ignores the column"):
        load(str(root))
    assert column(load(str(root), index_column="none")["train"], "index").tolist() == [0, 1]


def test_an_index_that_starts_again_in_every_shard(tmp_path, load, rows):
    for shard in "ab":
        rows(label=(PETS, [0, 1]), index=(Value("int64"), [0, 1])).to_parquet(tmp_path / f"train-{shard}.parquet")
    with pytest.raises(ValueError, match="train: the index 0 is that of 2 rows of .*train-a.*`--index_column none`"):
        load(str(tmp_path))
    assert column(load(str(tmp_path), index_column="none")["train"], "index").tolist() == [0, 1, 2, 3]


def test_other_columns_of_usual_names_can_be_ignored(images, load, caplog):
    root, names = images
    table = [(names[0], "a", "dirty", 7.5, "kept"), (names[1], "b", "washed", 7.5, "kept")]
    write_table(root / "train.csv", ["image", "label", "clean_label", "weight", "audit_action"], table)
    with caplog.at_level(logging.WARNING):
        dataset = load(str(root), clean_label_column="none", weight_column="none")["train"]
    assert column(dataset, "clean_label").tolist() == [-1, -1] and "weight" not in dataset.column_names
