"""ANIMAL-10N (Song et al., "SELFIE: Refurbishing Unclean Samples for Robust Deep Learning", ICML 2019)."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...common.words import counted
from ..files import file_names, folder_names, image_names
from ..schema import UNKNOWN
from .builder import NoisyLabelBuilder, NoisyLabelConfig, Rows, encode_png


CLASSES = "Cat,Lynx,Wolf,Coyote,Cheetah,Jaguar,Chimpanzee,Orangutan,Hamster,Guinea pig".split(",")
SIZES = {"train": 50_000, "test": 5_000}
BINARY = {"train": "data_batch_1.bin", "test": "test_batch.bin"}
FOLDERS = {"train": ("training", "train"), "test": ("testing", "test")}
SIDE = 64
# Big-endian id and label, then the red, green and blue plane.
RECORD = np.dtype([("id", ">u4"), ("label", ">u4"), ("pixels", "u1", (3, SIDE, SIDE))])


@dataclass
class BinaryImages:
    """The images of a binary batch, as PNG, read record by record each time it is iterated."""

    path: str

    def __iter__(self) -> Iterator[dict]:
        for record in np.memmap(self.path, dtype=RECORD, mode="r"):
            yield encode_png(record["pixels"].transpose(1, 2, 0))


class Animal10N(NoisyLabelBuilder):
    """ANIMAL-10N from a local folder, in the binary or in the folder form. About 8 % of the training labels are wrong;
    which ones is not known. The test labels are clean.

    `index` is the position: in the binary file, or in the sorted listing of the image names.
    """

    BUILDER_CONFIGS = [NoisyLabelConfig(name="animal10n", description="50,000 noisy train, 5,000 clean test images.")]
    DESCRIPTION = "Five pairs of animals that are easily confused, labeled by people, 64x64."
    HOMEPAGE = "https://dm.kaist.ac.kr/datasets/animal-10n/"
    LICENSE = "Research only, on request from the authors."
    CITATION = """@inproceedings{song2019selfie,
  title = {SELFIE: Refurbishing Unclean Samples for Robust Deep Learning},
  author = {Song, Hwanjun and Kim, Minseok and Lee, Jae-Gil},
  booktitle = {ICML},
  year = {2019}
}"""
    TREE = """  data_batch_1.bin  test_batch.bin
or
  training/<label>_<id>.jpg  testing/<label>_<id>.jpg
or
  train/<label>/*.jpg  test/<label>/*.jpg"""
    REQUEST = "https://dm.kaist.ac.kr/datasets/animal-10n/"

    @classmethod
    def watched_files(cls, root: str, **options) -> list[str]:
        watched = []
        for split in SIZES:
            source = cls._source(root, split)
            watched.append(source)
            if os.path.isdir(source):
                watched += [f"{source}/{name}" for name in folder_names(source)]
        return watched

    def class_names(self) -> list[str]:
        return CLASSES

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        splits = {}
        for split, size in SIZES.items():
            source = self._source(root, split)
            read = self._read_folder if os.path.isdir(source) else self._read_binary
            rows = read(source, clean=split == "test")
            self.check_size(f"ANIMAL-10N {split}", len(rows.index), size)
            splits[split] = [rows]
        return splits

    @classmethod
    def _source(cls, root: str, split: str) -> str:
        for path in (f"{root}/{BINARY[split]}", *(f"{root}/{folder}" for folder in FOLDERS[split])):
            if os.path.exists(path):
                return path
        raise FileNotFoundError(f"No ANIMAL-10N {split} data in {root}.\n{cls.help()}")

    @staticmethod
    def _rows(images, labels: np.ndarray, source: str, *, clean: bool) -> Rows:
        clean_labels = labels if clean else np.full(len(labels), UNKNOWN)
        return Rows(images, labels, clean_labels, np.arange(len(labels)), source, source)

    def _read_binary(self, path: str, *, clean: bool) -> Rows:
        size = os.path.getsize(path)
        if size == 0 or size % RECORD.itemsize:
            raise ValueError(
                f"{path}: {size:,} bytes are not a whole number of records of {RECORD.itemsize:,} bytes "
                "(4 id, 4 label, 3x64x64 pixels): the file is cut off or of another format."
            )
        labels = np.array(np.memmap(path, dtype=RECORD, mode="r")["label"], dtype=np.int64)
        wrong = np.flatnonzero(labels >= len(CLASSES))
        if len(wrong):
            raise ValueError(
                f"{path}: record {wrong[0]}: label {labels[wrong[0]]} is out of range, expected 0..9 as a big-endian "
                f"integer ({len(wrong):,} of {counted(len(labels), 'record')})."
            )
        return self._rows(BinaryImages(path), labels, path, clean=clean)

    def _read_folder(self, folder: str, *, clean: bool) -> Rows:
        names, labels = [], []
        for name in image_names(folder):
            match = re.fullmatch(r"([0-9])_[^/]*", name)
            if match is None:
                raise ValueError(f"{folder}/{name}: expected `<label>_<id>.jpg` with a label 0..9.")
            names.append(name)
            labels.append(int(match[1]))
        classes = folder_names(folder)
        if classes and names:
            raise ValueError(
                f"{folder}: holds both images and folders; expected `<label>_<id>.jpg` or `<label>/*.jpg`."
            )
        for name in classes:
            if not re.fullmatch(r"[0-9]", name):
                raise ValueError(f"{folder}/{name}: expected folders named by the label 0..9.")
            images = image_names(f"{folder}/{name}")
            names += [f"{name}/{image}" for image in images]
            labels += [int(name)] * len(images)
        if not names:
            raise FileNotFoundError(
                f"No image in {folder} ({counted(len(file_names(folder)), 'other file')}).\n{self.help()}"
            )
        return self._rows(names, np.array(labels, dtype=np.int64), folder, clean=clean)
