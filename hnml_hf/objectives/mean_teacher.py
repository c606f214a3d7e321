"""Consistency with a mean teacher: the outer loss of MLNT and HNML, and a baseline by itself."""

import math
from typing import NamedTuple

import torch

from .cross_entropy import cross_entropy


class Evidence(NamedTuple):
    """What a batch is taught with (b images, k classes, d features, h x w cells); nothing here is differentiated."""

    probabilities: torch.Tensor  # (b, k), q
    features: torch.Tensor  # (b, d), in which neighbours are looked for
    cams: torch.Tensor | None  # (b, h, w), raw maps of the classes argmax q


def teacher_evidence(teacher) -> Evidence:
    """From a teacher's own pass over the batch."""
    output = teacher()
    return Evidence(output.logits.float().softmax(-1), output.features, output.cams)


@torch.no_grad()
def own_evidence(student, output, remember, *, with_cams: bool = False) -> Evidence:
    """Without a teacher's pass: q is each sample's running average of the student's predictions, this one included.

    Features and maps are the student's own. Temporal ensembling (Laine & Aila, ICLR 2017) with the moment's maps.

    Args:
        student (`BatchView`), output (`TimmCAMOutput`): the batch and the student's output for it.
        remember (`Callable`): folds probabilities `(b, k)` into the running averages and returns those.
        with_cams (`bool`): whether maps are wanted.
    """
    average = remember(output.logits.float().softmax(-1))
    probabilities = average / average.sum(-1, keepdim=True)
    cams = None
    if with_cams:
        cams = student.class_activation_maps(output, student.class_weights[probabilities.argmax(-1)])
    return Evidence(probabilities, output.features.detach(), cams)


def consistency_loss(logits: torch.Tensor, teacher_probabilities: torch.Tensor) -> torch.Tensor:
    """KL(q || p) per example, p = softmax(logits) (MLNT, Li et al., CVPR 2019, Eq. 3).

    Args:
        logits (`torch.Tensor` of shape `(..., b, k)`): the student's, or those of virtual students.
        teacher_probabilities (`torch.Tensor` of shape `(b, k)`): q, detached.

    Returns:
        `torch.Tensor` of shape `(..., b)`, at least 0.
    """
    cross = -(teacher_probabilities * logits.float().log_softmax(-1)).sum(-1)
    return cross - torch.special.entr(teacher_probabilities).sum(-1)


def label_trust(teacher_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Estimated probability that the given label is right, against the likeliest other class. The form is ours.

    w = q_y / (q_y + max_{c != y} q_c); no noise rate is asked for.

    Args:
        teacher_probabilities (`torch.Tensor` of shape `(b, k)`): q.
        labels (`torch.LongTensor` of shape `(b,)`): given labels y.

    Returns:
        `torch.Tensor` of shape `(b,)`, in [0, 1].
    """
    given = teacher_probabilities.gather(-1, labels[:, None])[:, 0]
    others = teacher_probabilities.scatter(-1, labels[:, None], 0.0)
    return given / (given + others.amax(-1)).clamp_min(1e-12)


def refurbishment(cross_entropies: torch.Tensor, consistencies: torch.Tensor, trust: torch.Tensor) -> torch.Tensor:
    """What turns the loss on given labels into that on refurbished ones, w y + (1 - w) q (SELFIE, Song et al., ICML
    2019, with a soft weight; the weight is ours): (1 - w) (KL(q || p) - CE(y, p)) per example.

    Added with a weight from 0 to 1 it leads from given to refurbished labels.

    Args:
        cross_entropies (`torch.Tensor` of shape `(b,)`): CE(y, p).
        consistencies (`torch.Tensor` of shape `(b,)`): KL(q || p).
        trust (`torch.Tensor` of shape `(b,)`): w of [`label_trust`].
    """
    return (1 - trust) * (consistencies - cross_entropies)


def balance_loss(logits: torch.Tensor, class_prior: torch.Tensor) -> torch.Tensor:
    """KL(pi || mean of p over the batch): predictions as a whole must not leave a class out (Tanaka et al., CVPR 2018,
    Eq. 7, with the classes' shares among the given labels for pi).

    It is one number of a whole batch, so that accumulated small batches are not one large one.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): the student's.
        class_prior (`torch.Tensor` of shape `(k,)`): pi, sums to 1.

    Returns:
        `torch.Tensor` of shape `(b,)`, the same number for each example, at least 0.
    """
    mean = logits.float().softmax(-1).mean(0).clamp_min(1e-6)
    divergence = -(class_prior * mean.log()).sum() - torch.special.entr(class_prior).sum()
    return divergence.expand(len(logits))


def sigmoid_rampup(progress: float) -> float:
    """exp(-5 (1 - u)^2) for progress u, clipped to [0, 1] (Laine & Aila, ICLR 2017; used by MLNT)."""
    return math.exp(-5 * (1 - min(max(progress, 0.0), 1.0)) ** 2)


def mean_teacher(student, labels, *, wanted, teacher, remember=None, sample_weights=None, noise_rate=None):
    """Objective `mean_teacher` (Tarvainen & Valpola, NeurIPS 2017) = HNML without inner step and without mask."""
    evidence = teacher_evidence(teacher) if "consistency" in wanted and teacher is not None else None
    output = student()
    terms = {"base": cross_entropy(output.logits, labels, sample_weights, noise_rate)}
    if "consistency" in wanted:
        evidence = evidence or own_evidence(student, output, remember)
        terms["consistency"] = consistency_loss(output.logits, evidence.probabilities)
    return terms, {"logits": output.logits}
