"""How well wrong labels are found: one run of this package beside cleanlab, last-epoch loss and AUM.

cleanlab gets 5-fold cross-validated predictions and, in another row, those of one run on its own training images.

    python scripts/benchmarks/benchmark.py audit --data_root data --output docs/results/audit_benchmark.json

All runs on a dataset have one backbone, batch size and number of epochs. `judge` trains no network: it
judges by the last layer of a pretrained EfficientNet-lite0 (`--data_root`/weights, or from the Hub). Every run
leaves its predictions in `--work_dir`; a second call trains only what is missing there.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
from provenance import provenance
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F
from torch.utils.data import Dataset

from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    TimmCAMForImageClassification,
    add_noise,
    collate_images,
    load_noisy_dataset,
    noise_scores,
)
from hnml_hf.audit.start import judge_records, start_from_judge
from hnml_hf.training.provenance import commit


FOLDS = 5
NUM_LABELS = 10
CLASSES = [str(number) for number in range(NUM_LABELS)]
PRETRAINED = "tf_efficientnet_lite0"
SMALLEST = 64  # pixels that the pretrained backbone gets at least
NOT_KNOWN = 1e-7  # float16 cannot tell smaller probabilities from 0


@dataclass(frozen=True)
class Setting:
    """A dataset of the benchmark: noise of the quickstart data, or folder and column; and how it is trained on."""

    source: dict | tuple[str, str] | None
    size: int
    epochs: int
    pretrained: bool = False  # fine-tuning that starts from the judge; else a narrow ResNet from random weights

    def options(self) -> dict:
        if self.pretrained:  # those of scripts/recipes/imagenette_noisy.yaml
            return {
                "learning_rate": 0.005,
                "weight_decay": 1e-4,
                "per_device_train_batch_size": 32,
                "warmup_steps": 0.1,
                "monitor_fraction": 0,
            }
        return {"learning_rate": 0.05, "weight_decay": 5e-4, "per_device_train_batch_size": 64}


ASYMMETRIC = {"kind": "asymmetric", "rate": 0.4, "seed": 0, "asymmetric_scheme": "cifar10"}
IMAGENETTE = ("imagenette224-noisy-2k", "noisy_labels_25")
DATASETS = {
    "cifar10n-10k worse": Setting(("cifar10n-10k", "worse_label"), 32, 30),
    "quickstart symmetric 50 %": Setting({"kind": "symmetric", "rate": 0.5, "seed": 0}, 28, 20),
    "quickstart asymmetric 40 %": Setting(ASYMMETRIC, 28, 20),
    "imagenette-noisy 25 %": Setting(IMAGENETTE, 64, 30),
    "imagenette-noisy 25 %, pretrained": Setting(IMAGENETTE, 128, 5, pretrained=True),
    "quickstart 0 %": Setting(None, 28, 20),
}


class MemoryImages(Dataset):
    """A dataset as normalized tensors, with a random shift and flip, so that a CPU spends its time on the network.

    Args:
        dataset (`datasets.Dataset`): columns `image`, `label`, `clean_label`.
        size (`int`): height and width.
        normalization (`tuple`, *optional*): mean and standard deviation of each channel; default: the images' own.
    """

    weights = None
    augmented = True

    def __init__(self, dataset, size: int, normalization: tuple | None = None):
        self.labels, self.clean_labels = (np.array(dataset[name]) for name in ("label", "clean_label"))
        self.index = np.arange(len(dataset))
        pixels = np.stack([np.asarray(image.convert("RGB").resize((size, size))) for image in dataset["image"]])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        if normalization is None:
            mean, deviation = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        else:
            mean, deviation = map(torch.tensor, normalization)
        self.images = (pixels - mean[:, None, None]) / deviation[:, None, None]
        self.shift, self.size = size // 8, size
        self.generator = torch.Generator().manual_seed(0)

    def select(self, rows: np.ndarray, *, augmented: bool = True) -> "MemoryImages":
        part = object.__new__(MemoryImages)
        part.__dict__.update(self.__dict__)
        part.augmented = augmented
        for name in ("labels", "clean_labels", "index", "images"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, rows: list[int]) -> list[dict]:
        padded = F.pad(self.images[rows], (self.shift,) * 4)
        corners = torch.randint(0, 2 * self.shift + 1, (len(rows), 2), generator=self.generator).tolist()
        flips = torch.rand(len(rows), generator=self.generator) < 0.5
        if not self.augmented:
            corners, flips = [(self.shift, self.shift)] * len(rows), torch.zeros(len(rows), dtype=torch.bool)
        samples = []
        for place, (row, (top, left)) in enumerate(zip(rows, corners, strict=True)):
            image = padded[place, :, top : top + self.size, left : left + self.size]
            samples.append(
                {
                    "pixel_values": image.flip(-1) if flips[place] else image,
                    "labels": int(self.labels[row]),
                    "clean_labels": int(self.clean_labels[row]),
                    "index": int(self.index[row]),
                }
            )
        return samples


class RecordingTrainer(HNMLTrainer):
    """Keeps what the student said of each sample in each epoch: an array of shape `(epochs, n, k)`, float16."""

    def record(self, epochs: int, samples: int):
        self.said = np.zeros((epochs, samples, NUM_LABELS), np.float16)

    def objective_step(self, model, pixel_values, *, inputs, active_terms):
        terms, monitors = super().objective_step(model, pixel_values, inputs=inputs, active_terms=active_terms)
        epoch, index = int(self.state.epoch or 0), inputs["index"].cpu().numpy()
        self.said[epoch, index] = monitors["logits"].detach().float().softmax(-1).cpu().numpy()
        return terms, monitors


def load_images(setting: Setting, data_root: Path, *, pretrained: bool) -> MemoryImages:
    source = setting.source
    if isinstance(source, tuple):
        folder, column = source
        data = load_noisy_dataset(str(data_root / folder), label_column=column, clean_label_column="label")["train"]
    else:
        data = load_noisy_dataset("quickstart")["train"]
        data = add_noise(data, **source) if source else data
    if not pretrained:
        return MemoryImages(data, setting.size)
    known = timm.get_pretrained_cfg(PRETRAINED)
    return MemoryImages(data, max(setting.size, SMALLEST), (known.mean, known.std))


def narrow_model(size: int) -> TimmCAMForImageClassification:
    return TimmCAMForImageClassification.from_timm(
        "resnet10t",
        num_labels=NUM_LABELS,
        image_size=size,
        channels=[32, 64, 96, 128],
        stem_width=16,
        **({"output_stride": 8} if size <= 32 else {}),
    )


def pretrained_model(size: int, data_root: Path) -> TimmCAMForImageClassification:
    weights = data_root / "weights" / f"{PRETRAINED}.in1k.safetensors"
    start = weights if weights.is_file() else True
    model = TimmCAMForImageClassification.from_timm(
        PRETRAINED, num_labels=NUM_LABELS, image_size=size, pretrained=start
    )
    model.batch_norm_frozen = True
    return model


def judge(model, images: MemoryImages, seed: int) -> dict:
    """Give a model the head of the judge of its last layer's features; the records of what this says of each label."""
    start = time.perf_counter()
    plain = images.select(np.arange(len(images)), augmented=False)
    records = judge_records(plain.index, plain.labels, start_from_judge(model, plain, seed=seed))
    return {"records": records, "wall": time.perf_counter() - start, "commit": commit()}


