import logging
import os

import numpy as np
import pytest

from hnml_hf import load_noisy_dataset
from hnml_hf.data.published.webvision import SIZES, WebVision
from hnml_hf.data.schema import column


def names(dataset):
    return ["/".join(cell["path"].split("/")[-3:]) for cell in dataset.data.column("image").to_pylist()]


@pytest.mark.parametrize("part", ["all", "google", "flickr"])
def test_parts_and_labels(webvision, prepare, part):
    dataset = prepare(WebVision, webvision.root, part, partial=True)
    assert names(dataset["train"]) == [name for name, _ in webvision.lists[part]]
    assert column(dataset["train"], "label").tolist() == [label for _, label in webvision.lists[part]]
    assert set(column(dataset["train"], "clean_label")) == {-1}
    assert column(dataset["train"], "index").tolist() == list(range(len(webvision.lists[part])))
    assert set(dataset) == {"train", "test"}
    assert column(dataset["test"], "label").tolist() == [label for _, label in webvision.val]
    assert np.array_equal(column(dataset["test"], "clean_label"), column(dataset["test"], "label"))


def test_class_names_are_those_of_the_synsets_in_their_order(webvision, prepare):
    classes = prepare(WebVision, webvision.root, partial=True)["train"].features["label"].names
    assert classes[0] == "thing 0, other name 0"
    assert (classes[7], classes[55]) == (f"crane ({webvision.wnids[7]})", f"crane ({webvision.wnids[55]})")


def test_mini_keeps_google_and_the_first_fifty_classes(webvision, prepare):
    dataset = prepare(WebVision, webvision.root, "mini", partial=True)
    kept = [(row, name, label) for row, (name, label) in enumerate(webvision.lists["google"]) if label < 50]
    assert names(dataset["train"]) == [name for _, name, _ in kept]
    assert column(dataset["train"], "index").tolist() == [row for row, _, _ in kept]
    assert column(dataset["train"], "index").max() > len(kept)  # ids of the whole list, not row numbers
    assert dataset["train"].features["label"].num_classes == 50
    assert column(dataset["test"], "label").max() == 49
    assert SIZES["mini"] == 65_944


def test_images_open_whatever_their_suffix_says(webvision, prepare):
    dataset = prepare(WebVision, webvision.root, "google", partial=True)["train"]
    images = [dataset[i]["image"] for i in range(6)]
    assert {image.format for image in images} == {"JPEG", "PNG"}
    assert {image.mode for image in images} == {"RGB", "L"}


@pytest.mark.parametrize("config", ["google", "mini"])
def test_imagenet_val_in_three_layouts(webvision, imagenet, tmp_path, config):
    dataset = load_noisy_dataset(
        "webvision",
        config=config,
        data_dir=webvision.root,
        partial=True,
        builder_options={"imagenet_dir": str(imagenet.root)},
        cache_dir=str(tmp_path / "cache"),
    )["imagenet_val"]
    num_classes = 50 if config == "mini" else 60
    found = [os.path.basename(cell["path"]) for cell in dataset.data.column("image").to_pylist()]
    labels = column(dataset, "label").tolist()
    assert dict(zip(found, labels, strict=True)) == {n: y for n, y in imagenet.truth.items() if y < num_classes}
    assert column(dataset, "clean_label").tolist() == labels
    assert dataset.features["label"].num_classes == num_classes
    assert dataset[0]["image"].size == (28, 28)


