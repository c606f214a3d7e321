"""
Your own data: image folders, CSV / TSV / JSON / JSONL / parquet tables, data sets saved by `save_to_disk`, and any
data set on the Hub. All come out with the four features of `hnml_hf.data.schema`.
"""

import csv
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hnml_hf.data.schema import (
    IMAGE_SUFFIXES,
    UNKNOWN,
    NoisyLabelBuilder,
    NoisyLabelConfig,
    ParquetImages,
    Rows,
    assemble,
    file_names,
    folder_names,
    is_plain,
    noisy_features,
    parse_path,
    read_lines,
    shown,
)


logger = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
METADATA = ("metadata.csv", "metadata.jsonl")
# Looked for in this order where the user names no column.
IMAGE_COLUMNS = ("image", "img", "file_name", "filename", "image_path", "path")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
MAX_CLASSES = 100_000  # a larger integer is an id, not a class
INTEGER = re.compile(r"-?[0-9]{1,18}")
FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass
class ColumnOptions:
    """
    Which columns hold what; `None` = look for a usual name.

    Args:
        image: `image`, `img`, `file_name`, ... : an image, or a path relative to the table (or to `data_dir`).
        label: the given, possibly noisy label.
        clean: the true label where it is known (`clean_label` if there is such a column; empty or -1 = unknown).
        index: a unique integer per row (`index` if there is such a column, else the row position).
        test_label: the label of the validation and test split, where it has another name than in `train`.
        weight: how far each label of `train` is believed, from 0 to 1 (`weight` of a data set that an audit cleaned).
    """

    image: str | None = None
    label: str | None = None
    clean: str | None = None
    index: str | None = None
    test_label: str | None = None
    weight: str | None = None

    def pick(self, names: Sequence[str], split: str, source: str) -> dict[str, str]:
        """The column for each role among `names`; `clean`, `index` and `weight` may be absent."""
        evaluation = split != "train"
        picked = {"image": self._find(names, self.image, IMAGE_COLUMNS, "image", source)}
        if evaluation and self.test_label is not None:
            picked["label"] = picked["clean"] = self._find(names, self.test_label, (), "label", source)
        elif evaluation and self.label not in (None, *names) and self.clean in names:
            # Sets with a noisy column in `train` usually have only the clean one elsewhere.
            logger.info("%s: no column `%s`, labels are taken from `%s`.", source, self.label, self.clean)
            picked["label"] = picked["clean"] = self.clean
        else:
            picked["label"] = self._find(names, self.label, LABEL_COLUMNS, "label", source)
            if self.clean is not None and (self.clean in names or not evaluation):
                picked["clean"] = self._find(names, self.clean, (), "clean label", source)
            elif self.clean is None and "clean_label" in names:
                picked["clean"] = "clean_label"
        if self.index is not None:
            picked["index"] = self._find(names, self.index, (), "index", source)
        elif "index" in names:
            picked["index"] = "index"
        if self.weight is not None and not evaluation:
            picked["weight"] = self._find(names, self.weight, (), "weight", source)
        elif {"weight", "audit_action"} <= set(names) and not evaluation:  # not any `weight`: it may be one in kg
            logger.warning("%s: labels count as far as the column `weight` says.", source)
            picked["weight"] = "weight"
        return picked

    @staticmethod
    def _find(names: Sequence[str], wanted: str | None, usual: Sequence[str], role: str, source: str) -> str:
        candidates = usual if wanted is None else (wanted,)
        for name in candidates:
            if name in names:
                return name
        raise ValueError(
            f"{source}: no {role} column `{'`, `'.join(candidates)}`. The columns are: {', '.join(map(str, names))}. "
            f"Name the right one with `{role.replace(' ', '_')}_column`"
            + (" (`test_label_column` for validation and test)." if role == "label" else ".")
        )


@dataclass
class RawSplit:
    """
    The columns of one split as they were read.

    Args:
        images: paths below the root, or an iterable over embedded images for each file.
        label, clean, index, weight: raw values; the last three are `None` where there is no such column.
        names: class names that came with the data, or `None`.
        by_name: a label is a class name even if it is made of digits (class folders).
        where: names a row for a message.
    """

    images: list
    label: list
    clean: list | None
    index: list | None
    names: list[str] | None
    where: Callable[[int], str]
    lines: np.ndarray | None = None
    source: str = ""
    by_name: bool = False
    weight: list | None = None


