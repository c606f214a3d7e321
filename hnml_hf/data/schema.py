"""
What every data set of this package has in common: four features, readers that name file and line, checks of files and
sizes, and the builder that puts them together.

A builder yields `image`, `label` (given, maybe wrong), `clean_label` (-1 = unknown) and `index` (a stable sample id:
the position in the official order of the split).
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, Value


logger = logging.getLogger(__name__)

COLUMNS = ("image", "label", "clean_label", "index")
UNKNOWN = -1  # value of `clean_label` where the true class is not known
ROWS_PER_SHARD = 50_000  # rows that one process of `num_proc` takes at a time
SHOWN = 5  # how many offending keys an error lists


def noisy_features(names: Sequence[str]) -> Features:
    """The features that all builders share; `names` are the class names in id order."""
    return Features(
        {
            "image": Image(),
            "label": ClassLabel(names=list(names)),
            "clean_label": ClassLabel(names=list(names)),
            "index": Value("int64"),
        }
    )


def column(dataset: Dataset, name: str) -> np.ndarray:
    """One column without its images being decoded, as an array of shape `(num_rows,)`."""
    return dataset.select_columns([name]).with_format("numpy")[:][name]


def labels_fingerprint(index: np.ndarray, labels: np.ndarray, num_classes: int) -> str:
    """A hash of the number of classes and of the id and label of each row, whatever the order of the rows.

    Unlike the cache fingerprint of `datasets` it depends on the content alone: it is the same on every machine.
    """
    order = np.argsort(index, kind="stable")
    digest = hashlib.sha256(str(num_classes).encode())
    for values in (index, labels):
        digest.update(values[order].astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def class_balanced(
    dataset: Dataset,
    num_samples: int | None = None,
    *,
    per_class: int | None = None,
    seed: int = 0,
    label_column: str = "label",
) -> Dataset:
    """
    Draws the same number of rows from every class, by the given (noisy) label and without replacement.

    This is the sampling of the Clothing1M protocols (DivideMix, ICLR 2020: 64,000 rows an epoch). Call it with another
    seed for another epoch. `index` keeps the ids of the full set; the stored order is kept too.

    Args:
        num_samples (`int`): rows in all, split evenly; a remainder of the division is left out.
        per_class (`int`): rows of each class, instead of `num_samples`.

    A class with fewer rows gives all it has, with a warning in the log.
    """
    num_classes = dataset.features[label_column].num_classes
    if (num_samples is None) == (per_class is None):
        raise ValueError("`class_balanced` needs either `num_samples` or `per_class`, and not both.")
    quota = per_class if per_class is not None else num_samples // num_classes
    if quota < 1:
        raise ValueError(
            f"`class_balanced` needs at least one row for each of the {num_classes} classes; got {quota}."
        )
    labels = column(dataset, label_column)
    generator = np.random.default_rng(seed)
    picked, short = [], []
    for label in range(num_classes):
        rows = np.flatnonzero(labels == label)
        if len(rows) < quota:
            short.append(f"{dataset.features[label_column].int2str(label)} ({len(rows)})")
        picked.append(generator.permutation(rows)[:quota])
    if short:
        logger.warning("class_balanced: fewer than %d rows in: %s; all of them are taken.", quota, ", ".join(short))
    return dataset.select(np.sort(np.concatenate(picked)))


def assemble(
    images: Dataset,
    image_column: str,
    labels: np.ndarray,
    clean_labels: np.ndarray,
    index: np.ndarray,
    names: Sequence[str],
) -> Dataset:
    """
    The four features from a data set with images and from arrays of shape `(num_rows,)`.

    Images are neither read nor copied: the other columns are put beside them.
    """
    features = noisy_features(names)
    dataset = images.select_columns([image_column])
    if image_column != "image":
        dataset = dataset.rename_column(image_column, "image")
    dataset = dataset.cast_column("image", Image())
    for name, values in (("label", labels), ("clean_label", clean_labels), ("index", index)):
        dataset = dataset.add_column(name, pa.array(values, pa.int64()), feature=features[name])
    return dataset


# -- reading list files -----------------------------------------------------------------------------------------------


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """
    Yields `(line number, text)` of a UTF-8 list file, without line end and byte-order mark.

    Lines end at LF or CRLF only: `str.splitlines` would also cut at characters that may be part of a file name. Blank
    lines at the end of the file are dropped, a blank line elsewhere is an error.
    """
    blank = None
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            if not raw.strip():
                blank = blank or number
                continue
            if blank:
                raise ValueError(f"{path}:{blank}: blank line inside the list; remove it.")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason}): {raw[:80]!r}.") from None


def is_plain(text: str) -> bool:
    """Whether a text has no control characters and can be written as UTF-8."""
    return not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text)


def parse_path(text: str, path: str | os.PathLike, number: int) -> str:
    """Checks a file name of a list: relative, inside the data folder, without control characters."""
    climbs = ".." in text and ".." in re.split(r"[/\\]", text)
    if not text or text[0] in "/\\" or text[1:2] == ":" or climbs:
        raise ValueError(
            f"{path}:{number}: the path {text[:200]!r} is not a relative path inside the data folder; "
            "absolute paths and `..` are refused."
        )
    if not is_plain(text):
        raise ValueError(f"{path}:{number}: control character in the path {text[:200]!r}.")
    if text.endswith(("/", "\\", "/.")) or text == ".":
        raise ValueError(f"{path}:{number}: the path {text[:200]!r} names no file.")
    return text


def parse_integer(text: str, path: str | os.PathLike, number: int, what: str, low: int, high: int) -> int:
    """Parses plain decimal digits; `low <= value < high`, else a `ValueError` with file and line."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ValueError(f"{path}:{number}: {what} must be an integer, got {text[:80]!r}.")
    value = int(text)
    if not low <= value < high:
        raise ValueError(f"{path}:{number}: {what} {value} is out of range, expected {low}..{high - 1}.")
    return value


