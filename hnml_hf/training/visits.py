"""What the steps of training saw of each sample: it waits on the device, then goes to those who keep account of it."""

import torch
from accelerate.utils import gather, pad_across_processes

from .dynamics import SampleStatistics
from .memorization import MemorizationGauge


class VisitLog:
    """The visits of training samples that nobody has taken in yet.

    They stay on their device, so that no step waits for it, until [`~VisitLog.flush`] gathers those of all processes.

    Args:
        gauge ([`MemorizationGauge`], *optional*): counts how well held-out and taught labels are fitted; on every
            process.
        statistics ([`SampleStatistics`], *optional*): keeps a record of each sample; on the first process.
    """

    def __init__(self, *, gauge: MemorizationGauge | None, statistics: SampleStatistics | None):
        self.gauge, self.statistics = gauge, statistics
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
        voted: torch.Tensor,
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
            voted (`torch.LongTensor` of shape `(b,)`): class that the student predicts.
            foreground_logits (`torch.Tensor` of shape `(b, k)`, *optional*): what is said of the foreground alone.
            weights (`torch.Tensor` of shape `(b,)`, *optional*): how far each label is believed. One of weight 0 is
                neither taught nor held out, and tells the gauge nothing.
            held_out (`torch.BoolTensor` of shape `(b,)`, *optional*): which labels no loss sees; default: none.
            step, epoch (`int`): of training.
        """
        foreground = torch.full_like(index, -1) if foreground_logits is None else foreground_logits.argmax(-1)
        steps, epochs = (torch.full_like(index, number) for number in (step, epoch))
        believed = torch.ones_like(index) if weights is None else (weights > 0).long()
        kept = torch.zeros_like(index) if held_out is None else held_out.long()
        columns = [steps, index, epochs, voted, foreground, (voted == labels).long(), believed, kept]
        self._waiting.append((torch.stack(columns, dim=-1), probabilities))

    def flush(self):
        """Hand the visits that wait, of all processes, to gauge and statistics. All processes must call it."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        parts = [pad_across_processes(torch.cat(part), pad_index=-1) for part in zip(*waiting, strict=True)]
        visits, probabilities = (gather(part).cpu().numpy() for part in parts)
        # by step: which copy of a sample counts must not depend on how many steps waited, or a resumed run differs
        in_order = visits[:, 0].argsort(kind="stable")
        _, index, epochs, voted, foreground, fitted, believed, held_out = visits[in_order].T
        if self.gauge is not None:
            counted = (index >= 0) & (believed == 1)
            self.gauge.count(held_out[counted] == 1, fitted[counted] == 1)
        if self.statistics is not None:
            self.statistics.update(index, probabilities[in_order], epoch=epochs, voted=voted, foreground=foreground)
