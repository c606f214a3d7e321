"""Paths of images as people's tables have them: with backslashes, absolute, with every suffix that Pillow reads."""

import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError
from PIL import Image
from tables import write_table

from hnml_hf import TimmCAMForImageClassification
from hnml_hf.data.files import image_suffixes, is_image
from hnml_hf.data.schema import column


def paths_of(dataset):
    return [cell["path"] for cell in dataset.data.column("image").to_pylist()]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_backslashes_of_windows(images, load, suffix):
    root, names = images
    (root / "img/0.jpg").rename(root / "img" / "back\\slash.jpg")  # which Linux allows
    rows = [("img\\1.jpg", "a"), (".\\img\\2.jpg", "b"), ("img/back\\slash.jpg", "a")]
    write_table(root / f"train{suffix}", ["image", "label"], rows)
    dataset = load(str(root))["train"]
    assert paths_of(dataset) == [f"{root}/img/1.jpg", f"{root}/./img/2.jpg", f"{root}/img/back\\slash.jpg"]
    assert dataset[1]["image"].size == (28, 28)


def test_backslashes_of_a_saved_dataset(images, load, tmp_path):
    root, _ = images
    features = Features({"image": Value("string"), "label": Value("string")})
    rows = Dataset.from_dict({"image": ["img\\1.jpg", "img/2.jpg"], "label": ["a", "b"]}, features=features)
    rows.save_to_disk(tmp_path / "saved")
    dataset = load(str(tmp_path / "saved"), data_dir=root)["train"]
    assert paths_of(dataset) == [f"{root}/img/1.jpg", f"{root}/img/2.jpg"]


@pytest.mark.parametrize("path", ["..\\data\\img\\1.jpg", "img\\..\\..\\x.jpg"])
def test_backslashes_that_lead_out_are_refused(images, load, path):
    root, _ = images
    write_table(root / "train.csv", ["image", "label"], [(path, "a")])
    with pytest.raises(ValueError, match=r"train.csv:2: the path .* is not a relative path inside the data folder"):
        load(str(root))


def test_an_absolute_path_says_what_would_make_it_work(images, load, tmp_path):
    root, names = images
    table = tmp_path / "tables" / "train.csv"
    table.parent.mkdir()
    write_table(table, ["image", "label"], [(f"{root}/{names[0]}", "a"), (f"{root}/{names[1]}", "b")])
    advice = rf"inside the data folder {table.parent}: it is absolute.* as `--data_dir {root}/img`"
    with pytest.raises(ValueError, match=advice):
        load(str(table))
    assert paths_of(load(str(table), data_dir=root / "img")["train"]) == [f"{root}/{name}" for name in names[:2]]
    write_table(table, ["image", "label"], [("C:\\photos\\0.jpg", "a")])
    with pytest.raises(ValueError, match="it is absolute, and lies elsewhere. Write it relative to that folder"):
        load(str(table))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ""])
def test_the_folder_that_is_advised_is_above_the_images_of_all_classes(suffix, load, tmp_path):
    images = [f"{tmp_path}/photos/{name}" for name in ("cat/deep/0.png", "cat/1.png", "dog/2.png")]
    rows = {"image": images, "label": ["cat", "cat", "dog"]}
    table = str(tmp_path / "tables" / f"train{suffix}")
    for path in images:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    if suffix:
        os.mkdir(tmp_path / "tables")
        write_table(Path(table), [*rows], [*zip(*rows.values(), strict=True)])
    else:
        Dataset.from_dict(rows).save_to_disk(table)
    with pytest.raises(ValueError, match=rf"as `--data_dir {tmp_path}/photos`"):
        load(table)
    assert paths_of(load(table, data_dir=tmp_path / "photos")["train"]) == images


def test_images_of_several_tables_lead_to_a_folder_above_all_of_them(load, tmp_path):
    for split in ("train", "test"):
        for name in ("a/0.png", "b/1.png"):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(path)
        (tmp_path / "tables").mkdir(exist_ok=True)
        rows = [(f"{tmp_path}/{split}/{name}", name[0]) for name in ("a/0.png", "b/1.png")]
        write_table(tmp_path / "tables" / f"{split}.csv", ["image", "label"], rows)
    with pytest.raises(ValueError, match=rf"as `--data_dir {tmp_path}/train`"):
        load(str(tmp_path / "tables"))
    with pytest.raises(ValueError, match=rf"as `--data_dir {tmp_path}`"):
        load(str(tmp_path / "tables"), data_dir=tmp_path / "train")
    assert len(load(str(tmp_path / "tables"), data_dir=tmp_path)["test"]) == 2


