"""
Preflight: reads every image and every label of a dataset before training, and lists what is wrong with them.

`check_dataset` gives a report (a dict that is valid JSON), `format_report` a table to read, `save_quarantine` the list
of rows that training should leave out, `apply_quarantine` leaves them out.

Memory: a few integers for each row (a 64-bit hash of the image, its size, its label), never the images.
"""

import hashlib
import json
import logging
import os
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import datasets
import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict
from datasets.utils import tqdm

from .files import IMAGE_SUFFIXES
from .schema import COLUMNS, UNKNOWN


logger = logging.getLogger(__name__)

MAX_PIXELS = 64_000_000
BATCH_SIZE = 32  # images that a thread takes at a time
MISSING = np.iinfo(np.int64).min  # stands for an empty cell of an integer column

IMAGE_DEFECTS = {
    "missing_image": "rows without image",
    "missing_file": "rows whose image file does not exist",
    "unreadable_file": "image files that cannot be read",
    "empty_file": "image files of zero bytes",
    "html_file": "web pages saved as images",
    "truncated": "images that end early",
    "undecodable": "images that cannot be decoded",
    "too_many_pixels": "images above the pixel limit",
}
LABEL_DEFECTS = {
    "missing_label": "rows without label",
    "label_out_of_range": "labels outside the classes",
    "clean_label_out_of_range": "clean labels outside the classes (-1 = unknown)",
}
DEFECTS = {
    **IMAGE_DEFECTS,
    **LABEL_DEFECTS,
    "duplicate_index": "sample ids given twice",
    "conflicting_duplicates": "equal images with different labels in a split",
    "split_overlap": "images that occur in a training and in an evaluation split",
    "class_sets": "classes that differ between splits",
    "file_without_row": "image files without row",
    "loading": "problems that keep the dataset from being loaded",
}
NOTES = {
    "harmless_duplicates": "equal images with the same label in a split",
    "noisy_evaluation_labels": "evaluation splits whose labels are known to be wrong in places",
}

# what Pillow's decoders are known to raise on broken files
DECODE_ERRORS = (
    OSError,  # also PIL.UnidentifiedImageError
    SyntaxError,  # broken PNG
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
    Warning,  # where warnings are errors
)


# ---- one image ------------------------------------------------------------------------------------------------------


class ImageCheck(NamedTuple):
    """What was found out about one image. `kind` and `reason` are None for a good one."""

    kind: str | None = None
    reason: str | None = None
    digest: int = 0
    width: int = 0
    height: int = 0
    mode: str = ""


def decode_error(image: dict | None, *, max_pixels: int = MAX_PIXELS) -> str | None:
    """
    Tells what is wrong with one image.

    Args:
        image (`dict`): an undecoded image of `datasets`, `{"bytes": ..., "path": ...}`, one of them may be None.
        max_pixels (`int`): larger images are not decoded and count as bad.

    Returns:
        `str`: "<kind>: <reason>" with a kind of `IMAGE_DEFECTS`; None for an image that decodes completely.
    """
    check = check_image(image, max_pixels=max_pixels)
    return None if check.kind is None else f"{check.kind}: {check.reason}"


