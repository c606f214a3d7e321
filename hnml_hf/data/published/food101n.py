"""Food-101N (Lee et al., "CleanNet: Transfer Learning for Scalable Image Classifier Training with Label Noise")."""

import logging
import os
from dataclasses import dataclass

import datasets
import numpy as np

from ..files import parse_integer, parse_path, read_lines
from ..schema import UNKNOWN
from .builder import NoisyLabelBuilder, NoisyLabelConfig, Rows


logger = logging.getLogger(__name__)

NUM_CLASSES = 101
SIZES = {"train": 310_009, "test": 25_250}
VERIFIED_SIZES = {"verified_train.tsv": 52_868, "verified_val.tsv": 4_741}
# In verified_train.tsv of the release, but not among its images or in imagelist.tsv.
ABSENT = "hot_and_sour_soup/a49e6fb26e356c6c41a37b5c18176355.jpg"


@dataclass
class Food101NConfig(NoisyLabelConfig):
    """
    Args:
        food101_dir (`str`): the folder of Food-101, whose test split is the test split of Food-101N; by default a
            folder `food-101` inside or beside `data_dir`. Without one there is no `test`.
        verification (`bool`): add the column `verification`: 1 = the label was verified as right, 0 = as wrong,
            -1 = not looked at.
    """

    food101_dir: str | None = None
    verification: bool = False


