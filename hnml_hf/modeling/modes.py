"""A model that is only asked: evaluation mode, and a forward pass without gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
