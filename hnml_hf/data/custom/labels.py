"""From raw labels, names or numbers, to class ids: one mapping for all splits, and errors that name the row.

Names belong to each column of each file. An id of a column with names of its own stands for its name there, and only
this name is looked up among the classes.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np

from ...common.words import counted
from ..files import as_name, first_few, is_plain
from ..schema import UNKNOWN, DataError
from .columns import NO_COLUMN, RawSplit


logger = logging.getLogger(__name__)

MAX_CLASSES = 100_000  # a larger integer is an id, not a class
GAPS = 10  # times as many classes as integers that are there, from which on these seem no numbers of classes
INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")  # with leading zeros it is a name: `01` is not `1`
DIGITS = re.compile(r"[0-9]+")
BY_NAMES = "`label_names` (`--class_names` of the scripts)"  # what errors advise
WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]{0,17}))\.0*")  # `3.0`, as pandas writes 3 in a column with empty cells
BOOLEANS = {"true": True, "false": False}
MISSING = ("", "na", "n/a", "nan", "none", "null", "<na>", "#n/a")  # what tables write for no value, in any case
FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)


NO_INDEX = f"`index_column={NO_COLUMN}` (`--index_column {NO_COLUMN}`) ignores the column: rows are counted instead."
ROLES = {"label": "label", "clean": "clean label"}  # and what messages call them


@dataclass
class Classes:
    """The classes of a dataset.

    Args:
        names: in id order.
        renamed: names made of digits that stand for ids in the data -> the user's names.
        reordered: a source whose own names are in another order, so that ids without names are ambiguous beside it.
    """

    names: list[str]
    renamed: dict[str, str] = field(default_factory=dict)
    reordered: str = ""

    def __post_init__(self):
        ids = {name: label for label, name in enumerate(self.names)}
        self.ids = {**{digits: ids[name] for digits, name in self.renamed.items()}, **ids}
        # integers without names of their own are ids, or names where some names are numbers
        self.numbers = any(map(DIGITS.fullmatch, self.ids))


def find_classes(raw: Mapping[str, Sequence[RawSplit]], label_names: Sequence[str] | None = None) -> Classes:
    """The classes in id order: the user's, those of the data, sorted names of `train`, or `0 .. max` for integers.

    Blanks around a name do not count, nor how accents are composed. Where one number is written with leading zeros,
    all are names: `01` and `1` are two classes, and `01` .. `10` are ten.

    Args:
        raw (`dict[str, Sequence[RawSplit]]`): the files of each split.
        label_names (`Sequence[str]`, *optional*): the user's. They order names of the data, and give names to ids and
            to digits that stand for ids.

    Raises:
        ValueError: on names that repeat; naming the row, on labels that are missing, out of range or no classes, and
        on names beside integers.
    """
    if all(part.label is None for parts in raw.values() for part in parts):
        return Classes([])
    own = next((part.names[role] for role in ROLES for part in raw["train"] if role in part.names), None)
    if label_names is None and own is None:
        return Classes(_infer_names(raw["train"]))
    given = (own or ()) if label_names is None else list(map(str, label_names))
    names = list(map(as_name, given))
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"`label_names` must be different names, at least one; got {first_few(names)}.")
    renamed = {} if own is None else _digits_for(own, names)
    classes = Classes(names, renamed)
    for part in (part for parts in raw.values() for part in parts):
        for own in part.names.values():
            if [classes.ids.get(name) for name in own] != list(range(len(own))):
                classes.reordered = part.source
    return classes


def _digits_for(own: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Digits that are no names but ids -> the user's names for them; none unless that leaves no doubt.

    Counted from 0 they are the ids themselves; counted otherwise there must be as many names, and both in order.
    """
    ascending = all(map(DIGITS.fullmatch, own)) and sorted(own, key=int) == list(own)
    from_zero = list(own) == [str(label) for label in range(len(own))]
    if set(own) & set(names) or not (from_zero or (ascending and len(own) == len(names))):
        return {}
    return dict(zip(own, names, strict=False))


