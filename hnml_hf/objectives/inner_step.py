"""The inner step of the bi-level problem: where a virtual update of the weights would lead.

A gradient step on given weights, and the same step on the last layer in closed form. Both are functions of tensors;
none knows a model.

Shapes: b batch, k classes, d features, m synthetic label sets, q queries.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional as F


def gradient_step(
    loss: torch.Tensor, weights: Mapping[str, torch.Tensor], *, lr: float, second_order: bool
) -> dict[str, torch.Tensor]:
    """Fast weights theta' = theta - lr * dloss/dtheta (MLNT, Eq. 2; MAML, Finn et al. 2017, Eq. 1).

    Args:
        loss (`torch.Tensor` of shape `()`): a function of the weights; its graph is kept.
        weights (`Mapping[str, torch.Tensor]`): theta, by name.
        lr (`float`): inner step size alpha.
        second_order (`bool`): whether theta' is differentiated through the gradient. If not, d theta'/d theta = 1.

    Returns:
        `dict[str, torch.Tensor]`: theta', with the names of `weights`. A weight that the loss does not use is
        unchanged.
    """
    gradients = torch.autograd.grad(
        loss, list(weights.values()), retain_graph=True, create_graph=second_order, allow_unused=True
    )
    return {
        name: weight if gradient is None else weight - lr * gradient
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def label_residuals(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """b times the gradient of the mean cross-entropy with respect to the logits, for m label sets at once: P - Y^_m.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): the student's.
        labels (`torch.LongTensor` of shape `(m, b)`): synthetic labels.

    Returns:
        `torch.Tensor` of shape `(m, b, k)`.
    """
    return logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])


def head_step_logits(
    logits: torch.Tensor,
    queries: torch.Tensor,
    features: torch.Tensor,
    residuals: torch.Tensor,
    *,
    lr: torch.Tensor | float,
) -> torch.Tensor:
    """Logits after one gradient step on the last linear layer alone, in closed form.

    z' = z - (lr / b) (h_q h^T + 1 1^T) R, exact to any order of differentiation; the 1 1^T is the bias.

    Args:
        logits (`torch.Tensor` of shape `(q, k)`): z, the queries' logits before the step.
        queries (`torch.Tensor` of shape `(q, d)`): h_q, the queries' features.
        features (`torch.Tensor` of shape `(b, d)`): h, features of the batch that the step was taken on.
        residuals (`torch.Tensor` of shape `(m, b, k)`): R of [`label_residuals`].
        lr (`float`): inner step size.

    Returns:
        `torch.Tensor` of shape `(m, q, k)`.
    """
    kernel = queries @ features.T + 1
    return logits - lr / len(features) * (kernel @ residuals)


def head_step_weights(
    class_weights: torch.Tensor,
    classes: torch.Tensor,
    features: torch.Tensor,
    residuals: torch.Tensor,
    *,
    lr: torch.Tensor | float,
) -> torch.Tensor:
    """Rows of the last layer's weight after the step of [`head_step_logits`]: w'_c = w_c - (lr / b) sum_j R[j, c] h_j.

    Args:
        class_weights (`torch.Tensor` of shape `(k, d)`): W.
        classes (`torch.LongTensor` of shape `(q,)`): the rows wanted.
        features, residuals, lr: as in [`head_step_logits`].

    Returns:
        `torch.Tensor` of shape `(m, q, d)`.
    """
    step = torch.einsum("mbq,bd->mqd", residuals[..., classes], features)
    return class_weights[classes] - lr / len(features) * step


def swapped_label_loss_drop(
    logits: torch.Tensor, fast_logits: torch.Tensor, labels: torch.Tensor, synthetic_labels: torch.Tensor
) -> torch.Tensor:
    """How much one inner step lowers the loss on the labels that were swapped: the calibration of the inner step size.

    Near 0 the virtual step changes nothing and the method is a mean teacher; 0.2 to 0.5 is a step worth resisting.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`), fast_logits (`torch.Tensor` of shape `(m, b, k)`): before and after.
        labels (`torch.LongTensor` of shape `(b,)`), synthetic_labels (`torch.LongTensor` of shape `(m, b)`).

    Returns:
        `torch.Tensor` of shape `()`: relative drop, detached; nan if no label was swapped.
    """
    with torch.no_grad():
        swapped = synthetic_labels != labels
        before = F.cross_entropy(logits.expand_as(fast_logits)[swapped].float(), synthetic_labels[swapped])
        after = F.cross_entropy(fast_logits[swapped].float(), synthetic_labels[swapped])
        return 1 - after / before
