"""Synthetic labels that were drawn once: saved, carried between machines, and put into a dataset by `index`.

`label` becomes the drawn label, `clean_label` the label before.
"""

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..common.words import counted
from .schema import COLUMNS, UNKNOWN, column, labels_fingerprint


FORMAT = "hnml_hf noise file 1"
OLD_FORMAT = "hnml_hf noise manifest 1"  # of earlier versions: the same under another name


@dataclass(frozen=True)
class NoiseFile:
    """Labels that were drawn for a dataset, with all that is needed to know how and for which.

    Args:
        dataset_fingerprint (`str`): hash of ids, true labels and number of classes (see `labels_fingerprint`).
        num_classes (`int`): number of classes.
        noise (`dict`): kind, rate, seed and the options of the kind.
        actual_rate (`float`): share of labels that differ from the true one.
        index (`np.ndarray` of shape `(num_rows,)`): the sample ids, int64, ascending.
        labels (`np.ndarray` of shape `(num_rows,)`): the drawn label of each id, int64.
    """

    dataset_fingerprint: str
    num_classes: int
    noise: dict
    actual_rate: float
    index: np.ndarray
    labels: np.ndarray


def apply_noise_file(dataset: Dataset, drawn: NoiseFile) -> Dataset:
    """Replace `label` by the drawn labels and `clean_label` by the true ones. Images are neither decoded nor copied.

    Args:
        dataset (`datasets.Dataset`): the dataset that the labels were drawn for, rows in any order.
        drawn (`NoiseFile`): from `draw_noise` or `load_noise_file`.

    Returns:
        `datasets.Dataset`: with the same features, rows and ids.

    Raises:
        ValueError: if the labels were drawn for another dataset, or the labels are not the true ones.
    """
    clean, index = clean_labels(dataset), unique_index(dataset)
    found = labels_fingerprint(index, clean, dataset.features["label"].num_classes)
    if found != drawn.dataset_fingerprint:
        raise ValueError(
            f"The noise file was drawn for another dataset: its fingerprint is {drawn.dataset_fingerprint} "
            f"({counted(len(drawn.index), 'row')}, {counted(drawn.num_classes, 'class')}), this one's is {found} "
            f"({counted(len(dataset), 'row')}, {dataset.features['label'].num_classes} classes). Ids and true "
            "labels must agree: apply it to the whole training set, before any split or subset, or draw new noise."
        )
    # ids and true labels agree, so every id is found
    positions = np.searchsorted(drawn.index, index)
    return _replace_columns(dataset, {"label": drawn.labels[positions], "clean_label": clean})


def save_noise_file(path: str | os.PathLike, drawn: NoiseFile) -> None:
    """Write drawn labels as JSON. The same draw gives the same bytes.

    Args:
        path (`str` or `Path`): of the file.
        drawn (`NoiseFile`): from `draw_noise`.
    """
    content = {
        "format": FORMAT,
        "dataset_fingerprint": drawn.dataset_fingerprint,
        "num_classes": drawn.num_classes,
        "noise": drawn.noise,
        "actual_rate": drawn.actual_rate,
        "index": drawn.index.tolist(),
        "labels": drawn.labels.tolist(),
    }
    Path(path).write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def load_noise_file(path: str | os.PathLike) -> NoiseFile:
    """Read a noise file written by `save_noise_file`.

    Args:
        path (`str` or `Path`): of the file.

    Returns:
        `NoiseFile`.

    Raises:
        ValueError: if the file is no noise file, or its lists do not fit together.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] not in (FORMAT, OLD_FORMAT):
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        drawn = NoiseFile(
            dataset_fingerprint=content["dataset_fingerprint"],
            num_classes=content["num_classes"],
            noise=content["noise"],
            actual_rate=content["actual_rate"],
            index=_integers(content["index"]),
            labels=_integers(content["labels"]),
        )
        if len(drawn.index) != len(drawn.labels) or (np.diff(drawn.index) <= 0).any():
            raise ValueError("`index` must be ascending and have one entry in `labels` each")
        if ((drawn.labels < 0) | (drawn.labels >= drawn.num_classes)).any():
            raise ValueError(f"`labels` must lie in 0..{drawn.num_classes - 1}")
    except (KeyError, TypeError, ValueError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise ValueError(
            f"{path} is not a noise file ({error}). Write it with `save_noise_file` and do not edit it."
        ) from error
    return drawn


def _integers(values: list) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError("`index` and `labels` must be lists of integers")
    return array.astype(np.int64)


# ---- the dataset ----------------------------------------------------------------------------------------------------


def clean_labels(dataset: Dataset) -> np.ndarray:
    """The true labels, int64: `label`, which must agree with `clean_label` wherever that is known."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"Expected one split, a `datasets.Dataset`, got {type(dataset).__name__}. Noise belongs into the training "
            'split only: pass `dataset["train"]`.'
        )
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(f"The dataset lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)}.")
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows.")
    labels, known = column(dataset, "label"), column(dataset, "clean_label")
    num_classes = dataset.features["label"].num_classes
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"`label` must hold a class 0..{num_classes - 1} in every row. Find the rows with "
            "`hnml check`, and leave them out."
        )
    wrong = int(((known != UNKNOWN) & (known != labels)).sum())
    if wrong:
        raise ValueError(
            f"`label` differs from `clean_label` in {wrong} of {counted(len(labels), 'row')}: these labels are "
            "noisy already, "
            "and synthetic noise starts from true ones. Load the dataset with the column of its true labels as "
            "`label_column`, or train on the noise it has."
        )
    return labels.astype(np.int64)


def unique_index(dataset: Dataset) -> np.ndarray:
    index = column(dataset, "index").astype(np.int64)
    values, counts = np.unique(index, return_counts=True)
    if len(values) < len(index):
        raise ValueError(
            f"`index` must be unique, but {values[counts > 1][0]} occurs {counts.max()} times: labels are drawn and "
            "kept by it. Draw the noise before any over-sampling."
        )
    return index


def _replace_columns(dataset: Dataset, columns: dict[str, np.ndarray]) -> Dataset:
    """The dataset with other integers in some columns; its images stay where they are."""
    base, rows = dataset, None
    if dataset._indices is not None:
        # a shuffled or selected dataset is a view; add_column would write all its images anew
        rows = dataset._indices.column(0).to_numpy()
        base = copy.copy(dataset)
        base._indices = None
    order, features, view = base.column_names, base.features, dataset.format
    base = base.remove_columns(list(columns))
    for name, values in columns.items():
        if rows is not None:
            stored = np.full(len(base), UNKNOWN)
            stored[rows] = values
            values = stored
        base = base.add_column(name, values, feature=features[name])
    replaced = base.select_columns(order)
    if rows is not None:
        replaced = replaced.select(rows)
    if view["type"] is not None:
        replaced.set_format(view["type"], view["columns"], view["output_all_columns"], **view["format_kwargs"])
    return replaced
