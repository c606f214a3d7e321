import logging
import shutil

import numpy as np
import pytest
from datasets import load_dataset

from hnml_hf.data.published.clothing1m import CLASSES, DOUBLE_LABELLED_SIZES, SIZES, Clothing1M, read_key_labels
from hnml_hf.data.schema import column


def names(dataset):
    """The keys of a prepared split, without its images being opened."""
    return [cell["path"].split("/tree/")[-1] for cell in dataset.data.column("image").to_pylist()]


def key_of(path):
    return "/".join(path.split("/")[-4:])


def keys(dataset):
    return [key_of(cell["path"]) for cell in dataset.with_format("arrow")[:]["image"].to_pylist()]


def test_noisy_million_with_clean_evaluation(clothing1m, prepare):
    dataset = prepare(Clothing1M, clothing1m.root, partial=True)
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 140, "validation": 14, "test": 14}
    assert dataset["train"].column_names == ["image", "label", "clean_label", "index"]
    assert dataset["train"].features["label"].names == CLASSES
    assert keys(dataset["train"]) == clothing1m.keys["noisy_train"]
    assert column(dataset["train"], "label").tolist() == [clothing1m.noisy[k] for k in clothing1m.keys["noisy_train"]]
    assert set(column(dataset["train"], "clean_label")) == {-1}
    assert column(dataset["train"], "index").tolist() == list(range(140))
    assert column(dataset["test"], "label").tolist() == [clothing1m.truth[k] for k in clothing1m.keys["clean_test"]]
    assert np.array_equal(column(dataset["test"], "label"), column(dataset["test"], "clean_label"))
    assert {image.mode for image in dataset["train"]["image"]} == {"RGB", "L", "CMYK"}


def test_images_are_stored_as_paths(clothing1m, prepare):
    cell = prepare(Clothing1M, clothing1m.root, partial=True)["train"].data.column("image")[0].as_py()
    assert cell["bytes"] is None and cell["path"].startswith(str(clothing1m.root))


def test_clean_config_trains_on_the_clean_list(clothing1m, prepare):
    dataset = prepare(Clothing1M, clothing1m.root, "clean", partial=True)
    assert keys(dataset["train"]) == clothing1m.keys["clean_train"]
    assert column(dataset["train"], "label").tolist() == [clothing1m.truth[k] for k in clothing1m.keys["clean_train"]]


def test_double_labelled_images_have_both_labels(clothing1m, prepare):
    dataset = prepare(Clothing1M, clothing1m.root, "double_labelled", partial=True)
    for split, part in (("train", "clean_train"), ("validation", "clean_val"), ("test", "clean_test")):
        assert keys(dataset[split]) == clothing1m.double[part]
        assert column(dataset[split], "label").tolist() == [clothing1m.noisy[k] for k in clothing1m.double[part]]
        assert column(dataset[split], "clean_label").tolist() == [clothing1m.truth[k] for k in clothing1m.double[part]]
        positions = [clothing1m.keys[part].index(key) for key in clothing1m.double[part]]
        assert column(dataset[split], "index").tolist() == positions
    assert (column(dataset["train"], "label") != column(dataset["train"], "clean_label")).any()
    assert sum(DOUBLE_LABELLED_SIZES.values()) == 37_497


def test_images_without_the_folder_images(clothing1m, copy_of, prepare):
    root = copy_of(clothing1m.root)
    for folder in (root / "images").iterdir():
        shutil.move(folder, root / folder.name)
    (root / "images").rmdir()
    dataset = prepare(Clothing1M, root, partial=True)
    assert ["images/" + name for name in names(dataset["train"])] == clothing1m.keys["noisy_train"]
    assert dataset["train"][0]["image"].size[0] > 0


def test_lists_with_key_and_label_in_one_file(clothing1m, copy_of, prepare):
    root = copy_of(clothing1m.root)
    (root / "annotations").mkdir()
    for part in SIZES:
        labels = clothing1m.noisy if part == "noisy_train" else clothing1m.truth
        lines = "".join(f"{key} {labels[key]}\n" for key in clothing1m.keys[part])
        (root / "annotations" / f"{part}.txt").write_text(lines)
        (root / f"{part}_key_list.txt").unlink()
    dataset = prepare(Clothing1M, root, partial=True)
    assert column(dataset["train"], "label").tolist() == [clothing1m.noisy[k] for k in clothing1m.keys["noisy_train"]]
    with pytest.raises(FileNotFoundError, match="(?s)clean_train_key_list.txt.*Expected below"):
        (root / "annotations" / "clean_train.txt").unlink()
        prepare(Clothing1M, root, "clean", partial=True)


