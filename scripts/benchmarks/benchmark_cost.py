"""Wall time, FLOPs and memory of a training step, in steps of cross-entropy."""

import json
import statistics
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from benchmark_steps import CASES, BareLoop, add_step_options, build_trainers, one_step, origin
from figures import drawing, save
from transformers import Trainer

from hnml_hf import HNMLTrainer
from hnml_hf.common.allocator import keep_freed_memory
from hnml_hf.training.args import SYNTHETIC_OBJECTIVES, TEACHER_OBJECTIVES
from hnml_hf.training.flops import peak_tensor_bytes, tensor_bytes


SLOW_CASES = ("full, 10 sets, first order", "full, 10 sets, second order")


def peak_memory(trainer: Trainer, batch_size: int) -> int:
    """Bytes at the peak of a step: what stays (weights, teacher, optimizer, memory) and what the step adds."""
    step = one_step(trainer, batch_size)
    kept = [*trainer.model.parameters(), *trainer.model.buffers()]
    kept += [value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    if getattr(trainer, "teacher", None) is not None:
        kept += trainer.teacher.network.state_dict().values()
    if getattr(trainer, "memory", None) is not None:
        kept += trainer.memory.store.state_dict().values()
    return tensor_bytes(kept) + peak_tensor_bytes(step, trainer.args.device)


def measure_cost(args) -> dict:
    names = args.cases or [name for name in CASES if args.all or name not in SLOW_CASES]
    names = ["ce", *(name for name in names if name != "ce" and not (args.compile and "second order" in name))]
    source, trainers = origin(args), build_trainers(args, names)
    wall, processor = ({name: [] for name in names} for _ in range(2))
    memory: dict[str, int] = {}  # not of the bare loop, whose step cannot be taken alone
    for turn in range(args.rounds):
        for name in names:
            trainer = trainers[name]
            trainer.train()
            seconds, used = trainer.clock.seconds(args.warmup)
            wall[name].append(seconds)
            processor[name].append(used)
            if isinstance(trainer, BareLoop):
                continue
            if turn == 0:
                memory[name] = peak_memory(trainer, args.memory_batch_size)
            trainer.optimizer = trainer.lr_scheduler = None  # its state is as large as the model
            trainer.accelerator.free_memory()
            print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr)
    rows = []
    for name in names:
        options = CASES[name] or {}
        trainer = trainers[name]
        synthetic = options.get("objective") in SYNTHETIC_OBJECTIVES
        row = {
            "case": name,
            "backbone": args.backbone,
            "image_size": trainer.model.input_size[-1],
            "objective": options.get("objective", "ce"),
            "scope": options.get("meta_scope") if synthetic else None,
            "second_order": trainer.args.second_order if synthetic else None,
            "draws": trainer.args.num_meta_draws if synthetic else None,
            "teacher_source": trainer.args.teacher_source if options.get("objective") in TEACHER_OBJECTIVES else None,
            **ratios("wall_ratio", wall[name], wall["ce"]),
            "flops_ratio": flops_ratio(trainer) if options else 1.0,
            "memory_ratio": round(memory[name] / memory["ce"], 3) if name in memory else None,
            "device": args.device,
        }
        if args.device == "cpu":
            row |= ratios("processor_ratio", processor[name], processor["ce"])
        else:
            row |= {
                "milliseconds": round(1000 * statistics.median(wall[name]), 2),
                "memory_mib": round(memory[name] / 2**20) if name in memory else None,
            }
        rows.append(row)
    return {"what": "ratios to cross-entropy under the same trainer", **source, "rows": rows}


def flops_ratio(trainer: HNMLTrainer) -> float:
    """What the trainer's own meter says of its dearest step."""
    return round(max(trainer.cost.meter.ratios.values()), 3)


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
        return f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key] or "-")

    lines = [list(columns), ["---"] * len(columns), *([cell(row, key) for key in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def plot(result: dict, path: str):
    """Bars of wall time, FLOPs and memory for each case."""
    pyplot = drawing()
    rows = result["rows"][::-1]
    time_key = "processor_ratio" if "processor_ratio" in rows[0] else "wall_ratio"
    bars = {"time": time_key, "FLOPs": "flops_ratio", "memory": "memory_ratio"}
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
    for i, (title, key) in enumerate(bars.items()):
        places = [place + 0.27 * (1 - i) for place in range(len(rows))]
        axes.barh(places, [row[key] or 0 for row in rows], height=0.25, label=title)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("cross-entropy steps")
    axes.set_title(f"{rows[0]['backbone']} at {rows[0]['image_size']} pixels, {result['hardware']}", fontsize=9)
    axes.legend()
    save(figure, path)
    pyplot.close(figure)


def cost(args):
    if args.device == "cpu":
        keep_freed_memory()  # as `hnml train` does
    args.memory_batch_size = args.memory_batch_size or args.batch_size
    # before anything else asks for the state: several processes on a CPU would each take themselves for the only one
    state = PartialState(cpu=args.device == "cpu")
    result = measure_cost(args)
    if not state.is_main_process:
        return
    print(table(result["rows"]))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)


def add_parser(subparsers):
    parser = subparsers.add_parser("cost", help="wall time, FLOPs and memory of a training step")
    add_step_options(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=f"Only these: {'; '.join(CASES)}.")
    parser.add_argument("--all", action="store_true", help="Also the cases that cost more than 5 steps.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns of all cases.")
    parser.add_argument("--output", help="Write the figures and where they come from to this JSON file.")
    parser.add_argument("--plot", help="Draw them into this file (svg, png, pdf).")
    parser.set_defaults(run=cost)
