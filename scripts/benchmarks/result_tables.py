"""The tables of README and docs that show accuracies and audits, from the records in docs/results.

    python scripts/benchmarks/result_tables.py           # write them
    python scripts/benchmarks/result_tables.py --check   # only say whether they are up to date; ends with 1 if not
    python scripts/benchmarks/result_tables.py --show tuning leads   # print tables that stand on no page

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; the records of a suite are
`docs/results/accuracy-SUITE.runs.jsonl`, which `scripts/benchmarks/benchmark.py accuracy` has written, those of the
runs on a GPU `docs/results/full.runs.jsonl`, those of the
audits `docs/results/audit_benchmark.json`, which `scripts/benchmarks/benchmark.py audit` has, and those of frozen
features `docs/results/detection.json`, from `scripts/benchmarks/benchmark.py detection`.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmark_accuracy import finished, markdown, mean_spread
from chosen_rates import chosen


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
SEEDS = 3  # of a full row; another number of seeds is said in brackets


def records(suite: str) -> list[dict]:
    """Finished runs of a suite."""
    return list(finished(RESULTS / f"accuracy-{suite}.runs.jsonl").values())


def having(found: list[dict], **names: str | int) -> list[dict]:
    """Those of some records that have these names on the axes of their suite."""
    return [record for record in found if all(record.get(axis) == name for axis, name in names.items())]


def figure(found: list[dict], key: str, percent: bool = True) -> str:
    """Mean and standard deviation over the seeds."""
    return mean_spread([record.get(key) for record in found], percent)


def rounded_up(found: list[dict], key: str) -> str:
    """The same, halves rounded up: the double nearest to 0.8955 lies below it, and would lose 0.1."""
    return mean_spread([record[key] + 1e-9 for record in found if record.get(key) is not None])


def cost(found: list[dict]) -> str:
    return f"{statistics.mean(record['cost_ce'] for record in found):.2f}" if found else ""


def by_noise(key: str, suite: str, noises: dict[str, str], methods: Sequence[str]) -> str:
    """A row per method, a column per noise; the student, AUROC and cost are of the first noise."""
    found, rows = records(suite), []
    for method in methods:
        cells = [having(found, noise=noise, method=method) for noise in noises]
        counts = [f" ({len(cell)})" if cell and len(cell) != SEEDS else "" for cell in cells]
        accuracies = [figure(cell, key) + count for cell, count in zip(cells, counts, strict=True)]
        more = [figure(cells[0], f"{key}_student"), figure(cells[0], "auroc", False), cost(cells[0])]
        rows.append([method, *accuracies, *more])
    first = next(iter(noises.values())).partition(",")[0]
    return markdown(["", *noises.values(), f"student, {first}", f"AUROC, {first}", "cost"], rows)


def by_method(groups: Sequence[tuple[str, list[dict]]]) -> str:
    """A row per method, all figures of one noise."""
    header = ["", "seeds", "last", "best", "student, last", "memorized", "AUROC", "cost"]
    rows = []
    for name, found in groups:
        accuracies = [figure(found, key) for key in ("last", "best", "last_student", "memorized")]
        rows.append([name, str(len(found)), *accuracies, figure(found, "auroc", False), cost(found)])
    return markdown(header, rows)


def groups_of(suite: str, noise: str) -> list[tuple[str, list[dict]]]:
    """The methods of a suite under one noise, in the order in which they were run."""
    found = having(records(suite), noise=noise)
    return [(method, having(found, method=method)) for method in dict.fromkeys(r["method"] for r in found)]


def ablations() -> str:
    main, noise = records("cpu"), "human 40 %"
    reference = having(main, method="HNML", noise=noise)
    groups = [
        ("**HNML**", reference),
        ("HNML, seed 0", having(reference, seed=0)),
        ("cross-entropy", having(main, method="cross-entropy", noise=noise)),
    ]
    return by_method(groups + groups_of("ablations", noise))


OWN_PROBE = ", own probe"  # ends the names of runs that start from a probe of their own training split


def own_probe() -> str:
    """Runs of a pretrained backbone over several seeds."""
    groups = [(noise, *group) for noise in ("50 %", "25 %") for group in groups_of("imagenette", noise)]
    return by_method(
        [
            (f"{noise} wrong: {method.removesuffix(OWN_PROBE)}", found)
            for noise, method, found in groups
            if method.endswith(OWN_PROBE)
        ]
    )


def augmented() -> str:
    return by_method(groups_of("augmented", "human 40 %"))


def on_gpu(suite: str) -> list[dict]:
    """Finished runs of a suite on a GPU."""
    return having(list(finished(RESULTS / "full.runs.jsonl").values()), suite=suite)


CLEAN = "cross-entropy, clean labels"
LARGE = ", 224 px"  # in the names of methods on images of that size
SURE = ", sure head"  # ends the names of runs with the given labels as targets and the judge's own temperature
FAIR = ("human 9 %", "clean")  # under which it is about what the labels allow: judge-alone.json
BENCHMARK = {
    "human 40 %": "CIFAR-10N, 40 % wrong",
    "human 9 %": "CIFAR-10N, 9 % wrong",
    "symmetric 50 %": "CIFAR-10, 50 % at random",
    "asymmetric 40 %": "CIFAR-10, 20 % wrong in pairs",
    "clean": "CIFAR-10, clean",
    "50 %": "Imagenette, 50 % wrong",
    "25 %": "Imagenette, 25 % wrong",
}
COMPARED = ("cross-entropy", "ELR", "HNML", "ELR on the posterior")


def whole_cifar(size: str = "") -> str:
    """Methods on the whole CIFAR-10N, the best last: accuracies, and how far each comes from cross-entropy's to that
    of cross-entropy on the clean labels."""
    found = on_gpu("finetune") + records("finetune-given")
    found = [record for record in found if (LARGE in record["method"]) == bool(size)]
    noisy = having(found, noise="human 40 %")
    groups = {name: having(noisy, method=name) for name in dict.fromkeys(record["method"] for record in noisy)}
    groups = dict(sorted(groups.items(), key=lambda group: mean_of(group[1], "last")))
    plain = f"cross-entropy{size}"
    floor = mean_of(groups.get(plain) or groups[plain + SURE], "last")
    groups[CLEAN] = having(found, noise="clean", method=plain + SURE)
    ceiling = mean_of(groups[CLEAN], "last")
    rows = []
    for name, group in groups.items():
        share = (mean_of(group, "last") - floor) / (ceiling - floor)
        figures = [rounded_up(group, key) for key in ("last", "best", "last_student")]
        measured = ["", ""] if name == CLEAN else [figure(group, "auroc", False), figure(group, "memorized")]
        name = name.replace(size, "") if size else name
        rows.append([name, str(len(group)), *figures, f"{100 * share:.0f} %", *measured, cost(group)])
    return markdown(["", "seeds", "last", "best", "student, last", "recovered", "AUROC", "memorized", "cost"], rows)


def whole_cifar_on_a_cpu() -> str:
    """Methods on the whole CIFAR-10N `worse`, one epoch at 144 pixels in float32, the best last. Runs on given labels
    from the judge's own temperature, which `finetune-144` has too, are left out."""
    groups: dict[str, list[dict]] = {}
    for record in having(records("finetune-given") + records("finetune-144"), noise="human 40 %"):
        if not record["method"].endswith(SURE):
            groups.setdefault(record["method"], []).append(record)
    rows = [
        [method, str(len(found)), rounded_up(found, "last"), figure(found, "auroc", False), figure(found, "memorized")]
        + [cost(found)]
        for method, found in sorted(groups.items(), key=lambda group: mean_of(group[1], "last"))
    ]
    return markdown(["", "seeds", "last", "AUROC", "memorized", "cost"], rows)


