"""Tables of labels: CSV, TSV, JSON, JSONL and parquet, read into the columns in use; errors name file and line."""

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Features

from ..files import as_on_disk, file_names, read_lines, table_path
from ..published.builder import ParquetImages, open_parquet
from ..splits import SPLITS
from .columns import ColumnOptions, RawSplit, divide, named, split_of, split_values


TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def table_suffix(path: str) -> str:
    """The suffix of a file, in small letters: of what kind a table is."""
    return os.path.splitext(path)[1].lower()


def find_tables(folder: str) -> dict[str, list[str]]:
    """Split -> sorted table files of a folder, by the beginning of their names."""
    tables: dict[str, list[str]] = {}
    for name in sorted(file_names(folder)):
        stem = os.path.splitext(name)[0]
        if table_suffix(name) not in TABLE_SUFFIXES:
            continue
        for split, spellings in SPLITS.items():
            if re.fullmatch(rf"({'|'.join(spellings)})([-_.].*)?", stem, re.IGNORECASE):
                tables.setdefault(split, []).append(f"{folder}/{name}")
    for split, paths in tables.items():
        if len(set(map(table_suffix, paths))) > 1:
            raise ValueError(f"The split {split} has tables of several kinds: {', '.join(paths)}. Keep one kind.")
    return {split: tables[split] for split in SPLITS if split in tables}


def read_splits(
    path: str,
    split: str,
    columns: ColumnOptions,
    root: str,
    names: Mapping[str, str] | None = None,
    *,
    alone: bool,
    below: str = "",
) -> dict[str, RawSplit]:
    """Read a table into the split of its name, or into those that a column names: [`read_table`] and [`divide`].

    Args:
        below (`str`): only rows whose image path begins so.
    """

    def read(ours: str) -> RawSplit:
        raw = read_table(path, ours, columns, root)
        return raw.select([row for row, image in enumerate(raw.images) if image.startswith(below)]) if below else raw

    raw = read(split)
    if raw.split is None:
        return {split: raw}
    rows = divide(raw, split, columns, names, alone=alone)
    # the column of the label may differ between splits
    return {ours: (raw if ours == split else read(ours)).select(which) for ours, which in rows.items()}


def column_names(path: str) -> list[str]:
    """Names of the columns of a table."""
    if table_suffix(path) != ".parquet":
        return next(READERS[table_suffix(path)](path))
    with open_parquet(path) as file:
        return file.schema_arrow.names


def read_table(path: str, split: str, columns: ColumnOptions, root: str) -> RawSplit:
    """Read the columns in use of a table whose images are paths below `root`, or are embedded (parquet).

    Args:
        path (`str`): of the table; its suffix says of what kind it is.
        split (`str`): ours; evaluation splits may have their label in another column.
        columns (`ColumnOptions`): which ones hold what.
        root (`str`): where image paths start.

    Raises:
        ValueError: naming file and line, for what cannot be read.
    """
    return (_read_parquet if table_suffix(path) == ".parquet" else _read_text)(path, split, columns, root)


def _read_parquet(path: str, split: str, columns: ColumnOptions, root: str) -> RawSplit:
    with open_parquet(path) as file:
        schema = file.schema_arrow
        picked = columns.pick(schema.names, split, path)
        paths = _is_text(schema.field(picked["image"]).type)
        table = file.read(columns=[name for role, name in picked.items() if paths or role != "image"])
        num_rows = file.metadata.num_rows

        def distinct(name: str) -> list:
            if not _is_text(schema.field(name).type):
                return []
            first = next(file.iter_batches(batch_size=1, columns=[name]), None)  # one value rules most columns out
            if first is None or split_of(first.column(0)[0].as_py()) is None:
                return []
            return pc.unique(file.read(columns=[name])[name]).to_pylist()

        columns.warn_of_splits(schema.names, picked, distinct, path)
        files = {} if paths else _image_files(file, picked["image"], path, root)
    values = {role: table[name].to_pylist() for role, name in picked.items() if paths or role != "image"}
    if paths:
        for row, image in enumerate(values["image"]):
            if image is None:
                raise ValueError(f"{path}:{row + 1}: the image is missing.")
        values["image"] = _table_paths(values["image"], root, path, range(1, num_rows + 1))
    return RawSplit(
        as_on_disk(root, values["image"])
        if paths
        else ParquetImages(path, picked["image"], np.arange(num_rows), files),
        where=lambda row: f"{path}:{row + 1}",
        index=values.get("index"),
        weight=values.get("weight"),
        source=path,
        lines=np.arange(1, num_rows + 1),
        **named(values, Features.from_arrow_schema(schema), picked),
    )


