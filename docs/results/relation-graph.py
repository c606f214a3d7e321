"""A relation graph after Kim et al. (NeurIPS 2023) beside the judge: AUROC of each, and of both together.

python docs/results/relation-graph.py CIFAR_FEATURES IMAGENETTE_FEATURES > docs/results/relation-graph.json

The arguments are the `values.npy` of audits of CIFAR-10N's 50,000 training images and of 2,000 images of Imagenette.
The graph's score of sample i is -sum_j k_ij s_ij / sum_j k_ij, where s is 1 if the given labels agree, else -1, and
k_ij is max(cosine of the features, 0)^power times the cosine of the judge's out-of-fold class probabilities.
"""

import json
import sys

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from hnml_hf.audit.judge import judge_labels


POWERS, SHARES, CIFAR, CHUNK = (1, 4, 16), (0.1, 0.3), "data/cifar10n/train-0000{}-of-00003.parquet", 1_000


def without_label(judgement, labels):
    transition = judgement.transition_matrix[judgement.top_labels, labels[:, None]]
    found = np.zeros((len(labels), len(judgement.transition_matrix)))
    np.put_along_axis(found, judgement.top_labels, judgement.posterior / np.maximum(transition, 1e-12), 1)
    return found / found.sum(1, keepdims=True)


def relation(features, probabilities, labels, power):
    features, labels = F.normalize(features, dim=1), torch.from_numpy(labels)
    probabilities = F.normalize(torch.from_numpy(probabilities).float(), dim=1)
    scores = torch.zeros(len(labels))
    for start in range(0, len(labels), CHUNK):
        rows = torch.arange(start, min(start + CHUNK, len(labels)))
        kernel = (features[rows] @ features.T).clamp(min=0) ** power * (probabilities[rows] @ probabilities.T)
        kernel[torch.arange(len(rows)), rows] = 0
        alike = 2 * (labels[rows][:, None] == labels[None]).float() - 1
        scores[rows] = -(kernel * alike).sum(1) / kernel.sum(1).clamp(min=1e-9)
    return scores.numpy()


def ranks(scores):
    return np.argsort(np.argsort(scores)) / len(scores)


def compare(name, features, labels, truth):
    wrong = labels != truth
    judgement = judge_labels(features, labels, num_labels=10, groups=np.arange(len(labels)), device="cpu")
    record = {"data": name, "rows": len(labels), "wrong": round(float(wrong.mean()), 4)}
    record["judge"] = round(roc_auc_score(wrong, judgement.log_odds), 4)
    for power in POWERS:
        scores = relation(judgement.projection(features), without_label(judgement, labels), labels, power)
        record[f"graph, power {power}"] = round(roc_auc_score(wrong, scores), 4)
        for share in SHARES:
            both = (1 - share) * ranks(judgement.log_odds) + share * ranks(scores)
            record[f"{share} of its rank"] = max(
                record.get(f"{share} of its rank", 0), round(roc_auc_score(wrong, both), 4)
            )
        standard = (scores - scores.mean()) / scores.std()
        both = np.clip(judgement.log_odds, -20, 20) + standard
        record["added to the log odds"] = max(
            record.get("added to the log odds", 0), round(roc_auc_score(wrong, both), 4)
        )
    return record


torch.set_num_threads(1)
random = np.random.default_rng(0)
columns = ["label", "worse_label", "aggre_label"]
table = pd.concat([pd.read_parquet(CIFAR.format(part), columns=columns) for part in range(3)], ignore_index=True)
rows = np.sort(random.permutation(50_000)[:10_000])
features, table = np.array(np.load(sys.argv[1], mmap_mode="r")[rows]), table.iloc[rows].astype(np.int64)
truth = table["label"].to_numpy()
records = [
    compare("CIFAR-10N worse", features, table["worse_label"].to_numpy(), truth),
    compare("CIFAR-10N aggre", features, table["aggre_label"].to_numpy(), truth),
]
drawn = random.random(len(truth)) < 0.5
symmetric = np.where(drawn, (truth + random.integers(1, 10, len(truth))) % 10, truth)
records.append(compare("CIFAR-10 symmetric 50 %", features, symmetric, truth))
pairs = np.where(random.random(len(truth)) < 0.4, (truth + 1) % 10, truth)
records.append(compare("CIFAR-10 pair flip 40 %", features, pairs, truth))
features = np.array(np.load(sys.argv[2], mmap_mode="r"))
table = pd.read_parquet("data/imagenette224-noisy-2k/train.parquet").drop(columns="image").astype(np.int64)
for rate in (5, 25, 50):
    given = table[f"noisy_labels_{rate}"].to_numpy()
    records.append(compare(f"Imagenette {rate} %", features, given, table["label"].to_numpy()))
print(json.dumps({"note": "of the powers, the best for each row and way of fusing", "records": records}, indent=1))
