"""Files that lie, never end, or lead elsewhere: pipes, links in a circle, paths in structs, images too large."""

import io
import os
import socket
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from options import DataArguments
from PIL import Image as PILImage

from hnml_hf import TransformedDataset, UnreadableImageError, check_dataset, load_noisy_dataset, open_image
from hnml_hf.audit.features import UNREADABLE_IMAGE, _Images
from hnml_hf.audit.gallery import decode_images
from hnml_hf.data import checks, schema
from hnml_hf.data.custom import load
from hnml_hf.data.custom.builders import list_images
from hnml_hf.data.decoding import MAX_PIXELS, TooManyPixelsError, check_size
from hnml_hf.data.files import MOST_WAYS, file_names, folder_names, walk
from hnml_hf.data.synthetic import draw_noise
from hnml_hf.inference import NotAnImageError


def picture(path, value=0):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    PILImage.new("RGB", (4, 4), (value, 0, 0)).save(path, "PNG")


def bomb(width, height):
    """A PNG that says how large it is, and nothing more."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def one_row(**image):
    features = schema.noisy_features(["a", "b"])
    columns = {"image": [{"bytes": None, "path": None, **image}], "label": [0], "clean_label": [0], "index": [3]}
    arrays = {name: pa.array(values) for name, values in columns.items()}
    arrays["image"] = pa.array(columns["image"], features.arrow_schema.field("image").type)
    return Dataset(pa.table(arrays).cast(features.arrow_schema))


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Two classes, and in one of them whatever is no file."""
    root = tmp_path / "photos"
    for number, name in enumerate(("a/1.png", "a/sub/2.png", "b/3.png")):
        picture(str(root / name), number)
    os.mkfifo(root / "a/pipe.png")
    os.symlink("nowhere.png", root / "a/broken.png")
    os.symlink("self.png", root / "a/self.png")  # Errno 40 to who follows it
    os.symlink("/dev/zero", root / "a/zero.png")
    os.symlink("..", root / "a/sub/up")
    os.symlink("../..", root / "a/sub/upper")
    os.symlink("../b", root / "a/beside")  # no circle: followed
    return root


def test_a_walk_leaves_out_what_is_no_file_and_links_to_folders_above(photos, monkeypatch):
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(photos / "b")  # the path of a socket is short
        server.bind("s.png")
        found = list(walk(photos))
    assert [folder.prefix for folder in found] == ["", "a/", "a/beside/", "a/sub/", "b/"]
    assert [folder.files for folder in found] == [[], ["1.png"], ["3.png"], ["2.png"], ["3.png"]]
    assert found[1].others == ["broken.png", "pipe.png", "self.png", "zero.png"]
    assert found[2].others == ["s.png"] and found[3].others == ["up", "upper"]
    assert file_names(photos / "a") == {"1.png"} and folder_names(photos / "a") == ["beside", "sub"]


def test_a_walk_through_links_that_multiply_ends(tmp_path):
    """Thirty folders, each with two links to the next: 2^30 ways, and no circle."""
    for number in range(30):
        (tmp_path / str(number)).mkdir()
        for name in "xy":
            os.symlink(f"../{number + 1}", tmp_path / str(number) / name)
    (tmp_path / "30").mkdir()
    with pytest.raises(ValueError, match=f"more than {MOST_WAYS} ways"):
        list(walk(tmp_path / "0"))


def test_a_folder_that_may_not_be_read_is_an_error_and_lost_and_found_is_not(tmp_path, monkeypatch):
    for name in ("a", "lost+found"):
        (tmp_path / name).mkdir()
    assert [folder.prefix for folder in walk(tmp_path)] == ["", "a/"]
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("a/"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="a/"):
        list(walk(tmp_path))


