"""Which columns of somebody's data hold what, and their content before labels become class ids."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import ClassLabel

from ..files import as_name, first_few
from ..published.builder import ParquetImages
from ..splits import SPLITS


logger = logging.getLogger(__name__)

# Looked for in this order where the user names no column.
IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "image_path", "path")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
# of datasets that an audit cleaned, whose other column tells theirs from one in kg: parquet and Arrow, tables
WEIGHT_COLUMNS = (("weight", "audit_action"), ("label_weight", "label_action"))
# heeded where their values are names of splits, also as the last word of a longer name, as `data_split`
SPLIT_COLUMNS = ("split", "subset", "partition", "set", "dataset", "phase", "fold", "usage")
SPLIT_FLAG = re.compile(r"is_?(train|val|valid|test)(ing|idation)?", re.IGNORECASE)  # true for the rows of one split
SPLIT_NAMES = {name: ours for ours, usual in SPLITS.items() for name in usual}
NO_COLUMN = "none"  # what a user says of a column with a usual name that holds something else


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
        weight_column: the confidence in each label of `train`, from 0 to 1 (`weight` of a dataset that an audit
            cleaned, `label_weight` of such a table).
        split_column: the split of each row (`split`, `subset`, `partition`, `set`, `dataset`, `phase`, `fold`,
            `usage` or a name that ends with one of these, as `data_split`, if its values are such names).
        labels: whether labels are read at all; without them all are unknown.

    `clean_label_column`, `index_column`, `weight_column` and `split_column` may be `none`: a column of the usual name
    means something else.
    """

    image_column: str | None = None
    label_column: str | None = None
    clean_label_column: str | None = None
    index_column: str | None = None
    test_label_column: str | None = None
    weight_column: str | None = None
    split_column: str | None = None
    labels: bool = True

    @property
    def splits_by_column(self) -> bool:
        """Whether the user named a column of splits; `splits` then maps to its values, not to files."""
        return self.split_column not in (None, NO_COLUMN)

    def pick(self, names: Sequence[str], split: str, source: str) -> dict[str, str]:
        """Find the column of each role among those of a table.

        Args:
            names: the columns that there are.
            split: ours, `train`, `validation` or `test`.
            source: names the table for a message.

        Returns:
            `dict[str, str]`: column of `image` and, if labels are read, `label`; and of `clean`, `index`, `weight` and
            `split` where there is one (`split 1` and so on, where several are called so).

        Raises:
            ValueError: if there is no such column.
        """
        return {
            "image": _find(names, self.image_column, IMAGE_COLUMNS, "image", source),
            **(self._labels(names, split, source) if self.labels else {}),
            **self._optional(names, split, source),
        }

    def _labels(self, names: Sequence[str], split: str, source: str) -> dict[str, str]:
        evaluation, picked = split != "train", {}
        if evaluation and self.test_label_column is not None:
            picked["label"] = picked["clean"] = _find(names, self.test_label_column, (), "label", source)
        elif evaluation and self.label_column not in (None, *names) and self.clean_label_column in names:
            # Sets with a noisy column in `train` usually have only the clean one elsewhere.
            logger.info(
                "%s: no column `%s`, labels are taken from `%s`.", source, self.label_column, self.clean_label_column
            )
            picked["label"] = picked["clean"] = str(self.clean_label_column)
        else:
            picked["label"] = _find(names, self.label_column, LABEL_COLUMNS, "label", source)
            clean = self.clean_label_column
            if clean not in (None, NO_COLUMN) and (clean in names or not evaluation):
                picked["clean"] = _find(names, clean, (), "clean label", source)
            elif clean is None and "clean_label" in names:
                picked["clean"] = "clean_label"
        return picked

    def _optional(self, names: Sequence[str], split: str, source: str) -> dict[str, str]:
        usual = {"index": [name for name in ("index",) if name in names]}
        if self.weight_column is None and split == "train":
            usual["weight"] = [weight for weight, action in WEIGHT_COLUMNS if {weight, action} <= set(names)][:1]
            for weight in usual["weight"]:
                logger.warning("%s: labels count as far as the column `%s` says.", source, weight)
        picked = {}
        for role in ("index", "weight", "split"):
            wanted = getattr(self, f"{role}_column")
            if wanted is None and usual.get(role):
                picked[role] = usual[role][0]
            elif wanted not in (None, NO_COLUMN) and not (role == "weight" and split != "train"):
                picked[role] = _find(names, wanted, (), role, source)
        if self.split_column is None:
            named = {self.image_column, self.label_column, self.clean_label_column, self.test_label_column}
            called = [name for name in names if name not in named and _last_word(name) in SPLIT_COLUMNS]
            called.sort(key=lambda name: SPLIT_COLUMNS.index(_last_word(name)))
            picked |= {f"split {number}" if number else "split": name for number, name in enumerate(called)}
            for name in filter(SPLIT_FLAG.fullmatch, map(str, names)):
                logger.warning(
                    "%s: the column `%s` is not read. If it tells splits apart, `split_column` and `splits` say how: "
                    '`--split_column %s --splits \'{"train": "...", "validation": "..."}\'`, with its values.',
                    *(source, name, name),
                )
        return picked

    def warn_of_splits(
        self, names: Sequence[str], picked: Mapping[str, str], distinct: Callable[[str], Iterable], source: str
    ):
        """Say of columns without a role that their values are names of splits.

        Args:
            names: the columns that there are.
            picked: of [`~ColumnOptions.pick`].
            distinct: the different values of a column; none if it cannot be one of splits.
            source: names the table for a message.
        """
        if self.split_column is not None or any(role.split()[0] == "split" for role in picked):
            return
        for name in names:
            found = set() if name in picked.values() else {split_of(value) for value in distinct(name)}
            if "train" in found and len(found) > 1 and None not in found:
                logger.warning(
                    "%s: the column `%s` holds names of splits, but no split is read from it. `--split_column %s` "
                    "divides the rows by it; `--split_column none` says that it means something else.",
                    *(source, name, name),
                )


