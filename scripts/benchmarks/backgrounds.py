"""A trial of the mask-guided level where its premise holds: wrong labels that go with the background.

    python scripts/benchmarks/backgrounds.py make outputs/backgrounds/data
    python scripts/benchmarks/benchmark.py accuracy --suite scripts/benchmarks/suites/backgrounds.yaml \\
        --work_dir outputs/backgrounds/runs
    python scripts/benchmarks/backgrounds.py measure outputs/backgrounds --output docs/results/backgrounds.json

Garments of Fashion-MNIST (from the package, enlarged to 42 x 42) lie anywhere on a texture of 56 x 56 pixels. There is
a texture for each class. 30 % of the training images are mislabeled, and lie on the texture of the wrong label; the
others, and the test images, lie on that of a class drawn at random. So the texture speaks for the given label of a
mislabeled image and for nothing else. `misleading.parquet` has the test images on the texture of a wrong class each.

Measured: the accuracy on both tests, and how far the maps keep to the garment, whose pixels are known.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from provenance import provenance

from hnml_hf import TimmCAMForImageClassification, load_noisy_dataset
from hnml_hf.inference import predict


SIDE, OBJECT = 56, 42
RATE = 0.3  # of the training labels are wrong
CLASSES = 10


def texture(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Stripes of one of ten directions and widths, with a phase of their own, of shape `(SIDE, SIDE)` in [0, 1]."""
    angle, period = np.pi * (kind % 5) / 5, (5, 9)[kind // 5]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    wave = np.sin(2 * np.pi * (rows * np.sin(angle) + columns * np.cos(angle)) / period + rng.uniform(0, 2 * np.pi))
    return np.clip(0.35 + 0.1 * wave + rng.normal(0, 0.05, (SIDE, SIDE)), 0, 1)


def compose(garment: np.ndarray, kind: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A garment of shape `(OBJECT, OBJECT)` somewhere on a texture.

    Returns:
        the image and the garment's pixels, both uint8 of shape `(SIDE, SIDE)`.
    """
    top, left = rng.integers(0, SIDE - OBJECT + 1, 2)
    place = (slice(top, top + OBJECT), slice(left, left + OBJECT))
    mask, image = np.zeros((SIDE, SIDE), np.uint8), (255 * texture(kind, rng)).astype(np.uint8)
    mask[place] = garment > 0
    image[place] = np.where(garment > 0, garment, image[place])
    return image, mask


def another(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A class for each label that is not the label."""
    return (labels + rng.integers(1, CLASSES, len(labels))) % CLASSES


def rows(split: Dataset, noisy: np.ndarray, kinds: np.ndarray, rng: np.random.Generator) -> Dataset:
    """Garments on textures of `kinds`, with their clean and given labels and the garments' pixels."""
    pairs = [
        compose(np.asarray(image.convert("L").resize((OBJECT, OBJECT))), kind, rng)
        for image, kind in zip(split["image"], kinds, strict=True)
    ]
    label = ClassLabel(names=split.features["clean_label"].names)
    columns = {
        "image": [image for image, _ in pairs],
        "label": list(split["clean_label"]),
        "noisy": noisy.tolist(),
        "index": list(range(len(kinds))),
        "texture": kinds.tolist(),
        "garment": [mask for _, mask in pairs],
    }
    number = Value("int64")
    features = {
        "image": Image(),
        "label": label,
        "noisy": label,
        "index": number,
        "texture": number,
        "garment": Image(),
    }
    return Dataset.from_dict(columns, features=Features(features))


def make(folder: Path):
    rng = np.random.default_rng(0)
    data = load_noisy_dataset("quickstart")
    clean = np.array(data["train"]["clean_label"])
    wrong = rng.permutation(len(clean)) < round(RATE * len(clean))
    noisy = np.where(wrong, another(clean, rng), clean)
    kinds = np.where(wrong, noisy, rng.integers(0, CLASSES, len(clean)))
    test = np.array(data["test"]["clean_label"])
    splits = {
        "train": rows(data["train"], noisy, kinds, rng),
        "test": rows(data["test"], test, rng.integers(0, CLASSES, len(test)), rng),
        "misleading": rows(data["test"], test, another(test, rng), rng),
    }
    folder.mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")


def on_garment(cam: np.ndarray, garment: np.ndarray) -> tuple[bool, float]:
    """Whether a map's highest cell holds a pixel of the garment, and the share of the map that lies on the garment.

    A cell counts as far as the garment covers it, so that a coarse map is not blamed for its coarseness alone.
    """
    cells = cam.shape[0]
    share = garment.reshape(cells, SIDE // cells, cells, SIDE // cells).mean((1, 3))
    highest = np.unravel_index(cam.argmax(), cam.shape)
    return bool(share[highest] > 0), float((cam * share).sum() / max(cam.sum(), 1e-9))


def measure(folder: Path, output: Path):
    splits = {
        name: load_dataset("parquet", data_files=str(folder / "data" / f"{name}.parquet"), split="train")
        for name in ("test", "misleading")
    }
    records = []
    for line in (folder / "runs" / "runs.jsonl").read_text("utf-8").splitlines():
        run = json.loads(line)
        place = "-".join(
            "".join(c if c.isalnum() else "_" for c in str(run[axis])) for axis in ("noise", "method", "seed")
        )
        model = TimmCAMForImageClassification.from_pretrained(folder / "runs" / place).eval()
        found = {}
        for name, split in splits.items():
            names = split.features["label"].names
            right, hits, shares = [], [], []
            predictions = predict(model, split["image"], top_k=1, batch_size=250, with_cams=True)
            for prediction, label, garment in zip(predictions, split["label"], split["garment"], strict=True):
                hit, share = on_garment(prediction.cam, np.asarray(garment))
                right.append(prediction.labels[0] == names[label])
                hits.append(hit)
                shares.append(share)
            found |= {
                f"{name}_accuracy": round(float(np.mean(right)), 4),
                f"{name}_highest_on_garment": round(float(np.mean(hits)), 4),
                f"{name}_share_on_garment": round(float(np.mean(shares)), 4),
            }
        kept = ("noise", "method", "seed", "command", "last", "best", "auroc", "memorized", "cost_ce", "commit")
        records.append({name: run.get(name) for name in kept} | found)
        print(records[-1]["method"], records[-1]["seed"], found, flush=True)
    covered = float(np.mean([np.asarray(garment).mean() for garment in splits["test"]["garment"]]))
    result = {
        "what": "garments on textures, where 30 % of the training labels are wrong and go with the texture",
        "command": f"python scripts/benchmarks/backgrounds.py measure outputs/backgrounds --output {output}",
        **provenance(threads=torch.get_num_threads()),
        "covered_by_garment": round(covered, 4),
        "runs": records,
    }
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    task = tasks.add_parser("make", help="the images")
    task.add_argument("folder", type=Path, help="A new folder.")
    task.set_defaults(run=lambda args: make(args.folder))
    task = tasks.add_parser("measure", help="finished runs")
    task.add_argument("folder", type=Path, help="With `data` and `runs`.")
    task.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    task.set_defaults(run=lambda args: measure(args.folder, args.output))
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
