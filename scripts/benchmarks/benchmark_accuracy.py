"""Accuracy under label noise: a grid of training runs, each by `scripts/train.py`, and what came of them.

    python scripts/benchmarks/benchmark.py accuracy --suite scripts/benchmarks/suites/cpu.yaml --jobs 2

A suite is a YAML file:

    recipe: ../recipes/cifar10n_10k_cpu.yaml    # options of scripts/train.py for all runs, a path from the suite
    noises: {worse: {label_column: worse_label}, ...}       # options by name
    methods: {cross-entropy: {objective: ce}, ...}
    backbones: {...}                                         # optional, likewise
    grid:                                                    # the runs: each entry is a product of lists of names
    - {noise: [worse], method: [cross-entropy, HNML], seed: [0, 1, 2]}

Each finished run is one line of `runs.jsonl`, with its provenance; it is not run again. A run that was cut off goes on
from its last checkpoint. A record or a folder of a run with other options than the suite now has under its name is
refused. `last` is the accuracy on the clean test set after the last epoch, `best` that after the
epoch whose accuracy on held-out noisy labels was highest: the test set chooses nothing.
"""

import argparse
import fnmatch
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from figures import drawing, save
from provenance import provenance


TRAIN = Path(__file__).parents[1] / "train.py"
sys.path.append(str(TRAIN.parent))

from recipe import read_suite  # noqa: E402 (it lies beside `train.py`)


RUNS = "runs.jsonl"
AXES = {"noise": "noises", "backbone": "backbones", "method": "methods"}
PROTOCOL = ("rows_train", "rows_test", "targets", "pretrained", "image_size")  # of a run, where it tells them
KEPT_CURVES = {name: name for name in ("label_agreement", "memorized", "meta_weight")} | {  # of the log, short
    f"eval_{split}{model}_accuracy": f"{split}{model}"
    for split in ("validation", "test")
    for model in ("", "_student", "_teacher")
}
KEPT_CURVES["eval_memorized"] = "memorized"  # of an epoch it comes after what the training steps saw, and replaces it
STORED_CURVES = ("epoch", "test", "validation", "memorized", "meta_weight")  # what tables and figures are made of
RENAMED = (  # in records of earlier versions: methods, options and curves
    ("look-ahead", "extrapolation"),
    ("constant rate", "constant learning rate"),
    (r", rate (?=\d)", ", learning rate "),
    ("without the gauge's labels", "without the monitor's labels"),
    (r"\bgauge\b", "monitor"),
    ("full strength", "full weight"),
    ("--gauge_fraction", "--monitor_fraction"),
    ("--forward_correction", "--symmetric_correction"),
    ('"fit":', '"label_agreement":'),
    ('"strength":', '"meta_weight":'),
)


@dataclass(frozen=True)
class Cell:
    """One training run: names on the axes of the suite, and the options they stand for."""

    names: tuple[tuple[str, str | int], ...]
    options: tuple[tuple[str, object], ...]
    recipe: Path

    @property
    def name(self) -> str:
        return ", ".join(f"{axis} {value}" if axis == "seed" else str(value) for axis, value in self.names)

    @property
    def folder(self) -> str:
        return "-".join("".join(c if c.isalnum() else "_" for c in str(value)) for _, value in self.names)

    def arguments(self) -> list[str]:
        """Of `scripts/train.py`, without the output folder."""
        return ["--recipe", str(self.recipe), *as_arguments(dict(self.options))]

    @property
    def command(self) -> str:
        """As a person would type it, whatever folder the recipe is in."""
        return shlex.join(["python", "scripts/train.py", *self.arguments()]).replace(str(self.recipe.parent), "...")


def as_arguments(options: Mapping[str, object]) -> list[str]:
    """Options of a suite as words of a command line; one that is null stays what it was."""
    arguments = []
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name}", json.dumps(value) if isinstance(value, (dict, bool)) else str(value)]
    return arguments


