"""What became of each row of a dataset that was cleaned: a file beside it, which the next round reads."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ...common.atomic import atomic_write
from ...data.files import as_name


if TYPE_CHECKING:  # a review starts without pandas
    import pandas as pd
from ..dynamics import AUDIT_FOLDER


LINEAGE_FILE, DISAGREEMENTS_FILE = "lineage.csv", "disagreements.csv"
DECIDED = ("right", "wrong")
GONE = ("dropped", "excluded", "missing")  # actions after which a row is not in the dataset any more
LINEAGE = (
    *("index", "path", "label", "label_original", "label_score"),
    *("label_action", "annotation", "annotator", "path_original"),
)


def write_lineage(folder: str | os.PathLike, rows: Iterable[Mapping]) -> Path:
    """Write `lineage.csv`: a row per sample, also of those that are not in the dataset any more.

    Args:
        folder (`str` or `Path`): of the dataset.
        rows (`Iterable[Mapping]`): with the fields of `LINEAGE`; `path` is relative to the folder, or absolute for
            images that lie elsewhere, and empty where the sample is gone, or its image is part of the dataset.
    """
    path = Path(folder) / LINEAGE_FILE
    with atomic_write(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LINEAGE, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def is_lineage(path: str | os.PathLike) -> bool:
    """Whether a file is a lineage, also a damaged one: of people's own files one may have its name."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return b"label_action" in file.readline(10_000)


def find_lineage(run: str | os.PathLike) -> Path | None:
    """The lineage of the dataset that a run was trained on, if an audit has cleaned it."""
    saved = Path(run) / AUDIT_FOLDER / "dataset.json"
    return lineage_beside(json.loads(saved.read_text(encoding="utf-8"))) if saved.is_file() else None


def lineage_beside(options: Mapping) -> Path | None:
    """The lineage of the dataset that `dataset` and `data_dir` name, if an audit has cleaned it."""
    for name in ("dataset", "data_dir"):  # that of a table goes before that of the folder with its images
        place = Path(os.path.expanduser(options.get(name) or ""))
        if not options.get(name) or not place.exists():  # a name, as `imagefolder`
            continue
        for folder in (place, place.parent):
            if is_lineage(folder / LINEAGE_FILE):
                return folder / LINEAGE_FILE
    return None


def read_lineage(path: str | os.PathLike) -> list[dict]:
    """Rows of `lineage.csv`, with absolute paths.

    Raises:
        ValueError: if the file is no lineage.
    """
    path = Path(path)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            missing = set(LINEAGE) - set(reader.fieldnames or ())
            rows = list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is no lineage: no CSV in UTF-8 ({error}).") from error
    if missing:
        raise ValueError(
            f"{path} is no lineage of a cleaned dataset: no column {', '.join(sorted(missing))}. Restore what `hnml "
            "clean` wrote, or delete the file to ask people everything anew."
        )
    folder = os.path.abspath(path.parent)
    return [{**row, "path": os.path.join(folder, row["path"]) if row["path"] else ""} for row in rows]


def lineage_of_rows(run: str | os.PathLike, index: Iterable[int], paths: Iterable[str]) -> dict[int, dict]:
    """What earlier rounds say of the samples of a run, by sample id.

    A sample is found by the path of its image, and by its id where the image is part of the dataset.
    """
    return _rows_of(find_lineage(run), index, paths)


def is_decided(row: Mapping, label_name: str) -> bool:
    """Whether people have decided a sample in an earlier round, and its given class is still the one of then.

    Args:
        row (`Mapping`): of [`read_lineage`]; empty for a sample that is not in it.
        label_name (`str`): the given class now.
    """
    return row.get("annotation") in DECIDED and as_name(row["label"]) == as_name(label_name)


def decided_before(
    options: Mapping, index: Iterable[int], paths: Iterable[str], label_names: Iterable[str]
) -> pd.DataFrame | None:
    """Labels that people have decided in earlier rounds and that are still the given ones: right by now.

    Args:
        options: where the dataset is, as in [`lineage_beside`].
        index, paths, label_names: of its samples: id, path or empty, and given class.

    Returns:
        `pd.DataFrame` as of [`~hnml_hf.audit.review.merge_annotations`], by `index`; None where nothing was decided.
    """
    index, label_names = list(index), list(label_names)
    known = _rows_of(lineage_beside(options), index, paths)
    rows = [
        {"index": sample, "annotation": "right", "new_label_name": name, "annotator": known[sample]["annotator"]}
        for sample, name in zip(index, label_names, strict=True)
        if is_decided(known.get(sample, {}), name)
    ]
    if not rows:
        return None
    import pandas as pd

    return pd.DataFrame(rows).assign(new_label=-1).set_index("index")


def _rows_of(found: Path | None, index: Iterable[int], paths: Iterable[str]) -> dict[int, dict]:
    if found is None:
        return {}
    by_path, by_id = {}, {}
    for row in read_lineage(found):
        if row["path"]:
            by_path[row["path"]] = row
        elif row["label_action"] not in GONE and row["index"]:
            by_id[int(row["index"])] = row
    known = {}
    for sample, path in zip(index, paths, strict=True):
        before = by_path.get(os.path.abspath(path)) if path else by_id.get(int(sample))
        if before is not None:
            known[int(sample)] = before
    return known


def gone_before(run: str | os.PathLike) -> list[dict]:
    """Rows of the lineage of a run that earlier rounds have left out of the dataset."""
    found = find_lineage(run)
    return [row for row in read_lineage(found) if row["label_action"] in GONE] if found else []


def decided_samples(run: str | os.PathLike, table: pa.Table | pd.DataFrame, class_names: Sequence[str]) -> list[int]:
    """Ids of the samples that people have decided already, said to be right or wrong, not unsure: in an earlier round
    whose label they still have, or in annotations that the judge has learned from."""
    columns = table.column_names if isinstance(table, pa.Table) else table.columns
    decided: set[int] = set()
    if "annotation" not in columns and find_lineage(run) is None:
        return []
    index = np.asarray(table["index"]).tolist()
    if "annotation" in columns:
        said = np.asarray(table["annotation"]).tolist()
        decided |= {sample for sample, word in zip(index, said, strict=True) if word in DECIDED}
    if find_lineage(run) is not None:
        known = lineage_of_rows(run, index, np.asarray(table["path"]).tolist())
        given = [class_names[label] for label in np.asarray(table["label"]).tolist()]
        decided |= {
            sample for sample, name in zip(index, given, strict=True) if is_decided(known.get(sample, {}), name)
        }
    return sorted(decided)
