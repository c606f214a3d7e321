"""Early-learning regularization: hold predictions near their own running average."""

import torch

from .cross_entropy import cross_entropy


CLAMP = 1e-4  # keeps log(1 - <t, p>) finite, as in the authors' code


def early_learning_regularizer(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log(1 - <t, p>) per example (Liu et al., NeurIPS 2020, arXiv 2007.00151, Eq. 6): lowest where p agrees with t.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): class scores; p is their softmax.
        targets (`torch.Tensor` of shape `(b, k)`): t, the running average of each example's p; detached.

    Returns:
        `torch.Tensor` of shape `(b,)`, at most 0.
    """
    probabilities = logits.float().softmax(-1).clamp(CLAMP, 1 - CLAMP)
    return torch.log1p(-(targets * probabilities).sum(-1).clamp_max(1 - CLAMP))


def elr(student, labels, *, remember, elr_weight: float, sample_weights=None, noise_rate=None):
    """Objective `elr`. `remember(probabilities)` folds them into the running averages and returns those."""
    logits = student().logits
    probabilities = logits.detach().float().softmax(-1).clamp(CLAMP, 1 - CLAMP)
    targets = remember(probabilities / probabilities.sum(-1, keepdim=True))
    base = cross_entropy(logits, labels, sample_weights, noise_rate)
    base = base + elr_weight * early_learning_regularizer(logits, targets)
    return {"base": base}, {"logits": logits}
