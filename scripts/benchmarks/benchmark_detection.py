"""How well wrong labels are found from frozen features: the judge beside cleanlab and Datalab, on the same features.

    python scripts/benchmarks/benchmark.py detection --data_root data --output docs/results/detection.json
    python scripts/benchmarks/benchmark.py detection --made_up 1000000x2048x1000  # time and memory of the judge alone
    python scripts/benchmarks/benchmark.py detection --neighbors --datasets "CIFAR-10N worse, 224 pixels"
    python scripts/benchmarks/benchmark.py detection --plot docs/results/reliability.svg  # from docs/results alone

One forward pass of an EfficientNet-lite0 (`--data_root`/weights, or from the Hub), kept in `--cache_dir`. cleanlab
gets the predictions of a logistic regression in 5-fold cross-validation on the standardized features (C = 0.001); its
seconds are those of that fit, the judge's those of all it does. On a busy machine compare the seconds of the
processor. `--neighbors` compares, instead, the two ways in which the judge seeks neighbors: among all pairs, as up to
100,000 images, and in lists, as beyond.
"""

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from benchmark_audit import calibration_error
from figures import drawing, save
from provenance import provenance
from sklearn.metrics import average_precision_score, roc_auc_score

from hnml_hf import add_noise, judge_labels, load_noisy_dataset
from hnml_hf.audit.features import BACKBONE, extract_features, load_backbone
from hnml_hf.audit.findings import DUPLICATE
from hnml_hf.audit.judge import NEIGHBORS, FoldStatistics, nearest_neighbors


RECORDS = Path(__file__).parents[2] / "docs" / "results" / "detection.json"
C = 1e-3
FLIPS = {"kind": "asymmetric", "rate": 0.4, "asymmetric_scheme": "cifar10"}
# name: folder, column of the given labels, pixels, noise that is drawn
DATASETS = {
    "CIFAR-10N worse": ("cifar10n", "worse_label", 128, None),
    "CIFAR-10N aggre": ("cifar10n", "aggre_label", 128, None),
    "CIFAR-10N random 1": ("cifar10n", "random_label1", 128, None),
    "CIFAR-10, none": ("cifar10n", "label", 128, None),
    "CIFAR-10, symmetric 50 %": ("cifar10n", "label", 128, {"kind": "symmetric", "rate": 0.5}),
    "CIFAR-10N worse, 224 pixels": ("cifar10n", "worse_label", 224, None),  # as `hnml audit` sees them by default
    "CIFAR-10N aggre, 224 pixels": ("cifar10n", "aggre_label", 224, None),
    "CIFAR-10N random 1, 224 pixels": ("cifar10n", "random_label1", 224, None),
    "CIFAR-10, none, 224 pixels": ("cifar10n", "label", 224, None),
    "CIFAR-10, symmetric 50 %, 224 pixels": ("cifar10n", "label", 224, {"kind": "symmetric", "rate": 0.5}),
    "Fashion-MNIST, none": ("fashion_mnist", "label", 96, None),
    "Fashion-MNIST, symmetric 50 %": ("fashion_mnist", "label", 96, {"kind": "symmetric", "rate": 0.5}),
    "Fashion-MNIST, asymmetric 40 %": ("fashion_mnist", "label", 96, FLIPS),
    "Fashion-MNIST, pair flip 45 %": ("fashion_mnist", "label", 96, {"kind": "pairflip", "rate": 0.45}),
    **{
        f"Imagenette-noisy {rate} %": ("imagenette224-noisy-2k", f"noisy_labels_{rate}", 224, None)
        for rate in (1, 5, 25, 50)
    },
}


def load(name: str, data_root: Path, rows: int | None):
    """A dataset with given and true labels, or its first rows."""
    folder, label, size, noise = DATASETS[name]
    # one forward pass for all labels of a folder: what is audited is its images
    data = load_noisy_dataset(str(data_root / folder), label_column=label, clean_label_column="label")["train"]
    if rows is not None:
        data = data.select(range(min(rows, len(data))))
    return (data if noise is None else add_noise(data, **noise, seed=0)), size


