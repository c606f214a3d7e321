"""Parquet copies of CIFAR whose columns have class names in another order than the official one."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from hnml_hf import load_noisy_dataset
from hnml_hf.data.published.builder import encode_png
from hnml_hf.data.published.cifar_files import CLASSES_10
from hnml_hf.data.published.cifar_n import CIFARN, by_own_names, clean_split
from hnml_hf.data.schema import column


def copy(names, **columns):
    count = len(next(iter(columns.values())))
    images = [encode_png(np.full((32, 32, 3), row, dtype=np.uint8)) for row in range(count)]
    features = Features({"image": Image(), **{name: ClassLabel(names=names) for name in columns}})
    return Dataset.from_dict({"image": images, **columns}, features=features)


def test_ids_stand_for_the_names_of_their_own_column(tmp_path, prepare):
    backwards = list(CLASSES_10)[::-1]
    for split in ("train", "test"):
        copy(backwards, label=[0, 1, 9], worse_label=[9, 1, 0]).to_parquet(tmp_path / f"{split}.parquet")
    official = prepare(CIFARN, tmp_path, "cifar10", partial=True)
    assert column(official["train"], "label").tolist() == column(official["test"], "label").tolist() == [9, 8, 0]
    human = prepare(CIFARN, tmp_path, "cifar10n-worse", partial=True)
    assert column(human["train"], "label").tolist() == [0, 8, 9]
    assert column(human["train"], "clean_label").tolist() == [9, 8, 0]
    assert column(clean_split(copy(backwards, label=[0, 9]), "cifar10"), "label").tolist() == [9, 0]


def test_names_that_are_spelled_otherwise_keep_their_places():
    ids, spelled = np.array([0, 1]), ["plane", "car", *CLASSES_10[2:]]
    assert by_own_names(ids, spelled, CLASSES_10, "x").tolist() == [0, 1]
    with pytest.raises(ValueError, match="x: the class `car` is none of airplane.* another id than in the official"):
        by_own_names(ids, spelled[::-1], CLASSES_10, "x")


def test_human_labels_of_a_file_are_put_beside_images_of_another_order(cifar):
    """The order of the rows is proven by the true labels, which count by their names."""
    backwards = list(CLASSES_10)[::-1]
    train = copy(backwards, label=(9 - cifar.clean).tolist())
    test = copy(backwards, label=[0, 9])
    dataset = load_noisy_dataset(
        "cifar10n-worse", images=DatasetDict({"train": train, "test": test}), data_dir=cifar.root / "python"
    )
    assert column(dataset["train"], "clean_label").tolist() == cifar.clean.tolist()
    assert column(dataset["train"], "label").tolist() == cifar.human["worse_label"].tolist()
    assert column(dataset["test"], "label").tolist() == [9, 0]
