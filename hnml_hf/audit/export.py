"""The scores in the formats of other tools: spreadsheets, cleanlab, FiftyOne, Datumaro, Label Studio, CVAT."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, Image

from .exchange import write_cvat, write_label_studio
from .findings import probably_wrong
from .table import check_unchanged


FORMATS = ("csv", "cleanlab", "fiftyone", "datumaro", "label_studio", "cvat")
FEWEST = 48  # rows to look at where none is probably wrong


def export_audit(
    table: pd.DataFrame, dataset: Dataset, folder: str | os.PathLike, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write the scores for other tools into a folder.

    Args:
        table (`pd.DataFrame`): of [`audit_run`] or [`load_audit`].
        dataset (`datasets.Dataset`): that was scored.
        folder (`str` or `Path`): made if it is not there.
        formats (`Sequence[str]`): of `csv` (for a spreadsheet), `cleanlab` (columns of its `Datalab`), `fiftyone` and
            `datumaro` (all rows), `label_studio` and `cvat` (those to look at: probably wrong, or the 48 first ones).
            These four also write images that are part of the dataset.

    Returns:
        `list[Path]`: what was written, a file or a folder for each format.

    Raises:
        ValueError: on another format, or a dataset that has changed.

    Example:

        export_audit(table, dataset, "outputs/exports", ["csv", "cleanlab"])
    """
    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise ValueError(f"Formats {sorted(unknown)} are none of {', '.join(FORMATS)}.")
    check_unchanged(table, dataset)
    folder, files = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    if "csv" in formats:
        files.append(export_csv(table, folder / "noise_scores.csv"))
    if "cleanlab" in formats:
        files.append(folder / "cleanlab_issues.csv")
        cleanlab_issues(table).to_csv(files[-1])
    if {"fiftyone", "datumaro", "label_studio", "cvat"} & set(formats):
        images = export_images(dataset, table, folder / "images")
        if "fiftyone" in formats:
            files.append(export_fiftyone(table, images, folder / "fiftyone"))
        if "datumaro" in formats:
            files.append(export_datumaro(table, images, folder / "datumaro" / "annotations" / "default.json"))
        issues = _to_look_at(table, images)
        for name, write in (("label_studio", write_label_studio), ("cvat", write_cvat)):
            if name in formats:
                files.append(write(issues, {index: images[index] for index in issues["index"]}, folder / name))
    return files


def _to_look_at(table: pd.DataFrame, images: Mapping[int, str]) -> pd.DataFrame:
    """The label issues, most probably wrong first, whose images are there."""
    there = table[table["index"].isin(images.keys())].sort_values("rank")
    likely = probably_wrong(there)
    return there[likely] if likely.any() else there.head(FEWEST)


def export_csv(table: pd.DataFrame, path: str | os.PathLike) -> Path:
    """The table, most probably wrong first, for a spreadsheet."""
    safe = table.sort_values("rank").copy()
    for name in ("path", "label_name", "suggested_name"):
        safe[name] = safe[name].map(escape_formula)
    safe.to_csv(path, index=False)
    return Path(path)


def escape_formula(value: object) -> object:
    """Text that a spreadsheet would run, behind an apostrophe.

    Args:
        value (`object`): of a cell; what is no text, or harmless, is returned as it is.
    """
    risky = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if risky else value


def cleanlab_issues(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of cleanlab's `Datalab.get_issues("label")`, by `index`; in them a low score means a wrong label."""
    wrong = probably_wrong(table)
    return pd.DataFrame(
        {
            "is_label_issue": wrong,
            "label_score": 1 - table["noise_score"].to_numpy(),
            "given_label": table["label"].to_numpy(),
            "predicted_label": np.where(wrong, table["suggested_label"], table["label"]),
        },
        index=pd.Index(table["index"], name="index"),
    )


def export_images(dataset: Dataset, table: pd.DataFrame, folder: str | os.PathLike) -> dict[int, str]:
    """Absolute path of each sample's image; those that are part of the dataset are written into `folder`."""
    folder, paths = Path(folder), {}
    at = dict(zip(table["index"].tolist(), table["path"], strict=True))
    undecoded = dataset.select_columns(["image", "index"]).cast_column("image", Image(decode=False))
    for row in undecoded:
        index, path = int(row["index"]), at[int(row["index"])]
        content = row["image"]["bytes"] if row["image"] else None
        if content is None and not os.path.isfile(path or ""):
            continue  # a missing file: nothing to show
        if content is not None:  # a path beside it is a name, and may be that of some other file
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{index}{'.jpg' if content[:2] == bytes([255, 216]) else '.png'}"
            path.write_bytes(content)
        paths[index] = os.path.abspath(path)
    return paths


def export_fiftyone(table: pd.DataFrame, images: Mapping[int, str], folder: str | os.PathLike) -> Path:
    """A folder for `fiftyone.Dataset.from_dir(dataset_type=fiftyone.types.FiftyOneImageClassificationDataset)`.

    `labels.json` holds the given label of each sample, with 1 - score as confidence and the other columns as
    attributes; `data.json` says where the images are (`data_path="data.json"`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for row in table.to_dict("records"):
        if row["index"] in images:
            kept = {name: row[name] for name in ("index", "suggested_name", "noise_score", "rank")}
            labels[str(row["index"])] = {
                "label": row["label"],
                "confidence": 1 - row["noise_score"],
                "attributes": kept,
            }
    _write_json(folder / "labels.json", {"classes": table.attrs["class_names"], "labels": labels})
    _write_json(folder / "data.json", {str(index): path for index, path in images.items()})
    return folder


def export_datumaro(table: pd.DataFrame, images: Mapping[int, str], path: str | os.PathLike) -> Path:
    """A file of Datumaro's own format (`annotations/<subset>.json`): the given label of each sample with score, rank
    and suggestion as attributes. Images stay outside the folder, which Datumaro has to be told to allow."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    items = [
        {
            "id": str(row["index"]),
            "annotations": [
                {
                    "id": 0,
                    "type": "label",
                    "group": 0,
                    "label_id": row["label"],
                    "attributes": {name: row[name] for name in ("suggested_name", "noise_score", "rank")},
                }
            ],
            "image": {"path": images[row["index"]]},
        }
        for row in table.to_dict("records")
        if row["index"] in images
    ]
    names = [{"name": name, "parent": "", "attributes": []} for name in table.attrs["class_names"]]
    categories = {"label": {"labels": names, "attributes": []}}
    _write_json(
        path,
        {"dm_format_version": "1.0", "media_type": 2, "infos": {}, "categories": categories, "items": items},
    )
    return path


def _write_json(path: Path, content: object):
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
