"""How noisy the labels are, and which ones: a noise channel fitted to what training saw of every sample.

Shapes: n samples, k classes, c = min(k - 1, 9) candidate labels followed beside the given one.
"""

from dataclasses import dataclass

import numpy as np


SIGNIFICANT_GAP = 2.0  # standard errors by which the gap must differ from none
SHARPEST = 20.0  # exponent at which a prediction is a vote
FIT_ON = 50_000  # samples that the channel is estimated on; all are scored
FEWEST_HELD_OUT = 100  # labels that no loss saw, for the rate to be estimated on them alone
REPLICATES = 20
REPLICATE_SIZE = 5_000  # samples in one of them, at most
DENSE = 1_000  # classes; with more only the pairs that occur are worked on, and no pair has an interval


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


@dataclass(frozen=True)
class NoiseEstimate:
    """What the records of n samples say of their labels; intervals are of 95 %.

    Args:
        noise_rate (`float`): share of wrong labels, in [0, 1].
        noise_rate_interval (`list[float]`): low and high.
        transition_matrix (`np.ndarray` of shape `(k, k)`): `[i, j] = P(given j | true i)`; rows sum to 1.
        transition_matrix_interval (`np.ndarray` of shape `(2, k, k)`, *optional*): low and high; with more than 1,000
            classes there is none.
        sharpness (`float`): b, the exponent of the teacher's probabilities.
        log_odds (`np.ndarray` of shape `(n,)`): of "wrong".
        suggested_label (`np.ndarray` of shape `(n,)`): the most probable label other than the given one.
        suggested_probability (`np.ndarray` of shape `(n,)`): the teacher's running probability of it.
    """

    noise_rate: float
    noise_rate_interval: list[float]
    transition_matrix: np.ndarray
    transition_matrix_interval: np.ndarray | None
    sharpness: float
    log_odds: np.ndarray
    suggested_label: np.ndarray
    suggested_probability: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """Probability that each label is wrong, of shape `(n,)`."""
        return _probability(self.log_odds)


