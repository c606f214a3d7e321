import json
import logging
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from datasets.exceptions import DatasetNotFoundError
from tables import write_table

from hnml_hf.data.schema import COLUMNS, column


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_tables_of_every_kind(images, load, suffix):
    root, names = images
    rows = [(name, "cat" if i % 2 else "ant", "ant", 100 + 3 * i) for i, name in enumerate(names)]
    write_table(root / f"train{suffix}", ["file_name", "seen", "truth", "id"], rows)
    write_table(root / f"test{suffix}", ["file_name", "truth", "id"], [(names[0], "cat", 5), (names[1], "ant", 6)])
    dataset = load(str(root), label_column="seen", clean_label_column="truth", index_column="id")
    assert list(dataset) == ["train", "test"]
    assert tuple(dataset["train"].column_names) == COLUMNS
    assert dataset["train"].features == dataset["test"].features
    assert dataset["train"].features["label"].names == ["ant", "cat"]
    assert column(dataset["train"], "label").tolist() == [i % 2 for i in range(12)]
    assert column(dataset["train"], "clean_label").tolist() == [0] * 12
    assert column(dataset["train"], "index").tolist() == [100 + 3 * i for i in range(12)]
    assert column(dataset["test"], "label").tolist() == column(dataset["test"], "clean_label").tolist() == [1, 0]
    cell = dataset["train"].data.column("image")[10].as_py()
    assert cell == {"bytes": None, "path": f"{root}/img/a, b.jpg"}
    assert dataset["train"][11]["image"].size == (28, 28)


@pytest.mark.parametrize("suffix", [".CSV", ".Tsv", ".JSON", ".JSONL", ".Parquet"])
def test_tables_with_capitals(images, load, suffix):
    root, names = images
    write_table(root / f"TRAIN{suffix}", ["file_name", "label"], [(names[0], "a"), (names[1], "b")])
    for dataset in (load(str(root)), load(str(root / f"TRAIN{suffix}"))):
        assert column(dataset["train"], "label").tolist() == [0, 1]


@pytest.mark.parametrize(("mark", "suffix"), [(";", ".csv"), ("\t", ".csv"), ("|", ".tsv"), (";", ".tsv")])
def test_fields_that_are_separated_otherwise(images, load, mark, suffix):
    root, names = images
    (root / f"train{suffix}").write_text(f"file_name{mark}label\n{names[0]}{mark}a\n{names[1]}{mark}b\n")
    with pytest.raises(ValueError, match=f"train{suffix}:1: one column, .*separated by .*, not by"):
        load(str(root))


def test_one_table_with_a_data_dir(images, load, tmp_path):
    root, names = images
    table = tmp_path / "elsewhere.csv"
    write_table(table, ["path", "label"], [(names[0], 0), (f"{root}/{names[1]}", 2)])
    dataset = load(str(table), data_dir=root)
    assert list(dataset) == ["train"]
    assert dataset["train"].features["label"].names == ["0", "1", "2"]
    assert column(dataset["train"], "label").tolist() == [0, 2]
    assert column(dataset["train"], "clean_label").tolist() == [-1, -1]
    assert dataset["train"][1]["image"].size == (28, 28)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet_paths_of_every_text_type(images, load, kind):
    """pandas 3 writes large strings; these are paths as much as the strings of pandas 2."""
    root, names = images
    table, labels = root / "train.parquet", pa.array(["a", "b"], kind)

    def write(*paths):
        try:
            pq.write_table(pa.table({"image": pa.array(paths, kind), "label": labels}), table)
        except pa.ArrowNotImplementedError:
            pytest.skip(f"this pyarrow writes no {kind}")

    write(names[0], f"{root}/{names[1]}")
    dataset = load(str(table))["train"]
    paths = [cell["path"] for cell in dataset.data.column("image").to_pylist()]
    assert paths == [f"{root}/{names[0]}", f"{root}/{names[1]}"]
    assert dataset.features["label"].names == ["a", "b"]
    write(names[0], "../x.png")
    with pytest.raises(ValueError, match=r"train.parquet:2: the path '../x.png' is not"):
        load(str(table))
    write(names[0], "img/none.jpg")
    with pytest.raises(ValueError, match="train.parquet:2: no such image"):
        load(str(table))


