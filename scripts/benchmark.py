"""Measure what the objectives cost, in cross-entropy steps under the same trainer.

    python scripts/benchmark.py cost                                        # ResNet-18 at 32 pixels
    python scripts/benchmark.py cost --backbone resnet50 --image_size 224 --batch_size 8 --output c.json --plot c.svg
    python scripts/benchmark.py cost --device cuda --bf16 --channels_last   # and --compile
    python scripts/benchmark.py profile --case momentum                     # where the time goes, by operator

All cases are timed in turns, round by round, within one run; a figure is the median over rounds of its ratio to
cross-entropy in the same round, and its spread is the range. On a CPU the ratio of processor times is given too: it
hardly depends on what else the machine does.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import benchmark_accuracy
import benchmark_audit
import torch
import transformers
from accelerate import PartialState
from provenance import provenance
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    TimmCAMForImageClassification,
    peak_tensor_bytes,
    tensor_bytes,
)


MOMENTUM = {"objective": "hnml", "inner_direction": "momentum"}
SYNTHETIC = {"objective": "hnml", "inner_direction": "synthetic"}
HEAD = {**SYNTHETIC, "meta_scope": "head"}
MEMORY = {"teacher_source": "memory"}
LAST_STAGE = {**SYNTHETIC, "meta_scope": "last_stage"}
FULL = {**SYNTHETIC, "meta_scope": "full"}

CASES = {  # the plain Trainer and `ce` come first: what the others are compared with
    "plain trainer": None,
    "ce": {"objective": "ce"},
    "gce": {"objective": "gce"},
    "elr": {"objective": "elr"},
    "mean teacher": {"objective": "mean_teacher"},
    "momentum": MOMENTUM,
    "momentum, memory": {**MOMENTUM, **MEMORY},
    "head, 1 set": {**HEAD, "num_meta_draws": 1},
    "head, 10 sets": {**HEAD, "num_meta_draws": 10},
    "head, 10 sets, memory": {**HEAD, "num_meta_draws": 10, **MEMORY},
    "last_stage, 1 set, first order": {**LAST_STAGE, "second_order": False},
    "last_stage, 1 set, second order": {**LAST_STAGE, "second_order": True},
    "full, 1 set, first order": {**FULL, "second_order": False},
    "full, 1 set, first order, every 4 steps": {**FULL, "second_order": False, "meta_every": 4},
    "full, 1 set, second order": {**FULL, "second_order": True},
    "mlnt, 1 set, first order": {"objective": "mlnt", "meta_scope": "full", "second_order": False},
    "last_stage, 10 sets, first order": {**LAST_STAGE, "second_order": False, "num_meta_draws": 10},
    "full, 10 sets, first order": {**FULL, "second_order": False, "num_meta_draws": 10},
    "full, 10 sets, second order": {**FULL, "second_order": True, "num_meta_draws": 10},
}
TEACHED = ("hnml", "mlnt", "mean_teacher")
SLOW_CASES = ("last_stage, 10 sets, first order", "full, 10 sets, first order", "full, 10 sets, second order")


# -- what all subcommands share ---------------------------------------------------------------------------------------


class RandomImages(Dataset):
    """Noise with labels, ready in memory, so that loading costs nothing."""

    def __init__(self, size: int, shape: tuple[int, int, int], num_labels: int):
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.randn(size, *shape, generator=generator)
        self.labels = torch.arange(size).numpy() % num_labels
        self.clean_labels = self.labels * 0 - 1
        self.index = torch.arange(size).numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict:
        return {"pixel_values": self.pixel_values[row], "labels": self.labels[row], "index": self.index[row]}


class Collator:
    """Batches of [`RandomImages`]; the plain Trainer's model takes pixels and labels only."""

    def __init__(self, *, plain: bool):
        self.plain = plain

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
        batch["labels"] = torch.tensor([int(sample["labels"]) for sample in samples])
        if not self.plain:
            batch["index"] = torch.tensor([int(sample["index"]) for sample in samples])
            batch["clean_labels"] = torch.full_like(batch["labels"], -1)
        return batch


class StepClock(TrainerCallback):
    """Times of the steps of the last training, from the end of one to the end of the next: loop and loader too."""

    def __init__(self, device: torch.device):
        self.device = device

    def on_train_begin(self, args, state, control, **kwargs):
        self.marks, self.processor = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        self.processor.append(time.process_time())

    def seconds(self, warmup: int, cycle: int = 1) -> tuple[float, float]:
        """Median wall and processor time of a step after `warmup` steps; `cycle` unlike steps are taken together."""
        marks, processor = self.marks[warmup - 1 :], self.processor[warmup - 1 :]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            wall = [a.elapsed_time(b) / 1000 for a, b in zip(marks, marks[1:], strict=False)]
        else:
            wall = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        used = [b - a for a, b in zip(processor, processor[1:], strict=False)]
        return tuple(
            statistics.median(sum(times[i : i + cycle]) / cycle for i in range(0, len(times), cycle))
            for times in (wall, used)
        )


