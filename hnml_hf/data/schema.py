"""What every dataset of this package has in common: four features.

`image`, `label` (given, maybe wrong), `clean_label` (-1 = unknown) and `index` (a stable sample id: the position in
the official order of the split).
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, Value


COLUMNS = ("image", "label", "clean_label", "index")
UNKNOWN = -1  # value of `clean_label` where the true class is not known


class DataError(ValueError):
    """A defect of the data, as opposed to a mistake in the options."""


def noisy_features(names: Sequence[str]) -> Features:
    """The features that all builders share; `names` are the class names in id order."""
    return Features(
        {
            "image": Image(),
            "label": ClassLabel(names=list(names)),
            "clean_label": ClassLabel(names=list(names)),
            "index": Value("int64"),
        }
    )


def column(dataset: Dataset, name: str) -> np.ndarray:
    """One column without its images being decoded, as an array of shape `(num_rows,)`."""
    return dataset.select_columns([name]).with_format("numpy")[:][name]


def image_paths(dataset: Dataset) -> list[str]:
    """Where each image lies, by `index`; empty for images that are part of the dataset."""
    order = np.argsort(column(dataset, "index"), kind="stable")
    paths: list[str] = []
    images = dataset.select_columns(["image"]).cast_column("image", Image(decode=False)).with_format("arrow")
    for batch in images.iter(10_000):
        content = batch.column("image").combine_chunks()
        outside = pc.is_null(pc.struct_field(content, "bytes"))  # of others the path is but the name they had
        paths += pc.if_else(outside, pc.struct_field(content, "path"), None).to_pylist()
    return [paths[row] or "" for row in order]


def noise_rate(labels: np.ndarray, clean_labels: np.ndarray) -> float | None:
    """Share of wrong labels among those whose true one is known, or `None` where the data do not tell it.

    Some datasets know a true label only where somebody found the given one to be right (Food-101N): that none of these
    is wrong says nothing of the others.

    Args:
        labels, clean_labels (`np.ndarray` of shape `(n,)`): given and true labels; -1 is an unknown true label.
    """
    known = clean_labels != UNKNOWN
    wrong = (labels != clean_labels)[known]
    return float(wrong.mean()) if wrong.any() or (len(wrong) and known.all()) else None


def labels_fingerprint(index: np.ndarray, labels: np.ndarray, num_classes: int) -> str:
    """A hash of the number of classes and of the id and label of each row, whatever the order of the rows.

    Unlike the cache fingerprint of `datasets` it depends on the content alone: it is the same on every machine.
    """
    order = np.argsort(index, kind="stable")
    digest = hashlib.sha256(str(num_classes).encode())
    for values in (index, labels):
        digest.update(values[order].astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def assemble(
    images: Dataset,
    image_column: str,
    labels: np.ndarray,
    clean_labels: np.ndarray,
    index: np.ndarray,
    names: Sequence[str],
) -> Dataset:
    """The four features from a dataset with images and from arrays of shape `(num_rows,)`.

    Images are neither read nor copied: the other columns are put beside them.
    """
    features = noisy_features(names)
    dataset = images.select_columns([image_column])
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    dataset = dataset.cast_column("image", Image())
    for name, values in (("label", labels), ("clean_label", clean_labels), ("index", index)):
        dataset = dataset.add_column(name, pa.array(values, pa.int64()), feature=features[name])
    return dataset
