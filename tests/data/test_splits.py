import logging
import subprocess
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from hnml_hf import load_noisy_dataset
from hnml_hf.data.schema import column
from hnml_hf.data.splits import class_balanced, held_out_labels, split_validation


def make_dataset(labels, num_classes=10):
    features = Features({"label": ClassLabel(num_classes=num_classes), "index": Value("int64")})
    return Dataset.from_dict({"label": list(labels), "index": [1000 + i for i in range(len(labels))]}, features)


def test_shares_of_the_classes_by_hand():
    """60 cats, 30 dogs, 10 fish; a fraction of 0.1 is 10 rows in all: 6, 3 and 1 of them."""
    dataset = make_dataset([0] * 60 + [1] * 30 + [2] * 10)
    train, validation = split_validation(dataset, fraction=0.1, seed=0)
    assert np.bincount(validation["label"]).tolist() == [6, 3, 1]
    assert np.bincount(train["label"]).tolist() == [54, 27, 9]
    assert validation.features == dataset.features


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    fraction=st.floats(0.2, 0.8),
    seed=st.integers(0, 2**31),
)
def test_parts_are_disjoint_complete_and_near_the_share(sizes, fraction, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    num_rows, num_validation = len(labels), int(np.ceil(fraction * len(labels)))
    dataset = make_dataset(labels)
    if min(num_validation, num_rows - num_validation) < len(sizes):
        with pytest.raises(ValueError, match="Choose another `--validation_fraction`"):
            split_validation(dataset, fraction=fraction, seed=seed)
        return
    train, validation = split_validation(dataset, fraction=fraction, seed=seed)
    assert len(validation) == num_validation
    ids = train["index"][:], validation["index"][:]
    assert sorted(ids[0] + ids[1]) == dataset["index"][:]
    assert list(ids[0]) == sorted(ids[0]) and list(ids[1]) == sorted(ids[1])
    for part in (train, validation):
        assert all(labels[i - 1000] == label for i, label in zip(part["index"], part["label"], strict=True))
    drawn = np.bincount(validation["label"], minlength=len(sizes))
    assert np.all(np.abs(drawn - num_validation * np.array(sizes) / num_rows) < 2)


def test_seed_decides():
    dataset = make_dataset(np.arange(200) % 10)
    first = split_validation(dataset, fraction=0.2, seed=0)[1]["index"][:]
    assert split_validation(dataset, fraction=0.2, seed=0)[1]["index"][:] == first
    assert split_validation(dataset, fraction=0.2, seed=1)[1]["index"][:] != first


def test_single_images_stay_in_training(caplog):
    dataset = make_dataset([0] * 10 + [3] + [1] * 10 + [7])
    with caplog.at_level(logging.WARNING):
        train, validation = split_validation(dataset, fraction=0.5, seed=0)
    assert set(validation["label"]) == {0, 1}
    assert {3, 7} <= set(train["label"])
    assert "2 classes have a single image" in caplog.text
    with caplog.at_level(logging.WARNING):
        split_validation(make_dataset([0] * 10 + [3]), fraction=0.5, seed=0)
    assert "1 class has a single image" in caplog.text


def test_classes_absent_from_validation_are_counted(caplog):
    """100 + 2 rows at 0.1: ceil(10.2) = 11 validation rows, of which the small class would get 0.2."""
    with caplog.at_level(logging.WARNING):
        train, validation = split_validation(make_dataset([0] * 100 + [1] * 2), fraction=0.1, seed=0)
    assert (len(validation), set(validation["label"])) == (11, {0})
    assert "1 class is too small" in caplog.text


def test_a_view_is_split_by_its_own_rows():
    dataset = make_dataset(np.arange(100) % 5).shuffle(seed=0).select(range(50))
    train, validation = split_validation(dataset, fraction=0.2, seed=0)
    assert sorted(train["index"][:] + validation["index"][:]) == sorted(dataset["index"][:])


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 1] * 10, 0.0, "strictly between"),
        ([0, 1] * 10, 1.0, "strictly between"),
        ([0, 1] * 10, float("nan"), "strictly between"),
        ([0, 1] * 10, 0.05, "1 validation and 19 training rows, but 2 classes have .*`--validation_fraction` "),
        ([0, 1] * 10, 0.95, "19 validation and 1 training"),
        ([0, 1, 2], 0.1, "No class of the 3 rows has two images.*`--validation_fraction 0`.*`fraction=0.1`"),
        ([], 0.5, "no rows"),
        ([0, -1, 0, 0], 0.5, "every row"),
        ([0, None, 0, 0], 0.5, "every row"),
    ],
)
def test_refusals(labels, fraction, message):
    with pytest.raises(ValueError, match=message):
        split_validation(make_dataset(labels), fraction=fraction, seed=0)


# -- class-balanced samples -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    return load_noisy_dataset("quickstart", cache_dir=tmp_path_factory.mktemp("cache"))


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


@given(seed=st.integers(0, 2**31 - 1), start=st.integers(0, 2**40), step=st.integers(1, 1000))
def test_the_share_held_out_is_the_one_asked_for(seed, start, step):
    index = start + step * np.arange(4000)
    held_out = held_out_labels(index, 0.1, seed=seed)
    assert 0.07 < held_out.mean() < 0.13
    assert np.array_equal(held_out_labels(index[::-1], 0.1, seed=seed), held_out[::-1])
    assert not np.array_equal(held_out_labels(index, 0.1, seed=seed + 1), held_out)


def test_what_cuts_no_part_does_not_wait_for_scikit_learn():
    """Its import takes a second of every command; only `--validation_fraction` needs it."""
    code = "import sys, hnml_hf.data.splits; print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
