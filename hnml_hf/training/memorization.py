"""How much of what a network fits is memorised: the dial of the meta terms."""

import numpy as np
import torch


UPDATE_EVERY = 32  # steps; the trainer has gathered what the processes saw by then
LABELS_HELD_OUT = 500  # as far as the shares in `default_fraction` allow
SIGNIFICANT_GAP = 2.0  # standard errors by which the gap must differ from none
FULL_AT = 0.2  # share of the unpredictable labels memorised, beyond that, at which the dial is at 1


def default_fraction(samples: int) -> float:
    """Share of the samples to hold out: 500 of them tell fits apart by a few per cent, and few need a larger share."""
    return min(max(LABELS_HELD_OUT / samples, 0.01), 0.1)


def create_gauge(args, samples: int) -> "MemorizationGauge | None":
    """The gauge of a run, or None where its objective has none.

    Args:
        args ([`HNMLTrainingArguments`]): objective, seed and `gauge_fraction`.
        samples (`int`): of the training set.
    """
    if args.objective != "hnml" or args.gauge_fraction == 0:
        return None
    fraction = args.gauge_fraction or default_fraction(samples)
    return MemorizationGauge(fraction=fraction, seed=args.seed, samples=samples)


def gap_error(first: float, first_seen: float, second: float, second_seen: float) -> float:
    """Standard error of the difference of two shares, each of so many samples.

    Two successes and two failures are added to either (Agresti & Coull, The American Statistician 1998), so that a
    share of 0 of a few samples is not taken for a sure one.
    """
    variance = 0.0
    for share, seen in ((first, first_seen), (second, second_seen)):
        smoothed = (share * seen + 2) / (seen + 4)
        variance += smoothed * (1 - smoothed) / (seen + 4)
    return variance**0.5


class MemorizationGauge:
    """Keeps the labels of a few training samples from every loss, and compares how well they are fitted with how well
    the others are: in the same batches, by the same network, under the same augmentation.

    With f the share of the taught labels that the network predicts and g that of the labels held out, r = (f - g) /
    (1 - g) is the share of the labels that cannot be predicted, be they wrong or hard, which it knows by heart. The
    strength of the meta terms is 0 until r is significant, then grows in proportion, and is 1 at `FULL_AT` above.
    Nothing is asked of the user, and nothing of a clean label. The construction is ours. That networks first learn
    what generalises and then by heart is the observation of Arpit et al., ICML 2017.

    With `inner_direction="synthetic"` the held-out labels still are among those that neighbours pass on to the virtual
    step; the losses that move the weights do not see them.

    Args:
        fraction (`float`): share of the samples held out, in (0, 1).
        seed (`int`): of the choice, together with the sample ids.
        samples (`int`): samples per epoch, the time constant of the running averages.
    """

    def __init__(self, *, fraction: float, seed: int, samples: int):
        self.fraction, self.seed, self.samples = fraction, seed, samples
        self.pending = np.zeros(4, np.int64)  # taught: fitted, seen; held out: fitted, seen
        self.running = np.zeros(4)
        self.strength = 0.0

    def held_out(self, index: torch.Tensor) -> torch.Tensor:
        """Which samples are held out, a function of seed and sample id.

        Args:
            index (`torch.LongTensor` of shape `(b,)`): sample ids.

        Returns:
            `torch.BoolTensor` of shape `(b,)`.
        """
        mixed = index + 0x9E3779B97F4A7C15 * (self.seed + 1) % 2**63
        for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):  # the finalizer of SplitMix64
            mixed = (mixed ^ (mixed >> shift)) * factor
        return ((mixed ^ (mixed >> 31)) & 0xFFFFFF) < self.fraction * 2**24

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
