"""A dataset corrected in the form in which it came: the folder with its files, the table with its columns."""

import csv
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict
from datasets.table import embed_table_storage

from ..common.atomic import folder_above
from ..common.words import counted
from ..data.checks.exclusions import exclusion_rows
from ..data.custom.builders import EVALUATION_FOLDERS, METADATA
from ..data.custom.columns import LABEL_COLUMNS, ColumnOptions, RawSplit
from ..data.custom.labels import encode_labels, find_classes
from ..data.custom.tables import column_names, find_tables, table_suffix
from ..data.files import as_name, first_few, is_hidden, is_image, is_plain, missing_files, walk
from ..data.load import DATASET_NAMES
from ..data.splits import SPLITS, find_splits
from .cleaning import apply_plan
from .export import escape_formula
from .review.lineage import DECIDED, DISAGREEMENTS_FILE, GONE, LINEAGE_FILE, is_lineage, write_lineage
from .table import check_unchanged


FORMATS = ("folder", "csv", "parquet", "arrow")
FILES = ("copy", "hardlink", "symlink")
ADDED = ("label_original", "label_score", "label_action")
WEIGHT = "label_weight"
OF_HOW = (WEIGHT, "label_posterior")  # the second of earlier versions
RENAMED = {"quarantine": "exclude"}  # options of earlier versions
LISTED = 20  # changes that a dry run names
PARQUET_ROWS = 100  # images in memory at once, a row group
LEAST_SCORE = 1e-12  # that a table shows
MAX_NAME = 255  # bytes of the name of a file or folder


@dataclass(frozen=True)
class Source:
    """Where a dataset came from.

    Args:
        dataset (`str`): as `--dataset` named it.
        data_dir (`str`, *optional*): where its images lie.
        columns ([`ColumnOptions`]): of a table.
        splits (`dict[str, str]`): split -> folder of an image folder, where the names do not tell.
        class_names (`list[str]`): that the user gave, who may have written ids into a table.
        excluded (`dict[int, str]`): rows of the training data that were left out -> path, or an empty one.
        holds_out (`bool`): whether training data were kept from the audit. Else what it has not scored is new since.
    """

    dataset: str
    data_dir: str | None = None
    columns: ColumnOptions = field(default_factory=ColumnOptions)
    splits: Mapping[str, str] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    excluded: Mapping[int, str] = field(default_factory=dict)
    holds_out: bool = False

    @property
    def folder(self) -> str | None:
        """The folder of an image folder, or `None`."""
        folder = self.data_dir if self.dataset == "imagefolder" else self.dataset
        folder = os.path.abspath(os.path.expanduser(folder or ""))
        known = [f"{folder}/{name}" for name in ("dataset_dict.json", "state.json")]
        plain = os.path.isdir(folder) and not any(map(os.path.isfile, known))
        plain = plain and not self.tables and not find_tables(folder)  # which may be of another kind than CSV
        named = self.dataset in DATASET_NAMES and self.dataset != "imagefolder"  # goes before a folder of that name
        return folder if plain and not named else None

    def images_root(self, plan: pd.DataFrame) -> str:
        """The folder that the paths of a table which [`write_csv`] writes are relative to."""
        if not self.tables:
            return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in plan["path"]])
        return os.path.abspath(os.path.expanduser(self.data_dir or os.path.dirname(self.tables[0])))

    @property
    def tables(self) -> list[str]:
        """CSV or TSV tables of the training data, in their order; empty where there are none."""
        path = os.path.abspath(os.path.expanduser(self.dataset))
        named = os.path.join(path, self.splits.get("train") or ".")
        if os.path.isfile(path) or os.path.isfile(named):
            found = [path if os.path.isfile(path) else named]
        else:
            found = find_tables(path).get("train", []) if os.path.isdir(path) else []
        return found if all(table_suffix(name) in (".csv", ".tsv") for name in found) else []

    @property
    def unscored(self) -> str:
        """What a row or an image of the training data is that was neither scored nor excluded."""
        return "held_out" if self.holds_out else "added"

    @property
    def format(self) -> str:
        """The form in which the dataset came."""
        return "csv" if self.tables else "folder" if self.folder else "arrow"


