"""Per-sample memory, found by stable sample ids."""

import numpy as np
import torch


class TargetMemory:
    """One running average of predicted probabilities per training sample: t <- beta t + (1 - beta) p, starting at 0.

    Args:
        index (`np.ndarray` of shape `(n,)`): the sample ids, in any order.
        num_labels (`int`): number of classes.
        decay (`float`): beta in [0, 1).

    Raises:
        ValueError: if two samples have one id.
    """

    def __init__(self, index: np.ndarray, num_labels: int, *, decay: float, device: torch.device | str = "cpu"):
        self.ids = torch.as_tensor(np.unique(index), device=device)
        if len(self.ids) != len(index):
            raise ValueError(
                f"{len(index)} samples have only {len(self.ids)} distinct values of `index`; ids must be unique."
            )
        self.decay = decay
        self.targets = torch.zeros(len(index), num_labels, device=device)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Row of each id, of shape `(b,)`. Raises `KeyError` on an id that the training set does not have."""
        rows = torch.searchsorted(self.ids, index).clamp_max(len(self.ids) - 1)
        if not torch.equal(self.ids[rows], index):
            raise KeyError(f"Sample ids {index[self.ids[rows] != index].tolist()} are not in the training set.")
        return rows

    def update(self, index: torch.Tensor, probabilities: torch.Tensor):
        """Fold the probabilities `(b, k)` of the samples `(b,)` into their averages."""
        rows = self.rows(index)
        self.targets[rows] = self.decay * self.targets[rows] + (1 - self.decay) * probabilities.to(self.targets)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.targets[self.rows(index)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"ids": self.ids, "targets": self.targets}

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Raises `ValueError` if the state belongs to other samples."""
        if not torch.equal(state["ids"].to(self.ids), self.ids):
            raise ValueError("The checkpoint's per-sample memory belongs to other sample ids than this training set.")
        self.targets.copy_(state["targets"])