def _infer_names(train: Sequence[RawSplit]) -> list[str]:
    ids: dict[int, str] = {}  # id -> where it was found first
    texts: dict[str, str] = {}
    for role, what in ROLES.items():
        for part in train:
            for row, value in enumerate(getattr(part, role) or []):
                if _is_missing(value, part, role):
                    if role == "label":
                        raise _no_label(value, part, row, "train")
                    continue
                label = _parse_label(value, part, row, what)
                if label == UNKNOWN and role == "clean":
                    continue
                if isinstance(label, int) and not 0 <= label < MAX_CLASSES:
                    raise ValueError(
                        f"{part.where(row)}: {what} {label} is out of range, expected 0..{MAX_CLASSES - 1}; "
                        f"{BY_NAMES} maps other values."
                    )
                found: dict = ids if isinstance(label, int) else texts
                if label not in found:
                    found[label] = part.where(row)
    if not texts:
        logger.info("%s: integer labels without names: classes 0..%d.", train[0].source, max(ids))
        if max(ids) + 1 > GAPS * len(ids):
            logger.warning(
                "%s: only %s between 0 and %d are given, but each is a class, which takes time and memory. "
                "Number the classes from 0 on, or write names instead of integers.",
                *(train[0].source, counted(len(ids), "label"), max(ids)),
            )
        return [str(label) for label in range(max(ids) + 1)]
    if ids and all(map(DIGITS.fullmatch, texts)):
        texts.update({str(label): where for label, where in ids.items()})
    elif ids:
        number, text = next(iter(ids)), next(iter(texts))
        raise ValueError(
            f"{texts[text]}: the label {text!r} is a name, that of {ids[number]} the integer {number}; pass "
            f"{BY_NAMES}."
        )
    names = sorted(texts)
    logger.info("%s: %d classes in sorted order: %s.", train[0].source, len(names), ", ".join(names))
    return names