def parse_keyed_label(
    line: str, path: str | os.PathLike, number: int, num_classes: int, *, allow_missing: bool = False
) -> tuple[str, int | None]:
    """
    Parses `<file name> <label>`, split at the last blank (names may hold commas and blanks).

    Returns:
        `tuple`: the checked file name and the label, `None` for a line that ends after the name if `allow_missing`.
    """
    key, blank, label = line.rpartition(" ")
    if not blank or not label:
        if not allow_missing:
            raise ValueError(f"{path}:{number}: no label after the file name in {line[:200]!r}.")
        return parse_path(line.rstrip(" "), path, number), None
    return parse_path(key, path, number), parse_integer(label, path, number, "label", 0, num_classes)


def shown(items: Iterable[object]) -> str:
    """The first few offenders of an error message."""
    items = list(items)
    return ", ".join(str(item) for item in items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")


def missing_files(root: str, names: Sequence[str]) -> np.ndarray:
    """
    Which of `names` (relative to `root`) are no files, as a boolean array of shape `(len(names),)`.

    Lists each folder once instead of asking for each file: a million names cost a thousand folder listings.
    """
    by_folder: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        by_folder.setdefault(name.rpartition("/")[0], []).append(row)
    missing = np.zeros(len(names), dtype=bool)
    for folder, rows in by_folder.items():
        present = file_names(f"{root}/{folder}" if folder else root)
        for row in rows:
            missing[row] = names[row].rpartition("/")[2] not in present
    return missing


def file_names(folder: str) -> set[str]:
    """Names of the files (not folders) in `folder`; empty if there is no such folder."""
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.is_dir()}


def folder_names(folder: str) -> list[str]:
    """Sorted names of the folders in `folder`; empty if there is no such folder."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def image_names(folder: str) -> list[str]:
    """Sorted names of the image files in `folder`, by suffix: a listing has no order of its own."""
    return sorted(name for name in file_names(folder) if name.lower().endswith(IMAGE_SUFFIXES))


def fingerprint(paths: Iterable[str]) -> str:
    """A hash over name, size and time of files and folders: the key that keeps the Arrow cache from going stale."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        status = os.stat(path)
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


# -- the builder ------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """
    A run of rows of one split.

    Args:
        images: file names below `root`, or the images themselves (`{"bytes": ..., "path": ...}`) in an iterable.
        labels, clean_labels, index (`np.ndarray` of shape `(num_rows,)`): the other three features.
        source, lines: the list file, and the line of each row in it (for messages).
        extra: further columns, for a builder that declares them in its features.
    """

    images: Iterable
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
    """The image column of a parquet file, read in small batches each time it is iterated."""

    path: str
    column: str = "image"

    def __iter__(self) -> Iterator[dict]:
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(columns=[self.column], batch_size=1_000):
                for image in batch.column(self.column).to_pylist():
                    yield {"bytes": image, "path": None} if isinstance(image, bytes) else image


def encode_png(pixels: np.ndarray) -> dict:
    """An image of shape `(height, width, 3)` as the value of an `Image()` feature."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def read_parquet(path: str, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Whole integer columns of a parquet file as int64; a `ValueError` with the file for anything else."""
    try:
        with pq.ParquetFile(path) as file:
            absent = [name for name in columns if name not in file.schema_arrow.names]
            if absent:
                raise ValueError(
                    f"{path}: no column {', '.join(absent)}; it has {', '.join(file.schema_arrow.names)}."
                )
            table = file.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}).") from None
    arrays = {}
    for name in columns:
        values = table[name]
        if not pa.types.is_integer(values.type) or values.null_count:
            raise ValueError(
                f"{path}: column `{name}` must hold integers in every row, got {values.type} with "
                f"{values.null_count} empty rows."
            )
        arrays[name] = values.to_numpy().astype(np.int64)
    return arrays


