"""The start of training on a pretrained backbone: its features judge the labels, and give the head."""

import math
import os
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list
from datasets import Dataset
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from ..data.collate import collate_images
from ..data.schema import column
from ..modeling.forward import ask, run_over
from .dynamics import score_predictions
from .features import FrozenBackbone, describe_unreadable, extract_features
from .judge import Head, Judgement, check_labels, fit_head, judge_labels


ENOUGH = 20_000  # samples, to find the scale of a head
LEAST_SURE = 1e-4  # the smallest scale: all classes are about as probable


def pooled_features(
    model, dataset: Dataset, *, batch_size: int = 64, num_workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the last linear layer of a frozen model sees of each sample, and the given labels.

    Args:
        model: a [`TimmCAMForImageClassification`]; evaluation mode is put on for the pass.
        dataset (`TransformedDataset`): of n samples, with the evaluation transform.
        batch_size (`int`): images in a forward pass.
        num_workers (`int`): processes that load images.

    Returns:
        `np.ndarray` of shape `(n, d)`, float32: 4 n d bytes, 8 GB for a million images and ResNet-50; and
        `np.ndarray` of shape `(n,)`, int64.
    """
    features, labels = [], []
    backbone, loading = partial(ask, model, of="the backbone"), {"batch_size": batch_size, "num_workers": num_workers}
    for batch, output in run_over(backbone, dataset, collate_images, desc="features", **loading):
        features.append(output.features.float().cpu())
        labels.append(batch["labels"])
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


@torch.no_grad()
def set_head(classifiers: Sequence[torch.nn.Module], head: Head):
    """Put a linear classifier into the last layer of a model.

    Args:
        classifiers (`Sequence[torch.nn.Module]`): `model.classifiers`; all get the same weights (timm averages them).
        head ([`Head`]): of the features that this layer sees.

    Raises:
        ValueError: if a layer has no bias to hold the head's.
    """
    for classifier in classifiers:
        if classifier.bias is None:
            raise ValueError("The last linear layer of this backbone has no bias, which the judge's classifier needs.")
        classifier.weight.copy_(head.weight.view_as(classifier.weight))
        classifier.bias.copy_(head.bias)


def judge_by_model(
    model,
    dataset: Dataset,
    *,
    weights: np.ndarray | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
) -> Judgement:
    """Judge labels by what a model's last layer sees of the images; arguments as of [`start_from_judge`]."""
    features, labels = pooled_features(model, dataset, batch_size=batch_size, num_workers=num_workers)
    return judge_labels(
        features, labels, num_labels=model.config.num_labels, seed=seed, weights=weights, device=model.device
    )


def as_sure_as_labels(head: Head, features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Head:
    """A head with its logits scaled so that the cross-entropy of given labels is least (the temperature scaling of Guo
    et al., ICML 2017, with noisy labels).

    The judge's head is sure of true classes. Where many labels are wrong, its loss on them is ten nats and more, and
    what training does about that spoils the features.

    Args:
        head ([`Head`]): of k classes.
        features (`np.ndarray` of shape `(n, d)`), labels (`np.ndarray` of shape `(n,)`): of the training samples, of
            which at most 20,000 are looked at.
        weights (`np.ndarray` of shape `(n,)`, *optional*): the confidence in each label.

    Returns:
        [`Head`]: the same classes are the most probable; no logit is larger than before.
    """
    rows = np.linspace(0, len(labels), min(len(labels), ENOUGH), endpoint=False).astype(np.int64)
    logits = torch.from_numpy(np.asarray(features[rows])).double() @ head.weight.mT.double() + head.bias.double()
    given = torch.from_numpy(labels[rows])
    confidence = torch.ones(len(rows)) if weights is None else torch.from_numpy(weights[rows])

    def loss(power: float) -> float:
        losses = F.cross_entropy(math.exp(power) * logits, given, reduction="none")
        return float((confidence * losses).sum() / confidence.sum())

    scale = math.exp(minimize_scalar(loss, bounds=(math.log(LEAST_SURE), 0.0), method="bounded").x)
    return Head(scale * head.weight, scale * head.bias)


def start_from_judge(
    model,
    dataset: Dataset,
    backbone: FrozenBackbone,
    *,
    judging: FrozenBackbone | None = None,
    cache_dir: str | os.PathLike,
    given: bool = False,
    weights: np.ndarray | None = None,
    seed: int = 0,
    **options,
) -> Judgement:
    """Judge labels as `hnml audit` does, and give a pretrained model the judge's head, so that fine-tuning does not
    begin by bending good features to a random head (Kumar et al., ICLR 2022).

    The judge may see larger images than the model is trained on: what is found there are better targets. Its head is
    that of the model's features at the model's own size.

    All processes must call it together; each sends its share of the images through the backbone, the first one
    judges, and all get its head and its judgement.

    Args:
        model: a [`TimmCAMForImageClassification`], on its device, with the weights of `backbone`.
        dataset (`datasets.Dataset`): n samples, columns `image` and `label`. Labels that no loss may see must not be
            among them.
        backbone ([`FrozenBackbone`]): of [`load_backbone`], at the model's image size.
        judging ([`FrozenBackbone`], *optional*): that the judge has its features from, at another size; default:
            the same.
        cache_dir (`str` or `Path`): where features are kept, see [`extract_features`].
        given (`bool`): training has the given labels as targets, not the posterior: the head is as sure as those allow
            (see [`as_sure_as_labels`]).
        weights (`np.ndarray` of shape `(n,)`, *optional*): the confidence in each label.
        seed (`int`): of the folds.
        options: of [`extract_features`].

    Raises:
        ValueError: if an image cannot be read, and as [`judge_labels`] and [`set_head`].
    """
    labels = column(dataset, "label").astype(np.int64)
    check_labels(labels)
    options |= {"cache_dir": cache_dir, "device": model.device}
    seen = at_its_size = extract_features(dataset, backbone, **options)
    if judging is not None:
        seen = extract_features(dataset, judging, **options)
    if said := describe_unreadable(dataset, seen):
        raise ValueError(f"{said} `hnml check` lists them, and `--exclude` leaves them out.")
    found = None
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        how = {"num_labels": model.config.num_labels, "weights": weights, "device": model.device}
        judgement = judge_labels(seen.values, labels, groups=seen.groups, seed=seed, **how)
        values = at_its_size.values[:, : model.class_weights.shape[1]]
        head = fit_head(values, judgement, **how)
        found = judgement, as_sure_as_labels(head, values, labels, weights) if given else head
    ((judgement, head),) = broadcast_object_list([found])
    set_head(model.classifiers, head)
    for classifier in model.classifiers:
        for parameter in classifier.parameters():
            parameter.data.copy_(broadcast(parameter.data))
    return judgement


def judge_records(index: np.ndarray, labels: np.ndarray, judgement: Judgement) -> np.ndarray:
    """What the judge says of each sample without its label, as the records of a training run hold it.

    P(c | h) is proportional to P(c | h, y) / T[c, y].

    Args:
        index, labels (`np.ndarray` of shape `(n,)`): sample ids and given labels.
        judgement ([`Judgement`]): of them.

    Returns:
        structured `np.ndarray` of shape `(n,)`, ordered by `index`.
    """
    num_labels = len(judgement.transition_matrix)
    transition_matrix = judgement.transition_matrix[judgement.top_labels, labels[:, None]]
    without_label = judgement.posterior / np.maximum(transition_matrix, 1e-12)
    probabilities = np.zeros((len(labels), num_labels))
    np.put_along_axis(probabilities, judgement.top_labels, without_label, 1)
    probabilities /= probabilities.sum(1, keepdims=True)
    return score_predictions(index, labels, probabilities, seen=judgement.judged, held_out=True)
