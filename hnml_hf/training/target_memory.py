"""Per-sample memory, found by stable sample ids: one running average of predicted probabilities per training sample.

t <- beta t + (1 - beta) p, starting at 0 (ELR, Liu et al., NeurIPS 2020). Two forms with one interface: all classes in
memory, or the largest few per sample in a file on disk.

Shapes: n samples, b batch, k classes, t classes kept per sample.
"""

import numpy as np
import torch

from ..common.atomic import mapped_array
from ..common.words import counted


DENSE_BYTES = 256 * 2**20  # from here on a memory of all classes is too much to ask without being told
DEFAULT_TOP_K = 10


def create_memory(
    index: np.ndarray,
    num_labels: int,
    *,
    decay: float,
    top_k: int | None = None,
    device: torch.device | str,
    folder: str,
) -> "TargetMemory | TopKMemory":
    """The memory for a training set.

    Args:
        index (`np.ndarray` of shape `(n,)`): the sample ids, in any order.
        num_labels (`int`): number of classes.
        decay (`float`): beta in [0, 1).
        top_k (`int`, *optional*): classes kept per sample; default: all if they take at most 256 MiB, else 10.
        device: of a memory of all classes.
        folder (`str`): where a file may be written; it vanishes with the process.

    Raises:
        ValueError: if two samples have one id.
    """
    if top_k is None:
        top_k = num_labels if 4 * num_labels * len(index) <= DENSE_BYTES else DEFAULT_TOP_K
    if top_k < num_labels:
        return TopKMemory(index, num_labels, decay=decay, top_k=top_k, folder=folder)
    return TargetMemory(index, num_labels, decay=decay, device=device)


def _sorted_ids(index: np.ndarray) -> np.ndarray:
    ids = np.unique(index)
    if len(ids) != len(index):
        raise ValueError(
            f"{counted(len(index), 'sample', 'have')} only {len(ids)} distinct values of `index`; ids must be unique."
        )
    return ids


def _first_occurrence(rows: torch.Tensor) -> torch.Tensor:
    """For each position of `(b,)` the first one with the same row: a sample that fills up a batch counts once."""
    return (rows[:, None] == rows).byte().argmax(1)


class TargetMemory:
    """All classes of all samples, on the training device: 4 n k bytes.

    Args:
        index (`np.ndarray` of shape `(n,)`): the sample ids, in any order.
        num_labels (`int`): number of classes.
        decay (`float`): beta in [0, 1).

    Raises:
        ValueError: if two samples have one id.
    """

    def __init__(self, index: np.ndarray, num_labels: int, *, decay: float, device: torch.device | str = "cpu"):
        self.ids = torch.as_tensor(_sorted_ids(index), device=device)
        self.decay = decay
        self.targets = torch.zeros(len(index), num_labels, device=device)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Row of each id, of shape `(b,)`. Raises `KeyError` on an id that the training set does not have."""
        rows = torch.searchsorted(self.ids, index).clamp_max(len(self.ids) - 1)
        if not torch.equal(self.ids[rows], index):
            raise KeyError(f"Sample ids {index[self.ids[rows] != index].tolist()} are not in the training set.")
        return rows

    def update(self, index: torch.Tensor, probabilities: torch.Tensor):
        """Fold the probabilities `(b, k)` of the samples `(b,)` into their averages; a repeated sample counts once."""
        rows = self.rows(index)
        probabilities = probabilities[_first_occurrence(rows)].to(self.targets)
        self.targets[rows] = self.decay * self.targets[rows] + (1 - self.decay) * probabilities

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.targets[self.rows(index)]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"ids": self.ids, "targets": self.targets}

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Raise `ValueError` if the state belongs to other samples."""
        _check_state(self.state_dict(), state)
        self.targets.copy_(state["targets"])


class TopKMemory:
    """The t largest entries of each sample's average, in a memory-mapped file of (6 t + 4) n bytes.

    What the other classes have together is remembered as one number and read back in equal parts. For a million
    samples and t = 10 the file has 64 MB, where all of 1,000 classes would take 4 GB.

    Args:
        index (`np.ndarray` of shape `(n,)`): the sample ids, in any order.
        num_labels (`int`): number of classes, k.
        decay (`float`): beta in [0, 1).
        top_k (`int`): t, at least 1 and below k.
        folder (`str`, *optional*): where the file is made; it has no name and vanishes with the process.

    Raises:
        ValueError: if two samples have one id.
        OSError: if the disk has no room.
    """

    def __init__(self, index: np.ndarray, num_labels: int, *, decay: float, top_k: int, folder: str | None = None):
        self.ids, self.num_labels, self.decay = _sorted_ids(index), num_labels, decay
        rows = len(index)
        self.classes = mapped_array((rows, top_k), np.int16 if num_labels < 2**15 else np.int32, folder)
        self.values = mapped_array((rows, top_k), np.float32, folder)
        self.mass = mapped_array((rows,), np.float32, folder)  # of all classes together

    def rows(self, index: torch.Tensor) -> np.ndarray:
        """Row of each id, of shape `(b,)`. Raises `KeyError` on an id that the training set does not have."""
        wanted = index.cpu().numpy()
        rows = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        if not np.array_equal(self.ids[rows], wanted):
            raise KeyError(f"Sample ids {wanted[self.ids[rows] != wanted].tolist()} are not in the training set.")
        return rows

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        classes, values = (torch.from_numpy(stored[rows]) for stored in (self.classes, self.values))
        rest = (torch.from_numpy(self.mass[rows]) - values.sum(1)).clamp_min(0)
        targets = (rest / (self.num_labels - classes.shape[1]))[:, None].repeat(1, self.num_labels)
        return targets.scatter(1, classes.long(), values)

    def update(self, index: torch.Tensor, probabilities: torch.Tensor):
        """Fold the probabilities `(b, k)` of the samples `(b,)` into their averages; a repeated sample counts once."""
        rows = self.rows(index)
        probabilities = probabilities[_first_occurrence(torch.from_numpy(rows)).to(probabilities.device)].float().cpu()
        targets = self.decay * self._read(rows) + (1 - self.decay) * probabilities
        values, classes = targets.topk(self.classes.shape[1])
        self.values[rows], self.classes[rows], self.mass[rows] = values, classes, targets.sum(1)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self._read(self.rows(index)).to(index.device)

    def state_dict(self) -> dict[str, torch.Tensor]:
        names = ("ids", "classes", "values", "mass")
        return {name: torch.from_numpy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Raise `ValueError` if the state belongs to other samples, or to another number of classes kept."""
        _check_state(self.state_dict(), state)
        for name in ("classes", "values", "mass"):
            getattr(self, name)[:] = state[name].numpy()


def _check_state(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]):
    shapes, stored = ({name: list(tensor.shape) for name, tensor in tensors.items()} for tensors in (own, state))
    if shapes != stored:
        raise ValueError(
            f"The checkpoint's per-sample memory has the shapes {stored}, this run's has {shapes}. Resume with the "
            "same training set and classes."
        )
    if not torch.equal(state["ids"].to(own["ids"]), own["ids"]):
        raise ValueError("The checkpoint's per-sample memory belongs to other sample ids than this training set.")
