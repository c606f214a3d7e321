"""How many of the given labels a network has memorized: what `meta_weight` follows."""

import numpy as np

from ..audit.noise_model import SIGNIFICANT_GAP, gap_error
from .args import HNML_OBJECTIVES


UPDATE_EVERY = 32  # steps; the trainer has gathered what the processes saw by then
LABELS_HELD_OUT = 500  # as far as the shares in `default_fraction` allow
FULL_AT = 0.2  # share of the unpredictable labels memorized, beyond that, at which `meta_weight` is 1


def default_fraction(samples: int) -> float:
    """Share of the samples to hold out: 500 tell shares apart by a few per cent, and few need a larger share."""
    return min(max(LABELS_HELD_OUT / samples, 0.01), 0.1)


def create_monitor(args, samples: int) -> "MemorizationMonitor | None":
    """The monitor of a run, or None where its objective has none.

    Args:
        args ([`HNMLTrainingArguments`]): objective and `monitor_fraction`.
        samples (`int`): of the training set.
    """
    if args.objective not in HNML_OBJECTIVES or args.monitor_fraction == 0:
        return None
    fraction = args.monitor_fraction or default_fraction(samples)
    return MemorizationMonitor(fraction=fraction, samples=samples)


class MemorizationMonitor:
    """Keeps the labels of a few training samples from every loss, and compares how many of them the network predicts
    with how many of the others: in the same batches, by the same network, under the same augmentation.

    With f the share of the labels trained on that the network predicts and g that of the labels held out, r = (f - g)
    / (1 - g) is the share of the labels that cannot be predicted, wrong or hard, that it has memorized.
    `meta_weight` is 0 until r is significant, then grows in proportion, and is 1 at `FULL_AT` above.
    Nothing is asked of the user, and nothing of a clean label. The construction is ours. That networks first learn
    what generalizes and memorize the rest later is the observation of Arpit et al., ICML 2017.

    With `hnml_synthetic` the held-out labels still are among those that neighbors pass on to the virtual
    step; the losses that move the weights do not see them.

    Args:
        fraction (`float`): share of the samples held out, in (0, 1).
        samples (`int`): samples per epoch, the time constant of the running averages.
    """

    def __init__(self, *, fraction: float, samples: int):
        self.fraction, self.samples = fraction, samples
        self.reset()

    def reset(self):
        """Forget all that was counted."""
        self.pending = np.zeros(4, np.int64)  # trained on: agree, seen; held out: agree, seen
        self.running = np.zeros(4)
        self.meta_weight = 0.0

    def count(self, held_out: np.ndarray, agrees: np.ndarray):
        """Take observations in.

        Args:
            held_out, agrees (`np.ndarray` of shape `(n,)`, bool): whether a sample is held out, and whether the
                network predicts its given label.
        """
        for place, group in enumerate((~held_out, held_out)):
            self.pending[2 * place] += (group & agrees).sum()
            self.pending[2 * place + 1] += group.sum()

    def update(self):
        """Set `meta_weight` from what was counted since the last time."""
        seen = self.pending[1] + self.pending[3]
        self.running = self.running * np.exp(-seen / self.samples) + self.pending
        self.pending[:] = 0
        self.meta_weight = float(np.clip((self.memorized_share() - self.uncertainty()) / FULL_AT, 0.0, 1.0))

    def agreement(self) -> tuple[float, float]:
        """f and g: the agreement with the labels trained on, and with those held out."""
        trained, all_trained, held_out, all_held_out = self.running
        return trained / max(all_trained, 1.0), held_out / max(all_held_out, 1.0)

    def memorized_share(self) -> float:
        """r, below 0 where more of the held-out labels happen to be predicted."""
        trained, held_out = self.agreement()
        return (trained - held_out) / max(1 - held_out, 1e-6)

    def uncertainty(self) -> float:
        """`SIGNIFICANT_GAP` standard errors of r, from the samples seen; infinite before any is held out."""
        trained, held_out = self.agreement()
        many = min(self.running[1], (1 - self.fraction) * self.samples)  # the same samples come again
        few = min(self.running[3], self.fraction * self.samples)
        if few < 1:
            return float("inf")
        return SIGNIFICANT_GAP * gap_error(trained, many, held_out, few) / max(1 - held_out, 1e-6)

    def state_dict(self) -> dict[str, list[float]]:
        return {"pending": self.pending.tolist(), "running": self.running.tolist(), "meta_weight": self.meta_weight}

    def load_state_dict(self, state: dict[str, list[float]]):
        self.pending[:], self.running[:], self.meta_weight = state["pending"], state["running"], state["meta_weight"]