def read_options(run: str | os.PathLike) -> dict:
    """The options of the dataset of a run, from its `_audit/dataset.json`, under the names that they have now.

    Raises:
        FileNotFoundError: if the run does not say it.
        ValueError: if the file cannot be read.
    """
    saved = Path(run) / "_audit" / "dataset.json"
    if not saved.is_file():
        raise FileNotFoundError(f"{saved} is missing, so it is not known what was audited; give `--dataset`.")
    try:
        options = json.loads(saved.read_text(encoding="utf-8"))
        return {RENAMED.get(name, name): value for name, value in options.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{saved} does not hold the options of a dataset ({error}). Restore it, or delete it and give `--dataset`."
        ) from error


def read_source(run: str | os.PathLike) -> Source:
    """Where the dataset of a run came from; errors are those of [`read_options`]."""
    options = read_options(run)
    names = asdict(ColumnOptions())
    excluded = {}
    if options.get("exclude"):
        for row in exclusion_rows(options["exclude"]):
            if row["split"] == "train":
                excluded[row["index"]] = row["path"] and os.path.abspath(row["path"])
    columns = ColumnOptions(**{name: options[name] for name in names if options.get(name) is not None})
    splits, class_names = (json.loads(options.get(name) or "null") for name in ("splits", "class_names"))
    holds_out = bool(options.get("validation_fraction") or options.get("class_balanced_samples"))
    folder = options.get("data_dir")
    return Source(options["dataset"], folder, columns, splits or {}, class_names or (), excluded, holds_out)


def describe_plan(plan: pd.DataFrame, listed: int = LISTED) -> list[str]:
    """What a plan changes, in lines: how many rows of each action, the changes by class, and the first of them."""
    counts = plan["label_action"].value_counts()
    lines = [
        f"{counted(len(plan), 'row', 'were')} scored: " + ", ".join(f"{n:,} {name}" for name, n in counts.items())
    ]
    missing = plan[plan["label_action"] == "missing"]
    if len(missing):
        names = first_few(missing["path"])
        lines.append(f"{counted(len(missing), 'image', 'are')} not there any more, and left out: {names}")
    unjudged = plan[plan["label_action"] == "unjudged"]
    if len(unjudged):
        names = first_few([row["path"] or str(row["index"]) for row in unjudged.to_dict("records")])
        reasons = "the image cannot be read, is the only one of its class, or was never seen"
        lines.append(
            f"{counted(len(unjudged), 'row', 'were')} not judged: {reasons}. Row and label stay: {names}. `hnml "
            "check` says what cannot be read."
        )
    added = plan.attrs.get("added")
    if added:
        kept = f"{counted(len(added), 'image', 'were')} added since the audit, and nothing changes there"
        lines.append(f"{kept}: {first_few(added)}. Audit again to have them scored.")
    said = plan["annotation"][plan["annotation"] != ""].value_counts()
    if len(said):
        lines.append("Annotations: " + ", ".join(f"{n:,} {name}" for name, n in said.items()))
    both = plan[(plan["label_action"] == "excluded") & plan["annotation"].isin(DECIDED)]
    if len(both):
        names = first_few([row["path"] or str(row["index"]) for row in both.to_dict("records")])
        lines.append(f"Left out by a list though people have decided the label: {counted(len(both), 'row')}: {names}")
    changed = changes(plan)
    pairs = changed.groupby(["before", "after"]).size().sort_values(ascending=False, kind="stable")
    lines += [f"{count:>8,}  {before} -> {after}" for (before, after), count in pairs.head(listed).items()]
    if len(pairs) > listed:
        lines.append(f"          and {counted(len(pairs) - listed, 'other pair')}")
    empty = set(plan["label_scored"]) - set(plan["label_name"][~plan["label_action"].isin(GONE)])
    if empty:
        lines.append(f"No row is left of {counted(len(empty), 'class')}: {first_few(sorted(empty))}")
    for row in changed.head(listed).to_dict("records"):
        action = "" if row["label_action"] in GONE else f" ({row['label_action']})"
        lines.append(f"  {row['path'] or row['index']}: {row['before']} -> {row['after']}{action}")
    if len(changed) > listed:
        lines.append(f"  and {counted(len(changed) - listed, 'other row')}")
    return lines