def check_image(image: dict | None, *, max_pixels: int = MAX_PIXELS) -> ImageCheck:
    """Reads, hashes and fully decodes one image; arguments as `decode_error`."""
    if image is None or (image["bytes"] is None and not image["path"]):
        return ImageCheck("missing_image", "the cell is empty")
    try:
        data = image["bytes"] if image["bytes"] is not None else _read(image["path"])
    except (FileNotFoundError, NotADirectoryError):
        return ImageCheck("missing_file", "no such file")
    except (OSError, ValueError, zipfile.BadZipFile) as error:  # ValueError: a null byte in the path
        return ImageCheck("unreadable_file", f"{type(error).__name__}: {error}")
    if not data:
        return ImageCheck("empty_file", "0 bytes")
    if data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return ImageCheck("html_file", "a web page, probably the error message of a download")

    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    try:
        with PIL.Image.open(BytesIO(data)) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                return ImageCheck("too_many_pixels", f"{width} x {height} pixels, the limit is {max_pixels}")
            opened.load()
            mode, is_png = opened.mode, opened.format == "PNG"
        if is_png:  # decoding skips the checksums
            with PIL.Image.open(BytesIO(data)) as opened:
                opened.verify()
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        return ImageCheck("too_many_pixels", str(error))
    except DECODE_ERRORS as error:
        if isinstance(error, PIL.UnidentifiedImageError):
            return ImageCheck("undecodable", f"no image format that Pillow knows, starts with {data[:8]!r}")
        kind = "truncated" if "truncated" in str(error).lower() else "undecodable"
        return ImageCheck(kind, f"{type(error).__name__}: {error}")
    return ImageCheck(None, None, digest, width, height, mode)


def _read(path: str) -> bytes:
    # an image inside an archive or on a remote store has an URL, which only fsspec can open
    with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
        return file.read()


# ---- a dataset ------------------------------------------------------------------------------------------------------


class SplitRows:
    """One split: its columns as arrays, and what was found out about each row."""

    def __init__(self, name: str, dataset: Dataset):
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"The split {name!r} lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)}. Load it "
                "with `load_noisy_dataset`."
            )
        if not isinstance(dataset.features["label"], ClassLabel):
            raise ValueError(f"`label` of the split {name!r} must be a ClassLabel, got {dataset.features['label']}.")
        self.name = name
        self.class_names = dataset.features["label"].names
        self.images = dataset.select_columns(["image"]).with_format(None)
        self.images = self.images.cast_column("image", datasets.Image(decode=False))
        self.index = _integer_column(dataset, "index")
        self.labels = _integer_column(dataset, "label")
        self.clean_labels = _integer_column(dataset, "clean_label")
        self.digests = np.zeros(len(dataset), dtype=np.uint64)
        self.sizes = np.zeros((len(dataset), 2), dtype=np.int32)  # width, height
        self.good = np.zeros(len(dataset), dtype=bool)
        self.modes = Counter()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def stage(self) -> int:
        """0 for training, 1 for validation, 2 for test splits, by name."""
        return 2 if "test" in self.name else 1 if "val" in self.name else 0

    def in_range(self, labels: np.ndarray) -> np.ndarray:
        return (labels >= 0) & (labels < len(self.class_names))

    def describe(self, row: int, reason: str | None = None) -> dict:
        """The entry of a row in the report."""
        path = (self.images[int(row)]["image"] or {}).get("path")
        label = int(self.labels[row])
        entry = {"split": self.name, "index": int(self.index[row]), "path": path}
        entry["label"] = None if label == MISSING else label
        return entry if reason is None else {**entry, "reason": reason}


