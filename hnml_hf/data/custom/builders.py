"""Builders for data of your own: tables, and image folders."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from ...common.words import counted
from ..files import as_name, file_names, first_few, folder_names, is_hidden, is_image, is_plain, walk
from ..published.builder import NoisyLabelBuilder, NoisyLabelConfig, ParquetImages, Rows
from ..schema import noisy_features
from ..splits import SPLITS, find_splits
from .columns import LABEL_COLUMNS, NO_COLUMN, ColumnOptions, RawSplit
from .labels import NO_INDEX, encode_labels, encode_weights, find_classes, warn_about_splits
from .tables import TABLE_SUFFIXES, column_names, read_splits, table_suffix


logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
WRITTEN = ("lineage.csv", "disagreements.csv")  # what `hnml clean` leaves beside the images
EVALUATION_FOLDERS = ("validation", "val", "test")  # rarely classes, unlike `valid` beside `invalid`


@dataclass
class OwnDataConfig(ColumnOptions, NoisyLabelConfig):
    """
    Args:
        tables (`dict`): split -> list of files.
        splits (`dict`): split -> folder, or value of the split column, where the names do not tell.
        label_names (`list[str]`): class names in id order.
    """

    tables: dict | None = None
    splits: dict | None = None
    label_names: list | None = None


class OwnDataBuilder(NoisyLabelBuilder):
    """What tables and folders share: class names are found while reading, and not asked for again from the cache."""

    BUILDER_CONFIG_CLASS = OwnDataConfig
    DESCRIPTION = "A dataset of the user."

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=self.DESCRIPTION)

    def encode_splits(self, raw: dict[str, list[RawSplit]], root: str) -> dict[str, list[Rows]]:
        """Rows with labels of one mapping for all splits, from the files of each split."""
        raw = {split: raw[split] for split in SPLITS if raw.get(split)}
        if "train" not in raw and self.config.labels:
            raise ValueError(
                f"{root}: no row is of the split train, only of {', '.join(raw)}. `split_column={NO_COLUMN}` "
                f"(`--split_column {NO_COLUMN}`) ignores the column that says so."
            )
        classes = find_classes(raw, self.config.label_names)
        weighted = any(part.weight is not None for parts in raw.values() for part in parts)
        weight = {"weight": datasets.Value("float64")} if weighted else {}
        self.info.features = datasets.Features({**noisy_features(classes.names), **weight})
        splits: dict[str, list[Rows]] = {}
        for split, parts in raw.items():
            splits[split], start = [], 0
            for part in parts:
                labels, clean_labels, index = encode_labels(part, classes, split)
                if part.index is None:
                    index = index + start
                start += len(index)
                extra = {"weight": encode_weights(part)} if weighted else {}
                rows = Rows(part.images, labels, clean_labels, index, root, part.source, part.lines, extra)
                splits[split] += [rows] if isinstance(part.images, ParquetImages) else self.on_disk(rows)
            _check_index(splits[split], split)
        by_role = {
            name: {split: np.concatenate([getattr(rows, name) for rows in parts]) for split, parts in splits.items()}
            for name in ("labels", "clean_labels")
        }
        if self.config.labels:
            warn_about_splits(by_role["labels"], by_role["clean_labels"], classes.names)
        return splits


def _check_index(parts: Sequence[Rows], split: str) -> None:
    values, counts = np.unique(np.concatenate([rows.index for rows in parts]), return_counts=True)
    if (counts > 1).any():
        files = first_few(dict.fromkeys(rows.source for rows in parts))
        raise ValueError(
            f"{split}: the index {values[counts > 1][0]} is that of {counted(counts.max(), 'row')} of {files}. "
            f"{NO_INDEX}"
        )


class Table(OwnDataBuilder):
    """CSV, TSV, JSON, JSONL and parquet tables; see [`ColumnOptions`] for the columns."""

    TREE = "  train.csv  validation.csv  test.csv   (or .tsv, .json, .jsonl, .parquet; train*.parquet for shards)"

    @classmethod
    def watched_files(cls, root: str, *, tables: Mapping[str, Sequence[str]] = {}, **options) -> list[str]:
        return [path for paths in tables.values() for path in paths]

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        raw: dict[str, list[RawSplit]] = {}
        alone = len(self.config.tables) == 1
        for split, paths in self.config.tables.items():
            for path in paths:
                for ours, part in read_splits(path, split, self.config, root, self.config.splits, alone=alone).items():
                    raw.setdefault(ours, []).append(part)
        return self.encode_splits(raw, root)


class ImageFolder(OwnDataBuilder):
    """An image folder: `<split>/<class>/**`, or `<class>/**` alone, which is all `train`.

    The names of split folders may have capitals; others are named by `splits`, `{"train": "."}` for class folders
    that are called like splits. A `metadata.csv`, `metadata.jsonl` or `metadata.parquet` (columns `file_name`,
    relative to its folder, and `label`) counts instead of the folders, be it above the split folders, in them or in
    class folders. Images that are in no class folder, or have no row in a table, are left out and counted in the log.
    `index` is the position in the sorted listing, or in the tables.
    """

    TREE = """  train/<class>/*.jpg  test/<class>/*.jpg  validation/<class>/*.jpg    (the last two optional)
or <class>/*.jpg, or train/metadata.csv with the columns file_name and label beside the images"""

    @classmethod
    def watched_files(cls, root: str, **options) -> list[str]:
        watched = []
        for folder in walk(root):
            names = ("", *(name for name in folder.files if name in METADATA))
            watched += [os.path.join(root, folder.prefix, name) for name in names]
        return watched

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        named = self.config.splits is not None and not self.config.splits_by_column
        folders = self._named_folders(root) if named else self._split_folders(root)
        raw: dict[str, list[RawSplit]] = {}
        for split, name in folders.items():
            for ours, part in self._read_folder(root, name, split, alone=len(folders) == 1):
                raw.setdefault(ours, []).append(part)
        return self.encode_splits(raw, root)

    def _split_folders(self, root: str) -> dict[str, str]:
        """Split -> folder below `root`, by the names of the folders; `""` where class folders are all there is."""
        names = folder_names(root)
        folders = find_splits(names)
        if "train" in folders:
            unread = sorted(set(names) - set(folders.values()))
            if unread:
                logger.warning(
                    "%s: folders beside `%s` that are no split, left out: %s. Name them by `splits`, or all by "
                    "{'train': '.'} if these are class names.",
                    root,
                    folders["train"],
                    first_few(unread),
                )
            expected = (*METADATA, *WRITTEN)
            beside = sorted(name for name in file_names(root) if name not in expected and not is_hidden(name))
            beside = [name for name in beside if is_image(name) or table_suffix(name) in TABLE_SUFFIXES]
            if beside:
                logger.warning(
                    "%s: images and tables beside the split folders, left out: %s. A table that is called `train` or "
                    "`metadata` counts instead of the folders; any other one is read by its path.",
                    root,
                    first_few(beside),
                )
            return folders
        lone = [name for name in names if name.lower() in EVALUATION_FOLDERS]
        if lone and not self.config.labels:
            return folders
        if lone:
            raise ValueError(
                f"{root}: `{'`, `'.join(lone)}` without a folder `train`: training on it would make it a class. Name "
                "the training folder by `splits`, such as {'train': 'my_folder', 'test': 'test'}, or {'train': '.'} "
                f"if these are class names. To evaluate a model on `{lone[0]}` alone: `--data_dir {root}/{lone[0]} "
                "--split train`."
            )
        return {"train": ""}

    def _named_folders(self, root: str) -> dict[str, str]:
        """Split -> folder below `root`, as the user named them."""
        splits = self.config.splits
        if "train" not in splits:
            raise ValueError(f"No folder for `train` among {', '.join(splits)}: name one by `splits`.")
        for name in splits.values():
            if not os.path.isdir(f"{root}/{name}"):
                raise FileNotFoundError(
                    f"`splits` names the folder {name}, but {root} has {', '.join(folder_names(root)) or 'none'}."
                )
        return {split: "" if name == "." else name.strip("/") for split, name in splits.items()}

    def _read_folder(self, root: str, name: str, split: str, *, alone: bool) -> list[tuple[str, RawSplit]]:
        folder = f"{root}/{name}" if name else root
        prefix = f"{name}/" if name else ""
        found, others = list_images(folder)
        tables = [f"{folder}/{other}" for other in others if os.path.basename(other) in METADATA]
        expected = (*METADATA, *WRITTEN)
        others = [other for other in others if os.path.basename(other) not in expected]
        if name:  # a table above the split folders says what is in them
            tables += [f"{root}/{table}" for table in METADATA if os.path.isfile(f"{root}/{table}")]
        if others:
            logger.warning(
                "%s: %s without the suffix of an image, first: %s.",
                folder,
                counted(len(others), "file"),
                first_few(others),
            )
        if not self.config.labels:
            images = [f"{prefix}{image}" for image in found]
            return [(split, RawSplit(images, None, lambda row: f"{root}/{images[row]}", source=folder))]
        parts = self._read_tables(self._labeled(tables, f"{folder}/"), root, prefix, split, alone)
        if parts:
            listed = {image for _, part in parts for image in part.images}
            unlisted = sorted({f"{prefix}{image}" for image in found} - listed)
            if unlisted:
                logger.warning(
                    "%s: %d images without a row in %s, left out, first: %s.",
                    folder,
                    len(unlisted),
                    first_few(dict.fromkeys(map(os.path.basename, tables))),
                    first_few(unlisted),
                )
            return parts
        outside = [image for image in found if "/" not in image]
        if outside:
            logger.warning(
                "%s: %d images are in no class folder, left out, first: %s.", folder, len(outside), first_few(outside)
            )
        images = [image for image in found if "/" in image]
        if not images:
            raise FileNotFoundError(f"No image in a class folder below {folder}.\n{self.help()}")
        labels = [sys.intern(as_name(image.partition("/")[0])) for image in images]
        empty = sorted(set(map(as_name, folder_names(folder))) - set(labels))
        if empty:
            logger.warning("%s: class folders without an image: %s.", folder, first_few(empty))
        raw = RawSplit(
            [f"{prefix}{image}" for image in images],
            labels,
            lambda row: f"{folder}/{images[row]}",
            names={"label": sorted(set(labels))},
            source=folder,
        )
        return [(split, raw)]

    def _labeled(self, tables: list[str], folder: str) -> list[str]:
        """The tables that say what the label is; a table of captions beside the images of a class does not."""
        columns = {self.config.label_column, self.config.test_label_column, self.config.clean_label_column}
        labels = (columns - {None}) or set(LABEL_COLUMNS)
        silent = [table for table in tables if not labels & set(column_names(table))]
        if len(silent) == len(tables) and all("/" in table.removeprefix(folder) for table in tables):
            if tables:
                logger.warning(
                    "%s: %d tables without a label column, not read, first: %s. The folders are the labels.",
                    folder,
                    len(silent),
                    first_few(silent),
                )
            return []
        return tables

    def _read_tables(
        self, tables: list[str], root: str, prefix: str, split: str, alone: bool
    ) -> list[tuple[str, RawSplit]]:
        """The rows whose images lie below `prefix`; paths in a table start at its folder."""
        parts, listed = [], {}
        for table in tables:
            folder = os.path.dirname(table)
            within = folder.removeprefix(root).strip("/")
            found = read_splits(
                table,
                split,
                self.config,
                folder,
                self.config.splits,
                alone=alone,
                below="" if within else prefix,
            )
            for ours, raw in found.items():
                raw.images = [f"{within}/{image}" if within else image for image in raw.images]
                twice = [image for image in raw.images if listed.setdefault(image, table) != table]
                if twice:
                    raise ValueError(
                        f"{listed[twice[0]]} and {table} both have a row for {twice[0]}; keep one of them."
                    )
                if len(raw):
                    parts.append((ours, raw))
        return parts


def list_images(folder: str) -> tuple[list[str], list[str]]:
    """Sorted image files below `folder`, relative to it, and the other files; hidden ones do not count."""
    images, others, odd = [], [], []
    for prefix, files, no_files in walk(folder):
        odd += [prefix + name for name in no_files]
        for name in files:
            if not is_plain(prefix + name):
                raise ValueError(
                    f"{folder}: the file name {prefix + name!r} has control characters or is no UTF-8 text; rename "
                    "the file."
                )
            (images if is_image(name) else others).append(prefix + name)
    if odd:
        logger.warning(
            "%s: left out what is neither a file nor a folder (a broken link, a link to a folder above, a pipe, a "
            "device), %d in all, first: %s.",
            folder,
            len(odd),
            first_few(odd),
        )
    return sorted(images), sorted(others)