def benchmark(noises: Sequence[str] = tuple(BENCHMARK)) -> str:
    """Accuracy after the last epoch, beside the classifier that the audit writes. On photographs each method has the
    learning rate that it chose by held-out noisy labels. A mean without a spread is of one seed."""
    cifar, cifar_on_a_core = on_gpu("finetune") + records("finetune-given"), records("finetune-144")
    photographs = on_gpu("imagenette-judge") + records("imagenette-judge")
    alone = json.loads((RESULTS / "judge-alone.json").read_text(encoding="utf-8"))["records"]
    best, rows = chosen(photographs), []
    for noise in noises:
        found = cifar if having(cifar, noise=noise) else photographs
        cells = [rounded_up(having(alone, noise=noise), "last")]
        for method in COMPARED:
            chosen_there = best.get((noise, method), method) if found is photographs else method
            group = having(found, noise=noise, method=chosen_there)
            group = group or having(cifar_on_a_core, noise=noise, method=method)
            if not group and noise in FAIR:
                group = having(found, noise=noise, method=method + SURE)
            cells.append(rounded_up(group, "last"))
        rows.append([BENCHMARK[noise], *cells])
    return markdown(["", "audit's classifier", *COMPARED], rows)


def finetuned_on_a_cpu() -> list[tuple[str, list[dict]]]:
    """Methods on the whole CIFAR-10N from a pretrained backbone, the best last, and the ceiling of clean labels."""
    groups = sorted(groups_of("finetune-cpu", "human 40 %"), key=lambda group: mean_of(group[1], "last"))
    return [*groups, (CLEAN, having(records("finetune-cpu"), noise="clean", method="cross-entropy" + SURE))]