def split_of(value: object) -> str | None:
    """Our name of the split that a value names, or `None`."""
    return SPLIT_NAMES.get(as_name(value).lower()) if isinstance(value, str) else None


def _last_word(name: object) -> str:
    return re.split(r"[\W_]", str(name).lower())[-1]


def _find(names: Sequence[str], wanted: str | None, usual: Sequence[str], role: str, source: str) -> str:
    candidates = usual if wanted is None else (wanted,)
    for name in candidates:
        if name in names:
            return name
    raise ValueError(
        f"{source}: no {role} column `{'`, `'.join(candidates)}`. The columns are: {', '.join(map(str, names))}. "
        f"Name the right one with `{role.replace(' ', '_')}_column`"
        + (
            " (`test_label_column` for validation and test), or leave a split without labels out by `splits`."
            if role == "label"
            else "."
        )
    )


def named(values: dict[str, list], features: Mapping[str, object], picked: Mapping[str, str]) -> dict:
    """The arguments `label`, `clean`, `split` and `names` of a [`RawSplit`]: ids of a column that has names of its own
    (`ClassLabel`) become these names; an id that it lacks stays a number.

    Args:
        values: role -> raw values.
        features: column -> its feature.
        picked: role -> column.
    """
    found, own = dict(values), {}
    for role, column in picked.items():
        feature = features.get(column)
        if role in found and isinstance(feature, ClassLabel):
            names = own[role] = list(map(as_name, feature.names))
            found[role] = [
                names[value] if value is not None and 0 <= value < len(names) else value for value in found[role]
            ]
    return {
        "label": found.get("label"),
        "clean": found.get("clean"),
        "split": split_values(found),
        "names": {role: own[role] for role in ("label", "clean") if role in own},
    }


