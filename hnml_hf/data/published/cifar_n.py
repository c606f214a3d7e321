"""CIFAR-10N and CIFAR-100N (Wei et al., "Learning with Noisy Labels Revisited", ICLR 2022)."""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import ClassLabel, Dataset, Features

from ...common.words import counted
from ..files import as_name, file_names, first_few
from ..schema import assemble, column
from .builder import NoisyLabelBuilder, NoisyLabelConfig, ParquetImages, Rows, open_parquet, read_parquet
from .cifar_files import (
    HUMAN_LABELS,
    OFFICIAL,
    BatchImages,
    class_names,
    is_fine,
    read_batch,
    read_human_labels,
)


logger = logging.getLogger(__name__)

SIZES = {"train": 50_000, "test": 10_000}
BLOCK = 10_000  # rows of one official CIFAR-10 batch
FOLDERS = ("cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-bin", "cifar-100-binary")
IMAGE_COLUMNS = ("image", "img")
CLEAN_COLUMNS = {False: ("clean_label", "label"), True: ("clean_label", "fine_label", "label")}  # of CIFAR-100: True


def official_order(labels: np.ndarray, official: np.ndarray) -> np.ndarray:
    """Find where the rows of an image source stand in the official order, from their clean labels alone.

    Human labels are in the order of the official training batches. Copies of CIFAR-10 hold the batches in another
    order; attached by position, about 90 % of the labels would be wrong, silently.

    Args:
        labels (`np.ndarray` of shape `(num_rows,)`): clean labels of the image source, in its order.
        official (`np.ndarray` of shape `(num_rows,)`): clean labels of the label file.

    Returns:
        `np.ndarray` of shape `(num_rows,)`: the official position of each source row. A `ValueError` if the order is
        neither the official one nor a permutation of its blocks.
    """
    if len(labels) != len(official):
        raise ValueError(
            f"The image source has {counted(len(labels), 'row')}, the label file {len(official):,}: labels cannot "
            "be attached. A subset needs a column `index` with the official position."
        )
    if np.array_equal(labels, official):
        return np.arange(len(official))
    order = np.empty(len(official), dtype=np.int64)
    free = list(range(0, len(official), BLOCK))
    for start in range(0, len(labels), BLOCK):
        matches = [i for i in free if np.array_equal(labels[start : start + BLOCK], official[i : i + BLOCK])]
        if not matches:
            raise ValueError(
                f"The clean labels of rows {start:,}..{min(start + BLOCK, len(labels)) - 1:,} of the image source fit "
                f"no block of the label file ({np.mean(labels == official):.1%} of all rows agree by position): the "
                "source is in another order. Use the official batches or a copy that keeps their order."
            )
        free.remove(matches[0])
        order[start : start + BLOCK] = np.arange(matches[0], matches[0] + len(labels[start : start + BLOCK]))
    logger.warning("CIFAR-N: the image source holds the official batches in another order; labels follow the images.")
    return order


