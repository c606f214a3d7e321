"""Plain cross-entropy: the baseline, and the base term of every other objective but GCE."""

import torch
from torch.nn import functional as F


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    sample_weights: torch.Tensor | None = None,
    noise_rate: torch.Tensor | None = None,
) -> torch.Tensor:
    """-w log p_y per example; with a noise rate r -w log p~_y, p~ = (1 - r) p + r (1 - p) / (k - 1).

    p~ is the probability of the given label if a share r of the labels is wrong, by whatever other class: the forward
    correction (Patrini et al., CVPR 2017, Sec. 3.2) for symmetric noise. The loss is bounded, and its gradient
    that of cross-entropy times, nearly, the probability in the network's own eyes that the given label is right.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): class scores.
        labels (`torch.LongTensor` of shape `(b,)`): given labels; or `torch.Tensor` of shape `(b, k)`, soft labels.
        sample_weights (`torch.Tensor` of shape `(b,)`, *optional*): w, the confidence in each label; default: 1. The
            mean over a batch stays one over its examples, not over the weights, so that it does not matter how a
            batch is cut.
        noise_rate (`torch.Tensor` of shape `()`, *optional*): r, in [0, (k - 1) / k), beyond which a label would
            speak against its class; default: 0.

    Returns:
        `torch.Tensor` of shape `(b,)`.
    """
    logits = logits.float()
    if noise_rate is not None:
        others = noise_rate / (logits.shape[-1] - 1)
        logits = torch.logaddexp(logits.log_softmax(-1) + (1 - noise_rate - others).log(), others.log())
        losses = F.nll_loss(logits, labels, reduction="none")
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    return losses if sample_weights is None else sample_weights * losses


def ce(student, labels, *, sample_weights=None, noise_rate=None):
    """Objective `ce`."""
    logits = student().logits
    return {"base": cross_entropy(logits, labels, sample_weights, noise_rate)}, {"logits": logits}