def load_suite(path: Path) -> list[Cell]:
    """The runs of a suite, in the order of its grid, each once.

    Raises:
        ValueError: on a key or name that the suite does not know, or a recipe that is not there.
    """
    suite = read_suite(path)
    unknown = set(suite) - {"recipe", "grid", *AXES.values()}
    if unknown or not suite.get("grid") or not suite.get("recipe"):
        raise ValueError(
            f"{path}: a suite has `recipe`, `grid` and {', '.join(f'`{name}`' for name in AXES.values())}; "
            f"this one has {', '.join(f'`{name}`' for name in suite)}."
        )
    recipe = (path.parent / suite["recipe"]).resolve()
    if not recipe.is_file():
        raise ValueError(f"{path}: its `recipe` is {recipe}, which is not there.")
    cells = {}
    for block in suite["grid"]:
        if set(block) - {*AXES, "seed"} or "seed" not in block:
            raise ValueError(f"{path}: an entry of `grid` has `seed` and some of {', '.join(AXES)}, got {block}.")
        axes = [axis for axis in (*AXES, "seed") if axis in block]
        for values in itertools.product(*(block[axis] for axis in axes)):
            names, options = tuple(zip(axes, values, strict=True)), {}
            for axis, value in names:
                if axis == "seed":
                    options["seed"] = value
                elif value in (suite.get(AXES[axis]) or {}):
                    options |= suite[AXES[axis]][value] or {}
                else:
                    raise ValueError(
                        f"{path}: `{value}` is none of its {AXES[axis]}: {list(suite.get(AXES[axis], {}))}."
                    )
            cells.setdefault(names, Cell(names, tuple(options.items()), recipe))
    return list(cells.values())


# -- running ----------------------------------------------------------------------------------------------------------


