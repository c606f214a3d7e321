"""What training costs: FLOPs in units of a cross-entropy step, and peak memory. Knows tensors and modules, no method.

A cross-entropy step is one forward and one backward of the batch, the least that an update of all weights costs.
"""

import math
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


MIB = 2**20


def convolution_backward_flops(
    grad_output, images, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted, **kwargs
) -> int:
    """The gradients by input and by weight each take as many multiplications as the convolution itself.

    torch's own formula leaves the groups out of the second, and counts a depthwise layer of c channels c times over.
    Arguments are those of `aten::convolution_backward`, shapes in place of tensors.
    """
    positions = (images if transposed else grad_output)[2:]
    forward = 2 * images[0] * math.prod(positions) * math.prod(weight)
    return forward * (wanted[0] + wanted[1])


@contextmanager
def counting_flops():
    """Count the FLOPs of what runs inside, backward passes included; yields a function that gives the number so far.

    Compiled modules run uncompiled inside, because the counter sees operators, not what they were compiled to.
    """
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", message=".*when there are global hooks")  # the counter's
        mended = {torch.ops.aten.convolution_backward: convolution_backward_flops}
        with FlopCounterMode(display=False, custom_mapping=mended) as counter:
            yield counter.get_total_flops


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs of one call: matrix products, convolutions and attention, two per multiply-add (`FlopCounterMode`)."""
    with counting_flops() as flops:
        function()
        return flops()


def cross_entropy_flops(model: nn.Module, pixel_values: torch.Tensor) -> int:
    """FLOPs of one cross-entropy step on a batch, from shapes alone: nothing is computed and nothing changes.

    Args:
        model (`nn.Module`): gives an output with `logits` of shape `(b, k)`.
        pixel_values (`torch.Tensor` of shape `(b, channels, height, width)`): only its shape and type matter.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # tensors with a shape and a device, but no data
        state = {name: fake.from_tensor(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        images = fake.from_tensor(pixel_values)

        def step():
            logits = torch.func.functional_call(model, state, (images,)).logits
            F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device)).backward()

        return count_flops(step)


class CostMeter:
    """Mean cost of the steps of a run, in cross-entropy steps: FLOPs over those of cross-entropy on the same batch.

    Steps of one kind cost the same, so that the first one of each kind is counted and the others are added up. What
    is done between steps is added by [`~CostMeter.forward_passes`].
    """

    def __init__(self):
        self.between = 0.0  # steps, in units of one of cross-entropy
        self.ratios: dict[Hashable, float] = {}
        self.steps: Counter = Counter()
        self._references: dict[torch.Size, int] = {}  # FLOPs of a cross-entropy step on batches of this shape

    @contextmanager
    def step(self, kind: Hashable, model: nn.Module, pixel_values: torch.Tensor):
        """Run one training step, forward and backward, inside."""
        if kind in self.ratios:
            yield
        else:
            with counting_flops() as flops:
                yield
            if pixel_values.shape not in self._references:
                self._references[pixel_values.shape] = cross_entropy_flops(model, pixel_values)
            self.ratios[kind] = flops() / self._references[pixel_values.shape]
        self.steps[kind] += 1

    def forward_passes(self, batches: float):
        """Count so many batches that went forward alone, between steps: each a third of a step."""
        self.between += batches / 3

    @property
    def cost(self) -> float:
        """Mean over all steps so far; nan before the first."""
        total = sum(self.steps.values())
        spent = self.between + sum(self.ratios[kind] * count for kind, count in self.steps.items())
        return spent / total if total else float("nan")


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: on CUDA what PyTorch's allocator held, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def peak_tensor_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call adds at its peak to what tensors held before it.

    Unlike the resident set this is the same in every run and counts no imported library: allocations and releases are
    read from PyTorch's own allocator, on the CPU through the profiler.

    Args:
        function (`Callable`): without arguments; it is called once.
        device (`torch.device`): where it computes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of some tensors; one that occurs twice counts once.

    Args:
        tensors (`Iterable[torch.Tensor]`): of any shapes.
    """
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
