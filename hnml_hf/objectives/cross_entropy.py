"""Plain cross-entropy: the baseline, and the base term of every other objective but GCE."""

import torch
from torch.nn import functional as F


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p_y per example.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): class scores.
        labels (`torch.LongTensor` of shape `(b,)`): given labels; or `torch.Tensor` of shape `(b, k)`, soft labels.

    Returns:
        `torch.Tensor` of shape `(b,)`.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


def ce(student, labels):
    """Objective `ce`."""
    logits = student().logits
    return {"base": cross_entropy(logits, labels)}, {"logits": logits}