def test_byte_order_mark_and_windows_line_ends(images, load):
    root, names = images
    text = "file_name,label\r\n" + "".join(f'"{name}",{i % 3}\r\n' for i, name in enumerate(names))
    (root / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert column(load(str(root))["train"], "label").tolist() == [i % 3 for i in range(12)]


def test_splits_have_many_names(images, load):
    root, names = images
    for stem in ("train", "valid", "testing"):
        write_table(root / f"{stem}.csv", ["image", "label"], [(name, "x") for name in names])
    write_table(root / "extra.csv", ["image", "label"], [(name, "x") for name in names[:3]])
    assert list(load(str(root))) == ["train", "validation", "test"]
    dataset = load(str(root), splits={"train": "train.csv", "test": "extra.csv"})
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 12, "test": 3}
    with pytest.raises(ValueError, match="`splits` maps train, validation, test"):
        load(str(root), splits={"dev": "extra.csv"})
    with pytest.raises(FileNotFoundError, match="nothing.csv does not exist"):
        load(str(root), splits={"train": "nothing.csv"})
    with pytest.raises(ValueError, match="train.csv is one table, .* `splits` names valid.csv: pass the folder"):
        load(str(root / "train.csv"), splits={"validation": "valid.csv"})
    with pytest.raises(ValueError, match="No table for `train` among test"):
        load(str(root), splits={"test": "extra.csv"})
    for stem in ("train", "valid", "testing"):
        (root / f"{stem}.csv").rename(root / f"{stem.upper()}.csv")
    assert list(load(str(root))) == ["train", "validation", "test"]
    write_table(root / "val.tsv", ["image", "label"], [(names[0], "x")])
    with pytest.raises(ValueError, match="validation has tables of several kinds"):
        load(str(root))


def test_label_names_give_the_ids(images, load):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], "dog"), (names[1], "cat"), (names[2], 1)])
    dataset = load(str(root), label_names=["dog", "cat", "cow"])["train"]
    assert column(dataset, "label").tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="`label_names` must be a list of class names in id order, got 'dog'"):
        load(str(root), label_names="dog")
    with pytest.raises(ValueError, match="label_names` must be different names"):
        load(str(root), label_names=["dog", "dog"])
    with pytest.raises(ValueError, match="train.csv:3: label 'cat' of train is none of the 1 class: dog"):
        load(str(root), label_names=["dog"])


def test_sorted_names_and_integers_are_said_in_the_log(images, load, caplog):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], "b"), (names[1], "a")])
    with caplog.at_level(logging.INFO, logger="hnml_hf"):
        load(str(root))
    assert "2 classes in sorted order: a, b" in caplog.text
    write_table(root / "train.csv", ["image", "label"], [(names[0], 3), (names[1], 0)])
    with caplog.at_level(logging.INFO, logger="hnml_hf"):
        load(str(root))
    assert "integer labels without names: classes 0..3" in caplog.text and "only" not in caplog.text
    write_table(root / "train.csv", ["image", "label"], [(names[0], 20_999), (names[1], 0)])
    load(str(root))
    assert "only 2 labels between 0 and 20999 are given, but each is a class" in caplog.text


BAD_LABELS = [
    ("", "the label is missing"),
    ("-1", "label -1 is out of range|label -1"),
    ("1.5", "label '1.5' is not a class"),
    ("   ", "the label is missing; fill it in"),
    ("nan", "the label is missing .'nan' means that, unless it is one of the `label_names`"),
    ("N/A", "the label is missing"),
    ("None", "the label is missing"),
    ("1e3", "label '1e3' is not a class"),
    ("100000", "label 100000 is out of range, expected 0..99999; `label_names`"),
    ("dog", "the label 'dog' is a name, that of .*train.csv:2 the integer 0"),
    ("do\x07g", "control characters"),
]


@pytest.mark.parametrize(("label", "message"), BAD_LABELS)
def test_bad_labels_name_their_row(images, load, label, message):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], 0), (names[1], 1), (names[2], label)])
    with pytest.raises(ValueError, match=f"train.csv:4: .*({message})|train.csv:4: ({message})"):
        load(str(root))


@pytest.mark.parametrize("name", [b"a\nb.jpg", b"a\tb.jpg", b"a\xffb.jpg"])
def test_a_file_name_that_no_list_could_hold(folder, load, name):
    (place,) = (folder / "train").glob("2")
    with open(os.path.join(os.fsencode(place), name), "wb"):
        pass
    with pytest.raises(ValueError, match="the file name .* has control characters or is no UTF-8 text; rename"):
        load(str(folder))


