"""Features of EfficientNet-lite0 for the runs of a suite, which take them from a folder beside their own.

python scripts/benchmarks/shared_features.py data/cifar10n 224 outputs/finetune/features
"""

import sys
from pathlib import Path

from datasets import load_dataset

from hnml_hf.audit.features import FEATURES_FOLDER, extract_features, load_backbone


WEIGHTS = "data/weights/tf_efficientnet_lite0.in1k.safetensors"


def main(data: str, size: str, folder: str):
    rows = load_dataset("parquet", data_files=str(Path(data, "train*.parquet")), split="train")
    backbone = load_backbone("tf_efficientnet_lite0", pretrained=WEIGHTS, image_size=int(size))
    found = extract_features(rows, backbone, cache_dir=Path(folder, FEATURES_FOLDER))
    print(f"{found.values.shape} at {size} pixels, seconds: {found.seconds}")


if __name__ == "__main__":
    main(*sys.argv[1:])
