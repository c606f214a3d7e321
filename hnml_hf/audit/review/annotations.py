"""What people say of given labels: files of annotations, several of them merged, and the labels that follow."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...common.atomic import atomic_write
from ...common.words import counted
from ...data.files import as_name, is_plain
from ..exchange import Samples, read_cvat, read_fiftyone_csv, read_json
from .matching import TAKE_ALONG, Scored, describe_lost, is_at, match_annotations


if TYPE_CHECKING:  # a review starts without pandas
    import pandas as pd


FORMAT = "hnml_hf annotations 1"
ANNOTATIONS = ("wrong", "right", "unsure")
FIELDS = (
    *("index", "annotation", "new_label", "new_label_name"),
    *("label_name", "path", "annotator", "time"),
)
WHOLE = re.compile(r"(-?[0-9]{1,19})(?:\.0*)?")
UNSURE, UNNAMED = "(unsure)", "(wrong)"  # in brackets, since a class may be named `unsure`
TEXTS = ("new_label_name", "label_name", "path", "time", "batch", "undoes")  # that a line of a log may have
MEND_LINE = "Correct or delete this line; those around it are kept."
NEW_CLASS = -1  # `new_label` of a class that the dataset does not have, and of none

logger = logging.getLogger(__name__)


class LogError(ValueError):
    """A file that is no annotation log, or no longer one."""


def class_ids(names: Sequence[str]) -> dict[str, int]:
    """Ids of classes by their names, as people write them: without blanks around them, accents composed."""
    return {as_name(name): label for label, name in enumerate(names)}


def unknown_classes(named: Iterable[str], class_names: Sequence[str]) -> str:
    """Names that are no class, the ten most frequent ones, with how often each is named: `cat` (2), `dog` (1). Empty
    if there are none."""
    ids = class_ids(class_names)
    counts = Counter(name for name in map(as_name, named) if name and name not in ids)
    shown = [
        f"`{name if len(name) <= 60 else name[:57] + '...'}` ({count}{_written_otherwise(name, ids)})"
        for name, count in counts.most_common(10)
    ]
    return ", ".join(shown + [f"{len(counts) - 10} more"] * (len(counts) > 10))


def _written_otherwise(name: str, ids: Iterable[str]) -> str:
    """Which class a number may mean: a table that is read as numbers loses the zeros at the front."""
    meant = [known for known in ids if known.isdecimal() and known.lstrip("0") == name.removesuffix(".0").lstrip("0")]
    return f", the class is called `{meant[0]}`, and its zeros count" if len(meant) == 1 else ""


def read_all(paths: Iterable[str | os.PathLike], table: pd.DataFrame) -> list[pd.DataFrame]:
    """Each of several files as by [`read_annotations`]; where a file does not say who annotated, and several have its
    name, as those that a browser has saved, the names of their folders tell the annotators apart."""
    files = list(dict.fromkeys(map(Path, paths)))
    names = [file.stem for file in files]
    for longer in (lambda file: f"{file.absolute().parent.name}/{file.stem}", str):
        names = [longer(file) if names.count(name) > 1 else name for file, name in zip(files, names, strict=True)]
    return [read_annotations(file, table, annotator=name) for file, name in zip(files, names, strict=True)]


def read_annotations(path: str | os.PathLike, table: pd.DataFrame, *, annotator: str | None = None) -> pd.DataFrame:
    """Annotations that were made in the report, by `hnml review`, or by another tool.

    Where images came or went since, ids are of other samples by now: a CSV or a log that says so is matched by the
    paths of the images, and those that are gone, or have another label, are left out with a warning.

    Args:
        path (`str` or `Path`): CSV with the columns `index`, `annotation` (or `mark`: wrong, right, unsure),
            `new_label` (class id; empty: by `new_label_name`, else the suggested class; -1 without a name: wrong, of
            an unknown class) and, if it has them, `new_label_name`, `label_name`, `path` and `annotator`; the JSON
            lines that `hnml review` writes; or an export of Label Studio (`.json`), CVAT (`.xml`) or FiftyOne
            (`labels.json`, or a CSV with `filepath`).
        table (`pd.DataFrame`): scores that were reviewed; see [`load_audit`].
        annotator (`str`, *optional*): of rows that do not say it; default: the name of the file.

    Returns:
        `pd.DataFrame`: a row per sample and annotator: `index`, `annotation`, `new_label` (id of the class that the
        annotator names; -1: a class of another name, or none), `new_label_name` (empty: none) and `annotator`.

    Raises:
        ValueError: naming file and line, on ids that were not scored, another given label than the one that was
            scored, an annotator's second word on a sample, what is no annotation, or annotations that cannot be
            matched.
    """
    import pandas as pd

    path = Path(path)
    names = list(map(str, table.attrs["class_names"]))
    ids = class_ids(names)
    given = dict(zip(table["index"].tolist(), table["label"].tolist(), strict=True))
    suggested = dict(zip(table["index"].tolist(), table["suggested_label"].tolist(), strict=True))
    found = {}
    for where, row in _rows(path, table):
        index = _integer(row.get("index"), "index", where)
        if index not in given:
            raise ValueError(f"{where}: sample id {index} is not among the scored samples. {TAKE_ALONG}")
        verdict = row.get("annotation")
        if verdict not in ANNOTATIONS:
            raise ValueError(f"{where}: the annotation {verdict!r} is none of {', '.join(ANNOTATIONS)}.")
        at_hand = names[given[index]]
        if row.get("label_name") and _class_name(row["label_name"], ids) != as_name(at_hand):
            raise ValueError(
                f"{where}: sample {index} was annotated when its label was `{row['label_name']}`; here it is "
                f"`{at_hand}`. These annotations are of another run. {TAKE_ALONG}"
            )
        label, name = _new_label(row, verdict, given[index], suggested[index], names, ids, where)
        who = row.get("annotator") or annotator or path.stem
        if (index, who) in found:
            raise ValueError(f"{where}: sample id {index} is annotated twice by `{who}`.")
        found[index, who] = (index, verdict, label, name, who)
    return pd.DataFrame(
        found.values(), columns=["index", "annotation", "new_label", "new_label_name", "annotator"]
    ).astype({"index": "int64", "new_label": "int64"})


def _new_label(row, verdict, given, suggested, names, ids, where) -> tuple[int, str]:
    """Id and name of the class that a row names."""
    if verdict == "right":
        return given, names[given]
    if verdict == "unsure":
        return NEW_CLASS, ""
    name = _class_name(row.get("new_label_name") or "", ids)
    if not is_plain(name):
        raise ValueError(f"{where}: the class {name[:80]!r} has control characters or is no text.")
    open_label = row.get("new_label") in (None, "")
    label = NEW_CLASS if open_label else _integer(row["new_label"], "new_label", where)
    if label == NEW_CLASS:
        label = ids.get(name, NEW_CLASS) if name else suggested if open_label else NEW_CLASS
    elif not 0 <= label < len(names):
        raise ValueError(f"{where}: `new_label` {label} is none of the {counted(len(names), 'class')}.")
    elif name and name != as_name(names[label]):
        raise ValueError(
            f"{where}: `new_label` {label} is `{names[label]}`, but `new_label_name` says `{name}`. Empty the one "
            "that is wrong."
        )
    if label == given:  # which says only that it is not true
        return NEW_CLASS, ""
    return (label, names[label]) if label >= 0 else (NEW_CLASS, name)


def _class_name(text: str, ids: Mapping[str, int]) -> str:
    """The name of a class in a cell; `3.0` is the class `3`, as pandas writes it in a column with empty cells."""
    name = as_name(_unescaped(text))
    whole = WHOLE.fullmatch(name)
    return whole[1] if whole and name not in ids and whole[1] in ids else name


def _integer(value, name: str, where: str) -> int:
    whole = WHOLE.fullmatch(str(value).strip())  # also `3.0`, as pandas writes 3 in a column with empty cells
    if not whole:
        raise ValueError(f"{where}: `index` and `new_label` must be integers ({name}: {str(value)[:80]!r}).")
    return int(whole[1])


def _unescaped(text: str) -> str:
    """A cell without the apostrophe that keeps a spreadsheet from running it."""
    return text[1:] if text[:1] == "'" and text[1:2] in ("=", "+", "-", "@", "\t", "\r") else text


def _rows(path: Path, table: pd.DataFrame) -> Iterator[tuple[str, dict]]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return read_json(path, Samples(table))
    if suffix == ".xml":
        return read_cvat(path, Samples(table))
    return _read_log(path, table) if suffix == ".jsonl" else _read_csv(path, table)


def _read_csv(path: Path, table: pd.DataFrame) -> Iterator[tuple[str, dict]]:
    with open(path, "rb") as file:
        first = file.readline()
    separator = max(",", ";", "\t", key=lambda mark: first.count(mark.encode()))  # a spreadsheet's, by its language
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=separator)
        try:
            columns = set(reader.fieldnames or ())
            rows = [(reader.line_num, row) for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: no CSV in UTF-8 ({error}).") from error
    if "filepath" in columns and "index" not in columns:
        yield from read_fiftyone_csv(path, rows, Samples(table))
        return
    old = "mark" in columns and "annotation" not in columns
    missing = {"index", "mark" if old else "annotation", "new_label"} - columns
    if missing:
        hint = (
            "export from Label Studio as `JSON`" if "annotation_id" in columns else "such a file comes from the report"
        )
        raise ValueError(f"{path}:1: no column {', '.join(sorted(missing))}; {hint}.")
    found = [(f"{path}:{line}", {**row, "annotation": row["mark"]} if old else row) for line, row in rows]
    if "path" in columns:
        texts = ("path", "label_name")
        found = [(where, {**row, **{name: _unescaped(row.get(name) or "") for name in texts}}) for where, row in found]
        if not _lie_there(found, table):
            found = _matched(path, found, table)
    yield from found


def _lie_there(rows: Iterable[tuple[str, dict]], table: pd.DataFrame) -> bool:
    """Whether the samples with the ids of annotations have the images that were annotated."""
    paths = {str(index): place for index, place in zip(table["index"], table["path"], strict=True)}
    return all(is_at(paths.get(str(row["index"])), row.get("path")) for _, row in rows)


def _read_log(path: Path, table: pd.DataFrame) -> Iterator[tuple[str, dict]]:
    header, entries = latest_entries(path)
    scored = table.attrs.get("dataset_fingerprint")
    if header.get("dataset_fingerprint", scored) == scored and _lie_there(entries, table):
        return iter(entries)
    return iter(_matched(path, entries, table, header.get("root")))


def latest_entries(path: str | os.PathLike) -> tuple[dict, list[tuple[str, dict]]]:
    """The first line of an annotation log, and what holds now: where each annotation stands, and itself."""
    header: dict = {}
    latest: dict[tuple, tuple[str, dict]] = {}
    for line, entry in parse_log(Path(path).read_bytes(), path):
        if line == 1 and "index" not in entry:  # lines alone, without the first one, were written by hand
            check_format(entry, path)
        header = header or entry
        if line > 1 or "index" in entry:
            check_entry(entry, f"{path}:{line}")
            latest[entry["index"], entry["annotator"]] = (f"{path}:{line}", entry)
    return header, [found for found in latest.values() if found[1]["annotation"] is not None]


def _matched(path: Path, rows: list, table: pd.DataFrame, root: str | None = None) -> list[tuple[str, dict]]:
    """Annotations with the ids that their samples have in a table, and a warning of those that have none."""
    found, lost = match_annotations(
        rows, Scored(table["index"].tolist(), table["path"], table["label_name"]), root=root
    )
    if lost:
        logger.warning(describe_lost(path, lost))
    return found


def parse_log(content: bytes, path: str | os.PathLike, start: int = 1) -> Iterator[tuple[int, dict]]:
    """The JSON lines of an annotation log, each with its number; lines that a crash has cut off are left out."""
    *lines, last = content.split(b"\n")
    if last.rstrip().endswith(b"}"):  # written by hand, without the end of the line
        lines.append(last)
    for number, line in enumerate(lines, start=start):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            if number > 1 and not line.rstrip().endswith(b"}"):
                continue
            raise LogError(f"{path}:{number}: no line of an annotation log ({error}). {MEND_LINE}") from error
        yield number, entry


def check_format(header: Mapping, path: str | os.PathLike):
    """Raise `LogError` if the first line of a file does not say that it is an annotation log of this version."""
    said = str(header.get("format"))
    if said.rpartition(" ")[0] == FORMAT.rpartition(" ")[0] and said != FORMAT:
        raise LogError(
            f"{path} was written by another version of this package ({said[:80]}; this one reads {FORMAT}): use that "
            "version, or download the annotations there as a CSV. The file is not touched."
        )
    if said != FORMAT:
        raise LogError(f"{path} is no annotation log of this package: its first line is {str(header)[:200]}.")


def check_entry(entry: Mapping, where: str):
    """Raise `LogError` on a line of an annotation log that is no annotation; `where` names file and line."""
    kinds = {"index": int, "annotator": str, **{name: str for name in TEXTS if name in entry}}
    missing = [name for name in (*kinds, "annotation") if name not in entry]
    if missing:
        raise LogError(f"{where}: an annotation has `{missing[0]}`, and this line has none. {MEND_LINE}")
    for name, kind in kinds.items():
        if type(entry[name]) is not kind or (kind is int and abs(entry[name]) >= 2**62):
            what = "a sample id" if kind is int else "a text"
            raise LogError(f"{where}: `{name}` must be {what}; here it is {str(entry[name])[:80]!r}. {MEND_LINE}")
    if entry["annotation"] not in (*ANNOTATIONS, None):
        known = f"{', '.join(ANNOTATIONS)} or null"
        raise LogError(f"{where}: the annotation {str(entry['annotation'])[:80]!r} is none of {known}. {MEND_LINE}")


def write_annotations(path: str | os.PathLike, rows: Iterable[dict]) -> Path:
    """Write a CSV that [`read_annotations`] reads; `rows` have the fields of `FIELDS`."""
    with atomic_write(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        file.write(annotations_csv(rows))
    return Path(path)


def annotations_csv(rows: Iterable[dict]) -> str:
    """The text of such a file; cells that a spreadsheet would run are behind an apostrophe."""
    lines = [",".join(FIELDS)]
    for row in rows:
        lines.append(",".join(_cell(row.get(name)) for name in FIELDS))
    return "\r\n".join(lines) + "\r\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    text = str(value)
    if isinstance(value, str) and text.startswith(("=", "+", "-", "@", "\t", "\r")):
        text = f"'{text}"
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\n\r') else text


# -- several people ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """The annotations of several people as one.

    Args:
        annotations (`pd.DataFrame`): by `index`: `annotation`, `new_label`, `new_label_name` and `annotator`. Where
            two annotators name different classes, `unsure`; a class goes before `wrong` without one, and that before
            `unsure`.
        disagreements (`pd.DataFrame`): by `index`, a column per annotator with the class that they name.
        kappa (`dict[tuple[str, str], tuple[float, int]]`): Cohen's kappa of each two annotators, and the number of
            samples that both have annotated.
    """

    annotations: pd.DataFrame
    disagreements: pd.DataFrame
    kappa: dict[tuple[str, str], tuple[float, int]]


def merge_annotations(frames: Sequence[pd.DataFrame]) -> Merged:
    """Merge files of annotations; see [`Merged`].

    Args:
        frames (`Sequence[pd.DataFrame]`): of [`read_annotations`]. The same annotator may be in several, with the
            same words.

    Raises:
        ValueError: if one annotator says two things of a sample.
    """
    import pandas as pd

    if not frames:
        raise ValueError("There are no annotations to merge.")
    rows = pd.concat(frames, ignore_index=True).drop_duplicates()
    twice = rows[rows.duplicated(["index", "annotator"])]
    if len(twice):
        first = twice.iloc[0]
        raise ValueError(f"Sample id {first['index']} is annotated twice by `{first['annotator']}`, differently.")
    named = rows["new_label_name"].where(rows["annotation"] != "unsure", UNSURE).replace("", UNNAMED)
    by_annotator = rows.assign(named=named).pivot(index="index", columns="annotator", values="named")
    unsure, unnamed = rows[rows["annotation"] == "unsure"], rows[named == UNNAMED]
    firm = rows[~rows.index.isin([*unsure.index, *unnamed.index])]
    classes = firm.groupby("index")["new_label_name"].nunique()
    right = firm["index"][firm["annotation"] == "right"]
    split = classes.index[(classes > 1) | (classes.index.isin(right) & classes.index.isin(unnamed["index"]))]
    merged = pd.concat([firm, unnamed, unsure]).drop_duplicates("index").set_index("index")
    merged.loc[split, ["annotation", "new_label", "new_label_name"]] = ["unsure", NEW_CLASS, ""]
    who = rows.groupby("index")["annotator"].agg(lambda names: " ".join(sorted(names)))
    merged["annotator"] = who.reindex(merged.index)
    kappa = {
        (a, b): _kappa(by_annotator[[a, b]].dropna().to_numpy().T)
        for a, b in combinations(list(by_annotator.columns), 2)
    }
    return Merged(merged.sort_index(), by_annotator.loc[split].fillna(""), kappa)


def _kappa(pair: np.ndarray) -> tuple[float, int]:
    """Cohen's kappa: (observed - expected agreement) / (1 - expected agreement)."""
    first, second = pair
    if not len(first):
        return float("nan"), 0
    if len(set(first) | set(second)) == 1:
        return 1.0, len(first)  # 0 / 0: they agree on everything, and could not have disagreed by chance
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(first, second)), len(first)