def test_blanks_around_labels_and_column_names_do_not_count(images, load):
    root, names = images
    cells = ("cat", "dog ", " dog", "\tcat", "cat ")
    rows = "".join(f"{name}, {cell}, {i}, dog \n" for i, (name, cell) in enumerate(zip(names, cells, strict=False)))
    (root / "train.csv").write_text(f"image, label, index , clean_label\n{rows}")
    dataset = load(str(root))["train"]
    assert dataset.features["label"].names == ["cat", "dog"]
    assert column(dataset, "label").tolist() == [0, 1, 1, 0, 0]
    assert column(dataset, "clean_label").tolist() == [1] * 5
    assert column(dataset, "index").tolist() == [*range(5)]
    (root / "train.csv").write_text("image,label\nimg/0.jpg, 1\nimg/1.jpg,0 \n")
    assert column(load(str(root))["train"], "label").tolist() == [1, 0]


@pytest.mark.parametrize("empty", ["", " ", "NA", "n/a", "None", "NULL", "nan", "<NA>", "#N/A"])
def test_texts_for_no_value(images, load, empty):
    root, names = images
    write_table(root / "train.csv", ["image", "label", "clean_label"], [(names[0], "a", empty), (names[1], "b", "a")])
    assert column(load(str(root))["train"], "clean_label").tolist() == [-1, 0]


def test_a_class_may_be_called_none(images, load, folder):
    """Where its name was declared, or is that of a folder."""
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], "None"), (names[1], "NA")])
    dataset = load(str(root), label_names=["NA", "None"])["train"]
    assert column(dataset, "label").tolist() == [1, 0]
    for split in ("train", "val"):
        (folder / split / "2").rename(folder / split / "None")
    assert load(str(folder))["train"].features["label"].names == ["10", "None", "cat, wild"]


def test_class_names_that_are_nearly_the_same_are_said(images, load, caplog):
    root, names = images
    labels = ("cat", "Dog", "dog", "CAT", "cow")
    write_table(root / "train.csv", ["image", "label"], list(zip(names, labels, strict=False)))
    with caplog.at_level(logging.WARNING):
        assert len(load(str(root))["train"].features["label"].names) == 5
    assert "maybe one class: 'CAT' and 'cat', 'Dog' and 'dog'." in caplog.text


def test_numbers_with_leading_zeros_are_names(images, load, caplog):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[i], f"{i + 1:02d}") for i in range(11)])
    dataset = load(str(root))["train"]
    assert dataset.features["label"].names == [f"{i + 1:02d}" for i in range(11)]
    assert column(dataset, "label").tolist() == [*range(11)]
    write_table(root / "test.csv", ["image", "label"], [(names[0], "1")])
    with pytest.raises(ValueError, match="test.csv:2: label 1 of test is none of the 11 classes: 01, 02"):
        load(str(root))
    (root / "test.csv").unlink()
    labels = ("1", "01", "007")
    write_table(root / "train.csv", ["image", "label"], list(zip(names, labels, strict=False)))
    with caplog.at_level(logging.WARNING):
        assert load(str(root))["train"].features["label"].names == ["007", "01", "1"]
    assert "leading zeros alone, maybe one class: '01' and '1'." in caplog.text


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_numbers_from_one_are_named(images, load, caplog, suffix):
    """Without names there is a class 0 that no row has."""
    root, names = images
    write_table(root / f"train{suffix}", ["image", "label"], [(names[i], 1 + i % 2) for i in range(4)])
    with caplog.at_level(logging.WARNING):
        assert load(str(root))["train"].features["label"].names == ["0", "1", "2"]
    assert "1 of 3 classes have no row in train: 0. Give the classes that there are by `label_names`" in caplog.text
    caplog.clear()
    dataset = load(str(root), label_names=["1", "2"])["train"]
    assert column(dataset, "label").tolist() == [0, 1, 0, 1]
    assert "have no row" not in caplog.text
    with pytest.raises(ValueError, match="label 2 of train is none of the 2 classes: 1, 3"):
        load(str(root), label_names=["1", "3"])


@pytest.mark.parametrize("label", [None, 1.5, [1], float("nan"), float("inf"), {"a": 1}])
def test_bad_labels_in_json(images, load, label):
    root, names = images
    write_table(root / "train.jsonl", ["image", "label"], [(names[0], 0), (names[1], label)])
    with pytest.raises(ValueError, match="train.jsonl:2: (label|the label)"):
        load(str(root))


