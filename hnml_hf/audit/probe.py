"""Linear probe: logistic regression on the frozen pooled features of a backbone, the baseline for pretrained ones."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate.utils import broadcast
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Dataset, Subset

from ..data.collate import collate_images
from ..modeling.forward import ask, run_over
from .dynamics import score_predictions


START_SAMPLES = 50_000  # enough for a start, and their features fit into memory
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn: the inverse of the weight decay's strength


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier (k classes, d features).

    Args:
        weight (`torch.Tensor` of shape `(k, d)`), bias (`torch.Tensor` of shape `(k,)`): logits = weight h + bias, of
            the features as they come.
        strength (`float`): the C that was chosen.
        accuracies (`dict[float, float]`): accuracy on the held-out labels, by C.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float
    accuracies: dict[float, float]


def pooled_features(
    model, dataset: Dataset, *, batch_size: int = 64, num_workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What the last linear layer of a frozen model sees of each sample, and the given labels.

    Args:
        model: a [`TimmCAMForImageClassification`]; evaluation mode is put on for the pass.
        dataset (`TransformedDataset`): of n samples, with the evaluation transform.
        batch_size (`int`): images in a forward pass.
        num_workers (`int`): processes that load images.

    Returns:
        `np.ndarray` of shape `(n, d)`, float32: 4 n d bytes, 8 GB for a million images and ResNet-50; and
        `np.ndarray` of shape `(n,)`, int64.
    """
    features, labels = [], []
    backbone, loading = partial(ask, model, of="the backbone"), {"batch_size": batch_size, "num_workers": num_workers}
    for batch, output in run_over(backbone, dataset, collate_images, desc="features", **loading):
        features.append(output.features.float().cpu())
        labels.append(batch["labels"])
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def fit_linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    held_out_features: np.ndarray,
    held_out_labels: np.ndarray,
    *,
    num_labels: int,
    sample_weights: np.ndarray | None = None,
    strengths: Iterable[float] = STRENGTHS,
    max_iter: int = 1000,
) -> LinearProbe:
    """Logistic regression on standardised features; C is chosen on held-out labels, as noisy as the others.

    min_{W, b}  C sum_i w_i CE(W (h_i - mu) / sigma + b, y_i) + |W|^2 / 2

    by scikit-learn's L-BFGS. The weighted mu and sigma of the training features go into the weights that are returned.
    Among equal accuracies the smallest C, the strongest regularisation, is taken: with wrong labels a loose fit learns
    them.

    Args:
        features (`np.ndarray` of shape `(n, d)`), labels (`np.ndarray` of shape `(n,)`): training samples.
        held_out_features (`np.ndarray` of shape `(m, d)`), held_out_labels (`np.ndarray` of shape `(m,)`): of other
            samples.
        num_labels (`int`): number of classes k.
        sample_weights (`np.ndarray` of shape `(n,)`, *optional*): w, the confidence in each training label, in
            [0, 1]; a sample of weight 0 has no part. Default: 1 for all.
        strengths (`Iterable[float]`): values of C to try.
        max_iter (`int`): of L-BFGS; scikit-learn warns if it was not enough.

    Returns:
        [`LinearProbe`]

    Raises:
        ValueError: if there is no held-out sample, or a class without a training sample.
    """
    if len(held_out_labels) == 0:
        raise ValueError("The strength of a linear probe is chosen on held-out labels, and there are none.")
    if sample_weights is None:
        sample_weights = np.ones(len(labels))
    absent = np.setdiff1d(np.arange(num_labels), labels[sample_weights > 0])
    if len(absent):
        raise ValueError(f"Classes {absent.tolist()[:10]} have no training sample, so a probe cannot learn them.")
    probes = {}
    for strength in sorted(strengths):
        probes[strength] = _classifier(strength, max_iter).fit(features, labels, **_weighted(sample_weights))
    accuracies = {
        strength: float(probe.score(held_out_features, held_out_labels)) for strength, probe in probes.items()
    }
    best = max(accuracies, key=accuracies.__getitem__)
    scaler, classifier = (step for _, step in probes[best].steps)
    weight, bias = classifier.coef_, classifier.intercept_
    if num_labels == 2:  # scikit-learn keeps one row: softmax (0, z) is the sigmoid of z
        weight, bias = np.vstack([0 * weight, weight]), np.append(0 * bias, bias)
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    return LinearProbe(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), best, accuracies)


