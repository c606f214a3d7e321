"""The builder behind every dataset that is read from a folder: it checks files, sizes and ids, and yields the rows."""

import hashlib
import io
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import DatasetDict

from ...common.words import counted
from ..files import first_few, missing_files
from ..schema import DataError, noisy_features


logger = logging.getLogger(__name__)

ON_MISSING = ("error", "skip")
ROWS_PER_SHARD = 50_000  # rows that one process of `num_proc` takes at a time
REMOTE = re.compile(r"\w+://")  # how paths begin that are no files of this machine


@dataclass
class Rows:
    """A run of rows of one split.

    Args:
        images: file names below `root`, or the images themselves (`{"bytes": ..., "path": ...}`) in an iterable.
        labels, clean_labels, index (`np.ndarray` of shape `(num_rows,)`): the other three features.
        source, lines: the list file, and the line of each row in it (for messages).
        extra: further columns, for a builder that declares them in its features.
    """

    images: Any
    labels: np.ndarray
    clean_labels: np.ndarray
    index: np.ndarray
    root: str = ""
    source: str = ""
    lines: np.ndarray | None = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def select(self, which: np.ndarray | slice) -> "Rows":
        """The rows of a boolean mask or a slice; `images` must be a list."""
        if isinstance(which, slice):
            images = self.images[which]
        else:
            images = [self.images[row] for row in np.flatnonzero(which)]
        return replace(
            self,
            images=images,
            labels=self.labels[which],
            clean_labels=self.clean_labels[which],
            index=self.index[which],
            lines=None if self.lines is None else self.lines[which],
            extra={name: values[which] for name, values in self.extra.items()},
        )

    def where(self, row: int) -> str:
        """`file:line` of a row, or the file alone."""
        return self.source if self.lines is None else f"{self.source}:{self.lines[row]}"


@dataclass
class ParquetImages:
    """The image column of a parquet file, or some of its rows, read in small batches each time it is iterated.

    Args:
        path: the parquet file.
        column: its column of images: bytes, or structs of bytes and path.
        rows: those to read, ascending; default: all.
        files: the checked absolute path of each row whose image is not in the file, by row.
    """

    path: str
    column: str = "image"
    rows: np.ndarray | None = None
    files: Mapping[int, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict]:
        rows = itertools.count() if self.rows is None else iter(self.rows.tolist())
        with pq.ParquetFile(self.path) as file:
            start = 0
            for batch in file.iter_batches(columns=[self.column], batch_size=1_000):
                images = batch.column(self.column)
                if self.rows is not None:
                    low, high = (int(np.searchsorted(self.rows, row)) for row in (start, start + len(batch)))
                    images = images.take(pa.array(self.rows[low:high] - start))
                start += len(batch)
                for image, row in zip(images.to_pylist(), rows):  # noqa: B905 (the rows go on)
                    # `datasets` prefers a file of the name that comes with bytes, if there is one: no name then
                    content = image.get("bytes") if isinstance(image, dict) else image
                    if content is None and row not in self.files:
                        raise DataError(f"{self.path}:{row + 1}: the image is missing.")
                    yield {"bytes": content, "path": None if content is not None else self.files[row]}


def encode_png(pixels: np.ndarray) -> dict:
    """An image of shape `(height, width, 3)` as the value of an `Image()` feature."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """A parquet file, closed in the end; a `ValueError` with its name if it cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}).") from None


