"""Which rows train and which evaluate: names of splits, a validation set cut from train, class-balanced samples."""

import logging
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ..common.words import counted
from .schema import column


logger = logging.getLogger(__name__)

# Our names of the splits, and those that sources use for them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def find_splits(names: Sequence[str]) -> dict[str, str]:
    """Our split names -> the names that a source uses for them, in small letters or capitals."""
    found = {}
    for split, spellings in SPLITS.items():
        present = [name for name in names if name.lower() in spellings]
        if len(present) > 1:
            raise ValueError(
                f"Both `{present[0]}` and `{present[1]}` could be the split {split}; name it by `splits`."
            )
        if present:
            found[split] = present[0]
    return found


def split_validation(dataset: Dataset, *, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Cut a validation set from a training set, stratified by the given (noisy) label.

    Both parts keep the stored order and the sample ids in `index`. The share of each class in the validation set is
    the one it has in the whole, to the nearest image. Classes with a single image stay in the training part; their
    number is logged. Cut after synthetic noise was added, the validation labels are as noisy as the training labels.

    Args:
        dataset (`datasets.Dataset`): with a `label` column of class ids.
        fraction (`float`): share of the rows that go to validation (rounded up), strictly between 0 and 1.
        seed (`int`): of the draw. The same seed gives the same split on every machine.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: train and validation; views, no image is copied.

    Raises:
        ValueError: if `fraction` is out of range, a label is unknown, or one part would hold fewer rows than there
        are classes to represent.

    Example:

        train, validation = split_validation(dataset, fraction=0.25, seed=0)
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"`fraction` must lie strictly between 0 and 1, got {fraction}.")
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows to split.")
    labels = column(dataset, "label")
    if not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
        raise ValueError(
            "`label` must hold a class in every row. Find the rows with `hnml check`, and leave them out."
        )

    sizes = np.bincount(labels)
    divisible = np.flatnonzero(sizes[labels] > 1)
    num_classes, num_single = int((sizes > 1).sum()), int((sizes == 1).sum())
    if not num_classes:
        raise ValueError(
            f"No class of the {counted(len(dataset), 'row')} has two images, so none can be held out for validation "
            "and be trained as well. Add images, or hold none out: `--validation_fraction 0` (in Python no "
            f"`split_validation`; got `fraction={fraction}`)."
        )
    num_validation = int(np.ceil(fraction * len(divisible)))
    if min(num_validation, len(divisible) - num_validation) < num_classes:
        raise ValueError(
            f"`fraction={fraction}` of {counted(len(divisible), 'row')} gives {num_validation} validation and "
            f"{counted(len(divisible) - num_validation, 'training row')}, but "
            f"{counted(num_classes, 'class', 'have')} two or more images, and each part needs at least as many rows. "
            "Choose another `--validation_fraction` (in Python `fraction`), or add images."
        )
    from sklearn.model_selection import train_test_split  # a second to import, and not needed without a held-out part

    _, validation = train_test_split(divisible, test_size=fraction, random_state=seed, stratify=labels[divisible])
    validation = np.sort(validation)
    train = np.setdiff1d(np.arange(len(dataset)), validation, assume_unique=True)

    if num_single:
        single = counted(num_single, "class", "have")
        logger.warning("%s a single image, which stays in the training set.", single)
    absent = num_classes - len(np.unique(labels[validation]))
    if absent:
        small = counted(absent, "class", "are")
        logger.warning("%s too small to have an image in the validation set.", small)
    logger.info("Split %d rows into %d for training and %d for validation.", len(dataset), len(train), len(validation))
    return dataset.select(train), dataset.select(validation)


def class_balanced(
    dataset: Dataset,
    num_samples: int | None = None,
    *,
    per_class: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Draw the same number of rows from every class, by the given (noisy) label and without replacement.

    This is the sampling of the Clothing1M protocols (DivideMix, ICLR 2020: 64,000 rows an epoch). Call it with another
    seed for another epoch. `index` keeps the ids of the full set; the stored order is kept too.

    Args:
        dataset (`datasets.Dataset`): with a `label` column of the type `ClassLabel`.
        num_samples (`int`): rows in all, split evenly; a remainder of the division is left out.
        per_class (`int`): rows of each class, instead of `num_samples`. A class with fewer rows gives all it has, with
            a warning in the log.
        seed (`int`): of the draw.

    Returns:
        `datasets.Dataset`: a view, no image is copied.

    Raises:
        ValueError: unless one of `num_samples` and `per_class` is given, and is enough for a row of each class.
    """
    num_classes = dataset.features["label"].num_classes
    if (num_samples is None) == (per_class is None):
        raise ValueError("`class_balanced` needs either `num_samples` or `per_class`, and not both.")
    quota = per_class if per_class is not None else num_samples // num_classes
    if quota < 1:
        raise ValueError(
            f"`class_balanced` needs at least one row for each of the {counted(num_classes, 'class')}; got {quota}."
        )
    labels = column(dataset, "label")
    generator = np.random.default_rng(seed)
    picked, short = [], []
    for label in range(num_classes):
        rows = np.flatnonzero(labels == label)
        if len(rows) < quota:
            short.append(f"{dataset.features['label'].int2str(label)} ({len(rows)})")
        picked.append(generator.permutation(rows)[:quota])
    if short:
        logger.warning("class_balanced: fewer than %d rows in: %s; all of them are taken.", quota, ", ".join(short))
    return dataset.select(np.sort(np.concatenate(picked)))


def held_out_labels(index: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Draw the samples whose labels no loss may see, a function of seed and sample id.

    Args:
        index (`np.ndarray` of shape `(n,)`, int64): sample ids.
        fraction (`float`): their share, in [0, 1).
        seed (`int`): of the draw.

    Returns:
        `np.ndarray` of shape `(n,)`, bool.
    """
    mixed = np.asarray(index, np.int64) + np.int64(0x9E3779B97F4A7C15 * (seed + 1) % 2**63)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):  # the finalizer of SplitMix64
        mixed = (mixed ^ (mixed >> shift)) * np.int64(factor)
    return ((mixed ^ (mixed >> 31)) & 0xFFFFFF) < fraction * 2**24