def test_missing_clean_labels_are_unknown(images, load):
    root, names = images
    write_table(
        root / "train.csv", ["image", "label", "clean_label"], [(names[0], 0, ""), (names[1], 1, -1), (names[2], 1, 0)]
    )
    assert column(load(str(root))["train"], "clean_label").tolist() == [-1, -1, 0]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_fields_that_the_first_record_lacks(images, load, suffix):
    root, names = images
    records = [{"image": names[0], "label": 0}, {"image": names[1], "label": 1, "clean_label": 0}]
    text = json.dumps(records) if suffix == ".json" else "".join(json.dumps(record) + "\n" for record in records)
    (root / f"train{suffix}").write_text(text)
    assert column(load(str(root))["train"], "clean_label").tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,label\nimg/0.jpg\n", r"train.csv:2: 1 fields, the header has 2"),
        (
            b"image,label\nimg/a, b.jpg,1\n",
            r"train.csv:2: 3 fields, the header has 2; names with a comma must be quoted",
        ),
        (b'image,label\n"img/0.jpg,1\n', r"train.csv:2: "),
        (b"image,image\nimg/0.jpg,1\n", r"train.csv:1: two columns have one name"),
        (b"image,label\n\xff.jpg,1\n", r"train.csv:2: not UTF-8"),
        (b"", r"train.csv:1: the table is empty"),
        (b"image,label\n", r"train.csv:1: no rows"),
        (b"image,label\n../0.jpg,1\n", r"train.csv:2: the path"),
        (b"image,label\n/etc/passwd,1\n", r"train.csv:2: the path"),
        (b"image,label\nimg/none.jpg,1\n", r"train.csv:2: no such image below"),
        (
            b"image,label,index\nimg/0.jpg,1,7\nimg/1.jpg,1,7\n",
            r"train.csv:3: the index 7 is also that of .*train.csv:2",
        ),
        (b"image,label,index\nimg/0.jpg,1,x\n", r"train.csv:2: the index 'x' is not"),
        (b"image,class_id\nimg/0.jpg,1\n", r"no label column .*columns are: image, class_id.*`label_column`"),
        (b"pic,label\nimg/0.jpg,1\n", r"no image column .*columns are: pic, label"),
    ],
)
def test_bad_tables(images, load, content, message):
    root, _ = images
    (root / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(str(root))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", "{", r"train.json:1: not valid JSON"),
        ("train.json", "[" * 100_000, r"train.json:1: not valid JSON"),
        ("train.json", "{}", r"train.json:1: expected a list of objects"),
        ("train.json", "[1]", r"train.json:1: expected an object"),
        ("train.json", "[]", r"train.json:1: the table is empty"),
        ("train.jsonl", '{"image": "img/0.jpg", "label": 1}\nx\n', r"train.jsonl:2: not valid JSON"),
        ("train.jsonl", '{"image": 3, "label": 1}\n', r"train.jsonl:1: the image must be a path, got 3"),
        ("train.jsonl", '{"image": "\\ud800.jpg", "label": 1}\n', r"train.jsonl:1: control character"),
        ("train.jsonl", '{"image": "img/0.jpg", "label": "\\ud800"}\n', r"train.jsonl:1: label"),
        ("train.parquet", "PAR1", r"train.parquet: not a readable parquet file"),
    ],
)
def test_bad_json_and_parquet(images, load, name, content, message):
    root, _ = images
    (root / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(str(root))


def test_missing_image_can_be_skipped(images, load, caplog):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], 0), ("img/none.jpg", 1), (names[2], 1)])
    with caplog.at_level(logging.WARNING):
        dataset = load(str(root), on_missing="skip")["train"]
    assert "(train) row 1: no such image: 1 of 3 rows, first: " in caplog.text and "img/none.jpg" in caplog.text
    assert column(dataset, "index").tolist() == [0, 2]
    write_table(root / "train.csv", ["image", "label"], [("img/none.jpg", 0)])
    with pytest.raises(ValueError, match="row 0: no such image: 1 of 1 row, .*No row is left"):
        load(str(root), on_missing="skip")


def test_images_are_looked_up_at_every_load(images, load, caplog):
    """The tables did not change, so that the rows come from the cache."""
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(name, i % 2) for i, name in enumerate(names[:4])])
    image, aside = root / names[1], root / "aside"

    def indices(**options):
        return column(load(str(root), **options)["train"], "index").tolist()

    image.rename(aside)
    assert indices(on_missing="skip") == [0, 2, 3]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert indices(on_missing="skip") == [0, 2, 3]
    assert "1 of 4 rows" in caplog.text
    aside.rename(image)
    assert indices(on_missing="skip") == indices() == [0, 1, 2, 3]
    image.rename(aside)
    with pytest.raises(ValueError, match=r"\(train\) row 1: no such image: 1 of 4 rows, .*img/1.jpg.*Restore them"):
        load(str(root))
    aside.rename(image)
    assert indices() == [0, 1, 2, 3]