# -- what follows from them -------------------------------------------------------------------------------------------


def annotated_labels(annotations: pd.DataFrame, index: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """The true class of each sample as far as annotators know it, for a judge that is fitted again.

    Args:
        annotations (`pd.DataFrame`): of [`merge_annotations`], by `index`.
        index (`np.ndarray` of shape `(n,)`): sample ids, in the order of the result.
        class_names (`Sequence[str]`): k names in id order.

    Returns:
        `np.ndarray` of shape `(n,)` and type int64: a class id, or -1 where nothing is known: not annotated, unsure,
        or of no class or one that is none of `class_names`.
    """
    known = annotations[annotations["annotation"] != "unsure"]
    ids = class_ids(list(map(str, class_names)))
    labels = known["new_label_name"].map(as_name).map(ids).fillna(NEW_CLASS).astype("int64")
    return labels.reindex(index, fill_value=-1).to_numpy()


def follow_annotations(annotations: pd.DataFrame, before: pd.DataFrame, now: Scored) -> tuple[pd.DataFrame, list[str]]:
    """Annotations of an audit for the dataset as it is now, since when images may have come and gone.

    Args:
        annotations (`pd.DataFrame`): of [`merge_annotations`], by `index`.
        before (`pd.DataFrame`): the scores that were annotated.
        now ([`Scored`]): the samples of now.

    Returns:
        `pd.DataFrame`: by the ids of now, for those whose image is where it was, with the same label; and the paths of
        the others.

    Raises:
        ValueError: as [`match_annotations`].
    """
    facts = before.set_index("index").loc[annotations.index, ["path", "label_name"]].to_dict("records")
    rows = [
        (f"sample {index}", {**row, "was": n})
        for n, (index, row) in enumerate(zip(annotations.index, facts, strict=True))
    ]
    found, lost = match_annotations(rows, now, root="")
    kept = annotations.iloc[[row["was"] for _, row in found]]
    index = [row["index"] for _, row in found]
    return kept.assign(index=index, new_label=NEW_CLASS).set_index("index"), lost


def apply_annotations(table: pd.DataFrame, annotations: pd.DataFrame) -> pd.DataFrame:
    """Scores after annotations, without a new fit: 0 for a label that is right, 1 for one that is wrong.

    Args:
        table (`pd.DataFrame`): of [`load_audit`].
        annotations (`pd.DataFrame`): of [`merge_annotations`], by `index`.

    Returns:
        `pd.DataFrame`: a copy; annotated rows have their score, suggested class and a column `annotation`; `rank` is
        drawn anew, and `attrs["noise_rate"]` is the mean of the scores.
    """
    result = table.copy()
    verdict = result["index"].map(annotations["annotation"])
    result["annotation"] = verdict.fillna("").astype(object)
    names = np.asarray(table.attrs["class_names"], dtype=object)
    new = annotated_labels(annotations, result["index"].to_numpy(), names)
    wrong, right = (verdict == "wrong").to_numpy(), (verdict == "right").to_numpy()
    known = wrong & (new >= 0)
    result.loc[wrong, "noise_score"], result.loc[right, "noise_score"] = 1.0, 0.0
    result.loc[known, "suggested_label"] = new[known]
    result.loc[known, "suggested_name"] = names[new[known]]
    order = np.lexsort((result["rank"], -result["noise_score"]))
    result.loc[result.index[order], "rank"] = np.arange(1, len(result) + 1)
    result.attrs = {**table.attrs, "noise_rate": float(result["noise_score"].mean())}
    return result