# -- labels -----------------------------------------------------------------------------------------------------------


def _parse_label(value: object, where: str, what: str) -> str | int:
    """A raw label as class name or as id (also an id written as text); errors for what cannot be a class."""
    if isinstance(value, str) and not FLOAT.fullmatch(value):
        if not is_plain(value):
            raise ValueError(f"{where}: {what} {value[:80]!r} has control characters or is no text.")
        return int(value) if INTEGER.fullmatch(value) else value
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise ValueError(f"{where}: {what} {str(value)[:80]!r} is not a class: labels are integers or class names.")


def _is_missing(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and np.isnan(value))


def _class_names(train: RawSplit, label_names: Sequence[str] | None) -> list[str]:
    """Class names in id order: the user's, those of the data, sorted names of `train`, or `0 .. max` for integers."""
    given = label_names if label_names is not None else train.names
    if given is not None:
        names = list(map(str, given))
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"`label_names` must be different names, at least one; got {shown(names)}.")
        return names
    ids: dict[int, int] = {}  # id -> first row that has it
    texts: dict[str, int] = {}
    for values, what in ((train.label, "label"), (train.clean or [], "clean label")):
        for row, value in enumerate(values):
            if _is_missing(value):
                if what == "label":
                    raise ValueError(f"{train.where(row)}: the label is missing.")
                continue
            label = value if train.by_name else _parse_label(value, train.where(row), what)
            if label == UNKNOWN and what == "clean label":
                continue
            if isinstance(label, int):
                if not 0 <= label < MAX_CLASSES:
                    raise ValueError(
                        f"{train.where(row)}: {what} {label} is out of range, expected 0..{MAX_CLASSES - 1}; "
                        "`label_names` maps other values."
                    )
                ids.setdefault(label, row)
            else:
                texts.setdefault(label, row)
    if not texts:
        logger.info("%s: integer labels without names: classes 0..%d.", train.source, max(ids))
        return [str(label) for label in range(max(ids) + 1)]
    if ids:
        number, text = next(iter(ids)), next(iter(texts))
        raise ValueError(
            f"{train.where(texts[text])}: the label {text!r} is a name, that of {train.where(ids[number])} the "
            f"integer {number}; pass `label_names`."
        )
    names = sorted(texts)
    logger.info("%s: %d classes in sorted order: %s.", train.source, len(names), ", ".join(names))
    return names


