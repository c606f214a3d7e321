"""Clothing1M (Xiao et al., "Learning from Massive Noisy Labeled Data for Image Classification", CVPR 2015)."""

import os

import numpy as np

from ..files import parse_keyed_label, parse_path, read_lines
from ..schema import UNKNOWN
from .builder import NoisyLabelBuilder, NoisyLabelConfig, Rows


# In id order. `category_names_eng.txt` says the same; it is not read, and neither is the Chinese list, whose encoding
# is not UTF-8 everywhere.
CLASSES = (
    "T-Shirt Shirt Knitwear Chiffon Sweater Hoodie Windbreaker Jacket Downcoat Suit Shawl Dress Vest Underwear".split()
)
SIZES = {"noisy_train": 1_000_000, "clean_train": 47_570, "clean_val": 14_313, "clean_test": 10_526}
DOUBLE_LABELLED_SIZES = {"clean_train": 24_637, "clean_val": 5_395, "clean_test": 7_465}  # 37,497 together
EVALUATION = {"validation": "clean_val", "test": "clean_test"}


class Clothing1M(NoisyLabelBuilder):
    """Clothing1M from a local folder; `index` is the position in the key list.

    | config | train | validation, test |
    |---|---|---|
    | `noisy` (default) | the noisy million; the true class is unknown | clean lists |
    | `clean` | the 47,570 clean images, for the protocols that fine-tune on them | clean lists |
    | `double_labelled` | clean images that have a noisy label too: `label` noisy, `clean_label` true | likewise |

    Rows come from the key lists; labels are looked up in the `*_label_kv.txt` files, which hold more keys than the
    lists. Lists with key and label in one file (`annotations/noisy_train.txt` ...) are read too. Images are looked for
    below `images/` and, where that folder does not exist, in `0/` ... `9/` directly.
    """

    BUILDER_CONFIGS = [
        NoisyLabelConfig(name="noisy", description="Noisy million, clean validation and test."),
        NoisyLabelConfig(name="clean", description="Clean train, validation and test."),
        NoisyLabelConfig(name="double_labelled", description="Clean images that have a noisy label too."),
    ]
    DEFAULT_CONFIG_NAME = "noisy"
    DESCRIPTION = (
        "A million clothing photos of 14 classes, labeled by the text around them (label accuracy about 62 %)."
    )
    HOMEPAGE = "https://github.com/Cysu/noisy_label"
    LICENSE = "Research only, on request from the authors."
    CITATION = """@inproceedings{xiao2015learning,
  title = {Learning from Massive Noisy Labeled Data for Image Classification},
  author = {Xiao, Tong and Xia, Tian and Yang, Yi and Huang, Chang and Wang, Xiaogang},
  booktitle = {CVPR},
  year = {2015}
}"""
    TREE = """  noisy_train_key_list.txt  clean_train_key_list.txt  clean_val_key_list.txt  clean_test_key_list.txt
  noisy_label_kv.txt  clean_label_kv.txt
  images/0/00/*.jpg ... images/9/99/*.jpg      (or 0/00/*.jpg ... without images/)
or, in place of the six lists, files with `key label` in each line:
  annotations/noisy_train.txt  annotations/clean_train.txt  annotations/clean_val.txt  annotations/clean_test.txt"""
    REQUEST = "ask the authors for access, see https://github.com/Cysu/noisy_label"

    @classmethod
    def watched_files(cls, root: str, **options) -> list[str]:
        official = [f"{root}/{part}_key_list.txt" for part in SIZES]
        official += [f"{root}/noisy_label_kv.txt", f"{root}/clean_label_kv.txt"]
        single = [f"{root}/{folder}{part}.txt" for part in SIZES for folder in ("annotations/", "")]
        # The image folders tell the two layouts apart, and a tar unpacked later changes them.
        folders = [f"{root}/images"] + [f"{root}/{digit}" for digit in range(10)]
        found = [path for path in official + single if os.path.isfile(path)]
        if not found:
            raise FileNotFoundError(f"No Clothing1M list in {root}.\n{cls.help()}")
        return found + [path for path in folders if os.path.isdir(path)]

    def class_names(self) -> list[str]:
        return CLASSES

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        train = "noisy_train" if self.config.name == "noisy" else "clean_train"
        parts = {"train": train, **EVALUATION}
        return {split: self.on_disk(self._read_part(root, part)) for split, part in parts.items()}

    def _read_part(self, root: str, part: str) -> Rows:
        double = self.config.name == "double_labelled"
        source, keys, labels = self._read_list(root, part)
        self.check_size(f"Clothing1M {part}", len(keys), SIZES[part])
        nested = os.path.isdir(f"{root}/images")
        names = keys if nested else [key.removeprefix("images/") for key in keys]
        unknown = np.full(len(keys), UNKNOWN)
        clean_labels = unknown if part == "noisy_train" else labels
        rows = Rows(names, labels, clean_labels, np.arange(len(keys)), root, source, np.arange(1, len(keys) + 1))
        rows = self.drop(rows, labels == UNKNOWN, "keys without a label")
        if double:
            (kv,) = self.need(root, "noisy_label_kv.txt")
            rows.labels = self._look_up(kv, [keys[row] for row in rows.index])
            rows = rows.select(rows.labels != UNKNOWN)
            self.check_size(f"Clothing1M {part} with two labels", len(rows.index), DOUBLE_LABELLED_SIZES[part])
        return rows

    def _read_list(self, root: str, part: str) -> tuple[str, list[str], np.ndarray]:
        """The list file, its keys and their labels (-1 = none), in list order."""
        source = f"{root}/{part}_key_list.txt"
        if os.path.isfile(source):
            keys = [parse_path(line, source, number) for number, line in read_lines(source)]
            self._refuse_repeated(source, keys)
            (kv,) = self.need(root, f"{part.partition('_')[0]}_label_kv.txt")
            return source, keys, self._look_up(kv, keys)
        for folder in ("annotations/", ""):
            source = f"{root}/{folder}{part}.txt"
            if os.path.isfile(source):
                keys, labels = read_key_labels(source)
                self._refuse_repeated(source, keys)
                return source, keys, labels
        self.need(root, f"{part}_key_list.txt")
        raise AssertionError("unreachable: `need` raises for a file that is not there")

    @staticmethod
    def _refuse_repeated(source: str, keys: list[str]) -> None:
        if len(set(keys)) == len(keys):
            return
        first: dict[str, int] = {}
        for number, key in enumerate(keys, start=1):
            if first.setdefault(key, number) != number:
                raise ValueError(f"{source}:{number}: the key {key} is in the list twice, first in line {first[key]}.")

    @staticmethod
    def _look_up(kv: str, keys: list[str]) -> np.ndarray:
        """Labels of `keys` from a `key label` file of any order that may hold further keys; -1 where it has none."""
        position = {key: row for row, key in enumerate(keys)}
        labels = np.full(len(keys), UNKNOWN)
        for number, line in read_lines(kv):
            key, label = parse_keyed_label(line, kv, number, len(CLASSES))
            row = position.get(key)
            if row is None:
                continue
            if labels[row] not in (UNKNOWN, label):
                raise ValueError(f"{kv}:{number}: the key {key} has the labels {labels[row]} and {label}.")
            labels[row] = label
        return labels


def read_key_labels(path: str | os.PathLike) -> tuple[list[str], np.ndarray]:
    """Read a list with `key label` in each line.

    Returns:
        `tuple`: the keys, and their labels of shape `(num_keys,)`, -1 where the line ends after the key.
    """
    keys, labels = [], []
    for number, line in read_lines(path):
        key, label = parse_keyed_label(line, path, number, len(CLASSES), allow_missing=True)
        keys.append(key)
        labels.append(UNKNOWN if label is None else label)
    return keys, np.array(labels, dtype=np.int64)