class Clock:
    """Seconds since it was made: of the wall, and of the processor for this process."""

    def __init__(self):
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        wall, processor = self.started
        return {
            "seconds": round(time.perf_counter() - wall, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
        }


def reliability(probability: np.ndarray, wrong: np.ndarray, bins: int = 10) -> list[list[float]]:
    """Mean score, share of wrong labels and samples of each bin that has some."""
    place = np.minimum((probability * bins).astype(int), bins - 1)
    return [
        [round(float(probability[place == b].mean()), 4), round(float(wrong[place == b].mean()), 4), int(n)]
        for b, n in enumerate(np.bincount(place, minlength=bins))
        if n
    ]


def measured(name: str, scorer: str, wrong: np.ndarray, score: np.ndarray, seconds: dict, **more) -> dict:
    mixed = 0 < wrong.sum() < len(wrong)
    return {
        "dataset": name,
        "scorer": scorer,
        "images": len(wrong),
        "auroc": round(float(roc_auc_score(wrong, score)), 4) if mixed else None,
        "average_precision": round(float(average_precision_score(wrong, score)), 4) if mixed else None,
        "true_rate": round(float(wrong.mean()), 4),
        **seconds,
        **more,
    }


def judge(name: str, features: np.ndarray, groups: np.ndarray, labels: np.ndarray, true: np.ndarray) -> dict:
    clock = Clock()
    judgement = judge_labels(features, labels, num_labels=int(true.max()) + 1, groups=groups)
    seconds, wrong = clock.read(), labels != true
    return measured(
        name,
        "hnml_hf, judge",
        wrong,
        judgement.log_odds,
        seconds,
        ece=round(calibration_error(judgement.noise_scores, wrong), 4),
        estimated_rate=round(judgement.noise_rate, 4),
        estimated_rate_range=[round(bound, 4) for bound in judgement.noise_rate_range],
        relabelled_right=round(float((judgement.predicted_labels == true).mean()), 4),
        rounds=judgement.rounds,
        reliability=reliability(judgement.noise_scores, wrong),
    )


def cleanlab(name: str, features: np.ndarray, labels: np.ndarray, true: np.ndarray) -> list[dict]:
    """Its scores of cross-validated predictions, and what Datalab makes of them and of the features."""
    from cleanlab import Datalab
    from cleanlab.count import estimate_joint
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    clock, wrong, rows = Clock(), labels != true, []
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    predictions = cross_val_predict(classifier, features, labels, cv=folds, method="predict_proba")
    seconds = clock.read()
    rate = round(float(1 - np.trace(estimate_joint(labels, predictions))), 4)
    for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
        doubt = 1 - get_label_quality_scores(labels, predictions, method=method)
        ece = round(calibration_error(doubt, wrong), 4)
        rows.append(measured(name, f"cleanlab, {method}", wrong, doubt, seconds, ece=ece, estimated_rate=rate))
    clock = Clock()
    lab = Datalab({"label": labels}, label_name="label", verbosity=0)
    lab.find_issues(features=features, issue_types={"label": {}})
    doubt = 1 - lab.get_issues("label")["label_score"].to_numpy()
    rows.append(measured(name, "Datalab, features", wrong, doubt, clock.read()))
    return rows


def neighbors(name: str, features: np.ndarray, groups: np.ndarray) -> list[dict]:
    """The search among all pairs and the one in lists: time, and how much of the former's the latter finds."""
    n, found, rows = len(features), [], []
    statistics = FoldStatistics.of_labels(
        features, torch.zeros(n, dtype=torch.long), np.zeros(n, np.int64), 1, weights=None, device=torch.device("cpu")
    )
    vectors = statistics.projection()(features)
    for search, limit in {"all pairs": n, "lists": 0}.items():
        clock = Clock()
        with mock.patch("hnml_hf.audit.judge.NEIGHBOR_LIMIT", limit):
            found.append([part.numpy() for part in nearest_neighbors(vectors, groups, NEIGHBORS)])
        rows.append({"dataset": name, "search": search, "images": n, **clock.read()})
    (exact, cosines), (nearest, similarities) = found
    for count in (1, 10, 50):
        pairs = zip(exact[:, :count], nearest[:, :count], strict=True)
        rows[1][f"found_of_the_nearest_{count}"] = round(float(np.mean([np.isin(*pair).mean() for pair in pairs])), 4)
    copies = cosines[:, 0] >= DUPLICATE
    rows[1]["near_duplicates"] = int(copies.sum())
    rows[1]["near_duplicates_found"] = int((similarities[copies, 0] >= DUPLICATE).sum())
    return rows


class MadeUp:
    """Features of n samples, d wide, of k classes: noise around the center of a class, made when rows are asked for.

    Centers are 6 standard deviations of the noise apart.
    """

    BLOCK = 8_192  # rows of one seed

    def __init__(self, n: int, d: int, k: int):
        generator = np.random.default_rng(0)
        self.shape, self.seconds = (n, d), 0.0
        self.labels = generator.integers(0, k, n)
        self.centers = generator.standard_normal((k, d), dtype=np.float32) * np.float32(6 / (2 * d) ** 0.5)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        started = time.process_time()
        rows = np.arange(len(self))[rows]
        values = self.centers[self.labels[rows]]
        blocks, places = np.divmod(rows, self.BLOCK)
        for block in np.unique(blocks):
            there = blocks == block
            generator = np.random.default_rng([1, block])
            noise = generator.standard_normal((places[there].max() + 1, self.shape[1]), dtype=np.float32)
            values[there] += noise[places[there]]
        self.seconds += time.process_time() - started
        return values


def made_up(n: int, d: int, k: int) -> dict:
    """Time and memory of the judge on made-up features with 30 % of the labels wrong; nothing but labels is held."""

    def peak() -> float:
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)

    features, generator = MadeUp(n, d, k), np.random.default_rng(2)
    true = features.labels
    labels = np.where(generator.random(n) < 0.3, (true + generator.integers(1, k, n)) % k, true)
    before, clock = peak(), Clock()
    judgement = judge_labels(features, labels, num_labels=k, groups=np.arange(n))
    seconds, after = clock.read(), peak()
    return measured(
        f"made up, {n:,} x {d:,}, {k:,} classes",
        "hnml_hf, judge",
        labels != true,
        judgement.log_odds,
        seconds,
        processor_seconds_of_making=round(features.seconds, 1),
        gib_before=before,
        peak_gib=after,
        estimated_rate=round(judgement.noise_rate, 4),
        estimated_rate_range=[round(bound, 4) for bound in judgement.noise_rate_range],
    )


