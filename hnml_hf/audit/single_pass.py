"""Records for the noise scores from one forward pass of any classifier, for what has no training run."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..common.finite import WHERE_TO_LOOK, require_finite_outputs
from ..data.classes import align_classes
from ..data.collate import collate_readable
from ..data.decoding import MAX_PIXELS
from ..data.schema import column
from ..modeling.forward import run_over
from .dynamics import score_predictions
from .gallery import decode_images


logger = logging.getLogger(__name__)


def score_model(
    dataset: Dataset,
    model: Callable,
    transform: Callable,
    model_names: Sequence[str],
    *,
    batch_size: int = 64,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Records for [`noise_scores`] by one forward pass of any classifier over any dataset.

    Args:
        dataset (`datasets.Dataset`): columns `image`, `label`, `index`.
        model (`Callable`): from a batch of `transform`ed images, stacked, to logits of shape `(b, len(model_names))`.
        transform (`Callable`): from an RGB image to a tensor.
        model_names (`Sequence[str]`): the model's classes, in the order of its outputs; it may have more.
        batch_size (`int`): images in a forward pass, b at most.
        max_pixels (`int`): a larger image counts as unreadable.

    Returns:
        structured `np.ndarray` of shape `(n,)`, in the order of `index`.

    Raises:
        NonFiniteError: if what the model says is not finite.
        ValueError: if the model does not know a class of the dataset, or ids are not unique.

    Example:

        _, evaluation = create_transforms(model.config.pretrained_cfg)
        names = dataset.features["label"].names
        records = score_model(dataset, lambda pixels: model(pixels).logits, evaluation, names)
    """
    columns = align_classes(model_names, dataset.features["label"].names)
    probabilities = np.full((len(dataset), len(model_names)), 1 / len(model_names), dtype=np.float32)
    seen = np.zeros(len(dataset), dtype=bool)
    images = _Images(dataset, transform, max_pixels)
    for batch, logits in run_over(model, images, collate_readable, batch_size=batch_size, desc="scores"):
        if logits is not None:
            require_finite_outputs(logits, of="the model", advice=WHERE_TO_LOOK)
            readable = batch["row"][batch["readable"]]
            probabilities[readable], seen[readable] = logits.float().softmax(-1).cpu().numpy(), True
    if not seen.all():
        logger.warning("%d of %d images could not be read; they have no score of their own.", (~seen).sum(), len(seen))
    probabilities = probabilities[:, columns]
    probabilities = probabilities / probabilities.sum(-1, keepdims=True).clip(1e-12)
    return score_predictions(column(dataset, "index"), column(dataset, "label"), probabilities, seen=seen)


class _Images(torch.utils.data.Dataset):
    """All images of a dataset, prepared; None in place of one that cannot be read."""

    def __init__(self, dataset: Dataset, transform: Callable, max_pixels: int):
        self.dataset, self.transform, self.max_pixels = dataset, transform, max_pixels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        samples = []
        for row, image in zip(rows, decode_images(self.dataset, rows, max_pixels=self.max_pixels), strict=True):
            readable = not isinstance(image, str)
            samples.append(
                {"row": row, "readable": readable, "pixel_values": self.transform(image) if readable else None}
            )
        return samples