def finetuned_small() -> str:
    """Methods on 9,000 rows of CIFAR-10N `worse`, the best last."""
    groups = groups_of("finetune-10k", "human 40 %, 9,000 rows")
    rows = [
        [method, str(len(found)), *(rounded_up(found, key) for key in ("last", "best")), figure(found, "auroc", False)]
        + [figure(found, "memorized"), cost(found)]
        for method, found in sorted(groups, key=lambda group: mean_of(group[1], "last"))
    ]
    return markdown(["", "seeds", "last", "best", "AUROC", "memorized", "cost"], rows)


def mean_of(found: list[dict], key: str) -> float:
    return statistics.mean(record[key] for record in found)


def full_on_a_cpu() -> str:
    """Accuracy after each epoch of the network that is saved, and how much of what the noise costs it makes good."""
    groups = finetuned_on_a_cpu()
    floor, ceiling = (mean_of(dict(groups)[name], "last") for name in ("cross-entropy" + SURE, CLEAN))
    rows = []
    for method, found in groups:
        by_epoch = [mean_spread([record["curve"][epoch]["test"] for record in found]) for epoch in (0, 1)]
        share = (mean_of(found, "last") - floor) / (ceiling - floor)
        noisy = method != CLEAN
        measured = [figure(found, "auroc", False), figure(found, "memorized")] if noisy else ["", ""]
        rows.append([method, str(len(found)), *by_epoch, f"{100 * share:.0f} %", *measured, cost(found)])
    return markdown(["", "seeds", "epoch 1", "epoch 2", "recovered", "AUROC", "memorized", "cost"], rows)


def backgrounds() -> str:
    """The mask where wrong labels go with the background: accuracies, and how far maps keep to the object."""
    groups: dict[str, list[dict]] = {}
    for run in json.loads((RESULTS / "backgrounds.json").read_text(encoding="utf-8"))["runs"]:
        groups.setdefault(run["method"], []).append(run)
    columns = {
        "random texture": "test_accuracy",
        "misleading": "misleading_accuracy",
        "map on the garment": "test_share_on_garment",
        "highest cell on it": "test_highest_on_garment",
        "memorized": "memorized",
    }
    rows = [
        [method, str(len(found)), *(figure(found, key) for key in columns.values()), cost(found)]
        for method, found in sorted(groups.items(), key=lambda group: -mean_of(group[1], "test_accuracy"))
    ]
    return markdown(["", "seeds", *columns, "cost"], rows)