def finished(path: Path) -> dict[str, dict]:
    """Records by the name of their cell; a last line that was cut off is left out. Old names are today's."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        for old, new in RENAMED:
            line = re.sub(old, new, line)
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["cell"]] = record | {"curve": by_epoch(record.get("curve", []))}
    return records


def by_name(curve: list[dict]) -> dict[str, list]:
    """A curve as it is stored: the values of all epochs by their name, None where an epoch has none."""
    names = [name for name in STORED_CURVES if any(name in entry for entry in curve)]
    return {name: [entry.get(name) for entry in curve] for name in names}


def by_epoch(curve: dict[str, list] | list[dict]) -> list[dict]:
    """The other way; records of earlier versions have a curve by epoch already."""
    if isinstance(curve, list):
        return curve
    entries = (dict(zip(curve, values, strict=True)) for values in zip(*curve.values(), strict=True))
    return [{name: value for name, value in entry.items() if value is not None} for entry in entries]


def same_options(command: str, other: str) -> bool:
    """Whether two commands of `scripts/train.py` say the same, in whatever order."""
    options = [shlex.split(text)[2:] for text in (command, other)]
    return len({frozenset(zip(words[::2], words[1::2], strict=True)) for words in options}) == 1


def append(path: Path, record: dict):
    """Add a line to the records, on a line of its own even if the last one was cut off."""
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n")
    stored = record | {"curve": by_name(record.get("curve", []))}
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps(stored, separators=(",", ":")) + "\n")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_cell(cell: Cell, work_dir: Path, launcher: list[str], threads: int) -> dict:
    """Train one cell in a process of its own.

    Raises:
        RuntimeError: if it fails, with the end of its output, or if its folder is that of other options.
    """
    folder = work_dir / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    if (started := folder / "command.txt").exists() and not same_options(
        before := started.read_text("utf-8"), cell.command
    ):
        raise RuntimeError(
            f"{folder} was started with other options than {cell.name} has now: remove it to start again.\n"
            f"then: {before}\nnow:  {cell.command}"
        )
    started.write_text(cell.command, encoding="utf-8")
    command = [*launcher, str(TRAIN), *cell.arguments(), "--output_dir", str(folder)]
    command += ["--resume_from_checkpoint", "auto"]
    start = time.perf_counter()
    with open(folder / "output.log", "a", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        tail = (folder / "output.log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise RuntimeError(f"{cell.name} ended with code {code}:\n" + "\n".join(tail))
    record = summarize(folder)
    for old in folder.glob("checkpoint-*"):
        shutil.rmtree(old)
    return {
        "cell": cell.name,
        **dict(cell.names),
        "recipe": cell.recipe.name,
        **record,
        "wall_s": round(time.perf_counter() - start),
        "command": cell.command,
        **provenance(device(), threads=threads),
    }


def summarize(folder: Path) -> dict:
    """Figures of a finished run, from the files that it wrote."""
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    epochs: dict[float, dict] = {}
    for entry in state["log_history"]:
        if "train_runtime" in entry:
            break
        found = {KEPT_CURVES[name]: round(value, 4) for name, value in entry.items() if name in KEPT_CURVES}
        epochs.setdefault(round(entry["epoch"], 3), {}).update(found)
    curve = [{"epoch": epoch, **values} for epoch, values in epochs.items() if "test" in values]
    if not curve:
        raise RuntimeError(f"{folder} has no accuracy by epoch: a suite's runs need `eval_strategy` and `eval_test`.")
    record = {
        "dataset": results.get("dataset"),
        "architecture": config["architecture"],
        "objective": results["objective"],
        "epochs": curve[-1]["epoch"],
        "evaluated": results["evaluated"],
        **{name: results[name] for name in PROTOCOL if name in results},
    }
    other = {"student": "teacher", "teacher": "student"}[results["evaluated"]]
    models = {"": "", f"_{results['evaluated']}": "", f"_{other}": f"_{other}"}
    for ending, key in models.items():
        if "test" + key in curve[-1]:
            chosen = max(curve, key=lambda entry, key=key: entry["validation" + key])
            record |= {
                f"last{ending}": curve[-1]["test" + key],
                f"best{ending}": chosen["test" + key],
                f"best_epoch{ending}": chosen["epoch"],
            }
    audit = folder / "_audit" / "summary.json"
    if audit.is_file():
        estimate = json.loads(audit.read_text(encoding="utf-8"))
        record |= {name: estimate[name] for name in ("noise_rate", "noise_rate_interval")}
    return record | {
        "auroc": results.get("train_noise_auroc"),
        "memorized": results.get("train_memorized", curve[-1].get("memorized")),
        "cost_ce": results["cost_ce"],
        "curve": curve,
    }


def overridden(cell: Cell, changes: Sequence[str]) -> Cell:
    """A run with other values of some options, each `NAME=VALUE`."""
    changed = dict(change.split("=", 1) for change in changes)
    return replace(cell, options=tuple((dict(cell.options) | changed).items()))


def accuracy(args: argparse.Namespace):
    cells = [overridden(cell, args.override) for cell in load_suite(args.suite)]
    if args.only:
        cells = [cell for cell in cells if any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in args.only)]
        if not cells:
            raise SystemExit(f"No run of {args.suite} is called {' or '.join(args.only)}.")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    path = args.work_dir / RUNS
    done = finished(path)
    other = [
        cell for cell in cells if cell.name in done and not same_options(done[cell.name]["command"], cell.command)
    ]
    if other:
        raise SystemExit(
            f"{path} has records of other options than {args.suite} has now: "
            + "; ".join(f"{cell.name} was `{done[cell.name]['command']}` and is `{cell.command}`" for cell in other)
            + ". Give the method another name, or take the record away."
        )
    waiting = [] if args.only_existing else [cell for cell in cells if cell.name not in done]
    print(f"{len(cells)} runs, {sum(cell.name in done for cell in cells)} of them finished before", flush=True)

    def run(cell: Cell) -> dict:
        return run_cell(cell, args.work_dir, shlex.split(args.launcher), args.threads)

    failed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(run, cell) for cell in waiting]):
            try:
                record = future.result()
            except RuntimeError as error:
                failed.append(str(error))
                print(error, file=sys.stderr, flush=True)
                continue
            append(path, record)
            print(f"{record['cell']}: last {record['last']:.3f}, best {record['best']:.3f}", flush=True)
    found = finished(path)
    records = [found[cell.name] for cell in cells if cell.name in found]
    if records:
        print("\n" + table(records))
        if args.output:
            args.output.write_text(table(records) + "\n", encoding="utf-8")
        if args.plot:
            plot(records, args.plot)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(waiting)} runs failed; call again to try those again.")


# -- what came of them ------------------------------------------------------------------------------------------------


def mean_spread(values: list[float | None], percent: bool = True) -> str:
    """`mean +- standard deviation` of what is there; in per cent, or as it is."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    scale, form = (100, "{:.1f}") if percent else (1, "{:.3f}")
    text = form.format(scale * statistics.mean(values))
    return text + (" ± " + form.format(scale * statistics.stdev(values)) if len(values) > 1 else "")