def test_an_image_folder_with_circles_and_pipes_loads_and_is_checked(photos, caplog):
    images, _ = list_images(str(photos))
    assert images == ["a/1.png", "a/beside/3.png", "a/sub/2.png", "b/3.png"]
    assert "6 in all, first: a/broken.png, a/pipe.png, a/self.png, a/zero.png, a/sub/up" in caplog.text
    data = load_noisy_dataset("imagefolder", data_dir=str(photos), cache_dir=str(photos.parent / "cache"))
    assert len(data["train"]) == 4
    assert not check_dataset(data, num_workers=1, image_dir=photos)["defects"]["file_without_row"]


def test_rows_that_name_a_pipe_or_a_device_are_rows_without_image(photos):
    (photos / "train.csv").write_text("file_name,label\na/1.png,0\na/pipe.png,1\na/zero.png,1\n")
    with pytest.raises(ValueError, match="no such image below .*: 2 of 3 rows, first: a/pipe.png, a/zero.png"):
        load_noisy_dataset(str(photos / "train.csv"), cache_dir=str(photos.parent / "cache"))


@pytest.mark.parametrize("target", [None, "/dev/zero", "nowhere"])
def test_a_dataset_that_is_no_file_is_not_asked_of_the_hub(tmp_path, target):
    path = tmp_path / "train.csv"
    os.mkfifo(path) if target is None else path.symlink_to(target)
    with pytest.raises(ValueError, match=f"{path} is neither a file nor a folder"):
        load_noisy_dataset(str(path))


@pytest.mark.parametrize("name", ["pipe.png", "zero.png", "self.png"])
def test_whoever_opens_one_file_does_not_wait_for_a_pipe(photos, name):
    path = str(photos / "a" / name)
    assert checks.check_image({"bytes": None, "path": path}).kind == "unreadable_file"
    with pytest.raises(NotAnImageError, match="cannot be read as an image"):
        open_image(path)
    with pytest.raises(UnreadableImageError, match=name):
        TransformedDataset(one_row(path=path), np.asarray)[0]
    assert isinstance(decode_images(one_row(path=path), [0])[0], str)


# ---- paths in structs -----------------------------------------------------------------------------------------------


def write_parquet(path, images, **columns):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {"label": list(range(len(images))), **columns}
    pq.write_table(pa.table({"image": pa.array(images, kind), **columns}), path)


@pytest.fixture
def secret(tmp_path):
    """A picture outside the folder of the data."""
    picture(str(tmp_path / "elsewhere" / "secret.png"), 200)
    (tmp_path / "data").mkdir()
    return str(tmp_path / "elsewhere" / "secret.png")


def load_table(tmp_path, **options):
    return load_noisy_dataset(str(tmp_path / "data/train.parquet"), cache_dir=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize(
    "path",
    ["{secret}", "../elsewhere/secret.png", "https://example.org/1.png", "file://{secret}", "zip://1::{secret}"],
)
def test_a_path_in_a_struct_of_a_table_leads_nowhere_else(tmp_path, secret, path):
    picture(str(tmp_path / "data/1.png"))
    rows = [{"bytes": None, "path": "1.png"}, {"bytes": None, "path": path.format(secret=secret)}]
    write_parquet(tmp_path / "data/train.parquet", rows)
    with pytest.raises(ValueError, match=r"train\.parquet:2: the path"):
        load_table(tmp_path)


def test_a_path_in_a_struct_is_one_below_the_folder_of_the_table(tmp_path, secret):
    picture(str(tmp_path / "data/x/1.png"), 7)
    inside = (tmp_path / "data/x/1.png").read_bytes()
    rows = [{"bytes": None, "path": "x/1.png"}, {"bytes": inside, "path": None}, {"bytes": None, "path": "x/1.png"}]
    write_parquet(tmp_path / "data/train.parquet", rows)
    train = load_table(tmp_path)["train"]
    assert [image.getpixel((0, 0)) for image in train["image"]] == 3 * [(7, 0, 0)]


def test_bytes_go_before_a_file_of_the_name_that_stands_beside_them(tmp_path, secret, monkeypatch):
    """`datasets` itself reads the file instead, wherever it lies; a name alone is looked for where one works."""
    picture(str(tmp_path / "cwd/1.png"), 100)
    picture(str(tmp_path / "data/x.png"), 7)
    monkeypatch.chdir(tmp_path / "cwd")
    content = (tmp_path / "data/x.png").read_bytes()
    write_parquet(tmp_path / "data/train.parquet", [{"bytes": content, "path": name} for name in ("1.png", secret)])
    assert [image.getpixel((0, 0)) for image in load_table(tmp_path)["train"]["image"]] == 2 * [(7, 0, 0)]


def test_structs_of_another_form(tmp_path, secret):
    picture(str(tmp_path / "data/1.png"), 7)
    for kind, rows in (
        (pa.struct({"path": pa.string()}), [{"path": "1.png"}] * 2),
        (pa.struct({"bytes": pa.binary()}), [{"bytes": (tmp_path / "data/1.png").read_bytes()}] * 2),
    ):
        table = pa.table({"image": pa.array(rows, kind), "label": [0, 1]})
        pq.write_table(table, tmp_path / "data/train.parquet")
        assert load_table(tmp_path)["train"][1]["image"].getpixel((0, 0)) == (7, 0, 0)
    pq.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), tmp_path / "data/train.parquet")
    with pytest.raises(ValueError, match="column `image` holds no images but int64"):
        load_table(tmp_path)