def cross_validate_probe(
    features: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    *,
    num_labels: int,
    strength: float,
    sample_weights: np.ndarray | None = None,
    folds: int = 5,
    max_iter: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """What probes that did not learn a sample's label say of it: evidence on labels that are not memorized.

    Each of five parts, alike in their classes, is predicted by the probe of the other four. For [`noise_scores`], or
    as its `cross_validated` beside the records of a run that started from this probe.

    Args:
        features (`np.ndarray` of shape `(n, d)`), labels (`np.ndarray` of shape `(n,)`): training samples; each of the
            k classes has one.
        index (`np.ndarray` of shape `(n,)`): sample ids.
        num_labels (`int`): number of classes k.
        strength (`float`): C, as [`fit_linear_probe`] chose it.
        sample_weights (`np.ndarray` of shape `(n,)`, *optional*): w in [0, 1]. Samples of weight 0 are predicted too.
        folds (`int`): number of parts, at least 2; no more than the largest class has samples.
        max_iter (`int`): of L-BFGS.
        seed (`int`): of the parts.

    Returns:
        structured `np.ndarray` of shape `(n,)`, ordered by `index`: records as of [`TrainingDynamics`]. The only
        sample of a class counts as not seen, since no other part knows the class.

    Raises:
        ValueError: if no class has two samples.
    """
    counts = np.bincount(labels, minlength=num_labels)
    if counts.max() < 2:
        raise ValueError(
            f"Cross-validation needs a class of two samples; each of the {len(labels)} is of another class. Without "
            "an audit and a symmetric correction (`--audit false --symmetric_correction false`) none is needed."
        )
    parts = StratifiedKFold(min(folds, counts.max()), shuffle=True, random_state=seed)
    weights = np.ones(len(labels)) if sample_weights is None else sample_weights
    with warnings.catch_warnings():  # of classes with fewer samples than parts: the rest of them are predicted
        warnings.filterwarnings("ignore", message="The least populated class in y has only")
        warnings.filterwarnings("ignore", message="Number of classes in training fold")
        probabilities = cross_val_predict(
            _classifier(strength, max_iter),
            features,
            labels,
            cv=parts,
            method="predict_proba",
            params=_weighted(weights),
        )
    return score_predictions(index, labels, probabilities, seen=counts[labels] > 1, held_out=True)


def _classifier(strength: float, max_iter: int) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=max_iter))


def _weighted(weights: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{step}__sample_weight": weights for step in ("standardscaler", "logisticregression")}


@torch.no_grad()
def set_head(classifiers: Sequence[torch.nn.Module], probe: LinearProbe):
    """Put a probe into the last linear layer of a model, so that it is an ordinary classifier.

    Args:
        classifiers (`Sequence[torch.nn.Module]`): `model.classifiers`; all get the same weights (timm averages them).
        probe (`LinearProbe`): of the features that this layer sees.

    Raises:
        ValueError: if a layer has no bias to hold the probe's.
    """
    for classifier in classifiers:
        if classifier.bias is None:
            raise ValueError("The last linear layer of this backbone has no bias, which a linear probe needs.")
        classifier.weight.copy_(probe.weight.view_as(classifier.weight))
        classifier.bias.copy_(probe.bias)


def start_from_probe(
    model,
    dataset: Dataset,
    held_out: Dataset,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    cross_validate: bool = False,
) -> tuple[LinearProbe, np.ndarray | None]:
    """Give a pretrained model the head of its linear probe, so that fine-tuning does not begin by bending good
    features to a random head (Kumar et al., ICLR 2022).

    All processes must call it together; they get the head of the first one.

    Args:
        model: a [`TimmCAMForImageClassification`], on its device.
        dataset, held_out (`TransformedDataset`): with the evaluation transform; at most 50,000 samples of each count.
            Weights of training samples count. Where a monitor keeps labels from every loss ([`MemorizationMonitor`]),
            `dataset` must not hold those either, or it measures nothing.
        batch_size (`int`), num_workers (`int`): see [`pooled_features`].
        seed (`int`): of the choice of samples.
        cross_validate (`bool`): whether the records of [`cross_validate_probe`] are wanted.

    Returns:
        [`LinearProbe`], and the records of the training samples that count, or `None`.

    Raises:
        ValueError: as [`fit_linear_probe`], [`cross_validate_probe`] and [`set_head`].
    """
    samples, weights, index = [], None, None
    for whole in (dataset, held_out):
        rows = np.sort(np.random.default_rng(seed).permutation(len(whole))[:START_SAMPLES])
        part = Subset(whole, rows.tolist())
        samples += pooled_features(model, part, batch_size=batch_size, num_workers=num_workers)
        if whole is dataset:
            index = whole.index[rows]
            weights = None if whole.weights is None else whole.weights[rows]
    how = {"num_labels": model.config.num_labels, "sample_weights": weights}
    probe, records = fit_linear_probe(*samples, **how), None
    if cross_validate:
        records = cross_validate_probe(
            samples[0], samples[1], np.asarray(index), strength=probe.strength, seed=seed, **how
        )
    set_head(model.classifiers, probe)
    for classifier in model.classifiers:
        for parameter in classifier.parameters():
            parameter.data.copy_(broadcast(parameter.data))
    return probe, records
