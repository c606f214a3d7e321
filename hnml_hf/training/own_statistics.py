"""Batch-norm statistics of the weights that are measured and saved.

Where steps look at extrapolated weights, batch norm takes its running statistics there, not at the weights themselves;
and the average of the running statistics is not what averaged weights have (Izmailov et al., UAI 2018).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, Subset

from ..data.transforms import preserved_generators


IMAGES = 1024  # on each process; what more change: docs/ablations.md, What batch norm sees


def needs_own_statistics(args, model: torch.nn.Module) -> bool:
    """Whether running statistics are not those of the weights that are measured.

    Args:
        args ([`HNMLTrainingArguments`]): of the run.
        model ([`TimmCAMForImageClassification`]): that is trained.
    """
    return bool(args.extrapolation or args.eval_teacher) and not model.batch_norm_frozen


def some_samples(dataset: Dataset, *, batch_size: int, processes: int, seed: int) -> Subset:
    """Samples drawn for the statistics, the same ones with the same augmentation each time: whole batches, since the
    statistics of one image may be none.

    Args:
        dataset (`Dataset`): of training, as a [`TransformedDataset`].
        batch_size (`int`): images in a batch.
        processes (`int`): that share the samples.
        seed (`int`): of the draw.
    """
    batches = max(1, min(IMAGES, len(dataset) // processes) // batch_size)
    drawn = np.random.default_rng(seed).permutation(len(dataset))
    same = dataset.at_epoch(0) if hasattr(dataset, "at_epoch") else dataset  # without augmentation there is no need
    return Subset(same, drawn[: batches * batch_size * processes].tolist())


def take_statistics(network: torch.nn.Module, batches: Iterable[torch.Tensor]):
    """Replace running statistics by the mean of the batches' statistics: `torch.optim.swa_utils.update_bn`,
    without dropout, and without what that does to layers that are frozen or not reached, which lose their statistics.

    Networks without batch norm stay as they are, and read no batch. After an error all is as it was.

    Args:
        network (`nn.Module`): layers that its `train()` leaves in evaluation mode or that have no momentum are frozen.
        batches (`Iterable[torch.Tensor]`): images of shape `(b, channels, height, width)`, on its device.
    """
    modes = {module: module.training for module in network.modules()}
    network.train()
    layers = {
        module: (module.momentum, [buffer.clone() for buffer in module.buffers(recurse=False)])
        for module in modes
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats and module.momentum != 0
    }
    complete = False
    try:
        for module in modes:
            module.training = module in layers
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean
        if layers:
            with preserved_generators(), torch.no_grad():
                for images in batches:
                    network(images)
        complete = True
    finally:
        for layer, (momentum, before) in layers.items():
            layer.momentum = momentum
            if not (complete and layer.num_batches_tracked):
                put_back(layer.buffers(recurse=False), before)
        for module, training in modes.items():
            module.training = training


def put_back(buffers: Iterable[torch.Tensor], values: Iterable[torch.Tensor]):
    """Give tensors other values in place."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


@contextmanager
def buffers_put_back(network: torch.nn.Module) -> Iterator[None]:
    """After the block a network's buffers, as batch-norm statistics, are what they were before it."""
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        yield
    finally:
        put_back(network.buffers(), before)