def test_windows_line_ends_and_byte_order_mark_change_nothing(clothing1m, copy_of, prepare):
    expected = prepare(Clothing1M, clothing1m.root, partial=True)["train"]
    root = copy_of(clothing1m.root)
    for path in root.glob("*.txt"):
        if path.name != "category_names_chn.txt":
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    dataset = prepare(Clothing1M, root, partial=True)["train"]
    assert keys(dataset) == keys(expected)
    assert column(dataset, "label").tolist() == column(expected, "label").tolist()


# datasets leaves the file to pandas, and pandas 2 to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_commas_survive_a_csv(clothing1m, prepare, tmp_path):
    dataset = prepare(Clothing1M, clothing1m.root, partial=True)["train"]
    paths = keys(dataset)
    assert all(path.count(",") == 1 for path in paths)
    dataset.remove_columns("image").add_column("path", paths).to_csv(tmp_path / "rows.csv")
    back = load_dataset("csv", data_files=str(tmp_path / "rows.csv"), split="train", cache_dir=str(tmp_path / "c"))
    assert list(back["path"]) == paths


def edit(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "noisy_label_kv.txt",
            lambda t: t.replace(t.split("\n")[2], t.split("\n")[2].split()[0], 1),
            r"kv.txt:3: no la",
        ),
        (
            "noisy_label_kv.txt",
            lambda t: "images/0/00/1,2.jpg 14\n" + t,
            r"kv.txt:1: label 14 is out of range, .* 0..13",
        ),
        ("noisy_label_kv.txt", lambda t: "images/0/00/1,2.jpg -1\n" + t, r"kv.txt:1: label -1 is out of range"),
        ("noisy_label_kv.txt", lambda t: "images/0/00/1,2.jpg 3.0\n" + t, r"kv.txt:1: label must be an integer"),
        ("noisy_label_kv.txt", lambda t: "images/0/00/1,2.jpg ３\n" + t, r"kv.txt:1: label must be an integer"),
        (
            "noisy_train_key_list.txt",
            lambda t: t + "../../etc/passwd\n",
            r"list.txt:141: the path .* not a relative path",
        ),
        ("noisy_train_key_list.txt", lambda t: "/etc/passwd\n" + t, r"list.txt:1: the path '/etc/passwd'"),
        (
            "noisy_train_key_list.txt",
            lambda t: t + t.split("\n")[4] + "\n",
            r"list.txt:141: .* twice, first in line 5",
        ),
        ("noisy_train_key_list.txt", lambda t: t.replace("\n", "\n\n", 1), r"list.txt:2: blank line"),
        ("noisy_train_key_list.txt", lambda t: "a\0b.jpg\n" + t, r"list.txt:1: control character"),
        ("noisy_train_key_list.txt", lambda t: "", r"list.txt:1: the split 'train' has no rows"),
    ],
)
def test_bad_lines_are_named_by_file_and_line(clothing1m, copy_of, prepare, file, change, message):
    root = copy_of(clothing1m.root)
    edit(root / file, change)
    with pytest.raises(ValueError, match=message):
        prepare(Clothing1M, root, partial=True)


def test_two_labels_for_a_key_are_refused(clothing1m, copy_of, prepare):
    root = copy_of(clothing1m.root)
    key = clothing1m.keys["noisy_train"][0]
    edit(root / "noisy_label_kv.txt", lambda text: text + f"{key} {(clothing1m.noisy[key] + 1) % 14}\n")
    with pytest.raises(ValueError, match=r"noisy_label_kv.txt:\d+: the key .* has the labels"):
        prepare(Clothing1M, root, partial=True)


def test_bytes_that_are_no_text(clothing1m, copy_of, prepare):
    root = copy_of(clothing1m.root)
    path = root / "noisy_label_kv.txt"
    path.write_bytes(path.read_bytes() + b"images/0/00/\xff\xfe.jpg 1\n")
    lines = path.read_bytes().count(b"\n")
    with pytest.raises(ValueError, match=rf"noisy_label_kv.txt:{lines}: not UTF-8"):
        prepare(Clothing1M, root, partial=True)


def test_key_without_label_and_image_without_file_by_policy(clothing1m, copy_of, prepare, caplog):
    root = copy_of(clothing1m.root)
    lost, unlabeled = clothing1m.keys["noisy_train"][3], clothing1m.keys["noisy_train"][9]
    edit(root / "noisy_label_kv.txt", lambda t: "".join(x for x in t.splitlines(True) if unlabeled not in x))
    with pytest.raises(ValueError, match=rf"list.txt:10: keys without a label: 1 of 140 rows, first: {unlabeled}"):
        prepare(Clothing1M, root, partial=True)
    (root / lost).unlink()
    with caplog.at_level(logging.WARNING):
        dataset = prepare(Clothing1M, root, partial=True, on_missing="skip")["train"]
    assert "keys without a label: 1 of 140" in caplog.text and "no such image" in caplog.text
    assert column(dataset, "index").tolist() == [i for i in range(140) if i not in (3, 9)]
    assert column(dataset, "label").tolist() == [clothing1m.noisy[key] for key in keys(dataset)]


