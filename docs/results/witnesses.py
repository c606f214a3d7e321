"""Who finds the wrong labels while a network is trained from random weights, epoch by epoch: its own predictions, the
share of epochs in which it disagreed with the label (the counter of IDO), and the judge on its features.

python docs/results/witnesses.py RUN... > docs/results/witnesses.json

RUN is the folder of a run of `scripts/train.py --recipe cifar10n_10k_cpu --label_column worse_label --seed 0
--learning_rate 0.2 --lr_scheduler_type constant --save_strategy epoch --save_total_limit 100`. The averaged weights
are asked, with the 9,000 training images as they are. *Right*: of how many the most probable class is the true one.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F


sys.path.append(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))

from provenance import provenance

from hnml_hf import (
    TimmCAMForImageClassification,
    TransformedDataset,
    create_transforms,
    judge_labels,
    load_noisy_dataset,
    split_validation,
)
from hnml_hf.audit.start import pooled_features


def records(folder: Path, rows):
    given, true = np.array(rows["label"]), np.array(rows["clean_label"])
    wrong, everyone = given != true, np.arange(len(given))
    disagreements = np.zeros(len(given))
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for epoch, checkpoint in enumerate(checkpoints, 1):
        model = TimmCAMForImageClassification.from_pretrained(checkpoint / "teacher")
        dataset = TransformedDataset(rows, create_transforms(model.config.pretrained_cfg)[1])
        features, labels = pooled_features(model, dataset, batch_size=250)
        assert (labels == given).all()
        (head,) = model.classifiers
        with torch.no_grad():
            logits = torch.from_numpy(features) @ head.weight.flatten(1).mT + head.bias
            probabilities = F.softmax(logits, 1).numpy()
        disagreements += probabilities.argmax(1) != given
        judgement = judge_labels(features, given, num_labels=10, seed=0)
        doubt = judgement.noise_scores
        counted = disagreements / epoch
        yield {
            "run": folder.name,
            "epoch": epoch,
            "fit": round(float((probabilities.argmax(1) == given).mean()), 4),
            "right_by_network": round(float((probabilities.argmax(1) == true).mean()), 4),
            "right_by_judge": round(float((judgement.predicted_labels == true).mean()), 4),
            "auroc_network": round(roc_auc_score(wrong, 1 - probabilities[everyone, given]), 4),
            "auroc_counter": round(roc_auc_score(wrong, counted), 4),
            "auroc_judge": round(roc_auc_score(wrong, doubt), 4),
            "auroc_judge_and_counter": round(roc_auc_score(wrong, rankdata(doubt) + rankdata(counted)), 4),
        }


torch.set_num_threads(1)
data = load_noisy_dataset(
    "data/cifar10n-10k", label_column="worse_label", clean_label_column="label", index_column="index"
)
rows, _ = split_validation(data["train"], fraction=0.1, seed=0)
found = []
for folder in sys.argv[1:]:
    for record in records(Path(folder), rows):
        print(record, file=sys.stderr)
        found.append(record)
about = {"what": " ".join(__doc__.split("\n\n")[0].split())} | provenance(threads=1)
print(json.dumps(about | {"records": found}, indent=1))
