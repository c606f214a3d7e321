"""Which columns of somebody's data hold what, and their content before labels become class ids."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


logger = logging.getLogger(__name__)

# Looked for in this order where the user names no column.
IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "image_path", "path")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


@dataclass
class ColumnOptions:
    """Which columns hold what; `None` = look for a usual name.

    Args:
        image_column: `image`, `img`, `file_name`, ... : an image, or a path relative to the table (or to `data_dir`).
        label_column: the given, possibly noisy label.
        clean_label_column: the true label where it is known (`clean_label` if there is such a column; empty or -1 =
            unknown).
        index_column: a unique integer per row (`index` if there is such a column, else the row position).
        test_label_column: the label of the validation and test split, where it has another name than in `train`.
        weight_column: how far each label of `train` is believed, from 0 to 1 (`weight` of a dataset that an audit
            cleaned).
    """

    image_column: str | None = None
    label_column: str | None = None
    clean_label_column: str | None = None
    index_column: str | None = None
    test_label_column: str | None = None
    weight_column: str | None = None

    def pick(self, names: Sequence[str], split: str, source: str) -> dict[str, str]:
        """Find the column of each role among those of a table.

        Args:
            names: the columns that there are.
            split: ours, `train`, `validation` or `test`.
            source: names the table for a message.

        Returns:
            `dict[str, str]`: column of `image` and `label`, and of `clean`, `index` and `weight` where there is one.

        Raises:
            ValueError: if there is no such column.
        """
        evaluation = split != "train"
        picked = {"image": _find(names, self.image_column, IMAGE_COLUMNS, "image", source)}
        if evaluation and self.test_label_column is not None:
            picked["label"] = picked["clean"] = _find(names, self.test_label_column, (), "label", source)
        elif evaluation and self.label_column not in (None, *names) and self.clean_label_column in names:
            # Sets with a noisy column in `train` usually have only the clean one elsewhere.
            logger.info(
                "%s: no column `%s`, labels are taken from `%s`.", source, self.label_column, self.clean_label_column
            )
            picked["label"] = picked["clean"] = self.clean_label_column
        else:
            picked["label"] = _find(names, self.label_column, LABEL_COLUMNS, "label", source)
            if self.clean_label_column is not None and (self.clean_label_column in names or not evaluation):
                picked["clean"] = _find(names, self.clean_label_column, (), "clean label", source)
            elif self.clean_label_column is None and "clean_label" in names:
                picked["clean"] = "clean_label"
        if self.index_column is not None:
            picked["index"] = _find(names, self.index_column, (), "index", source)
        elif "index" in names:
            picked["index"] = "index"
        if self.weight_column is not None and not evaluation:
            picked["weight"] = _find(names, self.weight_column, (), "weight", source)
        elif {"weight", "audit_action"} <= set(names) and not evaluation:  # not any `weight`: it may be one in kg
            logger.warning("%s: labels count as far as the column `weight` says.", source)
            picked["weight"] = "weight"
        return picked


def _find(names: Sequence[str], wanted: str | None, usual: Sequence[str], role: str, source: str) -> str:
    candidates = usual if wanted is None else (wanted,)
    for name in candidates:
        if name in names:
            return name
    raise ValueError(
        f"{source}: no {role} column `{'`, `'.join(candidates)}`. The columns are: {', '.join(map(str, names))}. "
        f"Name the right one with `{role.replace(' ', '_')}_column`"
        + (" (`test_label_column` for validation and test)." if role == "label" else ".")
    )


@dataclass
class RawSplit:
    """The columns of one split, or of one of its files, as they were read.

    Args:
        images: paths below the root, or an iterable over embedded images.
        label: raw values, one a row.
        where: names a row for a message.
        clean, index, weight: raw values, or `None` where there is no such column.
        names: class names that came with the data, or `None`.
        source: the file or folder.
        lines: the line of each row in it.
        by_name: a label is a class name even if it is made of digits (class folders).
    """

    images: list
    label: list
    where: Callable[[int], str]
    clean: list | None = None
    index: list | None = None
    weight: list | None = None
    names: list[str] | None = None
    source: str = ""
    lines: np.ndarray | None = None
    by_name: bool = False
