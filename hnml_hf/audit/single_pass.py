"""Records for the noise scores from one forward pass of any classifier, for what has no training run."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import Dataset

from ..common.finite import WHERE_TO_LOOK, require_finite_outputs
from ..data.classes import align_classes
from ..data.decoding import MAX_PIXELS
from ..data.schema import column
from ..training.dynamics import score_predictions
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
    probabilities, seen = predict_probabilities(
        dataset, model, transform, len(model_names), batch_size=batch_size, max_pixels=max_pixels
    )
    probabilities = probabilities[:, columns]
    probabilities = probabilities / probabilities.sum(-1, keepdims=True).clip(1e-12)
    return score_predictions(column(dataset, "index"), column(dataset, "label"), probabilities, seen=seen)


@torch.no_grad()
def predict_probabilities(
    dataset: Dataset,
    model: Callable,
    transform: Callable,
    num_labels: int,
    *,
    batch_size: int = 64,
    max_pixels: int = MAX_PIXELS,
) -> tuple[np.ndarray, np.ndarray]:
    """One pass over a dataset; arguments as in [`score_model`], for a model of `num_labels` classes.

    Returns:
        Probabilities of shape `(n, num_labels)`, and which images could be read, of shape `(n,)`.
    """
    probabilities = np.full((len(dataset), num_labels), 1 / num_labels, dtype=np.float32)
    seen = np.zeros(len(dataset), dtype=bool)
    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, min(start + batch_size, len(dataset)))
        images = decode_images(dataset, rows, max_pixels=max_pixels)
        readable = [number for number, image in enumerate(images) if not isinstance(image, str)]
        if readable:
            logits = model(torch.stack([transform(images[number]) for number in readable]))
            require_finite_outputs(logits, of="the model", advice=WHERE_TO_LOOK)
            probabilities[rows[readable]] = logits.float().softmax(-1).cpu().numpy()
            seen[rows[readable]] = True
    if not seen.all():
        logger.warning("%d of %d images could not be read; they have no score of their own.", (~seen).sum(), len(seen))
    return probabilities, seen
