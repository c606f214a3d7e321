"""Generalized cross-entropy, a loss between cross-entropy and mean absolute error."""

import torch


def generalized_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, sample_weights: torch.Tensor | None = None, *, q: float
) -> torch.Tensor:
    """w (1 - p_y^q) / q per example (Zhang & Sabuncu, NeurIPS 2018, arXiv 1805.07836); q -> 0 is cross-entropy, q = 1
    is 1 - p_y.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): class scores.
        labels (`torch.LongTensor` of shape `(b,)`): given labels.
        sample_weights (`torch.Tensor` of shape `(b,)`, *optional*): w; default: 1.
        q (`float`): in (0, 1].

    Returns:
        `torch.Tensor` of shape `(b,)`.
    """
    log_probability = logits.float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    losses = -torch.expm1(q * log_probability) / q
    return losses if sample_weights is None else sample_weights * losses


def gce(student, labels, *, gce_q: float, sample_weights=None):
    """Objective `gce`."""
    logits = student().logits
    return {"base": generalized_cross_entropy(logits, labels, sample_weights, q=gce_q)}, {"logits": logits}
