"""Several processes as one: the same options and weights on all, and what one alone does for all."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object

from ..common.words import counted


class RanksDifferError(RuntimeError):
    """The processes of one run hold different weights. What was trained since the last check is not to be trusted."""


def on_first_process(function: Callable, *arguments):
    """Call it on the first process alone; its result, or its error, reaches all of them, which must call this."""
    result = error = None
    if PartialState().is_main_process:
        try:
            result = function(*arguments)
        except (OSError, RuntimeError, ValueError) as problem:
            error = problem
    if PartialState().num_processes > 1:
        result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


def require_same_on_all_processes(facts: Mapping):
    """Compare what the processes of a run were started with. All must call it.

    Args:
        facts (`Mapping`): by name; values that can be compared and pickled.

    Raises:
        ValueError: on all processes, naming what differs.
    """
    if PartialState().num_processes == 1:
        return
    everyones = gather_object([dict(facts)])
    differences = [
        f"`{name}` is {everyones[0].get(name)} on process 0 and {other.get(name)} on process {number}"
        for name in dict.fromkeys(name for one in everyones for name in one)
        for number, other in enumerate(everyones)
        if other.get(name) != everyones[0].get(name)
    ]
    if differences:
        more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"The processes of this run were started differently: {', '.join(differences[:5])}{more}. Start all of "
            "them with one command."
        )


def broadcast_buffers(model: torch.nn.Module):
    """Give all processes the floating-point buffers (batch-norm statistics) of the first one."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if buffers:  # in one message: there are a hundred small ones
        together = broadcast(torch.cat([buffer.flatten() for buffer in buffers]))
        for buffer, part in zip(buffers, together.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """64 bits of a hash of each tensor's bytes, int64 of shape `(n,)` on the CPU."""
    digests = []
    for tensor in tensors.values():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digests.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True))
    return torch.tensor(digests, dtype=torch.int64)


def check_ranks_agree(names: list[str], digests: torch.Tensor, *, step: int):
    """Compare the digests of all processes.

    Args:
        names (`list[str]`): the n tensors.
        digests (`torch.Tensor` of shape `(processes, n)`): [`tensor_digests`] of each process.
        step (`int`): the step just made, for the message.

    Raises:
        RanksDifferError: naming the step, the processes and the first tensor that differs. All processes raise it, so
            that none waits for another.
    """
    different = digests != digests[0]
    if not different.any():
        return
    ranks = different.any(1).nonzero().flatten().tolist()
    tensors = [names[i] for i in different.any(0).nonzero().flatten().tolist()]
    raise RanksDifferError(
        f"After step {step} the weights of process {', '.join(map(str, ranks))} differ from those of process 0 in "
        f"{len(tensors)} of {counted(len(names), 'tensor')}, first `{tensors[0]}`. Training was stopped. Something "
        "changed weights on one process only, or ran outside the wrapped model's forward; resume from a checkpoint."
    )


def any_process(flags: list[torch.Tensor], world_size: int) -> list[bool]:
    """Whether each of some flags, of shape `()`, is set on any process. Waits for the device, in one message."""
    together = torch.stack([flag.to(torch.int32) for flag in flags])
    if world_size > 1:
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
    return together.bool().tolist()
