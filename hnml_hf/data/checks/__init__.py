"""The check before training: reads every image and label of a dataset, and lists what is wrong with them.

`check_dataset` gives a report (a dict that is valid JSON), `format_report` a table to read, `save_exclusions` the list
of rows that training should leave out, `apply_exclusions` leaves them out.

Memory: a few integers for each row (a 64-bit hash of the image, its size, its label), never the images.
"""

import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import PIL.Image
from datasets import Dataset, DatasetDict
from datasets.utils import tqdm

from ..files import is_image, walk
from ..schema import UNKNOWN, noise_rate
from .exclusions import apply_exclusions, load_exclusions, save_exclusions
from .images import MAX_PIXELS, ImageCheck, check_image
from .report import DEFECTS, NOTES, empty_report, format_report, save_report
from .rows import MISSING, SplitRows, groups


BATCH_SIZE = 32  # images that a thread takes at a time


def check_dataset(
    dataset: Dataset | DatasetDict,
    *,
    num_workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    image_dir: str | os.PathLike | None = None,
) -> dict:
    """Read every image and label of a dataset and report what is wrong. Nothing is changed.

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
        ValueError: if a column is missing, or an argument is out of range.

    Example:

        report = check_dataset(dataset)
        report["num_defects"], report["defects"]
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
    for absent, entry in _class_set_differences(splits):
        (notes["absent_classes"] if absent else defects["class_sets"]).append(entry)
    if image_dir is not None:
        defects["file_without_row"] = list(_files_without_row(splits, image_dir))

    report["num_defects"] = sum(len(entries) for entries in defects.values())
    return report


def _check_images(split: SplitRows, num_workers: int, max_pixels: int) -> Iterator[tuple[str, dict]]:
    """Decode all images in threads, fill the arrays of `split`, and yield the defects in row order."""

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
    for row in np.flatnonzero(split.labels == MISSING).tolist():
        yield "missing_label", split.describe(row, "no label")
    for row in np.flatnonzero(~split.in_range(split.labels) & (split.labels != MISSING)).tolist():
        yield "label_out_of_range", split.describe(row, f"label {split.labels[row]}, classes are 0..{num_classes - 1}")
    unknown = (split.clean_labels == UNKNOWN) | (split.clean_labels == MISSING)
    for row in np.flatnonzero(~split.in_range(split.clean_labels) & ~unknown).tolist():
        reason = f"clean label {split.clean_labels[row]}, classes are 0..{num_classes - 1}"
        yield "clean_label_out_of_range", split.describe(row, reason)
    for rows in groups(split.index, np.arange(len(split))):
        yield "duplicate_index", {"rows": [split.describe(row) for row in rows]}


def _duplicates(split: SplitRows) -> Iterator[tuple[bool, dict]]:
    """(whether the labels differ, entry) of each set of equal images."""
    for rows in groups(split.digests, np.flatnonzero(split.good)):
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


def _class_set_differences(splits: list[SplitRows]) -> Iterator[tuple[bool, dict]]:
    """(whether classes are merely absent from a later split, entry) of every split, compared with the first one: class
    names, and classes that have images."""
    first, *others = splits
    for other in others:
        names = [first.name, other.name]
        if first.class_names != other.class_names:
            yield False, {"splits": names, "reason": "class names or their order differ", "classes": []}
            continue
        present = [set(np.unique(split.labels[split.in_range(split.labels)]).tolist()) for split in (first, other)]
        for split, only in ((first, present[0] - present[1]), (other, present[1] - present[0])):
            if only:
                classes = [first.class_names[label] for label in sorted(only)]
                reason = f"classes with images in {split.name} only"
                yield split is first, {"splits": names, "reason": reason, "classes": classes}


def _files_without_row(splits: list[SplitRows], image_dir: str | os.PathLike) -> Iterator[dict]:
    """Image files below `image_dir` (by suffix, without hidden ones) that are no row of any split."""
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
    for folder in walk(image_dir):
        for name in folder.files:
            path = os.path.join(image_dir, folder.prefix, name)
            if is_image(name) and key(path) not in known:
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
        "noise_rate": noise_rate(split.labels, np.where(known, split.clean_labels, UNKNOWN)),
        "sizes": widths_heights,
        "modes": dict(split.modes.most_common()),
    }


__all__ = [
    "DEFECTS",
    "MAX_PIXELS",
    "NOTES",
    "apply_exclusions",
    "check_dataset",
    "check_image",
    "empty_report",
    "format_report",
    "load_exclusions",
    "save_exclusions",
    "save_report",
]