def early_judge() -> str:
    """From random weights: a judge of the network's own features after 8 epochs, and 24 epochs without one."""
    groups: dict[str, list[dict]] = {}
    for run in json.loads((RESULTS / "early-judge.json").read_text(encoding="utf-8"))["runs"]:
        groups.setdefault(run["method"], []).append(run)
    rows = [
        [method, *(rounded_up(found, key) for key in ("last", "student")), figure(found, "auroc", False)]
        + [figure(found, "memorized")]
        for method, found in sorted(groups.items(), key=lambda group: mean_of(group[1], "last"))
        if len(found) == SEEDS
    ]
    return markdown(["", "last", "student", "AUROC", "memorized"], rows)


BATCH_NORM = {
    "cross-entropy": "cross-entropy, constant learning rate",
    "hnml-corrected": "HNML, corrected, 10 steps ahead, constant learning rate",
    "hnml-large": "HNML, 40 steps ahead, constant learning rate",
    "hnml-cosine": "HNML, 40 steps ahead, cosine decay",
    "hnml-cosine1": "the same, seed 1",
    "hnml-cosine2": "the same, seed 2",
    "quickstart": "the quickstart, seed 42",
    "quickstart0": "the same, seed 0",
    "quickstart-ce": "the same, cross-entropy",
}


def read(name: str) -> list[dict]:
    """The records of a file of results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))["records"]


def batch_norm() -> str:
    """Accuracy after the last epoch with running statistics, and with those of the weights themselves."""
    found = read("batch-norm.json")
    rows = []
    for name, label in BATCH_NORM.items():
        last = max(record["epoch"] for record in found if record["run"] == name)
        those = {record["network"]: record for record in found if record["run"] == name and record["epoch"] == last}
        both = ("as_trained", "new_statistics")
        rows.append([label, *(rounded_up([those[who]], key) for who in ("student", "average") for key in both)])
    return markdown(["", "student", "own statistics", "average", "own statistics"], rows)


def witnesses(every: int = 4) -> str:
    """Who finds the wrong labels after some epochs of training from random weights."""
    rows = [
        [
            str(record["epoch"]),
            *(f"{100 * record[key]:.1f} %" for key in ("fit", "right_by_network", "right_by_judge")),
            *(f"{record[f'auroc_{who}'] + 1e-9:.3f}" for who in ("network", "counter", "judge", "judge_and_counter")),
        ]
        for record in read("witnesses.json")
        if record["epoch"] == 1 or record["epoch"] % every == 0
    ]
    right = ["given labels predicted", "right: network", "judge"]
    return markdown(["epoch", *right, "AUROC: network", "counter", "judge", "judge and counter"], rows)


def frozen_targets(rate: float = 0.02) -> str:
    """Targets for a small network on frozen features, and how much of what the noise costs each makes good."""
    runs = json.loads((RESULTS / "frozen-targets.json").read_text(encoding="utf-8"))["runs"]
    groups: dict[str, list[dict]] = {}
    for run in runs:
        if run["learning_rate"] == rate:
            groups.setdefault(run["method"], []).append(run)
    means = {method: statistics.mean(run["test"] for run in group) for method, group in groups.items()}
    floor, ceiling = means["cross-entropy"], means["cross-entropy on clean labels"]
    rows = [
        [
            method,
            str(len(groups[method])),
            figure(groups[method], "test"),
            f"{100 * (mean - floor) / (ceiling - floor):.0f} %",
        ]
        for method, mean in sorted(means.items(), key=lambda item: item[1])
    ]
    return markdown(["targets", "seeds", "clean test", "recovered"], rows)


def imagenette_judge() -> str:
    """Methods on Imagenette, from the judge's head."""
    found, groups = on_gpu("imagenette-judge") + records("imagenette-judge"), []
    for noise in ("50 %", "25 %"):
        noisy = having(found, noise=noise)
        for method in dict.fromkeys(record["method"] for record in noisy):
            groups.append((f"{noise} wrong: {method}", having(noisy, method=method)))
    return by_method(groups)


