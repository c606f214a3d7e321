"""Acting on the scores: a person's marks, and the dataset without the labels that are probably wrong."""

import csv
import os

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, Value

from ..data.schema import column
from .table import check_unchanged, probably_wrong


MARKS = ("wrong", "right", "unsure")


def read_marks(path: str | os.PathLike, table: pd.DataFrame) -> pd.DataFrame:
    """Marks that were downloaded from the report.

    Args:
        path (`str` or `Path`): CSV with the columns `index`, `mark` (wrong, right or unsure) and `new_label` (class
            id; empty: the suggested one).
        table (`pd.DataFrame`): the scores that the report showed.

    Returns:
        `pd.DataFrame`: `mark` and `new_label`, by `index`.

    Raises:
        ValueError: naming file and line, on ids that were not scored, repeated ids, other marks or unknown classes.
    """
    suggested = dict(zip(table["index"].tolist(), table["suggested_label"].tolist(), strict=True))
    num_labels, marks = len(table.attrs["class_names"]), {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            columns, rows = reader.fieldnames or (), [(reader.line_num, row) for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: no CSV in UTF-8 ({error}).") from error
        missing = {"index", "mark", "new_label"} - set(columns)
        if missing:
            raise ValueError(
                f"{path}:1: no column {', '.join(sorted(missing))}; a file of marks comes from the report."
            )
        for line, row in rows:
            where = f"{path}:{line}"
            try:
                index = int(row["index"])
                label = suggested.get(index, -1) if row["new_label"] == "" else int(row["new_label"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: `index` and `new_label` must be integers ({error}).") from error
            if index not in suggested:
                raise ValueError(f"{where}: sample id {index} is not among the scored samples; whose marks are these?")
            if index in marks:
                raise ValueError(f"{where}: sample id {index} is marked twice.")
            if row["mark"] not in MARKS:
                raise ValueError(f"{where}: the mark {row['mark']!r} is none of {', '.join(MARKS)}.")
            if not 0 <= label < num_labels:
                raise ValueError(f"{where}: `new_label` {label} is none of the {num_labels} classes.")
            marks[index] = (row["mark"], label)
    frame = pd.DataFrame.from_dict(marks, orient="index", columns=["mark", "new_label"])
    frame.index.name = "index"
    return frame


def clean_dataset(
    dataset: Dataset,
    table: pd.DataFrame,
    *,
    how: str | None = None,
    threshold: float = 0.5,
    marks: pd.DataFrame | None = None,
) -> Dataset:
    """A dataset without the labels that are probably wrong.

    Marks of a person go first: `wrong` takes the new label, `right` and `unsure` keep the given one. On the others
    `how` acts where the score reaches the threshold. A sample that was never seen is no suspect.

    Args:
        dataset (`datasets.Dataset`): that was scored.
        table (`pd.DataFrame`): its scores, of [`audit_run`] or [`load_audit`].
        how (`str`, *optional*): `drop` the row, `relabel` it with the suggestion, or `weight`: change no row and put 1
            - score into a column `weight`; without it only marks count.
        threshold (`float`): in [0, 1].
        marks (`pd.DataFrame`, *optional*): of [`read_marks`].

    Returns:
        `datasets.Dataset`: the four features and the lineage: `original_label`, `noise_score` and `audit_action`
        (kept, marked, relabelled). `index` stays what it was. `clean_label` stays what was known.

    Raises:
        ValueError: on another `how`, neither `how` nor marks, or a dataset that has changed.
    """
    if how not in (None, "drop", "relabel", "weight"):
        raise ValueError(f"`how={how!r}` is none of drop, relabel, weight.")
    if how is None and marks is None:
        raise ValueError("Nothing to do: say `how` to clean (drop, relabel, weight), or give marks.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold={threshold}` must be between 0 and 1.")
    check_unchanged(table, dataset)
    index = column(dataset, "index")
    facts = table.set_index("index").loc[index]
    labels, score = facts["label"].to_numpy().copy(), facts["noise_score"].to_numpy()
    action = np.full(len(index), "kept", dtype=object)
    suspect = probably_wrong(facts, threshold)
    weight = 1 - score
    if marks is not None:
        marked = np.isin(index, marks.index)
        mark = marks.loc[index[marked]]
        wrong = np.flatnonzero(marked)[(mark["mark"] == "wrong").to_numpy()]
        labels[wrong] = marks.loc[index[wrong], "new_label"]
        action[marked], weight[marked], suspect = "marked", 1.0, suspect & ~marked
    if how == "relabel":
        labels[suspect] = facts["suggested_label"].to_numpy()[suspect]
        action[suspect] = "relabelled"
    feature = dataset.features["label"]
    cleaned = dataset.select_columns(["image", "label", "clean_label", "index"]).flatten_indices()
    original = column(cleaned, "label")
    cleaned = cleaned.remove_columns("label")
    for name, values, kind in (
        ("label", labels, ClassLabel(names=feature.names)),
        ("original_label", original, ClassLabel(names=feature.names)),
        ("noise_score", score, Value("float64")),
        ("audit_action", action.tolist(), Value("string")),
        *([("weight", weight, Value("float64"))] if how == "weight" else []),
    ):
        cleaned = cleaned.add_column(name, values, feature=kind)
    return cleaned.select(np.flatnonzero(~suspect)) if how == "drop" else cleaned