@dataclass
class NoisyLabelConfig(datasets.BuilderConfig):
    """
    Args:
        partial (`bool`): the folder holds a part of the data set: do not compare split sizes with the published ones.
        on_missing (`"error"` or `"skip"`): what to do with a listed image that is not on disk or has no label.
            `"skip"` leaves the row out and logs the count; `index` of the other rows does not change.
        fingerprint (`str`): set by the builder from the list files, so that a changed list is prepared anew.
    """

    version: datasets.Version | str | None = datasets.Version("1.0.0")
    partial: bool = False
    on_missing: str = "error"
    fingerprint: str = ""


class NoisyLabelBuilder(datasets.GeneratorBasedBuilder):
    """
    Base of the builders: checks the folder, keys the cache by the list files, checks and yields rows.

    A subclass gives the texts below, `class_names()`, `watched_files()` and `read_splits()`.
    """

    BUILDER_CONFIG_CLASS = NoisyLabelConfig
    DESCRIPTION = ""
    HOMEPAGE = ""
    LICENSE = ""
    CITATION = ""
    TREE = ""  # the expected folder, shown when something is missing
    REQUEST = ""  # where the data can be had

    def __init__(self, *args, data_dir: str | None = None, **kwargs):
        if data_dir is None:
            raise ValueError(f"{type(self).__name__} reads a local folder: pass `data_dir`.\n{self.help()}")
        data_dir = os.path.abspath(os.path.expanduser(data_dir))
        if not os.path.isdir(data_dir):
            raise FileNotFoundError(f"`data_dir` {data_dir} is not a folder.\n{self.help()}")
        if kwargs.get("on_missing", "error") not in ("error", "skip"):
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
        """Reads and checks all list files; errors name file and line."""
        raise NotImplementedError

    # what all share

    @classmethod
    def help(cls) -> str:
        """The expected tree and the place to ask for the data."""
        return f"Expected below `data_dir`:\n{cls.TREE}\nWhere to get it: {cls.REQUEST}"

    @classmethod
    def need(cls, root: str, *names: str) -> list[str]:
        """The paths of required files; an error that shows the expected tree if one is missing."""
        absent = [name for name in names if not os.path.isfile(f"{root}/{name}")]
        if absent:
            raise FileNotFoundError(f"Not found in {root}: {', '.join(absent)}.\n{cls.help()}")
        return [f"{root}/{name}" for name in names]

    def check_size(self, what: str, found: int, published: int | None) -> None:
        """Compares a count with the published one unless the tree is `partial`."""
        if published is not None and found != published and not self.config.partial:
            raise ValueError(
                f"{what}: found {found:,} rows, the published size is {published:,}. The lists are incomplete or of "
                "another version; pass `partial=True` if a part of the data set is intended."
            )

    def drop(self, rows: Rows, bad: np.ndarray, what: str) -> Rows:
        """Raises naming the first `bad` rows (boolean mask), or logs and leaves them out under `on_missing="skip"`."""
        found = np.flatnonzero(bad)
        if not len(found):
            return rows
        names = shown(rows.images[row] for row in found)
        text = f"{rows.where(found[0])}: {what}: {len(found):,} of {len(bad):,} rows, first: {names}"
        if self.config.on_missing == "error":
            raise ValueError(f"{text}. Restore them, or pass `on_missing='skip'` to leave these rows out.")
        logger.warning("%s; left out.", text)
        return rows.select(~bad)

    def on_disk(self, rows: Rows, tolerated: Sequence[str] = ()) -> list[Rows]:
        """Drops rows without image on disk (`tolerated` ones always, others by policy) and cuts the rest in shards."""
        missing = missing_files(rows.root, rows.images)
        known = np.array(
            [bool(gone) and rows.images[row] in tolerated for row, gone in enumerate(missing)], dtype=bool
        )
        if known.any():
            logger.warning("Left out, known to be absent from the release: %s.", shown(rows.select(known).images))
            rows, missing = rows.select(~known), missing[~known]
        rows = self.drop(rows, missing, f"no such image below {rows.root}")
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
                raise ValueError(f"{split}: `index` is not unique, repeated: {shown(values[counts > 1])}.")
        return [datasets.SplitGenerator(name=split, gen_kwargs={"shards": shards}) for split, shards in splits.items()]

    def _generate_examples(self, shards: list[Rows]):
        for rows in shards:
            columns = {"label": rows.labels, "clean_label": rows.clean_labels, "index": rows.index, **rows.extra}
            lists = [values.tolist() for values in columns.values()]
            for image, *values in zip(rows.images, *lists, strict=True):
                if isinstance(image, str):
                    image = f"{rows.root}/{image}"
                example = dict(zip(columns, values, strict=True))
                yield example["index"], {"image": image, **example}