def pretrained() -> str:
    """Single runs of a pretrained backbone, with the estimate of the noise rate that each ends with."""
    header = ["wrong labels", "", "last", "best", "student, last", "memorized", "AUROC", "estimated rate (range)"]
    rows = []
    for record in records("imagenette"):
        if record["method"].endswith(OWN_PROBE):
            continue
        low, high = (f"{100 * bound:.0f}" for bound in record["noise_rate_interval"])
        rows.append(
            [record["noise"], record["method"]]
            + [figure([record], key) for key in ("last", "best", "last_student", "memorized")]
            + [figure([record], "auroc", False), f"{figure([record], 'noise_rate')} % ({low} to {high})"]
        )
    return markdown(header, sorted(rows, key=lambda row: row[0]))


def tuning() -> str:
    """Candidates of each method: accuracy on held-out noisy labels, and on the clean test set, last epoch."""
    rows = []
    for record in records("tuning"):
        method, _, setting = record["method"].partition(", ")
        if method.startswith("constant learning rate"):
            method, setting = "cross-entropy", record["method"]
        rows.append([method, setting, figure([record["curve"][-1]], "validation"), figure([record], "last")])
    rows.sort(key=lambda row: row[0].lower())
    return markdown(["method", "candidate", "held-out noisy labels", "clean test"], rows)


AUDITED = {
    "cifar10n-10k worse": "CIFAR-10N `worse`",
    "quickstart symmetric 50 %": "quickstart, symmetric 50 %",
    "quickstart asymmetric 40 %": "quickstart, asymmetric 40 %",
    "imagenette-noisy 25 %": "Imagenette-noisy 25 %",
    "imagenette-noisy 25 %, pretrained": "the same, pretrained",
    "quickstart 0 %": "quickstart, as it comes",
}


def audits() -> list[dict]:
    return json.loads((RESULTS / "audit_benchmark.json").read_text(encoding="utf-8"))["results"]


def audit_rates() -> str:
    """What one run or probe says of its labels: quality of the scores, and the noise rate beside the true one."""
    header = ["labels", "from", "seed", "AUROC", "average precision", "precision at n", "calibration error"]
    rows = []
    for row in sorted(audits(), key=lambda row: list(AUDITED).index(row["dataset"])):
        ours, _, source = row["scorer"].partition(", ")
        if ours != "hnml_hf":
            continue
        figures = [row[key] for key in ("auroc", "average_precision", "precision_at_n", "ece")]
        rate, true, (low, high) = row["estimated_rate"], row["true_rate"], row["estimated_rate_interval"]
        rows.append(
            [AUDITED[row["dataset"]], source, str(row["seed"])]
            + ["-" if value is None else f"{value:.3f}" for value in figures]
            + [f"{100 * true:.1f} %", f"{100 * rate:.1f} % ({100 * low:.0f} to {100 * high:.0f})"]
            + ["yes" if abs(rate - true) <= 0.03 else "**no**"]
        )
    return markdown([*header, "true rate", "estimated rate (range)", "within 3 points"], rows)


def audit_scorers() -> str:
    """AUROC of every scorer on every dataset with wrong labels, and what it costs."""
    found = [row for row in audits() if row["seed"] == 0]
    noisy = [name for name in AUDITED if name != "quickstart 0 %"]
    rows = []
    for scorer in dict.fromkeys(row["scorer"] for row in found):
        cells = {row["dataset"]: row for row in found if row["scorer"] == scorer}
        costs = [f"{row['cost_ce']:.2f}" for row in cells.values() if row["cost_ce"] is not None]
        cost = "" if not costs else min(costs) if min(costs) == max(costs) else f"{min(costs)} to {max(costs)}"
        rows.append([scorer, cost, *(f"{cells[name]['auroc']:.3f}" if name in cells else "" for name in noisy)])
    return markdown(["scorer", "cost", *(AUDITED[name] for name in noisy)], rows)