def test_imagenet_of_a_strange_layout(webvision, tmp_path, prepare):
    (tmp_path / "in/val/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="must be wnids of info/synsets.txt or WebVision labels, got cat"):
        prepare(WebVision, webvision.root, partial=True, imagenet_dir=str(tmp_path / "in"))
    with pytest.raises(FileNotFoundError, match="`imagenet_dir` .* has no folder `val`"):
        prepare(WebVision, webvision.root, partial=True, imagenet_dir=str(tmp_path))


def test_numbers_of_the_devkit_are_noticed(webvision, tmp_path, prepare):
    """ILSVRC2012_ID counts from 1 to the number of classes: the last one is no label."""
    (tmp_path / "in/val").mkdir(parents=True)
    (tmp_path / "in/imagenet_val.txt").write_text("a.JPEG 1\nb.JPEG 60\n")
    with pytest.raises(ValueError, match=r"imagenet_val.txt:2: label 60 is out of range"):
        prepare(WebVision, webvision.root, partial=True, imagenet_dir=str(tmp_path / "in"))


def test_map_that_counts_from_one_proves_the_labels(webvision, copy_of, prepare):
    """A list whose labels count from 1 too is the classical mistake: refused in its first line."""
    root = copy_of(webvision.root)
    path = root / "info/train_filelist_google.txt"
    shifted = [f"{name} {(label + 1) % 60}" for name, label in webvision.lists["google"]]
    path.write_text("\n".join(shifted) + "\n")
    with pytest.raises(ValueError, match=r"google.txt:1: label 1, but query 1 belongs to label 0"):
        prepare(WebVision, root, "google", partial=True)
    (root / "info/queries_synsets_map.txt").unlink()
    assert column(prepare(WebVision, root, "google", partial=True)["train"], "label")[0] == 1


def test_rows_outside_of_query_folders_are_counted(webvision, copy_of, prepare, caplog):
    root = copy_of(webvision.root)
    os.rename(root / "google/q0001", root / "google/first")
    path = root / "info/train_filelist_google.txt"
    path.write_text(path.read_text().replace("q0001", "first"))
    with caplog.at_level(logging.WARNING):
        prepare(WebVision, root, "google", partial=True)
    assert "2 rows are in no query folder" in caplog.text


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (
            "info/train_filelist_google.txt",
            "google/q0001/x.jpg 60",
            r"google.txt:1: label 60 is out of range, .* 0..59",
        ),
        ("info/train_filelist_google.txt", "google/q0001/x.jpg", r"google.txt:1: no label after"),
        ("info/train_filelist_google.txt", "google/../q0001/x.jpg 0", r"google.txt:1: the path"),
        ("info/synsets.txt", "tench, Tinca tinca", r"synsets.txt:1: expected `n01440764"),
        ("info/synsets.txt", "n01440764", r"synsets.txt:1: expected `n01440764"),
        ("info/queries_synsets_map.txt", "1 0", r"map.txt:1: synset 0 is out of range, expected 1..60"),
        ("info/queries_synsets_map.txt", "1 2 3", r"map.txt:1: expected `query synset`"),
        ("info/val_filelist.txt", "val/0.jpg x", r"val_filelist.txt:1: label must be an integer"),
    ],
)
def test_bad_lines(webvision, copy_of, prepare, file, line, message):
    root = copy_of(webvision.root)
    text = (root / file).read_text().splitlines(True)
    (root / file).write_text("".join([line + "\n", *text[1:]]))
    with pytest.raises(ValueError, match=message):
        prepare(WebVision, root, "google", partial=True)


def test_synset_twice(webvision, copy_of, prepare):
    root = copy_of(webvision.root)
    with open(root / "info/synsets.txt", "a") as file:
        file.write(f"{webvision.wnids[3]} again\n")
    with pytest.raises(ValueError, match=r"synsets.txt:61: the synset .* is listed twice"):
        prepare(WebVision, root, partial=True)


def test_missing_image_by_policy(webvision, copy_of, prepare, caplog):
    root = copy_of(webvision.root)
    (root / webvision.lists["google"][4][0]).unlink()
    with pytest.raises(ValueError, match=r"google.txt:5: no such image below"):
        prepare(WebVision, root, "google", partial=True)
    with caplog.at_level(logging.WARNING):
        dataset = prepare(WebVision, root, "google", partial=True, on_missing="skip")["train"]
    assert "1 of 130 rows" in caplog.text
    assert 4 not in column(dataset, "index") and len(dataset) == 129


def test_number_of_classes_fits_the_release(webvision, prepare):
    with pytest.raises(ValueError, match="WebVision 1.0: found 60 rows, the published size is 1,000"):
        prepare(WebVision, webvision.root)
    with pytest.raises(ValueError, match="WebVision 2.0: found 60 rows, the published size is 5,000"):
        prepare(WebVision, webvision.root, release="2.0")
    with pytest.raises(ValueError, match="`release` must be one of 1.0, 2.0"):
        prepare(WebVision, webvision.root, release="3.0", partial=True)


def test_release_two_has_five_digit_queries(webvision, copy_of, prepare, monkeypatch):
    monkeypatch.setattr("hnml_hf.data.published.webvision.NUM_SYNSETS", {"1.0": 1_000, "2.0": 60})
    root = copy_of(webvision.root)
    for folder in (root / "google").iterdir():
        folder.rename(folder.with_name(folder.name.replace("q", "q0")))
    path = root / "info/train_filelist_google.txt"
    path.write_text(path.read_text().replace("/q", "/q0"))
    dataset = prepare(WebVision, root, "google", release="2.0")["train"]
    assert column(dataset, "label").tolist() == [label for _, label in webvision.lists["google"]]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)info/synsets.txt.*data.vision.ee.ethz.ch"):
        WebVision(data_dir=str(tmp_path), cache_dir=str(tmp_path))