def plot(results: list[dict], path: str | Path):
    """Score against the share of wrong labels, a panel per record that has `reliability`."""
    pyplot = drawing()
    drawn = [row for row in results if row.get("reliability")]
    height = -(-len(drawn) // 4)
    figure, panels = pyplot.subplots(
        height, 4, figsize=(9, 2.1 * height), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(drawn) :]:
        axes.set_visible(False)
    for row, axes in zip(drawn, panels.flat, strict=False):
        score, wrong, count = np.array(row["reliability"]).T
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        axes.plot(score, wrong, color="C0", linewidth=0.8)
        axes.scatter(score, wrong, s=4 + 60 * count / count.sum(), color="C0")
        axes.set_title(f"{row['dataset']}\n{row['images']:,} rows", fontsize=7)
    figure.supxlabel("score, mean of a tenth of the scale", fontsize=8)
    figure.supylabel("share of these labels that is wrong", fontsize=8)
    save(figure, path)
    pyplot.close(figure)


def recorded() -> list[dict]:
    """All results of the records."""
    return [row for run in json.loads(RECORDS.read_text(encoding="utf-8"))["runs"] for row in run["results"]]


def add_parser(subparsers):
    parser = subparsers.add_parser("detection", help="wrong labels from frozen features", description=__doc__)
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="folder of the datasets")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--rows", type=int, help="of each dataset, at most")
    parser.add_argument("--made_up", metavar="ROWSxWIDTHxCLASSES", help="instead: features that are made up")
    parser.add_argument("--neighbors", action="store_true", help="instead: the two searches of neighbors")
    parser.add_argument("--plot", type=Path, help="measure nothing, and draw how reliable the recorded scores are")
    parser.add_argument("--cache_dir", type=Path, default=Path("outputs/detection"), help="for features")
    parser.add_argument("--without_cleanlab", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("detection.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(run=run)


def run(args: argparse.Namespace):
    if args.plot:
        plot(recorded(), args.plot)
        return
    if args.made_up:
        write(args, [made_up(*map(int, args.made_up.split("x")))])
        return
    weights = args.data_root / "weights" / f"{BACKBONE}.safetensors"
    results = []
    for name in args.datasets:
        data, size = load(name, args.data_root, args.rows)
        backbone = load_backbone(
            BACKBONE.partition(".")[0], pretrained=weights if weights.is_file() else True, image_size=size
        )
        found = extract_features(data, backbone, cache_dir=args.cache_dir, num_workers=0)
        features = np.array(found.values)
        labels, true = (np.array(data.with_format("numpy")[column][:]) for column in ("label", "clean_label"))
        if args.neighbors:
            results += neighbors(name, features, found.groups)
        else:
            results.append(judge(name, features, found.groups, labels, true))
        if not args.neighbors and not args.without_cleanlab:
            results += cleanlab(name, features, labels, true)
        write(args, results, name)


def write(args: argparse.Namespace, results: list[dict], dataset: str | None = None):
    """The records and where they come from; those of a dataset, or all, are printed."""
    settings = provenance(threads=args.threads)
    if not args.made_up:
        settings = {"backbone": BACKBONE, **settings}
    if not args.made_up and not args.neighbors:
        settings |= {"logistic C": C, "cleanlab": version("cleanlab")}
    args.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n", encoding="utf-8")
    for row in results:
        if dataset in (None, row["dataset"]):
            print(json.dumps(row), flush=True)