def check_dataset(
    dataset: Dataset | DatasetDict,
    *,
    num_workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    image_dir: str | os.PathLike | None = None,
) -> dict:
    """
    Reads every image and label of a dataset and reports what is wrong. Changes nothing.

    Images are equal when the 64-bit BLAKE2 hashes of their files are. Splits with "test" or "val" in their name are
    evaluation splits, all others training splits; an overlap is reported between training, validation and test, not
    between two splits of the same stage.

    Args:
        dataset (`datasets.DatasetDict` or `datasets.Dataset`):
            With the features `image`, `label`, `clean_label`, `index`. A single split is called "train".
        num_workers (`int`): threads that read and decode (decoding runs outside the interpreter lock); default: CPUs.
        max_pixels (`int`): larger images count as a defect and are not decoded.
        image_dir (`str`): a folder whose image files should all be rows of the dataset.

    Returns:
        `dict`: `num_defects`; `splits`: rows, class counts, sizes and modes of each split; `defects` and `notes`: a
        list for each kind (`DEFECTS`, `NOTES`). Notes are worth knowing but no defects.

    Raises:
        `ValueError`: if a column is missing, or an argument is out of range.
    """
    if isinstance(dataset, Dataset):
        dataset = DatasetDict({"train": dataset})
    if not dataset or max_pixels < 1 or (num_workers is not None and num_workers < 1):
        raise ValueError(
            "`check_dataset` needs at least one split, and `max_pixels` and `num_workers` of at least 1; got splits "
            f"{list(dataset)}, {max_pixels} and {num_workers}."
        )
    splits = [SplitRows(name, split) for name, split in dataset.items()]
    report = empty_report()
    defects, notes = report["defects"], report["notes"]

    for split in splits:
        for kind, entry in _check_images(split, num_workers or os.cpu_count() or 1, max_pixels):
            defects[kind].append(entry)
        for kind, entry in _check_labels(split):
            defects[kind].append(entry)
        for conflicting, entry in _duplicates(split):
            (defects["conflicting_duplicates"] if conflicting else notes["harmless_duplicates"]).append(entry)
        report["splits"][split.name] = _summary(split)
        known = split.in_range(split.labels) & split.in_range(split.clean_labels)
        wrong = int((split.labels != split.clean_labels)[known].sum())
        if split.stage > 0 and wrong:
            notes["noisy_evaluation_labels"].append({"split": split.name, "wrong": wrong, "known": int(known.sum())})
    defects["split_overlap"] = list(_overlaps(splits))
    defects["class_sets"] = list(_class_set_differences(splits))
    if image_dir is not None:
        defects["file_without_row"] = list(_files_without_row(splits, image_dir))

    report["num_defects"] = sum(len(entries) for entries in defects.values())
    return report


def empty_report() -> dict:
    """A report without splits and findings."""
    return {
        "format": "hnml_hf audit 1",
        "num_defects": 0,
        "splits": {},
        "defects": {kind: [] for kind in DEFECTS},
        "notes": {kind: [] for kind in NOTES},
    }


def _integer_column(dataset: Dataset, name: str) -> np.ndarray:
    """A column in the order of the rows, int64, with `MISSING` for empty cells."""
    cells = dataset.data.column(name)
    if not pa.types.is_integer(cells.type):
        raise ValueError(f"`{name}` must hold integers, got {dataset.features[name]}.")
    values = cells.cast("int64").fill_null(MISSING).to_numpy()
    return values if dataset._indices is None else values[dataset._indices.column(0).to_numpy()]


def _check_images(split: SplitRows, num_workers: int, max_pixels: int) -> Iterator[tuple[str, dict]]:
    """Decodes all images in threads, fills the arrays of `split`, and yields the defects in row order."""

    def check(start: int) -> list[ImageCheck]:
        return [
            check_image(image, max_pixels=max_pixels) for image in split.images[start : start + BATCH_SIZE]["image"]
        ]

    starts = range(0, len(split), BATCH_SIZE)
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(num_workers) as pool,
        tqdm(total=len(split), desc=f"Reading {split.name}", unit=" images") as progress,
    ):
        # Pillow warns about harmless oddities (broken EXIF, sizes near its own limit): what counts is in the report
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        for start, checks in zip(starts, _bounded_map(pool, check, starts, 4 * num_workers), strict=True):
            for row, found in enumerate(checks, start=start):
                split.digests[row] = found.digest
                split.sizes[row] = found.width, found.height
                split.good[row] = found.kind is None
                if found.kind is None:
                    split.modes[found.mode] += 1
                else:
                    yield found.kind, split.describe(row, found.reason)
            progress.update(len(checks))


