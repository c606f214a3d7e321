"""WebVision 1.0 and 2.0 (Li et al. 2017), and the 50-class subset known as mini-WebVision."""

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..files import folder_names, image_names, parse_integer, parse_keyed_label, read_lines
from ..schema import UNKNOWN
from .builder import NoisyLabelBuilder, NoisyLabelConfig, Rows


logger = logging.getLogger(__name__)

NUM_SYNSETS = {"1.0": 1_000, "2.0": 5_000}
MINI_CLASSES = 50
# Published for 1.0 only. The train parts are the sizes of the file lists, `mini` is Google below class 50.
SIZES = {"all": 2_439_574, "google": 980_449, "flickr": 1_459_125, "mini": 65_944}
TEST_PER_CLASS = 50  # WebVision 1.0 val and ILSVRC12 val
VAL_FOLDERS = ("val_images_256", "val_images")
QUERY_FOLDER = re.compile(r"(?:^|/)q0*([0-9]{1,9})/")


@dataclass
class WebVisionConfig(NoisyLabelConfig):
    """
    Args:
        release (`"1.0"` or `"2.0"`): the number of classes in `info/synsets.txt` must fit (1,000 or 5,000).
        imagenet_dir (`str`): a folder with ILSVRC12 val; adds the split `imagenet_val`. Any of `val/<wnid>/*.JPEG`,
            `imagenet_val.txt` beside `val/*.JPEG`, and `val/<label>/*.JPEG` with WebVision labels as folder names.
    """

    release: str = "1.0"
    imagenet_dir: str | None = None


