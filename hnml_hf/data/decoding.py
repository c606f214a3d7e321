"""From a file to RGB: what may go wrong in opening an image, and what becomes of its pixels."""

import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageOps


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


def to_rgb(image: PIL.Image.Image | None) -> PIL.Image.Image:
    """An image of any mode in RGB, with 8 bits a channel, turned as its EXIF orientation says.

    Grey of 16 bits is scaled, 65535 being white; Pillow's own conversion would make white of all above 255. It comes
    in the modes `I;16...`, and from PGM files in mode `I`. From elsewhere (TIFF, arrays) the numbers of the modes `I`
    and `F` may have any range, and a single image does not tell which.

    Raises:
        ValueError: on 32-bit numbers whose range is not known, or `None`, a row without an image.
    """
    if image is None:
        raise ValueError("the row has no image")
    image.load()  # only then the mode is final, and whoever opened the file may close it
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # rounded: 65535 = 255 * 257
        image = PIL.Image.fromarray(grey.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"pixels are 32-bit numbers (Pillow's mode {image.mode}), whose range is not known; store the images with "
            "8 or 16 bits"
        )
    image = PIL.ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")
