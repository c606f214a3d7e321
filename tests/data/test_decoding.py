"""Images of more than 8 bits a channel, the same wherever the package opens them."""

import io

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngImageFile

from hnml_hf import TransformedDataset, UnreadableImageError, open_image
from hnml_hf.audit.gallery import decode_images
from hnml_hf.data import checks, schema
from hnml_hf.data.decoding import UNREADABLE, to_rgb
from hnml_hf.data.synthetic import draw_noise
from hnml_hf.inference import NotAnImageError


GRAY = np.array([[0, 128, 129], [257, 32768, 65535]], dtype=np.uint16)
BYTES = [[0, 0, 1], [1, 128, 255]]  # by hand: 128 / 257 is 0.498, 129 / 257 is 0.502, 32768 / 257 is 127.502


def stored(pixels, image_format):
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def dataset_of(*files):
    columns = {"image": [{"bytes": data, "path": None} for data in files]}
    zeros = [0] * len(files)
    columns |= {"label": zeros, "clean_label": zeros, "index": range(7, 7 + len(files))}
    return Dataset.from_dict(columns, features=schema.noisy_features(["a", "b", "c", "d"]))


def is_gray(image):
    return image.mode == "RGB" and all(np.asarray(channel).tolist() == BYTES for channel in image.split())


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_scaled_wherever_images_are_opened(image_format, tmp_path):
    data = stored(GRAY, image_format)
    (tmp_path / "x.png").write_bytes(data)
    assert is_gray(open_image(tmp_path / "x.png"))
    with PILImage.open(io.BytesIO(data)) as image:
        assert is_gray(open_image(image))
    dataset = dataset_of(data)
    assert is_gray(TransformedDataset(dataset, lambda image: image)[0]["pixel_values"])
    assert is_gray(decode_images(dataset, [0])[0])
    assert checks.check_image({"bytes": data, "path": None}).kind is None


def test_byte_order_and_8_bits():
    assert is_gray(to_rgb(PILImage.fromarray(GRAY.astype(">u2"))))
    assert is_gray(to_rgb(PILImage.fromarray(np.array(BYTES, dtype=np.uint8))))


def test_instance_noise_sees_what_training_sees():
    """Pictures that Pillow alone would make white: the classes they are confused with are those of 8-bit twins."""
    random = np.random.default_rng(0)
    pixels = random.integers(1, 256, (200, 4, 4), dtype=np.uint8)
    deep, shallow = (
        dataset_of(*(stored(image, "PNG") for image in images)) for images in (pixels.astype(np.uint16) * 257, pixels)
    )
    options = {"kind": "instance", "rate": 0.4, "seed": 0, "pixel_scaling": "standardized"}
    assert draw_noise(deep, **options).labels.tolist() == draw_noise(shallow, **options).labels.tolist()


@pytest.mark.parametrize("error", UNREADABLE)
def test_whatever_a_decoder_raises_is_a_bad_image_everywhere(error, tmp_path, monkeypatch):
    """Some of Pillow's decoders raise `struct.error`, `IndexError` or `MemoryError` on a broken file."""
    data = stored(GRAY, "PNG")
    (tmp_path / "x.png").write_bytes(data)
    dataset = dataset_of(data)

    said = "MemoryError" if error is MemoryError else "planted"

    def broken(self):
        raise error() if error is MemoryError else error("planted")

    monkeypatch.setattr(PngImageFile, "load", broken)
    with pytest.raises(NotAnImageError, match=rf"x.png` cannot be read as an image: .*{said}"):
        open_image(tmp_path / "x.png")
    with pytest.raises(UnreadableImageError, match=f"index 7 cannot be read: .*{said}"):
        TransformedDataset(dataset, lambda image: image)[0]
    assert said in decode_images(dataset, [0])[0]
    assert said in checks.check_image({"bytes": data, "path": None}).reason


def test_a_camera_held_upright_is_turned_wherever_images_are_opened(tmp_path):
    """Orientation 6: the stored rows are columns, right to left. Training saw it turned already; now all do."""
    exif, lying = PILImage.Exif(), np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    exif[0x0112] = 6
    PILImage.fromarray(lying).save(tmp_path / "x.png", exif=exif)
    upright = np.rot90(lying, -1).tolist()
    dataset = dataset_of((tmp_path / "x.png").read_bytes())
    assert np.asarray(open_image(tmp_path / "x.png")).tolist() == upright
    assert np.asarray(decode_images(dataset, [0])[0]).tolist() == upright
    assert np.asarray(TransformedDataset(dataset, lambda image: image)[0]["pixel_values"]).tolist() == upright


def test_a_row_without_an_image_stops_training_by_its_index():
    dataset = dataset_of(stored(GRAY, "PNG")).cast_column("image", Image(decode=True))
    rows = Dataset.from_dict(
        {name: [None] if name == "image" else dataset[name] for name in dataset.column_names}, dataset.features
    )
    with pytest.raises(UnreadableImageError, match="index 7 cannot be read: the row has no image"):
        TransformedDataset(rows, lambda image: image)[0]


def test_a_row_that_is_not_there_is_no_bad_image():
    with pytest.raises(IndexError):
        TransformedDataset(dataset_of(stored(GRAY, "PNG")), lambda image: image)[1]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_unknown_range_are_refused(kind, tmp_path):
    data = stored(GRAY.astype(kind), "TIFF")
    words = "32-bit numbers .* range is not known; store the images with 8 or 16 bits"
    (tmp_path / "x.tif").write_bytes(data)
    for source in (tmp_path / "x.tif", PILImage.fromarray(GRAY.astype(kind))):
        with pytest.raises(NotAnImageError, match=words):
            open_image(source)
    dataset = dataset_of(stored(GRAY, "PNG"), data)
    with pytest.raises(UnreadableImageError, match=rf"index 8 cannot be read: .*{words}.*hnml check"):
        TransformedDataset(dataset, lambda image: image).__getitems__([0, 1])
    assert "range is not known" in decode_images(dataset, [1])[0]
    with pytest.raises(ValueError, match=words):
        draw_noise(dataset.select([1]), kind="instance", rate=0.4, seed=0)
    (defect,) = checks.check_dataset(dataset)["defects"]["undecodable"]
    assert defect["index"] == 8 and "range is not known" in defect["reason"]
