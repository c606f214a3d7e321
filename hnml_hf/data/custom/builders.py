"""Builders for data of your own: tables, and image folders."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from ..files import IMAGE_SUFFIXES, first_few, folder_names, is_hidden, is_plain
from ..published.builder import NoisyLabelBuilder, NoisyLabelConfig, ParquetImages, Rows
from ..schema import noisy_features
from ..splits import find_splits
from .columns import ColumnOptions, RawSplit
from .labels import class_names, encode_labels, encode_weights, warn_about_splits
from .tables import read_table


logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl")
EVALUATION_FOLDERS = ("validation", "val", "test")  # rarely classes, unlike `valid` beside `invalid`


@dataclass
class OwnDataConfig(ColumnOptions, NoisyLabelConfig):
    """
    Args:
        tables (`dict`): split -> list of files.
        splits (`dict`): split -> folder, where the names do not tell.
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
        names = class_names(raw["train"], self.config.label_names)
        weighted = any(part.weight is not None for part in raw["train"])
        weight = {"weight": datasets.Value("float64")} if weighted else {}
        self.info.features = datasets.Features({**noisy_features(names), **weight})
        splits: dict[str, list[Rows]] = {}
        for split, parts in raw.items():
            splits[split], start = [], 0
            for part in parts:
                labels, clean_labels, index = encode_labels(part, names, split)
                if part.index is None:
                    index = index + start
                start += len(index)
                extra = {"weight": encode_weights(part)} if weighted else {}
                rows = Rows(part.images, labels, clean_labels, index, root, part.source, part.lines, extra)
                splits[split] += [rows] if isinstance(part.images, ParquetImages) else self.on_disk(rows)
        labels, clean_labels = (
            {split: np.concatenate([getattr(rows, name) for rows in parts]) for split, parts in splits.items()}
            for name in ("labels", "clean_labels")
        )
        warn_about_splits(labels, clean_labels, names)
        return splits


class Table(OwnDataBuilder):
    """CSV, TSV, JSON, JSONL and parquet tables; see [`ColumnOptions`] for the columns."""

    TREE = "  train.csv  validation.csv  test.csv   (or .tsv, .json, .jsonl, .parquet; train*.parquet for shards)"

    @classmethod
    def watched_files(cls, root: str, *, tables: Mapping[str, Sequence[str]], **options) -> list[str]:
        return [path for paths in tables.values() for path in paths]

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        raw: dict[str, list[RawSplit]] = {}
        for split, paths in self.config.tables.items():
            for path in paths:
                raw.setdefault(split, []).append(read_table(path, split, self.config, root))
        return self.encode_splits(raw, root)


class ImageFolder(OwnDataBuilder):
    """An image folder: `<split>/<class>/**`, or `<class>/**` alone, which is all `train`.

    The names of split folders may have capitals; others are named by `splits`, `{"train": "."}` for class folders
    that are called like splits. A split folder with a `metadata.csv` or `metadata.jsonl` (columns `file_name`,
    `label`) is read by that table. Images that are in no class folder, or have no row in the table, are left out and
    counted in the log. `index` is the position in the sorted listing, or in the table.
    """

    TREE = """  train/<class>/*.jpg  test/<class>/*.jpg  validation/<class>/*.jpg    (the last two optional)
or <class>/*.jpg, or train/metadata.csv with the columns file_name and label beside the images"""

    @classmethod
    def watched_files(cls, root: str, **options) -> list[str]:
        watched = []
        for folder, folders, files in os.walk(root, followlinks=True):
            folders.sort()
            watched += [folder, *(f"{folder}/{name}" for name in files if name in METADATA)]
        return watched

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        folders = self._split_folders(root) if self.config.splits is None else self._named_folders(root)
        raw = {split: [self._read_folder(root, name, split)] for split, name in folders.items()}
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
            return folders
        lone = [name for name in names if name.lower() in EVALUATION_FOLDERS]
        if lone:
            raise ValueError(
                f"{root}: `{'`, `'.join(lone)}` without a folder `train`: training on it would make it a class. Name "
                "the training folder by `splits`, such as {'train': 'my_folder', 'test': 'test'}, or {'train': '.'} "
                "if these are class names."
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

    def _read_folder(self, root: str, name: str, split: str) -> RawSplit:
        folder = f"{root}/{name}" if name else root
        prefix = f"{name}/" if name else ""
        tables = [f"{folder}/{table}" for table in METADATA if os.path.isfile(f"{folder}/{table}")]
        found, others = list_images(folder)
        if others:
            logger.warning(
                "%s: %d files are no images by their suffix, first: %s.", folder, len(others), first_few(others)
            )
        if tables:
            raw = read_table(tables[0], split, self.config, folder)
            unlisted = sorted(set(found) - set(raw.images))
            if unlisted:
                logger.warning(
                    "%s: %d images without a row in %s, left out, first: %s.",
                    folder,
                    len(unlisted),
                    os.path.basename(tables[0]),
                    first_few(unlisted),
                )
            raw.images = [f"{prefix}{image}" for image in raw.images]
            return raw
        outside = [image for image in found if "/" not in image]
        if outside:
            logger.warning(
                "%s: %d images are in no class folder, left out, first: %s.", folder, len(outside), first_few(outside)
            )
        images = [image for image in found if "/" in image]
        if not images:
            raise FileNotFoundError(f"No image in a class folder below {folder}.\n{self.help()}")
        labels = [sys.intern(image.partition("/")[0]) for image in images]
        empty = sorted(set(folder_names(folder)) - set(labels))
        if empty:
            logger.warning("%s: class folders without an image: %s.", folder, first_few(empty))
        return RawSplit(
            [f"{prefix}{image}" for image in images],
            labels,
            lambda row: f"{folder}/{images[row]}",
            source=folder,
            by_name=True,
        )


def list_images(folder: str) -> tuple[list[str], list[str]]:
    """Sorted image files below `folder`, relative to it, and the other files; hidden ones do not count."""
    images, others = [], []
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        prefix = os.path.relpath(path, folder).replace(os.sep, "/")
        prefix = "" if prefix == "." else f"{prefix}/"
        for name in files:
            if is_hidden(name):
                continue
            if not is_plain(prefix + name):
                raise ValueError(f"{folder}: the file name {prefix + name!r} is not UTF-8 text; rename the file.")
            if name.lower().endswith(IMAGE_SUFFIXES):
                images.append(prefix + name)
            elif name not in METADATA:
                others.append(prefix + name)
    return sorted(images), sorted(others)
