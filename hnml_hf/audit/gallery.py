"""What the report shows of the suspects: pictures and, of a model with activation maps, where it looked."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, Image
from PIL import Image as Pillow

from ..data.decoding import UNREADABLE, to_rgb
from ..data.schema import column
from ..modeling.cam import normalize_cams
from ..modeling.modes import evaluation_mode
from .report import SIDES, Evidence
from .table import probably_wrong


MAX_SUSPECTS = 2_000
FEWEST_SUSPECTS = 48


def num_suspects(table: pd.DataFrame, most: int = MAX_SUSPECTS) -> int:
    """How many samples to show: all that are probably wrong, at least 48 of those seen and at most `most`."""
    likely = int(probably_wrong(table).sum())
    return min(int((table["times_seen"] > 0).sum()), most, max(likely, FEWEST_SUSPECTS))


def decode_images(dataset: Dataset, rows: Sequence[int]) -> list[Pillow.Image | str]:
    """RGB images of some rows; instead of one that cannot be read, why."""
    undecoded = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    found = []
    for stored in undecoded[list(map(int, rows))]["image"]:
        try:
            if stored is None:
                raise ValueError("the row has no image")
            source = io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"]
            with Pillow.open(source) as image:
                found.append(to_rgb(image))
        except UNREADABLE as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@torch.no_grad()
def collect_evidence(
    dataset: Dataset,
    suspects: pd.DataFrame,
    *,
    transform: Callable,
    model=None,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    batch_size: int = 64,
) -> list[Evidence]:
    """Pictures of the suspects and, with a model that has class activation maps, where it sees either class.

    Args:
        dataset (`datasets.Dataset`): that was scored, rows in any order.
        suspects (`pd.DataFrame`): rows of [`noise_scores`]' table.
        transform (`Callable`): of evaluation, from an RGB image to a tensor.
        model ([`TimmCAMForImageClassification`], *optional*): without it there are only pictures.
        crop_pct, crop_mode (`float`, `str`): timm's, of the transform: which part of the image it keeps and whether it
            squashes it, so that maps lie on the right spot.

    Returns:
        `list[Evidence]`: in the order of `suspects`. An image that cannot be read is a reason, never an error.
    """
    ids = column(dataset, "index")
    order = np.argsort(ids, kind="stable")
    rows = order[np.searchsorted(ids[order], suspects["index"].to_numpy())]
    evidence = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        images = decode_images(dataset, rows[part])
        readable = [number for number, image in enumerate(images) if not isinstance(image, str)]
        maps = {}
        if model is not None and readable:
            pixels = torch.stack([transform(images[number]) for number in readable]).to(model.device)
            with evaluation_mode(model):
                output = model(pixel_values=pixels)
                for name in ("label", "suggested_label"):
                    classes = torch.as_tensor(suspects[name].to_numpy()[part][readable], device=model.device)
                    cams = model.class_activation_maps(output, model.class_weights[classes])
                    maps[name] = dict(zip(readable, normalize_cams(cams).cpu().numpy(), strict=True))
        for number, image in enumerate(images):
            if isinstance(image, str):
                evidence.append(Evidence(reason=image))
            else:
                both = [maps[name][number] if maps else None for name in ("label", "suggested_label")]
                evidence.append(Evidence(_looked_at(image, crop_pct, crop_mode), *both))
    return evidence


def _looked_at(image: Pillow.Image, share: float, mode: str) -> Pillow.Image:
    """The square that an evaluation transform looks at: the central one, or all of the middle squashed into one."""
    width, height = (share * side for side in (image.size if mode == "squash" else [min(image.size)] * 2))
    left, top = (image.width - width) / 2, (image.height - height) / 2
    part = image.crop((round(left), round(top), round(left + width), round(top + height)))
    part = part.resize([min(part.size)] * 2) if mode == "squash" else part
    part.thumbnail((SIDES[0],) * 2, Pillow.Resampling.LANCZOS)  # 2,000 photographs in full would fill the memory
    return part
