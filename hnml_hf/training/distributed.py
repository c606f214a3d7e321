"""Whether all processes hold the same weights: training that loses a gradient on one of them goes on silently."""

import hashlib
from collections.abc import Mapping

import torch
from accelerate.utils import broadcast


class RanksDifferError(RuntimeError):
    """The processes of one run hold different weights. What was trained since the last check is not to be trusted."""


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
        f"{len(tensors)} of {len(names)} tensors, first `{tensors[0]}`. Training was stopped. Something changed "
        "weights on one process only, or ran outside the wrapped model's forward; resume from a checkpoint."
    )