def attach_human_labels(
    images: Dataset,
    labels_file: str | os.PathLike,
    config: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Dataset:
    """Give a CIFAR training set in memory or from the Hub the human labels of a label file.

    Rows stay in the order of `images`; `index` is the official position. The alignment is proven by the clean labels,
    see [`official_order`].
    """
    image_column = image_column or _pick(images.column_names, IMAGE_COLUMNS, "image")
    label_column = label_column or _pick(images.column_names, CLEAN_COLUMNS[is_fine(config)], "clean label")
    official, human = read_human_labels(labels_file, config)
    clean_labels = _column_by_names(images, label_column, config)
    if "index" in images.column_names:
        order = column(images, "index").astype(np.int64)
        _check_order(clean_labels, official, order, str(labels_file))
    else:
        order = official_order(clean_labels, official)
    return assemble(images, image_column, human[order], official[order], order, class_names(config))


def clean_split(
    images: Dataset, config: str, *, image_column: str | None = None, label_column: str | None = None
) -> Dataset:
    """A CIFAR test set with the common features; its labels are clean."""
    image_column = image_column or _pick(images.column_names, IMAGE_COLUMNS, "image")
    label_column = label_column or _pick(images.column_names, CLEAN_COLUMNS[is_fine(config)], "clean label")
    labels = _column_by_names(images, label_column, config)
    index = column(images, "index") if "index" in images.column_names else np.arange(len(images))
    return assemble(images, image_column, labels, labels, index.astype(np.int64), class_names(config))


def by_own_names(ids: np.ndarray, own: Sequence[str], names: Sequence[str], source: str) -> np.ndarray:
    """Ids of a column as ids of these classes, by the names that the column has of its own.

    Args:
        ids (`np.ndarray` of shape `(n,)`): of the column.
        own, names (`Sequence[str]`): names of the column and of the classes, in id order.
        source (`str`): for the message.

    Raises:
        ValueError: if the order differs and a name is none of the classes. Names that are only spelled otherwise, each
            in its place, are no difference.
    """
    at = {as_name(name): label for label, name in enumerate(names)}
    found = [at.get(as_name(name)) for name in own]
    if all(label in (None, position) for position, label in enumerate(found)):
        return ids
    if None in found:
        raise ValueError(
            f"{source}: the class `{own[found.index(None)]}` is none of {first_few(names)}, and others have another "
            "id than in the official order. Use the official batches, or a copy with the official names."
        )
    return np.array(found)[ids]


def _column_by_names(images: Dataset, name: str, config: str) -> np.ndarray:
    ids, feature = column(images, name).astype(np.int64), images.features[name]
    if not isinstance(feature, ClassLabel):
        return ids
    return by_own_names(ids, feature.names, class_names(config), f"The column `{name}`")


def find_labels_file(data_dir: str | os.PathLike | None, config: str) -> str:
    """The official label file in a folder or in its `data/`."""
    name = "CIFAR-100_human.pt" if is_fine(config) else "CIFAR-10_human.pt"
    for folder in () if data_dir is None else (data_dir, os.path.join(data_dir, "data")):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise FileNotFoundError(
        f"No human labels: neither {name} in `data_dir` {data_dir} nor a column `{HUMAN_LABELS[config]}` in the "
        f"images.\n{CIFARN.help()}"
    )


def _pick(names: list[str], candidates: tuple[str, ...], what: str) -> str:
    for name in candidates:
        if name in names:
            return name
    raise ValueError(f"No {what} column ({' or '.join(candidates)}) among {', '.join(names)}.")


def _check_order(clean_labels: np.ndarray, official: np.ndarray, order: np.ndarray, path: str) -> None:
    """The clean labels of a source with official positions must be those of the label file."""
    if order.min(initial=0) < 0 or order.max(initial=0) >= len(official):
        raise ValueError(f"{path}: has {counted(len(official), 'label')}, but `index` goes to {order.max():,}.")
    differ = np.flatnonzero(clean_labels != official[order])
    if len(differ):
        raise ValueError(
            f"{path}: the clean label differs from that of the images in {len(differ):,} of "
            f"{counted(len(order), 'row')}, "
            f"first at index {order[differ[0]]}: the column `index` is not the official position."
        )


# -- the builder ------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """The image files of a split, in their order, with the columns that parquet files bring along."""

    images: list
    clean_labels: list[np.ndarray]
    paths: list[str]
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)


