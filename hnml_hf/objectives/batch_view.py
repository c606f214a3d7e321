"""One batch as a training step sees it: passes with the model's own weights or with others, and what they share.

`model` is a [`TimmCAMForImageClassification`], an output its [`TimmCAMOutput`].
"""

import torch
from torch import nn


class PlainPass(nn.Module):
    """A pass through the model without what a trainer wrapped around its `forward`.

    Steps run inside the wrapped `forward` already. Accelerate's wrapper holds one autocast context; entering it a
    second time inside itself would leave autocast on for good.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return type(self.model).forward(self.model, *args, **kwargs)


class BatchView:
    """One batch as a training step sees it: the model's output with its own weights or with others.

    Passes with other weights leave batch-norm statistics untouched.
    """

    def __init__(self, model: nn.Module, pixel_values: torch.Tensor):
        self.model, self.pixel_values = model, pixel_values

    def __call__(self, weights: dict[str, torch.Tensor] | None = None, **requests):
        """Forward the batch; `requests` are `cam_classes` and `region_masks`. Without `weights`: the model's own."""
        plain = PlainPass(self.model)
        if weights is None:
            return plain(self.pixel_values, **requests)
        moved = {f"model.{name}": weight for name, weight in weights.items()}
        buffers = {name: buffer.clone() for name, buffer in plain.named_buffers()}
        return torch.func.functional_call(plain, {**moved, **buffers}, (self.pixel_values,), requests, strict=False)

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name."""
        return dict(self.model.named_parameters())

    def add_cams(self, output, **requests):
        """Add `cam_classes` and `region_masks` to the output of a pass that is over."""
        return self.model.add_cams(output, **requests)

    def class_activation_maps(self, output, class_weights: torch.Tensor) -> torch.Tensor:
        return self.model.class_activation_maps(output, class_weights)

    def normalize_cams(self, cams: torch.Tensor) -> torch.Tensor:
        return self.model.normalize_cams(cams)

    @property
    def class_weights(self) -> torch.Tensor:
        return self.model.class_weights
