"""What a training step is made of: its objective and targets, what it runs inside of, and its randomness."""

import hashlib
import inspect
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..objectives import OBJECTIVES
from ..objectives.soft_targets import dense_targets


# what a step gives its objective; its other keyword-only arguments are options
PROVIDED = ("active_terms", "teacher", "generator", "remember", "sample_weights", "noise_rate")


def bind_objective(args, model, *, mixes: bool) -> tuple[Callable, list[str]]:
    """The objective of a run with its options, and what each step has to give it besides.

    Args:
        args ([`HNMLTrainingArguments`]): its name and options.
        model ([`TimmCAMForImageClassification`]): to be trained.
        mixes (`bool`): whether images are mixed.

    Raises:
        ValueError: if it cannot train on mixed images, or asks for maps that the model does not have.
    """
    if mixes and not args.takes_soft_labels():
        raise ValueError(
            f"Mixup makes soft labels, which objective `{args.objective}` does not take as it is set. Use `ce`, "
            "or `hnml` with the moving average as a teacher."
        )
    if "mask_guided" in args.term_weights(1.0):
        model.check_spatial_evidence()
    function = OBJECTIVES[args.objective]
    needs = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = {name: getattr(args, name) for name in needs if name not in PROVIDED}
    return partial(function, **options), [name for name in PROVIDED if name in needs]


def targets_of_step(inputs: dict, targets: str, refreshed, num_labels: int) -> torch.Tensor:
    """What the base loss asks for: labels `(b,)`, or soft labels `(b, k)`.

    Args:
        inputs (`dict`): the batch.
        targets (`str`): `given`, `posterior` or `refreshed`.
        refreshed ([`RefreshedTargets`], *optional*): where the last of them are.
        num_labels (`int`): k.
    """
    if targets == "given":
        return inputs.get("soft_labels", inputs["labels"])
    if refreshed is not None:
        classes, probabilities = refreshed[inputs["index"]]
    else:
        classes, probabilities = inputs["target_classes"], inputs["target_probabilities"]
    return dense_targets(classes, probabilities, num_labels)


def without_held_out_labels(
    terms: dict[str, torch.Tensor], inputs: dict, *, fraction: float
) -> dict[str, torch.Tensor]:
    """The terms `(b,)` of a batch without those of samples whose label no loss sees; their mean stays what it was.

    The mask-guided term has no use for the given labels, and keeps all samples.

    Args:
        terms (`dict[str, torch.Tensor]`): by name.
        inputs (`dict`): the batch, with `held_out` (bool) of shape `(b,)`.
        fraction (`float`): share of the training set that is held out.
    """
    trained_on = ~inputs["held_out"] / (1 - fraction)
    if "soft_labels" in inputs:  # neither of two labels that are mixed may be one held out
        trained_on = trained_on * trained_on.flip(0)
    return {name: term if name == "mask_guided" else trained_on * term for name, term in terms.items()}


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
