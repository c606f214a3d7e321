"""How noisy the labels are, and which ones: a transition matrix fitted to what training saw of every sample.

Shapes: n samples, k classes, c = min(k - 1, 9) top labels followed beside the given one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .dynamics import DECAY


SIGNIFICANT_GAP = 2.0  # standard errors by which the gap must differ from none
SHARPEST = 20.0  # exponent at which a probability is as good as 0 or 1
LEAST_SKILL = 0.1  # agreement beyond a constant prediction, as a share of what is possible
LEAST_KNOWLEDGE = 0.5  # confidence beyond guessing, likewise
FIT_ON = 50_000  # samples that the transition matrix is estimated on; all are scored
FEWEST_HELD_OUT = 100  # labels that no loss saw, for the noise rate to be estimated on them alone
DRAWN_FOR = 3_000  # samples whose predictions are drawn again to find the inverse temperature
LONGEST = 40  # predictions of a sample that are drawn; earlier ones weigh less than 2 %
REPLICATES = 20
REPLICATE_SIZE = 5_000  # samples in one of them, at most
DENSE = 1_000  # classes; with more only the pairs that occur are worked on, and no pair has a range


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


def doubt_of_rate(agreement: float, labels: np.ndarray, confidence: float | None = None) -> str | None:
    """Why a noise rate tells nothing, in words; None where nothing speaks against it.

    A rate is the part of the disagreement with given labels that is not the predictor's own. Where predictions agree
    hardly more often than a constant one, nearly all labels may be wrong, or the predictor may know nothing: labels
    alone cannot tell these apart. The same holds where the noise model itself takes the predictor for one that is
    wrong about more than half of what guessing leaves.

    Args:
        agreement (`float`): share of the labels that are predicted, by predictions that have not seen them.
        labels (`np.ndarray` of shape `(n,)`): these labels.
        confidence (`float`, *optional*): mean probability of the most probable class without the label, as the noise
            model that was fitted to the labels has it.
    """
    counts = np.bincount(labels)
    constant, guess = counts.max() / len(labels), 1 / np.count_nonzero(counts)
    if agreement - constant < LEAST_SKILL * (1 - constant):
        return (
            f"The noise rate cannot be trusted: predictions agree with {agreement:.0%} of the labels, and the most "
            f"frequent class is {constant:.0%} of them. Either most labels are wrong, or what predicts them knows "
            "nothing of the classes: random weights, images unlike those of the pretraining, or a training too short."
        )
    if confidence is not None and confidence - guess < LEAST_KNOWLEDGE * (1 - guess):
        return (
            f"The noise rate cannot be trusted: the features are estimated to tell the class of only {confidence:.0%} "
            "of the images, so that most doubt about a label is no sign of a mistake. Take a backbone that was "
            "pretrained on images like these, or larger images."
        )
    return None


@dataclass(frozen=True)
class NoiseEstimate:
    """What the records of n samples say of their labels.

    Ranges cover resampling and the doubt about the inverse temperature. They are no confidence intervals: how often
    they held the truth is in docs/audit.md.

    Args:
        noise_rate (`float`): share of wrong labels, in [0, 1].
        noise_rate_interval (`list[float]`): low and high of its range.
        transition_matrix (`np.ndarray` of shape `(k, k)`): `[i, j] = P(given j | true i)`; rows sum to 1.
        transition_matrix_interval (`np.ndarray` of shape `(2, k, k)`, *optional*): low and high; with more than 1,000
            classes there is none.
        inverse_temperature (`float`): b, the exponent of the teacher's probabilities.
        log_odds (`np.ndarray` of shape `(n,)`): of "wrong".
        suggested_label (`np.ndarray` of shape `(n,)`): the most probable label other than the given one.
        suggested_probability (`np.ndarray` of shape `(n,)`): the teacher's running probability of it.
    """

    noise_rate: float
    noise_rate_interval: list[float]
    transition_matrix: np.ndarray
    transition_matrix_interval: np.ndarray | None
    inverse_temperature: float
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

    The true class c of a sample is hidden. The teacher gives pi_c = q_c^b exp(a_c) / sum, its running
    probabilities sharpened by b, and the given label y comes out of a transition matrix T: P(c, y) = pi_c T[c, y].
    T and the class offsets a are estimated by expectation maximization on the given labels alone (the
    noise-adaptation layer of Goldberger & Ben-Reuven, ICLR 2017, fitted after training); a label is wrong with P(c
    != y | y) = 1 - pi_y T[y, y] / sum_c pi_c T[c, y].

    A network trained on noisy labels is less sure than it is right, so b must not come from the given labels. It
    comes from the student's predictions: b is such that as many predictions drawn from pi have the same mean
    frequency of a sample's most frequent one. (The mean of max_c pi_c would be lower: of two draws of a fair coin
    the most frequent side has 75 %.) That predictions of one run agree as often as they are right is the
    observation of Jiang et al. (ICLR 2022, "Assessing generalization via disagreement"); that it serves here is
    ours. With a single prediction b is the value of highest likelihood, which errs towards fewer wrong labels if
    the labels were learned.

    Where the run kept labels from every loss, at least 100 of them, and predicts significantly more of the others,
    b, T and the rate are estimated on these alone, which no prediction has memorized, and the log odds of all
    samples are shifted by one number so that their mean probability is that rate. Where it does not, nothing tells
    the two apart and all labels are used: a tenth of them, or less, would only be a less certain sample of the
    same.

    Predictions of a cross-validation have memorized no label, and there may be one for every sample: where they
    are given, b, T and the rate come from them, with b at its highest likelihood. The log odds of a sample are
    then the mean of both, for they err in different places, before the shift to that rate.

    Args:
        records (structured `np.ndarray` of shape `(n,)`): of [`TrainingDynamics`], each seen at least once.
        num_labels (`int`): k.
        cross_validated (structured `np.ndarray` of shape `(m,)`, *optional*): of samples of the same dataset, by
            models that did not learn their labels ([`judge_records`]); fewer than 100 are left out.
        seed (`int`): of the resampling behind the ranges.
    """
    dynamics = SampleDynamics(records, num_labels)
    generator = np.random.default_rng(seed)
    fit_on = dynamics
    if len(dynamics) > FIT_ON:
        fit_on = dynamics.take(generator.choice(len(dynamics), FIT_ON, replace=False))
    inverse_temperature, other_reading = _inverse_temperature(fit_on)
    transition_matrix, offsets = fit_on.fit_transitions(inverse_temperature)
    log_odds, slot = dynamics.log_odds(inverse_temperature, transition_matrix, offsets)

    if cross_validated is not None and len(cross_validated) < FEWEST_HELD_OUT:
        cross_validated = None
    judged = _judges(dynamics, records["held_out"], cross_validated, generator)
    if judged is None:
        rate = float(_probability(log_odds).mean())
        rates, matrices = _replicates(
            fit_on, transition_matrix, offsets, inverse_temperature, other_reading, generator
        )
        rates += rate - fit_on.rate(inverse_temperature, transition_matrix, offsets)  # of the subsample
    else:
        own, other_reading = _inverse_temperature(judged)
        transition_matrix, offsets = judged.fit_transitions(own)
        rate = judged.rate(own, transition_matrix, offsets)
        rates, matrices = _replicates(judged, transition_matrix, offsets, own, other_reading, generator)
        log_odds = log_odds + _shift_to(rate, log_odds)
        if cross_validated is not None:
            _, rows, asked = np.intersect1d(records["index"], cross_validated["index"], return_indices=True)
            others, _ = SampleDynamics(cross_validated[asked], num_labels).log_odds(own, transition_matrix, offsets)
            log_odds[rows] = (log_odds[rows] + others) / 2
            log_odds = log_odds + _shift_to(rate, log_odds)
    low, high = (float(np.quantile(rates, share)) for share in (0.025, 0.975))
    interval = None
    if matrices is not None:
        lowest, highest = np.quantile(matrices, [0.025, 0.975], axis=0)
        interval = np.stack([np.minimum(lowest, transition_matrix), np.maximum(highest, transition_matrix)])

    everyone = np.arange(len(dynamics))
    return NoiseEstimate(
        noise_rate=rate,
        noise_rate_interval=[min(low, rate), max(high, rate)],
        transition_matrix=transition_matrix,
        transition_matrix_interval=interval,
        inverse_temperature=inverse_temperature,
        log_odds=log_odds,
        suggested_label=dynamics.classes[everyone, slot],
        suggested_probability=dynamics.probabilities[everyone, slot],
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
    dynamics = SampleDynamics(records, num_labels)
    judged = _judges(dynamics, records["held_out"], None, generator) or dynamics
    inverse_temperature, _ = _inverse_temperature(judged)
    return judged.rate(inverse_temperature, *judged.fit_transitions(inverse_temperature))


class SampleDynamics:
    """The training dynamics of n samples on the c + 1 labels that it followed: the given one first.

    Args:
        records (structured `np.ndarray` of shape `(n,)`): of [`TrainingDynamics`].
        num_labels (`int`): k.
    """

    def __init__(self, records: np.ndarray, num_labels: int):
        self.records, self.num_labels, self.labels = records, num_labels, records["label"].astype(np.int64)
        # column by column in memory, where sums over the few classes of a sample are several times as fast
        classes = np.asfortranarray(np.concatenate([self.labels[:, None], records["top_labels"]], axis=1))
        self.free = classes < 0
        self.classes = np.where(self.free, 0, classes).astype(np.int64)
        self.probabilities = np.concatenate([records["given"][:, None], records["top_probabilities"]], axis=1).astype(
            float
        )
        self.frequencies = np.concatenate(
            [records["given_frequency"][:, None], records["top_frequencies"]], axis=1
        ).astype(float)
        self.log_p = np.asfortranarray(np.where(self.free, -np.inf, np.log(self.probabilities + 1e-6)))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "SampleDynamics":
        """Those of some samples, which may repeat."""
        return SampleDynamics(self.records[rows], self.num_labels)

    def prior(self, inverse_temperature: float, offsets: np.ndarray | None = None) -> np.ndarray:
        """pi of shape `(n, c + 1)`."""
        scaled = inverse_temperature * self.log_p + (0 if offsets is None else offsets[self.classes])
        scaled = np.exp(scaled - scaled.max(-1, keepdims=True))
        return scaled / scaled.sum(-1, keepdims=True)

    def joint(
        self, inverse_temperature: float, transition_matrix: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """pi_c T[c, y] of shape `(n, c + 1)`, and pi."""
        prior = self.prior(inverse_temperature, offsets)
        return prior * transition_matrix[self.classes, self.labels[:, None]], prior

    def log_odds(
        self, inverse_temperature: float, transition_matrix: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log odds of "wrong", and the slot of the best other label, both of shape `(n,)`."""
        joint, _ = self.joint(inverse_temperature, transition_matrix, offsets)
        others = np.where(self.free, -1.0, joint)[:, 1:]
        with np.errstate(divide="ignore"):
            odds = np.log(joint[:, 1:].sum(-1)) - np.log(joint[:, 0])
        return np.nan_to_num(odds, neginf=-745.0, posinf=745.0), 1 + others.argmax(-1)

    def rate(self, inverse_temperature: float, transition_matrix: np.ndarray, offsets: np.ndarray) -> float:
        """Mean probability of "wrong"."""
        joint, _ = self.joint(inverse_temperature, transition_matrix, offsets)
        return float(1 - (joint[:, 0] / joint.sum(-1)).mean())

    def likelihood(self, inverse_temperature: float, transition_matrix: np.ndarray, offsets: np.ndarray) -> float:
        """Mean log probability of the given labels."""
        return float(np.log(self.joint(inverse_temperature, transition_matrix, offsets)[0].sum(-1)).mean())

    def fit_transitions(
        self, inverse_temperature: float, *, start: tuple[np.ndarray, np.ndarray] | None = None, iterations: int = 200
    ) -> tuple[np.ndarray, np.ndarray]:
        """T of shape `(k, k)` and a of shape `(k,)` by expectation maximization; each class has one sure sample.

        Of the k^2 cells only those differ from 0 that samples point at: with thousands of classes they are few.
        """
        k = self.num_labels
        pointed_at, own = self.classes * k + self.labels[:, None], np.arange(k) * (k + 1)
        known: np.ndarray | list = [] if start is None else np.flatnonzero(start[0])
        cells = np.unique(np.concatenate([pointed_at.ravel(), own, known]).astype(np.int64))
        at = np.asfortranarray(np.searchsorted(cells, pointed_at))
        places, classes = at.ravel("K"), self.classes.ravel("K")
        sure, rows = np.searchsorted(cells, own), cells // k
        if start is None:
            transition_matrix = np.full(len(cells), 0.3 / (k - 1))
            transition_matrix[sure] = 0.7
            offsets = np.zeros(k)
        else:
            transition_matrix, offsets = start[0].ravel()[cells], start[1]
        matrix = np.zeros((k, k))
        for _ in range(iterations):
            prior = self.prior(inverse_temperature, offsets)
            joint = prior * transition_matrix[at]
            resolved = joint / joint.sum(-1, keepdims=True)
            counts = np.bincount(places, weights=resolved.ravel("K"), minlength=len(cells))
            counts[sure] += 1
            if k <= DENSE:
                matrix.ravel()[cells] = counts
                sums = matrix.sum(-1)
            else:  # the same up to rounding
                sums = np.bincount(rows, weights=counts)
            updated = counts / sums[rows]
            found = np.bincount(classes, weights=resolved.ravel("K"), minlength=k)
            expected = np.bincount(classes, weights=prior.ravel("K"), minlength=k)
            offsets = offsets + 0.5 * (np.log(found + 1) - np.log(expected + 1))
            done = np.abs(updated - transition_matrix).max() < 1e-5
            transition_matrix = updated
            if done:
                break
        matrix.ravel()[cells] = transition_matrix
        return matrix, offsets


def _judges(dynamics: SampleDynamics, held_out: np.ndarray, cross_validated, generator) -> SampleDynamics | None:
    """What the rate is estimated on instead of all records, or None."""
    if cross_validated is not None:
        judged = SampleDynamics(cross_validated, dynamics.num_labels)
        rows = generator.permutation(len(judged))[:FIT_ON]
        return judged.take(np.sort(rows))
    rows = np.flatnonzero(held_out)
    if len(rows) < FEWEST_HELD_OUT or len(rows) == len(held_out) or not _memorizes(dynamics, held_out):
        return None
    return dynamics.take(rows)


def _memorizes(dynamics: SampleDynamics, held_out: np.ndarray) -> bool:
    """Whether the teacher predicts the labels trained on more often than those held out, `(n,)` bool, by as many
    standard errors as the monitor asks for."""
    agrees = dynamics.probabilities[:, 0] > dynamics.probabilities[:, 1:].max(-1)
    trained, unseen = agrees[~held_out].mean(), agrees[held_out].mean()
    few = held_out.sum()
    return bool(trained - unseen > SIGNIFICANT_GAP * gap_error(trained, len(held_out) - few, unseen, few))


def _inverse_temperature(dynamics: SampleDynamics) -> tuple[float, float]:
    """b, and a second reading of it that says how certain the first is."""
    if not (dynamics.records["times_seen"] > 1).any():  # one prediction always agrees with itself
        best = _likeliest(dynamics, np.geomspace(0.5, SHARPEST, 9))
        best = _likeliest(dynamics, best * np.geomspace(0.7, 1.4, 5))
        memorized = not dynamics.records["held_out"].all()
        return best, best * (2 if memorized else 2**0.5)
    some = np.random.default_rng(0).permutation(len(dynamics))[:DRAWN_FOR]
    drawn = dynamics if len(dynamics) <= DRAWN_FOR else dynamics.take(np.sort(some))
    weights = _prediction_weights(drawn.records["times_seen"])
    draws = np.random.default_rng(1).random(weights.shape)
    most = _match(drawn.frequencies.max(-1).mean(), lambda b: _drawn(drawn.prior(b), weights, draws).max(-1).mean())
    alike, several = (weights**2).sum(-1), drawn.records["times_seen"] > 1  # a prediction agrees with itself
    agree = ((drawn.frequencies**2).sum(-1) - alike)[several] / (1 - alike)[several]
    return most, _match(agree.mean(), lambda b: drawn.prior(b).max(-1).mean())


def _prediction_weights(times_seen: np.ndarray) -> np.ndarray:
    """Share of each prediction in the running frequencies of a sample, the last one first; 0 beyond those it had."""
    number = np.arange(min(times_seen.max(), LONGEST))
    weights = DECAY**number * (number < times_seen[:, None])
    return weights / weights.sum(-1, keepdims=True)


def _drawn(prior: np.ndarray, weights: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Frequencies of labels, of the shape `(n, c + 1)` of `prior`, that are drawn from it at each prediction.

    Args:
        weights (`np.ndarray` of shape `(n, t)`): of [`_prediction_weights`].
        draws (`np.ndarray` of shape `(n, t)`): in [0, 1).
    """
    frequencies, samples, cumulative = np.zeros(prior.shape), np.arange(len(prior)), prior.cumsum(-1)
    for number in range(weights.shape[1]):
        label = (draws[:, number, None] > cumulative).sum(-1).clip(max=prior.shape[1] - 1)
        frequencies[samples, label] += weights[:, number]
    return frequencies


def _likeliest(dynamics: SampleDynamics, grid: np.ndarray) -> float:
    """The b of a grid at which the given labels are most probable."""
    fits = [dynamics.likelihood(b, *dynamics.fit_transitions(b, iterations=40)) for b in grid]
    return float(grid[int(np.argmax(fits))])


def _match(target: float, predicted: Callable[[float], float]) -> float:
    """b at which what it predicts is `target`, by bisection."""
    low, high = 0.1, SHARPEST
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if predicted(middle) < target else (low, middle)
    return float((low * high) ** 0.5)


def _replicates(
    dynamics, transition_matrix, offsets, inverse_temperature, other_reading, generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rates `(r,)` and, up to 1,000 classes, matrices `(r, k, k)` over resampled samples and the doubt about b."""
    spread = abs(np.log(other_reading / inverse_temperature))
    rates, matrices = [], []
    for doubt in np.linspace(-2, 2, REPLICATES):  # the readings differ by 1
        b = float(np.clip(inverse_temperature * np.exp(doubt * spread), 0.1, SHARPEST))
        part = dynamics.take(generator.integers(0, len(dynamics), min(len(dynamics), REPLICATE_SIZE)))
        fitted = part.fit_transitions(b, start=(transition_matrix, offsets), iterations=15)
        rates.append(part.rate(b, *fitted))
        if dynamics.num_labels <= DENSE:
            matrices.append(fitted[0])
    return np.array(rates), np.array(matrices) if matrices else None


def _probability(log_odds: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))


def _shift_to(rate: float, log_odds: np.ndarray) -> float:
    """What to add to all log odds so that the mean probability is `rate`, by bisection."""
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(log_odds + middle).mean() < rate else (low, middle)
    return middle
