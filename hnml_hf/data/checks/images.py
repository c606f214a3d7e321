"""One image: whether it is there, is an image, and decodes to the last pixel."""

import hashlib
import zipfile
from io import BytesIO
from typing import NamedTuple

import PIL.Image

from ..decoding import MAX_PIXELS, UNREADABLE, TooManyPixelsError, open_image_file, read_stored, to_rgb


IMAGE_DEFECTS = {
    "missing_image": "rows without image",
    "missing_file": "rows whose image file does not exist",
    "unreadable_file": "image files that cannot be read",
    "empty_file": "image files of zero bytes",
    "html_file": "web pages saved as images",
    "truncated": "images that end early",
    "undecodable": "images that cannot be decoded",
    "too_many_pixels": "images above the pixel limit",
}


class ImageCheck(NamedTuple):
    """What was found out about one image. `kind` and `reason` are None for a good one."""

    kind: str | None = None
    reason: str | None = None
    digest: int = 0
    width: int = 0
    height: int = 0
    mode: str = ""


def check_image(image: dict | None, *, max_pixels: int = MAX_PIXELS) -> ImageCheck:
    """Read, hash and fully decode one image.

    Args:
        image (`dict`): an undecoded image of `datasets`, `{"bytes": ..., "path": ...}`, one of them may be None.
        max_pixels (`int`): larger images are not decoded and count as bad.
    """
    if image is None or (image["bytes"] is None and not image["path"]):
        return ImageCheck("missing_image", "the cell is empty")
    try:
        data = read_stored(image, max_pixels=max_pixels)
    except (FileNotFoundError, NotADirectoryError):
        return ImageCheck("missing_file", "no such file")
    except TooManyPixelsError as error:
        return ImageCheck("too_many_pixels", str(error))
    except (OSError, ValueError, zipfile.BadZipFile) as error:  # ValueError: a null byte in the path
        return ImageCheck("unreadable_file", f"{type(error).__name__}: {error}")
    if not data:
        return ImageCheck("empty_file", "0 bytes")
    if data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return ImageCheck("html_file", "a web page, probably the error message of a download")

    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
    try:
        with open_image_file(BytesIO(data), max_pixels=max_pixels) as opened:
            width, height = opened.size
            to_rgb(opened, max_pixels=max_pixels)
            mode, is_png = opened.mode, opened.format == "PNG"
        if is_png:  # decoding skips the checksums
            with PIL.Image.open(BytesIO(data)) as opened:
                opened.verify()
    except TooManyPixelsError as error:
        return ImageCheck("too_many_pixels", str(error))
    except UNREADABLE as error:
        if isinstance(error, PIL.UnidentifiedImageError):
            return ImageCheck("undecodable", f"no image format that Pillow knows, starts with {data[:8]!r}")
        kind = "truncated" if "truncated" in str(error).lower() else "undecodable"
        return ImageCheck(kind, f"{type(error).__name__}: {error}")
    return ImageCheck(None, None, digest, width, height, mode)
