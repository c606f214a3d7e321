"""What the steps of training saw of each sample: it waits on the device, then goes to the training dynamics."""

import torch
from accelerate.utils import gather, pad_across_processes

from ..audit.dynamics import TrainingDynamics
from .memorization import MemorizationMonitor


class DynamicsBuffer:
    """The observations of training samples that nobody has taken in yet.

    They stay on their device, so that no step waits for it, until [`~DynamicsBuffer.flush`] gathers those of all
    processes.

    Args:
        monitor ([`MemorizationMonitor`], *optional*): counts how many held-out and other labels are predicted; on
            every process.
        dynamics ([`TrainingDynamics`], *optional*): keeps a record of each sample; on the first process.
    """

    def __init__(self, *, monitor: MemorizationMonitor | None, dynamics: TrainingDynamics | None):
        self.monitor, self.dynamics = monitor, dynamics
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __len__(self) -> int:
        """Batches that wait."""
        return len(self._waiting)

    def add(
        self,
        index: torch.Tensor,
        labels: torch.Tensor,
        *,
        probabilities: torch.Tensor,
        student_predictions: torch.Tensor,
        foreground_logits: torch.Tensor | None,
        weights: torch.Tensor | None = None,
        held_out: torch.Tensor | None = None,
        step: int,
        epoch: int,
    ):
        """Take in one batch.

        Args:
            index, labels (`torch.LongTensor` of shape `(b,)`): sample ids and given labels.
            probabilities (`torch.Tensor` of shape `(b, k)`): what the teacher says or, without one, the student.
            student_predictions (`torch.LongTensor` of shape `(b,)`): class that the student predicts.
            foreground_logits (`torch.Tensor` of shape `(b, k)`, *optional*): what is said of the foreground alone.
            weights (`torch.Tensor` of shape `(b,)`, *optional*): sample weights. One of weight 0 is
                neither trained on nor held out, and tells the monitor nothing.
            held_out (`torch.BoolTensor` of shape `(b,)`, *optional*): which labels no loss sees; default: none.
            step, epoch (`int`): of training.
        """
        foreground = torch.full_like(index, -1) if foreground_logits is None else foreground_logits.argmax(-1)
        steps, epochs = (torch.full_like(index, number) for number in (step, epoch))
        weighted = torch.ones_like(index) if weights is None else (weights > 0).long()
        kept = torch.zeros_like(index) if held_out is None else held_out.long()
        columns = [
            steps,
            index,
            epochs,
            student_predictions,
            foreground,
            (student_predictions == labels).long(),
            weighted,
            kept,
        ]
        self._waiting.append((torch.stack(columns, dim=-1), probabilities))

    def flush(self):
        """Hand the observations that wait, of all processes, to monitor and dynamics. All processes must call it."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        parts = [pad_across_processes(torch.cat(part), pad_index=-1) for part in zip(*waiting, strict=True)]
        observations, probabilities = (gather(part).cpu().numpy() for part in parts)
        # by step: which copy of a sample counts must not depend on how many steps waited, or a resumed run differs
        in_order = observations[:, 0].argsort(kind="stable")
        _, index, epochs, student_predictions, foreground, agrees, weighted, held_out = observations[in_order].T
        if self.monitor is not None:
            counted = (index >= 0) & (weighted == 1)
            self.monitor.count(held_out[counted] == 1, agrees[counted] == 1)
        if self.dynamics is not None:
            self.dynamics.update(
                index,
                probabilities[in_order],
                epoch=epochs,
                student_predictions=student_predictions,
                foreground=foreground,
            )