def estimate_noise(
    records: np.ndarray, num_labels: int, *, cross_validated: np.ndarray | None = None, seed: int = 0
) -> NoiseEstimate:
    """Estimate for every sample the odds that its label is wrong, and how noisy the labels are as a whole.

    The true class c of a sample is hidden. The teacher gives pi_c = q_c^b exp(a_c) / sum, its running probabilities
    sharpened by b, and the given label y comes out of a channel T: P(c, y) = pi_c T[c, y]. T and the class offsets a
    are estimated by expectation maximisation on the given labels alone (the noise-adaptation layer of Goldberger &
    Ben-Reuven, ICLR 2017, fitted after training); a label is wrong with P(c != y | y) = 1 - pi_y T[y, y] / sum_c pi_c
    T[c, y].

    A network trained on noisy labels is less sure than it is right, so b must not come from the given labels. It comes
    from the student's votes: b is such that the mean of max_c pi_c equals the mean share of the most frequent vote of
    a sample. That votes of one run are as often of one opinion as they are right is the observation of Jiang et al.
    (ICLR 2022, "Assessing generalization via disagreement"); that it serves here is ours. Without votes (a single
    visit) b is the value of highest likelihood, which errs towards fewer wrong labels if the labels were learned.

    Where the run kept labels from every loss, at least 100 of them, and fits the others significantly better, b, T and
    the rate are estimated on these alone, which no prediction knows by heart, and the log odds of all samples are
    shifted by one number so that their mean probability is that rate. Where it does not, nothing tells the two apart
    and all labels are used: a tenth of them, or less, would only be a less certain sample of the same.

    Predictions of a cross-validation know no label by heart, and there may be one for every sample: where they are
    given, b, T and the rate come from them, with b at its highest likelihood. The log odds of a sample are then the
    mean of both, for they err in different places, before the shift to that rate.

    Args:
        records (structured `np.ndarray` of shape `(n,)`): of [`SampleStatistics`], each seen at least once.
        num_labels (`int`): k.
        cross_validated (structured `np.ndarray` of shape `(m,)`, *optional*): of samples of the same dataset, by
            models that did not learn their labels ([`cross_validate_probe`]); fewer than 100 are left out.
        seed (`int`): of the resampling behind the intervals.
    """
    opinions = Opinions(records, num_labels)
    generator = np.random.default_rng(seed)
    fit_on = opinions
    if len(opinions) > FIT_ON:
        fit_on = opinions.take(generator.choice(len(opinions), FIT_ON, replace=False))
    sharpness, other_sharpness = _sharpness(fit_on)
    channel, offsets = fit_on.fit_channel(sharpness)
    log_odds, slot = opinions.log_odds(sharpness, channel, offsets)

    if cross_validated is not None and len(cross_validated) < FEWEST_HELD_OUT:
        cross_validated = None
    judged = _judges(opinions, records["held_out"], cross_validated, generator)
    if judged is None:
        rate = float(_probability(log_odds).mean())
        rates, channels = _replicates(fit_on, channel, offsets, sharpness, other_sharpness, generator)
        rates += rate - fit_on.rate(sharpness, channel, offsets)  # of the subsample
    else:
        own_sharpness, other_sharpness = _sharpness(judged)
        channel, offsets = judged.fit_channel(own_sharpness)
        rate = judged.rate(own_sharpness, channel, offsets)
        rates, channels = _replicates(judged, channel, offsets, own_sharpness, other_sharpness, generator)
        log_odds = log_odds + _shift_to(rate, log_odds)
        if cross_validated is not None:
            _, rows, asked = np.intersect1d(records["index"], cross_validated["index"], return_indices=True)
            others, _ = Opinions(cross_validated[asked], num_labels).log_odds(own_sharpness, channel, offsets)
            log_odds[rows] = (log_odds[rows] + others) / 2
            log_odds = log_odds + _shift_to(rate, log_odds)
    low, high = np.quantile(rates, [0.025, 0.975])
    interval = None
    if channels is not None:
        lowest, highest = np.quantile(channels, [0.025, 0.975], axis=0)
        interval = np.stack([np.minimum(lowest, channel), np.maximum(highest, channel)])

    everyone = np.arange(len(opinions))
    return NoiseEstimate(
        noise_rate=rate,
        noise_rate_interval=[float(min(low, rate)), float(max(high, rate))],
        transition_matrix=channel,
        transition_matrix_interval=interval,
        sharpness=sharpness,
        log_odds=log_odds,
        suggested_label=opinions.classes[everyone, slot],
        suggested_probability=opinions.probabilities[everyone, slot],
    )


def estimate_noise_rate(records: np.ndarray, num_labels: int, *, seed: int = 0) -> float:
    """The rate of [`estimate_noise`] alone, without what costs most: replicates, and scores of all samples.

    Args:
        records, num_labels, seed: see [`estimate_noise`]. Of over 50,000 samples so many are looked at, and all those
            held out.

    Returns:
        `float`: share of wrong labels, in [0, 1].
    """
    generator = np.random.default_rng(seed)
    if len(records) > FIT_ON:
        some = generator.choice(len(records), FIT_ON, replace=False)
        records = records[np.union1d(some, np.flatnonzero(records["held_out"]))]
    opinions = Opinions(records, num_labels)
    judged = _judges(opinions, records["held_out"], None, generator) or opinions
    sharpness, _ = _sharpness(judged)
    return judged.rate(sharpness, *judged.fit_channel(sharpness))