def _encode(raw: RawSplit, names: Sequence[str], split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, clean labels and index of a split as int64 arrays of shape `(num_rows,)`."""
    ids = {name: label for label, name in enumerate(names)}

    def encode(value: object, row: int, what: str) -> int:
        if isinstance(value, str) and value in ids:
            return ids[value]
        label = value if raw.by_name else _parse_label(value, raw.where(row), what)
        if isinstance(label, str):
            raise ValueError(
                f"{raw.where(row)}: {what} {label!r} of {split} is none of the {len(names)} classes: {shown(names)}."
            )
        if label == UNKNOWN and what != "label":
            return UNKNOWN
        if not 0 <= label < len(names):
            raise ValueError(
                f"{raw.where(row)}: {what} {label} of {split} is out of range, expected 0..{len(names) - 1}."
            )
        return label

    labels = np.empty(len(raw.label), dtype=np.int64)
    for row, value in enumerate(raw.label):
        if _is_missing(value):
            raise ValueError(f"{raw.where(row)}: the label is missing.")
        labels[row] = encode(value, row, "label")
    clean_labels = np.full(len(labels), UNKNOWN)
    for row, value in enumerate(raw.clean or []):
        if not _is_missing(value):
            clean_labels[row] = encode(value, row, "clean label")
    return labels, clean_labels, _encode_index(raw)


def _encode_index(raw: RawSplit) -> np.ndarray:
    if raw.index is None:
        return np.arange(len(raw.label))
    index = np.empty(len(raw.index), dtype=np.int64)
    for row, value in enumerate(raw.index):
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}", str(value)):
            raise ValueError(f"{raw.where(row)}: the index {value!r} is not a non-negative integer.")
        index[row] = int(value)
    order = np.argsort(index, kind="stable")
    twins = np.flatnonzero(index[order][1:] == index[order][:-1])
    if len(twins):
        first, second = order[twins[0]], order[twins[0] + 1]
        raise ValueError(f"{raw.where(second)}: the index {index[first]} is also that of {raw.where(first)}.")
    return index


def _encode_weight(raw: RawSplit) -> np.ndarray:
    """Weights as float64; 1 where there is no such column."""
    weights = np.ones(len(raw.label))
    for row, value in enumerate(raw.weight or []):
        try:
            weights[row] = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{raw.where(row)}: the weight {value!r} is not a number.") from None
    return weights


def check_classes(labels: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
    """Logs classes that a split lacks: a training set without a class of the test set cannot learn it."""
    present = {split: set(np.unique(values).tolist()) for split, values in labels.items()}
    for split, found in present.items():
        if split == "train":
            continue
        unseen = found - present["train"]
        if unseen:
            logger.warning(
                "%s has classes without a row in train: %s.", split, shown(names[i] for i in sorted(unseen))
            )
        absent = present["train"] - found
        if absent:
            logger.warning("%s lacks classes of train: %s.", split, shown(names[i] for i in sorted(absent)))


def warn_noisy_evaluation(split: str, labels: np.ndarray, clean_labels: np.ndarray) -> None:
    """Logs a validation or test split whose labels differ from its own clean labels."""
    wrong = (clean_labels != UNKNOWN) & (labels != clean_labels)
    if split != "train" and wrong.any():
        logger.warning(
            "%s: %d of %d labels differ from the clean label: scores on this split measure the noise too. "
            "Name the clean column with `test_label_column`.",
            split,
            wrong.sum(),
            len(labels),
        )


# -- readers of tables ------------------------------------------------------------------------------------------------

# Each yields the column names first and then `(line, values)` for each row.


def _decoded(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason}).") from None


def _read_csv(path: str) -> Iterator:
    reader = csv.reader(_decoded(path), delimiter="\t" if path.endswith(".tsv") else ",", strict=True)
    header = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = row
                if len(set(header)) != len(header):
                    raise ValueError(f"{path}:{reader.line_num}: two columns have one name: {', '.join(header)}.")
                yield header
            elif len(row) != len(header):
                raise ValueError(
                    f"{path}:{reader.line_num}: {len(row)} fields, the header has {len(header)}; names with a comma "
                    "must be quoted."
                )
            else:
                yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}.") from None
    if header is None:
        raise ValueError(f"{path}:1: the table is empty.")


def _records(records: Iterator[tuple[int, object]], path: str) -> Iterator:
    header: list[str] | None = None
    for number, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected an object with named fields, got {type(record).__name__}.")
        if header is None:
            header = list(record)
            yield header
        yield number, [record.get(name) for name in header]
    if header is None:
        raise ValueError(f"{path}:1: the table is empty.")


def _parse_json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from None


def _read_json(path: str) -> Iterator:
    # The positions of a JSON array are counted as lines are: from 1.
    content = _parse_json("".join(_decoded(path)), f"{path}:1")
    if not isinstance(content, list):
        raise ValueError(f"{path}:1: expected a list of objects, got {type(content).__name__}.")
    return _records(enumerate(content, start=1), path)


def _read_jsonl(path: str) -> Iterator:
    lines = read_lines(path)
    return _records(((number, _parse_json(line, f"{path}:{number}")) for number, line in lines), path)


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}


def read_text_table(path: str, split: str, columns: ColumnOptions, root: str) -> RawSplit:
    """Reads the columns in use of a CSV, TSV, JSON or JSONL table whose images are paths below `root`."""
    rows = READERS[os.path.splitext(path)[1]](path)
    names = next(rows)
    picked = columns.pick(names, split, f"{path}:1")
    at = {role: names.index(name) for role, name in picked.items()}
    values: dict[str, list] = {role: [] for role in picked}
    lines = []
    for number, row in rows:
        image = row[at["image"]]
        if not isinstance(image, str):
            raise ValueError(f"{path}:{number}: the image must be a path, got {image!r}.")
        values["image"].append(parse_path(image.removeprefix(f"{root}/"), path, number))
        for role in picked:
            if role != "image":
                value = row[at[role]]
                values[role].append(sys.intern(value) if isinstance(value, str) else value)
        lines.append(number)
    if not lines:
        raise ValueError(f"{path}:1: no rows below the column names.")
    return RawSplit(
        values["image"],
        values["label"],
        values.get("clean"),
        values.get("index"),
        None,
        lambda row: f"{path}:{lines[row]}",
        np.array(lines, dtype=np.int64),
        path,
        weight=values.get("weight"),
    )


def read_parquet_table(path: str, split: str, columns: ColumnOptions, root: str) -> RawSplit:
    """Reads the columns in use of a parquet file; images are embedded, or paths below `root`."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            picked = columns.pick(schema.names, split, path)
            paths = pa.types.is_string(schema.field(picked["image"]).type)
            table = file.read(columns=[name for role, name in picked.items() if paths or role != "image"])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}).") from None
    feature = Features.from_arrow_schema(schema).get(picked["label"])
    values = {role: table[name].to_pylist() for role, name in picked.items() if paths or role != "image"}
    if paths:
        for row, image in enumerate(values["image"]):
            if image is None:
                raise ValueError(f"{path}:{row + 1}: the image is missing.")
            values["image"][row] = parse_path(image.removeprefix(f"{root}/"), path, row + 1)
    return RawSplit(
        values["image"] if paths else ParquetImages(path, picked["image"]),
        values["label"],
        values.get("clean"),
        values.get("index"),
        feature.names if isinstance(feature, ClassLabel) else None,
        lambda row: f"{path}:{row + 1}",
        np.arange(1, table.num_rows + 1),
        path,
        weight=values.get("weight"),
    )