def train(
    setting: Setting,
    images: MemoryImages,
    model: TimmCAMForImageClassification,
    objective: str,
    output_dir: Path,
    held_out: MemoryImages | None,
    seed: int,
) -> dict:
    """One run; with `held_out` its predictions there, without it those on the training images."""
    images.generator.manual_seed(seed)
    before = judge(model, images, seed) if setting.pretrained else None
    args = HNMLTrainingArguments(
        output_dir=str(output_dir),
        objective=objective,
        num_train_epochs=setting.epochs,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **setting.options(),
    )
    trainer = RecordingTrainer(model=model, args=args, train_dataset=images, data_collator=collate_images)
    trainer.record(setting.epochs, int(images.index.max()) + 1)
    start = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - start
    evaluated = trainer.evaluated_model().eval()
    with torch.no_grad():
        batches = (images if held_out is None else held_out).images.split(256)
        final = torch.cat(
            [evaluated(pixel_values=batch.to(args.device)).logits.softmax(-1).cpu() for batch in batches]
        )
    result = {
        "S": trainer.said,
        "wall": wall,
        "final": final.numpy(),
        "records": np.array(trainer.dynamics.records),
        "cost": trainer.cost.meter.cost,
        "commit": commit(),
    }
    return result if before is None else {**result, "cross_validated": before["records"]}


RUNS = ("hnml", "ce", "judge", *(f"fold{fold}" for fold in range(FOLDS)))