class Food101N(NoisyLabelBuilder):
    """Food-101N from a local folder, tested on Food-101. `index` is the position in `imagelist.tsv` (`test.txt`).

    `clean_label` is the label where somebody verified it. Where it was found to be wrong the true class is not known:
    -1, as for the images that nobody looked at; the column `verification` tells these two apart.
    """

    BUILDER_CONFIG_CLASS = Food101NConfig
    BUILDER_CONFIGS = [Food101NConfig(name="food101n", description="310,009 noisy images; test: Food-101.")]
    DESCRIPTION = "Web images of 101 dishes, about 20 % wrong labels, 57,609 of them verified by people."
    HOMEPAGE = "https://kuanghuei.github.io/Food-101N/"
    LICENSE = "Research only."
    CITATION = """@inproceedings{lee2018cleannet,
  title = {CleanNet: Transfer Learning for Scalable Image Classifier Training with Label Noise},
  author = {Lee, Kuang-Huei and He, Xiaodong and Zhang, Lei and Yang, Linjun},
  booktitle = {CVPR},
  year = {2018}
}"""
    TREE = """  meta/classes.txt  meta/imagelist.tsv  meta/verified_train.tsv  meta/verified_val.tsv
  images/<class>/*.jpg
and Food-101 for the test split, in food-101/ inside or beside it or in `food101_dir`:
  meta/classes.txt  meta/test.txt  images/<class>/*.jpg"""
    REQUEST = "https://kuanghuei.github.io/Food-101N/ and https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"

    @classmethod
    def watched_files(cls, root: str, *, food101_dir: str | None = None, **options) -> list[str]:
        names = ("classes.txt", "imagelist.tsv", "verified_train.tsv", "verified_val.tsv")
        watched = cls.need(root, *(f"meta/{name}" for name in names))
        test = cls._food101(root, food101_dir)
        return watched + (cls.need(test, "meta/classes.txt", "meta/test.txt") if test else [])

    def class_names(self) -> list[str]:
        path = f"{self.config.data_dir}/meta/classes.txt"
        names = [text for _, text in self._after_header(path, "class_name")]
        return self._checked_names(path, names, first_line=2)

    def _info(self) -> datasets.DatasetInfo:
        info = super()._info()
        if self.config.verification:
            info.features = datasets.Features({**info.features, "verification": datasets.Value("int64")})
        return info

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        ids = {name: label for label, name in enumerate(self.info.features["label"].names)}
        path = f"{root}/meta/imagelist.tsv"
        names = [parse_path(text, path, number) for number, text in self._after_header(path, "class_name/key")]
        labels = self._labels(names, ids, path, first_line=2)
        self.check_size("Food-101N train", len(names), SIZES["train"])
        verified = self._verified(root, names)
        rows = Rows(
            names,
            labels,
            np.where(verified == 1, labels, UNKNOWN),
            np.arange(len(names)),
            f"{root}/images",
            path,
            np.arange(2, len(names) + 2),
            extra={"verification": verified} if self.config.verification else {},
        )
        absent = np.array([name == ABSENT for name in names])
        if absent.any():
            logger.warning("Left out, known to be absent from the release: %s.", ABSENT)
        splits = {"train": self.on_disk(rows.select(~absent))}
        test = self._food101(root, self.config.food101_dir)
        if test:
            splits["test"] = self._read_food101(test, ids)
        return splits

    @staticmethod
    def _food101(root: str, folder: str | None) -> str | None:
        if folder is not None:
            return os.path.abspath(os.path.expanduser(folder))
        for candidate in (f"{root}/food-101", f"{os.path.dirname(root)}/food-101"):
            if os.path.isdir(candidate):
                return candidate
        return None

    @staticmethod
    def _after_header(path: str, header: str) -> list[tuple[int, str]]:
        """The lines below the header, which all Food-101N files have; read as a class name it would shift all ids."""
        lines = list(read_lines(path))
        if not lines or lines[0][1].strip() != header:
            found = lines[0][1] if lines else ""
            raise ValueError(f"{path}:1: expected the header {header!r}, got {found[:80]!r}.")
        return lines[1:]

    def _checked_names(self, path: str, names: list[str], first_line: int) -> list[str]:
        for row, name in enumerate(names):
            if name in names[:row]:
                raise ValueError(f"{path}:{row + first_line}: the class {name!r} is listed twice.")
        self.check_size(f"{path}: classes", len(names), NUM_CLASSES)
        return names

    @staticmethod
    def _labels(names: list[str], ids: dict[str, int], path: str, first_line: int) -> np.ndarray:
        """The label of each name, which is its folder."""
        labels = [ids.get(name.partition("/")[0], UNKNOWN) for name in names]
        if UNKNOWN in labels:
            row = labels.index(UNKNOWN)
            raise ValueError(
                f"{path}:{row + first_line}: the folder of {names[row]!r} is no class of meta/classes.txt."
            )
        return np.array(labels, dtype=np.int64)

    def _verified(self, root: str, names: list[str]) -> np.ndarray:
        """Verification label of each image: 1 right, 0 wrong, -1 not looked at."""
        position = {name: row for row, name in enumerate(names)}
        verified = np.full(len(names), UNKNOWN)
        for file, size in VERIFIED_SIZES.items():
            path = f"{root}/meta/{file}"
            lines = self._after_header(path, "class_name/key\tverification_label")
            self.check_size(f"Food-101N {file}", len(lines), size)
            for number, line in lines:
                name, tab, text = line.partition("\t")
                if not tab:
                    raise ValueError(f"{path}:{number}: no verification label after a tab in {line[:200]!r}.")
                value = parse_integer(text, path, number, "verification label", 0, 2)
                row = position.get(parse_path(name, path, number))
                if row is None:
                    if name == ABSENT or self.config.on_missing == "skip":
                        continue
                    raise ValueError(
                        f"{path}:{number}: {name} is not in imagelist.tsv; `on_missing='skip'` ignores such lines."
                    )
                if verified[row] not in (UNKNOWN, value):
                    raise ValueError(f"{path}:{number}: {name} was verified as {verified[row]} and as {value}.")
                verified[row] = value
        return verified

    def _read_food101(self, root: str, ids: dict[str, int]) -> list[Rows]:
        path = f"{root}/meta/classes.txt"
        names = self._checked_names(path, [text for _, text in read_lines(path)], first_line=1)
        if set(names) != set(ids):
            differ = sorted(set(names) ^ set(ids))
            row = next((row for row, name in enumerate(names) if name not in ids), len(names) - 1)
            raise ValueError(f"{path}:{row + 1}: the classes differ from those of Food-101N: {', '.join(differ[:5])}.")
        path = f"{root}/meta/test.txt"
        # The lists of Food-101 name images without their suffix.
        names = [parse_path(text, path, number) + ".jpg" for number, text in read_lines(path)]
        labels = self._labels(names, ids, path, first_line=1)
        self.check_size("Food-101 test", len(names), SIZES["test"])
        extra = {"verification": np.full(len(names), UNKNOWN)} if self.config.verification else {}
        lines = np.arange(1, len(names) + 1)
        rows = Rows(names, labels, labels, lines - 1, f"{root}/images", path, lines, extra)
        return self.on_disk(rows)