# -- builders ---------------------------------------------------------------------------------------------------------


@dataclass
class TableConfig(NoisyLabelConfig):
    """
    Args:
        tables (`dict`): split -> list of files.
        label_names (`list[str]`): class names in id order.
        image_column, label_column, clean_label_column, index_column, test_label_column, weight_column: see
            [`ColumnOptions`].
    """

    tables: dict | None = None
    label_names: list | None = None
    image_column: str | None = None
    label_column: str | None = None
    clean_label_column: str | None = None
    index_column: str | None = None
    test_label_column: str | None = None
    weight_column: str | None = None

    def columns(self) -> ColumnOptions:
        return ColumnOptions(
            self.image_column,
            self.label_column,
            self.clean_label_column,
            self.index_column,
            self.test_label_column,
            self.weight_column,
        )


class UserBuilder(NoisyLabelBuilder):
    """What tables and folders share: class names are found while reading, and not asked for again from the cache."""

    BUILDER_CONFIG_CLASS = TableConfig
    DESCRIPTION = "A data set of the user."

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=self.DESCRIPTION)

    def encode_splits(self, raw: dict[str, list[RawSplit]], root: str) -> dict[str, list[Rows]]:
        """Rows with labels of one mapping for all splits, from the files of each split."""
        train = raw["train"]
        merged = RawSplit(
            [],
            [value for part in train for value in part.label],
            [value for part in train for value in part.clean or []],
            None,
            train[0].names,
            lambda row: _where(train, row),
            source=train[0].source,
            by_name=train[0].by_name,
        )
        names = _class_names(merged, self.config.label_names)
        weighted = any(part.weight is not None for part in train)
        self.info.features = Features({**noisy_features(names), **({"weight": Value("float64")} if weighted else {})})
        splits: dict[str, list[Rows]] = {}
        for split, parts in raw.items():
            splits[split] = []
            start = 0
            for part in parts:
                labels, clean_labels, index = _encode(part, names, split)
                if part.index is None:
                    index = index + start
                start += len(index)
                extra = {"weight": _encode_weight(part)} if weighted else {}
                rows = Rows(part.images, labels, clean_labels, index, root, part.source, part.lines, extra)
                embedded = isinstance(part.images, ParquetImages)
                splits[split] += [rows] if embedded else self.on_disk(rows)
            labels, clean_labels = (
                np.concatenate([getattr(rows, name) for rows in splits[split]]) for name in ("labels", "clean_labels")
            )
            warn_noisy_evaluation(split, labels, clean_labels)
        check_classes({s: np.concatenate([rows.labels for rows in parts]) for s, parts in splits.items()}, names)
        return splits


