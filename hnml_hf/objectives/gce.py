"""Generalised cross-entropy, a loss between cross-entropy and mean absolute error."""

import torch


def generalized_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, *, q: float) -> torch.Tensor:
    """(1 - p_y^q) / q per example (Zhang & Sabuncu, NeurIPS 2018, arXiv 1805.07836); q -> 0 is cross-entropy, q = 1 is
    1 - p_y.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): class scores.
        labels (`torch.LongTensor` of shape `(b,)`): given labels.
        q (`float`): in (0, 1].

    Returns:
        `torch.Tensor` of shape `(b,)`.
    """
    log_probability = logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    return -torch.expm1(q * log_probability) / q


def gce(student, labels, *, gce_q: float):
    """Objective `gce`."""
    logits = student().logits
    return {"base": generalized_cross_entropy(logits, labels, q=gce_q)}, {"logits": logits}