@pytest.fixture
def stored(tmp_path, secret, monkeypatch):
    """Makes a saved dataset, and one on the Hub, whose images are elsewhere; `save_to_disk` would take them in."""
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").touch()

    def make(kind, path):
        path = path.format(secret=secret)
        image = pa.array([{"bytes": None, "path": path}] * 2, Image().pa_type) if kind == "struct" else [path] * 2
        features = Features({"image": Image() if kind == "struct" else Value("string"), "label": Value("int64")})
        table = pa.table({"image": image, "label": [0, 1]}).cast(features.arrow_schema)
        for name in ("_load_from_disk", "_load_from_hub"):
            monkeypatch.setattr(load, name, lambda *_: DatasetDict({"train": Dataset(table)}))
        return str(tmp_path / "saved")

    return make


@pytest.mark.parametrize("kind", ["struct", "column"])
@pytest.mark.parametrize(
    ("path", "here", "hub"),
    [
        ("{secret}", "is a file of this machine that does not come", "is a file of this machine that does not come"),
        ("secret.png", "is relative; pass `data_dir`", "is relative; pass `data_dir`"),
        ("https://example.org/1.png", "is remote; only datasets of the Hub may name such", None),
        ("file://{secret}", "is remote", "is none of https://, http:// and hf://"),
        ("https://a/b::{secret}", "is remote", "is none of https://, http:// and hf://"),
    ],
)
def test_where_images_of_saved_and_of_hub_datasets_may_lie(stored, kind, path, here, hub):
    for name, shown, message in ((stored(kind, path), "saved", here), ("user/name", "user/name", hub)):
        if message is None:
            assert len(load_noisy_dataset(name)["train"]) == 2
        else:
            with pytest.raises(ValueError, match=f"{shown} .train. row 0: the image path .* {message}"):
                load_noisy_dataset(name)