def _where(parts: list[RawSplit], row: int) -> str:
    """The place of a row of several files put together."""
    for part in parts:
        if row < len(part.label):
            return part.where(row)
        row -= len(part.label)
    raise IndexError(row)


class Table(UserBuilder):
    """CSV, TSV, JSON, JSONL and parquet tables; see [`ColumnOptions`] for the columns."""

    TREE = "  train.csv  validation.csv  test.csv   (or .tsv, .json, .jsonl, .parquet; train*.parquet for shards)"
    REQUEST = "it is your own data."

    @classmethod
    def watched_files(cls, root: str, *, tables: Mapping[str, Sequence[str]], **options) -> list[str]:
        return [path for paths in tables.values() for path in paths]

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        raw: dict[str, list[RawSplit]] = {}
        for split, paths in self.config.tables.items():
            for path in paths:
                read = read_parquet_table if path.endswith(".parquet") else read_text_table
                raw.setdefault(split, []).append(read(path, split, self.config.columns(), root))
        return self.encode_splits(raw, root)


class ImageFolder(UserBuilder):
    """
    An image folder: `<split>/<class>/**`, or `<class>/**` alone, which is all `train`.

    A split folder with a `metadata.csv` or `metadata.jsonl` (columns `file_name`, `label`) is read by that table.
    Images that are in no class folder, or have no row in the table, are left out and counted in the log. `index` is
    the position in the sorted listing, or in the table.
    """

    TREE = """  train/<class>/*.jpg  test/<class>/*.jpg  validation/<class>/*.jpg    (the last two optional)
or <class>/*.jpg, or train/metadata.csv with the columns file_name and label beside the images"""
    REQUEST = "it is your own data."

    @classmethod
    def watched_files(cls, root: str, **options) -> list[str]:
        watched = []
        for folder, folders, files in os.walk(root, followlinks=True):
            folders.sort()
            watched += [folder, *(f"{folder}/{name}" for name in files if name in METADATA)]
        return watched

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        folders = find_splits(folder_names(root))
        if "train" not in folders:
            folders = {"train": ""}
        raw = {split: [self._read_folder(root, name, split)] for split, name in folders.items()}
        return self.encode_splits(raw, root)

    def _read_folder(self, root: str, name: str, split: str) -> RawSplit:
        folder = f"{root}/{name}" if name else root
        prefix = f"{name}/" if name else ""
        tables = [f"{folder}/{table}" for table in METADATA if os.path.isfile(f"{folder}/{table}")]
        found, others = list_images(folder)
        if others:
            logger.warning(
                "%s: %d files are no images by their suffix, first: %s.", folder, len(others), shown(others)
            )
        if tables:
            raw = read_text_table(tables[0], split, self.config.columns(), folder)
            unlisted = sorted(set(found) - set(raw.images))
            if unlisted:
                logger.warning(
                    "%s: %d images without a row in %s, left out, first: %s.",
                    folder,
                    len(unlisted),
                    os.path.basename(tables[0]),
                    shown(unlisted),
                )
            raw.images = [f"{prefix}{image}" for image in raw.images]
            return raw
        outside = [image for image in found if "/" not in image]
        if outside:
            logger.warning(
                "%s: %d images are in no class folder, left out, first: %s.", folder, len(outside), shown(outside)
            )
        images = [image for image in found if "/" in image]
        if not images:
            raise FileNotFoundError(f"No image in a class folder below {folder}.\n{self.help()}")
        labels = [sys.intern(image.partition("/")[0]) for image in images]
        empty = sorted({child for child in folder_names(folder) if not child.startswith(".")} - set(labels))
        if empty:
            logger.warning("%s: class folders without an image: %s.", folder, shown(empty))
        return RawSplit(
            [f"{prefix}{image}" for image in images],
            labels,
            None,
            None,
            None,
            lambda row: f"{folder}/{images[row]}",
            source=folder,
            by_name=True,
        )


