"""One batch as a training step sees it: passes with the model's own weights or with others, and what they share.

`model` is a [`TimmCAMForImageClassification`], an output its [`TimmCAMOutput`].
"""

from collections.abc import Iterable
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F


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

    Passes with other weights leave batch-norm statistics untouched. Where they move only a last part of the network,
    the trunk before it is not run again: its activations of the first pass are used, so its backward runs once.
    """

    def __init__(self, model: nn.Module, pixel_values: torch.Tensor):
        self.model, self.pixel_values = model, pixel_values
        self._trunk: TrunkReplay | None = None

    def __call__(self, weights: dict[str, torch.Tensor] | None = None, **requests):
        """Forward the batch; `requests` are `cam_classes` and `region_masks`. Without `weights`: the model's own."""
        plain = PlainPass(self.model)
        if weights is None:
            with self._trunk.recording() if self._trunk else nullcontext():
                return plain(self.pixel_values, **requests)
        moved = {f"model.{name}": weight for name, weight in weights.items()}
        buffers = {name: buffer.clone() for name, buffer in plain.named_buffers()}
        with self._trunk.replaying() if self._trunk else nullcontext():
            return torch.func.functional_call(
                plain, {**moved, **buffers}, (self.pixel_values,), requests, strict=False
            )

    def parameters(self, scope: str) -> dict[str, nn.Parameter]:
        """Parameters of a scope. Call it before the first pass: it decides what part of that pass is kept."""
        parameters = self.model.scope_parameters(scope)
        if scope != "full":
            self._trunk = TrunkReplay(self.model.timm_model, parameters.values())
        return parameters

    def masked(self, region: torch.Tensor):
        """Forward the batch with all but a region, `(b, h, w)` in [0, 1], set to the mean colour.

        Batch-norm statistics stay those of whole images.
        """
        region = F.interpolate(region[:, None], self.pixel_values.shape[-2:], mode="bilinear", align_corners=False)
        return BatchView(self.model, self.pixel_values * region)({})

    def look(self, output, **requests):
        """Add `cam_classes` and `region_masks` to the output of a pass that is over."""
        return self.model.look(output, **requests)

    def class_activation_maps(self, output, class_weights: torch.Tensor) -> torch.Tensor:
        return self.model.class_activation_maps(output, class_weights)

    @property
    def class_weights(self) -> torch.Tensor:
        return self.model.class_weights


class TrunkReplay:
    """Keeps the outputs of all modules that run before the first one with a moved parameter, and hands them out again.

    Works on any module tree: the largest modules without a moved parameter are recorded in the order in which they are
    called, until a module with a moved parameter of its own runs. On replay they return what they returned, graph
    included; everything after runs anew.
    """

    def __init__(self, root: nn.Module, moved: Iterable[nn.Parameter]):
        self.moved = {id(parameter) for parameter in moved}
        self.trunk: list[nn.Module] = []
        self.tail: list[nn.Module] = []
        self._split(root)
        self.outputs: dict[nn.Module, list] = {}
        self.tail_reached = False

    def _split(self, module: nn.Module):
        moved = [id(parameter) in self.moved for parameter in module.parameters()]
        if not any(moved):  # also without parameters: an in-place activation run twice would spoil what was kept
            self.trunk.append(module)
        elif all(moved):
            self.tail.append(module)
        else:
            for child in module.children():
                self._split(child)

    @contextmanager
    def recording(self):
        self.outputs, self.tail_reached = {module: [] for module in self.trunk}, False

        def keep(module, args, output):
            if not self.tail_reached:
                self.outputs[module].append(output)

        def stop(module, args):
            self.tail_reached = True

        handles = [module.register_forward_hook(keep) for module in self.trunk]
        handles += [module.register_forward_pre_hook(stop) for module in self.tail]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaying(self):
        pending = {module: iter(outputs) for module, outputs in self.outputs.items() if outputs}

        def replay(module, original):
            def forward(*args, **kwargs):
                kept = next(pending[module], None)
                return original(*args, **kwargs) if kept is None else kept

            return forward

        shadowed = {module: module.__dict__.get("forward") for module in pending}
        for module in pending:
            module.forward = replay(module, module.forward)
        try:
            yield
        finally:
            for module, forward in shadowed.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward
