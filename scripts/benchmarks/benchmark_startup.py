"""How long commands take that need no library: processor seconds, in those of `import torch`."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from benchmark_cost import ratios
from provenance import provenance
from tqdm import tqdm


REFERENCE = "import torch"
COMMANDS = {
    "pass": ["-c", "pass"],
    REFERENCE: ["-c", "import torch"],
    "import timm, transformers, datasets": ["-c", "import timm, transformers, datasets"],
    "import hnml_hf": ["-c", "import hnml_hf"],
    "HNMLTrainer": ["-c", "from hnml_hf import HNMLTrainer"],
    "hnml": ["-m", "hnml_hf"],
    "hnml --help": ["-m", "hnml_hf", "--help"],
    "hnml train --help": ["-m", "hnml_hf", "train", "--help"],
    "hnml tarin": ["-m", "hnml_hf", "tarin"],
    "hnml train --learnig_rate 1": ["-m", "hnml_hf", "train", "--learnig_rate", "1"],
    "hnml audit ./no_such_folder": ["-m", "hnml_hf", "audit", "./no_such_folder"],
}


def processor_seconds(words: list[str]) -> float:
    """Processor time of a fresh Python with these arguments, its children included."""
    with subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        usage = os.wait4(process.pid, 0)[2]
        process.returncode = 0  # it is over, and was waited for
    return usage.ru_utime + usage.ru_stime


def run(args):
    seconds = {name: [] for name in COMMANDS}
    for turn in tqdm(range(args.rounds + 1), desc="rounds", disable=None):
        for name, words in COMMANDS.items():
            used = processor_seconds(words)
            if turn:  # the first round fills the caches of the file system
                seconds[name].append(used)
    rows = [
        {
            "command": name,
            **ratios("processor_ratio", own, seconds[REFERENCE]),
            "seconds": round(statistics.median(own), 3),
        }
        for name, own in seconds.items()
    ]
    for row in rows:
        spread = f"({row['processor_ratio_min']:.2f} to {row['processor_ratio_max']:.2f})"
        print(f"{row['command']:<40} {row['processor_ratio']:.2f} {spread}")
    if args.output:
        result = {
            "what": f"processor time of a command, as a ratio to `{REFERENCE}` in the same round",
            "command": "python scripts/benchmarks/benchmark.py startup --output docs/results/startup.json",
            **provenance(threads=torch.get_num_threads()),
            "rounds": args.rounds,
            "rows": rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def add_parser(subparsers):
    parser = subparsers.add_parser("startup", help="processor time of help, of mistakes and of imports")
    parser.add_argument("--rounds", type=int, default=7, help="Of all commands, after one that does not count.")
    parser.add_argument("--threads", type=int, default=1, help="Of this process.")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    parser.set_defaults(run=run)