def changes(plan: pd.DataFrame) -> pd.DataFrame:
    """Rows whose label changes, or that are dropped or excluded: `before` and `after` name the classes."""
    after = plan["label_name"].where(~plan["label_action"].isin(GONE), "(" + plan["label_action"] + ")")
    rows = plan.assign(before=plan["label_scored"], after=after)[plan["label_action"] != "missing"]
    return rows[rows["before"] != rows["after"]]


def score_cell(score: float) -> str:
    """A score or a weight in a table that is written: 6 digits, and 0 for what is below 1e-12 and as good as none."""
    return "0" if abs(score) < LEAST_SCORE else f"{score:.6g}"


def lineage_rows(plan: pd.DataFrame, paths: Mapping[int, str] | None = None) -> Iterable[dict]:
    """Rows of `lineage.csv`; `paths` are those in the output by sample id, default: where the images lie."""
    for row in plan.to_dict("records"):
        gone = row["label_action"] in GONE
        path = "" if gone else row["path"] if paths is None else paths.get(row["index"], "")
        original = row["path"] or ""
        score, label = score_cell(row["label_score"]), "" if gone else row["label_name"]
        yield {**row, "label": label, "label_score": score, "path": path, "path_original": original}


def source_rows(files: Iterable[tuple[str, str, str]]) -> Iterable[dict]:
    """Rows of `lineage.csv` of what was not scored: path in the output, path before, action."""
    for path, original, action in files:
        yield {"path": path, "path_original": original, "label_action": action}


def mark_missing(plan: pd.DataFrame) -> pd.DataFrame:
    """A plan in which the action on images that are not there any more is `missing`.

    Args:
        plan (`pd.DataFrame`): of [`plan_cleaning`].

    Raises:
        ValueError: if none is there, as where a disk is not connected.
    """
    named = (plan["path"] != "").to_numpy()
    gone = np.zeros(len(plan), bool)
    gone[named] = missing_files("", [os.path.abspath(path) for path in plan["path"][named]])
    if named.any() and gone[named].all():
        images, first = counted(int(named.sum()), "image"), plan["path"][named].iloc[0]
        raise ValueError(
            f"None of the {images} is there any more, first {first}: connect their disk, or bring the images back."
        )
    marked = plan.assign(label_action=plan["label_action"].where(~gone, "missing"))
    marked.attrs = plan.attrs
    return marked


