"""Several views of each image in the audit's pass: AUROC of the judge on the mean of their features.

python docs/results/crops.py FILE_OF_WEIGHTS FOLDER_FOR_FEATURES > docs/results/crops.json

The views are the whole image, its mirror image, and its middle 7/8 in width and height. Each costs a forward pass.
"""

import json
import sys

import numpy as np
import timm
import torch
from PIL import ImageOps
from sklearn.metrics import roc_auc_score

from hnml_hf import add_noise, judge_labels, load_noisy_dataset
from hnml_hf.audit.features import extract_features, load_backbone


PAIRS = {"kind": "asymmetric", "rate": 0.4, "asymmetric_scheme": "cifar10"}
AT_RANDOM = {"kind": "symmetric", "rate": 0.5}
DATASETS = {  # folder: pixels, rows, columns of given labels, noises that are drawn
    "cifar10n": (128, 10_000, ("worse_label", "aggre_label"), {"symmetric 50 %": AT_RANDOM, "asymmetric 40 %": PAIRS}),
    "fashion_mnist": (96, 10_000, (), {"symmetric 50 %": AT_RANDOM, "asymmetric 40 %": PAIRS}),
    "imagenette224-noisy-2k": (224, 2_000, ("noisy_labels_5", "noisy_labels_25", "noisy_labels_50"), {}),
}


def middle(image):
    """What is left without a sixteenth of the image at each side."""
    width, height = image.size
    return image.crop((width / 16, height / 16, width - width / 16, height - height / 16))


VIEWS = {"whole": None, "mirrored": ImageOps.mirror, "middle": middle, "middle, mirrored": ImageOps.mirror}
MEANS = {
    "whole": ("whole",),
    "and mirrored": ("whole", "mirrored"),
    "and middle": ("whole", "middle"),
    "all four": tuple(VIEWS),
}


def features_of_views(rows, backbone, folder: str) -> dict[str, np.ndarray]:
    """Features `(n, d)` of each view, in the order of the rows."""
    found, seen = {}, {}
    for name, change in VIEWS.items():
        base = seen["middle"] if name == "middle, mirrored" else rows
        seen[name] = base if change is None else base.map(lambda row, change=change: {"image": change(row["image"])})
        found[name] = np.array(extract_features(seen[name], backbone, cache_dir=f"{folder}/{name}").values)
    return found


weights, folder = sys.argv[1:]
torch.set_num_threads(1)
records = []
for data, (pixels, count, columns, noises) in DATASETS.items():
    backbone = load_backbone("tf_efficientnet_lite0", pretrained=weights, image_size=pixels)
    true = load_noisy_dataset(f"data/{data}", label_column="label", clean_label_column="label")["train"]
    true = true.select(range(min(count, len(true))))
    views = features_of_views(true, backbone, f"{folder}/{data}")
    given = {name: np.array(add_noise(true, **noise, seed=0)["label"]) for name, noise in noises.items()}
    for column in columns:
        rows = load_noisy_dataset(f"data/{data}", label_column=column, clean_label_column="label")["train"]
        given[column] = np.array(rows.select(range(len(true)))["label"])
    for noise, labels in given.items():
        wrong = labels != np.array(true["clean_label"])
        record = {"data": data, "pixels": pixels, "rows": len(labels), "labels": noise}
        for name, parts in MEANS.items():
            features = np.mean([views[part] for part in parts], axis=0)
            judgement = judge_labels(features, labels, num_labels=10, groups=np.arange(len(labels)), device="cpu")
            record[name] = round(float(roc_auc_score(wrong, judgement.log_odds)), 4)
        records.append(record)
        print(record, file=sys.stderr, flush=True)
versions = {"torch": torch.__version__, "timm": timm.__version__}
facts = {"backbone": "tf_efficientnet_lite0.in1k", "threads": 1, "seed": 0, "versions": versions}
print(json.dumps(facts | {"records": records}, indent=1))
