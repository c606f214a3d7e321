"""Predictions of a trained model for images, with the places that they rest on."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .data.decoding import MAX_PIXELS, UNREADABLE, decode, to_rgb
from .data.transforms import create_transforms
from .modeling.cam import normalize_cams
from .modeling.forward import ask


SHOWN = 224  # pixels; a smaller image is enlarged before a map is laid over it
COLORS = np.array([(0, 0, 128), (0, 128, 255), (128, 255, 128), (255, 160, 0), (200, 0, 0)], dtype=float)


class NotAnImageError(ValueError):
    """A file that was to be classified cannot be read as an image."""


@dataclass
class Prediction:
    """What the model says of one image.

    Args:
        labels (`list[str]`): the likeliest classes, best first.
        scores (`list[float]`): their probabilities.
        cam (`np.ndarray` of shape `(h, w)`, *optional*): where the evidence for the first of them lies, in [0, 1].
        seen (`Image.Image`, *optional*): the part of the image that the model saw, with the map; see [`overlay`].
    """

    labels: list[str]
    scores: list[float]
    cam: np.ndarray | None = None
    seen: Image.Image | None = None


def open_image(source: str | os.PathLike | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image in RGB, from a file or from an image.

    Args:
        source (`str`, `Path` or `PIL.Image.Image`): a file, or an image in any mode.
        max_pixels (`int`): a larger image is refused.

    Raises:
        NotAnImageError: if the file is missing, cut off, too large or no image, or its pixels have no known range.

    Example:

        image = open_image("photo.jpg")
    """
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source, max_pixels=max_pixels)
        return decode(source, max_pixels=max_pixels)
    except UNREADABLE as error:
        reason = str(error).replace(str(source), "it") or type(error).__name__
        raise NotAnImageError(f"`{source}` cannot be read as an image: {reason}.") from error


def overlay(image: Image.Image, cam: np.ndarray, *, strength: float = 0.5) -> Image.Image:
    """An image with a map laid over it: blue where there is little evidence, red where there is most.

    Args:
        image (`Image.Image`): RGB, of any size.
        cam (`np.ndarray` of shape `(h, w)`): values in [0, 1].
        strength (`float`): of the colors, in [0, 1].

    Example:

        (prediction,) = predict(model, [dataset[0]["image"]], with_cams=True)
        overlay(dataset[0]["image"], prediction.cam).save("where.png")
    """
    if max(image.size) < SHOWN:
        factor = SHOWN / max(image.size)
        image = image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)
    smooth = Image.fromarray((255 * cam).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    level = np.asarray(smooth) / 255
    heat = np.stack([np.interp(level, np.linspace(0, 1, len(COLORS)), channel) for channel in COLORS.T], axis=-1)
    return Image.blend(image, Image.fromarray(heat.astype(np.uint8)), strength)


@torch.no_grad()
def predict(
    model,
    images: Iterable,
    *,
    top_k: int = 5,
    batch_size: int = 32,
    with_cams: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prediction]:
    """Classify images, one batch at a time.

    Args:
        model ([`TimmCAMForImageClassification`]): on its device; evaluation mode is put on for each batch.
        images (`Iterable`): paths or `PIL` images, in any mode.
        top_k (`int`): classes to name for each.
        batch_size (`int`): images at a time.
        with_cams (`bool`): whether to say where the evidence for the first class lies.
        max_pixels (`int`): a larger image cannot be read.

    Yields:
        [`Prediction`]: one for each image, in order.

    Raises:
        NonFiniteError: if what the model says is not finite.
        NotAnImageError: at an image that cannot be read.

    Example:

        for prediction in predict(model, [dataset[0]["image"]], top_k=2):
            print(prediction.labels, prediction.scores)
    """
    config = model.config
    _, transform = create_transforms(config.pretrained_cfg)
    top_k = min(top_k, config.num_labels)
    mean, std = (torch.tensor(config.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    images = iter(images)
    while batch := list(islice(images, batch_size)):
        pixel_values = torch.stack([transform(open_image(image, max_pixels=max_pixels)) for image in batch])
        output = ask(model, pixel_values, cam_classes="predicted" if with_cams else None)
        scores, classes = output.logits.float().softmax(-1).topk(top_k)
        cams = normalize_cams(output.cams).cpu().numpy() if with_cams else [None] * len(batch)
        for pixels, row, names, cam in zip(pixel_values, scores.tolist(), classes.tolist(), cams, strict=True):
            seen = None
            if cam is not None:
                values = (255 * (pixels * std + mean)).clamp(0, 255).byte().permute(1, 2, 0).numpy()
                seen = overlay(Image.fromarray(values), cam)
            yield Prediction([config.id2label[name] for name in names], row, cam, seen)


def cam_examples(model, images: Iterable, *, columns: int = 6) -> Image.Image:
    """A sheet of images with their maps, each under the class that the model predicts.

    Args:
        model ([`TimmCAMForImageClassification`]): on its device.
        images (`Iterable`): paths or `PIL` images. They become part of the picture: show only what may be shown.
        columns (`int`): images in a row.
    """
    predictions = list(predict(model, images, top_k=1, with_cams=True))
    caption, font = 24, ImageFont.load_default(15)
    width, height = predictions[0].seen.size
    rows = -(-len(predictions) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + caption)), "white")
    for number, prediction in enumerate(predictions):
        x, y = number % columns * width, number // columns * (height + caption)
        text = f"{prediction.labels[0][:24]}, {prediction.scores[0]:.0%}"
        ImageDraw.Draw(sheet).text((x + 4, y + 3), text, "black", font=font)
        sheet.paste(prediction.seen, (x, y + caption))
    return sheet