def test_class_of_test_that_train_lacks(images, load):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], "a"), (names[1], "b")])
    write_table(root / "test.csv", ["image", "label"], [(names[0], "a"), (names[1], "zebra")])
    with pytest.raises(ValueError, match="test.csv:3: label 'zebra' of test is none of the 2 classes: a, b"):
        load(str(root))
    write_table(root / "test.csv", ["image", "label"], [(names[0], "7")])
    with pytest.raises(ValueError, match="test.csv:2: label 7 of test is none of the 2 classes|out of range"):
        load(str(root))


def test_split_that_lacks_a_class_is_said(images, load, caplog):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], "a"), (names[1], "b")])
    write_table(root / "test.csv", ["image", "label"], [(names[0], "a")])
    with caplog.at_level(logging.WARNING):
        load(str(root))
    assert "test lacks classes of train: b" in caplog.text


def test_noisy_test_labels_are_said_and_can_be_replaced(images, load, caplog):
    root, names = images
    rows = [(name, i % 2, 0) for i, name in enumerate(names)]
    for stem in ("train", "test"):
        write_table(root / f"{stem}.csv", ["image", "noisy", "truth"], rows)
    options = {"label_column": "noisy", "clean_label_column": "truth"}
    with caplog.at_level(logging.WARNING):
        load(str(root), **options)
    assert "test: 6 of 12 labels differ from the clean label" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dataset = load(str(root), test_label_column="truth", **options)
    assert "differ" not in caplog.text
    assert set(column(dataset["test"], "label")) == {0} and column(dataset["train"], "label").sum() == 6


def test_changed_table_is_read_again(images, load):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], "a"), (names[1], "b")])
    assert len(load(str(root))["train"]) == 2
    write_table(root / "train.csv", ["image", "label"], [(names[0], "a"), (names[1], "b"), (names[2], "c")])
    dataset = load(str(root))["train"]
    assert len(dataset) == 3 and dataset.features["label"].names == ["a", "b", "c"]


def test_embedded_images_whose_test_file_lacks_the_noisy_column(tmp_path, load, pictures):
    """Read in one call, the test file would get the noisy column filled with None."""
    names = ClassLabel(names=["x", "y"])
    features = Features({"picture": Image(), "label": names, "noisy": names, "row": Value("int32")})
    content = {"picture": pictures.images[:6], "label": [0, 1] * 3, "noisy": [1] * 6, "row": range(10, 16)}
    train = Dataset.from_dict(content, features=features)
    train.to_parquet(tmp_path / "train-00000.parquet")
    train.to_parquet(tmp_path / "test.parquet")
    train.remove_columns("noisy").to_parquet(tmp_path / "test.parquet")
    options = {"image_column": "picture", "clean_label_column": "label", "index_column": "row"}
    dataset = load(str(tmp_path), label_column="noisy", **options)
    assert column(dataset["train"], "label").tolist() == [1] * 6
    assert column(dataset["train"], "clean_label").tolist() == [0, 1] * 3
    assert column(dataset["test"], "label").tolist() == column(dataset["test"], "clean_label").tolist() == [0, 1] * 3
    assert dataset["train"].features["label"].names == ["x", "y"]
    assert column(dataset["train"], "index").tolist() == [*range(10, 16)]
    assert np.array_equal(np.asarray(dataset["test"][4]["image"]), np.asarray(pictures.images[4]))
    with pytest.raises(ValueError, match="no label column `noisi`.*picture, label, noisy, row"):
        load(str(tmp_path), label_column="noisi", **options)


