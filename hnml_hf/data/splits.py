"""A validation set cut from the training data, noisy labels included: model selection without clean labels."""

import logging

import numpy as np
from datasets import Dataset
from sklearn.model_selection import train_test_split

from hnml_hf.data.schema import column


logger = logging.getLogger(__name__)


def split_validation(dataset: Dataset, *, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """
    Cuts a validation set from a training set, stratified by the given (noisy) label.

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
        `ValueError`: if `fraction` is out of range, a label is unknown, or one part would hold fewer rows than there
        are classes to represent.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"`fraction` must lie strictly between 0 and 1, got {fraction}.")
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows to split.")
    labels = column(dataset, "label")
    if not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
        raise ValueError(
            "`label` must hold a class in every row. Find the rows with `python scripts/audit_data.py`, and leave "
            "them out."
        )

    sizes = np.bincount(labels)
    divisible = np.flatnonzero(sizes[labels] > 1)
    num_classes, num_single = int((sizes > 1).sum()), int((sizes == 1).sum())
    num_validation = int(np.ceil(fraction * len(divisible)))
    if min(num_validation, len(divisible) - num_validation) < max(num_classes, 1):
        raise ValueError(
            f"`fraction={fraction}` of {len(divisible)} rows gives {num_validation} validation and "
            f"{len(divisible) - num_validation} training rows, but there are {num_classes} classes with two or "
            "more images, and each part needs a row for each of them. Choose another `fraction` or add data."
        )
    _, validation = train_test_split(divisible, test_size=fraction, random_state=seed, stratify=labels[divisible])
    validation = np.sort(validation)
    train = np.setdiff1d(np.arange(len(dataset)), validation, assume_unique=True)

    if num_single:
        logger.warning("%d classes have a single image, which stays in the training set.", num_single)
    absent = num_classes - len(np.unique(labels[validation]))
    if absent:
        logger.warning("%d classes are too small to have an image in the validation set.", absent)
    logger.info("Split %d rows into %d for training and %d for validation.", len(dataset), len(train), len(validation))
    return dataset.select(train), dataset.select(validation)
