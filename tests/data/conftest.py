"""Small fake trees of the datasets in their official layouts, with the Fashion-MNIST images of the package."""

import io
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

import hnml_hf


SHARED = Path(__file__).parents[2].parent / "shared" / "data"
CLOTHING_OF_FASHION = {0: 0, 6: 1, 2: 4, 4: 8, 3: 11, 1: 2, 5: 12, 7: 13, 8: 10, 9: 9}
CONFUSED = {4: 2, 2: 4, 6: 7, 7: 8, 8: 7, 1: 0, 0: 1}


@pytest.fixture(scope="session")
def shared_data():
    """The folder with real data; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no real data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def pictures():
    """200 gray 28x28 pictures and their Fashion-MNIST labels."""
    path = Path(hnml_hf.__file__).parent / "data" / "published" / "fashion_mnist" / "test.parquet"
    with pq.ParquetFile(path) as file:
        table = file.read(columns=["image", "label"]).slice(0, 200)
    images = []
    for cell in table["image"].to_pylist():
        image = PIL.Image.open(io.BytesIO(cell["bytes"]))
        image.load()
        images.append(image)
    return SimpleNamespace(images=images, labels=table["label"].to_pylist())


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a session tree that a test may damage."""

    def copy(tree: Path) -> Path:
        return Path(shutil.copytree(tree, tmp_path / "tree", symlinks=True))

    return copy


@pytest.fixture
def prepare(tmp_path):
    """Prepares a builder in a cache of its own."""

    def run(builder_class, root, config=None, **options):
        builder = builder_class(config_name=config, data_dir=str(root), cache_dir=str(tmp_path / "cache"), **options)
        builder.download_and_prepare()
        return builder.as_dataset()

    return run


