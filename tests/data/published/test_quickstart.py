import numpy as np
import pytest

from hnml_hf import load_noisy_dataset
from hnml_hf.data.load import DATASET_NAMES
from hnml_hf.data.published.quickstart import CLASSES
from hnml_hf.data.schema import column


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
    with pytest.raises(ValueError, match="`partial` is for known datasets .quickstart, clothing1m"):
        load_noisy_dataset(str(tmp_path), partial=True)
    assert {"clothing1m", "webvision", "mini-webvision", "cifar10n-worse", "cifar100n", "food101n"} < set(
        DATASET_NAMES
    )