@pytest.mark.parametrize("kind", ["struct", "column"])
def test_images_of_a_saved_dataset_lie_below_it_or_below_data_dir(tmp_path, secret, stored, kind):
    name = stored(kind, "{secret}")
    assert f"--data_dir {tmp_path}/elsewhere" in str(pytest.raises(ValueError, load_noisy_dataset, name).value)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        train = load_noisy_dataset(name, data_dir=folder)["train"]
        assert [cell["path"] for cell in train.data.column("image").to_pylist()] == [secret] * 2
    with pytest.raises(ValueError, match="is not a relative path inside the data folder"):
        load_noisy_dataset(name, data_dir=tmp_path / "data")
    assert len(load_noisy_dataset(stored(kind, "secret.png"), data_dir=tmp_path / "elsewhere")["train"]) == 2

    picture(str(tmp_path / "saved/images/1.png"))
    name = stored(kind, str(tmp_path / "saved/images/1.png"))
    assert len(load_noisy_dataset(name)["train"]) == 2
    (tmp_path / "saved/images/out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="does not come with the dataset"):
        load_noisy_dataset(stored(kind, str(tmp_path / "saved/images/out/secret.png")))


def test_images_that_came_with_a_hub_dataset_lie_in_the_cache(tmp_path, stored):
    stored("struct", "{secret}")
    assert len(load_noisy_dataset("user/name", cache_dir=str(tmp_path / "elsewhere"))["train"]) == 2


# ---- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [((8001, 8000), "limit is 64000000"), ((1, 1002), "more than 1000 times"), ((30_000, 30_000), "900000000 pixels")],
)
def test_one_limit_wherever_images_are_opened(tmp_path, size, message):
    data = bomb(*size)
    (tmp_path / "x.png").write_bytes(data)
    row = one_row(bytes=data)
    found = checks.check_image({"bytes": data, "path": None})
    assert found.kind == "too_many_pixels" and message in found.reason
    with pytest.raises(NotAnImageError, match=message):
        open_image(tmp_path / "x.png")
    with pytest.raises(UnreadableImageError, match=message):
        TransformedDataset(row, np.asarray)[0]
    assert message in decode_images(row, [0])[0]
    with pytest.raises(TooManyPixelsError, match=message):
        draw_noise(row, kind="instance", rate=0.1, seed=0)


def test_the_limit_is_an_option(monkeypatch):
    buffer = io.BytesIO()
    PILImage.new("RGB", (24, 16)).save(buffer, "PNG")
    row = one_row(bytes=buffer.getvalue())
    with pytest.raises(UnreadableImageError, match="24 x 16 pixels, the limit is 383"):
        TransformedDataset(row, np.asarray, max_pixels=383)[0]
    assert "the limit is 383" in decode_images(row, [0], max_pixels=383)[0]
    assert TransformedDataset(row, np.asarray, max_pixels=384)[0]["pixel_values"].shape == (16, 24, 3)
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)  # Pillow's own refuses from 201 pixels on
    with pytest.raises(UnreadableImageError, match="384 pixels"):
        TransformedDataset(row, np.asarray)[0]
    assert isinstance(TransformedDataset(row, np.asarray, max_pixels=MAX_PIXELS + 1)[0], dict)  # more was asked for
    check_size(8000, 8000, MAX_PIXELS)
    check_size(600, 1, MAX_PIXELS)


def test_a_program_that_looks_like_an_image_is_not_run(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(NotAnImageError, match="an EPS file is a program"):
        open_image(tmp_path / "x.png")


def test_a_file_without_end_is_not_read_into_memory(tmp_path):
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(2**40)  # a terabyte that takes no place on the disk
    found = checks.check_image({"bytes": None, "path": str(tmp_path / "x.png")}, max_pixels=1000)
    assert found.kind == "too_many_pixels" and "no image up to the pixel limit needs" in found.reason


def test_the_option_of_the_scripts_has_the_same_limit():
    assert DataArguments().max_pixels == MAX_PIXELS


def test_a_frozen_backbone_waits_for_no_pipe_either(photos):
    row, kept = one_row(path=str(photos / "a/pipe.png")), np.zeros(0, "V16")
    images = _Images(row, np.asarray, np.arange(1), photos, MAX_PIXELS, kept)
    images.content, images.done = np.zeros((1, 2), np.uint64), np.zeros(1, np.uint8)
    (sample,) = images.__getitems__([0])
    assert (sample["row"], sample["state"], sample["pixel_values"]) == (0, UNREADABLE_IMAGE, None)