def list_images(folder: str) -> tuple[list[str], list[str]]:
    """Sorted image files below `folder`, relative to it, and the other files; hidden ones do not count."""
    images, others = [], []
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = os.path.relpath(path, folder).replace(os.sep, "/")
        prefix = "" if prefix == "." else f"{prefix}/"
        for name in files:
            if not is_plain(prefix + name):
                raise ValueError(f"{folder}: the file name {prefix + name!r} is not UTF-8 text; rename the file.")
            if name.lower().endswith(IMAGE_SUFFIXES):
                images.append(prefix + name)
            elif not name.startswith(".") and name not in METADATA:
                others.append(prefix + name)
    return sorted(images), sorted(others)


def find_splits(names: Sequence[str]) -> dict[str, str]:
    """Our split names -> the names that a source uses for them."""
    found = {}
    for split, spellings in SPLITS.items():
        present = [name for name in spellings if name in names]
        if len(present) > 1:
            raise ValueError(
                f"Both `{present[0]}` and `{present[1]}` could be the split {split}; name it by `splits`."
            )
        if present:
            found[split] = present[0]
    return found


def _find_tables(folder: str) -> dict[str, list[str]]:
    """Split -> sorted table files of a folder, by the beginning of their names."""
    tables: dict[str, list[str]] = {}
    for name in sorted(file_names(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix not in TABLE_SUFFIXES:
            continue
        for split, spellings in SPLITS.items():
            if re.fullmatch(rf"({'|'.join(spellings)})([-_.].*)?", stem):
                tables.setdefault(split, []).append(f"{folder}/{name}")
    for split, paths in tables.items():
        if len({os.path.splitext(path)[1] for path in paths}) > 1:
            raise ValueError(f"The split {split} has tables of several kinds: {', '.join(paths)}. Keep one kind.")
    return {split: tables[split] for split in SPLITS if split in tables}


# -- anything ---------------------------------------------------------------------------------------------------------


def load_generic(
    name_or_path: str,
    *,
    config: str | None = None,
    data_dir: str | os.PathLike | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    clean_label_column: str | None = None,
    index_column: str | None = None,
    test_label_column: str | None = None,
    weight_column: str | None = None,
    label_names: Sequence[str] | None = None,
    splits: Mapping[str, str] | None = None,
    on_missing: str = "error",
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> DatasetDict:
    """
    Loads a folder, a table, a saved data set or a Hub data set; see `hnml_hf.data.load_noisy_dataset`.

    Args:
        name_or_path (`str`): `imagefolder` (with `data_dir`), a local file or folder, or the id of a Hub data set.
        data_dir: for tables: where image paths start (default: the folder of the table).
        splits (`dict`): our split name (`train`, `validation`, `test`) -> the name or table file in the source.
    """
    columns = {
        "image_column": image_column,
        "label_column": label_column,
        "clean_label_column": clean_label_column,
        "index_column": index_column,
        "test_label_column": test_label_column,
        "weight_column": weight_column,
    }
    if splits is not None and not set(splits) <= set(SPLITS):
        raise ValueError(f"`splits` maps {', '.join(SPLITS)} to names of the source; got {', '.join(splits)}.")
    options = {
        "on_missing": on_missing,
        "label_names": None if label_names is None else list(label_names),
        **columns,
    }
    if name_or_path == "imagefolder":
        if data_dir is None:
            raise ValueError("`imagefolder` needs `data_dir`, the folder with the images.")
        return prepare(ImageFolder(data_dir=data_dir, cache_dir=cache_dir, **options), num_proc)
    path = os.path.abspath(os.path.expanduser(name_or_path))
    if os.path.isfile(path):
        return _load_tables({"train": [path]}, data_dir or os.path.dirname(path), options, cache_dir, num_proc)
    if os.path.isdir(path):
        if any(os.path.isfile(f"{path}/{name}") for name in ("dataset_dict.json", "state.json")):
            return _canonical(_load_from_disk(path), path, columns, label_names, splits)
        tables = _find_tables(path)
        if splits is not None:
            tables = {split: [f"{path}/{name}"] for split, name in splits.items()}
        if tables:
            return _load_tables(tables, data_dir or path, options, cache_dir, num_proc)
        return prepare(ImageFolder(data_dir=path, cache_dir=cache_dir, **options), num_proc)
    return _canonical(_load_from_hub(name_or_path, config, cache_dir), name_or_path, columns, label_names, splits)


def prepare(builder: datasets.DatasetBuilder, num_proc: int | None = None) -> DatasetDict:
    """Prepares a builder's data set, or takes it from the Arrow cache."""
    builder.download_and_prepare(num_proc=num_proc)
    return DatasetDict(builder.as_dataset())


def _load_tables(tables, data_dir, options: dict, cache_dir, num_proc) -> DatasetDict:
    for paths in tables.values():
        for path in paths:
            if not os.path.isfile(path):
                raise FileNotFoundError(f"The table {path} does not exist.")
            if not path.endswith(TABLE_SUFFIXES):
                raise ValueError(f"{path}: tables end with one of {', '.join(TABLE_SUFFIXES)}.")
    if "train" not in tables:
        raise ValueError(f"No table for `train` among {', '.join(tables)}: name one by `splits`.")
    root = os.path.abspath(os.path.expanduser(data_dir))
    return prepare(Table(data_dir=root, tables=tables, cache_dir=cache_dir, **options), num_proc)


def _load_from_disk(path: str) -> DatasetDict:
    loaded = datasets.load_from_disk(path)
    return DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded


def _load_from_hub(name: str, config: str | None, cache_dir) -> DatasetDict:
    tried = f"{name!r} is no data set name of this package and no local file or folder"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{tried}, and cannot be the id of a Hub data set (`user/name`).")
    try:
        loaded = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except ConnectionError as error:
        raise ConnectionError(f"{tried}, and the Hub could not be reached: {error}") from error
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"{tried}, and the Hub has no such data set that you may read: {error}") from error
    return DatasetDict(loaded)


def _canonical(loaded: DatasetDict, source: str, columns: dict, label_names, splits) -> DatasetDict:
    """The four features from any data set with an image and a label column."""
    found = dict(splits) if splits is not None else find_splits(list(loaded))
    if "train" not in found or not set(found.values()) <= set(loaded):
        raise ValueError(
            f"{source}: the splits are {', '.join(loaded)}; pass `splits`, for example "
            "{'train': ..., 'test': ...}, to say which is which."
        )
    options = ColumnOptions(
        columns["image_column"],
        columns["label_column"],
        columns["clean_label_column"],
        columns["index_column"],
        columns["test_label_column"],
        columns["weight_column"],
    )
    raw, picked = {}, {}
    for split, name in found.items():
        dataset = loaded[name]
        picked[split] = options.pick(dataset.column_names, split, f"{source} ({name})")
        feature = dataset.features[picked[split]["image"]]
        if not isinstance(feature, Image) and feature != Value("string"):
            raise ValueError(f"{source} ({name}): column `{picked[split]['image']}` holds no images but {feature}.")
        raw[split] = _raw_columns(dataset, picked[split], f"{source} ({name})")
    names = _class_names(raw["train"], label_names)
    result = DatasetDict()
    encoded = {}
    for split, name in found.items():
        labels, clean_labels, index = _encode(raw[split], names, split)
        encoded[split] = labels
        warn_noisy_evaluation(split, labels, clean_labels)
        result[split] = assemble(loaded[name], picked[split]["image"], labels, clean_labels, index, names)
        if raw[split].weight is not None:
            result[split] = result[split].add_column("weight", _encode_weight(raw[split]), feature=Value("float64"))
    check_classes(encoded, names)
    return result


def _raw_columns(dataset: Dataset, picked: Mapping[str, str], source: str) -> RawSplit:
    roles = {role: name for role, name in picked.items() if role != "image"}
    table = dataset.select_columns(list(set(roles.values()))).with_format("arrow")[:]
    values = {role: table[name].to_pylist() for role, name in roles.items()}
    feature = dataset.features[picked["label"]]
    return RawSplit(
        [],
        values["label"],
        values.get("clean"),
        values.get("index"),
        feature.names if isinstance(feature, ClassLabel) else None,
        lambda row: f"{source} row {row}",
        source=source,
        weight=values.get("weight"),
    )