def runs(name: str, data_root: Path, work_dir: Path, wanted: Sequence[str], seed: int) -> tuple[MemoryImages, dict]:
    """The images, and HNML, cross-entropy, judge and folds, each trained once; what is not wanted is used if it is
    there."""
    setting, found, short = DATASETS[name], {}, name.replace(" ", "_").replace("%", "percent").replace(",", "")
    images = load_images(setting, data_root, pretrained=setting.pretrained)
    order = np.random.default_rng(0).permutation(len(images))
    for run in RUNS:
        path = work_dir / f"{short}-{run}-seed{seed}.npz"
        if not path.exists() and run not in wanted:
            continue
        if not path.exists():
            print(f"{name}: {run}, seed {seed}", flush=True)
            torch.manual_seed(seed)
            if run == "judge":
                enlarged = load_images(setting, data_root, pretrained=True)
                result = judge(pretrained_model(enlarged.size, data_root), enlarged, seed)
            else:
                held_out = order[int(run[4:]) :: FOLDS] if run.startswith("fold") else None
                kept = images if held_out is None else images.select(np.setdiff1d(np.arange(len(images)), held_out))
                other = None if held_out is None else images.select(held_out)
                model = pretrained_model(images.size, data_root) if setting.pretrained else narrow_model(images.size)
                objective = "hnml" if run == "hnml" else "ce"
                result = train(setting, kept, model, objective, work_dir / "runs" / run, other, seed)
                if held_out is not None:
                    result["rows"] = held_out
            np.savez(path, **result)
        with np.load(path, allow_pickle=False) as stored:
            found[run] = dict(stored)
    return images, found


def calibration_error(probability: np.ndarray, wrong: np.ndarray, bins: int = 15) -> float:
    place = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = [abs(probability[place == b].mean() - wrong[place == b].mean()) * (place == b).mean() for b in set(place)]
    return float(sum(gaps))


def compare(images: MemoryImages, found: dict[str, dict]) -> list[dict]:
    """A row per scorer. A higher score means wrong; only probabilities have a calibration error.

    Cross-validated predictions are judged on the images of the folds that are there. Ours have the lead over them,
    on the same images and by self-confidence, with a 95 % interval.
    """
    from cleanlab.count import estimate_joint
    from cleanlab.rank import get_label_quality_scores

    labels, everyone = images.labels, np.arange(len(images))
    wrong = labels != images.clean_labels
    rows, scores = [], {}

    def add(scorer, run, score, cost, *, probability=None, rate=None, judged=everyone):
        scores[scorer] = score
        score, bad = score[judged], wrong[judged]
        count = int(bad.sum())
        mixed = 0 < count < len(bad)
        top = np.argsort(-score, kind="stable")[:count]
        rows.append(
            {
                "scorer": scorer,
                "images": len(bad),
                "auroc": round(float(roc_auc_score(bad, score)), 4) if mixed else None,
                "average_precision": round(float(average_precision_score(bad, score)), 4) if mixed else None,
                "precision_at_n": round(float(bad[top].mean()), 4) if mixed else None,
                "ece": None if probability is None else round(calibration_error(probability[judged], bad), 4),
                "cost_ce": None if cost is None else round(cost, 2),
                "estimated_rate": None if rate is None else round(float(rate), 4),
                "true_rate": round(float(bad.mean()), 4),
                "commit": str(found[run]["commit"]),
            }
        )

    for objective in [name for name in ("hnml", "ce") if name in found]:
        said = found[objective]
        table = noise_scores(said["records"], CLASSES, cross_validated=said.get("cross_validated"))
        score, estimate = table["noise_score"].to_numpy(), table.attrs["noise_rate"]
        name, rank = f"hnml_hf, objective {objective}", -table["rank"].to_numpy()
        add(name, objective, rank, float(said["cost"]), probability=score, rate=estimate)
        rows[-1]["estimated_rate_interval"] = [round(bound, 4) for bound in table.attrs["noise_rate_interval"]]

    predictions = {}
    if "judge" in found:
        said = found["judge"]
        table, crossed = noise_scores(said["records"], CLASSES), np.ones((len(images), NUM_LABELS))
        score, rank = table["noise_score"].to_numpy(), -table["rank"].to_numpy()
        asked = np.concatenate([said["records"]["label"][:, None], said["records"]["top_labels"]], axis=1)
        answers = np.concatenate([said["records"]["given"][:, None], said["records"]["top_probabilities"]], axis=1)
        crossed[everyone[:, None], asked] = answers
        same_backbone = "cross_validated" in found.get("ce", {})
        cost = (
            float(said["wall"] / found["ce"]["wall"]) if same_backbone else None
        )  # of wall time, not of forward passes
        rate = table.attrs["noise_rate"]
        add("hnml_hf, judge", "judge", rank, cost, probability=score, rate=rate)
        rows[-1]["estimated_rate_interval"] = [round(bound, 4) for bound in table.attrs["noise_rate_interval"]]
        predictions["judge"] = ("judge", crossed, cost, everyone)
    folds = [run for run in found if run.startswith("fold")]
    crossed, held_out = np.ones((len(images), NUM_LABELS)), everyone[:0]
    if folds:
        held_out = np.concatenate([found[fold]["rows"] for fold in folds])
        crossed[held_out] = np.concatenate([found[fold]["final"] for fold in folds])
        predictions[f"{FOLDS}-fold"] = (folds[-1], crossed, FOLDS * (1 - 1 / FOLDS), held_out)
    if "ce" in found:
        predictions["in-sample"] = ("ce", found["ce"]["final"], 1.0, everyone)
    for name, (source, probabilities, cost, judged) in predictions.items():
        probabilities = probabilities / probabilities.sum(-1, keepdims=True)
        rate = 1 - np.trace(estimate_joint(labels[judged], probabilities[judged]))
        for method in ("self_confidence", "normalized_margin"):
            doubt = 1 - get_label_quality_scores(labels, probabilities, method=method)
            scorer = f"cleanlab {name}, {method}"
            add(scorer, source, doubt, cost, probability=doubt, rate=rate, judged=judged)

    if "ce" in found:
        log_p = np.log(found["ce"]["S"].astype(np.float32).clip(NOT_KNOWN))
        given = log_p[:, everyone, labels].copy()
        log_p[:, everyone, labels] = -np.inf
        add("loss of the last epoch", "ce", -given[-1], 1.0)
        add("AUM", "ce", -(given - log_p.max(-1)).mean(0), 1.0)

    if 0 < wrong[held_out].sum() < len(held_out):
        theirs = scores[f"cleanlab {FOLDS}-fold, self_confidence"][held_out]
        for row in rows:
            if row["scorer"].startswith("hnml_hf, objective"):
                ours = scores[row["scorer"]][held_out]
                row["auroc_lead"], row["auroc_lead_interval"] = lead(wrong[held_out], ours, theirs)
                row["auroc_lead_images"] = len(held_out)
    return rows