def grouped(records: list[dict]) -> dict[tuple, list[dict]]:
    """Records that differ in the seed alone, by the names of the other axes."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(axis) for axis in AXES), []).append(record)
    return groups


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def table(records: list[dict]) -> str:
    """Mean and spread over the seeds, as Markdown."""
    columns = ["noise", "backbone", "method", "seeds", "last", "best", "student last / best", "teacher last / best"]
    columns += ["validation", "memorized", "AUROC", "cost"]
    lines = []
    for (noise, backbone, method), group in grouped(records).items():
        lines.append(
            [noise or "", backbone or "", method or "", str(len(group))]
            + [mean_spread([record[name] for record in group]) for name in ("last", "best")]
            + [
                " / ".join(
                    mean_spread([record.get(f"{name}_{model}") for record in group]) for name in ("last", "best")
                )
                for model in ("student", "teacher")
            ]
            + [mean_spread([record["curve"][-1].get("validation") for record in group])]
            + [mean_spread([record["memorized"] for record in group])]
            + [mean_spread([record["auroc"] for record in group], percent=False)]
            + [f"{statistics.mean(record['cost_ce'] for record in group):.2f}"]
        )
    kept = [i for i, _ in enumerate(columns) if any(line[i].strip(" /") for line in lines)]
    return markdown([columns[i] for i in kept], [[line[i] for i in kept] for line in lines])


def plot(records: list[dict], path: Path):
    """Per noise: accuracy and fit of wrong labels over the epochs, and accuracy over cost."""
    pyplot = drawing()
    groups = grouped(records)
    noises = list(dict.fromkeys(noise for noise, *_ in groups))
    figure, panels = pyplot.subplots(
        len(noises), 3, figsize=(15, 4 * len(noises)), layout="constrained", squeeze=False
    )
    palette = [pyplot.get_cmap("tab20")(i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
    looks = itertools.cycle((color, *form) for form in (("-", "o"), ("--", "s"), (":", "^")) for color in palette)
    styles = {}
    for (noise, backbone, method), group in groups.items():
        accuracy_panel, memory_panel, cost_panel = panels[noises.index(noise)]
        label = " ".join(part for part in (backbone, method) if part)
        if label not in styles:
            styles[label] = next(looks)
        color, line, marker = styles[label]
        for panel, key in ((accuracy_panel, "test"), (memory_panel, "memorized")):
            curves = [[entry.get(key, math.nan) for entry in record["curve"]] for record in group]
            epochs = [entry["epoch"] for entry in group[0]["curve"]][: min(map(len, curves))]
            means = [100 * statistics.fmean(column) for column in zip(*curves, strict=False)]
            panel.plot(epochs, means, line, color=color)
        cost = statistics.mean(record["cost_ce"] for record in group)
        last = 100 * statistics.mean(record["last"] for record in group)
        cost_panel.plot(cost, last, marker, color=color)
        accuracy_panel.set(title=f"{noise}: accuracy on clean test data", xlabel="epoch", ylabel="%")
        memory_panel.set(title=f"{noise}: wrong labels that are fitted", xlabel="epoch", ylabel="%")
        cost_panel.set(title=f"{noise}: last epoch over cost", xlabel="cross-entropy trainings", ylabel="%")
    for panel in panels.flat:  # of wrong labels there is nothing to show where no label is wrong
        panel.set_visible(not all(math.isnan(y) for line in panel.get_lines() for y in line.get_ydata()))
    keys = [
        pyplot.Line2D([], [], color=color, linestyle=line, marker=marker, label=label)
        for label, (color, line, marker) in styles.items()
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=3)
    save(figure, path)


def add_parser(subparsers):
    parser = subparsers.add_parser(
        "accuracy",
        help="accuracy of a grid of runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/accuracy"), help="runs and `runs.jsonl`")
    parser.add_argument("--output", type=Path, help="write the table into this file (Markdown)")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file (svg, png, pdf)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run on a CPU")
    parser.add_argument("--launcher", default=sys.executable, help="for example `accelerate launch --multi_gpu`")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help='runs by name: --only "human*, HNML, seed ?" (`*` and `?` as in a shell)',
    )
    parser.add_argument(
        "--override", nargs="*", default=[], metavar="NAME=VALUE", help="options of all runs, for example max_steps=2"
    )
    parser.add_argument("--only_existing", action="store_true", help="train nothing; show what is in --work_dir")
    parser.set_defaults(run=accuracy)