JUDGE = "hnml_hf, judge"


def detections() -> list[list[dict]]:
    """What was measured on frozen features of real images: for each run and dataset the judge and those beside it."""
    groups: dict[tuple, list[dict]] = {}
    for number, run in enumerate(json.loads((RESULTS / "detection.json").read_text(encoding="utf-8"))["runs"]):
        for row in run["results"]:
            if row.get("scorer") and "peak_gib" not in row:
                groups.setdefault((number, row["dataset"]), []).append(row)
    return list(groups.values())


def of(row: dict, key: str) -> str:
    return "-" if row[key] is None else f"{row[key]:.3f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def detection() -> str:
    """The judge on each dataset, as it was measured last."""
    header = ["labels", "rows", "AUROC", "average precision", "relabeled right", "calibration error", "true rate"]
    rows = []
    for row in {(row["dataset"], row["images"]): row for row, *_ in detections()}.values():
        low, high = (f"{100 * bound:.1f}" for bound in row["estimated_rate_range"])
        rows.append(
            [row["dataset"], f"{row['images']:,}", of(row, "auroc"), of(row, "average_precision")]
            + [percent(row["relabelled_right"]), of(row, "ece"), percent(row["true_rate"])]
            + [f"{percent(row['estimated_rate'])} ({low} to {high})", f"{row['processor_seconds']:.1f}"]
        )
    return markdown([*header, "estimated rate (range)", "seconds of a core"], rows)


def beside_cleanlab() -> str:
    """The judge, the best of cleanlab's scores and Datalab, where all were measured in one run."""
    header = ["labels", "rows", "AUROC: judge", "best of cleanlab", "Datalab"]
    header += ["average precision: judge", "best of cleanlab", "Datalab"]
    rows = []
    for judge, *others in detections():
        if not others:
            continue
        *scores, datalab = others
        best = [max(scores, key=lambda row: row[key] or 0) for key in ("auroc", "average_precision")]
        cells = [of(row, "auroc") for row in (judge, best[0], datalab)]
        cells += [of(row, "average_precision") for row in (judge, best[1], datalab)]
        cells += [
            percent(value) for value in (judge["true_rate"], judge["estimated_rate"], scores[0]["estimated_rate"])
        ]
        cells += [f"{row['processor_seconds']:.1f}" for row in (judge, scores[0])]
        rows.append([judge["dataset"], f"{judge['images']:,}", *cells])
    return markdown([*header, "rate: true", "judge", "cleanlab", "seconds: judge", "cleanlab"], rows)


CPU = {
    "human 40 %": "human, 40 %",
    "symmetric 50 %": "symmetric, 50 %",
    "asymmetric 40 %": "asymmetric, 40 %",
    "human 9 %": "human, 9 %",
    "none": "as they are",
}
COSINE = ("cross-entropy", "cross-entropy, learning rate 0.05", "mean teacher", "extrapolation alone", "ELR", "HNML")
CONSTANT = tuple(
    f"{method}, constant learning rate"
    for method in ("cross-entropy", "GCE", "mixup", "mean teacher", "extrapolation alone", "ELR", "HNML")
)
MEMORY = "HNML from memory, constant learning rate"
CORRECTED = ("cross-entropy, corrected", "mean teacher, corrected", "HNML, corrected")
CORRECTED_COSINE = ("cross-entropy, corrected, cosine", "HNML, corrected, cosine")
EVERY = (*COSINE, *CORRECTED_COSINE, *CONSTANT, MEMORY, *CORRECTED)


