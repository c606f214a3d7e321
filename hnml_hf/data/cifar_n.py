"""CIFAR-10N and CIFAR-100N (Wei et al., "Learning with Noisy Labels Revisited", ICLR 2022)."""

import _codecs
import logging
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pickle import UnpicklingError  # the exception alone: no file is ever unpickled here
from pickletools import genops

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset

from .builder import NoisyLabelBuilder, NoisyLabelConfig, ParquetImages, Rows, encode_png, read_parquet
from .files import file_names
from .schema import assemble, column


logger = logging.getLogger(__name__)

CLASSES_10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
CLASSES_100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel "
    "can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur "
    "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion "
    "lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree "
    "pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea "
    "seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank "
    "telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
).split()
HUMAN_LABELS = {
    "cifar10n-aggre": "aggre_label",
    "cifar10n-rand1": "random_label1",
    "cifar10n-rand2": "random_label2",
    "cifar10n-rand3": "random_label3",
    "cifar10n-worse": "worse_label",  # "worst" in the paper
    "cifar100n": "noisy_label",
}
SIZES = {"train": 50_000, "test": 10_000}
BLOCK = 10_000  # rows of one official CIFAR-10 batch
SIDE = 32

# What a failed `torch.load` raises depends on where in the file the damage is; it documents no type.
LOAD_ERRORS = (
    UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError, struct.error,
    OverflowError, MemoryError, AssertionError,
)  # fmt: skip


def read_human_labels(path: str | os.PathLike, config: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Reads `CIFAR-10_human.pt` or `CIFAR-100_human.pt` of https://github.com/UCSC-REAL/cifar-10-100n.

    The files hold numpy arrays, which `torch.load` reads with an allow-list of the five names that they need; nothing
    else in the file can be executed.

    Returns:
        `tuple`: clean labels and human labels of shape `(num_rows,)`, in the order of the official training batches.
    """
    allowed = [
        (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
        np._core.multiarray._reconstruct,
        np.ndarray,
        np.dtype,
        type(np.dtype("int64")),
        _codecs.encode,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, weights_only=True, map_location="cpu")
    except LOAD_ERRORS as error:
        # The message of `torch.load` is left out: it advises to load the file without the allow-list.
        raise ValueError(
            f"{path}: not a CIFAR-N label file ({type(error).__name__}): it is damaged, or holds more than arrays of "
            "integers. Download it again."
        ) from None
    names = ("clean_label", HUMAN_LABELS[config])
    if not isinstance(content, dict) or any(name not in content for name in names):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: `{config}` needs the keys {', '.join(names)}; the file has {found}.")
    num_classes = len(_classes(config))
    labels = []
    for name in names:
        values = content[name]
        if not isinstance(values, list | np.ndarray) or np.ndim(values) != 1:
            raise ValueError(f"{path}: `{name}` must be a list of labels, got {type(values).__name__}.")
        values = np.asarray(values)
        if values.dtype.kind not in "iu" or len(values) == 0 or values.min() < 0 or values.max() >= num_classes:
            raise ValueError(f"{path}: `{name}` must hold integers 0..{num_classes - 1}, got {values.dtype} values.")
        labels.append(values.astype(np.int64))
    if len(labels[0]) != len(labels[1]):
        raise ValueError(f"{path}: {len(labels[0])} clean labels, but {len(labels[1])} human labels.")
    return labels[0], labels[1]


def official_order(labels: np.ndarray, official: np.ndarray, *, block: int = BLOCK) -> np.ndarray:
    """
    Finds where the rows of an image source stand in the official order, from their clean labels alone.

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
            f"The image source has {len(labels):,} rows, the label file {len(official):,}: labels cannot be attached. "
            "A subset needs a column `index` with the official position."
        )
    if np.array_equal(labels, official):
        return np.arange(len(official))
    order = np.empty(len(official), dtype=np.int64)
    free = list(range(0, len(official), block))
    for start in range(0, len(labels), block):
        matches = [i for i in free if np.array_equal(labels[start : start + block], official[i : i + block])]
        if not matches:
            raise ValueError(
                f"The clean labels of rows {start:,}..{min(start + block, len(labels)) - 1:,} of the image source fit "
                f"no block of the label file ({np.mean(labels == official):.1%} of all rows agree by position): the "
                "source is in another order. Use the official batches or a copy that keeps their order."
            )
        free.remove(matches[0])
        order[start : start + block] = np.arange(matches[0], matches[0] + len(labels[start : start + block]))
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
    """
    Gives a CIFAR training set in memory or from the Hub the human labels of a label file.

    Rows stay in the order of `images`; `index` is the official position. The alignment is proven by the clean labels,
    see [`official_order`].
    """
    image_column = image_column or _pick(images.column_names, IMAGE_COLUMNS, "image")
    label_column = label_column or _pick(images.column_names, CLEAN_COLUMNS[config == "cifar100n"], "clean label")
    official, human = read_human_labels(labels_file, config)
    clean_labels = column(images, label_column).astype(np.int64)
    if "index" in images.column_names:
        order = column(images, "index").astype(np.int64)
        _check_order(clean_labels, official, order, str(labels_file))
    else:
        order = official_order(clean_labels, official)
    return assemble(images, image_column, human[order], official[order], order, _classes(config))


