"""Batch-norm statistics of the weights that are measured and saved.

Where steps look at extrapolated weights, batch norm takes its running statistics there, not at the weights themselves.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset, Subset

from ..data.transforms import preserved_generators


IMAGES = 1024  # on each process: four times as many change the accuracy by 0.3 points at most, see docs/ablations.md


def looks_elsewhere(args, model: torch.nn.Module) -> bool:
    """Whether running statistics are not those of the weights themselves.

    Args:
        args ([`HNMLTrainingArguments`]): of the run.
        model ([`TimmCAMForImageClassification`]): that is trained.
    """
    return bool(args.extrapolation) and not model.batch_norm_frozen


def some_samples(dataset: Dataset, *, batch_size: int, processes: int, seed: int) -> Subset:
    """Samples drawn for the statistics, the same ones each time: whole batches, since the statistics of one image may
    be none.

    Args:
        dataset (`Dataset`): of training.
        batch_size (`int`): images in a batch.
        processes (`int`): that share the samples.
        seed (`int`): of the draw.
    """
    batches = max(1, min(IMAGES, len(dataset) // processes) // batch_size)
    drawn = np.random.default_rng(seed).permutation(len(dataset))
    return Subset(dataset, drawn[: batches * batch_size * processes].tolist())


def take_statistics(network: torch.nn.Module, batches: Iterable[torch.Tensor]):
    """Put the mean of the batches' statistics in the place of the running ones. Networks without batch norm stay as
    they are, and read no batch.

    Args:
        network (`nn.Module`): whose mode stays what it is.
        batches (`Iterable[torch.Tensor]`): images of shape `(b, channels, height, width)`, on its device.
    """

    def without_dropout():  # `update_bn` puts training mode on, also where it would drop at random
        for module in network.modules():
            module.training &= isinstance(module, _BatchNorm)
        yield from batches

    with preserved_generators():
        update_bn(without_dropout(), network)


@contextmanager
def buffers_put_back(network: torch.nn.Module) -> Iterator[None]:
    """After the block a network's buffers, as batch-norm statistics, are what they were before it."""
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(network.buffers(), before, strict=True):
            buffer.copy_(value)
