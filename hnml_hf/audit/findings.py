"""What the features say of images besides their labels: near-duplicates, images like no other, images between classes.

All of it is read from the columns of an audit's table; no further forward pass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common.atomic import atomic_write


if TYPE_CHECKING:  # a review starts without pandas
    import pandas as pd


DUPLICATE = 0.95  # cosine of two images from which one is taken for a copy of the other (figures in docs/ablations.md)
TYPICAL = 10  # nearest images that say how common an image is
BETWEEN = 0.3  # probability from which a class counts
FENCE = 3.0  # quartile distances below the lower quartile at which an image is like no other (Tukey's far fence)
FINDINGS = {
    "near_duplicates": "copies or near-copies of an image that is kept",
    "strangers": "images that are like no other",
    "between_classes": "images with two probable classes",
    "leaks": "copies or near-copies of an image of another split",
}
LEAK = ("other_split", "other_index", "other_path", "cosine")  # what a line says of that image


def probably_wrong(table: pd.DataFrame | Mapping[str, np.ndarray], threshold: float = 0.5) -> np.ndarray:
    """Which labels count as wrong, `(n,)` bool: those whose score reaches the threshold, of samples that were seen.

    Of the others nothing is known; the noise rate of all is their score. Whatever counts label issues counts these.
    """
    likely = np.asarray(table["noise_score"]) >= threshold
    return likely & (np.asarray(table["times_seen"]) > 0) if "times_seen" in table else likely


def neighbor_columns(index: np.ndarray, nearest: np.ndarray, similarities: np.ndarray, groups: np.ndarray) -> dict:
    """Columns of the table, each of shape `(n,)`.

    Args:
        index (`np.ndarray` of shape `(n,)`): sample ids.
        nearest, similarities (`np.ndarray` of shape `(n, m)`): of [`Judgement`], rows of other groups.
        groups (`np.ndarray` of shape `(n,)`): the same number for images of the same content.

    Returns:
        `dict`: `nearest_index`, the id of the most similar other image (-1: none), `nearest_similarity`, its cosine,
        1 for the same content, and `typicality`, the mean cosine of the ten nearest.
    """
    found = np.where(nearest[:, 0] >= 0, index[nearest[:, 0]], -1)
    cosine = similarities[:, 0].astype(np.float64)
    order = np.argsort(groups, kind="stable")
    same = groups[order][1:] == groups[order][:-1]
    first, second = order[:-1][same], order[1:][same]
    for one, other in ((first, second), (second, first)):
        found[one], cosine[one] = index[other], 1.0
    there = nearest[:, :TYPICAL] >= 0
    total = np.where(there, similarities[:, :TYPICAL], 0).sum(1)
    typical = np.where(there.any(1), total / np.maximum(there.sum(1), 1), np.nan)
    return {"nearest_index": found, "nearest_similarity": cosine, "typicality": typical}


def near_duplicates(table: pd.DataFrame, threshold: float = DUPLICATE) -> pd.DataFrame:
    """Images that are nearly the same, in groups.

    Args:
        table (`pd.DataFrame`): of [`~hnml_hf.find_label_issues`].
        threshold (`float`): cosine from which two images are nearly the same. Each image is compared with the one
            most similar to it; chains are one group.

    Returns:
        `pd.DataFrame`: `index, group, keep, label_name, noise_score, path`; of a group the one with the label that is
        least probably wrong is kept. Sorted by group, the kept one first.
    """
    close = table[(table["nearest_similarity"] >= threshold) & (table["nearest_index"] >= 0)]
    from scipy.sparse import coo_array  # not for a review
    from scipy.sparse.csgraph import connected_components

    index = table["index"].to_numpy()
    order = np.argsort(index)
    place = [order[np.searchsorted(index, close[name], sorter=order)] for name in ("index", "nearest_index")]
    graph = coo_array((np.ones(len(close), bool), tuple(place)), shape=(len(table), len(table)))
    group = connected_components(graph, directed=False)[1]
    counts = np.bincount(group, minlength=1)
    found = table[["index", "label_name", "noise_score", "path"]].assign(group=group)[counts[group] > 1]
    found = found.sort_values(["group", "noise_score", "index"], ignore_index=True)
    found["group"] = found["group"].rank(method="dense").astype(np.int64) - 1
    found["keep"] = ~found["group"].duplicated()
    return found


def strangers(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the table whose image is like no other, the strangest first: by Tukey's far fence of `typicality`."""
    typical = table["typicality"]
    low, high = typical.quantile([0.25, 0.75])
    return table[typical < low - FENCE * (high - low)].sort_values("typicality")


def between_classes(table: pd.DataFrame, least: float = BETWEEN) -> pd.DataFrame:
    """Rows of the table of whose image both the given and the suggested class are probable, the least sure first."""
    weaker = table[["given_probability", "suggested_probability"]].min(axis=1)
    found = table.assign(weaker=weaker)[weaker >= least]
    return found.sort_values("weaker", ascending=False).drop(columns="weaker")


def findings(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each kind of finding that should be looked at; empty for a table without neighbors."""
    if "nearest_index" not in table:
        return {}
    copies = near_duplicates(table)
    return {
        "near_duplicates": copies[~copies["keep"]],
        "strangers": strangers(table),
        "between_classes": between_classes(table),
    }


def write_findings(folder: str | os.PathLike, found: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Write each kind as a list of rows to leave out (`near_duplicates.jsonl` and so on), in the form of
    [`~hnml_hf.load_exclusions`]: delete the lines of the rows you want to keep.

    Lists of an earlier audit are deleted. A line of [`~hnml_hf.audit.leaks.find_leaks`] also names the other split and
    the image there.
    """
    paths = []
    for kind in FINDINGS.keys() - found.keys():
        Path(folder, f"{kind}.jsonl").unlink(missing_ok=True)
    for kind, rows in found.items():
        paths.append(Path(folder, f"{kind}.jsonl"))
        with atomic_write(paths[-1]) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            listed = rows[["index", "path", *(name for name in LEAK if name in rows)]]
            for row in listed.to_dict("records"):
                line = {"split": "train", "index": row.pop("index"), "reason": FINDINGS[kind], **row}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return paths
