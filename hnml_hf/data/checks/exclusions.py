"""The list of rows that training should leave out."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict

from ...common.atomic import atomic_write
from ...common.words import counted
from ..schema import column, image_paths
from .images import IMAGE_DEFECTS
from .report import LABEL_DEFECTS


logger = logging.getLogger(__name__)


class Reason(str):
    """Why a list leaves a row out, with the path of the image there (or an empty one), and the place of the line."""

    path: str
    place: str

    def __new__(cls, text: str, path: str = "", place: str = ""):
        reason = super().__new__(cls, text)
        reason.path, reason.place = path, place
        return reason


def save_exclusions(path: str | os.PathLike, report: dict) -> int:
    """Write the rows that training should leave out, one JSON object a line: split, index, reason, path.

    These are rows with a bad image or label, all rows of conflicting duplicates (at most one of their labels is
    right), and of images shared by splits the rows of the earlier stage (training before validation before test).
    Sample ids given twice are not in it: an id that names two rows cannot say which one to leave out.

    Returns:
        `int`: number of rows.
    """
    rows: dict[tuple[str, int], dict] = {}

    def add(row: dict, reason: str) -> None:
        entry = rows.setdefault((row["split"], row["index"]), {"reasons": [], "path": row["path"]})
        entry["reasons"].append(reason)

    defects = report["defects"]
    for kind in (*IMAGE_DEFECTS, *LABEL_DEFECTS):
        for entry in defects[kind]:
            add(entry, f"{kind}: {entry['reason']}")
    for entry in defects["conflicting_duplicates"]:
        for row in entry["rows"]:
            add(row, f"conflicting_duplicates: equal to index {', '.join(str(r['index']) for r in entry['rows'])}")
    for entry in defects["split_overlap"]:
        for row in entry["rows"]:
            if row["split"] == entry["splits"][0]:
                add(row, f"split_overlap: also in {entry['splits'][1]}")
    with (
        atomic_write(path) as unfinished,
        open(unfinished, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        for (split, index), entry in rows.items():
            reason = "; ".join(dict.fromkeys(entry["reasons"]))
            line = {"split": split, "index": index, "reason": reason, "path": entry["path"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return len(rows)


def load_exclusions(path: str | os.PathLike) -> dict[str, dict[int, str]]:
    """Read an exclusion list. Lines may be deleted or added by hand; `split` and `index` are needed.

    Args:
        path (`str` or `Path`): of the list.

    Returns:
        `dict[str, dict[int, str]]`: split -> index -> reason, which also knows the `path` of the image in the list,
        so that [`apply_exclusions`] can compare it.

    Raises:
        ValueError: naming file and line, for a line that is no such object.
    """
    exclusions: dict[str, dict[int, str]] = {}
    for row in exclusion_rows(path):
        reason = Reason(row["reason"], row["path"], f"{path}:{row['line']}")
        exclusions.setdefault(row["split"], {})[row["index"]] = reason
    return exclusions


def check_same_image(place: str, index: int, listed: str, known: str):
    """Refuse a line whose index is that of another image, as after files have come or gone: it would leave out the
    wrong one. The last folder and the name are compared, since a dataset may have been moved as a whole; of a line
    with a bare name the name. An empty path is not known, and fits.

    Raises:
        ValueError: naming the `place` of the line and both paths.
    """
    last = Path(listed).parts[-2:]
    if listed and known and Path(known).parts[-len(last) :] != last:
        raise ValueError(
            f"{place}: sample {index} is {listed} there, and {known} in the dataset. Was the list made for another "
            "dataset, or another version of it? Make the list again."
        )


def exclusion_rows(path: str | os.PathLike) -> Iterator[dict]:
    """The lines of an exclusion list, with `split`, `index`, `reason` and `path`, the last two empty where a line has
    none, and its number as `line`; errors of [`load_exclusions`]."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _parse_row(line)
            except ValueError as error:
                raise ValueError(
                    f'{path}:{number}: {error}. An exclusion list has lines like {{"split": "train", "index": 17, '
                    '"reason": "truncated"}; write it with `hnml check`.'
                ) from error
            yield {**row, "line": number}


def _parse_row(line: bytes) -> dict:
    """`split`, `index`, `reason` and `path` of a line; `ValueError` with the reason, for a line that is no such
    object."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of text, of JSON, of numbers with thousands of digits
        raise ValueError("the line is not JSON in UTF-8") from error
    if not isinstance(row, dict):
        raise ValueError("the line is no JSON object")
    missing = [f"`{name}`" for name in ("split", "index") if name not in row]
    if missing:
        raise ValueError(f"the line has no {' and no '.join(missing)}")
    if not isinstance(row["split"], str):
        raise ValueError("`split` must be the name of a split, in quotes")
    if type(row["index"]) is not int or not 0 <= row["index"] < 2**63:
        raise ValueError("`index` must be a sample id: an integer from 0 to 2^63 - 1, without quotes")
    return {
        **{name: row[name] for name in ("split", "index")},
        **{name: str(row.get(name) or "") for name in ("reason", "path")},
    }


def apply_exclusions(dataset: DatasetDict, exclusions: Mapping[str, Mapping[int, str]]) -> DatasetDict:
    """Leave the listed rows out; they are not replaced, and the ids of the others do not change.

    Apply saved synthetic noise first: it belongs to the whole dataset.

    Args:
        dataset (`datasets.DatasetDict`): with the feature `index`.
        exclusions (`dict`): from `load_exclusions`; of plain reasons without paths the ids alone are checked.

    Returns:
        `datasets.DatasetDict`: the same splits, as views.

    Raises:
        ValueError: if a split or id of the list does not exist, an id is that of another image, or nothing would be
            left of a split.
    """
    unknown = sorted(set(exclusions) - set(dataset))
    if unknown:
        raise ValueError(
            f"The exclusion list names the splits {', '.join(unknown)}; the dataset has {', '.join(dataset)}. Was it "
            "made for another dataset?"
        )
    kept = DatasetDict(dataset)
    for split, rows in exclusions.items():
        index = column(dataset[split], "index")
        listed = np.array(sorted(rows), dtype=np.int64)
        absent = np.setdiff1d(listed, index)
        if len(absent):
            raise ValueError(
                f"Of {counted(len(listed), 'row')} that the exclusion list names, the split {split!r} lacks "
                f"{len(absent):,}; the first missing id is {absent[0]}. Was the list made for another dataset, or "
                "another version of it? Make the list again."
            )
        _check_same_images(dataset[split], index, rows)
        keep = np.flatnonzero(~np.isin(index, listed))
        if not len(keep):
            raise ValueError(f"The exclusion list leaves no row of the split {split!r}.")
        kept[split] = dataset[split].select(keep)
        left_out = len(index) - len(keep)
        logger.warning(f"Exclusion list: {left_out:,} of {counted(len(index), 'row')} of {split!r} left out.")
    return kept


def _check_same_images(split: Dataset, index: np.ndarray, rows: Mapping[int, str]):
    """Compare the images of a list with those of a split, by [`check_same_image`]."""
    reasons = {number: reason for number, reason in rows.items() if isinstance(reason, Reason) and reason.path}
    at = np.flatnonzero(np.isin(index, list(reasons)))
    at = at[np.argsort(index[at], kind="stable")]
    for number, known in zip(index[at].tolist(), image_paths(split.select(at)), strict=True):
        check_same_image(reasons[number].place, number, reasons[number].path, known)
