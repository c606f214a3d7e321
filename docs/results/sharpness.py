"""How sharp the judge's predictions should be: its figures with the weights of highest likelihood times a factor.

python docs/results/sharpness.py CIFAR_FEATURES FASHION_FEATURES > docs/results/sharpness.json

The arguments are the `values.npy` of audits of CIFAR-10N's 50,000 training images at 224 pixels and of the first
10,000 training images of Fashion-MNIST at 96. *Doubt*: a label is wrong the more often, the less a discriminant of a
quarter of the features, fitted to 2,000 true labels, tells its class from the next one, which takes its place.
*Subclasses*: k-means splits each class of CIFAR-10 into ten; a wrong `worse_label` is the nearest subclass of the
class that was given.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from scipy.special import expit, softmax
from sklearn.cluster import KMeans
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import scale

from hnml_hf import load_noisy_dataset
from hnml_hf.audit import judge
from hnml_hf.noise.draws import corrupt_labels
from hnml_hf.noise.transitions import flip_transition_matrix, pair_flip_transition_matrix, symmetric_transition_matrix


FACTORS = (1.0, 1.5, 2.0, 3.0, 6.0)
CIFAR_PAIRS, FASHION_PAIRS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}, {7: 5, 2: 4, 5: 7, 6: 0, 3: 6}
ROWS, SUBCLASSES = 10_000, 10


def drawn(true: np.ndarray, matrix: torch.Tensor) -> np.ndarray:
    return corrupt_labels(torch.from_numpy(true), matrix, generator=torch.Generator().manual_seed(0)).numpy()


def doubtful(features: np.ndarray, true: np.ndarray, rate: float) -> np.ndarray:
    generator = np.random.default_rng(0)
    some = scale(features[:, generator.permutation(features.shape[1])[: features.shape[1] // 4]])
    other_view = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.6).fit(some[:2_000], true[:2_000])
    logits, everyone = other_view.decision_function(some), np.arange(len(true))
    own = logits[everyone, true].copy()
    logits[everyone, true] = -np.inf
    doubt = logits.max(1) - own
    steepness = 2 / doubt.std()
    offset = brentq(lambda value: expit(steepness * doubt + value).mean() - rate, -100, 100)
    wrong = generator.random(len(true)) < expit(steepness * doubt + offset)
    nexts = softmax(steepness * logits, axis=1)
    return np.array([generator.choice(len(p), p=p) if w else t for w, p, t in zip(wrong, nexts, true, strict=True)])


def subclasses(features: np.ndarray, true: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and given subclasses, by distances in 200 of the features."""
    some = scale(features[:, np.random.default_rng(0).permutation(features.shape[1])[:200]])
    parts = [KMeans(SUBCLASSES, n_init=3, random_state=0).fit(some[true == label]) for label in range(10)]
    nearest = np.stack([label * SUBCLASSES + part.predict(some) for label, part in enumerate(parts)], 1)
    everyone = np.arange(len(true))
    return nearest[everyone, true], nearest[everyone, given]


def label_sets(cifar: np.ndarray, fashion: np.ndarray):
    """Name, features, given and true labels of each."""
    table = pd.concat(
        [pd.read_parquet(path).drop(columns="image") for path in sorted(Path("data/cifar10n").glob("train-*"))]
    )
    true = table["label"].to_numpy()
    for count in (ROWS, 2_000):
        for column in ("worse_label", "aggre_label", "random_label1"):
            yield f"CIFAR-10N {column}", cifar[:count], table[column].to_numpy()[:count], true[:count]
    of_fashion = load_noisy_dataset("data/fashion_mnist", label_column="label")["train"]["label"]
    for name, features, right, pairs in (
        ("CIFAR-10", cifar[:ROWS], true[:ROWS], CIFAR_PAIRS),
        ("Fashion-MNIST", fashion[:ROWS], np.array(of_fashion[:ROWS]), FASHION_PAIRS),
    ):
        yield f"{name}, none", features, right, right
        at_random = symmetric_transition_matrix(10, 0.5, include_true=False)
        yield f"{name}, symmetric 50 %", features, drawn(right, at_random), right
        in_pairs = flip_transition_matrix(10, 0.4, flips=pairs)
        yield f"{name}, asymmetric 40 %", features, drawn(right, in_pairs), right
        yield f"{name}, pair flip 45 %", features, drawn(right, pair_flip_transition_matrix(10, 0.45)), right
        for rate in (0.2, 0.4):
            yield f"{name}, doubt {rate:.0%}", features, doubtful(features, right, rate), right
    some = slice(2 * ROWS)
    fine, given = subclasses(cifar[some], true[some], table["worse_label"].to_numpy()[some])
    yield "100 subclasses, human", cifar[some], given, fine
    yield "100 subclasses, none", cifar[some], fine, fine


def measured(name: str, features: np.ndarray, labels: np.ndarray, true: np.ndarray) -> dict:
    wrong, num_labels, factors = labels != true, int(true.max()) + 1, {}
    for factor in FACTORS:
        with mock.patch.object(judge, "SHARPENED", factor):
            found = judge.judge_labels(features, labels, num_labels=num_labels, device="cpu")
        factors[factor] = {
            "auroc": round(float(roc_auc_score(wrong, found.log_odds)), 4) if wrong.any() else None,
            "relabeled_right": round(float((found.predicted_labels == true).mean()), 4),
            "estimated_rate": round(found.noise_rate, 4),
        }
        if factor == judge.SHARPENED:
            bounds = [round(bound, 4) for bound in found.noise_rate_range]
    record = {"labels": name, "rows": len(labels), "true_rate": round(float(wrong.mean()), 4)}
    return record | {"estimated_rate_range": bounds, "factors": factors}


torch.set_num_threads(1)
records = []
for name, features, labels, true in label_sets(*(np.load(path) for path in sys.argv[1:])):
    records.append(measured(name, features, labels, true))
    print(records[-1], file=sys.stderr, flush=True)
facts = {"backbone": "tf_efficientnet_lite0.in1k", "threads": 1, "seed": 0, "versions": {"torch": torch.__version__}}
print(json.dumps(facts | {"records": records}, indent=1))
