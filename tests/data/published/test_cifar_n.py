import logging
import shutil

import numpy as np
import pytest
import torch
from commands import TRAIN, load_script
from datasets import Dataset, DatasetDict, Features, Image, Value

from hnml_hf import load_noisy_dataset
from hnml_hf.data.published.builder import encode_png
from hnml_hf.data.published.cifar_files import CLASSES_10, CLASSES_100, HUMAN_LABELS, read_batch, read_human_labels
from hnml_hf.data.published.cifar_n import CIFARN, attach_human_labels, official_order
from hnml_hf.data.schema import column


HUB_ORDER = (3, 2, 4, 1, 0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 20 rows, as the fake batches have, in place of 10,000."""
    monkeypatch.setattr("hnml_hf.data.published.cifar_n.BLOCK", 20)


def pixels(dataset, row):
    return np.asarray(dataset[row]["image"]).transpose(2, 0, 1)


def image_set(cifar, rows, **columns):
    images = [encode_png(cifar.pixels[row].transpose(1, 2, 0)) for row in rows]
    features = Features({"img": Image(), **{name: Value("int64") for name in columns}})
    return Dataset.from_dict({"img": images, **columns}, features=features)


@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("config", [name for name in HUMAN_LABELS if name.startswith("cifar10n")])
def test_official_batches(cifar, prepare, form, config):
    dataset = prepare(CIFARN, cifar.root / form, config, partial=True)
    assert column(dataset["train"], "label").tolist() == cifar.human[HUMAN_LABELS[config]].tolist()
    assert column(dataset["train"], "clean_label").tolist() == cifar.clean.tolist()
    assert column(dataset["train"], "index").tolist() == list(range(100))
    assert column(dataset["test"], "label").tolist() == column(dataset["test"], "clean_label").tolist() == [*range(10)]
    for row in (0, 25, 99):
        assert np.array_equal(pixels(dataset["train"], row), cifar.pixels[row])


@pytest.mark.parametrize("form", ["python", "binary"])
def test_official_labels_need_no_label_file(cifar, prepare, tmp_path, form):
    root = tmp_path / "images"
    shutil.copytree(cifar.root / form, root, ignore=shutil.ignore_patterns("*.pt"))
    dataset = prepare(CIFARN, root, "cifar10", partial=True)
    for name in ("label", "clean_label"):
        assert column(dataset["train"], name).tolist() == cifar.clean.tolist()
    assert column(dataset["train"], "index").tolist() == list(range(100))
    with pytest.raises(FileNotFoundError, match=r"No human labels: .*\n.*Expected below"):
        prepare(CIFARN, root, "cifar10n-worse", partial=True)


@pytest.mark.parametrize(
    ("noise", "wrong"), [("human 40 %", None), ("symmetric 50 %", 45), ("symmetric 80 %", 72), ("asymmetric 40 %", 20)]
)
def test_the_noises_of_the_full_protocol(cifar, noise, wrong, tmp_path):
    """They can be drawn, on the official labels: synthetic noise on human labels is refused."""
    benchmark, train = load_script("benchmark_accuracy"), load_script("train")
    cells = benchmark.load_suite(TRAIN.parent / "benchmarks" / "suites" / "full.yaml")
    cell = next(cell for cell in cells if dict(cell.names)["noise"] == noise)
    own = ["--data_dir", str(cifar.root / "python"), "--partial", "true", "--use_cpu", "true", "--output_dir", "x"]
    own += ["--validation_fraction", "0.3"]
    _, data_args, _ = train.parse_arguments([*cell.arguments(), *own])
    data = train.load_data(data_args)
    given = np.concatenate([column(data[split], "label") for split in ("train", "validation")])
    clean = np.concatenate([column(data[split], "clean_label") for split in ("train", "validation")])
    assert len(given) == 100
    expected = (cifar.human["worse_label"] != cifar.clean).sum() if wrong is None else wrong
    assert abs((given != clean).sum() - expected) <= (0 if wrong is None else 8)


def test_a_python_batch_is_read_without_being_executed(tmp_path, cifar):
    """The instruction to call os.system is passed over like any other."""
    batch = (cifar.root / "python/cifar-10-batches-py/data_batch_1").read_bytes()
    path = tmp_path / "data_batch_1"
    command = b"touch " + bytes(tmp_path / "executed")
    path.write_bytes(batch[:-1] + b"cos\nsystem\nU" + bytes([len(command)]) + command + b"\x85R.")
    labels, images = read_batch(str(path), fine=False)
    assert labels.tolist() == cifar.clean[:20].tolist()
    assert np.array_equal(images, cifar.pixels[:20])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_1.bin"])
@pytest.mark.parametrize("cut", [0, 1, 5, 100, 40_000])
def test_cut_batches(cifar, tmp_path, name, cut):
    form = "binary/cifar-10-batches-bin" if name.endswith(".bin") else "python/cifar-10-batches-py"
    path = tmp_path / name
    path.write_bytes((cifar.root / form / name).read_bytes()[:cut])
    with pytest.raises(ValueError, match=name):
        read_batch(str(path), fine=False)


def test_hub_order_is_repaired(cifar, small_blocks, caplog):
    rows = np.concatenate([np.arange(20 * block, 20 * block + 20) for block in HUB_ORDER])
    images = image_set(cifar, rows, label=cifar.clean[rows])
    with caplog.at_level(logging.WARNING):
        dataset = attach_human_labels(images, cifar.root / "python/CIFAR-10_human.pt", "cifar10n-worse")
    assert "another order" in caplog.text
    assert column(dataset, "index").tolist() == rows.tolist()
    assert column(dataset, "label").tolist() == cifar.human["worse_label"][rows].tolist()
    assert column(dataset, "clean_label").tolist() == cifar.clean[rows].tolist()
    assert np.array_equal(pixels(dataset, 33), cifar.pixels[rows[33]])
    assert dataset.column_names == ["image", "label", "clean_label", "index"]


def test_any_other_order_is_refused(cifar, small_blocks):
    rows = np.random.default_rng(1).permutation(100)
    images = image_set(cifar, rows, label=cifar.clean[rows])
    with pytest.raises(ValueError, match="fit no block of the label file.*agree by position"):
        attach_human_labels(images, cifar.root / "python/CIFAR-10_human.pt", "cifar10n-worse")


def test_one_wrong_label_is_refused(cifar, small_blocks):
    labels = cifar.clean.copy()
    labels[57] = (labels[57] + 1) % 10
    with pytest.raises(ValueError, match="rows 40..59"):
        official_order(labels, cifar.clean)


def test_subset_needs_and_proves_its_index(cifar):
    rows = np.array([90, 3, 57])
    labels_file = cifar.root / "python/CIFAR-10_human.pt"
    with pytest.raises(ValueError, match="3 rows, the label file 100.*needs a column `index`"):
        attach_human_labels(image_set(cifar, rows, label=cifar.clean[rows]), labels_file, "cifar10n-worse")
    images = image_set(cifar, rows, label=cifar.clean[rows], index=rows)
    dataset = attach_human_labels(images, labels_file, "cifar10n-worse")
    assert column(dataset, "label").tolist() == cifar.human["worse_label"][rows].tolist()
    wrong = rows[:1] - 1 if cifar.clean[89] != cifar.clean[90] else rows[:1] - 2
    images = image_set(cifar, rows[:1], label=cifar.clean[rows[:1]], index=wrong)
    with pytest.raises(ValueError, match="the clean label differs .* in 1 of 1 row"):
        attach_human_labels(images, labels_file, "cifar10n-worse")
    with pytest.raises(ValueError, match="has 100 labels, but `index` goes to 100"):
        images = image_set(cifar, rows[:1], label=cifar.clean[rows[:1]], index=[100])
        attach_human_labels(images, labels_file, "cifar10n-worse")


def test_images_given_by_the_user(cifar):
    images = DatasetDict(
        {
            "train": image_set(cifar, range(100), label=cifar.clean),
            "test": image_set(cifar, range(10), label=np.arange(10)),
        }
    )
    data_dir = cifar.root / "python"
    dataset = load_noisy_dataset("cifar10n", config="rand2", data_dir=data_dir, images=images)
    assert column(dataset["train"], "label").tolist() == cifar.human["random_label2"].tolist()
    assert column(dataset["test"], "clean_label").tolist() == list(range(10))
    assert dataset["train"].features == dataset["test"].features
    only_train = load_noisy_dataset("cifar10n-rand2", data_dir=data_dir, images=images["train"])
    assert set(only_train) == {"train"}
    with pytest.raises(ValueError, match="`images` is for CIFAR-N"):
        load_noisy_dataset("animal10n", images=images)
    with pytest.raises(FileNotFoundError, match="CIFAR-10_human.pt.*worse_label"):
        load_noisy_dataset("cifar10n-worse", images=images)


@pytest.mark.parametrize("with_human", [True, False])
def test_parquet_files(cifar, tmp_path, prepare, small_blocks, with_human):
    """With human columns the parquet files stand alone; without, the label file is aligned as for any other source."""
    human = {"worse_label": cifar.human["worse_label"]} if with_human else {}
    train = image_set(cifar, range(100), label=cifar.clean, **human)
    train.select(range(60)).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    train.select(range(60, 100)).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    image_set(cifar, range(10), label=np.arange(10), index=np.arange(10)).to_parquet(tmp_path / "test.parquet")
    if with_human:
        with pytest.raises(FileNotFoundError, match="random_label1"):
            prepare(CIFARN, tmp_path, "cifar10n-rand1", partial=True)
    else:
        shutil.copy(cifar.root / "python/CIFAR-10_human.pt", tmp_path)
    dataset = prepare(CIFARN, tmp_path, "cifar10n-worse", partial=True)
    assert column(dataset["train"], "label").tolist() == cifar.human["worse_label"].tolist()
    assert column(dataset["train"], "clean_label").tolist() == cifar.clean.tolist()
    assert column(dataset["test"], "label").tolist() == column(dataset["test"], "clean_label").tolist()
    assert np.array_equal(pixels(dataset["train"], 80), cifar.pixels[80])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: {"clean_label": h["clean_label"]},
            "needs the keys clean_label, worse_label; the file has clean_label",
        ),
        (lambda h: [1, 2], "the file has list"),
        (lambda h: {**h, "worse_label": h["worse_label"] + 1}, "`worse_label` must hold integers 0..9"),
        (lambda h: {**h, "worse_label": h["worse_label"].astype(float)}, "not a CIFAR-N label file"),
        (lambda h: {**h, "worse_label": h["worse_label"][:50]}, "100 clean labels, but 50 human labels"),
        (lambda h: {**h, "worse_label": 3}, "`worse_label` must be a list of labels, got int"),
    ],
)
def test_bad_label_files(cifar, tmp_path, change, message):
    path = tmp_path / "CIFAR-10_human.pt"
    torch.save(change(cifar.human), path)
    with pytest.raises(ValueError, match=f"CIFAR-10_human.pt: .*{message}"):
        read_human_labels(path, "cifar10n-worse")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"<html>not found</html>"])
def test_files_that_are_no_label_files(tmp_path, content):
    path = tmp_path / "CIFAR-10_human.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="CIFAR-10_human.pt"):
        read_human_labels(path, "cifar10n-worse")


def test_a_label_file_cannot_run_code(tmp_path):
    class Intruder:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "CIFAR-10_human.pt"
    torch.save({"clean_label": Intruder()}, path)
    with pytest.raises(ValueError, match="not a CIFAR-N label file"):
        read_human_labels(path, "cifar10n-worse")


def test_lists_are_accepted_as_labels(tmp_path):
    path = tmp_path / "CIFAR-100_human.pt"
    torch.save({"clean_label": np.array([1, 99]), "noisy_label": [2, 99]}, path)
    assert read_human_labels(path, "cifar100n")[1].tolist() == [2, 99]


def test_names_and_missing_sources(tmp_path, cifar, prepare):
    assert len(CLASSES_10) == 10 and len(CLASSES_100) == 100 == len(set(CLASSES_100))
    assert CLASSES_100 == sorted(CLASSES_100) and CLASSES_100[26] == "crab"
    with pytest.raises(FileNotFoundError, match="(?s)No CIFAR images.*github.com/UCSC-REAL"):
        prepare(CIFARN, tmp_path, "cifar10n-worse")
    with pytest.raises(ValueError, match="found 100 rows, the published size is 50,000"):
        prepare(CIFARN, cifar.root / "python", "cifar10n-worse")
    with pytest.raises(ValueError, match="one of aggre, rand1, rand2, rand3, worse; got 'worst'"):
        load_noisy_dataset("cifar10n", config="worst", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="got None"):
        load_noisy_dataset("cifar10n", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ("cifar10n-aggre", 4_505),
        ("cifar10n-rand1", 8_617),
        ("cifar10n-rand2", 9_061),
        ("cifar10n-rand3", 8_820),
        ("cifar10n-worse", 20_104),
        ("cifar100n", 20_100),
    ],
)
def test_noise_rates_of_the_real_label_files(shared_data, config, wrong):
    """9.01, 17.23, 18.12, 17.64, 40.21 and 40.20 % of 50,000."""
    name = "CIFAR-100_human.pt" if config == "cifar100n" else "CIFAR-10_human.pt"
    clean_labels, labels = read_human_labels(shared_data / "cifar-n" / name, config)
    assert len(labels) == 50_000
    assert (labels != clean_labels).sum() == wrong


def test_real_images_with_the_real_label_file(shared_data, tmp_path, prepare):
    """The 10,000-row copy has no rows of its own order: its `index` is proven against the label file."""
    full = prepare(CIFARN, shared_data / "cifar10n", "cifar10n-worse")["train"]
    labels, clean_labels = column(full, "label"), column(full, "clean_label")
    assert len(full) == 50_000 and (labels != clean_labels).sum() == 20_104
    official, human = read_human_labels(shared_data / "cifar-n" / "CIFAR-10_human.pt", "cifar10n-worse")
    assert np.array_equal(official, clean_labels) and np.array_equal(human, labels)
    rows = np.concatenate([np.arange(10_000 * block, 10_000 * block + 10_000) for block in HUB_ORDER])
    order = official_order(clean_labels[rows], official)
    assert np.array_equal(order, rows)
    assert 0.85 < (human != official[rows]).mean() < 0.95  # what attaching by position would have given


@pytest.mark.parametrize(
    ("config", "wrong"), [("aggre", 86), ("rand1", 174), ("rand2", 184), ("rand3", 166), ("worse", 406)]
)
def test_real_subset(shared_data, tmp_path, config, wrong):
    """8.6, 17.4, 18.4, 16.6 and 40.6 % of the 1,000 rows; `index` holds official positions."""
    dataset = load_noisy_dataset(
        "cifar10n", config=config, data_dir=shared_data / "cifar10n-tiny", partial=True, cache_dir=tmp_path
    )["train"]
    assert (column(dataset, "label") != column(dataset, "clean_label")).sum() == wrong
    official, human = read_human_labels(shared_data / "cifar-n" / "CIFAR-10_human.pt", f"cifar10n-{config}")
    assert np.array_equal(human[column(dataset, "index")], column(dataset, "label"))
