"""Plain cross-entropy: the baseline, and the base term of every other objective but GCE."""

import torch
from torch.nn import functional as F


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, sample_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """-w log p_y per example.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): class scores.
        labels (`torch.LongTensor` of shape `(b,)`): given labels; or `torch.Tensor` of shape `(b, k)`, soft labels.
        sample_weights (`torch.Tensor` of shape `(b,)`, *optional*): w, how far each label is believed; default: 1. The
            mean over a batch stays one over its examples, not over the weights, so that it does not matter how a
            batch is cut.

    Returns:
        `torch.Tensor` of shape `(b,)`.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return losses if sample_weights is None else sample_weights * losses


def ce(student, labels, *, sample_weights=None):
    """Objective `ce`."""
    logits = student().logits
    return {"base": cross_entropy(logits, labels, sample_weights)}, {"logits": logits}
