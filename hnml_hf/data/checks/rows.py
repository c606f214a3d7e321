"""A split as arrays: what is found out about each of its rows, and which rows share something."""

from collections import Counter
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset

from ..schema import COLUMNS


MISSING = np.iinfo(np.int64).min  # stands for an empty cell of an integer column


class SplitRows:
    """One split: its columns as arrays, and what was found out about each row."""

    def __init__(self, name: str, dataset: Dataset):
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"The split {name!r} lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)}. Load it "
                "with `load_noisy_dataset`."
            )
        if not isinstance(dataset.features["label"], ClassLabel):
            raise ValueError(f"`label` of the split {name!r} must be a ClassLabel, got {dataset.features['label']}.")
        self.name = name
        self.class_names = dataset.features["label"].names
        self.images = dataset.select_columns(["image"]).with_format(None)
        self.images = self.images.cast_column("image", datasets.Image(decode=False))
        self.index = _integer_column(dataset, "index")
        self.labels = _integer_column(dataset, "label")
        self.clean_labels = _integer_column(dataset, "clean_label")
        self.digests = np.zeros(len(dataset), dtype=np.uint64)
        self.sizes = np.zeros((len(dataset), 2), dtype=np.int32)  # width, height
        self.good = np.zeros(len(dataset), dtype=bool)
        self.modes = Counter()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def stage(self) -> int:
        """0 for training, 1 for validation, 2 for test splits, by name."""
        return 2 if "test" in self.name else 1 if "val" in self.name else 0

    def in_range(self, labels: np.ndarray) -> np.ndarray:
        return (labels >= 0) & (labels < len(self.class_names))

    def describe(self, row: int, reason: str | None = None) -> dict:
        """The entry of a row in the report."""
        path = (self.images[int(row)]["image"] or {}).get("path")
        label = int(self.labels[row])
        entry = {"split": self.name, "index": int(self.index[row]), "path": path}
        entry["label"] = None if label == MISSING else label
        return entry if reason is None else {**entry, "reason": reason}


def _integer_column(dataset: Dataset, name: str) -> np.ndarray:
    """A column in the order of the rows, int64, with `MISSING` for empty cells."""
    cells = dataset.data.column(name)
    if not pa.types.is_integer(cells.type):
        raise ValueError(f"`{name}` must hold integers, got {dataset.features[name]}.")
    values = cells.cast("int64").fill_null(MISSING).to_numpy()
    return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]


def groups(keys: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows, ascending, that share a key with another row."""
    order = rows[np.argsort(keys[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    bounds = np.concatenate([[0], cuts, [len(order)]])
    for group in np.flatnonzero(np.diff(bounds) > 1):
        yield order[bounds[group] : bounds[group + 1]]