def leads(suite: str, noises: dict[str, str], method: str, others: Sequence[str]) -> str:
    """How far a method is above others, in points between means of the seeds, and above its own best epoch."""
    found = records(suite)

    def mean(name: str, noise: str, key: str) -> float | None:
        values = [record[key] for record in having(found, noise=noise, method=name)]
        return 100 * statistics.mean(values) if values else None

    compared = [(key, other, key) for key in ("last", "best") for other in others] + [("last", method, "best")]
    rows = []
    for key, other, against in compared:
        pairs = [(mean(method, noise, key), mean(other, noise, against)) for noise in noises]
        leads = ["" if None in pair else f"{pair[0] - pair[1]:+.1f}" for pair in pairs]
        rows.append([f"{key} epoch above {'its own best' if other == method else other}", *leads])
    return markdown(["", *noises.values()], rows)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "BENCHMARK": partial(benchmark, ("human 40 %", "symmetric 50 %", "asymmetric 40 %", "clean", "50 %"))
    },
    "docs/results.md": {
        "BENCHMARK": benchmark,
        "CPU": partial(by_noise, "last", "cpu", CPU, ("cross-entropy", *CONSTANT, CORRECTED[0], CORRECTED[-1])),
        "DETECTION": detection,
        "BESIDE_CLEANLAB": beside_cleanlab,
    },
    "docs/ablations.md": {
        "AUDIT_SCORERS": audit_scorers,
        "AUGMENTED": augmented,
        "LAST": partial(by_noise, "last", "cpu", CPU, EVERY),
        "ABLATIONS": ablations,
        "OWN_PROBE": own_probe,
        "BACKGROUNDS": backgrounds,
        "SELF_SUPERVISED": lambda: by_method(groups_of("self-supervised", "human 40 %")),
        "FULL_CPU": full_on_a_cpu,
        "FINETUNE_10K": finetuned_small,
        "BATCH_NORM": batch_norm,
        "WITNESSES": witnesses,
        "EARLY_JUDGE": early_judge,
        "WHOLE_144": whole_cifar,
        "WHOLE_144_CPU": whole_cifar_on_a_cpu,
        "WHOLE_224": partial(whole_cifar, LARGE),
        "IMAGENETTE_JUDGE": imagenette_judge,
    },
}
SHOWN: dict[str, Callable[[], str]] = {  # on no page
    "tuning": tuning,
    "best": partial(by_noise, "best", "cpu", CPU, EVERY),
    "leads_cosine": partial(leads, "cpu", CPU, "HNML", [method for method in COSINE if method != "HNML"]),
    "leads": partial(leads, "cpu", CPU, CONSTANT[-1], ("cross-entropy", *CONSTANT[:-1])),
    "leads_corrected": partial(leads, "cpu", CPU, CORRECTED[-1], ("cross-entropy", *CONSTANT, *CORRECTED[:-1])),
    "frozen_targets": frozen_targets,
    "pretrained": pretrained,
    "audit_rates": audit_rates,
}


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: if a table's place is not there exactly once.
    """
    for name, table in tables.items():
        place = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        content = table()
        text, count = re.subn(place, lambda found, new=content: found[1] + new + found[2], text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"`<!-- {name} -->` is there {count} times; it needs to be there once.")
    return text


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing; end with 1 if a table is not up to date.")
    parser.add_argument("--show", nargs="+", choices=SHOWN, metavar="NAME", help=f"Print tables: {', '.join(SHOWN)}.")
    args = parser.parse_args(argv)
    if args.show:
        print("\n\n".join(f"{name}\n\n{SHOWN[name]()}" for name in args.show))
        return
    stale = []
    for page, tables in TABLES.items():
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = filled(old, tables)
        if new != old:
            stale.append(page)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'not up to date' if args.check else 'written'}: {', '.join(stale)}" if stale else "up to date")
    if stale and args.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