def test_shards_are_put_together_in_order(tmp_path, load, pictures):
    for shard in range(3):
        content = {"image": pictures.images[shard : shard + 2], "label": [shard, 0]}
        Dataset.from_dict(content, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(
            tmp_path / f"train-{shard:05d}-of-00003.parquet"
        )
    dataset = load(str(tmp_path))["train"]
    assert column(dataset, "label").tolist() == [0, 0, 1, 0, 2, 0]
    assert column(dataset, "index").tolist() == [*range(6)]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_weights_of_a_table(images, load, suffix):
    """A column named for them; one that happens to be called `weight` says nothing of labels."""
    root, names = images
    rows = [(names[0], "a", 0.25, 7.5), (names[1], "b", 1, 7.5)]
    write_table(root / f"train{suffix}", ["image", "label", "trust", "weight"], rows)
    write_table(root / f"test{suffix}", ["image", "label"], [row[:2] for row in rows])
    dataset = load(str(root), weight_column="trust")
    assert column(dataset["train"], "weight").tolist() == [0.25, 1.0]
    assert column(dataset["test"], "weight").tolist() == [1.0, 1.0]
    assert tuple(load(str(root))["train"].column_names) == COLUMNS
    with pytest.raises(ValueError, match="no weight column `w`"):
        load(str(root), weight_column="w")
    write_table(root / "train.csv", ["image", "label", "trust"], [(*rows[0][:2], "much"), rows[1][:3]])
    with pytest.raises(ValueError, match="train.csv:2: the weight 'much' is not a number"):
        load(str(root / "train.csv"), weight_column="trust")


def test_what_lies_beside_split_folders_is_named(folder, load, caplog):
    (folder / "stray.jpg").write_bytes((folder / "train" / "2" / "0.jpg").read_bytes())
    (folder / "labels.csv").write_text("file_name,label\ntrain/2/0.jpg,10\n")
    (folder / "README.md").write_text("photographs")
    with caplog.at_level(logging.WARNING):
        assert len(load("imagefolder", data_dir=folder)["train"]) == 9
    assert "images and tables beside the split folders, left out: labels.csv, stray.jpg. A table" in caplog.text


def test_a_test_split_alone_says_how_to_evaluate_on_it(folder, images, load):
    (folder / "train").rename(folder / "test")
    (folder / "val").rename(folder.parent / "elsewhere")
    with pytest.raises(
        ValueError, match=f"evaluate a model on `test` alone: `--data_dir {folder}/test --split train`"
    ):
        load("imagefolder", data_dir=folder)
    assert len(load("imagefolder", data_dir=folder / "test")["train"]) == 9
    root, names = images
    write_table(root / "test.csv", ["file_name", "label"], [(names[0], "a"), (names[1], "b")])
    with pytest.raises(
        ValueError, match=f"To evaluate a model on one alone: `--dataset {root}/test.csv --split train`"
    ):
        load(str(root))
    assert len(load(str(root / "test.csv"))["train"]) == 2


@pytest.mark.parametrize("as_dict", [True, False])
def test_saved_to_disk(tmp_path, load, pictures, as_dict):
    features = Features({"img": Image(), "fine_label": ClassLabel(names=["x", "y"])})
    train = Dataset.from_dict({"img": pictures.images[:4], "fine_label": [0, 1, 1, 0]}, features=features)
    (DatasetDict({"train": train, "valid": train}) if as_dict else train).save_to_disk(tmp_path / "saved")
    dataset = load(str(tmp_path / "saved"))
    assert list(dataset) == (["train", "validation"] if as_dict else ["train"])
    for rows in dataset.values():
        assert tuple(rows.column_names) == COLUMNS
        assert column(rows, "label").tolist() == [0, 1, 1, 0]
        assert column(rows, "clean_label").tolist() == [-1] * 4
        assert column(rows, "index").tolist() == [0, 1, 2, 3]
        assert np.array_equal(np.asarray(rows[2]["image"]), np.asarray(pictures.images[2]))


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_paths_of_a_saved_dataset_start_at_data_dir(images, load, tmp_path, monkeypatch, caplog, kind):
    root, names = images
    names = [names[0], f"{root}/{names[1]}", names[2]]
    features = Features({"file_name": Value(kind), "label": Value("string")})
    content = {"file_name": names, "label": ["a", "b", "b"]}
    Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    monkeypatch.chdir(root)  # from where they used to be read
    with pytest.raises(ValueError, match="row 0: the image path 'img/0.jpg' is relative; pass `data_dir`"):
        load(saved)
    dataset = load(saved, data_dir=root)["train"]
    paths = [cell["path"] for cell in dataset.data.column("image").to_pylist()]
    assert paths == [f"{root}/img/{i}.jpg" for i in range(3)]
    assert dataset[2]["image"].size == (28, 28)
    (root / names[0]).unlink()
    with pytest.raises(ValueError, match=r"saved \(train\) row 0: no such image: 1 of 3 rows, .*Restore them"):
        load(saved, data_dir=root)
    with caplog.at_level(logging.WARNING):
        assert column(load(saved, data_dir=root, on_missing="skip")["train"], "index").tolist() == [1, 2]
    assert "1 of 3 rows" in caplog.text
    with pytest.raises(ValueError, match=r"saved \(train\):1: the path .* is not a relative path inside"):
        load(saved, data_dir=saved)
    with pytest.raises(ValueError, match="`on_missing` must be 'error' or 'skip', got 'ignore'"):
        load(saved, data_dir=root, on_missing="ignore")


def test_data_dir_is_refused_where_no_paths_are(tmp_path, load, pictures):
    content = {"image": pictures.images[:2], "label": [0, 1]}
    Dataset.from_dict(content, features=Features({"image": Image(), "label": Value("int64")})).save_to_disk(
        tmp_path / "saved"
    )
    with pytest.raises(ValueError, match="column `image` holds images, no paths, and `data_dir` says where"):
        load(str(tmp_path / "saved"), data_dir=tmp_path)


def test_saved_splits_of_other_names(tmp_path, load, pictures):
    features = Features({"image": Image(), "label": Value("int64"), "n": Value("float32")})
    rows = Dataset.from_dict({"image": pictures.images[:2], "label": [0, 1], "n": [0.5, 1.0]}, features=features)
    DatasetDict({"part_a": rows, "part_b": rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="the splits are part_a, part_b; pass `splits`"):
        load(str(tmp_path / "saved"))
    assert list(load(str(tmp_path / "saved"), splits={"train": "part_b"})) == ["train"]
    with pytest.raises(ValueError, match="row 0: label '0.5' is not a class"):
        load(str(tmp_path / "saved"), splits={"train": "part_b"}, label_column="n")
    with pytest.raises(ValueError, match="column `n` holds no images"):
        load(str(tmp_path / "saved"), splits={"train": "part_b"}, image_column="n")


def test_image_folder(folder, load):
    for dataset in (load("imagefolder", data_dir=folder), load(str(folder))):
        assert list(dataset) == ["train", "validation"]
        assert dataset["train"].features["label"].names == ["10", "2", "cat, wild"]
        assert column(dataset["train"], "label").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert column(dataset["validation"], "label").tolist() == [0, 1, 2]
        assert column(dataset["train"], "index").tolist() == [*range(9)]
    assert list(load("imagefolder", data_dir=folder / "val")) == ["train"]


def test_image_folder_counts_what_it_leaves_out(folder, load, caplog, pictures):
    pictures.images[0].save(folder / "train/loose.png")
    (folder / "train/2/notes.txt").write_text("x")
    (folder / "train/2/deeper").mkdir()
    pictures.images[0].save(folder / "train/2/deeper/9.png")
    (folder / "train/empty").mkdir()
    for hidden in ("2/._0.jpg", ".thumbnails/0.jpg", "2/.ipynb_checkpoints/0.jpg", "__MACOSX/2/0.jpg"):
        (folder / "train" / hidden).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / hidden).write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        dataset = load("imagefolder", data_dir=folder)
    assert "1 images are in no class folder, left out, first: loose.png" in caplog.text
    assert "1 file without the suffix of an image, first: 2/notes.txt" in caplog.text
    assert "class folders without an image: empty." in caplog.text and "thumbnails" not in caplog.text
    assert column(dataset["train"], "label").tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("train", "val"), [("Train", "VAL"), ("train", "Validation"), ("TRAINING", "dev")])
