import io

import numpy as np
import pytest

from hnml_hf.data.published.animal10n import CLASSES, Animal10N
from hnml_hf.data.schema import column


def test_binary_form(animal10n, prepare):
    dataset = prepare(Animal10N, animal10n.root / "binary", partial=True)
    assert column(dataset["train"], "label").tolist() == [i % 10 for i in range(50)]
    assert set(column(dataset["train"], "clean_label")) == {-1}
    assert column(dataset["test"], "clean_label").tolist() == [i % 10 for i in range(20)]
    assert column(dataset["train"], "index").tolist() == list(range(50))
    for row in (0, 7, 49):
        assert np.array_equal(np.asarray(dataset["train"][row]["image"]), animal10n.pixels["train"][row])
    assert dataset["train"].features["label"].names == CLASSES


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_folder_forms(animal10n, prepare, form):
    dataset = prepare(Animal10N, animal10n.root / form, partial=True)
    paths = [cell["path"] for cell in dataset["train"].data.column("image").to_pylist()]
    assert paths == sorted(paths) and len(paths) == 50
    expected = [int(path.split("/")[-1 if form == "flat" else -2][0]) for path in paths]
    assert column(dataset["train"], "label").tolist() == expected == sorted(expected)
    assert len(dataset["test"]) == 20
    assert dataset["train"][0]["image"].size == (64, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-1], "not a whole number of records of 12,296 bytes"),
        (lambda b: b"", "0 bytes are not a whole number"),
        (lambda b: b[:4] + b"\x01\x00\x00\x00" + b[8:], "record 0: label 16777216 is out of range.*big-endian"),
        (lambda b: b[:12296] + b[12296:12303] + b"\x0a" + b[12304:], "record 1: label 10 is out of range"),
    ],
)
def test_bad_binary_files(animal10n, copy_of, prepare, change, message):
    root = copy_of(animal10n.root / "binary")
    path = root / "data_batch_1.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"data_batch_1.bin: .*{message}"):
        prepare(Animal10N, root, partial=True)


@pytest.mark.parametrize(
    ("name", "message"), [("cat_1.jpg", "cat_1.jpg: expected"), ("10_1.jpg", "10_1.jpg: expected")]
)
def test_bad_file_names(animal10n, copy_of, prepare, name, message):
    root = copy_of(animal10n.root / "flat")
    (root / "training" / "0_1000.jpg").rename(root / "training" / name)
    with pytest.raises(ValueError, match=message):
        prepare(Animal10N, root, partial=True)


def test_bad_folders(animal10n, copy_of, prepare):
    root = copy_of(animal10n.root / "nested")
    (root / "train/3").rename(root / "train/wolf")
    with pytest.raises(ValueError, match="train/wolf: expected folders named by the label"):
        prepare(Animal10N, root, partial=True)
    (root / "train/wolf").rename(root / "train/3")
    (root / "train/3_7.jpg").write_bytes(io.BytesIO(b"x").getvalue())
    with pytest.raises(ValueError, match="holds both images and folders"):
        prepare(Animal10N, root, partial=True)


def test_a_new_file_is_seen(animal10n, copy_of, prepare):
    root = copy_of(animal10n.root / "nested")
    for hidden in ("3/._1003.jpg", "__MACOSX/0.jpg"):  # what macOS leaves behind
        (root / "train" / hidden).parent.mkdir(exist_ok=True)
        (root / "train" / hidden).write_bytes(b"no image")
    assert len(prepare(Animal10N, root, partial=True)["train"]) == 50
    (root / "train/3/1003.jpg").unlink()
    assert len(prepare(Animal10N, root, partial=True)["train"]) == 49


def test_sizes_and_missing_folder(animal10n, prepare, tmp_path):
    with pytest.raises(ValueError, match="found 50 rows, the published size is 50,000"):
        prepare(Animal10N, animal10n.root / "binary")
    with pytest.raises(FileNotFoundError, match="(?s)No ANIMAL-10N train data.*data_batch_1.bin.*dm.kaist.ac.kr"):
        prepare(Animal10N, tmp_path)