def save(image: PIL.Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG" if path.suffix == ".png" else "JPEG", **options)


def write_lines(path: Path, lines, end="\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())


# -- Clothing1M -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def clothing1m(tmp_path_factory, pictures):
    """140 noisy, 28 + 14 + 14 clean images; `truth` and `noisy` hold the labels of all keys."""
    root = tmp_path_factory.mktemp("clothing1m")
    random = np.random.default_rng(0)
    sizes = {"noisy_train": 140, "clean_train": 28, "clean_val": 14, "clean_test": 14}
    keys, truth, noisy = {}, {}, {}
    number = 0
    for part, size in sizes.items():
        keys[part] = []
        for _ in range(size):
            a, b = random.integers(10**8, 2**32, 2)
            if number == 0:
                b = b - b % 1000  # the folder 0/00
            digits = f"{b % 1000:03d}"
            key = f"images/{digits[0]}/{digits[1:]}/{a},{b}.jpg"
            picture = pictures.images[number % 200]
            short = int(random.integers(64, 97))
            mode = {1: "L", 2: "CMYK"}.get(number, "RGB")
            save(picture.convert(mode).resize((short, int(short * 1.3))), root / key, quality=85)
            truth[key] = CLOTHING_OF_FASHION[pictures.labels[number % 200]]
            noisy[key] = truth[key]
            if random.random() > 0.6154:
                other = int(random.integers(14))
                noisy[key] = CONFUSED.get(truth[key], other) if random.random() < 0.7 else other
            keys[part].append(key)
            number += 1
        keys[part].sort(key=str.encode)
        write_lines(root / f"{part}_key_list.txt", keys[part])
    double = {p: keys[p][: round(len(keys[p]) * s)] for p, s in zip(list(sizes)[1:], (0.52, 0.38, 0.71), strict=True)}
    both = keys["noisy_train"] + [key for part in double.values() for key in part]
    clean = keys["clean_train"] + keys["clean_val"] + keys["clean_test"]
    write_lines(root / "noisy_label_kv.txt", [f"{key} {noisy[key]}" for key in random.permutation(both)])
    write_lines(root / "clean_label_kv.txt", [f"{key} {truth[key]}" for key in random.permutation(clean)])
    (root / "category_names_eng.txt").write_text("anything\n" * 14)
    (root / "category_names_chn.txt").write_bytes(b"\xff\xfe\xc9\xab\n" * 14)  # not UTF-8: must never be read
    return SimpleNamespace(root=root, keys=keys, truth=truth, noisy=noisy, double=double)


# -- WebVision --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def webvision(tmp_path_factory, pictures):
    """60 classes, two queries for the first five; 2 Google and 1 Flickr images a query, 1 validation image a class."""
    root = tmp_path_factory.mktemp("webvision")
    wnids = [f"n{1440764 + 37 * i:08d}" for i in range(60)]
    names = [f"thing {i}, other name {i}" for i in range(60)]
    names[7] = names[55] = "crane"
    write_lines(root / "info/synsets.txt", [f"{w} {n}" for w, n in zip(wnids, names, strict=True)])
    label_of_query = [*range(60), *range(5)]
    write_lines(root / "info/queries_synsets_map.txt", [f"{q} {y + 1}" for q, y in enumerate(label_of_query, 1)])
    for part in ("google", "flickr"):
        write_lines(root / f"info/queries_{part}.txt", [f"{q} words of {q}" for q in range(1, 66)])
    lists = {"google": [], "flickr": []}
    for query, label in enumerate(label_of_query, 1):
        for part, count in (("google", 2), ("flickr", 1)):
            for i in range(count):
                stem = f"x-Y_{query:04d}{i}zz" if part == "google" else f"{query}{i}77"
                name = f"{part}/q{query:04d}/{stem}.jpg"
                picture = pictures.images[(query + i) % 200]
                save(picture if query == 2 else picture.convert("RGB"), root / name)
                lists[part].append((name, label))
    # A picture of another kind under the name of a JPEG is common on the web.
    pictures.images[0].save(root / lists["google"][4][0], "PNG")
    lists["all"] = lists["google"] + lists["flickr"]
    for part, rows in lists.items():
        write_lines(root / f"info/train_filelist_{part}.txt", [f"{name} {label}" for name, label in rows])
    val = [(f"val{i + 1:06d}.jpg", (i * 7) % 60) for i in range(60)]
    for i, (name, _) in enumerate(val):
        save(pictures.images[i].convert("RGB"), root / "val_images_256" / name)
    write_lines(root / "info/val_filelist.txt", [f"{name} {label}" for name, label in val])
    write_lines(root / "info/test_filelist.txt", [f"test{i:06d}.jpg" for i in range(3)])
    return SimpleNamespace(root=root, wnids=wnids, lists=lists, val=val)


@pytest.fixture(params=["integers", "list", "wnids"])
def imagenet(request, tmp_path, webvision, pictures):
    """ILSVRC12 val in its three layouts: two images for each of the 60 classes, of which every one is known."""
    root = tmp_path / f"imagenet-{request.param}"
    truth = {}
    for i in range(120):
        name, label = f"ILSVRC2012_val_{i + 1:08d}.JPEG", (i * 11) % 60
        truth[name] = label
        folder = {"integers": f"val/{label}", "list": "val", "wnids": f"val/{webvision.wnids[label]}"}[request.param]
        save(pictures.images[i].convert("RGB"), root / folder / name)
    if request.param == "list":
        # Every other line has the wnid, which must be looked up and not counted in another order.
        lines = [
            f"{name} {webvision.wnids[label] if i % 2 else label}" for i, (name, label) in enumerate(truth.items())
        ]
        write_lines(root / "imagenet_val.txt", lines)
    return SimpleNamespace(root=root, truth=truth)


# -- ANIMAL-10N -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def animal10n(tmp_path_factory, pictures):
    """50 train and 20 test images in the binary, the flat and the nested form."""
    root = tmp_path_factory.mktemp("animal10n")
    pixels = {}
    for split, count, binary, flat in (
        ("train", 50, "data_batch_1.bin", "training"),
        ("test", 20, "test_batch.bin", "testing"),
    ):
        records, pixels[split] = [], []
        for i in range(count):
            image = pictures.images[i].convert("RGB").resize((64, 64))
            array = np.asarray(image).copy()
            array[0, 0] = (250, 120, 10)  # red, green and blue differ: a swap of the planes would be seen
            pixels[split].append(array)
            records.append(struct.pack(">II", 1000 + i, i % 10) + array.transpose(2, 0, 1).tobytes())
            save(image, root / "flat" / flat / f"{i % 10}_{1000 + i}.jpg")
            save(image, root / "nested" / split / str(i % 10) / f"{1000 + i}.jpg")
        (root / "binary").mkdir(exist_ok=True)
        (root / "binary" / binary).write_bytes(b"".join(records))
    return SimpleNamespace(root=root, pixels=pixels)


# -- Food-101N --------------------------------------------------------------------------------------------------------

ABSENT_FOOD = "hot_and_sour_soup/a49e6fb26e356c6c41a37b5c18176355.jpg"


@pytest.fixture(scope="session")
def food101n(tmp_path_factory, pictures):
    """Three classes with five images each, verified labels for six, and Food-101 beside it."""
    parent = tmp_path_factory.mktemp("food")
    root = parent / "Food-101N_release"
    classes = ["apple_pie", "filet_mignon", "hot_and_sour_soup"]
    names = [f"{c}/{i:032x}.jpg" for c in classes for i in range(5)]
    for i, name in enumerate(names):
        save(pictures.images[i].convert("RGB"), root / "images" / name)
    write_lines(root / "meta/classes.txt", ["class_name", *classes])
    write_lines(root / "meta/imagelist.tsv", ["class_name/key", *names])
    header = "class_name/key\tverification_label"
    verified = {names[0]: 1, names[1]: 0, names[6]: 1, names[11]: 0}
    write_lines(
        root / "meta/verified_train.tsv", [header, *(f"{n}\t{v}" for n, v in verified.items()), f"{ABSENT_FOOD}\t1"]
    )
    write_lines(root / "meta/verified_val.tsv", [header, f"{names[12]}\t1"])
    test = [f"{c}/{100 + i}" for c in classes for i in range(2)]
    for i, name in enumerate(test):
        save(pictures.images[50 + i].convert("RGB"), parent / "food-101/images" / f"{name}.jpg")
    write_lines(parent / "food-101/meta/classes.txt", classes)
    write_lines(parent / "food-101/meta/test.txt", test)
    return SimpleNamespace(
        parent=parent, root=root, names=names, verified={**verified, names[12]: 1}, test=test, classes=classes
    )


# -- CIFAR-N ----------------------------------------------------------------------------------------------------------


def python_batch(labels, pixels, key="labels") -> bytes:
    """A CIFAR "python" batch as Python 2 wrote it (protocol 2), put together by hand."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    raw = pixels.astype(np.uint8).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n"
        + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M"
        + struct.pack("<H", len(labels))
        + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb"
    )
    names = b"](" + b"".join(text(f"picture_{i}.png") for i in range(len(labels))) + b"e"
    return (
        b"\x80\x02}("
        + text("batch_label")
        + text("training batch 1 of 5")
        + text(key)
        + b"]("
        + numbers
        + b"e"
        + text("data")
        + array
        + text("filenames")
        + names
        + b"u."
    )


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """Five batches of 20 images and a test batch of 10, in the python and the binary form, with a label file."""
    root = tmp_path_factory.mktemp("cifar")
    random = np.random.default_rng(0)
    clean = random.integers(0, 10, 100)
    pixels = random.integers(0, 256, (100, 3, 32, 32), dtype=np.uint8)
    test_labels = np.arange(10)
    batches = {f"data_batch_{i + 1}": (clean[20 * i : 20 * i + 20], pixels[20 * i : 20 * i + 20]) for i in range(5)}
    batches["test_batch"] = (test_labels, pixels[:10])
    for name, (labels, images) in batches.items():
        python = root / "python/cifar-10-batches-py" / name
        binary = root / "binary/cifar-10-batches-bin" / f"{name}.bin"
        for path in (python, binary):
            path.parent.mkdir(parents=True, exist_ok=True)
        python.write_bytes(python_batch(labels, images))
        flat = images.reshape(len(images), -1)
        binary.write_bytes(np.concatenate([labels[:, None].astype(np.uint8), flat], axis=1).tobytes())
    human = {"clean_label": clean}
    for seed, name in enumerate(("aggre_label", "worse_label", "random_label1", "random_label2", "random_label3")):
        wrong = np.random.default_rng(seed).random(100) < 0.3
        human[name] = np.where(wrong, (clean + 1 + seed) % 10, clean)
    for form in ("python", "binary"):
        torch.save(human, root / form / "CIFAR-10_human.pt")
    return SimpleNamespace(root=root, clean=clean, pixels=pixels, human=human)