def clean_split(
    images: Dataset, config: str, *, image_column: str | None = None, label_column: str | None = None
) -> Dataset:
    """A CIFAR test set with the common features; its labels are clean."""
    image_column = image_column or _pick(images.column_names, IMAGE_COLUMNS, "image")
    label_column = label_column or _pick(images.column_names, CLEAN_COLUMNS[config == "cifar100n"], "clean label")
    labels = column(images, label_column).astype(np.int64)
    index = column(images, "index") if "index" in images.column_names else np.arange(len(images))
    return assemble(images, image_column, labels, labels, index.astype(np.int64), _classes(config))


IMAGE_COLUMNS = ("image", "img")
CLEAN_COLUMNS = {False: ("clean_label", "label"), True: ("clean_label", "fine_label", "label")}


def find_labels_file(data_dir: str | os.PathLike | None, config: str) -> str:
    """The official label file in a folder or in its `data/`."""
    name = "CIFAR-100_human.pt" if config == "cifar100n" else "CIFAR-10_human.pt"
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


def _classes(config: str) -> list[str]:
    return CLASSES_100 if config == "cifar100n" else CLASSES_10


def _check_order(clean_labels: np.ndarray, official: np.ndarray, order: np.ndarray, path: str) -> None:
    """The clean labels of a source with official positions must be those of the label file."""
    if order.min(initial=0) < 0 or order.max(initial=0) >= len(official):
        raise ValueError(f"{path}: has {len(official):,} labels, but `index` goes to {order.max():,}.")
    differ = np.flatnonzero(clean_labels != official[order])
    if len(differ):
        raise ValueError(
            f"{path}: the clean label differs from that of the images in {len(differ):,} of {len(order):,} rows, "
            f"first at index {order[differ[0]]}: the column `index` is not the official position."
        )


# -- official batches -------------------------------------------------------------------------------------------------


def read_batch(path: str, fine: bool) -> tuple[np.ndarray, np.ndarray]:
    """
    Reads one batch of the official "python" or "binary" (`.bin`) release.

    Args:
        fine (`bool`): CIFAR-100.

    Returns:
        `tuple`: labels of shape `(num_rows,)` and pixels of shape `(num_rows, 3, 32, 32)`, uint8.
    """
    labels, pixels = _read_binary(path, fine) if path.endswith(".bin") else _read_python(path, fine)
    num_classes = 100 if fine else 10
    if len(labels) == 0 or pixels.size != len(labels) * 3 * SIDE * SIDE:
        raise ValueError(f"{path}: {len(labels):,} labels and {pixels.size:,} pixel values do not fit together.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"{path}: label {labels.max()} is out of range, expected 0..{num_classes - 1}.")
    return labels, pixels.reshape(-1, 3, SIDE, SIDE)


def _read_binary(path: str, fine: bool) -> tuple[np.ndarray, np.ndarray]:
    data = np.fromfile(path, dtype=np.uint8)
    head = 2 if fine else 1  # coarse and fine label, or the label
    if len(data) % (head + 3 * SIDE * SIDE):
        raise ValueError(f"{path}: {len(data):,} bytes are not a whole number of CIFAR records: the file is cut off.")
    records = data.reshape(-1, head + 3 * SIDE * SIDE)
    return records[:, head - 1].astype(np.int64), records[:, head:]


def _read_python(path: str, fine: bool) -> tuple[np.ndarray, np.ndarray]:
    """
    Takes labels and pixels from the instructions of a pickled batch without carrying them out.

    The file is a `dict` with a list of integers after the string `labels` (`fine_labels`) and one array of pixels,
    which is by far the longest string in it. So nothing in the file can be executed.
    """
    key = "fine_labels" if fine else "labels"
    labels: list[int] = []
    pixels: bytes | str = b""
    collecting = False
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in genops(file):
                if isinstance(argument, str | bytes):
                    if len(argument) > len(pixels):
                        pixels = argument
                    collecting = argument in (key, key.encode())
                elif collecting and "INT" in opcode.name:
                    labels.append(argument)
                elif opcode.name in ("GLOBAL", "STACK_GLOBAL", "SETITEM", "SETITEMS"):
                    collecting = False
    except (ValueError, struct.error, OverflowError, LookupError) as error:
        raise ValueError(f"{path}: not a CIFAR python batch: {error}.") from None
    if isinstance(pixels, str):
        pixels = pixels.encode("latin-1", errors="replace")
    return np.array(labels, dtype=np.int64), np.frombuffer(pixels, dtype=np.uint8)


@dataclass
class BatchImages:
    """The images of an official batch, as PNG, read each time it is iterated."""

    path: str
    fine: bool

    def __iter__(self) -> Iterator[dict]:
        for pixels in read_batch(self.path, self.fine)[1]:
            yield encode_png(pixels.transpose(1, 2, 0))


# -- the builder ------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """The image files of a split, in their order, with the columns that parquet files bring along."""

    images: list
    clean_labels: list[np.ndarray]
    paths: list[str]
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)


