"""What a training step runs inside of: context managers, and the source of its randomness."""

import hashlib
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def memory_advice(advice: str):
    """Adds to an error of lacking memory what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{error}\n{advice}") from error


@contextmanager
def compiled_step():
    """A virtual step takes two gradients through one compiled pass, so that its buffers cannot be given away."""
    with torch._functorch.config.patch(donated_buffer=False):
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(f"`torch_compile` failed: {error}\nTrain without it.") from error


@contextmanager
def statistics_of_one_pass(model: torch.nn.Module):
    """Activation checkpointing runs layers again in the backward pass; batch norm counts the first time alone."""
    passed = []
    hook = model.register_forward_hook(lambda *_: passed.append([buffer.clone() for buffer in model.buffers()]))
    try:
        yield
    finally:
        hook.remove()
    for buffer, once in zip(model.buffers(), passed[0], strict=True):
        buffer.copy_(once)


def step_context(args, model: torch.nn.Module) -> ExitStack:
    """All that a step of a run with these options is to run inside of."""
    context = ExitStack()
    if args.recomputes_activations:
        context.enter_context(statistics_of_one_pass(model))
    if (
        args.draws_labels and args.second_order and args.meta_scope == "full"
    ):  # fused kernels have no second derivative
        context.enter_context(sdpa_kernel(SDPBackend.MATH))
    context.enter_context(memory_advice(args.memory_advice()))
    if args.torch_compile:
        context.enter_context(compiled_step())
    return context


@torch.compiler.disable  # it reads the ids, which no compiler can follow
def batch_generator(seed: int, step: int, index: torch.Tensor) -> torch.Generator:
    """Source of randomness for one batch, a function of the run's seed, the step and the sample ids alone.

    No state needs saving, every process draws its own synthetic labels, and a batch gets the same ones whether it is a
    process's share or an accumulation step.
    """
    key = repr((seed, step, index.tolist())).encode()
    digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(digest % 2**63)
