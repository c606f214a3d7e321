"""What the steps since the last look were like: averages for the log, and whether all of it was finite."""

import math
from collections import defaultdict

import torch
from accelerate.utils import reduce

from ..common.finite import NonFiniteError


class StepMonitor:
    """Keeps per-example losses and other figures of training steps, on their device, without waiting for it."""

    def __init__(self):
        self._figures: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._losses: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        self._checked = self._losses

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

    def non_finite(self, gradient_norm: torch.Tensor) -> torch.Tensor:
        """Whether a loss was not finite since the last call, or gradients with this norm are not. Shape `()`, bool."""
        flags = [term.isfinite().all() for _, terms in self._losses for term in terms.values()]
        self._checked, self._losses = self._losses, []
        return ~torch.stack([*flags, gradient_norm.isfinite()]).all()

    def non_finite_terms(self) -> str:
        """Terms and samples that were not finite at the last look, "" if it was no loss."""
        return " and ".join(
            f"`{name}` of the samples with index {index[~term.isfinite()].tolist()}"
            for index, terms in self._checked
            for name, term in terms.items()
            if not term.isfinite().all()
        )

    def samples(self) -> list[int]:
        """Index of the samples at the last look."""
        return torch.cat([index for index, _ in self._checked]).tolist()

    def state(self) -> dict[str, list[float]]:
        """The figures that `averages` has not taken yet."""
        return {name: torch.stack(values).tolist() for name, values in self._figures.items()}

    def load_state(self, state: dict[str, list[float]], device: torch.device):
        for name, values in state.items():
            self._figures[name] = list(torch.tensor(values, device=device).unbind())

    def averages(self) -> dict[str, float]:
        """Mean of each figure since the last call, over all processes, which must call it together; figures that were
        nan throughout are left out."""
        if not self._figures:
            return {}
        names, columns = list(self._figures), [torch.stack(values).float() for values in self._figures.values()]
        self._figures.clear()
        sums = torch.stack([torch.stack([values.nansum(), (~values.isnan()).sum()]) for values in columns])
        means = [total / count if count else math.nan for total, count in reduce(sums).tolist()]
        return {name: round(mean, 4) for name, mean in zip(names, means, strict=True) if not math.isnan(mean)}


def non_finite_error(terms: list[str], samples: list[int], *, step: int) -> NonFiniteError:
    """What [`StepMonitor`]s of all processes found in a step, as one error.

    Args:
        terms (`list[str]`): `non_finite_terms` of each process.
        samples (`list[int]`): index of all samples of the step.
        step (`int`): its number.
    """
    found = " and ".join(filter(None, terms))
    where = found or f"a gradient, from the batch of the samples with index {samples}"
    return NonFiniteError(
        f"Step {step}: not finite: {where}. The weights were not changed by it. Look at these images, lower "
        "`--learning_rate`, `--extrapolation` or `--meta_lr`, or set `--max_grad_norm`, and resume from the last "
        "checkpoint."
    )


def label_agreement(
    predicted: torch.Tensor, labels: torch.Tensor, clean_labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How far a batch's given labels are learned, the right and the wrong ones.

    Args:
        predicted, labels, clean_labels (`torch.LongTensor` of shape `(b,)`): classes; clean -1 = unknown.

    Returns:
        `dict`: `label_agreement`, the share of given labels that are predicted, and `memorized`, that share among the
        labels known to be wrong (nan if there is none).
    """
    repeated = predicted == labels
    wrong = (clean_labels >= 0) & (clean_labels != labels)
    return {"label_agreement": repeated.float().mean(), "memorized": (wrong & repeated).sum() / wrong.sum()}
