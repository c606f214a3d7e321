import logging

import pytest

from hnml_hf.data.published.food101n import ABSENT, SIZES, VERIFIED_SIZES, Food101N
from hnml_hf.data.schema import column


def paths(dataset):
    return ["/".join(cell["path"].split("/")[-2:]) for cell in dataset.data.column("image").to_pylist()]


def test_labels_start_at_zero_below_the_header(food101n, prepare):
    dataset = prepare(Food101N, food101n.root, partial=True)
    assert dataset["train"].features["label"].names == food101n.classes
    assert paths(dataset["train"]) == food101n.names
    assert column(dataset["train"], "label").tolist() == [i // 5 for i in range(15)]
    assert column(dataset["train"], "index").tolist() == list(range(15))
    assert dataset["train"].column_names == ["image", "label", "clean_label", "index"]


def test_clean_label_is_known_where_the_label_was_verified_as_right(food101n, prepare):
    dataset = prepare(Food101N, food101n.root, partial=True, verification=True)
    right = {name for name, value in food101n.verified.items() if value == 1}
    expected = [i // 5 if name in right else -1 for i, name in enumerate(food101n.names)]
    assert column(dataset["train"], "clean_label").tolist() == expected
    verification = [food101n.verified.get(name, -1) for name in food101n.names]
    assert column(dataset["train"], "verification").tolist() == verification
    assert sorted(set(verification)) == [-1, 0, 1]
    assert set(column(dataset["test"], "verification")) == {-1}


def test_test_split_is_that_of_food101(food101n, prepare, caplog):
    dataset = prepare(Food101N, food101n.root, partial=True)["test"]
    assert paths(dataset) == [f"{name}.jpg" for name in food101n.test]
    assert column(dataset, "label").tolist() == column(dataset, "clean_label").tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset[0]["image"].size == (28, 28)


def test_food101_elsewhere_or_absent(food101n, copy_of, prepare, tmp_path):
    root = copy_of(food101n.root)
    assert set(prepare(Food101N, root, partial=True)) == {"train"}
    elsewhere = str(food101n.parent / "food-101")
    assert len(prepare(Food101N, root, partial=True, food101_dir=elsewhere)["test"]) == 6
    with pytest.raises(FileNotFoundError, match="meta/test.txt"):
        prepare(Food101N, root, partial=True, food101_dir=str(tmp_path / "nowhere"))


def test_only_the_known_absent_file_is_tolerated(food101n, copy_of, prepare, caplog):
    """The release verifies one image that does not exist; the fixture has that line."""
    root = copy_of(food101n.root)
    path = root / "meta/verified_train.tsv"
    assert ABSENT in path.read_text()
    prepare(Food101N, root, partial=True)
    path.write_text(path.read_text() + "apple_pie/" + "f" * 32 + ".jpg\t1\n")
    with pytest.raises(ValueError, match=r"verified_train.tsv:7: apple_pie/f+.jpg is not in imagelist.tsv"):
        prepare(Food101N, root, partial=True)
    assert len(prepare(Food101N, root, partial=True, on_missing="skip")["train"]) == 15


def test_known_absent_file_in_the_image_list(food101n, copy_of, prepare, caplog):
    root = copy_of(food101n.root)
    path = root / "meta/imagelist.tsv"
    path.write_text(path.read_text().replace("class_name/key\n", f"class_name/key\n{ABSENT}\n"))
    image = root / "images" / food101n.names[2]
    image.rename(image.with_suffix(".away"))
    with pytest.raises(ValueError, match=r"imagelist.tsv:5: no such image .*: 1 of 15 rows"):
        prepare(Food101N, root, partial=True)
    image.with_suffix(".away").rename(image)
    with caplog.at_level(logging.WARNING):
        dataset = prepare(Food101N, root, partial=True)["train"]
    assert "known to be absent" in caplog.text
    assert column(dataset, "index").tolist() == list(range(1, 16))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("classes.txt", "class_name\n", "", r"classes.txt:1: expected the header 'class_name', got 'apple_pie'"),
        ("classes.txt", "filet_mignon", "apple_pie", r"classes.txt:3: the class 'apple_pie' is listed twice"),
        ("imagelist.tsv", "class_name/key\n", "", r"imagelist.tsv:1: expected the header"),
        ("imagelist.tsv", "key\napple_pie", "key\npizza", r"imagelist.tsv:2: the folder of 'pizza/"),
        ("imagelist.tsv", "key\napple_pie", "key\n../apple_pie", r"imagelist.tsv:2: the path"),
        ("verified_val.tsv", "\t1", "\t2", r"verified_val.tsv:2: verification label 2 is out of range"),
        ("verified_val.tsv", ".jpg\t1", ".jpg 1", r"verified_val.tsv:2: no verification label after a tab"),
        ("verified_val.tsv", "\tverification_label", "", r"verified_val.tsv:1: expected the header"),
    ],
)
def test_bad_lines(food101n, copy_of, prepare, file, old, new, message):
    path = copy_of(food101n.root) / "meta" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        prepare(Food101N, path.parents[1], partial=True)


def test_contradicting_verifications(food101n, copy_of, prepare):
    root = copy_of(food101n.root)
    with open(root / "meta/verified_val.tsv", "a") as file:
        file.write(f"{food101n.names[0]}\t0\n")
    with pytest.raises(ValueError, match=r"verified_val.tsv:3: .* was verified as 1 and as 0"):
        prepare(Food101N, root, partial=True)


def test_food101_with_other_classes(food101n, tmp_path, prepare):
    meta = tmp_path / "food-101/meta"
    meta.mkdir(parents=True)
    (meta / "classes.txt").write_text("apple_pie\nfilet_mignon\npizza\n")
    (meta / "test.txt").write_text("apple_pie/1\n")
    with pytest.raises(
        ValueError, match="classes.txt:3: the classes differ from those of Food-101N: hot_and_sour_soup, pizza"
    ):
        prepare(Food101N, food101n.root, partial=True, food101_dir=str(tmp_path / "food-101"))


def test_sizes_and_missing_folder(food101n, prepare, tmp_path):
    with pytest.raises(ValueError, match="classes.txt: classes: found 3 rows, the published size is 101"):
        prepare(Food101N, food101n.root)
    with pytest.raises(FileNotFoundError, match="(?s)meta/classes.txt.*kuanghuei.github.io"):
        prepare(Food101N, tmp_path)
    assert SIZES == {"train": 310_009, "test": 25_250}
    assert sum(VERIFIED_SIZES.values()) == 57_609
