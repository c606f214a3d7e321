"""From a file to RGB: what may go wrong in opening an image, and what becomes of its pixels."""

import re
import struct
import zlib
from io import BytesIO
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

from .files import open_regular


MAX_PIXELS = 64_000_000  # of one image, wherever the package decodes one; `--max_pixels` of the scripts
BESIDE_PIXELS = 2**26  # bytes that a file may have beside four a pixel
MAX_RATIO = 1_000  # of the sides: the shorter one is resized to some hundred pixels, and the longer one grows with it

# what Pillow and datasets are known to raise for files that are missing, cut off, broken, or no images
UNREADABLE = (
    OSError,  # also PIL.UnidentifiedImageError
    SyntaxError,  # broken PNG
    ValueError,  # also pixels whose range is not known
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,  # too many pixels; it is no ValueError
    Warning,  # where warnings are errors
)


class TooManyPixelsError(ValueError):
    """An image is larger than the limit, or would be once its shorter side is resized to the input of a model."""


def check_size(width: int, height: int, max_pixels: int):
    """Raise [`TooManyPixelsError`] on an image of more than `max_pixels`, or with sides of very different length."""
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{width} x {height} pixels, the limit is {max_pixels}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise TooManyPixelsError(
            f"{width} x {height} pixels, one side more than {MAX_RATIO} times the other: resized, it would not fit "
            "into the memory"
        )


def open_stored(stored: dict | None) -> BinaryIO:
    """The bytes of an undecoded image of `datasets`, as an open file.

    Args:
        stored (`dict`): `{"bytes": ..., "path": ...}`, one of which may be None. A path may be a URL.

    Raises:
        ValueError: on `None`, a row without an image.
        OSError: if the path is no regular file that may be read.
    """
    if stored is None or (stored.get("bytes") is None and not stored.get("path")):
        raise ValueError("the row has no image")
    if stored.get("bytes") is not None:
        return BytesIO(stored["bytes"])
    if not re.match(r"\w+://", stored["path"]):
        return open_regular(stored["path"])
    import fsspec  # slow to import, and rarely needed: for images on a remote store, or inside an archive

    return fsspec.open(stored["path"], "rb").open()


def read_stored(stored: dict | None, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of an undecoded image of `datasets`, whole: arguments and errors as of [`open_stored`].

    Raises:
        TooManyPixelsError: on a file with more bytes than an image of `max_pixels` needs.
    """
    most = 4 * max_pixels + BESIDE_PIXELS
    with open_stored(stored) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise TooManyPixelsError(f"more than {most} bytes, which no image up to the pixel limit needs")
    return data


def decode(source, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """An image in RGB, as [`to_rgb`] makes it, of an undecoded image of `datasets`, a path, or an open file."""
    if isinstance(source, dict) or source is None:
        source = open_stored(source)
    elif not hasattr(source, "read"):
        source = open_regular(source)
    with source, open_image_file(source, max_pixels=max_pixels) as image:
        return to_rgb(image, max_pixels=max_pixels)


def open_image_file(file: BinaryIO, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """Pillow's image of an open file, not decoded yet, and not above the limit.

    Raises:
        TooManyPixelsError: on more than `max_pixels`, instead of Pillow's warning and error at limits of its own.
    """
    if max_pixels > MAX_PIXELS and PIL.Image.MAX_IMAGE_PIXELS is not None:  # asked for, and Pillow's own is close
        PIL.Image.MAX_IMAGE_PIXELS = max(max_pixels, PIL.Image.MAX_IMAGE_PIXELS)  # of the process: it has no other
    try:
        image = PIL.Image.open(file)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise TooManyPixelsError(str(error)) from error
    check_size(image.width, image.height, max_pixels)
    return image


def to_rgb(image: PIL.Image.Image | None, *, max_pixels: int = MAX_PIXELS) -> PIL.Image.Image:
    """An image of any mode in RGB, with 8 bits a channel, turned as its EXIF orientation says.

    Gray of 16 bits is scaled, 65535 being white; Pillow's own conversion would make white of all above 255. It comes
    in the modes `I;16...`, and from PGM files in mode `I`. From elsewhere (TIFF, arrays) the numbers of the modes `I`
    and `F` may have any range, and a single image does not tell which.

    Raises:
        ValueError: on 32-bit numbers whose range is not known, or `None`, a row without an image.
        TooManyPixelsError: on more than `max_pixels`, before any is decoded.
    """
    if image is None:
        raise ValueError("the row has no image")
    check_size(image.width, image.height, max_pixels)
    if image.format == "EPS":
        raise ValueError("an EPS file is a program, which Pillow would have Ghostscript run; convert it")
    image.load()  # only then the mode is final, and whoever opened the file may close it
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        gray = (np.asarray(image).astype(np.uint32) + 128) // 257  # rounded: 65535 = 255 * 257
        image = PIL.Image.fromarray(gray.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"pixels are 32-bit numbers (Pillow's mode {image.mode}), whose range is not known; store the images with "
            "8 or 16 bits"
        )
    image = PIL.ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")
