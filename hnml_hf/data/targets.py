"""Soft targets as columns of a dataset: the likeliest classes of each sample and their probabilities."""

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..common.words import counted


CLASSES, PROBABILITIES = "target_classes", "target_probabilities"
TOP_K = 10  # classes kept for each sample
TOLERANCE = 1e-3  # by which the probabilities of a sample may miss 1


def top_targets(
    posterior: np.ndarray, top_labels: np.ndarray | None = None, *, top_k: int = TOP_K
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest classes of each sample, the likeliest first, and their probabilities, which sum to 1.

    Args:
        posterior (`np.ndarray` of shape `(n, c)`): probability of each class that is named.
        top_labels (`np.ndarray` of shape `(n, c)`, *optional*): which classes these are. Default: column i is class i.
        top_k (`int`): number of classes kept, t = min(top_k, c).

    Returns:
        `np.ndarray` of shape `(n, t)`, int64; and `np.ndarray` of shape `(n, t)`, float32.
    """
    order = np.argsort(-posterior, axis=1, kind="stable")[:, :top_k]
    classes = order if top_labels is None else np.take_along_axis(top_labels, order, 1)
    kept = np.take_along_axis(posterior, order, 1)
    return classes.astype(np.int64), (kept / kept.sum(1, keepdims=True)).astype(np.float32)


def add_targets(
    dataset: Dataset, posterior: np.ndarray, top_labels: np.ndarray | None = None, *, top_k: int = TOP_K
) -> Dataset:
    """Put soft targets into a dataset, as the columns `target_classes` and `target_probabilities`.

    A label that a person has confirmed or changed (`audit_action` is `annotated`, see [`clean_dataset`]) stays the
    only target of its sample.

    Args:
        dataset (`datasets.Dataset`): n rows, with the four features of this package.
        posterior (`np.ndarray` of shape `(n, c)`): probability of each class to be the true one, for example of
            [`judge_labels`]; rows sum to 1.
        top_labels (`np.ndarray` of shape `(n, c)`, *optional*): which classes these are. Default: column i is class i.
        top_k (`int`): classes kept for each sample.

    Raises:
        ValueError: if rows are missing, or are no probabilities, or `top_labels` does not name a class for each.
    """
    posterior = np.asarray(posterior)
    if posterior.ndim != 2:
        raise ValueError(f"Targets are an array of shape (rows, classes), not {posterior.shape}.")
    if len(posterior) != len(dataset):
        raise ValueError(
            f"There are targets for {counted(len(posterior), 'row')}, but the dataset has {len(dataset)}."
        )
    bad = np.flatnonzero(~((posterior >= 0).all(1) & (np.abs(posterior.sum(1) - 1) <= TOLERANCE)))
    if len(bad):
        raise ValueError(f"Row {bad[0]} of the targets holds {posterior[bad[0]]}; probabilities sum to 1.")
    if top_labels is not None:
        top_labels = np.asarray(top_labels)
        if top_labels.shape != posterior.shape:
            raise ValueError(f"`top_labels` has the shape {top_labels.shape}, but the targets {posterior.shape}.")
        twice = np.flatnonzero((np.diff(np.sort(top_labels, 1), axis=1) == 0).any(1))
        if len(twice):
            raise ValueError(f"Row {twice[0]} of `top_labels` names a class twice: {top_labels[twice[0]]}.")
    dataset = dataset.remove_columns([name for name in (CLASSES, PROBABILITIES) if name in dataset.column_names])
    classes, probabilities = top_targets(posterior, top_labels, top_k=top_k)
    if "audit_action" in dataset.column_names:
        values = dataset.select_columns(["audit_action", "label"]).with_format("numpy")[:]
        decided = np.isin(values["audit_action"], ["annotated", "marked"])  # the second of an earlier version
        labels, first = values["label"][decided], classes[decided, 0]
        moved = np.where(classes[decided] == labels[:, None], first[:, None], classes[decided])  # no class twice
        classes[decided], probabilities[decided] = moved, np.eye(1, classes.shape[1])
        classes[decided, 0] = labels
    for name, values in ((CLASSES, classes), (PROBABILITIES, probabilities)):
        lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        dataset = dataset.add_column(name, lists)
    return dataset


def targets_of(dataset: Dataset) -> tuple[np.ndarray, np.ndarray] | None:
    """The soft targets of a dataset, as [`top_targets`] gives them, or None if it has none."""
    if not {CLASSES, PROBABILITIES} <= set(dataset.column_names):
        return None
    columns = dataset.select_columns([CLASSES, PROBABILITIES]).with_format("numpy")[:]
    return columns[CLASSES], columns[PROBABILITIES]
