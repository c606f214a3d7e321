"""Loaders whose batches a resumed run repeats, and whose workers outlive the signals that end it."""

import os
from collections.abc import Callable
from functools import partial

import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from torch.utils.data import SequentialSampler


def guarded_workers(loader, seed: int):
    """The loader, whose workers do not hear the signals of its process group, and which has a generator of its own.

    An iterator draws the seed of its workers when it is made, and a resumed run makes more of them: out of the global
    generator, every draw after it (dropout, drop path) would be another one.
    """
    inner = loader.base_dataloader  # accelerate's wrapper reads its attributes there, but does not set them there
    if getattr(inner.worker_init_fn, "func", None) is not leave_process_group:
        inner.worker_init_fn = partial(leave_process_group, inner.worker_init_fn)
        inner.generator = torch.Generator().manual_seed(seed)
    return loader


def leave_process_group(initialize: Callable | None, worker: int):
    """Start of a loader worker, before its own one.

    A signal to the process group, as a terminal and some launchers send it, must not take the data away from the step
    that is to be finished. PyTorch ends a worker by SIGTERM, and it notices by itself that its parent is gone.
    """
    if os.name == "posix":
        os.setpgrp()
    if initialize is not None:
        initialize(worker)


def set_sampler_epoch(dataloader, epoch: int):
    """Tell the sampler which epoch's order to draw.

    accelerate tells it the epoch, or the dataset, but not always both: over several processes the dataset is left out,
    and after a resume inside an epoch the one or the other, so that augmentation or order are those of another epoch.

    Raises:
        ValueError: if the order does not follow from seed and epoch, so that no resume could repeat it.
    """
    batches = dataloader.batch_sampler
    while isinstance(batches, (BatchSamplerShard, SkipBatchSampler)):
        batches = batches.batch_sampler
    if isinstance(batches.sampler, SeedableRandomSampler):
        batches.sampler.set_epoch(epoch)
    elif not isinstance(batches.sampler, SequentialSampler):
        raise ValueError(
            f"The order of samples comes from a `{type(batches.sampler).__name__}`, which no resume can repeat. Leave "
            "`accelerator_config` at its defaults, and `train_sampling_strategy` at `random` or `sequential`."
        )
