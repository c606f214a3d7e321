"""From raw labels, names or numbers, to class ids: one mapping for all splits, and errors that name the row."""

import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..files import first_few, is_plain
from ..schema import UNKNOWN, DataError
from .columns import RawSplit


logger = logging.getLogger(__name__)

MAX_CLASSES = 100_000  # a larger integer is an id, not a class
INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")  # with leading zeros it is a name: `01` is not `1`
DIGITS = re.compile(r"[0-9]+")
BY_NAMES = "`label_names` (`--class_names` of the scripts)"  # what errors advise
MISSING = ("", "na", "n/a", "nan", "none", "null")  # what tables write for no value, in any case
FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)


def class_names(train: Sequence[RawSplit], label_names: Sequence[str] | None = None) -> list[str]:
    """Class names in id order: the user's, those of the data, sorted names of `train`, or `0 .. max` for integers.

    Blanks around a name do not count. Where one number is written with leading zeros, all are names: `01` and `1` are
    two classes, and `01` .. `10` are ten.

    Args:
        train (`Sequence[RawSplit]`): the files of the training split.
        label_names (`Sequence[str]`, *optional*): the user's.

    Raises:
        ValueError: on names that repeat; naming the row, on labels that are missing, out of range or no classes, and
        on names beside integers.
    """
    given = label_names if label_names is not None else train[0].names
    if given is not None:
        names = list(map(str, given))
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"`label_names` must be different names, at least one; got {first_few(names)}.")
        return names
    ids: dict[int, str] = {}  # id -> where it was found first
    texts: dict[str, str] = {}
    for what in ("label", "clean label"):
        for part in train:
            for row, value in enumerate(part.label if what == "label" else part.clean or []):
                if _is_missing(value, part):
                    if what == "label":
                        raise _no_label(value, part, row)
                    continue
                label = value if part.by_name else _parse_label(value, part, row, what)
                if label == UNKNOWN and what == "clean label":
                    continue
                if isinstance(label, int) and not 0 <= label < MAX_CLASSES:
                    raise ValueError(
                        f"{part.where(row)}: {what} {label} is out of range, expected 0..{MAX_CLASSES - 1}; "
                        f"{BY_NAMES} maps other values."
                    )
                found = ids if isinstance(label, int) else texts
                if label not in found:
                    found[label] = part.where(row)
    if not texts:
        logger.info("%s: integer labels without names: classes 0..%d.", train[0].source, max(ids))
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


def encode_labels(raw: RawSplit, names: Sequence[str], split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, clean labels (-1 = unknown) and index of a split, int64 of shape `(num_rows,)` each.

    Args:
        names (`Sequence[str]`): the classes in id order.
        split (`str`): for the messages.

    Raises:
        ValueError: naming the row, on a label that is missing or none of the classes, and on an index that is no
        unique, non-negative integer.
    """
    ids = {name: label for label, name in enumerate(names)}
    # Integers of a column that has class names of its own are ids. Elsewhere they are names if some names are numbers.
    numbers = raw.names is None and any(map(DIGITS.fullmatch, names))

    def encode(value: object, row: int, what: str) -> int | None:
        if isinstance(value, str) and not raw.by_name and value not in ids:
            value = value.strip()
        if isinstance(value, str) and value in ids:
            return ids[value]
        if _is_missing(value, raw):
            return None
        label = value if raw.by_name else _parse_label(value, raw, row, what)
        if label == UNKNOWN and what != "label":
            return UNKNOWN
        if numbers and str(label) in ids:
            return ids[str(label)]
        if numbers or isinstance(label, str):
            raise DataError(
                f"{raw.where(row)}: {what} {label!r} of {split} is none of the {len(names)} classes: "
                f"{first_few(names)}."
            )
        if not 0 <= label < len(names):
            raise DataError(
                f"{raw.where(row)}: {what} {label} of {split} is out of range, expected 0..{len(names) - 1}."
            )
        return label

    labels = np.empty(len(raw.label), dtype=np.int64)
    for row, value in enumerate(raw.label):
        label = encode(value, row, "label")
        if label is None:
            raise _no_label(value, raw, row)
        labels[row] = label
    clean_labels = np.full(len(labels), UNKNOWN)
    for row, value in enumerate(raw.clean or []):
        label = encode(value, row, "clean label")
        clean_labels[row] = UNKNOWN if label is None else label
    return labels, clean_labels, _encode_index(raw)


def _parse_label(value: object, raw: RawSplit, row: int, what: str) -> str | int:
    """A raw label as class name or as id (also an id written as text); errors for what cannot be a class."""
    value = value.strip() if isinstance(value, str) else value
    if isinstance(value, str) and not FLOAT.fullmatch(value):
        if not is_plain(value):
            raise ValueError(f"{raw.where(row)}: {what} {value[:80]!r} has control characters or is no text.")
        return int(value) if INTEGER.fullmatch(value) else value
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise ValueError(
        f"{raw.where(row)}: {what} {str(value)[:80]!r} is not a class: labels are integers or class names."
    )


def _is_missing(value: object, raw: RawSplit) -> bool:
    if isinstance(value, str):
        return not raw.by_name and value.strip().lower() in MISSING
    return value is None or (isinstance(value, float) and np.isnan(value))


def _no_label(value: object, raw: RawSplit, row: int) -> ValueError:
    text = isinstance(value, str) and value.strip()
    said = f" ({value!r} means that, unless it is one of the {BY_NAMES})" if text else ""
    return ValueError(f"{raw.where(row)}: the label is missing{said}; fill it in, or leave the row out.")


def _encode_index(raw: RawSplit) -> np.ndarray:
    if raw.index is None:
        return np.arange(len(raw.label))
    index = np.empty(len(raw.index), dtype=np.int64)
    for row, value in enumerate(raw.index):
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}", str(value).strip()):
            raise ValueError(f"{raw.where(row)}: the index {value!r} is not a non-negative integer.")
        index[row] = int(value)
    order = np.argsort(index, kind="stable")
    twins = np.flatnonzero(index[order][1:] == index[order][:-1])
    if len(twins):
        first, second = order[twins[0]], order[twins[0] + 1]
        raise ValueError(f"{raw.where(second)}: the index {index[first]} is also that of {raw.where(first)}.")
    return index


def encode_weights(raw: RawSplit) -> np.ndarray:
    """Weights of a split, float64 of shape `(num_rows,)`; 1 where there is no such column.

    Raises:
        ValueError: naming the row, on what is no number.
    """
    weights = np.ones(len(raw.label))
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
