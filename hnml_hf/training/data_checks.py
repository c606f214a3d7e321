"""What is wrong with a trainer or its data is said before training starts."""

from collections.abc import Collection

import numpy as np
from transformers.utils import logging

from ..common.words import counted


logger = logging.get_logger(__name__)


def check_arguments(args, *, model_init=None, **others):
    """Raise `ValueError` if a trainer is given `model_init`, and take one device where several are visible.

    Args:
        args ([`HNMLTrainingArguments`]): told that there is one device.
        model_init, others: as of transformers' Trainer.
    """
    if model_init is not None:
        raise ValueError(
            "`model_init` would put another model instead of the one that the teacher is a copy of. Give the "
            "model itself, and build a new trainer for each run."
        )
    if args.n_gpu > 1:
        logger.warning(
            f"{counted(args.n_gpu, 'GPU', 'are')} visible and this is one process: it uses the first. For all of "
            f"them: `accelerate launch --multi_gpu --num_processes {args.n_gpu} scripts/train.py ...`."
        )
        args._n_gpu = 1  # else transformers would cut the batch up and leave its labels whole (DataParallel)


def check_whole_weights(trainer):
    """Raise `ValueError` if a process of a trainer holds a part of the weights only."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "FSDP and DeepSpeed hold a part of the weights on each process, but the teacher and the virtual step "
            "need all of them. Start with `accelerate launch --multi_gpu` instead."
        )


def check_data(args, dataset, num_labels: int, *, mixes: bool, provided: Collection[str]):
    """Raise `ValueError` if a run with these options cannot train on a dataset, or None; arguments as below."""
    if dataset is not None:
        check_training_data(dataset, num_labels)
        check_sample_weights(dataset, mixes=mixes, objective=args.objective, provided=provided)
    check_symmetric_correction(args, dataset, mixes=mixes, provided=provided)


def check_training_data(dataset, num_labels: int):
    """Raise `ValueError` unless a dataset can train a model of `num_labels` classes.

    Args:
        dataset ([`TransformedDataset`]): with `labels` and `index` as arrays of shape `(n,)`.
        num_labels (`int`): k; labels must lie in 0 to k - 1, and not all be the same.
    """
    if not all(hasattr(dataset, name) for name in ("labels", "clean_labels", "index")):
        raise ValueError("`train_dataset` must be a `TransformedDataset`: `TransformedDataset(dataset, transform)`.")
    if len(dataset) == 0:
        raise ValueError("The training set is empty.")
    labels = dataset.labels
    if labels.min() < 0 or labels.max() >= num_labels:
        first = int(((labels < 0) | (labels >= num_labels)).argmax())
        raise ValueError(
            f"Training sample {dataset.index[first]} has label {labels[first]}, but the model has {num_labels} "
            f"classes (0 to {num_labels - 1})."
        )
    if dataset.targets is not None and not ((dataset.targets[0] >= 0) & (dataset.targets[0] < num_labels)).all():
        raise ValueError(f"The soft targets name classes that the model does not have: it has {num_labels}.")
    if (labels == labels[0]).all():
        raise ValueError(
            f"All {counted(len(dataset), 'training sample', 'have')} the one label {labels[0]}; there is nothing to "
            "learn. Check `--label_column`."
        )


def check_sample_weights(dataset, *, mixes: bool, objective: str, provided: Collection[str]):
    """Raise `ValueError` unless the weights of a dataset, if it has any, lie in [0, 1] and are not all 0.

    Args:
        dataset ([`TransformedDataset`]): with `weights` of shape `(n,)`, or None.
        mixes (`bool`): whether images are mixed.
        objective (`str`), provided (`Collection[str]`): its name, and what a step gives it.
    """
    if dataset.weights is None:
        return
    if "sample_weights" not in provided:
        raise ValueError(f"Objective `{objective}` takes no weights of samples; leave them out.")
    if mixes:
        raise ValueError("A mixed image has two labels and no weight: leave out Mixup, or the weights of samples.")
    with np.errstate(invalid="ignore"):  # nan is none of them
        bad = np.flatnonzero(~((dataset.weights >= 0) & (dataset.weights <= 1)))
    if len(bad):
        raise ValueError(
            f"Training sample {dataset.index[bad[0]]} has the weight {dataset.weights[bad[0]]}; weights are the "
            "confidence in a label, from 0 to 1."
        )
    if not dataset.weights.any():
        raise ValueError(
            f"All {counted(len(dataset), 'training sample', 'have')} weight 0; there is nothing to learn."
        )


def check_symmetric_correction(args, dataset, *, mixes: bool, provided: Collection[str]):
    """Raise `ValueError` if `symmetric_correction` is asked for where it is not available; arguments as above."""
    if not args.symmetric_correction:
        return
    reason = None
    if "noise_rate" not in provided:
        reason = f"objective `{args.objective}` has no cross-entropy that it could correct"
    elif mixes:
        reason = "of mixed images no record is kept, from which the noise rate is estimated"
    elif getattr(dataset, "weights", None) is not None:
        reason = "the weights of the samples already are the confidence in each label"
    if reason is not None:
        raise ValueError(f"`symmetric_correction` is not available here: {reason}. Set it to false.")


def chosen_targets(args, *, there: bool, weighted: bool, mixes: bool, can_judge: bool) -> str:
    """`given`, `posterior` or `refreshed`: as the options say, or by what the dataset and the objective have.

    Args:
        args ([`HNMLTrainingArguments`]): of the run.
        there (`bool`): whether the dataset has soft targets, or will have them.
        weighted (`bool`): whether its samples have weights.
        mixes (`bool`): whether images are mixed.
        can_judge (`bool`): whether there is somebody to judge the labels again.

    Raises:
        ValueError: if the options ask for targets that this run cannot have.
    """
    chosen, reason = args.targets, None
    if not there:
        reason = "the training set has no soft targets; start from the judge's head, or `add_targets`"
    elif mixes:
        reason = "images are mixed"
    elif not args.takes_soft_targets():
        reason = f"objective `{args.objective}` takes labels alone, as it is set"
    elif args.symmetric_correction:
        reason = "`symmetric_correction` corrects the loss on given labels"
    if chosen == "refreshed" and reason is None and not can_judge:
        reason = "nobody judges again; start from the judge's head, or give the trainer `judge_again`"
    if chosen == "refreshed" and reason is None and args.max_steps <= 0 and args.num_train_epochs <= 1:
        reason = f"`num_train_epochs={args.num_train_epochs:g}`, and after the last epoch nothing is judged again"
    if chosen in ("posterior", "refreshed") and reason is not None:
        raise ValueError(f"`targets={chosen}` is not available here: {reason}. Leave it out, or give `given`.")
    if chosen is None and there and reason is None and weighted:
        reason = "the weights of the samples are the confidence in each given label"
    if chosen is None and there:
        chosen = "posterior" if reason is None else "given"
        logger.info(f"Targets: {chosen}" + ("." if reason is None else f", since {reason}."))
    return chosen or "given"