def test_image_missing_on_disk_is_an_error(clothing1m, copy_of, prepare):
    root = copy_of(clothing1m.root)
    (root / clothing1m.keys["noisy_train"][3]).unlink()
    with pytest.raises(ValueError, match=r"noisy_train_key_list.txt:4: no such image below .*: 1 of 140 rows"):
        prepare(Clothing1M, root, partial=True)


def test_images_are_looked_up_at_every_load(clothing1m, copy_of, prepare):
    root = copy_of(clothing1m.root)
    assert len(prepare(Clothing1M, root, partial=True)["train"]) == 140
    image = root / clothing1m.keys["noisy_train"][3]
    image.rename(root / "aside")
    with pytest.raises(ValueError, match=r"\(train\) row 3: no such image: 1 of 140 rows"):
        prepare(Clothing1M, root, partial=True)
    assert len(prepare(Clothing1M, root, partial=True, on_missing="skip")["train"]) == 139
    (root / "aside").rename(image)
    assert len(prepare(Clothing1M, root, partial=True, on_missing="skip")["train"]) == 140


def test_sizes_are_compared_with_the_published_ones(clothing1m, prepare):
    with pytest.raises(ValueError, match="found 140 rows, the published size is 1,000,000.*partial=True"):
        prepare(Clothing1M, clothing1m.root)


def test_missing_folder_shows_the_tree_and_the_source(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="(?s)noisy_train_key_list.txt.*github.com/Cysu/noisy_label"):
            Clothing1M(data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="pass `data_dir`"):
        Clothing1M(cache_dir=str(tmp_path / "cache"))


def test_wrong_policy(clothing1m, tmp_path):
    with pytest.raises(ValueError, match="`on_missing` must be"):
        Clothing1M(data_dir=str(clothing1m.root), cache_dir=str(tmp_path), on_missing="ignore")


def test_a_changed_list_is_prepared_anew_and_an_unchanged_one_is_not(clothing1m, copy_of, prepare, monkeypatch):
    root = copy_of(clothing1m.root)
    assert len(prepare(Clothing1M, root, partial=True)["train"]) == 140
    with monkeypatch.context() as patch:
        patch.setattr(Clothing1M, "read_splits", lambda *_: pytest.fail("the lists were read again"))
        assert len(prepare(Clothing1M, root, partial=True)["train"]) == 140
    edit(root / "noisy_train_key_list.txt", lambda text: "".join(text.splitlines(True)[:20]))
    assert len(prepare(Clothing1M, root, partial=True)["train"]) == 20


def test_two_processes_write_the_same_rows(clothing1m, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr("hnml_hf.data.published.builder.ROWS_PER_SHARD", 50)
    expected = prepare(Clothing1M, clothing1m.root, partial=True)["train"]
    builder = Clothing1M(data_dir=str(clothing1m.root), cache_dir=str(tmp_path / "other"), partial=True)
    builder.download_and_prepare(num_proc=2)
    dataset = builder.as_dataset(split="train")
    assert keys(dataset) == keys(expected)
    assert column(dataset, "index").tolist() == list(range(140))


def test_info_names_license_citation_and_homepage(clothing1m, prepare):
    info = prepare(Clothing1M, clothing1m.root, partial=True)["train"].info
    assert info.license and "xiao2015" in info.citation and info.homepage.startswith("https://")


def test_the_real_clean_lists_parse_whole(shared_data):
    counts = {
        "train": [3974, 3032, 2507, 5224, 4126, 3670, 2690, 1326, 4420, 3467, 2223, 3126, 4051, 3733],
        "val": [1221, 891, 735, 1562, 1259, 1147, 785, 435, 1362, 1021, 704, 944, 1145, 1102],
        "test": [845, 636, 527, 1171, 918, 824, 558, 297, 1017, 727, 523, 686, 946, 851],
    }
    everything = set()
    for part, expected in counts.items():
        found, labels = read_key_labels(shared_data / "clothing1m_lists" / f"clean_{part}.txt")
        assert len(found) == SIZES[f"clean_{part}"]
        assert np.bincount(labels[labels >= 0]).tolist() == expected
        everything.update(found)
    assert len(everything) == 72_409


def test_the_real_line_without_label_stops_by_default(shared_data, tmp_path, prepare):
    for part in ("train", "val", "test"):
        shutil.copy(shared_data / "clothing1m_lists" / f"clean_{part}.txt", tmp_path)
    with pytest.raises(
        ValueError, match=r"clean_train.txt:10620: keys without a label.* 2/26/3761328114,905362226.jpg"
    ):
        prepare(Clothing1M, tmp_path, "clean")