def _bounded_map(pool: ThreadPoolExecutor, function, items: Iterable, limit: int) -> Iterator:
    """`pool.map` that keeps at most `limit` results waiting, so that memory stays small."""
    waiting = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _check_labels(split: SplitRows) -> Iterator[tuple[str, dict]]:
    num_classes = len(split.class_names)
    for row in np.flatnonzero(split.labels == MISSING):
        yield "missing_label", split.describe(row, "no label")
    for row in np.flatnonzero(~split.in_range(split.labels) & (split.labels != MISSING)):
        yield "label_out_of_range", split.describe(row, f"label {split.labels[row]}, classes are 0..{num_classes - 1}")
    unknown = (split.clean_labels == UNKNOWN) | (split.clean_labels == MISSING)
    for row in np.flatnonzero(~split.in_range(split.clean_labels) & ~unknown):
        reason = f"clean label {split.clean_labels[row]}, classes are 0..{num_classes - 1}"
        yield "clean_label_out_of_range", split.describe(row, reason)
    for rows in _groups(split.index, np.arange(len(split))):
        yield "duplicate_index", {"rows": [split.describe(row) for row in rows]}


def _groups(keys: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows, ascending, that share a key with another row."""
    order = rows[np.argsort(keys[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(keys[order])) + 1
    bounds = np.concatenate([[0], cuts, [len(order)]])
    for group in np.flatnonzero(np.diff(bounds) > 1):
        yield order[bounds[group] : bounds[group + 1]]


def _duplicates(split: SplitRows) -> Iterator[tuple[bool, dict]]:
    """(whether the labels differ, entry) of each set of equal images."""
    for rows in _groups(split.digests, np.flatnonzero(split.good)):
        conflicting = len(np.unique(split.labels[rows])) > 1
        yield conflicting, {"rows": [split.describe(row) for row in rows]}


def _overlaps(splits: list[SplitRows]) -> Iterator[dict]:
    """Images that two splits of different stages share; the rows of the earlier stage first."""
    for early in splits:
        for late in splits:
            if early.stage >= late.stage:
                continue
            shared = np.intersect1d(early.digests[early.good], late.digests[late.good])
            rows = {}
            for split in (early, late):
                hits = np.flatnonzero(split.good & np.isin(split.digests, shared))
                for row in hits:
                    rows.setdefault(split.digests[row], []).append((split, row))
            for digest in shared:
                yield {
                    "splits": [early.name, late.name],
                    "rows": [split.describe(row) for split, row in rows[digest]],
                }


def _class_set_differences(splits: list[SplitRows]) -> Iterator[dict]:
    """Compares every split with the first one: class names, and classes that have images."""
    first, *others = splits
    for other in others:
        names = [first.name, other.name]
        if first.class_names != other.class_names:
            yield {"splits": names, "reason": "class names or their order differ", "classes": []}
            continue
        present = [set(np.unique(split.labels[split.in_range(split.labels)]).tolist()) for split in (first, other)]
        for split, only in ((first, present[0] - present[1]), (other, present[1] - present[0])):
            if only:
                classes = [first.class_names[label] for label in sorted(only)]
                yield {"splits": names, "reason": f"classes with images in {split.name} only", "classes": classes}


def _files_without_row(splits: list[SplitRows], image_dir: str | os.PathLike) -> Iterator[dict]:
    """Image files below `image_dir` (by suffix) that are no row of any split."""
    if not os.path.isdir(image_dir):
        raise ValueError(f"`image_dir` must be a folder of image files, got {os.fspath(image_dir)!r}.")
    real_folder = cache(os.path.realpath)

    def key(path: str) -> int:
        folder, name = os.path.split(path)
        return hash((real_folder(folder or "."), name))

    known = set()  # hashes take less memory than paths
    for split in splits:
        for batch in split.images.iter(batch_size=1000):
            known.update(key(image["path"]) for image in batch["image"] if image is not None and image["path"])
    for folder, folders, names in os.walk(image_dir):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.lower().endswith(IMAGE_SUFFIXES) and key(path) not in known:
                yield {"path": path, "reason": "no row names this file"}


def _summary(split: SplitRows) -> dict:
    labels = split.labels[split.in_range(split.labels)]
    counts = np.bincount(labels, minlength=len(split.class_names)).tolist()
    sizes = split.sizes[split.good]
    widths_heights = {
        name: function(sizes, axis=0).astype(int).tolist() if len(sizes) else None
        for name, function in (("smallest", np.min), ("median", np.median), ("largest", np.max))
    }
    known = split.in_range(split.clean_labels) & split.in_range(split.labels)
    return {
        "num_rows": len(split),
        "num_decoded": int(split.good.sum()),
        "class_counts": dict(zip(split.class_names, counts, strict=True)),
        "known_clean_labels": int(known.sum()),
        "noise_rate": float((split.labels != split.clean_labels)[known].mean()) if known.any() else None,
        "sizes": widths_heights,
        "modes": dict(split.modes.most_common()),
    }


# ---- the report -----------------------------------------------------------------------------------------------------


def save_report(path: str | os.PathLike, report: dict) -> None:
    """Writes the report as JSON."""
    Path(path).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def format_report(report: dict) -> str:
    """The report as a table to read, with the first example of each kind of defect."""
    lines = [f"{'split':<16}{'rows':>10}{'decoded':>10}{'classes':>9}{'class sizes':>18}  widths x heights, modes"]
    for name, split in report["splits"].items():
        counts = list(split["class_counts"].values())
        present = [count for count in counts if count]
        sizes = " .. ".join("x".join(map(str, size)) for size in split["sizes"].values() if size)
        modes = ", ".join(f"{mode} {count:,}" for mode, count in split["modes"].items())
        spread = f"{min(present):,} .. {max(present):,}" if present else "-"
        lines.append(
            f"{_printable(name):<16}{split['num_rows']:>10,}{split['num_decoded']:>10,}"
            f"{f'{len(present)}/{len(counts)}':>9}{spread:>18}  {sizes}; {modes}"
        )
    for title, kinds in (("defects", DEFECTS), ("notes", NOTES)):
        found = {kind: entries for kind, entries in report[title].items() if entries}
        lines += ["", f"{title}: {'' if found else 'none'}"]
        for kind, entries in found.items():
            lines.append(f"{len(entries):>10,}  {kind}: {kinds[kind]}; first: {_example(entries[0])}")
    return "\n".join(lines)


def _example(entry: dict) -> str:
    if "rows" in entry:
        return ", ".join(_example(row) for row in entry["rows"][:3])
    if "classes" in entry:
        return _printable(
            f"{' / '.join(entry['splits'])}: {entry['reason']} {', '.join(entry['classes'][:5])}".strip()
        )
    if "known" in entry:
        return f"{_printable(entry['split'])}: {entry['wrong']} of {entry['known']}"
    parts = [f"{entry['split']} index {entry['index']}"] if "index" in entry else []
    parts += [entry[name] for name in ("path", "reason") if entry.get(name)]
    if "label" in entry and "reason" not in entry:
        parts.append(f"label {entry['label']}")
    return _printable(" ".join(parts))


def _printable(text: str) -> str:
    """File and class names are data: control characters must not reach the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


# ---- quarantine -----------------------------------------------------------------------------------------------------


def save_quarantine(path: str | os.PathLike, report: dict) -> int:
    """
    Writes the rows that training should leave out, one JSON object a line: split, index, reason, path.

    These are rows with a bad image or label, all rows of conflicting duplicates (at most one of their labels is
    right), and of images shared by splits the rows of the earlier stage (training before validation before test).
    Sample ids given twice are not in it: an id that names two rows cannot say which one to leave out.

    Returns:
        `int`: number of rows.
    """
    rows: dict[tuple[str, int], dict] = {}

    def add(row: dict, reason: str) -> None:
        entry = rows.setdefault((row["split"], row["index"]), {"reasons": [], "path": row["path"]})
        entry["reasons"].append(reason)

    defects = report["defects"]
    for kind in (*IMAGE_DEFECTS, *LABEL_DEFECTS):
        for entry in defects[kind]:
            add(entry, f"{kind}: {entry['reason']}")
    for entry in defects["conflicting_duplicates"]:
        for row in entry["rows"]:
            add(row, f"conflicting_duplicates: equal to index {', '.join(str(r['index']) for r in entry['rows'])}")
    for entry in defects["split_overlap"]:
        for row in entry["rows"]:
            if row["split"] == entry["splits"][0]:
                add(row, f"split_overlap: also in {entry['splits'][1]}")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for (split, index), entry in rows.items():
            reason = "; ".join(dict.fromkeys(entry["reasons"]))
            line = {"split": split, "index": index, "reason": reason, "path": entry["path"]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return len(rows)


def load_quarantine(path: str | os.PathLike) -> dict[str, dict[int, str]]:
    """
    Reads a quarantine list. Lines may be deleted or added by hand; `split` and `index` are needed.

    Returns:
        `dict[str, dict[int, str]]`: split -> index -> reason.

    Raises:
        `ValueError`: naming file and line, for a line that is no such object.
    """
    quarantine: dict[str, dict[int, str]] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                split, index = row["split"], row["index"]
                if not isinstance(split, str) or type(index) is not int:
                    raise ValueError("`split` must be a name and `index` an integer")
                quarantine.setdefault(split, {})[index] = str(row.get("reason", ""))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f'{path}:{number}: {error}. A quarantine list has lines like {{"split": "train", "index": 17, '
                    '"reason": "truncated"}; write it with `python scripts/audit_data.py`.'
                ) from error
    return quarantine


def apply_quarantine(dataset: DatasetDict, quarantine: dict[str, dict[int, str]]) -> DatasetDict:
    """
    Leaves the listed rows out; they are not replaced, and the ids of the others do not change.

    Apply saved synthetic noise first: it belongs to the whole dataset.

    Args:
        dataset (`datasets.DatasetDict`): with the feature `index`.
        quarantine (`dict`): from `load_quarantine`.

    Returns:
        `datasets.DatasetDict`: the same splits, as views.

    Raises:
        `ValueError`: if a split or id of the list does not exist, or nothing would be left of a split.
    """
    unknown = sorted(set(quarantine) - set(dataset))
    if unknown:
        raise ValueError(
            f"The quarantine list names the splits {', '.join(unknown)}; the dataset has {', '.join(dataset)}. Was it "
            "made for another dataset?"
        )
    kept = DatasetDict(dataset)
    for split, rows in quarantine.items():
        index = _integer_column(dataset[split], "index")
        listed = np.array(sorted(rows), dtype=np.int64)
        absent = np.setdiff1d(listed, index)
        if len(absent):
            raise ValueError(
                f"{len(absent)} of {len(listed)} ids of the quarantine list are not in the split {split!r}, the first "
                f"is {absent[0]}. Was the list made for another dataset or another version of it?"
            )
        keep = np.flatnonzero(~np.isin(index, listed))
        if not len(keep):
            raise ValueError(f"The quarantine list leaves no row of the split {split!r}.")
        kept[split] = dataset[split].select(keep)
        logger.warning("Quarantine: %d of %d rows of %r are left out.", len(index) - len(keep), len(index), split)
    return kept


# ---- archives -------------------------------------------------------------------------------------------------------


def refuse_archive(path: str | os.PathLike) -> None:
    """
    Raises if `path` is a tar or zip archive: the package reads folders and unpacks nothing.

    Raises:
        `ValueError`: saying so, and naming a member that would be written outside the folder if there is one.
    """
    if not os.path.isfile(path):
        return
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            members = archive.getnames()
    else:
        return
    unsafe = [name for name in members if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")]
    if unsafe:
        raise ValueError(
            f"{path} is an archive with members that lead outside of it, such as {unsafe[0]!r}. It is refused: do not "
            "unpack it, and get the data from a source you trust."
        )
    raise ValueError(f"{path} is an archive; unpack it and pass the folder.")