def _image_files(file: pq.ParquetFile, column: str, path: str, root: str) -> dict[int, str]:
    """The files of those rows whose struct has a path and no bytes, by row: as paths in a column of their own."""
    kind = file.schema_arrow.field(column).type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return {}
    if not pa.types.is_struct(kind) or not {"bytes", "path"} & {field.name for field in kind}:
        raise ValueError(f"{path}: column `{column}` holds no images but {kind}.")
    if all(field.name != "path" or not _is_text(field.type) for field in kind):
        return {}
    found: dict[int, str] = {}
    start = 0
    for batch in file.iter_batches(columns=[column], batch_size=1_000):
        images = batch.column(column)
        paths = pc.struct_field(images, "path")
        if any(field.name == "bytes" for field in kind):
            paths = pc.if_else(pc.is_null(pc.struct_field(images, "bytes")), paths, None)
        for row in np.flatnonzero(pc.is_valid(paths).to_numpy(zero_copy_only=False)).tolist():
            found[start + row] = paths[row].as_py()
        start += len(batch)
    names = as_on_disk(root, _table_paths([*found.values()], root, path, [row + 1 for row in found]))
    return {row: f"{root}/{name}" for row, name in zip(found, names, strict=True)}


def _table_paths(texts: list[str], root: str, path: str, numbers: Sequence[int]) -> list[str]:
    return [table_path(text, root, path, number, texts) for text, number in zip(texts, numbers, strict=True)]


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text; in which form depends on what wrote the table."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _read_text(path: str, split: str, columns: ColumnOptions, root: str) -> RawSplit:
    rows = READERS[table_suffix(path)](path)
    names = next(rows)
    picked = columns.pick(names, split, f"{path}:1")
    at = {role: names.index(name) for role, name in picked.items()}
    values: dict[str, list] = {role: [] for role in picked}
    # the different values of each other column, as long as they are names of splits
    others: dict[str, set] = {name: set() for name in names if name not in picked.values()}
    lines = []
    for number, row in rows:
        for name in [*others]:
            value = row[names.index(name)]
            if split_of(value) is None:
                del others[name]
            else:
                others[name].add(value)
        image = row[at["image"]]
        if not isinstance(image, str):
            raise ValueError(f"{path}:{number}: the image must be a path, got {image!r}.")
        values["image"].append(image)
        for role in picked:
            if role != "image":
                value = row[at[role]]
                values[role].append(sys.intern(value) if isinstance(value, str) else value)
        lines.append(number)
    if not lines:
        raise ValueError(f"{path}:1: no rows below the column names.")
    columns.warn_of_splits(names, picked, lambda name: others.get(name, ()), path)
    return RawSplit(
        as_on_disk(root, _table_paths(values["image"], root, path, lines)),
        where=lambda row: f"{path}:{lines[row]}",
        label=values.get("label"),
        clean=values.get("clean"),
        index=values.get("index"),
        weight=values.get("weight"),
        split=split_values(values),
        source=path,
        lines=np.array(lines, dtype=np.int64),
    )


# -- readers: each yields the column names first and then `(line, values)` for each row -------------------------------


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
    reader = csv.reader(_decoded(path), delimiter="\t" if table_suffix(path) == ".tsv" else ",", strict=True)
    header = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                other = re.search(r"[;\t|]", header[0]) if len(header) == 1 else None
                if other:
                    raise ValueError(
                        f"{path}:{reader.line_num}: one column, {header[0][:200]!r}: fields must be separated by "
                        f"{'tabs' if table_suffix(path) == '.tsv' else 'commas (or by tabs in a .tsv)'}, not by "
                        f"{other[0]!r}."
                    )
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


def _records(read: Callable[[], Iterator[tuple[int, Any]]], path: str) -> Iterator:
    # Read twice: a later record may have a field that the first one lacks, and all at once take much memory.
    header: dict[str, None] = {}
    for number, record in read():
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected an object with named fields, got {type(record).__name__}.")
        header.update(dict.fromkeys(record))
    if not header:
        raise ValueError(f"{path}:1: the table is empty.")
    yield list(header)
    for number, record in read():
        yield number, [record.get(name) for name in header]


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
    return _records(lambda: enumerate(content, start=1), path)


def _read_jsonl(path: str) -> Iterator:
    return _records(
        lambda: ((number, _parse_json(line, f"{path}:{number}")) for number, line in read_lines(path)), path
    )


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