class CIFARN(NoisyLabelBuilder):
    """
    CIFAR-10N and CIFAR-100N from a local folder; configs `cifar10n-{aggre,rand1,rand2,rand3,worse}` and `cifar100n`.

    Images come from parquet files (`train*.parquet`, `test*.parquet`; columns `image` or `img`, and `label` or
    `fine_label` with the clean label), or from the official "python" or "binary" batches. Human labels come from the
    columns of the parquet files, or from the official label file. `index` is the position in the official order.
    """

    BUILDER_CONFIGS = [NoisyLabelConfig(name=name, description=label) for name, label in HUMAN_LABELS.items()]
    DESCRIPTION = "CIFAR-10 and CIFAR-100 with labels from people; the official labels are the clean ones."
    HOMEPAGE = "http://noisylabels.com"
    LICENSE = "Labels: CC BY-NC 4.0. Images: none stated."
    CITATION = """@inproceedings{wei2022learning,
  title = {Learning with Noisy Labels Revisited: A Study Using Real-World Human Annotations},
  author = {Wei, Jiaheng and Zhu, Zhaowei and Cheng, Hao and Liu, Tongliang and Niu, Gang and Liu, Yang},
  booktitle = {ICLR},
  year = {2022}
}"""
    TREE = """  CIFAR-10_human.pt  or  CIFAR-100_human.pt      (not needed if the parquet files hold the human labels)
and one of
  train*.parquet  test*.parquet
  cifar-10-batches-py/data_batch_1 ... test_batch      cifar-100-python/train  test
  cifar-10-batches-bin/data_batch_1.bin ...            cifar-100-binary/train.bin  test.bin"""
    REQUEST = "labels: https://github.com/UCSC-REAL/cifar-10-100n; images: https://www.cs.toronto.edu/~kriz/cifar.html"

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
        return self.config.name == "cifar100n"

    def class_names(self) -> list[str]:
        return _classes(self.config.name)

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        train, test = (self._find_images(root, split) for split in SIZES)
        labels, index = self._human_labels(root, train)
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

    def _human_labels(self, root: str, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Human labels and official positions of the training images, in the order of the source."""
        clean_labels = np.concatenate(source.clean_labels)
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
            names = _parquet_columns(path)
            clean = _pick(names, CLEAN_COLUMNS[self.fine], f"{path}: clean label")
            wanted = [clean]
            if split == "train" and HUMAN_LABELS[self.config.name] in names:
                wanted.append(HUMAN_LABELS[self.config.name])
            for name in wanted + (["index"] if "index" in names else []):
                values = read_parquet(path, [name])[name]
                if name != "index" and len(values) and not 0 <= values.min() <= values.max() < len(self.class_names()):
                    raise ValueError(f"{path}: `{name}` must hold labels 0..{len(self.class_names()) - 1}.")
                source.columns.setdefault(name, []).append(values)
            source.clean_labels.append(source.columns[clean][-1])
            source.images.append(ParquetImages(path, _pick(names, IMAGE_COLUMNS, f"{path}: image")))
        for name, parts in source.columns.items():
            if len(parts) != len(paths):
                raise ValueError(f"`{name}` is a column of {len(parts)} of the {len(paths)} files {', '.join(paths)}.")
        self._check(source, split)
        return source

    def _check(self, source: Source, split: str) -> None:
        self.check_size(f"CIFAR {split}", sum(map(len, source.clean_labels)), SIZES[split])


FOLDERS = ("cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-bin", "cifar-100-binary")


def _parquet_columns(path: str) -> list[str]:
    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}).") from None