def origin(args) -> dict:
    """What a reader needs to judge a figure and to measure it again."""
    names = ("batch_size", "memory_batch_size", "steps", "warmup", "rounds", "bf16", "channels_last", "compile")
    return {
        "command": f"python scripts/benchmark.py {shlex.join(sys.argv[1:])}",
        **provenance(args.device, threads=torch.get_num_threads()),
        "processes": PartialState().num_processes,
        "settings": {name: getattr(args, name) for name in names},
    }


def build_trainer(options: dict | None, pristine: TimmCAMForImageClassification, args) -> Trainer:
    """A trainer for one case; `None` is transformers' own Trainer, whose model computes the cross-entropy itself."""
    model = TimmCAMForImageClassification(pristine.config)
    model.load_state_dict(pristine.state_dict())
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    shared = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": args.batch_size,
        "max_steps": args.warmup + max(args.steps, (options or {}).get("meta_every", 1)),
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": args.device == "cuda",
        "use_cpu": args.device == "cpu",
        "bf16": args.bf16,
        "torch_compile": args.compile,
    }
    images = RandomImages(max(4 * args.batch_size, args.memory_batch_size), model.input_size, model.config.num_labels)
    if options is None:
        trainer = Trainer(model, TrainingArguments(**shared), train_dataset=images, data_collator=Collator(plain=True))
    else:
        options = {"num_neighbors": min(10, args.batch_size - 1), "gauge_fraction": 0, **options}  # full strength
        trainer = HNMLTrainer(
            model,
            HNMLTrainingArguments(**shared, **options),
            train_dataset=images,
            data_collator=Collator(plain=False),
        )
    trainer.clock = StepClock(torch.device(args.device))
    trainer.add_callback(trainer.clock)
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_trainers(args, names) -> dict[str, Trainer]:
    pristine = TimmCAMForImageClassification.from_timm(
        args.backbone, num_labels=args.num_labels, image_size=args.image_size, **json.loads(args.model_args)
    )
    return {name: build_trainer(CASES[name], pristine, args) for name in names}


def one_step(trainer: Trainer, batch_size: int):
    """A whole training step, outside the loop: forward, backward, optimizer, teacher."""
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(batch_size)])

    def step():
        trainer.training_step(trainer.model_wrapped, inputs)
        trainer.callback_handler.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.step()
        trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.zero_grad()

    trainer.is_in_train, trainer.state.global_step = True, 0
    return step


# -- cost -------------------------------------------------------------------------------------------------------------


def peak_memory(trainer: Trainer, batch_size: int) -> int:
    """Bytes at the peak of a step: what stays (weights, teacher, optimizer, memory) and what the step adds."""
    step = one_step(trainer, batch_size)
    kept = [*trainer.model.parameters(), *trainer.model.buffers()]
    kept += [value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    if getattr(trainer, "teacher", None) is not None:
        kept += trainer.teacher.state_dict().values()
    if getattr(trainer, "memory", None) is not None:
        kept += trainer.memory.state_dict().values()
    return tensor_bytes(kept) + peak_tensor_bytes(step, trainer.args.device)


def measure_cost(args) -> dict:
    names = args.cases or [name for name in CASES if args.all or name not in SLOW_CASES]
    names = ["ce", *(name for name in names if name != "ce" and not (args.compile and "second order" in name))]
    source, trainers = origin(args), build_trainers(args, names)
    wall, processor, memory = ({name: [] for name in names} for _ in range(3))
    for turn in range(args.rounds):
        for name in names:
            trainer = trainers[name]
            trainer.train()
            seconds, used = trainer.clock.seconds(args.warmup, (CASES[name] or {}).get("meta_every", 1))
            wall[name].append(seconds)
            processor[name].append(used)
            if turn == 0:
                memory[name] = peak_memory(trainer, args.memory_batch_size)
            trainer.optimizer = trainer.lr_scheduler = None  # its state is as large as the model
            trainer.accelerator.free_memory()
            print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr)
    rows = []
    for name in names:
        options = CASES[name] or {}
        trainer = trainers[name]
        synthetic = options.get("inner_direction") == "synthetic" or options.get("objective") == "mlnt"
        row = {
            "case": name,
            "backbone": args.backbone,
            "image_size": trainer.model.input_size[-1],
            "objective": options.get("objective", "ce"),
            "scope": options.get("meta_scope") if synthetic else None,
            "second_order": trainer.args.second_order if synthetic else None,
            "draws": trainer.args.num_meta_draws if synthetic else None,
            "teacher_source": trainer.args.teacher_source if options.get("objective") in TEACHED else None,
            "meta_every": options.get("meta_every", 1),
            **ratios("wall_ratio", wall[name], wall["ce"]),
            "flops_ratio": flops_ratio(trainer) if options else 1.0,
            "memory_ratio": round(memory[name] / memory["ce"], 3),
            "device": args.device,
        }
        if args.device == "cpu":
            row |= ratios("processor_ratio", processor[name], processor["ce"])
        else:
            row |= {
                "milliseconds": round(1000 * statistics.median(wall[name]), 2),
                "memory_mib": round(memory[name] / 2**20),
            }
        rows.append(row)
    return {"what": "ratios to cross-entropy under the same trainer", **source, "rows": rows}