def test_split_folders_with_capitals(folder, load, train, val):
    """Taken for classes, they would put the test images into training."""
    (folder / "train").rename(folder / train)
    (folder / "val").rename(folder / val)
    dataset = load("imagefolder", data_dir=folder)
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 9, "validation": 3}
    assert dataset["train"].features["label"].names == ["10", "2", "cat, wild"]


def test_folders_beside_train_that_nobody_reads_are_said(folder, load, caplog):
    (folder / "val").rename(folder / "holdout")
    with caplog.at_level(logging.WARNING):
        assert list(load("imagefolder", data_dir=folder)) == ["train"]
    assert "folders beside `train` that are no split, left out: holdout. Name them by `splits`" in caplog.text


@pytest.mark.parametrize("name", ["test", "Val", "VALIDATION"])
def test_evaluation_folder_without_train_is_no_class(folder, load, name):
    (folder / "val").rename(folder / name)
    (folder / "train").rename(folder / "mine")
    with pytest.raises(
        ValueError, match=f"`{name}` without a folder `train`: .* Name the training folder by `splits`"
    ):
        load("imagefolder", data_dir=folder)
    dataset = load("imagefolder", data_dir=folder, splits={"train": "mine", "test": name})
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 9, "test": 3}
    names = load("imagefolder", data_dir=folder, splits={"train": "."})["train"].features["label"].names
    assert names == sorted(["mine", name])