def encode_labels(raw: RawSplit, classes: Classes, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, clean labels and index of a split, int64 of shape `(num_rows,)` each; -1 is unknown, as are all labels
    where none are read.

    Args:
        classes (`Classes`): of the dataset.
        split (`str`): for the messages.

    Raises:
        ValueError: naming the row, on a label that is missing or none of the classes, and on an index that is no
        unique, non-negative integer.
    """
    labels = np.full(len(raw), UNKNOWN)
    for row, value in enumerate(raw.label or []):
        label = _encode(value, raw, row, "label", classes, split)
        if label is None:
            raise _no_label(value, raw, row, split)
        labels[row] = label
    clean_labels = np.full(len(labels), UNKNOWN)
    for row, value in enumerate(raw.clean or []):
        label = _encode(value, raw, row, "clean", classes, split)
        clean_labels[row] = UNKNOWN if label is None else label
    return labels, clean_labels, _encode_index(raw)


def _encode(value: object, raw: RawSplit, row: int, role: str, classes: Classes, split: str) -> int | None:
    """The id of a raw value; `None` for a missing one."""
    what, ids = ROLES[role], classes.ids
    named = role in raw.names
    if isinstance(value, str):
        value = value if value in ids else as_name(value)
        if value in ids:
            return ids[value]
    if _is_missing(value, raw, role):
        return None
    if isinstance(value, bool) and str(value) in ids:
        return ids[str(value)]
    label = value if named and isinstance(value, str) else _parse_label(value, raw, row, what)
    if label == UNKNOWN and role == "clean":
        return UNKNOWN
    if named and isinstance(label, int):
        raise DataError(
            f"{raw.where(row)}: {what} {label} of {split} is out of range, expected 0..{len(raw.names[role]) - 1}."
            + _or_leave_out(split)
        )
    if classes.numbers and str(label).lower() in BOOLEANS:
        label = int(BOOLEANS[str(label).lower()])
    if classes.numbers and str(label) in ids:
        return ids[str(label)]
    if classes.numbers or isinstance(label, str):
        raise DataError(
            f"{raw.where(row)}: {what} {label!r} of {split} is none of the {counted(len(classes.names), 'class')}: "
            f"{first_few(classes.names)}. {BY_NAMES} gives all of them." + _or_leave_out(split)
        )
    if classes.reordered:
        raise DataError(
            f"{raw.where(row)}: {what} {label} of {split} is an id without a name, and those of {classes.reordered} "
            f"have names in another order than the classes ({first_few(classes.names)}): which one counts is not "
            "known. Write names instead of ids, or give all files the same `ClassLabel`."
        )
    if not 0 <= label < len(classes.names):
        raise DataError(
            f"{raw.where(row)}: {what} {label} of {split} is out of range, expected 0..{len(classes.names) - 1}."
            + _or_leave_out(split)
        )
    return label


def _or_leave_out(split: str) -> str:
    return "" if split == "train" else " A split whose labels are not known is left out by `splits`."


def _parse_label(value: object, raw: RawSplit, row: int, what: str) -> str | int:
    """A raw label as class name or as id (also an id written as text); errors for what cannot be a class."""
    value = as_name(value) if isinstance(value, str) else value
    if isinstance(value, str) and (whole := WHOLE.fullmatch(value)):
        return int(whole[1])
    if isinstance(value, str) and not FLOAT.fullmatch(value):
        if not is_plain(value):
            raise ValueError(f"{raw.where(row)}: {what} {value[:80]!r} has control characters or is no text.")
        return int(value) if INTEGER.fullmatch(value) else value
    if isinstance(value, int | np.integer) or (
        isinstance(value, float | Decimal) and np.isfinite(float(value)) and value == int(value)
    ):
        return int(value)
    raise ValueError(
        f"{raw.where(row)}: {what} {str(value)[:80]!r} is not a class: labels are integers or class names."
    )


def _is_missing(value: object, raw: RawSplit, role: str) -> bool:
    if isinstance(value, str):
        return role not in raw.names and value.strip().lower() in MISSING
    return value is None or (isinstance(value, float) and np.isnan(value))


def _no_label(value: object, raw: RawSplit, row: int, split: str) -> ValueError:
    text = isinstance(value, str) and value.strip()
    said = f" ({value!r} means that, unless it is one of the {BY_NAMES})" if text else ""
    return ValueError(
        f"{raw.where(row)}: the label is missing{said}; fill it in, or leave the row out." + _or_leave_out(split)
    )


def _encode_index(raw: RawSplit) -> np.ndarray:
    if raw.index is None:
        return np.arange(len(raw))
    index = np.empty(len(raw.index), dtype=np.int64)
    for row, value in enumerate(raw.index):
        found = None if isinstance(value, bool) else re.fullmatch(r"([0-9]{1,18})(\.0*)?", str(value).strip())
        if found is None:
            raise ValueError(f"{raw.where(row)}: the index {value!r} is not a non-negative integer. {NO_INDEX}")
        index[row] = int(found[1])
    order = np.argsort(index, kind="stable")
    twins = np.flatnonzero(index[order][1:] == index[order][:-1])
    if len(twins):
        first, second = order[twins[0]], order[twins[0] + 1]
        raise ValueError(
            f"{raw.where(second)}: the index {index[first]} is also that of {raw.where(first)}. {NO_INDEX}"
        )
    return index


def encode_weights(raw: RawSplit) -> np.ndarray:
    """Weights of a split, float64 of shape `(num_rows,)`; 1 where there is no such column.

    Raises:
        ValueError: naming the row, on what is no number.
    """
    weights = np.ones(len(raw))
    for row, value in enumerate(raw.weight or []):
        try:
            weights[row] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{raw.where(row)}: the weight {value!r} is not a number.") from None
    return weights


def warn_about_splits(
    labels: Mapping[str, np.ndarray], clean_labels: Mapping[str, np.ndarray], names: Sequence[str]
) -> None:
    """Log what is allowed but rarely meant: classes whose names are nearly the same, classes that a split lacks (a
    class of the test set that training does not have cannot be learned), and validation or test labels that differ
    from the clean ones.

    Args:
        labels, clean_labels: of each split, arrays of shape `(num_rows,)`.
        names (`Sequence[str]`): the classes in id order.
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        key = name.strip().casefold()
        alike.setdefault(key.lstrip("0") if DIGITS.fullmatch(key) else key, []).append(name)
    twins = [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if twins:
        logger.warning(
            "Class names that differ in capitals, blanks or leading zeros alone, maybe one class: %s.",
            first_few(twins),
        )
    trained = set(np.unique(labels["train"]).tolist())
    untrained = [name for label, name in enumerate(names) if label not in trained]
    if untrained:
        advice = ""
        if all(map(DIGITS.fullmatch, names)):
            present = ", ".join(f'"{names[label]}"' for label in sorted(trained)[:3])
            advice = f" Give the classes that there are by {BY_NAMES}, such as [{present}]."
        logger.warning(
            "%d of %d classes have no row in train: %s.%s", len(untrained), len(names), first_few(untrained), advice
        )
    for split in (split for split in labels if split != "train"):
        found = set(np.unique(labels[split]).tolist())
        for difference, text in (
            (found - trained, "%s has classes without a row in train: %s."),
            (trained - found, "%s lacks classes of train: %s."),
        ):
            if difference:
                logger.warning(text, split, first_few(names[i] for i in sorted(difference)))
        wrong = (clean_labels[split] != UNKNOWN) & (labels[split] != clean_labels[split])
        if wrong.any():
            logger.warning(
                "%s: %d of %d labels differ from the clean label: scores on this split measure the noise too. "
                "Name the clean column with `test_label_column`.",
                split,
                wrong.sum(),
                len(wrong),
            )
