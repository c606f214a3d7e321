"""Momentum extrapolation: the gradient is taken some optimizer steps ahead and applied at the weights themselves.

Momentum-SAM (Becker et al. 2024, arXiv 2401.12033) without its normalization, or with it as a control; extragradient
from the past (Popov 1980) with the optimizer's momentum in place of the last gradient.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.utils import get_total_norm


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
    own = getattr(optimizer, "optimizer", optimizer)  # Accelerate has wrapped it
    return (
        f"`extrapolation` goes along the optimizer's momentum, and `{type(own).__name__}` keeps none here. Use "
        "SGD with momentum (`optim='sgd', optim_args='momentum=0.9'`), Adam or AdamW, or set `extrapolation` to 0."
    )


@contextmanager
def extrapolated(directions: Mapping[torch.Tensor, torch.Tensor], *, distance: float, normalized: bool = False):
    """Inside the block each parameter is theta' = theta - d v, with `normalized` theta - d v / |v|, the norm over all
    parameters; afterwards it is theta again, bit for bit, also on error.

    A gradient computed inside is the gradient at theta', ready to be applied at theta.

    Args:
        directions (`Mapping[torch.Tensor, torch.Tensor]`): v by parameter.
        distance (`float`): d; divided by the learning rate it is the horizon in steps of the optimizer.
        normalized (`bool`): whether v is scaled to length 1.
    """
    parameters = [parameter.data for parameter in directions]
    if normalized and parameters:
        norm = get_total_norm(list(directions.values()))
        directions = {parameter: direction / norm.clamp_min(1e-12) for parameter, direction in directions.items()}
    if not parameters or distance == 0:
        yield
        return
    originals = [parameter.clone() for parameter in parameters]
    try:
        torch._foreach_add_(parameters, list(directions.values()), alpha=-distance)
        yield
    finally:
        torch._foreach_copy_(parameters, originals)


def extrapolated_step(
    args, optimizer: torch.optim.Optimizer, *, meta_weight: float, step: int
) -> AbstractContextManager:
    """[`extrapolated`] by as much as the options of a run ask for.

    Args:
        args ([`HNMLTrainingArguments`]): `extrapolation` in optimizer steps, and the peak learning rate.
        optimizer (`torch.optim.Optimizer`): whose momentum is followed.
        meta_weight (`float`): the share of it, in [0, 1].
        step (`int`): of training, from 0.
    """
    distance = meta_weight * args.extrapolation * args.learning_rate
    # where it may be asked for later, the first steps show whether the optimizer can serve
    if not distance and not (args.extrapolation and step <= 1):
        return nullcontext()
    return extrapolated(running_directions(optimizer), distance=distance, normalized=args.extrapolation_normalized)