def test_image_folder_by_named_splits(folder, load, caplog):
    (folder / "train").rename(folder / "part a")
    splits = {"train": "part a", "test": "val"}
    for dataset in (load("imagefolder", data_dir=folder, splits=splits), load(str(folder), splits=splits)):
        assert {split: len(rows) for split, rows in dataset.items()} == {"train": 9, "test": 3}
        assert dataset["train"].features["label"].names == ["10", "2", "cat, wild"]
    with pytest.raises(FileNotFoundError, match="names the folder train, but .* has part a, val"):
        load("imagefolder", data_dir=folder, splits={"train": "train"})
    with pytest.raises(ValueError, match="No folder for `train` among test"):
        load("imagefolder", data_dir=folder, splits={"test": "val"})


def test_image_folder_with_another_class_in_validation(folder, load):
    (folder / "val/2").rename(folder / "val/1")
    with pytest.raises(ValueError, match="val/1/0.jpg: label '1' of validation is none of the 3 classes: 10, 2, cat"):
        load("imagefolder", data_dir=folder)


def test_image_folder_with_a_table(folder, load, caplog):
    rows = [("10/0.jpg", "b", "b"), ("2/1.jpg", "a", "b"), ("cat, wild/2.jpg", "a", "")]
    write_table(folder / "train/metadata.csv", ["file_name", "label", "clean_label"], rows)
    write_table(folder / "val/metadata.jsonl", ["file_name", "label"], [(f"{n}/0.jpg", "a") for n in ("10", "2")])
    with caplog.at_level(logging.WARNING):
        dataset = load("imagefolder", data_dir=folder)
    assert "6 images without a row in metadata.csv, left out" in caplog.text
    assert column(dataset["train"], "label").tolist() == [1, 0, 0]
    assert column(dataset["train"], "clean_label").tolist() == [1, 1, -1]
    assert dataset["train"][2]["image"].size == (28, 28)
    write_table(folder / "train/metadata.csv", ["file_name", "label"], [("10/0.jpg", ""), ("2/1.jpg", "a")])
    with pytest.raises(ValueError, match="metadata.csv:2: the label is missing"):
        load("imagefolder", data_dir=folder)
    write_table(folder / "train/metadata.csv", ["file_name", "label"], [("10/0.jpg", "a"), ("10/none.jpg", "a")])
    with pytest.raises(ValueError, match="metadata.csv:3: no such image"):
        load("imagefolder", data_dir=folder)


def test_image_folder_without_images(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="No image in a class folder below"):
        load("imagefolder", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load("imagefolder", data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`imagefolder` needs `data_dir`"):
        load("imagefolder")


def test_names_that_lead_nowhere(load, tmp_path):
    with pytest.raises(ConnectionError, match="'some/thing' is no dataset name .* no local file .* Hub could not be"):
        load("some/thing")
    with pytest.raises(FileNotFoundError, match="cannot be the id of a Hub dataset"):
        load(str(tmp_path / "nowhere"))


def test_real_subset_by_columns(shared_data, load):
    dataset = load(str(shared_data / "cifar10n-tiny"), label_column="worse_label", clean_label_column="label")
    labels, clean_labels = column(dataset["train"], "label"), column(dataset["train"], "clean_label")
    assert np.mean(labels != clean_labels) == pytest.approx(0.406)
    assert column(dataset["train"], "index").max() > 10_000
    assert np.array_equal(column(dataset["test"], "label"), column(dataset["test"], "clean_label"))


def test_hub_dataset(load, monkeypatch, pictures):
    """The id, the config and the cache reach `load_dataset`; what comes back gets the common features."""
    features = Features({"img": Image(), "fine_label": ClassLabel(names=["x", "cra"]), "coarse_label": Value("int64")})
    content = {"img": pictures.images[:3], "fine_label": [1, 0, 1], "coarse_label": [0, 0, 0]}
    rows = Dataset.from_dict(content, features=features)
    asked = []

    def load_dataset(name, config, *, cache_dir):
        asked.append((name, config))
        return DatasetDict({"train": rows, "valid": rows, "other": rows})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    dataset = load("some/thing", config="plain_text")
    assert asked == [("some/thing", "plain_text")]
    assert list(dataset) == ["train", "validation"]
    assert dataset["train"].features["label"].names == ["x", "cra"]
    assert column(dataset["train"], "label").tolist() == [1, 0, 1]
    assert np.array_equal(np.asarray(dataset["train"][1]["image"]), np.asarray(pictures.images[1]))


def test_hub_dataset_that_does_not_exist(load, monkeypatch):
    def load_dataset(*args, **options):
        raise DatasetNotFoundError("Dataset 'some/thing' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="no dataset name .* the Hub has no such dataset .* doesn't exist"):
        load("some/thing")
