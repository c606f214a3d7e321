import logging

import numpy as np
import pytest

from hnml_hf.data import DATASET_NAMES, load_noisy_dataset
from hnml_hf.data.quickstart import CLASSES
from hnml_hf.data.schema import class_balanced, column, missing_files, parse_integer, parse_path, read_lines


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    return load_noisy_dataset("quickstart", cache_dir=tmp_path_factory.mktemp("cache"))


def test_quickstart_is_balanced_clean_and_keeps_the_official_ids(quickstart):
    assert {split: len(rows) for split, rows in quickstart.items()} == {"train": 4_000, "test": 1_000}
    for split, each in (("train", 400), ("test", 100)):
        labels = column(quickstart[split], "label")
        assert np.bincount(labels).tolist() == [each] * 10
        assert np.array_equal(labels, column(quickstart[split], "clean_label"))
        index = column(quickstart[split], "index")
        assert (np.diff(index) > 0).all() and index[-1] > len(index)
    assert quickstart["train"].features["label"].names == CLASSES
    assert quickstart["train"][0]["image"].size == (28, 28)
    assert quickstart["train"].info.license == "MIT"


def test_quickstart_is_the_official_data(quickstart, shared_data):
    import pyarrow.parquet as pq

    with pq.ParquetFile(shared_data / "fashion_mnist" / "train.parquet") as file:
        official = file.read(columns=["label"])["label"].to_numpy()
    index = column(quickstart["train"], "index")
    assert np.array_equal(official[index], column(quickstart["train"], "label"))


def test_known_names_refuse_column_options(tmp_path):
    with pytest.raises(ValueError, match="`quickstart` has fixed columns: `label_column`"):
        load_noisy_dataset("quickstart", label_column="x", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="`mini-webvision` has no configs"):
        load_noisy_dataset("mini-webvision", config="all", data_dir=tmp_path)
    with pytest.raises(ValueError, match="`partial` is for known data sets .quickstart, clothing1m"):
        load_noisy_dataset(str(tmp_path), partial=True)
    assert {"clothing1m", "webvision", "mini-webvision", "cifar10n-worse", "cifar100n", "food101n"} < set(
        DATASET_NAMES
    )


def test_class_balanced_by_hand(quickstart):
    train = quickstart["train"].filter(lambda label: label != 3, input_columns="label")
    train = train.select([i for i, label in enumerate(column(train, "label")) if label != 5 or i % 40 == 0])
    drawn = class_balanced(train, per_class=50, seed=1)
    counts = np.bincount(column(drawn, "label"), minlength=10)
    few = int((column(train, "label") == 5).sum())
    assert counts.tolist() == [50, 50, 50, 0, 50, few, 50, 50, 50, 50] and few < 50
    index = column(drawn, "index")
    assert len(set(index)) == len(index) and set(index) <= set(column(train, "index"))
    assert (np.diff(index) > 0).all()  # the stored order is kept
    again = class_balanced(train, per_class=50, seed=1)
    other = class_balanced(train, per_class=50, seed=2)
    assert column(again, "index").tolist() == index.tolist() != column(other, "index").tolist()


def test_class_balanced_warns_and_refuses(quickstart, caplog):
    train = quickstart["train"]
    assert len(class_balanced(train, 99)) == 90
    with caplog.at_level(logging.WARNING):
        assert len(class_balanced(train, per_class=401)) == 4_000
    assert "T-shirt/top (400)" in caplog.text
    for options in ({}, {"num_samples": 10, "per_class": 1}):
        with pytest.raises(ValueError, match="either `num_samples` or `per_class`"):
            class_balanced(train, **options)
    with pytest.raises(ValueError, match="at least one row for each of the 10 classes"):
        class_balanced(train, 9)


def test_class_balanced_as_an_option_of_the_loader(tmp_path):
    dataset = load_noisy_dataset("quickstart", class_balanced_samples=100, seed=3, cache_dir=tmp_path)
    assert np.bincount(column(dataset["train"], "label")).tolist() == [10] * 10
    assert len(dataset["test"]) == 1_000


def test_lines_end_at_line_feeds_only(tmp_path):
    """U+2028, U+0085 and the form feed may be part of a name; `str.splitlines` would cut there."""
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa\u2028b\r\nc\x85d\ne\x0cf \n\n \r\n".encode())
    assert list(read_lines(path)) == [(1, "a\u2028b"), (2, "c\x85d"), (3, "e\x0cf ")]


@pytest.mark.parametrize("text", ["a,b.jpg", "a b.jpg", "ä/ö.jpg", "..a/b..jpg", "a/...jpg", "日本/1.png"])
def test_paths_inside(text):
    assert parse_path(text, "list", 1) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/a",
        "\\a",
        "../a",
        "a/../b",
        "a\\..\\b",
        "a/..",
        "C:/a",
        "c:a",
        "a/",
        ".",
        "a/.",
        "a\x00b",
        "a\tb",
        "\ud800",
    ],
)
def test_paths_outside(text):
    with pytest.raises(ValueError, match="list:7: "):
        parse_path(text, "list", 7)


@pytest.mark.parametrize("text", ["", "+1", "1_0", "1.0", " 1", "0x1", "٣", "9" * 5000, "--1"])
def test_integers_are_plain_digits(text):
    with pytest.raises(ValueError, match="list:7: label must be an integer"):
        parse_integer(text, "list", 7, "label", 0, 10)


def test_missing_files_lists_each_folder_once(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").touch()
    (tmp_path / "a/folder.jpg").mkdir()
    (tmp_path / "2.jpg").touch()
    asked = []
    from hnml_hf.data import schema

    listing = schema.file_names
    monkeypatch.setattr(schema, "file_names", lambda folder: asked.append(folder) or listing(folder))
    names = ["a/1.jpg", "2.jpg", "a/folder.jpg", "a/3.jpg", "b/1.jpg", "a/1.jpg"]
    assert missing_files(str(tmp_path), names).tolist() == [False, False, True, True, True, False]
    assert len(asked) == 3