def lead(wrong: np.ndarray, score: np.ndarray, other: np.ndarray) -> tuple[float, list[float]]:
    """AUROC of one score less that of another, and 95 % of it over 200 times resampled images."""
    generator = np.random.default_rng(0)
    drawn = [np.arange(len(wrong)), *(generator.integers(0, len(wrong), len(wrong)) for _ in range(200))]
    leads = [roc_auc_score(wrong[rows], score[rows]) - roc_auc_score(wrong[rows], other[rows]) for rows in drawn]
    return round(leads[0], 4), [round(float(bound), 4) for bound in np.quantile(leads[1:], [0.025, 0.975])]


def add_parser(subparsers):
    parser = subparsers.add_parser("audit", help="how well wrong labels are found", description=__doc__)
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="folder of cifar10n-10k and imagenette")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/audit_benchmark"))
    parser.add_argument("--output", type=Path, default=Path("audit_benchmark.json"))
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS), help="train these, where not yet done")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights, order of samples, augmentation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(run=run)


def run(args: argparse.Namespace):
    args.work_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.datasets:
        for seed in args.seeds:
            for row in compare(*runs(name, args.data_root, args.work_dir, args.runs, seed)):
                results.append({"dataset": name, "seed": seed, **row})
                print(json.dumps(results[-1]), flush=True)
        content = {"settings": settings(args.threads), "results": results}
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def settings(threads: int) -> dict:
    return {
        "backbone": "resnet10t, channels 32 64 96 128, stem 16, output stride 8 (32 on images of 64 pixels)",
        "optimizer": "SGD 0.05, momentum 0.9, weight decay 5e-4, cosine, batch 64",
        "pretrained": f"{PRETRAINED}; training starts from the judge, with the options of recipe imagenette_noisy, "
        "full weight; the judge's cost is one of wall time",
        "epochs": {name: setting.epochs for name, setting in DATASETS.items()},
        **provenance(threads=threads),
        "cleanlab": version("cleanlab"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
