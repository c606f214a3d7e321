"""Consistency with a mean teacher: the outer loss of MLNT and HNML, and a baseline by itself."""

import math

import torch

from .cross_entropy import cross_entropy


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


def sigmoid_rampup(progress: float) -> float:
    """exp(-5 (1 - u)^2) for progress u, clipped to [0, 1] (Laine & Aila, ICLR 2017; used by MLNT)."""
    return math.exp(-5 * (1 - min(max(progress, 0.0), 1.0)) ** 2)


def mean_teacher(student, labels, *, wanted, teacher):
    """Objective `mean_teacher` (Tarvainen & Valpola, NeurIPS 2017) = HNML without inner step and without mask."""
    logits = student().logits
    terms = {"base": cross_entropy(logits, labels)}
    if "consistency" in wanted:
        terms["consistency"] = consistency_loss(logits, teacher().logits.float().softmax(-1))
    return terms, {"logits": logits}
