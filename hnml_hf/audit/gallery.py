"""What the report shows of the label issues: pictures and, of a model with activation maps, where it looked."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, Image
from PIL import Image as Pillow

from ..data.decoding import MAX_PIXELS, UNREADABLE, decode
from ..data.schema import column
from ..modeling.cam import normalize_cams
from ..modeling.forward import ask, evaluation_mode
from .findings import probably_wrong
from .report import SIDES, Evidence


logger = logging.getLogger(__name__)

MAX_ISSUES = 2_000
FEWEST_ISSUES = 48
FAILURES = (*UNREADABLE, RuntimeError)  # what an image of an odd size, or a device without memory, brings


def num_issues(table: pd.DataFrame, most: int = MAX_ISSUES) -> int:
    """How many samples to show: all that are probably wrong, at least 48 of those seen and at most `most`."""
    likely = int(probably_wrong(table).sum())
    return min(int((table["times_seen"] > 0).sum()), most, max(likely, FEWEST_ISSUES))


def decode_images(
    dataset: Dataset, rows: Sequence[int] | np.ndarray, *, max_pixels: int = MAX_PIXELS
) -> list[Pillow.Image | str]:
    """RGB images of some rows; instead of one that cannot be read, why."""
    undecoded = dataset.select_columns(["image"]).with_format(None).cast_column("image", Image(decode=False))
    found: list[Pillow.Image | str] = []
    for stored in undecoded[list(map(int, rows))]["image"]:
        try:
            found.append(decode(stored, max_pixels=max_pixels))
        except UNREADABLE as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@torch.no_grad()
def collect_evidence(
    dataset: Dataset,
    issues: pd.DataFrame,
    *,
    transform: Callable | None = None,
    model=None,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    batch_size: int = 64,
    max_pixels: int = MAX_PIXELS,
) -> list[Evidence]:
    """Pictures of the label issues and, with a model that has class activation maps, where it sees either class.

    Args:
        dataset (`datasets.Dataset`): that was scored, rows in any order.
        issues (`pd.DataFrame`): rows of [`noise_scores`]' table.
        transform (`Callable`, *optional*): of evaluation, from an RGB image to a tensor, for the model.
        model ([`TimmCAMForImageClassification`], *optional*): without it there are only pictures.
        crop_pct, crop_mode (`float`, `str`): timm's, of the transform: which part of the image it keeps and whether it
            squashes it, so that maps lie on the right spot.
        max_pixels (`int`): a larger image is not decoded.

    Returns:
        `list[Evidence]`: in the order of `issues`. An image that cannot be read or shown is a reason, no error.

    Raises:
        NonFiniteError: if what the model says is not finite.
    """
    ids = column(dataset, "index")
    order = np.argsort(ids, kind="stable")
    rows = order[np.searchsorted(ids[order], issues["index"].to_numpy())]
    evidence = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        images = decode_images(dataset, rows[part], max_pixels=max_pixels)
        pixels, seen = {}, {}
        for number, image in enumerate(images):
            if isinstance(image, str):
                continue
            try:
                seen[number] = _looked_at(image, crop_pct, crop_mode)
                if model is not None and transform is not None:
                    pixels[number] = transform(image)
            except FAILURES as error:
                images[number] = f"cannot be shown ({type(error).__name__}: {error})"
        maps = {}
        if pixels:
            try:
                with evaluation_mode(model):  # the maps run the head again
                    maps = _maps(model, pixels, issues.iloc[part])
            except FAILURES as error:
                logger.warning("The report shows %d images without activation maps: %s", len(pixels), error)
        for number, image in enumerate(images):
            if isinstance(image, str):
                evidence.append(Evidence(reason=image))
            else:
                given, suggested = (maps[name][number] if maps else None for name in ("label", "suggested_label"))
                evidence.append(Evidence(seen[number], given, suggested))
    return evidence


def _maps(model, pixels: dict[int, torch.Tensor], issues: pd.DataFrame) -> dict[str, dict[int, np.ndarray]]:
    """Maps of the given and of the suggested class for images of a batch, by their position in it."""
    numbers = list(pixels)
    output = ask(model, torch.stack(list(pixels.values())))
    maps = {}
    for name in ("label", "suggested_label"):
        classes = torch.as_tensor(issues[name].to_numpy()[numbers], device=model.device)
        cams = model.class_activation_maps(output, model.class_weights[classes])
        maps[name] = dict(zip(numbers, normalize_cams(cams).cpu().numpy(), strict=True))
    return maps


def _looked_at(image: Pillow.Image, share: float, mode: str) -> Pillow.Image:
    """The square that an evaluation transform looks at: the central one, or all of the middle squashed into one."""
    width, height = (share * side for side in (image.size if mode == "squash" else [min(image.size)] * 2))
    left, top = (image.width - width) / 2, (image.height - height) / 2
    left, top = (min(round(start), side - 1) for start, side in zip((left, top), image.size, strict=True))
    part = image.crop((left, top, left + max(round(width), 1), top + max(round(height), 1)))
    part = part.resize([min(part.size)] * 2) if mode == "squash" else part
    part.thumbnail((SIDES[0],) * 2, Pillow.Resampling.LANCZOS)  # 2,000 photographs in full would fill the memory
    return part
