"""How good the classifier is that an audit writes, with nothing trained: accuracy on the clean test images; and its
cross-entropy on the given labels, as it is and with the temperature that training on them starts from.

python docs/results/judge-alone.py FILE_OF_WEIGHTS FOLDER_FOR_FEATURES > docs/results/judge-alone.json
"""

import json
import sys

import numpy as np
import timm
import torch
from torch.nn import functional as F

from hnml_hf import add_noise, load_noisy_dataset
from hnml_hf.audit.features import extract_features, load_backbone
from hnml_hf.audit.issues import judge_classifier, judge_features
from hnml_hf.audit.judge import Head
from hnml_hf.audit.start import as_sure_as_labels


CIFAR = {"clean_label_column": "label", "test_label_column": "label", "index_column": "index"}
PHOTOGRAPHS = {
    "clean_label_column": "label",
    "test_label_column": "label",
    "splits": {"train": "train.parquet", "test": "validation.parquet"},
}
AT_RANDOM = {"kind": "symmetric", "rate": 0.5, "draw": "exact"}
PAIRS = {"kind": "asymmetric", "rate": 0.4, "asymmetric_scheme": "cifar10", "draw": "exact"}
ROWS = (  # as the suites `finetune` and `imagenette-judge` have them
    ("50 %", "data/imagenette224-noisy-2k", PHOTOGRAPHS | {"label_column": "noisy_labels_50"}, None),
    ("25 %", "data/imagenette224-noisy-2k", PHOTOGRAPHS | {"label_column": "noisy_labels_25"}, None),
    ("human 40 %", "data/cifar10n", CIFAR | {"label_column": "worse_label"}, None),
    ("human 9 %", "data/cifar10n", CIFAR | {"label_column": "aggre_label"}, None),
    ("symmetric 50 %", "data/cifar10n", CIFAR | {"label_column": "label"}, AT_RANDOM),
    ("asymmetric 40 %", "data/cifar10n", CIFAR | {"label_column": "label"}, PAIRS),
    ("clean", "data/cifar10n", CIFAR | {"label_column": "label"}, None),
)
HELD_OUT = 0.1  # of the training rows, as for a training run

weights, folder = sys.argv[1:]
torch.set_num_threads(1)
backbone = load_backbone("tf_efficientnet_lite0", pretrained=weights, image_size=224)
records = []
for noise, data, options, corruption in ROWS:
    splits = load_noisy_dataset(data, **options)
    rows = add_noise(splits["train"], seed=0, **corruption) if corruption else splits["train"]
    rows = rows.train_test_split(test_size=HELD_OUT, seed=0)["train"]
    features = extract_features(rows, backbone, cache_dir=folder)
    seen = extract_features(splits["test"], backbone, cache_dir=f"{folder}/test")
    model = judge_classifier(rows, features, judge_features(rows, features), backbone)
    (head,) = model.classifiers
    head = Head(head.weight.detach(), head.bias.detach())
    values, labels = (np.array(part.values[:, : head.weight.shape[1]]) for part in (seen, features)), rows["label"]
    tests, trained = (torch.from_numpy(part) for part in values)
    right = (tests @ head.weight.mT + head.bias).argmax(1).numpy() == np.array(splits["test"]["clean_label"])
    given = torch.tensor(labels)
    scaled = as_sure_as_labels(head, trained.numpy(), given.numpy())
    losses = [float(F.cross_entropy(trained @ part.weight.mT + part.bias, given)) for part in (head, scaled)]
    records.append(
        {
            "noise": noise,
            "rows": len(rows),
            "test_rows": len(right),
            "last": round(float(right.mean()), 4),
            "cross_entropy_of_given_labels": round(losses[0], 2),
            "the_same_scaled": round(losses[1], 2),
        }
    )
    print(records[-1], file=sys.stderr)
versions = {"torch": torch.__version__, "timm": timm.__version__}
facts = {"backbone": "tf_efficientnet_lite0.in1k", "pixels": 224, "threads": 1, "versions": versions}
print(json.dumps(facts | {"records": records}, indent=1))
