"""What the steps since the last look were like: averages for the log, and whether all of it was finite."""

import math
from collections import defaultdict

import torch


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is not finite. The weights are still those of the step before."""


class StepMonitor:
    """Keeps per-example losses and other figures of training steps, on their device, without waiting for it."""

    def __init__(self):
        self._figures: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._losses: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []

    def watch(self, index: torch.Tensor, terms: dict[str, torch.Tensor], figures: dict[str, torch.Tensor]):
        """Take one batch in.

        Args:
            index (`torch.LongTensor` of shape `(b,)`): sample ids.
            terms (`dict[str, torch.Tensor]`): per-example losses of shape `(b,)`.
            figures (`dict[str, torch.Tensor]`): other scalars for the log; nan where there is nothing to say.
        """
        terms = {name: term.detach() for name, term in terms.items()}
        self._losses.append((index, terms))
        for name, term in terms.items():
            self._figures[name].append(term.mean())
        for name, value in figures.items():
            self._figures[name].append(value.detach())

    def require_finite(self, gradient_norm: torch.Tensor, *, step: int):
        """Check the batches since the last call, and the gradients that came of them.

        Args:
            gradient_norm (`torch.Tensor` of shape `()`): of all gradients of one optimizer step.
            step (`int`): its number, for the message.

        Raises:
            NonFiniteError: naming the terms and the samples.
        """
        flags = [term.isfinite().all() for _, terms in self._losses for term in terms.values()]
        flags.append(gradient_norm.isfinite())
        batches, self._losses = self._losses, []
        if torch.stack(flags).all():  # the one place that waits for the device
            return
        found = [
            f"`{name}` of the samples with index {index[~term.isfinite()].tolist()}"
            for index, terms in batches
            for name, term in terms.items()
            if not term.isfinite().all()
        ]
        samples = torch.cat([index for index, _ in batches]).tolist()
        where = " and ".join(found) or f"a gradient, from the batch of the samples with index {samples}"
        raise NonFiniteError(
            f"Step {step}: not finite: {where}. The weights were not changed by it. Look at these images, lower "
            "`--learning_rate` or `--meta_lr`, or set `--max_grad_norm`, and resume from the last checkpoint."
        )

    def averages(self) -> dict[str, float]:
        """Mean of each figure since the last call; those that were nan throughout are left out."""
        means = {name: torch.stack(values).float().nanmean().item() for name, values in self._figures.items()}
        self._figures.clear()
        return {name: round(mean, 4) for name, mean in means.items() if not math.isnan(mean)}


def label_fit(predicted: torch.Tensor, labels: torch.Tensor, clean_labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far a batch's given labels are learned, the right and the wrong ones.

    Args:
        predicted, labels, clean_labels (`torch.LongTensor` of shape `(b,)`): classes; clean -1 = unknown.

    Returns:
        `dict`: `fit`, the share of given labels that are predicted, and `memorized`, that share among the labels known
        to be wrong (nan if there is none).
    """
    repeated = predicted == labels
    wrong = (clean_labels >= 0) & (clean_labels != labels)
    return {"fit": repeated.float().mean(), "memorized": (wrong & repeated).sum() / wrong.sum()}