def test_no_folder_is_advised_where_other_paths_are_relative(images, load, tmp_path):
    root, names = images
    (tmp_path / "other").mkdir()
    write_table(root / "train.csv", ["image", "label"], [(names[0], "a"), (f"{tmp_path}/other/0.png", "b")])
    with pytest.raises(ValueError, match=r"train.csv:3: .*lies elsewhere. Other paths are relative: write all"):
        load(str(root))


def test_absolute_paths_below_the_root_of_the_system_and_with_two_slashes(images, load):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(f"{root}//{names[0]}", "a"), (f"{root}/{names[1]}", "b")])
    assert paths_of(load(str(root))["train"]) == [f"{root}/{name}" for name in names[:2]]
    for place in ("/", f"{root}/"):
        found = paths_of(load(str(root / "train.csv"), data_dir=place)["train"])
        assert [path.replace("//", "/") for path in found] == [f"{root}/{name}" for name in names[:2]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_that_names_other_machines(images, load, suffix):
    root, _ = images
    write_table(root / f"train{suffix}", ["image", "label"], [("https://127.0.0.1/0.jpg", "a")])
    with pytest.raises(ValueError, match=r"train.*:\d: the path 'https.*' is remote. Download the images first"):
        load(str(root))


@pytest.mark.parametrize("struct", [True, False])
def test_a_row_without_an_image_is_named(tmp_path, load, struct):
    cells = [{"bytes": b"x", "path": None}, {"bytes": None, "path": None}] if struct else [b"x", None]
    pq.write_table(pa.table({"image": cells, "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train.parquet:2: the image is missing"):
        load(str(tmp_path))


def test_suffixes_are_those_that_pillow_decodes(folder, load, pictures, caplog):
    assert {".jpg", ".jfif", ".jpe", ".tif", ".webp", ".avif", ".ppm", ".ico", ".tga", ".jp2"} <= image_suffixes()
    assert not {".eps", ".ps", ".wmf", ".h5", ".mpg", ".pdf", ".txt", ".csv", ""} & image_suffixes()
    assert is_image("a.b.JFIF") and not is_image("jfif")
    (folder / "train/10/0.jpg").rename(folder / "train/10/0.JFIF")
    pictures.images[0].convert("RGB").save(folder / "train/2/9.tga")
    with caplog.at_level(logging.WARNING):
        dataset = load("imagefolder", data_dir=folder)["train"]
    assert "without the suffix of an image" not in caplog.text
    assert column(dataset, "label").tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert dataset[0]["image"].size == dataset[6]["image"].size == (28, 28)


def test_a_split_without_labels_says_how_to_leave_it_out(images, load):
    root, names = images
    write_table(root / "train.csv", ["image", "label"], [(names[0], "a"), (names[1], "b")])
    write_table(root / "test.csv", ["image"], [(names[2],)])
    with pytest.raises(ValueError, match="test.csv:1: no label column .*leave a split without labels out by `splits`"):
        load(str(root))
    write_table(root / "test.csv", ["image", "label"], [(names[2], "")])
    with pytest.raises(ValueError, match="test.csv:2: the label is missing.*not known is left out by `splits`"):
        load(str(root))
    assert list(load(str(root), splits={"train": "train.csv"})) == ["train"]


def test_the_hub_that_does_not_answer_is_asked_once(load, monkeypatch, caplog):
    """And what the cache has is used without asking again."""
    asked = []

    def refused(self, name, *, repo_type, timeout):
        asked.append((name, repo_type))
        raise HTTPError("Connection refused")

    def load_dataset(name, *args, **options):
        assert constants.HF_HUB_OFFLINE
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refused)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match="no local file or folder, and the Hub could not be reached"):
        load("some/thing")
    with pytest.raises(OSError, match="connect to .* to load the files|some/model"):
        TimmCAMForImageClassification.from_pretrained("some/model")
    assert asked == [("some/thing", "dataset"), ("some/model", "model")]
    assert constants.HF_HUB_OFFLINE is False