def split_values(values: Mapping[str, list]) -> list | None:
    """The values of the column of the splits: of several that are called so, the first whose values are such names."""
    columns = [column for role, column in values.items() if role.split()[0] == "split"]
    said = (column for column in columns if any(split_of(value) for value in set(map(str, column))))
    return next(said, columns[0] if columns else None)


@dataclass
class RawSplit:
    """The columns of one split, or of one of its files, as they were read.

    Args:
        images: paths below the root, or an iterable over embedded images.
        where: names a row for a message.
        label, clean, index, weight, split: raw values, one a row, or `None` where there is no such column.
        names: `label` or `clean` -> the class names of that column, where it has names of its own; its values are
            these names, even if they are made of digits (class folders, `ClassLabel`).
        source: the file or folder.
        lines: the line of each row in it.
    """

    images: Any  # a list, or `ParquetImages`
    label: list | None
    where: Callable[[int], str]
    clean: list | None = None
    index: list | None = None
    weight: list | None = None
    split: Any = None
    names: dict[str, Sequence[str]] = field(default_factory=dict)
    source: str = ""
    lines: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images.rows if isinstance(self.images, ParquetImages) else self.images)  # type: ignore[arg-type]

    def select(self, rows: Sequence[int] | np.ndarray) -> "RawSplit":
        """Some of the rows."""

        def some(values: list | None) -> list | None:
            return None if values is None else [values[row] for row in rows]

        embedded = isinstance(self.images, ParquetImages)
        return replace(
            self,
            images=replace(self.images, rows=np.asarray(rows)) if embedded else some(self.images),
            label=some(self.label),
            where=lambda row: self.where(int(rows[row])),
            clean=some(self.clean),
            index=some(self.index),
            weight=some(self.weight),
            split=some(self.split),
            lines=None if self.lines is None else self.lines[np.asarray(rows)],
        )


def divide(
    raw: RawSplit, split: str, columns: ColumnOptions, names: Mapping[str, str] | None, *, alone: bool
) -> dict[str, np.ndarray]:
    """Which rows of a file go to which split, by the column that says so.

    Args:
        raw (`RawSplit`): the file, with values in `split`.
        split (`str`): of the file, by its name or folder.
        columns (`ColumnOptions`): whether the user named the column; it then decides for all files.
        names (`dict[str, str]`, *optional*): our split name -> the value of a column that the user named; rows of
            other values are left out. Default: the usual names.
        alone (`bool`): whether no other split has a file.

    Returns:
        `dict[str, np.ndarray]`: rows of each split that has some, ascending.

    Raises:
        ValueError: naming the row, for a value that is no split, or contradicts the name of the file.
    """
    asked = columns.splits_by_column
    values = [as_name(str(value)) for value in raw.split]
    known = {text: SPLIT_NAMES.get(text.lower(), "") for text in set(values)}
    if asked and names:
        given = {as_name(name): ours for ours, name in names.items()}
        known = {text: given.get(text, "") for text in known}
    elif not asked and not any(known.values()):  # a column that happens to be called so
        return {split: np.arange(len(values))}
    found = np.array([known[value] for value in values])
    wrong = found != split if not asked and not alone else found == ""
    if asked and names:
        if wrong.any():
            left_out = first_few(sorted(text for text in known if not known[text]))
            logger.warning("%s: %d rows of no split, left out: %s.", raw.source, wrong.sum(), left_out)
    elif wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{raw.where(row)}: the column of the splits says {raw.split[row]!r}, "
            + (f"but the file is the split {split}. " if found[row] else "which is none. ")
            + "`split_column` (`--split_column NAME`) lets the column decide, with `splits` for values of other "
            f'names, as `--splits \'{{"train": "a", "test": "b"}}\'`; `--split_column {NO_COLUMN}` ignores it.'
        )
    rows = {ours: np.flatnonzero(found == ours) for ours in SPLITS if (found == ours).any()}
    if list(rows) != [split]:
        counts = ", ".join(f"{len(which)} {ours}" for ours, which in rows.items())
        logger.warning("%s: rows go to the splits that a column says: %s.", raw.source, counts)
    return rows