class WebVision(NoisyLabelBuilder):
    """WebVision from a local folder. `index` is the position in the file list, also in `mini`.

    Configs are the parts of the training list: `all` (default), `google`, `flickr`, and `mini` (Google, classes 0-49).
    The official validation images have verified labels and are what papers report on: they are the split `test`. The
    official test labels are withheld. There is no `validation`: cut one from `train`.

    Labels in the file lists count from 0, query and synset numbers in the maps from 1. Where the maps exist, every
    training label is compared with them.
    """

    BUILDER_CONFIG_CLASS = WebVisionConfig
    BUILDER_CONFIGS = [
        WebVisionConfig(name="all", description="Google and Flickr."),
        WebVisionConfig(name="google", description="The Google part."),
        WebVisionConfig(name="flickr", description="The Flickr part."),
        WebVisionConfig(name="mini", description="mini-WebVision: Google, the first 50 classes."),
    ]
    DEFAULT_CONFIG_NAME = "all"
    DESCRIPTION = "Web images found by text queries for the classes of ImageNet."
    HOMEPAGE = "https://data.vision.ee.ethz.ch/cvl/webvision/"
    LICENSE = "Research only."
    CITATION = """@article{li2017webvision,
  title = {WebVision Database: Visual Learning and Understanding from Web Data},
  author = {Li, Wen and Wang, Limin and Li, Wei and Agustsson, Eirikur and Van Gool, Luc},
  journal = {arXiv:1708.02862},
  year = {2017}
}"""
    TREE = """  info/synsets.txt  info/val_filelist.txt
  info/train_filelist_all.txt  info/train_filelist_google.txt  info/train_filelist_flickr.txt  (the part in use)
  info/queries_synsets_map.txt  (optional: proves the labels)
  google/q0001/*.jpg ...  flickr/q0001/*.jpg ...  val_images_256/*.jpg  (or val_images/)"""
    REQUEST = "https://data.vision.ee.ethz.ch/cvl/webvision/download.html"

    @classmethod
    def watched_files(cls, root: str, *, imagenet_dir: str | None = None, **options) -> list[str]:
        cls.need(root, "info/synsets.txt", "info/val_filelist.txt")
        watched = [f"{root}/info/{name}" for name in sorted(os.listdir(f"{root}/info")) if name.endswith(".txt")]
        watched += [f"{root}/{folder}" for folder in VAL_FOLDERS if os.path.isdir(f"{root}/{folder}")]
        if imagenet_dir is not None:
            watched += cls._imagenet_files(imagenet_dir)
        return watched

    def class_names(self) -> list[str]:
        names = self._synsets(self.config.data_dir)[1]
        return names[:MINI_CLASSES] if self.config.name == "mini" else names

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        num_synsets = len(self._synsets(root)[0])
        num_classes = int(self.info.features["label"].num_classes)
        part = "google" if self.config.name == "mini" else self.config.name
        (train_list,) = self.need(root, f"info/train_filelist_{part}.txt")
        lists = {
            "train": self._read_list(train_list, root, num_synsets, num_classes, clean=False),
            "test": self._read_list(
                f"{root}/info/val_filelist.txt", self._val_folder(root), num_synsets, num_classes, clean=True
            ),
        }
        if self.config.release == "1.0":
            self.check_size(f"WebVision {self.config.name}", len(lists["train"].index), SIZES[self.config.name])
            self.check_size("WebVision val", len(lists["test"].index), num_classes * TEST_PER_CLASS)
        splits = {split: self.on_disk(rows) for split, rows in lists.items()}
        if self.config.imagenet_dir is not None:
            splits["imagenet_val"] = self._read_imagenet(self.config.imagenet_dir, num_synsets, num_classes)
        return splits

    def _synsets(self, root: str) -> tuple[list[str], list[str]]:
        """The wnids and the class names, in label order."""
        path = f"{root}/info/synsets.txt"
        names: dict[str, str] = {}
        for number, line in read_lines(path):
            wnid, _, name = line.partition(" ")
            if not re.fullmatch(r"n[0-9]{8}", wnid) or not name.strip():
                raise ValueError(f"{path}:{number}: expected `n01440764 names of the class`, got {line[:80]!r}.")
            if wnid in names:
                raise ValueError(f"{path}:{number}: the synset {wnid} is listed twice.")
            names[wnid] = name
        # Two classes may share a name (the crane that flies, the crane that lifts); class names must differ.
        counts = Counter(names.values())
        wnids = list(names)
        classes = [name if counts[name] == 1 else f"{name} ({wnid})" for wnid, name in names.items()]
        if self.config.release not in NUM_SYNSETS:
            raise ValueError(f"`release` must be one of {', '.join(NUM_SYNSETS)}, got {self.config.release!r}.")
        self.check_size(f"{path}: WebVision {self.config.release}", len(wnids), NUM_SYNSETS[self.config.release])
        return wnids, classes

    def _val_folder(self, root: str) -> str:
        for folder in VAL_FOLDERS:
            if os.path.isdir(f"{root}/{folder}"):
                return f"{root}/{folder}"
        raise FileNotFoundError(f"None of {', '.join(VAL_FOLDERS)} is in {root}.\n{self.help()}")

    def _read_list(self, path: str, folder: str, num_synsets: int, num_classes: int, *, clean: bool) -> Rows:
        queries = None if clean else self._query_map(self.config.data_dir, num_synsets)
        names, labels, index = [], [], []
        unproven = 0
        for number, line in read_lines(path):
            name, label = parse_keyed_label(line, path, number, num_synsets)
            if queries is not None:
                query = QUERY_FOLDER.search(name)
                if query is None:
                    unproven += 1
                elif queries.get(int(query[1])) != label:
                    raise ValueError(
                        f"{path}:{number}: label {label}, but query {query[1]} belongs to label "
                        f"{queries.get(int(query[1]))} by queries_synsets_map.txt (numbers there count from 1)."
                    )
            if label is not None and label < num_classes:
                names.append(name)
                labels.append(label)
                index.append(number - 1)
        if unproven:
            logger.warning("%s: %d rows are in no query folder; their labels were not compared.", path, unproven)
        labels = np.array(labels, dtype=np.int64)
        clean_labels = labels if clean else np.full(len(labels), UNKNOWN)
        index = np.array(index, dtype=np.int64)
        return Rows(names, labels, clean_labels, index, folder, path, index + 1)

    @staticmethod
    def _query_map(root: str, num_synsets: int) -> dict[int, int] | None:
        """Query number (from 1) -> label (from 0), or `None` without the map file."""
        path = f"{root}/info/queries_synsets_map.txt"
        if not os.path.isfile(path):
            return None
        queries = {}
        for number, line in read_lines(path):
            fields = line.split()
            if len(fields) != 2:
                raise ValueError(f"{path}:{number}: expected `query synset`, got {line[:80]!r}.")
            query = parse_integer(fields[0], path, number, "query", 1, 10**9)
            queries[query] = parse_integer(fields[1], path, number, "synset", 1, num_synsets + 1) - 1
        return queries

    # -- ILSVRC12 val ------------------------------------------------------------------------------------------------

    @classmethod
    def _imagenet_files(cls, folder: str) -> list[str]:
        if not os.path.isdir(f"{folder}/val"):
            raise FileNotFoundError(
                f"`imagenet_dir` {folder} has no folder `val`. Expected `val/<wnid>/*.JPEG`, `imagenet_val.txt` "
                "beside `val/*.JPEG`, or `val/<WebVision label>/*.JPEG` (see https://image-net.org for the images)."
            )
        listing = [f"{folder}/imagenet_val.txt"] if os.path.isfile(f"{folder}/imagenet_val.txt") else []
        return [f"{folder}/val", *listing, *(f"{folder}/val/{name}" for name in folder_names(f"{folder}/val"))]

    def _read_imagenet(self, folder: str, num_synsets: int, num_classes: int) -> list[Rows]:
        """ILSVRC12 val by wnid or by WebVision label; the devkit's ILSVRC2012_ID is another order and is never read.

        `index` is the position in the list, or in the sorted listing of the folders.
        """
        wnids = self._synsets(self.config.data_dir)[0]
        label_of = {wnid: label for label, wnid in enumerate(wnids)}
        listing = f"{folder}/imagenet_val.txt"
        names, labels = [], []
        if os.path.isfile(listing):
            for number, line in read_lines(listing):
                key, _, last = line.rpartition(" ")
                if last in label_of:
                    line = f"{key} {label_of[last]}"
                name, label = parse_keyed_label(line, listing, number, num_synsets)
                names.append(name)
                labels.append(label)
        else:
            listing = f"{folder}/val"
            classes = folder_names(listing)
            integers = {str(label): label for label in range(num_synsets)}
            known = label_of if all(name in label_of for name in classes) else integers
            strange = [name for name in classes if name not in known]
            if strange or not classes:
                raise ValueError(
                    f"{listing}: the folders must be wnids of info/synsets.txt or WebVision labels, got "
                    f"{', '.join(strange[:5]) or 'none'}."
                )
            for name in classes:
                images = image_names(f"{listing}/{name}")
                names += [f"{name}/{image}" for image in images]
                labels += [known[name]] * len(images)
        labels = np.array(labels, dtype=np.int64)
        lines = np.arange(1, len(names) + 1) if os.path.isfile(listing) else None
        rows = Rows(names, labels, labels, np.arange(len(names)), f"{folder}/val", listing, lines)
        rows = rows.select(labels < num_classes)
        self.check_size("ILSVRC12 val", len(rows.index), num_classes * TEST_PER_CLASS)
        return self.on_disk(rows)
