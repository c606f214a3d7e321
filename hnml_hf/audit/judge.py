"""Which labels are wrong, from frozen features, in closed form: a cross-fitted discriminant with a noise model.

Shapes: n samples, d features, k classes, f folds, c top labels of a sample (all k where these are few).

A linear discriminant with a shrunken covariance (Friedman, JASA 1989) needs of each fold only counts, class sums and
one matrix of second moments. They are summed over batches and processes; the classifier that judges a fold is solved
from the totals less the fold's own, so that no label is judged by a classifier that has seen it, and nothing is
refitted. A transition matrix (Goldberger & Ben-Reuven, ICLR 2017) estimated on the given labels turns its predictions
into the probability of each class given image *and* label. The nearest neighbors' probabilities are a second source
of evidence.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import torch

from ..common.devices import usable_device
from ..common.values import require_whole
from ..common.words import counted


SHRINKAGES = (0.3, 0.6)
ROUNDS = 2  # with posteriors instead of labels as targets, where they help
ROUNDS_LIMIT = 100_000  # samples; beyond it they are not tried: that takes up to nine more passes over the features
SHARPENED = 1.5  # what the weights of highest likelihood are multiplied by
SHARPENED_TOO_FAR = 6.0  # and for the high end of the range of the noise rate, where every prediction is almost sure
MARGIN = 0.01  # of the range of the noise rate, at least
FEW_LABELS = 3.0  # what one label per class adds to it
ALL_CLASSES = 256  # up to so many classes every class is a top label of every sample
TOP_LABELS = 32  # and beyond it so many
SPARSE_FROM = 64  # classes for each top label from which on a matrix product with mostly zeros takes longer
NEIGHBORS = 50
NEIGHBOR_DIMENSIONS = 256  # principal components in which neighbors are sought
NEIGHBOR_LIMIT = 100_000  # samples; beyond it an exact search takes longer than all the rest
PROBED = 16  # lists in which the neighbors of a sample are sought instead (docs/ablations.md)
FIT_ON = 20_000  # samples that the noise model is fitted to, or 50 for each class; all are judged
TRIPLES = 20  # samples per pair of classes from which on triples of labels tell a rate
BATCH = 8_192  # rows that are worked on at a time
STRIP = 512  # rows of a symmetric matrix that are computed at a time
NONE = -2.0  # in place of the cosine of a pair that does not count
FLOOR = 1e-4  # least mean posterior of the neighbors
LEAST_SCATTER = 1e-5  # within classes, of a total variance of 1: what float32 tells from none
SAME = 1e-12  # variance of a feature, as a share of the square of its mean, below which it is the same everywhere
LARGEST = 1e17  # feature, whose square float32 can sum
DOUBTLESS = -1e4  # logit of a class that cannot be, which outweighs neighbors whatever its weight


@dataclass(frozen=True)
class Head:
    """A linear classifier on the raw features.

    Args:
        weight (`torch.Tensor` of shape `(k, d)`), bias (`torch.Tensor` of shape `(k,)`): logits = weight h + bias.
    """

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Projection:
    """Onto the first principal components of the standardized features: the space in which images are compared.

    Args:
        center (`torch.Tensor` of shape `(d,)`), basis (`torch.Tensor` of shape `(d, p)`): of the raw features.
    """

    center: torch.Tensor
    basis: torch.Tensor

    def __call__(self, features: np.ndarray) -> torch.Tensor:
        """Unit vectors of features `(n, d)`, of shape `(n, p)`; in float16 beyond 100,000, to save memory."""
        kept = torch.float32 if len(features) <= NEIGHBOR_LIMIT else torch.float16
        vectors = torch.empty(len(features), self.basis.shape[1], dtype=kept, device=self.center.device)
        for rows, batch in _batches(features, self.center.device):
            vectors[rows] = torch.nn.functional.normalize((batch - self.center) @ self.basis, dim=1)
        return vectors


@dataclass(frozen=True)
class Judgement:
    """What the features of n samples say of their labels, in the order of the rows.

    Args:
        posterior (`np.ndarray` of shape `(n, c)`): float32, P(class | image, given label) of the top labels.
        top_labels (`np.ndarray` of shape `(n, c)`): which classes the columns of `posterior` are. Up to 256 classes
            column i is class i.
        log_odds (`np.ndarray` of shape `(n,)`): of "the given label is wrong".
        judged (`np.ndarray` of shape `(n,)`, bool): false where no other fold knows the class; the estimated rate is
            all that is said of such a label.
        noise_rate (`float`): estimated share of wrong labels, in [0, 1].
        noise_rate_range (`tuple[float, float]`): low and high: of the likeliest and of six times as sharp predictions
            and of the labels of neighbors, and the margin of [`rate_margin`]. No confidence interval.
        transition_matrix (`np.ndarray` of shape `(k, k)`): `[i, j] = P(given j | true i)`; rows sum to 1.
        head ([`Head`]): the classifier of all samples, trained on the posterior; its logits are scaled by the inverse
            temperature, so that fine-tuning may start from it.
        shrinkage (`float`): g of the discriminant.
        rounds (`int`): how often posteriors took the place of the labels.
        inverse_temperature (`float`): of its logits.
        agreement (`float`): share of the given labels that the discriminants of the other folds predict.
        confidence (`float`): mean probability of an image's most probable class without its label; what these
            discriminants are estimated to get right.
        nearest (`np.ndarray` of shape `(n, m)`, *optional*): int32, rows of the most similar samples of other groups,
            the most similar first; -1 where there are too few. None where none were sought.
        similarities (`np.ndarray` of shape `(n, m)`, *optional*): float32, their cosines.
        projection ([`Projection`], *optional*): to the space of these cosines; None with `neighbors=0`.
    """

    posterior: np.ndarray
    top_labels: np.ndarray
    log_odds: np.ndarray
    judged: np.ndarray
    noise_rate: float
    noise_rate_range: tuple[float, float]
    transition_matrix: np.ndarray
    head: Head
    shrinkage: float
    rounds: int
    inverse_temperature: float
    agreement: float
    confidence: float
    nearest: np.ndarray | None = None
    similarities: np.ndarray | None = None
    projection: Projection | None = None

    @property
    def noise_scores(self) -> np.ndarray:
        """Probability that each label is wrong, of shape `(n,)`."""
        return 1 / (1 + np.exp(-np.clip(self.log_odds, -700, 700)))

    @property
    def predicted_labels(self) -> np.ndarray:
        """The most probable class of each sample, given its label too, of shape `(n,)`."""
        best = self.posterior.argmax(1)[:, None]
        return np.take_along_axis(self.top_labels, best, 1)[:, 0].astype(np.int64)


def judge_labels(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    num_labels: int,
    folds: int = 5,
    seed: int = 0,
    groups: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    known: np.ndarray | None = None,
    neighbors: int = NEIGHBORS,
    device: torch.device | str | None = None,
) -> Judgement:
    """Judge each given label by classifiers that have not seen it.

    With targets R (rows sum to 1, at first the given labels), standardized features h and everything summed over the
    samples of the other folds:

        N_c = sum_i R_ic    m_c = sum_i R_ic h_i / N_c    W = (sum_i h_i h_i^T - sum_c N_c m_c m_c^T) / n
        W_g = (1 - g) W + g tr(W) / d I    z_ic = m_c^T W_g^-1 h_i - m_c^T W_g^-1 m_c / 2 + log(N_c / n)

    which is scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=g)` of the other folds. The given
    label y of a sample of class c comes out of a transition matrix T: P(c, y) = softmax(beta z_i + a)_c T[c, y]. T,
    beta and the offsets a are those of highest likelihood of the given labels (expectation maximization), and so is g
    of two values, since z knows no label that it predicts.

    Then P(c | y) may replace R, two times. This helps where a class is mostly given another's labels, and
    harms where classes are confusable; it is done if it makes the labels of a fold that has no part in it more
    probable by two standard errors. It is not tried beyond 100,000 samples.

    The posteriors of a sample's neighbors (cosine, principal components), v_ic = the mean of P(c | y_j, h_j) over its
    nearest, are added to the logits as log v_ic with a weight of their own. The likeliest weights are too small where
    mistakes follow the image, as human ones do, since these look like doubt; they are multiplied by 1.5, by
    measurement on several noises (docs/ablations.md), and T is estimated again.

    Args:
        features (`np.ndarray` of shape `(n, d)`): of a network that was not trained on these labels; may be mapped
            from disk.
        labels (`np.ndarray` of shape `(n,)`): given labels in [0, k).
        num_labels (`int`): k, at least 2.
        folds (`int`): f, at least 2.
        seed (`int`): of the folds.
        groups (`np.ndarray` of shape `(n,)`, *optional*): samples of one group are kept in one fold, and are no
            neighbors of each other. Default: samples of exactly the same features.
        weights (`np.ndarray` of shape `(n,)`, *optional*): the confidence in each label, in [0, 1]; a sample of
            weight 0 is judged, but no other by it.
        known (`np.ndarray` of shape `(n,)`, *optional*): true classes as people have decided them, -1 where they have
            not. They are trained on instead of the labels, tell how labels are mistaken, and are their own posterior.
        neighbors (`int`): how many of each sample; 0 leaves them out.
        device (`torch.device` or `str`, *optional*): where to compute. Default: a GPU if there is one.

    Returns:
        [`Judgement`]

    Raises:
        ValueError: if shapes do not fit, there are no features, `seed` is negative, the device cannot be used, a label
            is none of the classes, a feature is not finite, or no class has two groups of samples.

    Example:

        judgement = judge_labels(features, labels, num_labels=3)
        judgement.noise_rate, judgement.posterior.argmax(1)
    """
    require_whole("seed", seed, least=0)
    labels = np.asarray(labels, dtype=np.int64)
    known = np.full(len(labels), -1) if known is None else np.array(known, dtype=np.int64)
    _check(features, labels, num_labels, folds, known)
    trained_on = np.where(known >= 0, known, labels)
    device = usable_device(device)
    groups = identical_rows(features) if groups is None else np.unique(groups, return_inverse=True)[1]
    fold = assign_folds(trained_on, groups, folds=folds, seed=seed)
    judged = _known_elsewhere(trained_on, fold, weights, num_labels) | (known >= 0)
    if not judged.any():
        raise _all_alone(labels)

    given = torch.from_numpy(labels)
    statistics = FoldStatistics.of_labels(
        features, torch.from_numpy(trained_on), fold, num_labels, weights=weights, device=device
    )
    chosen = _sample(judged, num_labels, seed)
    data = _Data(features, given, torch.from_numpy(known), fold, weights, num_labels, chosen)
    tried = {shrinkage: data.discriminate(statistics, shrinkage, rows=chosen) for shrinkage in SHRINKAGES}
    shrinkage = max(tried, key=lambda value: tried[value].model.likelihood)
    judge, rounds = tried.pop(shrinkage), 0
    agreement, confidence = judge.skill(given[chosen], torch.from_numpy(known[chosen] < 0))
    if len(chosen) < len(labels):
        judge = data.discriminate(statistics, shrinkage)
    enough = len(statistics.counts) > 2 and len(labels) <= ROUNDS_LIMIT
    if enough and _rounds_help(data, statistics, shrinkage):
        rounds = ROUNDS
        for _ in range(rounds):
            judge = data.next_round(judge, shrinkage)
    model, top_labels, evidence = judge.model, judge.top_labels, [judge.logits]
    temperature = float(model.weights[0])
    posterior, clustered_rate = model.posterior(evidence, top_labels, given), 0.0
    nearest = similarities = None
    projection = statistics.projection() if neighbors else None
    if projection is not None:
        nearest, similarities = nearest_neighbors(projection(features), groups, neighbors)
        evidence.append(neighbor_posteriors(nearest, posterior, top_labels, num_labels))
        if len(labels) >= TRIPLES * num_labels**2:
            clustered_rate = rate_of_triples(given, nearest, num_labels)

    fitted_on = [part[chosen] for part in evidence], top_labels[chosen], given[chosen], num_labels
    model = NoiseModel.fit(*fitted_on)
    rates = {}
    for factor in (SHARPENED_TOO_FAR, SHARPENED):
        sharpened = NoiseModel.fit(*fitted_on, weights=factor * model.weights)
        posterior = sharpened.posterior(evidence, top_labels, given)
        log_odds = _log_odds(posterior, top_labels, given)
        rates[factor] = float(torch.sigmoid(log_odds[judged]).mean())
    likeliest = _log_odds(model.posterior(evidence, top_labels, given), top_labels, given)
    rate, low = rates[SHARPENED], float(torch.sigmoid(likeliest[judged]).mean())
    margin = rate_margin(rate, int(judged.sum()), num_labels, undecided=float((known[judged] < 0).mean()))
    _say_only_the_rate(posterior, log_odds, top_labels, given, ~judged, rate)
    final = statistics.with_targets(features, posterior, top_labels, fold, weights=weights)
    spread, classes = _spread(posterior, top_labels, num_labels)
    return Judgement(
        posterior=spread.float().cpu().numpy(),
        top_labels=classes.cpu().numpy(),
        log_odds=log_odds.cpu().numpy(),
        judged=judged,
        noise_rate=rate,
        noise_rate_range=(
            max(0.0, min(low, rate) - margin),
            min(1.0, max(rates[SHARPENED_TOO_FAR], rate, clustered_rate) + margin),
        ),
        transition_matrix=sharpened.transition_matrix(),
        head=final.head(shrinkage, temperature),
        shrinkage=shrinkage,
        rounds=rounds,
        inverse_temperature=temperature,
        agreement=agreement,
        confidence=confidence,
        nearest=None if nearest is None else nearest.numpy(),
        similarities=None if similarities is None else similarities.numpy(),
        projection=projection,
    )


def rate_margin(rate: float, count: int, num_labels: int, *, undecided: float = 1.0) -> float:
    """How much wider the range of a noise rate r is than the estimates that it spans.

    With n labels of k classes it is 1.96 sqrt(r (1 - r) / n) + 3 k / n, and a point at least. The first term is the
    sampling error of a share. The second is measured: with few labels per class a discriminant of many more features
    takes most images that it does not recognize for mislabeled ones (docs/results.md).

    Args:
        rate (`float`): r, in [0, 1].
        count (`int`): n, labels that were judged.
        num_labels (`int`): k.
        undecided (`float`): share of these labels that people have not decided; the others have no error.

    Returns:
        `float`: to take from the low end and add to the high one.
    """
    sampling = 1.96 * math.sqrt(rate * (1 - rate) / count)
    return max(MARGIN, undecided * (sampling + FEW_LABELS * num_labels / count))


def fit_head(
    features: np.ndarray,
    judgement: Judgement,
    *,
    num_labels: int,
    weights: np.ndarray | None = None,
    device: torch.device | str | None = None,
) -> Head:
    """The discriminant of other features of the same samples, trained on the posterior of a judgement.

    Args:
        features (`np.ndarray` of shape `(n, d)`): of samples in the order of the judgement.
        judgement ([`Judgement`]): its shrinkage and its inverse temperature are the head's.
        num_labels (`int`): k.
        weights, device: see [`judge_labels`].
    """
    device = usable_device(device)
    posterior, top_labels = torch.from_numpy(judgement.posterior), torch.from_numpy(judgement.top_labels)
    likeliest, fold = torch.from_numpy(judgement.predicted_labels), np.zeros(len(features), np.int64)
    statistics = FoldStatistics.of_labels(features, likeliest, fold, num_labels, weights=weights, device=device)
    statistics = statistics.with_targets(features, posterior, top_labels, fold, weights=weights)
    return statistics.head(judgement.shrinkage, judgement.inverse_temperature)


@dataclass(frozen=True)
class _Data:
    """What all fits of a judgement have in common; the noise model is fitted to the rows `chosen`."""

    features: np.ndarray
    labels: torch.Tensor
    known: torch.Tensor
    fold: np.ndarray
    weights: np.ndarray | None
    num_labels: int
    chosen: np.ndarray

    def discriminate(self, statistics: "FoldStatistics", shrinkage: float, rows=None) -> "_Judge":
        """Logits of some rows, `chosen` ones, or of all, and their noise model."""
        logits, top_labels = statistics.solve(shrinkage).top_logits(
            self.features, self.labels, self.fold, rows=rows, known=self.known
        )
        part = self.chosen if rows is None else slice(None)
        model = NoiseModel.fit([logits[part]], top_labels[part], self.labels[self.chosen], self.num_labels)
        return _Judge(model, logits, top_labels, statistics)

    def next_round(self, judge: "_Judge", shrinkage: float) -> "_Judge":
        """The same with its posteriors as targets instead of the labels."""
        posterior = judge.model.posterior([judge.logits], judge.top_labels, self.labels)
        return self.discriminate(
            judge.statistics.with_targets(self.features, posterior, judge.top_labels, self.fold, weights=self.weights),
            shrinkage,
        )

    def without_first_fold(self) -> "_Data":
        """The others in two folds; the samples of the first are a third one, without a weight."""
        others = self.fold > 0
        weights = others.astype(np.float32) if self.weights is None else others * self.weights
        fold, chosen = np.where(others, self.fold % 2, 2), self.chosen[others[self.chosen]]
        return replace(self, fold=fold, weights=weights, chosen=chosen)


@dataclass(frozen=True)
class _Judge:
    """Discriminants of some folds: the noise model of their logits, these and their top labels `(n, c)`."""

    model: "NoiseModel"
    logits: torch.Tensor
    top_labels: torch.Tensor
    statistics: "FoldStatistics"

    def skill(self, labels: torch.Tensor, asked: torch.Tensor) -> tuple[float, float]:
        """Agreement with labels and mean confidence, of the rows `asked` (mask of shape `(n,)`) if there are any."""
        asked = asked if asked.any() else torch.ones_like(asked)
        prior = _prior(self.logits[asked][None], self.model.weights, self.model.offsets, self.top_labels[asked])
        predicted = self.top_labels[asked].gather(1, self.logits[asked].argmax(1, keepdim=True))[:, 0]
        return float((predicted == labels[asked]).float().mean()), float(prior.max(1).values.mean())


def _rounds_help(data: _Data, statistics: "FoldStatistics", shrinkage: float) -> bool:
    """Whether rounds make the given labels of the first fold more probable, to which no part of them was fitted.

    The likelihood of all labels does not tell it: once posteriors are targets, those of the other folds know a label
    through the classifiers that made them. So rounds are tried without the first fold, and judged on it alone.
    """
    rest, rows = data.without_first_fold(), data.chosen[data.fold[data.chosen] == 0]
    if len(rows) < 2:
        return False  # one label has no standard error
    first = last = rest.discriminate(statistics.without_first_fold(), shrinkage)
    for _ in range(ROUNDS):
        last = rest.next_round(last, shrinkage)
    before, after = (
        judge.model.log_likelihood([judge.logits[rows]], judge.top_labels[rows], data.labels[rows])
        for judge in (first, last)
    )
    gain = (after - before).double()
    return bool(gain.mean() > 2 * gain.std() / len(gain) ** 0.5)


def check_labels(labels: np.ndarray, *, column: str | None = None):
    """Refuse labels that nothing can be judged by, whatever their images: before the pass that takes long.

    Args:
        labels (`np.ndarray` of shape `(n,)`): given labels.
        column (`str`, *optional*): that they are from; it may be the wrong one.

    Raises:
        ValueError: if no class has two samples.
    """
    if len(np.unique(labels)) == len(labels):
        raise _all_alone(labels, column)


def _all_alone(labels: np.ndarray, column: str | None = None) -> ValueError:
    where = f", by the column `{column}`" if column else ""
    return ValueError(
        f"No class has two different samples ({counted(len(labels), 'sample')}, "
        f"{counted(len(np.unique(labels)), 'class')}{where}), so no label can be judged by others of its class. Give "
        f"more samples{', or another column of labels' if column else ''}."
    )


def assign_folds(labels: np.ndarray, groups: np.ndarray, *, folds: int, seed: int) -> np.ndarray:
    """A fold for each sample, of shape `(n,)`: the samples of a group in one, each class over all folds alike."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    order = np.lexsort((np.random.default_rng(seed).permutation(len(first)), labels[first]))
    fold = np.empty(len(first), dtype=np.int64)
    fold[order] = np.arange(len(first)) % folds
    return fold[group]


def identical_rows(features: np.ndarray) -> np.ndarray:
    """A number for each sample, of shape `(n,)`, the same for rows of the same content."""
    digests = np.empty(len(features), dtype="V16")
    for start in range(0, len(features), BATCH):
        batch = np.ascontiguousarray(features[start : start + BATCH]) + 0  # the zero without a sign: -0.0 is 0.0
        for number, row in enumerate(batch, start):
            digests[number] = hashlib.blake2b(row, digest_size=16).digest()
    _, first, row = np.unique(digests, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[row]  # in the order of their first rows


class FoldStatistics:
    """Counts, class sums and second moments of each fold: all that a discriminant needs, of standardized features.

    Args:
        counts (`torch.Tensor` of shape `(f, k)`), sums (`torch.Tensor` of shape `(f, k, d)`): float64.
        moments (`torch.Tensor` of shape `(f, d, d)`): float32; only the lower triangle is used.
        center (`torch.Tensor` of shape `(d,)`), deviation (`torch.Tensor` of shape `(d,)`): float64, mean and standard
            deviation of the features over all folds.
    """

    def __init__(self, counts, sums, moments, center: torch.Tensor, deviation: torch.Tensor):
        self.counts, self.sums, self.moments = counts, sums, moments
        self.center, self.deviation = center, deviation

    @classmethod
    def of_labels(cls, features, labels: torch.Tensor, fold: np.ndarray, num_labels: int, *, weights, device):
        folds, size = int(fold.max()) + 1, features.shape[1]
        counts = torch.zeros(folds, num_labels, dtype=torch.float64, device=device)
        sums = torch.zeros(folds, num_labels, size, dtype=torch.float64, device=device)
        moments = torch.zeros(folds, size, size, dtype=torch.float64, device=device)
        # near the mean, so that no digits are lost in the differences
        first = np.asarray(features[:BATCH], dtype=np.float32)
        shift = torch.from_numpy(first.mean(0, dtype=np.float64).astype(np.float32)).to(device)
        for rows, batch in _batches(features, device):
            batch -= shift
            weight = torch.ones(len(batch), device=device)
            if weights is not None:
                weight = torch.as_tensor(weights[rows], dtype=torch.float32, device=device)
            label, part = labels[rows].to(device), torch.from_numpy(fold[rows]).to(device)
            at = part * num_labels + label
            counts.view(-1).index_add_(0, at, weight.double())
            sums.view(-1, size).index_add_(0, at, (weight[:, None] * batch).double())
            for number in range(folds):
                there = part == number
                _add_moments(moments[number], batch[there] * weight[there, None].sqrt())
        overall, total = sums.sum(1), counts.sum()
        mean = overall.sum(0) / total
        variance = moments.diagonal(dim1=1, dim2=2).sum(0) / total - mean**2
        # of each feature by itself, whatever the scale of the others; float32 does not tell a smaller one from none
        varies = variance > SAME * (shift.double() + mean).square()
        deviation = torch.where(varies, variance, 1.0).sqrt()
        standardized = torch.empty_like(moments, dtype=torch.float32)
        scale = torch.outer(deviation, deviation)
        for number, n in enumerate(counts.sum(1)):
            there = overall[number]
            left, right = torch.stack([there, mean], 1), torch.stack([mean, there - n * mean])
            standardized[number] = moments[number].addmm_(left, right, alpha=-1).div_(scale)
        for own_sums, own_counts in zip(sums, counts, strict=True):  # all at once would be most of the memory
            own_sums.addr_(own_counts, mean, alpha=-1).div_(deviation)
        return cls(counts, sums, standardized, shift.double() + mean, deviation)

    def with_targets(self, features, posterior, top_labels, fold: np.ndarray, *, weights=None) -> "FoldStatistics":
        """The same moments with counts and class sums of soft targets."""
        device, num_labels = self.counts.device, self.counts.shape[1]
        counts, sums = torch.zeros_like(self.counts), torch.zeros_like(self.sums)
        for rows, batch in _batches(features, device, _rows_at_a_time(num_labels)):
            batch -= self.center.float()
            classes, share = top_labels[rows].to(device), posterior[rows].float().to(device)
            if weights is not None:
                share = share * torch.as_tensor(weights[rows], dtype=torch.float32, device=device)[:, None]
            part = torch.from_numpy(fold[rows]).to(device)
            if num_labels > SPARSE_FROM * classes.shape[1]:
                _add_shares(counts, sums, batch, part[:, None] * num_labels + classes, share)
                continue
            targets = torch.zeros(len(batch), num_labels, device=device).scatter_(1, classes, share)
            for number in part.unique().tolist():
                there = torch.where(part == number)[0]
                counts[number] += targets[there].sum(0)
                sums[number] += targets[there].T @ batch[there]
        sums /= self.deviation
        return FoldStatistics(counts, sums, self.moments, self.center, self.deviation)

    def without_first_fold(self) -> "FoldStatistics":
        """Of the others in two folds, those of even and those of odd numbers, and of a third one without samples."""
        counts, sums, moments = (
            torch.stack([part[2::2].sum(0), part[1::2].sum(0), torch.zeros_like(part[0])])
            for part in (self.counts, self.sums, self.moments)
        )
        return FoldStatistics(counts, sums, moments, self.center, self.deviation)

    def solve(self, shrinkage: float) -> "Discriminants":
        """A discriminant for each fold, of the other folds."""
        counts, sums, moments = self.counts.sum(0), self.sums.sum(0), self.moments.sum(0)
        weight = torch.empty(self.sums.shape, device=sums.device)
        bias = torch.empty(self.counts.shape, device=sums.device)
        for fold, own in enumerate(zip(self.counts, self.sums, self.moments, strict=True)):
            others = counts - own[0], sums - own[1], moments - own[2]
            standardized, bias[fold] = self._solve(*others, shrinkage)
            weight[fold] = standardized / self.deviation
        return Discriminants(weight, bias, self.center.float())

    def head(self, shrinkage: float, temperature: float) -> Head:
        """The discriminant of all samples, on the raw features, its logits scaled by an inverse temperature."""
        weight, bias = self._solve(self.counts.sum(0), self.sums.sum(0), self.moments.sum(0), shrinkage)
        weight = weight / self.deviation
        bias = bias.clamp(min=-1e4) - weight @ self.center  # not below, of classes that nothing is known of
        return Head((temperature * weight).float().cpu(), (temperature * bias).float().cpu())

    def _solve(self, counts, sums, moments, shrinkage: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight `(k, d)` and bias `(k,)` on standardized features.

        In float32: shrinkage bounds the condition number of what is solved by d / g.
        """
        n, known = counts.sum().clamp(min=1e-12), counts > 0
        means = torch.where(known[:, None], sums / counts.clamp(min=1e-12)[:, None], 0).float()
        within = torch.addmm(moments, (counts[:, None] * means).float().T, means, alpha=-1)
        within *= (1 - shrinkage) / n
        within.diagonal().add_((shrinkage / (1 - shrinkage) * within.diagonal().mean()).clamp(min=LEAST_SCATTER))
        factor, failed = torch.linalg.cholesky_ex(within)
        if failed:  # no class has any scatter, and what is left of it is rounding
            spectrum = torch.linalg.eigvalsh(within)
            within.diagonal().add_(1e-3 * spectrum[-1].clamp(min=LEAST_SCATTER) - spectrum[0])
            factor = torch.linalg.cholesky(within)
        weight = torch.cholesky_solve(means.T, factor).T
        prior = torch.where(known, (counts / n).clamp(min=1e-300).log(), -torch.inf)
        return weight, prior.float() - (weight * means).sum(1) / 2

    def projection(self, dimensions: int = NEIGHBOR_DIMENSIONS) -> Projection:
        """Onto their first principal components."""
        size = len(self.center)
        covariance = (self.moments.sum(0) / self.counts.sum()).cpu().numpy()
        first = max(0, size - dimensions), size - 1  # in ascending order
        basis = torch.from_numpy(scipy.linalg.eigh(covariance, subset_by_index=first)[1]).to(self.center.device)
        return Projection(self.center.float(), (basis / self.deviation[:, None]).float())


def _add_moments(moments: torch.Tensor, rows: torch.Tensor):
    """Add rows^T rows to the lower triangle of a matrix, in place; what is above it is left undefined."""
    for start in range(0, len(moments), STRIP):
        stop = min(start + STRIP, len(moments))
        moments[start:stop, :stop] += rows[:, start:stop].T @ rows[:, :stop]


def _add_shares(counts: torch.Tensor, sums: torch.Tensor, batch: torch.Tensor, at: torch.Tensor, share: torch.Tensor):
    """Add to counts `(f, k)` and sums `(f, k, d)`, in place, the shares `(b, c)` of a batch `(b, d)` in its top
    labels, which are the rows `at` `(b, c)` of both.

    All others have none, so that the time does not grow with the number of classes.
    """
    size = batch.shape[1]
    counts.view(-1).index_add_(0, at.flatten(), share.flatten().double())
    step = max(1, 2**21 // (at.shape[1] * size))  # 16 MB
    for some, places, parts in zip(batch.split(step), at.split(step), share.split(step), strict=True):
        theirs = (parts[..., None] * some[:, None]).view(-1, size)
        sums.view(-1, size).index_add_(0, places.flatten(), theirs.double())


class Discriminants:
    """One linear classifier per fold on centered features.

    Args:
        weight (`torch.Tensor` of shape `(f, k, d)`), bias (`torch.Tensor` of shape `(f, k)`): float32.
        center (`torch.Tensor` of shape `(d,)`): float32.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, center: torch.Tensor):
        self.weight, self.bias, self.center = weight, bias, center

    def top_logits(self, features, labels, fold, rows=None, known=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of each sample's top labels, and these, both of shape `(n, c)`, in the order of the rows.

        Top labels are the likeliest classes, the given one and the known one, in ascending order. A known class
        (`known` of shape `(n,)`, -1 where there is none) is beyond doubt.
        """
        num_labels, device = self.weight.shape[1], self.weight.device
        rows = np.arange(len(labels)) if rows is None else rows
        wanted = min(num_labels, TOP_LABELS)
        logits = torch.empty(len(rows), wanted)
        top_labels = torch.arange(wanted).expand(len(rows), wanted).clone()
        step = _rows_at_a_time(num_labels)
        # used again for each batch: new memory takes as long as a product
        room = torch.empty(min(step, len(rows)), num_labels, device=device)
        for start in range(0, len(rows), step):
            order = np.argsort(fold[rows[start : start + step]], kind="stable")
            place, there = torch.from_numpy(start + order), rows[start : start + step][order]
            batch, scores = _tensor(features[there], device), room[: len(there)]
            batch -= self.center
            counts = np.bincount(fold[there], minlength=len(self.weight)).tolist()
            parts = batch.split(counts), scores.split(counts), self.weight, self.bias
            for own, found, weight, bias in zip(*parts, strict=True):
                torch.addmm(bias, own, weight.T, out=found)
            scores.clamp_(min=DOUBTLESS)
            given = labels[there].to(device)
            sure = given.clone()
            if known is not None:
                decided = torch.where(known[there] >= 0)[0].to(device)
                sure[decided] = known[there].to(device)[decided]
                scores[decided] = DOUBTLESS
                scores[decided, sure[decided]] = 0
            if wanted < num_labels:
                named = torch.stack([given, sure], 1)
                theirs = scores.gather(1, named)
                some = scores.scatter_(1, named, torch.inf).topk(wanted, dim=1).indices.sort(dim=1).values
                top_labels[place] = some.cpu()
                scores = scores.scatter_(1, named, theirs).gather(1, some)
            logits[place] = scores.cpu()
        return logits, top_labels


# -- noise ------------------------------------------------------------------------------------------------------------


class NoiseModel:
    """P(c, y) = softmax(sum_m w_m z_m + a)_c T[c, y], fitted to given labels y by expectation maximization.

    Of k^2 pairs of classes the samples that it is fitted to show few where classes are many. For another sample a pair
    that they do not show is as probable as the class's mistakes are on average, (1 - T[c, c]) / (k - 1): with no
    probability at all every such mistake would pass for right.

    Args:
        weights (`torch.Tensor` of shape `(m,)`): w of each source of evidence.
        offsets (`torch.Tensor` of shape `(k,)`): a.
        cells (`torch.Tensor` of shape `(t,)`): k j + i of the entries T[i, j] that are not 0, ascending.
        values (`torch.Tensor` of shape `(t,)`): these entries.
        num_labels (`int`): k.
        likelihood (`float`): mean log probability of the given labels.
    """

    def __init__(self, weights, offsets, cells, values, num_labels, likelihood):
        self.weights, self.offsets, self.cells, self.values = weights, offsets, cells, values
        self.num_labels, self.likelihood = num_labels, likelihood
        right = values[torch.searchsorted(cells, torch.arange(num_labels) * (num_labels + 1))]
        self.unseen = (1 - right) / (num_labels - 1)

    @classmethod
    def fit(
        cls, evidence: Sequence[torch.Tensor], top_labels, labels, num_labels, *, weights=None, iterations: int = 100
    ) -> "NoiseModel":
        """Each class has one sure sample besides those given; weights take a Newton step per iteration.

        Args:
            evidence: m logits of shape `(n, c)`.
            top_labels (`torch.Tensor` of shape `(n, c)`), labels (`torch.Tensor` of shape `(n,)`).
            num_labels (`int`): k.
            weights (`torch.Tensor` of shape `(m,)`, *optional*): fixed ones; default: those of highest likelihood.
            iterations (`int`): at most.
        """
        fixed, k, stack = weights is not None, num_labels, torch.stack(list(evidence))
        if len(labels) > FIT_ON:  # rows of a label together, whose cells lie together in memory
            order = labels.argsort(stable=True)
            stack, labels, top_labels = stack[:, order], labels[order], top_labels[order]
        sure = torch.arange(k) * (k + 1)
        cells, at = torch.cat([(labels[:, None] * k + top_labels).flatten(), sure]).unique(return_inverse=True)
        at, sure, row = at[:-k].view_as(top_labels), at[-k:], cells % k
        values = torch.full((len(cells),), 0.3 / (k - 1))
        values[sure] = 0.7
        offsets, weights = torch.zeros(k), weights if fixed else torch.full((len(stack),), 0.4)
        likelihood = -torch.inf
        for _ in range(iterations):
            before, found = likelihood, _Expected(weights, offsets, values)
            for start in range(0, len(labels), FIT_ON):
                rows = slice(start, start + FIT_ON)
                found.add(stack[:, rows], top_labels[rows], at[rows], moments=not fixed)
            likelihood = float(found.likelihood / len(labels))
            found.counts[sure] += 1
            drawn = torch.zeros(k).scatter_add_(0, row, found.counts)
            values = found.counts / drawn.index_select(0, row)
            offsets = offsets + 0.5 * (drawn.log() - (found.prior + 1).log())
            offsets = offsets - offsets.mean()
            if not fixed:
                weights = (weights + found.newton_step(len(labels))).clamp(min=0.02, max=5)
            if abs(likelihood - before) < 1e-5:
                break
        return cls(weights, offsets, cells, values, k, likelihood)

    def posterior(self, evidence: Sequence[torch.Tensor], top_labels, labels) -> torch.Tensor:
        """P(c | y) of the top labels, of shape `(n, c)`."""
        parts = []
        for prior, joint in self._joint(evidence, top_labels, labels):
            total = joint.sum(1, keepdim=True)
            parts.append(torch.where(total > 0, joint / total.clamp(min=1e-30), prior))
        return torch.cat(parts)

    def log_likelihood(self, evidence: Sequence[torch.Tensor], top_labels, labels) -> torch.Tensor:
        """Log P(y) of each sample, of shape `(n,)`, not below that of one in a billion."""
        joints = self._joint(evidence, top_labels, labels)
        return torch.cat([joint.sum(1).clamp(min=1e-9).log() for _, joint in joints])

    def _joint(self, evidence, top_labels, labels) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """P(c) and P(c, y) of the top labels, batch by batch."""
        for start in range(0, len(labels), BATCH):
            rows = slice(start, start + BATCH)
            stack = torch.stack([part[rows] for part in evidence])
            prior = _prior(stack, self.weights, self.offsets, top_labels[rows])
            wanted = labels[rows, None] * self.num_labels + top_labels[rows]
            at = torch.searchsorted(self.cells, wanted).clamp(max=len(self.cells) - 1)
            unseen = self.unseen[top_labels[rows]]
            yield prior, prior * torch.where(self.cells[at] == wanted, self.values[at], unseen)

    def transition_matrix(self) -> np.ndarray:
        """T of shape `(k, k)`, float32."""
        matrix = torch.zeros(self.num_labels, self.num_labels)
        matrix[self.cells % self.num_labels, self.cells // self.num_labels] = self.values
        return matrix.numpy()


def _prior(stack, weights, offsets, top_labels) -> torch.Tensor:
    logits = torch.tensordot(weights, stack, dims=1)
    logits += offsets.index_select(0, top_labels.flatten()).view_as(logits)
    powers = (logits - logits.amax(1, keepdim=True)).exp_()  # ten times as fast as `softmax` with few classes
    return powers / powers.sum(1, keepdim=True)


class _Expected:
    """What an iteration of [`NoiseModel.fit`] sums over the samples, batch by batch.

    Args:
        weights (`torch.Tensor` of shape `(m,)`), offsets (`torch.Tensor` of shape `(k,)`), values (`torch.Tensor` of
            shape `(t,)`): the model so far.
    """

    def __init__(self, weights, offsets, values):
        self.weights, self.offsets, self.values = weights, offsets, values
        self.counts, self.prior = torch.zeros_like(values), torch.zeros_like(offsets)
        self.likelihood, self.gradient = torch.zeros(()), torch.zeros_like(weights)
        self.hessian = torch.zeros(len(weights), len(weights))

    def add(self, stack, top_labels, at, *, moments: bool):
        """Evidence `(m, b, c)`, classes `(b, c)` and where their cells are `(b, c)`; `moments`: for a Newton step."""
        prior = _prior(stack, self.weights, self.offsets, top_labels)
        resolved = self.values.index_select(0, at.flatten()).view_as(prior).mul_(prior)
        total = resolved.sum(1, keepdim=True).clamp_(min=1e-30)
        resolved /= total
        self.likelihood += total.log_().sum()
        self.counts.scatter_add_(0, at.flatten(), resolved.flatten())
        self.prior.scatter_add_(0, top_labels.flatten(), prior.flatten())
        if moments:
            expected = (prior * stack).sum(-1)
            self.gradient += (resolved.mul(stack).sum(-1) - expected).sum(1)
            centered = stack - expected[..., None]
            self.hessian += (prior * centered).flatten(1) @ centered.flatten(1).T

    def newton_step(self, count: int) -> torch.Tensor:
        """Of the weights `(m,)` towards the highest expected likelihood of so many samples."""
        hessian = self.hessian / count
        hessian.diagonal().add_(1e-3 * hessian.diagonal().mean() + 1e-9)
        return torch.linalg.solve(hessian, self.gradient / count).clamp(-0.2, 0.2)


# -- neighbors -------------------------------------------------------------------------------------------------------


def nearest_neighbors(vectors: torch.Tensor, groups: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the most similar unit vectors of other groups, and their cosines: int32 and float32 `(n, count)`.

    The most similar come first; -1, with a cosine of -1, where there are too few. Up to 100,000 vectors all pairs are
    compared; beyond it those of [`search_lists`].
    """
    group, n = torch.from_numpy(groups).to(vectors.device), len(vectors)
    if n > NEIGHBOR_LIMIT:
        return search_lists(vectors, vectors, count, groups=group)
    nearest, similarities = torch.empty(n, min(count, n), dtype=torch.int32), torch.empty(n, min(count, n))
    for rows in torch.arange(n).split(512):
        cosines = (vectors[rows] @ vectors.T).masked_fill_(group[rows, None] == group, NONE)
        cosines, near = cosines.topk(nearest.shape[1], dim=1)
        nearest[rows], similarities[rows] = near.int().cpu(), cosines.cpu()
    return _without_none(nearest, similarities)


def most_similar(vectors: torch.Tensor, others: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The row of the most similar of m others, and the cosine, for each of n unit vectors; both of shape `(n,)`.

    All pairs are compared up to 100,000 vectors and as many others; beyond it those of [`search_lists`].
    """
    if max(len(vectors), len(others)) > NEIGHBOR_LIMIT:
        nearest, cosines = (part[:, 0].numpy() for part in search_lists(vectors, others, 1))
        return nearest, cosines
    found = [(some @ others.T).max(dim=1) for some in vectors.split(max(1, 2**24 // len(others)))]  # 64 MB
    cosines, nearest = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return nearest, cosines


def search_lists(
    asked: torch.Tensor, vectors: torch.Tensor, wanted: int, *, groups: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the most similar of n vectors, and their cosines, for each of m: an inverted file (IVF).

    Spherical k-means divides the n vectors into sqrt(n) lists, and each of the m is compared with the 16 lists
    whose centers are most similar to it (Jegou et al., TPAMI 2011). A list is compared with all that ask for it at
    once, as a matrix product, so that the vectors need no second copy.

    Args:
        asked (`torch.Tensor` of shape `(m, p)`), vectors (`torch.Tensor` of shape `(n, p)`): unit vectors, in float32
            or float16; they are multiplied in float32.
        wanted (`int`): w, how many for each.
        groups (`torch.Tensor` of shape `(n,)`, *optional*): where the m are the n themselves; those of a group are not
            compared with each other.

    Returns:
        rows and cosines, int32 and float32 `(m, w)`, the most similar first; -1 where the lists have too few.
    """
    centers = cluster_centers(vectors, round(len(vectors) ** 0.5))
    probed = _closest(asked, centers, min(PROBED, len(centers)))
    home = _closest(vectors, centers, 1)[:, 0]
    nearest = torch.full((len(asked), wanted), -1, dtype=torch.int32, device=asked.device)
    similarities = torch.full((len(asked), wanted), NONE, device=asked.device)
    for number in range(len(centers)):
        members, asking = torch.where(home == number)[0].int(), torch.where((probed == number).any(1))[0]
        there = vectors[members].float().T
        for rows in asking.split(2**22 // (len(members) + wanted) + 1):  # 16 MB
            cosines = asked[rows].float() @ there
            if groups is not None:
                cosines.masked_fill_(groups[rows, None] == groups[members], NONE)
            similarities[rows], at = torch.cat([similarities[rows], cosines], dim=1).topk(wanted, dim=1)
            nearest[rows] = torch.cat([nearest[rows], members.expand(len(rows), -1)], dim=1).gather(1, at)
    return _without_none(nearest.cpu(), similarities.cpu())


def _without_none(nearest: torch.Tensor, similarities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-1 for both where no pair was left, in place."""
    return nearest.masked_fill_(similarities == NONE, -1), similarities.clamp_(-1, 1)


def cluster_centers(vectors: torch.Tensor, count: int, *, seed: int = 0, iterations: int = 8) -> torch.Tensor:
    """Centers of unit vectors `(n, p)`, of shape `(count, p)`: spherical k-means of a sample of 64 for each."""
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[: 64 * count]
    sample = vectors[chosen.to(vectors.device)].float()
    centers = sample[:count]
    for _ in range(iterations):
        sums = torch.zeros_like(centers).index_add_(0, _closest(sample, centers, 1)[:, 0], sample)
        centers = torch.nn.functional.normalize(sums, dim=1)
    return centers


def _closest(vectors: torch.Tensor, centers: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers of the most similar centers, int32 `(n, count)`."""
    numbers = torch.empty(len(vectors), count, dtype=torch.int32, device=vectors.device)
    for start in range(0, len(vectors), BATCH):  # small results kept between large batches would hold their memory
        rows = slice(start, start + BATCH)
        numbers[rows] = (vectors[rows].float() @ centers.T).topk(count, dim=1).indices
    return numbers


def rate_of_triples(labels: torch.Tensor, nearest: torch.Tensor, num_labels: int, *, iterations: int = 200) -> float:
    """The noise rate at which labels of samples and of their two nearest neighbors agree as often as they do.

    Three labels of one true class, drawn independently (HOC, Zhu et al., ICML 2021), by expectation maximization of
    that latent class model. Neighbors of other classes count as noise, so that it is an upper end.

    Args:
        labels (`torch.Tensor` of shape `(n,)`): given labels.
        nearest (`torch.Tensor` of shape `(n, m)`): of [`nearest_neighbors`], m at least 2.
        num_labels (`int`): k.
        iterations (`int`): of expectation maximization.
    """
    rows = (nearest[:, :2] >= 0).all(1)
    triples = torch.stack([labels[rows], labels[nearest[rows, 0]], labels[nearest[rows, 1]]]).sort(0).values
    triples, times = triples.unique(dim=1, return_counts=True)  # their order tells nothing, and there are few
    matrix = torch.full((num_labels, num_labels), 0.3 / (num_labels - 1)).fill_diagonal_(0.7)
    prior = torch.full((num_labels,), 1 / num_labels)
    for _ in range(iterations):
        resolved = prior * matrix.T[triples].prod(0)
        resolved *= times[:, None] / resolved.sum(1, keepdim=True).clamp(min=1e-30)
        prior = resolved.sum(0) / times.sum()
        counts = torch.eye(num_labels)
        for label in triples:
            counts.T.index_add_(0, label, resolved)
        matrix = counts / counts.sum(1, keepdim=True)
    return float(1 - (prior * matrix.diagonal()).sum())


def neighbor_posteriors(nearest, posterior, top_labels, num_labels) -> torch.Tensor:
    """Log of the mean posterior of each sample's neighbors on its top labels, of shape `(n, c)`."""
    means = torch.empty(posterior.shape)
    for rows in torch.arange(len(nearest)).split(max(128, min(512, 2**20 // num_labels))):  # 2 MB of shares
        near = nearest[rows].clamp(min=0)
        weight = (nearest[rows] >= 0).float() / (nearest[rows] >= 0).sum(1, keepdim=True).clamp(min=1)
        share = torch.zeros(len(rows), num_labels)
        share.scatter_add_(1, top_labels[near].flatten(1), (posterior[near] * weight[..., None]).flatten(1))
        means[rows] = share.gather(1, top_labels[rows])
    return (means + FLOOR).log()


# -- small parts ------------------------------------------------------------------------------------------------------


def _check(features, labels: np.ndarray, num_labels: int, folds: int, known: np.ndarray):
    if len(features.shape) != 2 or labels.ndim != 1 or len(features) != len(labels):
        raise ValueError(
            f"`features` must have the shape (n, d) and `labels` (n,); given {tuple(features.shape)}, {labels.shape}."
        )
    if not features.shape[1]:
        raise ValueError(f"`features` have the shape {tuple(features.shape)}: no feature to judge labels by.")
    if num_labels < 2 or folds < 2:
        raise ValueError(f"`num_labels` and `folds` must be at least 2; given {num_labels} and {folds}.")
    bad = np.flatnonzero((labels < 0) | (labels >= num_labels))
    if len(bad):
        raise ValueError(f"Row {bad[0]} has label {labels[bad[0]]}, but there are {counted(num_labels, 'class')}.")
    if known.shape != labels.shape or (known < -1).any() or (known >= num_labels).any():
        raise ValueError(
            f"`known` must hold a class in [0, {num_labels}) or -1 for each of the "
            f"{counted(len(labels), 'sample')}; given the "
            f"shape {known.shape}, values from {known.min(initial=0)} to {known.max(initial=0)}."
        )
    for start in range(0, len(features), BATCH):
        usable = (np.abs(np.asarray(features[start : start + BATCH])) < LARGEST).all(1)
        if not usable.all():
            raise ValueError(
                f"The features of row {start + int(np.argmin(usable))} are not finite, or not below {LARGEST:.0e}."
            )


def _known_elsewhere(labels, fold, weights, num_labels) -> np.ndarray:
    """Whether another fold has a sample of the class, of shape `(n,)`."""
    counted = np.ones(len(labels)) if weights is None else (np.asarray(weights) > 0).astype(float)
    counts = np.zeros((int(fold.max()) + 1, num_labels))
    np.add.at(counts, (fold, labels), counted)
    return (counts.sum(0) - counts)[fold, labels] > 0


def _rows_at_a_time(num_labels: int) -> int:
    """As many as have 64 MB of logits, so that tens of thousands of classes take no more memory than thousands."""
    return max(256, min(BATCH, 2**24 // num_labels))


def _batches(features, device, size: int = BATCH) -> Iterator[tuple[slice, torch.Tensor]]:
    for start in range(0, len(features), size):
        rows = slice(start, min(start + size, len(features)))
        yield rows, _tensor(features[rows], device)


def _tensor(array, device) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32)).to(device)


def _sample(judged: np.ndarray, num_labels: int, seed: int) -> np.ndarray:
    rows, wanted = np.flatnonzero(judged), max(FIT_ON, 50 * num_labels)
    if len(rows) <= wanted:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, wanted, replace=False))


def _log_odds(posterior, top_labels, labels) -> torch.Tensor:
    """Of "wrong", of shape `(n,)`, batch by batch: in float64 all would be most of the memory."""
    parts = []
    for batch, classes, label in zip(*(part.split(BATCH) for part in (posterior, top_labels, labels)), strict=True):
        given = classes == label[:, None]
        right, wrong = (batch.double().mul(where).sum(1).clamp(min=1e-300).log() for where in (given, ~given))
        parts.append((wrong - right).clamp(-700, 700))
    return torch.cat(parts)


def _say_only_the_rate(posterior, log_odds, top_labels, labels, rows: np.ndarray, rate: float):
    """Of the samples `(n,)` whose class no other fold knows, in place."""
    rows = torch.from_numpy(np.flatnonzero(rows))
    given = top_labels[rows] == labels[rows, None]
    others = posterior[rows].masked_fill(given, 0)
    others = others / others.sum(1, keepdim=True).clamp(min=1e-30)
    posterior[rows] = torch.where(given, 1 - rate, rate * others)
    log_odds[rows] = float(np.log(max(rate, 1e-300)) - np.log(max(1 - rate, 1e-300)))


def _spread(posterior, top_labels, num_labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior and top labels of all classes, where these are few."""
    if top_labels.shape[1] == num_labels or num_labels > ALL_CLASSES:
        return posterior, top_labels
    spread = torch.zeros(len(posterior), num_labels).scatter_(1, top_labels, posterior)
    return spread, torch.arange(num_labels).expand(len(posterior), num_labels)
