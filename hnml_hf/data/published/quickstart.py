"""A dataset that comes with the package: 5,000 Fashion-MNIST images (MIT), to try things without a download."""

import os

from .builder import NoisyLabelBuilder, ParquetImages, Rows, read_parquet


FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fashion_mnist")
CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
SIZES = {"train": 4_000, "test": 1_000}


class Quickstart(NoisyLabelBuilder):
    """Fashion-MNIST, 400 train and 100 test images a class, with the official (clean) labels in both label columns."""

    DESCRIPTION = "A class-balanced cut of 4,000 + 1,000 Fashion-MNIST images with clean labels."
    HOMEPAGE = "https://github.com/zalandoresearch/fashion-mnist"
    LICENSE = "MIT"
    CITATION = """@article{xiao2017fashion,
  title = {Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  author = {Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  journal = {arXiv:1708.07747},
  year = {2017}
}"""
    TREE = "train.parquet  test.parquet"
    REQUEST = "the files are part of this package: install it again."

    def __init__(self, *args, data_dir: str | None = None, **kwargs):
        super().__init__(*args, data_dir=FOLDER if data_dir is None else data_dir, **kwargs)

    @classmethod
    def watched_files(cls, root: str, **options) -> list[str]:
        return cls.need(root, "train.parquet", "test.parquet")

    def class_names(self) -> list[str]:
        return CLASSES

    def read_splits(self, root: str) -> dict[str, list[Rows]]:
        splits = {}
        for split, size in SIZES.items():
            path = f"{root}/{split}.parquet"
            columns = read_parquet(path, ["label", "index"])
            self.check_size(split, len(columns["label"]), size)
            splits[split] = [Rows(ParquetImages(path), columns["label"], columns["label"], columns["index"])]
        return splits