class CIFARN(NoisyLabelBuilder):
    """CIFAR-10N and CIFAR-100N from a local folder: `cifar10n-{aggre,rand1,rand2,rand3,worse}` and `cifar100n`, and
    the same images with their official labels: `cifar10` and `cifar100`.

    Images come from parquet files (`train*.parquet`, `test*.parquet`; columns `image` or `img`, and `label` or
    `fine_label` with the clean label), or from the official "python" or "binary" batches. Human labels come from the
    columns of the parquet files, or from the official label file. `index` is the position in the official order.
    """

    BUILDER_CONFIGS = [
        *(NoisyLabelConfig(name=name, description=label) for name, label in HUMAN_LABELS.items()),
        *(NoisyLabelConfig(name=name, description="official labels") for name in OFFICIAL),
    ]
    DESCRIPTION = "CIFAR-10 and CIFAR-100 with labels from people; the official labels are the clean ones."
    HOMEPAGE = "http://noisylabels.com"
    LICENSE = "Labels: CC BY-NC 4.0. Images: none stated."
    CITATION = """@inproceedings{wei2022learning,
  title = {Learning with Noisy Labels Revisited: A Study Using Real-World Human Annotations},
  author = {Wei, Jiaheng and Zhu, Zhaowei and Cheng, Hao and Liu, Tongliang and Niu, Gang and Liu, Yang},
  booktitle = {ICLR},
  year = {2022}
}"""
    TREE = """  CIFAR-10_human.pt  or  CIFAR-100_human.pt      (for human labels, unless the parquet files hold them)
and one of
  train*.parquet  test*.parquet
  cifar-10-batches-py/data_batch_1 ... test_batch      cifar-100-python/train  test
  cifar-10-batches-bin/data_batch_1.bin ...            cifar-100-binary/train.bin  test.bin"""
    REQUEST = (
        "labels: https://github.com/UCSC-REAL/cifar-10-100n; images: https://www.cs.toronto.edu/~kriz/cifar.html, or "
        "with the official labels on the Hub: --dataset uoft-cs/cifar10 --image_column img"
    )

    @classmethod
    def watched_files(cls, root: str, **options) -> list[str]:
        folders = [root, f"{root}/data", *(f"{root}/{folder}" for folder in FOLDERS)]
        watched = [
            f"{folder}/{name}"
            for folder in folders
            for name in file_names(folder)
            if name.endswith((".parquet", ".pt", ".bin"))
            or re.fullmatch(r"data_batch_[1-5]|test_batch|train|test", name)
        ]
        if not watched:
            raise FileNotFoundError(f"No CIFAR images or labels in {root}.\n{cls.help()}")
        return watched

    @property
    def fine(self) -> bool:
        return is_fine(self.config.name)

    def class_names(self) -> list[str]:
        return class_names(self.config.name)

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        train, test = (self._find_images(root, split) for split in SIZES)
        labels, index = self._given_labels(root, train)
        return {
            "train": self._rows(train, labels, index),
            "test": self._rows(test, np.concatenate(test.clean_labels), self._index(test)),
        }

    def _rows(self, source: Source, labels: np.ndarray, index: np.ndarray) -> list[Rows]:
        rows, start = [], 0
        for images, clean_labels in zip(source.images, source.clean_labels, strict=True):
            part = slice(start, start + len(clean_labels))
            rows.append(Rows(images, labels[part], clean_labels, index[part]))
            start = part.stop
        return rows

    def _index(self, source: Source) -> np.ndarray:
        if "index" in source.columns:
            return np.concatenate(source.columns["index"])
        return np.arange(sum(map(len, source.clean_labels)))

    def _given_labels(self, root: str, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Given labels and official positions of the training images, in the order of the source."""
        clean_labels = np.concatenate(source.clean_labels)
        if self.config.name in OFFICIAL:
            return clean_labels, self._index(source)
        name = HUMAN_LABELS[self.config.name]
        if name in source.columns:
            return np.concatenate(source.columns[name]), self._index(source)
        labels_file = find_labels_file(root, self.config.name)
        official, human = read_human_labels(labels_file, self.config.name)
        if "index" in source.columns:
            order = self._index(source)
            _check_order(clean_labels, official, order, labels_file)
        else:
            order = official_order(clean_labels, official)
        return human[order], order

    def _find_images(self, root: str, split: str) -> Source:
        for folder in (root, f"{root}/data"):
            names = sorted(n for n in file_names(folder) if n.startswith(split) and n.endswith(".parquet"))
            if names:
                return self._read_parquets([f"{folder}/{name}" for name in names], split)
        for folder in (root, *(f"{root}/{name}" for name in FOLDERS)):
            for suffix in ("", ".bin"):
                paths = [f"{folder}/{name}{suffix}" for name in self._batch_names(split)]
                if all(os.path.isfile(path) for path in paths):
                    source = Source([BatchImages(path, self.fine) for path in paths], [], paths)
                    source.clean_labels = [read_batch(path, self.fine)[0] for path in paths]
                    self._check(source, split)
                    return source
        raise FileNotFoundError(f"No CIFAR {split} images in {root}.\n{self.help()}")

    def _batch_names(self, split: str) -> list[str]:
        if self.fine:
            return [split]
        return [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]

    def _read_parquets(self, paths: list[str], split: str) -> Source:
        source = Source([], [], paths)
        for path in paths:
            with open_parquet(path) as file:
                names = file.schema_arrow.names
                features = Features.from_arrow_schema(file.schema_arrow)
            clean = _pick(names, CLEAN_COLUMNS[self.fine], f"{path}: clean label")
            wanted = [clean]
            human = HUMAN_LABELS.get(self.config.name)
            if split == "train" and human is not None and human in names:
                wanted.append(human)
            for name in wanted + (["index"] if "index" in names else []):
                values = read_parquet(path, [name])[name]
                if name != "index" and len(values) and not 0 <= values.min() <= values.max() < len(self.class_names()):
                    raise ValueError(f"{path}: `{name}` must hold labels 0..{len(self.class_names()) - 1}.")
                if isinstance(features[name], ClassLabel):
                    values = by_own_names(values, features[name].names, self.class_names(), f"{path}: `{name}`")
                source.columns.setdefault(name, []).append(values)
            source.clean_labels.append(source.columns[clean][-1])
            source.images.append(ParquetImages(path, _pick(names, IMAGE_COLUMNS, f"{path}: image")))
        for name, parts in source.columns.items():
            if len(parts) != len(paths):
                raise ValueError(
                    f"`{name}` is a column of {len(parts)} of the {counted(len(paths), 'file')} {', '.join(paths)}."
                )
        self._check(source, split)
        return source

    def _check(self, source: Source, split: str) -> None:
        self.check_size(f"CIFAR {split}", sum(map(len, source.clean_labels)), SIZES[split])
