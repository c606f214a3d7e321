"""Data of a user: pictures in a folder, and the loader with a cache of the test's own."""

import pytest

from hnml_hf import load_noisy_dataset


@pytest.fixture
def load(tmp_path):
    return lambda *args, **options: load_noisy_dataset(*args, cache_dir=str(tmp_path / "cache"), **options)


@pytest.fixture
def images(tmp_path, pictures):
    """A folder with 12 pictures, one with a comma and a blank and one with other letters in its name."""
    root = tmp_path / "data"
    names = [f"img/{i}.jpg" for i in range(10)] + ["img/a, b.jpg", "img/日本 ü.jpg"]
    for picture, name in zip(pictures.images, names, strict=False):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.convert("RGB").save(root / name)
    return root, names


@pytest.fixture
def folder(tmp_path, pictures):
    root = tmp_path / "folder"
    for split, count in (("train", 3), ("val", 1)):
        for name in ("10", "2", "cat, wild"):
            for i in range(count):
                path = root / split / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                pictures.images[i].convert("RGB").save(path)
    return root
