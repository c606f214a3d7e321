"""How much of what a network fits is memorised: the dial of the meta terms."""

import numpy as np

from ..audit.noise_model import SIGNIFICANT_GAP, gap_error
from .args import HNML_OBJECTIVES


UPDATE_EVERY = 32  # steps; the trainer has gathered what the processes saw by then
LABELS_HELD_OUT = 500  # as far as the shares in `default_fraction` allow
FULL_AT = 0.2  # share of the unpredictable labels memorised, beyond that, at which the dial is at 1


def default_fraction(samples: int) -> float:
    """Share of the samples to hold out: 500 of them tell fits apart by a few per cent, and few need a larger share."""
    return min(max(LABELS_HELD_OUT / samples, 0.01), 0.1)


def create_gauge(args, samples: int) -> "MemorizationGauge | None":
    """The gauge of a run, or None where its objective has none.

    Args:
        args ([`HNMLTrainingArguments`]): objective and `gauge_fraction`.
        samples (`int`): of the training set.
    """
    if args.objective not in HNML_OBJECTIVES or args.gauge_fraction == 0:
        return None
    fraction = args.gauge_fraction or default_fraction(samples)
    return MemorizationGauge(fraction=fraction, samples=samples)


class MemorizationGauge:
    """Keeps the labels of a few training samples from every loss, and compares how well they are fitted with how well
    the others are: in the same batches, by the same network, under the same augmentation.

    With f the share of the taught labels that the network predicts and g that of the labels held out, r = (f - g) /
    (1 - g) is the share of the labels that cannot be predicted, be they wrong or hard, which it knows by heart. The
    strength of the meta terms is 0 until r is significant, then grows in proportion, and is 1 at `FULL_AT` above.
    Nothing is asked of the user, and nothing of a clean label. The construction is ours. That networks first learn
    what generalises and then by heart is the observation of Arpit et al., ICML 2017.

    With `hnml_synthetic` the held-out labels still are among those that neighbours pass on to the virtual
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
        self.pending = np.zeros(4, np.int64)  # taught: fitted, seen; held out: fitted, seen
        self.running = np.zeros(4)
        self.strength = 0.0

    def count(self, held_out: np.ndarray, fitted: np.ndarray):
        """Take visits in.

        Args:
            held_out, fitted (`np.ndarray` of shape `(n,)`, bool): whether a sample is held out, and whether the
                network predicts its given label.
        """
        for place, group in enumerate((~held_out, held_out)):
            self.pending[2 * place] += (group & fitted).sum()
            self.pending[2 * place + 1] += group.sum()

    def update(self):
        """Set the dial from what was counted since the last time."""
        seen = self.pending[1] + self.pending[3]
        self.running = self.running * np.exp(-seen / self.samples) + self.pending
        self.pending[:] = 0
        self.strength = float(np.clip((self.memorized_share() - self.uncertainty()) / FULL_AT, 0.0, 1.0))

    def fits(self) -> tuple[float, float]:
        """f and g."""
        taught, all_taught, held_out, all_held_out = self.running
        return taught / max(all_taught, 1.0), held_out / max(all_held_out, 1.0)

    def memorized_share(self) -> float:
        """r, below 0 where the held-out labels happen to be fitted better."""
        taught, held_out = self.fits()
        return (taught - held_out) / max(1 - held_out, 1e-6)

    def uncertainty(self) -> float:
        """`SIGNIFICANT_GAP` standard errors of r, from the samples seen; infinite before any is held out."""
        taught, held_out = self.fits()
        many = min(self.running[1], (1 - self.fraction) * self.samples)  # the same samples come again
        few = min(self.running[3], self.fraction * self.samples)
        if few < 1:
            return float("inf")
        return SIGNIFICANT_GAP * gap_error(taught, many, held_out, few) / max(1 - held_out, 1e-6)

    def state_dict(self) -> dict[str, list[float]]:
        return {"pending": self.pending.tolist(), "running": self.running.tolist(), "strength": self.strength}

    def load_state_dict(self, state: dict[str, list[float]]):
        self.pending[:], self.running[:], self.strength = state["pending"], state["running"], state["strength"]