class Opinions:
    """What a run thinks of n samples, on the c + 1 labels that it followed: the given one first.

    Args:
        records (structured `np.ndarray` of shape `(n,)`): of [`SampleStatistics`].
        num_labels (`int`): k.
    """

    def __init__(self, records: np.ndarray, num_labels: int):
        self.records, self.num_labels, self.labels = records, num_labels, records["label"].astype(np.int64)
        classes = np.concatenate([self.labels[:, None], records["candidate_labels"]], axis=1)
        self.free = classes < 0
        self.classes = np.where(self.free, 0, classes).astype(np.int64)
        self.probabilities = np.concatenate([records["given"][:, None], records["candidates"]], axis=1).astype(float)
        self.votes = np.concatenate([records["given_votes"][:, None], records["votes"]], axis=1).astype(float)
        self.log_p = np.where(self.free, -np.inf, np.log(self.probabilities + 1e-6))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Opinions":
        """Those of some samples, which may repeat."""
        return Opinions(self.records[rows], self.num_labels)

    def prior(self, sharpness: float, offsets: np.ndarray | None = None) -> np.ndarray:
        """pi of shape `(n, c + 1)`."""
        scaled = sharpness * self.log_p + (0 if offsets is None else offsets[self.classes])
        scaled = np.exp(scaled - scaled.max(-1, keepdims=True))
        return scaled / scaled.sum(-1, keepdims=True)

    def joint(self, sharpness: float, channel: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """pi_c T[c, y] of shape `(n, c + 1)`, and pi."""
        prior = self.prior(sharpness, offsets)
        return prior * channel[self.classes, self.labels[:, None]], prior

    def log_odds(self, sharpness: float, channel: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log odds of "wrong", and the slot of the best other label, both of shape `(n,)`."""
        joint, _ = self.joint(sharpness, channel, offsets)
        others = np.where(self.free, -1.0, joint)[:, 1:]
        with np.errstate(divide="ignore"):
            odds = np.log(joint[:, 1:].sum(-1)) - np.log(joint[:, 0])
        return np.nan_to_num(odds, neginf=-745.0, posinf=745.0), 1 + others.argmax(-1)

    def rate(self, sharpness: float, channel: np.ndarray, offsets: np.ndarray) -> float:
        """Mean probability of "wrong"."""
        joint, _ = self.joint(sharpness, channel, offsets)
        return float(1 - (joint[:, 0] / joint.sum(-1)).mean())

    def likelihood(self, sharpness: float, channel: np.ndarray, offsets: np.ndarray) -> float:
        """Mean log probability of the given labels."""
        return float(np.log(self.joint(sharpness, channel, offsets)[0].sum(-1)).mean())

    def fit_channel(
        self, sharpness: float, *, start: tuple[np.ndarray, np.ndarray] | None = None, iterations: int = 200
    ) -> tuple[np.ndarray, np.ndarray]:
        """T of shape `(k, k)` and a of shape `(k,)` by expectation maximisation; each class has one sure sample.

        Of the k^2 cells only those differ from 0 that samples point at: with thousands of classes they are few.
        """
        k = self.num_labels
        pointed_at, sure = self.classes * k + self.labels[:, None], np.arange(k) * (k + 1)
        known = [] if start is None else np.flatnonzero(start[0])
        cells = np.unique(np.concatenate([pointed_at.ravel(), sure, known]).astype(np.int64))
        at, sure, rows = np.searchsorted(cells, pointed_at), np.searchsorted(cells, sure), cells // k
        if start is None:
            channel = np.full(len(cells), 0.3 / (k - 1))
            channel[sure] = 0.7
            offsets = np.zeros(k)
        else:
            channel, offsets = start[0].ravel()[cells], start[1]
        matrix = np.zeros((k, k))
        for _ in range(iterations):
            prior = self.prior(sharpness, offsets)
            joint = prior * channel[at]
            resolved = joint / joint.sum(-1, keepdims=True)
            counts = np.bincount(at.ravel(), weights=resolved.ravel(), minlength=len(cells))
            counts[sure] += 1
            if k <= DENSE:
                matrix.ravel()[cells] = counts
                sums = matrix.sum(-1)
            else:  # the same but for rounding
                sums = np.bincount(rows, weights=counts)
            updated = counts / sums[rows]
            found = np.bincount(self.classes.ravel(), weights=resolved.ravel(), minlength=k)
            expected = np.bincount(self.classes.ravel(), weights=prior.ravel(), minlength=k)
            offsets = offsets + 0.5 * (np.log(found + 1) - np.log(expected + 1))
            done = np.abs(updated - channel).max() < 1e-5
            channel = updated
            if done:
                break
        matrix.ravel()[cells] = channel
        return matrix, offsets


def _judges(opinions: Opinions, held_out: np.ndarray, cross_validated, generator) -> Opinions | None:
    """What the rate is estimated on instead of all records, or None."""
    if cross_validated is not None:
        judged = Opinions(cross_validated, opinions.num_labels)
        rows = generator.permutation(len(judged))[:FIT_ON]
        return judged.take(np.sort(rows))
    rows = np.flatnonzero(held_out)
    if len(rows) < FEWEST_HELD_OUT or len(rows) == len(held_out) or not _memorizes(opinions, held_out):
        return None
    return opinions.take(rows)


def _memorizes(opinions: Opinions, held_out: np.ndarray) -> bool:
    """Whether the teacher predicts the labels that were taught more often than those held out, `(n,)` bool, by as many
    standard errors as the gauge asks for."""
    fitted = opinions.probabilities[:, 0] > opinions.probabilities[:, 1:].max(-1)
    taught, unseen = fitted[~held_out].mean(), fitted[held_out].mean()
    few = held_out.sum()
    return bool(taught - unseen > SIGNIFICANT_GAP * gap_error(taught, len(held_out) - few, unseen, few))


def _sharpness(opinions: Opinions) -> tuple[float, float]:
    """b, and a second reading of it that says how far the first may be trusted."""
    if not (opinions.records["times_seen"] > 1).any():  # one vote is always of one opinion
        best = _likeliest(opinions, np.geomspace(0.5, SHARPEST, 9))
        best = _likeliest(opinions, best * np.geomspace(0.7, 1.4, 5))
        known_by_heart = not opinions.records["held_out"].all()
        return best, best * (2 if known_by_heart else 2**0.5)
    most, agree = opinions.votes.max(-1).mean(), (opinions.votes**2).sum(-1).mean()
    return _match(opinions, most), _match(opinions, agree)


def _likeliest(opinions: Opinions, grid: np.ndarray) -> float:
    """The b of a grid at which the given labels are most probable."""
    fits = [opinions.likelihood(b, *opinions.fit_channel(b, iterations=40)) for b in grid]
    return float(grid[int(np.argmax(fits))])


def _match(opinions: Opinions, target: float) -> float:
    """b at which the mean of max_c pi_c is `target`, by bisection."""
    low, high = 0.1, SHARPEST
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if opinions.prior(middle).max(-1).mean() < target else (low, middle)
    return float((low * high) ** 0.5)


def _replicates(
    opinions, channel, offsets, sharpness, other_sharpness, generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rates `(r,)` and, up to 1,000 classes, channels `(r, k, k)` over resampled samples and the doubt about b."""
    spread = abs(np.log(other_sharpness / sharpness))
    rates, channels = [], []
    for doubt in np.linspace(-2, 2, REPLICATES):  # the readings differ by 1
        b = float(np.clip(sharpness * np.exp(doubt * spread), 0.1, SHARPEST))
        part = opinions.take(generator.integers(0, len(opinions), min(len(opinions), REPLICATE_SIZE)))
        fitted = part.fit_channel(b, start=(channel, offsets), iterations=15)
        rates.append(part.rate(b, *fitted))
        if opinions.num_labels <= DENSE:
            channels.append(fitted[0])
    return np.array(rates), np.array(channels) if channels else None


def _probability(log_odds: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))


def _shift_to(rate: float, log_odds: np.ndarray) -> float:
    """What to add to all log odds so that the mean probability is `rate`, by bisection."""
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(log_odds + middle).mean() < rate else (low, middle)
    return middle