def flops_ratio(trainer: HNMLTrainer) -> float:
    """What the trainer's own meter says, for whole cycles of `meta_every` steps."""
    counted, every = trainer.cost_meter.ratios.values(), trainer.args.meta_every
    return round((max(counted) + (every - 1) * min(counted)) / every, 3)


def ratios(name: str, times: list[float], reference: list[float]) -> dict[str, float]:
    """Median, smallest and largest ratio of the rounds."""
    found = [own / other for own, other in zip(times, reference, strict=True)]
    return {
        name: round(statistics.median(found), 3),
        f"{name}_min": round(min(found), 3),
        f"{name}_max": round(max(found), 3),
    }


def table(rows: list[dict]) -> str:
    columns = {
        "case": "case",
        "wall": "wall_ratio",
        "processor": "processor_ratio",
        "FLOPs": "flops_ratio",
        "memory": "memory_ratio",
    }
    columns = {title: key for title, key in columns.items() if key in rows[0]}

    def cell(row, key):
        if f"{key}_min" in row:
            return f"{row[key]:.2f} ({row[f'{key}_min']:.2f} to {row[f'{key}_max']:.2f})"
        return f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key])

    lines = [list(columns), ["---"] * len(columns), *([cell(row, key) for key in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def plot(result: dict, path: str):
    """Bars of wall time, FLOPs and memory for each case."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'hnml_hf[benchmark]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"][::-1]
    time_key = "processor_ratio" if "processor_ratio" in rows[0] else "wall_ratio"
    bars = {"time": time_key, "FLOPs": "flops_ratio", "memory": "memory_ratio"}
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
    for i, (title, key) in enumerate(bars.items()):
        places = [place + 0.27 * (1 - i) for place in range(len(rows))]
        axes.barh(places, [row[key] for row in rows], height=0.25, label=title)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("cross-entropy steps")
    axes.set_title(f"{rows[0]['backbone']} at {rows[0]['image_size']} pixels, {result['hardware']}", fontsize=9)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def cost(args):
    """Wall time, FLOPs and memory of a training step."""
    result = measure_cost(args)
    if not PartialState().is_main_process:
        return
    print(table(result["rows"]))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


def add_cost(subparsers):
    parser = subparsers.add_parser("cost", help=cost.__doc__)
    add_step_options(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"Only these: {'; '.join(CASES)}.")
    parser.add_argument("--all", action="store_true", help="Also the cases that cost more than 5 steps.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of all cases.")
    parser.add_argument("--output", help="Write the figures and where they come from to this JSON file.")
    parser.add_argument("--plot", help="Draw them into this file (svg, png, pdf).")
    parser.set_defaults(run=cost)


def add_step_options(parser):
    parser.add_argument("--backbone", default="resnet18_cifar")
    parser.add_argument("--image_size", type=int, default=None, help="Default: the backbone's own.")
    parser.add_argument("--model_args", default="{}", help="Other arguments of `timm.create_model`, as JSON.")
    parser.add_argument("--num_labels", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--memory_batch_size", type=int, help="Batch for the memory figures; default: the same.")
    parser.add_argument("--steps", type=int, default=4, help="Timed steps per case and round.")
    parser.add_argument("--warmup", type=int, default=2, help="Steps before them, at least 1.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="Threads on a CPU.")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--compile", action="store_true")


# -- profile ----------------------------------------------------------------------------------------------------------


def profile_case(args):
    """Where the time of a training step goes, by operator."""
    from torch.profiler import ProfilerActivity, profile

    (trainer,) = build_trainers(args, [args.case]).values()
    trainer.train()
    step = one_step(trainer, args.batch_size)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(args.steps):
            step()
    key = f"self_{args.device}_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key.replace("cuda", "device")))
    total = sum(getattr(event, key.replace("cuda", "device")) for event in events)
    print("| operator | share of the time | calls per step |\n|---|---|---|")
    for event in events[: args.rows]:
        share = getattr(event, key.replace("cuda", "device")) / total
        print(f"| {event.key} | {share:.1%} | {event.count / args.steps:g} |")


def add_profile(subparsers):
    parser = subparsers.add_parser("profile", help=profile_case.__doc__)
    add_step_options(parser)
    parser.add_argument("--case", choices=CASES, default="momentum")
    parser.add_argument("--rows", type=int, default=12, help="Operators to list.")
    parser.set_defaults(run=profile_case, rounds=1)


# -- command line -----------------------------------------------------------------------------------------------------

SUBCOMMANDS = [add_cost, add_profile, benchmark_audit.add_parser, benchmark_accuracy.add_parser]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for add in SUBCOMMANDS:
        add(subparsers)
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    args.memory_batch_size = args.memory_batch_size or args.batch_size
    args.run(args)


if __name__ == "__main__":
    main()
