"""The files of CIFAR and CIFAR-N as they are published: human labels, and official batches. Nothing is executed."""

import _codecs
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pickle import UnpicklingError  # the exception alone: no file is ever unpickled here
from pickletools import genops

import numpy as np
import torch

from ...common.words import counted
from .builder import encode_png


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
OFFICIAL = ("cifar10", "cifar100")  # the labels of the release itself, for synthetic noise
SIDE = 32  # pixels

# What a failed `torch.load` raises depends on where in the file the damage is; it documents no type.
LOAD_ERRORS = (
    UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError, struct.error,
    OverflowError, MemoryError, AssertionError,
)  # fmt: skip


def class_names(config: str) -> list[str]:
    """Of CIFAR-10 or CIFAR-100, in id order."""
    return CLASSES_100 if is_fine(config) else CLASSES_10


def is_fine(config: str) -> bool:
    """Whether it is CIFAR-100."""
    return config.startswith("cifar100")


def read_human_labels(path: str | os.PathLike, config: str) -> tuple[np.ndarray, np.ndarray]:
    """Read `CIFAR-10_human.pt` or `CIFAR-100_human.pt` of https://github.com/UCSC-REAL/cifar-10-100n.

    The files hold numpy arrays, which `torch.load` reads with an allow-list of the five names that they need; nothing
    else in the file can be executed.

    Returns:
        `tuple`: clean labels and human labels of shape `(num_rows,)`, in the order of the official training batches.
    """
    allowed = [
        (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
        np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
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
    num_classes = len(class_names(config))
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
        raise ValueError(
            f"{path}: {counted(len(labels[0]), 'clean label')}, but {counted(len(labels[1]), 'human label')}."
        )
    return labels[0], labels[1]


def read_batch(path: str, fine: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch of the official "python" or "binary" (`.bin`) release.

    Args:
        fine (`bool`): CIFAR-100.

    Returns:
        `tuple`: labels of shape `(num_rows,)` and pixels of shape `(num_rows, 3, 32, 32)`, uint8.
    """
    labels, pixels = _read_binary(path, fine) if path.endswith(".bin") else _read_python(path, fine)
    num_classes = 100 if fine else 10
    if len(labels) == 0 or pixels.size != len(labels) * 3 * SIDE * SIDE:
        raise ValueError(
            f"{path}: {counted(len(labels), 'label')} and {pixels.size:,} pixel values do not fit together."
        )
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
    """Take labels and pixels from the instructions of a pickled batch without carrying them out.

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
                elif collecting and isinstance(argument, int) and "INT" in opcode.name:
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