def check_output(
    plan: pd.DataFrame,
    source: Source,
    form: str,
    folder: str | os.PathLike,
    *,
    files: str = "copy",
    removed: str | os.PathLike | None = None,
    data: DatasetDict | None = None,
    table: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Refuse what [`write_folder`], [`write_csv`] or [`write_dataset`] would refuse, before anything is printed or
    written.

    Args:
        plan (`pd.DataFrame`): of [`plan_cleaning`].
        source ([`Source`]): where the dataset came from.
        form (`str`): one of `FORMATS`.
        folder (`str` or `Path`): that would be written.
        files, removed: see [`write_folder`].
        data, table: for parquet and Arrow; see [`write_dataset`].

    Returns:
        `pd.DataFrame`: the plan as it would be written, see [`mark_missing`]; `attrs["added"]` are images that are new
        since the audit.

    Raises:
        ValueError: as those do.
    """
    if data is not None and table is not None:
        check_unchanged(table, data["train"])
    elif form == "folder":
        plan = mark_missing(plan)
        found = _folder_files(plan, source, folder, removed)
        _check_disk(_placed(found, source, folder, removed), files)
        plan.attrs["added"] = [file.path for file in found if file.action == "added"]
    elif form == "csv" and source.tables:
        _check_no_targets(plan)
        plan = mark_missing(plan)
        labels, plan.attrs["added"] = _read_tables(plan, source)
        _check_labels(labels, plan, source)
    elif form == "csv":
        _check_no_targets(plan)
        _check_has_paths(plan)
        plan = mark_missing(plan)
        _check_labels(set(plan["label_name"]), plan, source)
    return plan


# -- a folder ---------------------------------------------------------------------------------------------------------


def write_folder(
    plan: pd.DataFrame,
    source: Source,
    folder: str | os.PathLike,
    *,
    files: str = "copy",
    removed: str | os.PathLike | None = None,
    gone: Iterable[Mapping] = (),
) -> Counter:
    """The image folder as it was, each image under its new class, and `lineage.csv`.

    Folders inside a class stay, and so does all that was not scored: other splits, held-out rows, images that were
    added since the audit, and other files.
    Dropped and excluded images are left out, or lie in `removed` as they lay in the dataset. What is hidden or no
    regular file is left out. Images that are not there any more are counted as missing. Nothing of the source is
    changed.

    Args:
        plan (`pd.DataFrame`): of [`plan_cleaning`].
        source ([`Source`]): an image folder.
        folder (`str` or `Path`): to write into, an empty one or none yet.
        files (`str`): `copy`, `hardlink` (no space, one file system) or `symlink` (no space; the source must stay).
        removed (`str` or `Path`, *optional*): where dropped and excluded images go, an empty folder or none yet.
        gone (`Iterable[Mapping]`): lineage of rows that earlier rounds have left out.

    Returns:
        `Counter`: files by action.

    Raises:
        ValueError: if the dataset is no image folder, a table says its labels, or the output lies in it; one of the
            two folders lies in the other; a class has no folder name; weights cannot be kept; the disk has no room;
            or it is another one, for hard links.
        OSError: if it cannot be written, or holds no links.
    """
    if files not in FILES:
        raise ValueError(f"`files={files!r}` is none of {', '.join(FILES)}.")
    plan = mark_missing(plan)
    found = _folder_files(plan, source, folder, removed)
    placed = _placed(found, source, folder, removed)
    _check_disk(placed, files)
    for path, place, name in placed:
        _place(path, Path(place, name), files)
    folder = _made(folder)
    paths = {file.sample: file.target or "" for file in found if file.sample is not None}
    others = [(file.target or "", file.path, file.action) for file in found if file.sample is None]
    write_lineage(folder, [*lineage_rows(plan, paths), *source_rows(others), *gone])
    missing = int((plan["label_action"] == "missing").sum())
    return Counter(file.action for file in found) + Counter(missing=missing)


class _File(NamedTuple):
    """A file of an image folder: its path, its name in the output (`None`: left out), what becomes of it, its id."""

    path: str
    target: str | None
    action: str
    sample: int | None


def _folder_files(
    plan: pd.DataFrame, source: Source, folder: str | os.PathLike, removed: str | os.PathLike | None
) -> list[_File]:
    """All files of the dataset; errors are those of [`write_folder`]."""
    root = source.folder
    if root is None:
        raise ValueError(f"`{source.dataset}` is no image folder: choose csv, parquet or arrow by --output_format.")
    if plan.attrs["how"] in ("weight", "posterior"):
        forms = "csv, parquet or arrow" if plan.attrs["how"] == "weight" else "parquet or arrow"
        raise ValueError(f"A folder cannot hold what `{plan.attrs['how']}` gives: choose {forms} by --output_format.")
    for place in (folder, removed):
        if place and _lies_in(place, root):
            raise ValueError(
                f"{place} lies in the dataset {root}, and would become a part of it: name another folder."
            )
    if removed and (_lies_in(removed, folder) or _lies_in(folder, removed)):
        raise ValueError(f"What is left out cannot go to {removed}: it must not lie in {folder}, nor around it.")
    own = f"{root}/{LINEAGE_FILE}"
    if os.path.isfile(own) and not is_lineage(own):
        raise ValueError(
            f"{own} was not written by `hnml clean`, which gives its output a file of that name: rename it."
        )
    inside = _train_folder(root, source)
    targets = _folder_targets(plan, root, inside, named="train" in source.splits)
    excluded = {path: index for index, path in source.excluded.items() if path}
    found = []
    for path in _all_files(root):
        if path in targets:
            row, target = targets[path]
            found.append(_File(path, target, row["label_action"], row["index"]))
            continue
        action = _action_of_other(path, f"{root}/{inside}", excluded, source.unscored)
        _check_no_label_table(path, source)
        found.append(_File(path, None if action == "excluded" else path.removeprefix(f"{root}/"), action, None))
    return found


def _lies_in(place: str | os.PathLike, folder: str | os.PathLike) -> bool:
    return f"{os.path.realpath(place)}/".startswith(f"{os.path.realpath(folder)}/")


def _placed(
    found: Iterable[_File], source: Source, folder: str | os.PathLike, removed: str | os.PathLike | None
) -> list[tuple[str, str | os.PathLike, str]]:
    """The path of each file that goes somewhere, the folder, and the name there."""
    placed = [(file.path, folder, file.target) for file in found if file.target is not None]
    if removed:
        prefix = f"{source.folder}/"
        placed += [(file.path, removed, file.path.removeprefix(prefix)) for file in found if file.target is None]
    return placed


def _train_folder(root: str, source: Source) -> str:
    """The folder of the training images below the root, with a slash behind it; empty where class folders are all."""
    if "train" in source.splits:
        name = os.path.normpath(source.splits["train"].strip("/") or ".")
    else:
        name = find_splits([name for name in os.listdir(root) if os.path.isdir(f"{root}/{name}")]).get("train", ".")
    return "" if name == "." else f"{name}/"


def _folder_targets(plan: pd.DataFrame, root: str, inside: str, *, named: bool) -> dict[str, tuple[dict, str | None]]:
    """The row of each path, and where it goes, `None` if it is left out.

    Args:
        inside (`str`): see [`_train_folder`].
        named (`bool`): whether the user has named that folder.
    """
    prefix = f"{root}/{inside}"
    # names of folders may have blanks around them, or decomposed accents, that those of classes have not
    spelled = {as_name(name): name for name in os.listdir(prefix)}
    targets: dict[str, tuple[dict, str | None]] = {}
    taken = set()
    for row in plan.to_dict("records"):
        path = os.path.abspath(row["path"])
        given, _, rest = path.removeprefix(prefix).partition("/")
        if not path.startswith(prefix) or as_name(given) != as_name(row["label_scored"]) or not rest:
            raise ValueError(
                f"{path} does not lie in the folder of its label `{row['label_scored']}`: choose csv or arrow."
            )
        if row["label_action"] in GONE:
            targets[path] = (row, None)
        elif row["label_name"] == row["label_scored"]:
            name = path.removeprefix(f"{root}/")
            targets[path] = (row, name)
            taken.add(name)
    for row in plan.to_dict("records"):
        path = os.path.abspath(row["path"])
        if path not in targets:
            label, rest = row["label_name"], path.removeprefix(prefix).partition("/")[2]
            place = spelled.get(as_name(label)) or _folder_name(label, alone=not (inside or named))
            name = _free_name(f"{inside}{place}/{rest}", taken, root)
            targets[path] = (row, name)
            taken.add(name)
    return targets


def _check_no_label_table(path: str, source: Source):
    """Refuse a folder whose labels a table beside the images says: it would name files that have moved."""
    if os.path.basename(path) not in METADATA:
        return
    labels = {source.columns.label_column} - {None} or set(LABEL_COLUMNS)
    if labels & set(column_names(path)):
        raise ValueError(f"{path} says what the labels are, not the folders: choose csv, parquet or arrow.")


def _check_disk(placed: Iterable[tuple[str, str | os.PathLike, str]], how: str):
    """Refuse a disk without room for copies, without links, or for hard links another one than that of the files."""
    above = {folder: folder_above(folder) for _, folder, _ in placed}
    device = {folder: os.stat(place).st_dev for folder, place in above.items()}
    if how == "copy":
        needed: Counter[int] = Counter()
        for path, folder, _ in placed:
            needed[device[folder]] += os.path.getsize(path)
        for folder, place in above.items():
            size, free = needed[device[folder]], shutil.disk_usage(place).free
            if size > free:
                raise ValueError(
                    f"{folder} would take {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there: name a "
                    "folder on another disk, or choose --files symlink."
                )
    if how == "hardlink":
        for path, folder, _ in placed:
            if os.stat(path).st_dev != device[folder]:
                raise ValueError(
                    f"{path} lies on another disk than {folder}, and cannot be linked there: choose --files copy or "
                    "symlink."
                )
    if how != "copy":  # the first one tells: FAT and some network disks have no links
        for folder, path in {folder: path for path, folder, _ in placed}.items():
            with tempfile.TemporaryDirectory(dir=above[folder]) as trial:
                _place(path, Path(trial, "link"), how)


def _made(folder: str | os.PathLike) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def _all_files(root: str) -> Iterable[str]:
    for folder in walk(root):
        ours = () if folder.prefix else (LINEAGE_FILE, DISAGREEMENTS_FILE)  # of an earlier round
        yield from (f"{root}/{folder.prefix}{name}" for name in folder.files if name not in ours)


def _action_of_other(path: str, prefix: str, excluded: Mapping[str, int], unscored: str) -> str:
    """What a file is that was not scored; `unscored` if it is an image of the training data."""
    if path in excluded:
        return "excluded"
    if not is_image(path):
        return "other_file"
    return unscored if path.startswith(prefix) else "other_split"


def _folder_name(name: str, *, alone: bool) -> str:
    """The folder of a new class; `alone`: without folders of splits above, so that it could be taken for one."""
    if is_hidden(name) or not is_plain(name) or name in ("", "..") or any(mark in name for mark in "/\\"):
        raise ValueError(f"The class {name!r} cannot be the name of a folder: choose csv, parquet or arrow.")
    if len(os.fsencode(name)) > MAX_NAME:
        raise ValueError(
            f"The class {name[:40]!r}... has more than {MAX_NAME} bytes, too many for the name of a folder: choose "
            "csv, parquet or arrow."
        )
    if alone and name.lower() in (*SPLITS["train"], *EVALUATION_FOLDERS):
        raise ValueError(
            f"A folder `{name}` would be taken for a split, not for a class: choose csv, parquet or arrow."
        )
    return name


def _free_name(name: str, taken: set[str], root: str) -> str:
    """A name that no other file of the output has."""
    start = name.rfind("/") + 1
    stem, suffix = os.path.splitext(name[start:])
    number, free = 1, name
    while free in taken or os.path.lexists(f"{root}/{free}"):
        number += 1
        end = f"-{number}{suffix}"
        begin = stem.encode()[: MAX_NAME - len(end.encode())].decode(errors="ignore")  # of a name that fills its room
        free = f"{name[:start]}{begin}{end}"
    return free


def _place(path: str, target: Path, how: str):
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        raise FileExistsError(f"The disk of {target} does not tell it from {path}: name a folder on another disk.")
    if how == "copy":
        shutil.copy2(path, target)
        return
    try:
        if how == "symlink":
            target.symlink_to(path)
        else:
            os.link(os.path.realpath(path), target)  # of a link its file: elsewhere it would lead nowhere
    except OSError as error:
        raise OSError(f"There can be no {how} of {path} ({error.strerror}): choose --files copy.") from error


# -- a table ----------------------------------------------------------------------------------------------------------


def write_csv(
    plan: pd.DataFrame, source: Source, folder: str | os.PathLike, *, gone: Iterable[Mapping] = ()
) -> Counter:
    """The tables of the training data with their own columns, the new labels and `label_original`, `label_score` and
    `label_action` (also `label_weight` after `weight`, where a row that was not scored has the average weight); other
    tables of the folder as they are; and `lineage.csv`. Of a dataset that was no CSV, a `train.csv` of its images.

    Returns:
        `Counter`: rows by action.

    Raises:
        ValueError: after `posterior`; if images or labels cannot be written, or a table has changed, or has columns
            that would be taken for those written here.
    """
    _check_no_targets(plan)
    if not source.tables:
        _check_has_paths(plan)
    plan = mark_missing(plan)
    facts = {row["index"]: row for row in plan.to_dict("records")}
    extra = [WEIGHT] if plan.attrs["how"] == "weight" else []
    actions, others, folder = Counter(), [], _made(folder)
    if source.tables:
        _check_labels(_read_tables(plan, source)[0], plan, source)
        _correct_tables(plan, source, folder, facts, extra, actions, others)
    else:
        _check_labels(set(plan["label_name"]), plan, source)
        _table_of_images(plan, source, folder, facts, extra, actions)
    write_lineage(folder, [*lineage_rows(plan), *source_rows(others), *gone])
    return actions


def _table_rows(source: Source, facts: Mapping[int, Mapping]) -> Iterable[tuple]:
    """Of each table: path, header, names of the columns, those of labels, images and so on, rows and their ids.

    Raises:
        ValueError: if it has other images than those that were scored, or columns that cannot be told apart.
    """
    start = 0
    for path in source.tables:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file, **_dialect(path)) if row]
        names, picked = _picked_columns(source, path, header)
        image = names.index(picked["image"])
        own = names.index(picked["index"]) if "index" in picked else None
        ids = [start + n if own is None else int(row[own]) for n, row in enumerate(rows)]
        start += len(rows)
        for index, row in zip(ids, rows, strict=True):
            if index in facts:
                _check_same_image(facts[index], row[image], path)
        yield path, header, names, picked, rows, ids


def _correct_tables(plan, source, folder, facts, extra, actions, others):
    for path, header, names, picked, rows, ids in _table_rows(source, facts):
        at, image = names.index(picked["label"]), names.index(picked["image"])
        text = _written_classes(facts, rows, ids, at)
        kept = [n for n, name in enumerate(names) if name not in (*ADDED, *OF_HOW)]  # those of an earlier round
        with open(folder / Path(path).name, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=_dialect(path)["delimiter"])
            writer.writerow([*(header[n] for n in kept), *ADDED, *extra])
            for index, row in zip(ids, rows, strict=True):
                fact = facts.get(index)
                if fact is None:
                    action = "excluded" if index in source.excluded else source.unscored
                    others.append(("" if action == "excluded" else row[image], row[image], action))
                else:
                    action = fact["label_action"]
                actions[action] += 1
                if action in GONE:
                    continue
                added = [row[at], "", action] if fact is None else _added(fact, text)
                if "label_original" in names:  # of an earlier round
                    added[0] = row[names.index("label_original")]
                if fact is not None:
                    row[at] = text.get(fact["label_name"], fact["label_name"])
                weight = plan["weight"].mean() if fact is None else fact["weight"]
                more = [score_cell(weight)] if extra else []
                writer.writerow([*(row[n] for n in kept), *added, *more])
    place = Path(source.dataset).expanduser()
    if place.is_dir():
        for split, tables in find_tables(str(place.absolute())).items():
            for path in tables if split != "train" else []:
                shutil.copy2(path, folder / Path(path).name)
                actions["other_split"] += 1


def _written_classes(facts: Mapping[int, Mapping], rows: Sequence, ids: Sequence[int], at: int) -> dict[str, str]:
    """How a table writes each class in its column `at`."""
    text: dict[str, str] = {}
    for index, row in zip(ids, rows, strict=True):
        if index in facts:
            text.setdefault(facts[index]["label_scored"], row[at])
    return text


def _read_tables(plan: pd.DataFrame, source: Source) -> tuple[set[str], list[str]]:
    """The labels that the corrected tables will hold, as they are written there, and the images that are new since the
    audit; errors of [`_table_rows`]."""
    facts = {row["index"]: row for row in plan.to_dict("records")}
    labels, added, known = set(), [], facts.keys() | source.excluded.keys()
    for _, _, names, picked, rows, ids in _table_rows(source, facts):
        image = names.index(picked["image"])
        others = [row[image] for row, index in zip(rows, ids, strict=True) if index not in known]
        added += [] if source.holds_out else others
        text = _written_classes(facts, rows, ids, names.index(picked["label"]))
        kept = {facts[index]["label_name"] for index in ids if index in facts}
        labels |= {text.get(name, name) for name in kept}
    return labels, added


def _check_labels(labels: set[str], plan: pd.DataFrame, source: Source):
    """Refuse labels that would be read as other classes than those of the plan: names among numbers, `none`."""
    texts = sorted(labels)
    raw = RawSplit([""] * len(texts), texts, lambda row: f"class `{texts[row]}`", source="the new table")
    try:
        classes = find_classes({"train": [raw]}, plan.attrs["class_names"] if source.class_names else None)
        encode_labels(raw, classes, "train")
    except ValueError as error:
        raise ValueError(f"A table could not be read again ({error}). Choose parquet or arrow.") from error


def _dialect(path: str) -> dict:
    return {"delimiter": "\t" if table_suffix(path) == ".tsv" else ",", "strict": True}


def _picked_columns(source: Source, path: str, header: list[str]) -> tuple[list[str], dict[str, str]]:
    """Names of the columns of a table, and which of them hold images, labels and ids."""
    names = [name.strip() for name in header]
    picked = source.columns.pick(names, "train", f"{path}:1")
    if "split" in picked and "index" not in picked:
        raise ValueError(f"{path} has a column of splits and none of ids: choose parquet or arrow.")
    own = [name for name in OF_HOW if name in names and "label_action" not in names]
    if own:
        raise ValueError(
            f"{path} has a column `{own[0]}` of its own, which the new table would take for that of the audit: rename "
            "it, or choose parquet or arrow by --output_format."
        )
    return names, picked


def _check_same_image(fact: Mapping, image: str, path: str):
    if os.path.basename(fact["path"]) != os.path.basename(image):
        raise ValueError(
            f"{path} has changed since it was audited: sample {fact['index']} is `{image}` there, and was "
            f"`{fact['path']}`. Audit it again."
        )


def _added(fact: Mapping, text: Mapping[str, str]) -> list:
    original = fact["label_original"]
    return [text.get(original, original), score_cell(fact["label_score"]), fact["label_action"]]


def _check_no_targets(plan: pd.DataFrame):
    if plan.attrs["how"] == "posterior":
        raise ValueError(
            "A table cannot hold the soft targets that `posterior` gives: choose parquet or arrow by --output_format, "
            "or `--how weight`."
        )


def _check_has_paths(plan: pd.DataFrame):
    if not all(plan["path"]):
        raise ValueError(
            "The images are part of the dataset, so that no table can name them: choose parquet or arrow."
        )


def _table_of_images(plan, source, folder, facts, extra, actions):
    root = source.images_root(plan)
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label", "index", *ADDED, *extra])
        for index, fact in facts.items():
            actions[fact["label_action"]] += 1
            if fact["label_action"] not in GONE:
                name = os.path.relpath(os.path.abspath(fact["path"]), root)
                if escape_formula(name) != name:  # a spreadsheet would compute it; as a path it stays the same
                    name = os.path.join(os.curdir, name)
                more = [score_cell(fact["weight"])] if extra else []
                writer.writerow([name, fact["label_name"], index, *_added(fact, {}), *more])


# -- datasets ---------------------------------------------------------------------------------------------------------


def write_dataset(
    plan: pd.DataFrame,
    data: DatasetDict,
    table: pd.DataFrame,
    folder: str | os.PathLike,
    *,
    parquet: bool = False,
    gone: Iterable[Mapping] = (),
) -> Counter:
    """The dataset with all its splits as Arrow files (`save_to_disk`) or parquet, and `lineage.csv`. Both hold the
    images, also those of a folder: what is written can be moved, and is read without the original.

    Args:
        plan (`pd.DataFrame`): of [`plan_cleaning`].
        data (`datasets.DatasetDict`): that was scored, as the run loaded it.
        table (`pd.DataFrame`): its scores.
        folder (`str` or `Path`): to write into, an empty one or none yet.

    Returns:
        `Counter`: rows by action.
    """
    check_unchanged(table, data["train"])
    classes = ClassLabel(names=plan.attrs["class_names"])
    cleaned = {"train": apply_plan(data["train"], plan)}
    actions = Counter(plan["label_action"])
    for split in set(data) - {"train"}:
        cleaned[split] = data[split].cast_column("label", classes).cast_column("clean_label", classes)
        actions["held_out" if split == "validation" else "other_split"] += len(data[split])
    folder = _made(folder)
    if parquet:
        for split, part in cleaned.items():
            _write_parquet(part, folder / f"{split}.parquet")
    else:
        DatasetDict(cleaned).save_to_disk(folder)
    write_lineage(folder, [*lineage_rows(plan, paths={}), *gone])
    return actions


def _write_parquet(dataset: Dataset, path: Path):
    """Write a parquet file; `Dataset.to_parquet` would leave images outside, under their absolute paths."""
    with pq.ParquetWriter(path, dataset.features.arrow_schema) as writer:
        for rows in dataset.with_format("arrow").iter(PARQUET_ROWS):
            writer.write_table(embed_table_storage(rows))
