"""The inner step of the bi-level problem: where a virtual update of the weights would lead.

Three ways to get there: a gradient step on given weights, the same step on the last layer in closed form, and a look
ahead along the optimizer's running gradient. All are functions of tensors; none knows a model.

Shapes: b batch, k classes, d features, m synthetic label sets, q queries.
"""

from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch.nn import functional as F


def inner_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    teacher_probabilities: torch.Tensor | None = None,
    consistency_weight: float = 0.0,
) -> torch.Tensor:
    """Meta-training loss of one synthetic label set: mean_i [ CE(p_i, y^_i) + lambda KL(q_i || p_i) ].

    MLNT (Li et al., CVPR 2019, Eq. 1) has lambda = 0; lambda > 0 is the literal reading of HNML's abstract, which puts
    the consistency loss into meta-training.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): the student's.
        labels (`torch.LongTensor` of shape `(b,)`): synthetic labels y^.
        teacher_probabilities (`torch.Tensor` of shape `(b, k)`, *optional*): q, needed if `consistency_weight` > 0.
        consistency_weight (`float`): lambda >= 0.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    loss = F.cross_entropy(logits, labels)
    if consistency_weight:
        loss = loss + consistency_weight * F.kl_div(
            logits.log_softmax(-1), teacher_probabilities, reduction="batchmean"
        )
    return loss


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


def label_residuals(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    teacher_probabilities: torch.Tensor | None = None,
    consistency_weight: float = 0.0,
) -> torch.Tensor:
    """b times the gradient of [`inner_loss`] with respect to the logits, for m label sets at once.

    R_m = P - Y^_m + lambda (P - Q): the synthetic label is merely softened towards the teacher.

    Args:
        logits (`torch.Tensor` of shape `(b, k)`): the student's.
        labels (`torch.LongTensor` of shape `(m, b)`): synthetic labels.
        teacher_probabilities, consistency_weight: as in [`inner_loss`].

    Returns:
        `torch.Tensor` of shape `(m, b, k)`.
    """
    probabilities = logits.softmax(-1)
    residuals = probabilities - F.one_hot(labels, logits.shape[-1])
    if consistency_weight:
        residuals = residuals + consistency_weight * (probabilities - teacher_probabilities)
    return residuals


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


def running_directions(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, torch.Tensor]:
    """What the optimizer is about to subtract, times its learning rate, without a new gradient; by parameter, empty
    before its first step.

    SGD's v <- beta v + g; of Adam m^ / (sqrt(v^) + eps), both corrected for their start (Kingma & Ba, ICLR 2015).

    Raises:
        ValueError: if the optimizer keeps no running gradient.
    """
    directions = {}
    for group in optimizer.param_groups:
        if not (group.get("momentum") or "betas" in group):
            raise ValueError(_no_running_gradient(optimizer))
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if state.get("momentum_buffer") is not None:
                directions[parameter] = state["momentum_buffer"]
            elif "exp_avg_sq" in state:
                first, second = (1 - beta ** state["step"] for beta in group["betas"])
                scale = (state["exp_avg_sq"] / second).sqrt() + group["eps"]
                directions[parameter] = state["exp_avg"] / first / scale
            elif state:
                raise ValueError(_no_running_gradient(optimizer))
    return directions


def _no_running_gradient(optimizer: torch.optim.Optimizer) -> str:
    return (
        f"`inner_direction='momentum'` looks ahead along the optimizer's running gradient, and "
        f"`{type(optimizer).__name__}` keeps none here. Use SGD with momentum (`optim='sgd', "
        "optim_args='momentum=0.9'`), Adam or AdamW."
    )


@contextmanager
def look_ahead(directions: Mapping[torch.Tensor, torch.Tensor], *, lr: float):
    """Inside the block each parameter is theta' = theta - lr v; afterwards it is theta again, bit for bit, also on
    error.

    A gradient computed inside is the gradient at theta', ready to be applied at theta: extragradient from the past
    (Popov 1980) with v in place of the last gradient.

    Args:
        directions (`Mapping[torch.Tensor, torch.Tensor]`): v by parameter.
        lr (`float`): length of the look: lr / learning rate is the horizon in steps of the optimizer.
    """
    parameters = [parameter.data for parameter in directions]
    if not parameters or lr == 0:
        yield
        return
    originals = [parameter.clone() for parameter in parameters]
    try:
        torch._foreach_add_(parameters, list(directions.values()), alpha=-lr)
        yield
    finally:
        torch._foreach_copy_(parameters, originals)


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
