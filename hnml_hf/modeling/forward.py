"""A model that is only asked: evaluation mode, one forward pass without gradients, and one loop over a dataset."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..common.finite import WHERE_TO_LOOK, require_finite_outputs


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in its own mode again: some may be frozen in evaluation."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def ask(model, pixel_values: torch.Tensor, *, of: str = "the model", **requests):
    """The output for one batch: on the model's device, in evaluation mode, without gradients, and finite.

    Args:
        model ([`TimmCAMForImageClassification`]): on its device.
        pixel_values (`torch.Tensor` of shape `(b, channels, height, width)`): on any device.
        of (`str`): what an error calls the model.
        requests: further arguments of the model's `forward`, as `cam_classes`.

    Raises:
        NonFiniteError: if logits or features are not finite.
    """
    with evaluation_mode(model):
        output = model(pixel_values=pixel_values.to(model.device), **requests)
    for found in (output.features, output.logits):
        require_finite_outputs(found, of=of, advice=WHERE_TO_LOOK)
    return output


def run_over(
    model: Callable[[torch.Tensor], Any],
    dataset: Dataset,
    collate: Callable[[Any], Mapping],
    *,
    batch_size: int,
    num_workers: int = 0,
    desc: str | None = None,
) -> Iterator[tuple[Mapping, Any]]:
    """Run a model over a dataset, batch by batch and in its order: whatever reads all images outside training.

    Args:
        model (`Callable`): from images `(b, channels, height, width)`, on the CPU, to anything; called without
            gradients.
        dataset (`torch.utils.data.Dataset`): samples for `collate`.
        collate (`Callable`): from a list of samples to a batch; its `pixel_values` may be None, where no image of
            them is to be seen.
        batch_size (`int`): samples in a batch.
        num_workers (`int`): processes that load samples.
        desc (`str`, *optional*): of the progress bar.

    Yields:
        Each batch, and what the model says of it, or None without images.
    """
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate)
    for batch in tqdm(loader, desc=desc, unit="batch", disable=None):
        with torch.no_grad():
            output = None if batch["pixel_values"] is None else model(batch["pixel_values"])
        yield batch, output