def read_parquet(path: str, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Whole integer columns of a parquet file as int64; a `ValueError` with the file for anything else."""
    with open_parquet(path) as file:
        absent = [name for name in columns if name not in file.schema_arrow.names]
        if absent:
            raise ValueError(f"{path}: no column {', '.join(absent)}; it has {', '.join(file.schema_arrow.names)}.")
        table = file.read(columns=list(columns))
    arrays = {}
    for name in columns:
        values = table[name]
        if not pa.types.is_integer(values.type) or values.null_count:
            raise ValueError(
                f"{path}: column `{name}` must hold integers in every row, got {values.type} with "
                f"{counted(values.null_count, 'empty row')}."
            )
        arrays[name] = values.to_numpy().astype(np.int64)
    return arrays


@dataclass
class NoisyLabelConfig(datasets.BuilderConfig):
    """
    Args:
        partial (`bool`): the folder holds a part of the dataset: do not compare split sizes with the published ones.
        on_missing (`"error"` or `"skip"`): what to do with a listed image that is not on disk or has no label.
            `"skip"` leaves the row out and logs the count; `index` of the other rows does not change. Which images are
            on disk is looked up at every load, since the cache knows the lists alone.
        fingerprint (`str`): set by the builder from the list files, so that a changed list is prepared anew.
    """

    version: datasets.Version | str | None = datasets.Version("1.3.0")  # of what the cache holds
    partial: bool = False
    on_missing: str = "error"
    fingerprint: str = ""


class NoisyLabelBuilder(datasets.GeneratorBasedBuilder):
    """Base of the builders: checks the folder, keys the cache by the list files, checks and yields rows.

    A subclass gives the texts below, `class_names()`, `watched_files()` and `read_splits()`.

    Args:
        data_dir (`str`): the folder that holds the data.
        args, kwargs: as in `datasets.DatasetBuilder`; also the options of the config.

    Raises:
        ValueError: without a folder, or with another `on_missing`.
        FileNotFoundError: if there is no such folder.
    """

    BUILDER_CONFIG_CLASS = NoisyLabelConfig
    DESCRIPTION = ""
    HOMEPAGE = ""
    LICENSE = ""
    CITATION = ""
    TREE = ""  # the expected folder, shown when something is missing
    REQUEST = ""  # where the data can be had, if they are not the user's own

    def __init__(self, *args, data_dir: str | None = None, **kwargs):
        if data_dir is None:
            raise ValueError(f"{type(self).__name__} reads a local folder: pass `data_dir`.\n{self.help()}")
        data_dir = os.path.abspath(os.path.expanduser(data_dir))
        if not os.path.isdir(data_dir):
            raise FileNotFoundError(f"`data_dir` {data_dir} is not a folder.\n{self.help()}")
        if kwargs.get("on_missing", "error") not in ON_MISSING:
            raise ValueError(f"`on_missing` must be 'error' or 'skip', got {kwargs['on_missing']!r}.")
        kwargs["fingerprint"] = fingerprint(self.watched_files(data_dir, **kwargs))
        super().__init__(*args, data_dir=data_dir, **kwargs)

    # what a subclass gives

    @classmethod
    def watched_files(cls, root: str, **options) -> list[str]:
        """The list and label files (or image folders) whose change must rebuild the cache."""
        raise NotImplementedError

    def class_names(self) -> list[str]:
        """The class names in id order."""
        raise NotImplementedError

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        """Read and check all list files; errors name file and line."""
        raise NotImplementedError

    # what all share

    @classmethod
    def help(cls) -> str:
        """The expected tree and the place to ask for the data."""
        source = f"\nWhere to get it: {cls.REQUEST}" if cls.REQUEST else ""
        return f"Expected below `data_dir`:\n{cls.TREE}{source}"

    @classmethod
    def need(cls, root: str, *names: str) -> list[str]:
        """The paths of required files; an error that shows the expected tree if one is missing."""
        absent = [name for name in names if not os.path.isfile(f"{root}/{name}")]
        if absent:
            raise FileNotFoundError(f"Not found in {root}: {', '.join(absent)}.\n{cls.help()}")
        return [f"{root}/{name}" for name in names]

    def check_size(self, what: str, found: int, published: int | None) -> None:
        """Compare a count with the published one unless the tree is `partial`."""
        if published is not None and found != published and not self.config.partial:
            raise ValueError(
                f"{what}: found {counted(found, 'row')}, the published size is {published:,}. The lists are "
                "incomplete or of another version; pass `partial=True` if a part of the dataset is intended."
            )

    def drop(self, rows: Rows, bad: np.ndarray, what: str) -> Rows:
        """Raise naming the first `bad` rows (boolean mask), or log and leave them out under `on_missing="skip"`."""
        found = np.flatnonzero(bad)
        if not len(found):
            return rows
        names = first_few(rows.images[row] for row in found)
        text = f"{rows.where(int(found[0]))}: {what}: {len(found):,} of {counted(len(bad), 'row')}, first: {names}"
        if self.config.on_missing == "error":
            raise ValueError(f"{text}. Restore them, or pass `on_missing='skip'` to leave these rows out.")
        logger.warning("%s; left out.", text)
        return rows.select(~bad)

    def on_disk(self, rows: Rows) -> list[Rows]:
        """Refuse rows without image on disk, naming file and line, and cut them in shards.

        Under `on_missing="skip"` all rows go to the cache: `keep_on_disk` leaves out those without image at each load.
        """
        if self.config.on_missing == "error":
            self.drop(rows, missing_files(rows.root, rows.images), f"no such image below {rows.root}")
        return [
            rows.select(slice(start, start + ROWS_PER_SHARD))
            for start in range(0, max(len(rows.index), 1), ROWS_PER_SHARD)
        ]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=self.DESCRIPTION,
            features=noisy_features(self.class_names()),
            homepage=self.HOMEPAGE,
            license=self.LICENSE,
            citation=self.CITATION,
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        # Everything is read and checked here, before the first row is written: errors reach the user as they are, not
        # wrapped by the writer, and a bad last line costs no half-written cache.
        splits = self.read_splits(self.config.data_dir)
        for split, shards in splits.items():
            index = np.concatenate([rows.index for rows in shards])
            if not len(index):
                raise ValueError(f"{shards[0].source}:1: the split {split!r} has no rows.\n{self.help()}")
            values, counts = np.unique(index, return_counts=True)
            if (counts > 1).any():
                raise ValueError(f"{split}: `index` is not unique, repeated: {first_few(values[counts > 1])}.")
        return [datasets.SplitGenerator(name=split, gen_kwargs={"shards": shards}) for split, shards in splits.items()]

    def _as_dataset(self, split=datasets.Split.TRAIN, in_memory: bool = False) -> datasets.Dataset:
        dataset = super()._as_dataset(split, in_memory)
        return keep_on_disk(dataset, f"{self.config.data_dir} ({split})", self.config.on_missing)

    def _generate_examples(self, shards: list[Rows]):
        for rows in shards:
            columns = {"label": rows.labels, "clean_label": rows.clean_labels, "index": rows.index, **rows.extra}
            lists = [values.tolist() for values in columns.values()]
            for image, *values in zip(rows.images, *lists, strict=True):
                if isinstance(image, str):
                    image = f"{rows.root}/{image}"
                example = dict(zip(columns, values, strict=True))
                yield example["index"], {"image": image, **example}


def outside_paths(dataset: datasets.Dataset, column: str) -> list[str | None]:
    """The path of each row whose image is not in the dataset; `None` for one that is, or has no path."""
    images = dataset.data.column(column)
    paths = pc.if_else(pc.is_null(pc.struct_field(images, "bytes")), pc.struct_field(images, "path"), None)
    return (paths if dataset._indices is None else paths.take(dataset._indices.column(0))).to_pylist()


def not_on_disk(dataset: datasets.Dataset) -> dict[int, str]:
    """Row -> path, of the images that are files of this machine and not there at this moment."""
    local = {row: path for row, path in enumerate(outside_paths(dataset, "image")) if path and not REMOTE.match(path)}
    missing = missing_files("", list(local.values()))
    return {row: path for (row, path), gone in zip(local.items(), missing, strict=True) if gone}


def keep_on_disk(dataset: datasets.Dataset, source: str, on_missing: str) -> datasets.Dataset:
    """The rows whose images are embedded, on another machine, or on disk at this moment.

    Args:
        dataset (`datasets.Dataset`): with a column `image`.
        source (`str`): for the messages.
        on_missing (`"error"` or `"skip"`): stop at an image that is not there, or leave it out and log the count.

    Raises:
        ValueError: naming the row, for an image that is not there; if no row is left.
    """
    missing = not_on_disk(dataset)
    if not missing:
        return dataset
    text = (
        f"{source} row {next(iter(missing))}: no such image: {len(missing):,} of {counted(len(dataset), 'row')}, "
        f"first: {first_few(missing.values())}"
    )
    if on_missing == "error":
        raise ValueError(f"{text}. Restore them, or pass `on_missing='skip'` to leave these rows out.")
    if len(missing) == len(dataset):
        raise ValueError(f"{text}. No row is left: is this the right folder?")
    logger.warning("%s; left out.", text)
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), list(missing)))


def prepare(builder: datasets.DatasetBuilder, num_proc: int | None = None) -> DatasetDict:
    """Prepare a builder's dataset, or take it from the Arrow cache; `num_proc` processes write it.

    Raises:
        ValueError, OSError: what is wrong in the data or with the disk, without the error that `datasets` puts around.
    """
    try:
        builder.download_and_prepare(num_proc=num_proc)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise
    return DatasetDict(builder.as_dataset())


def fingerprint(paths: Iterable[str]) -> str:
    """A hash over name, size and time of files and folders: the key that keeps the Arrow cache from going stale."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        status = os.stat(path)
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
