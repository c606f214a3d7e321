"""Measure: what a training step costs, what accuracy it gives, how well it finds wrong labels.

    python scripts/benchmarks/benchmark.py cost  # ResNet-18 at 32 pixels
    python scripts/benchmarks/benchmark.py cost --backbone resnet50 --image_size 224 --batch_size 8 --output c.json
    python scripts/benchmarks/benchmark.py cost --device cuda --bf16 --channels_last  # and --compile
    python scripts/benchmarks/benchmark.py profile --case momentum  # where the time goes, by operator
    python scripts/benchmarks/benchmark.py accuracy --suite scripts/benchmarks/suites/cpu.yaml  # a grid of runs
    python scripts/benchmarks/benchmark.py audit --data_root data  # wrong labels found, beside cleanlab
    python scripts/benchmarks/benchmark.py detection --data_root data  # the same from frozen features
    python scripts/benchmarks/benchmark.py startup  # processor time of help, of mistakes and of imports

The cases of `cost` are timed in turns, round by round, within one run; a figure is the median over rounds of its ratio
to cross-entropy in the same round, and its spread is the range. On a CPU the ratio of processor times is given too: it
hardly depends on what else the machine does.
"""

import argparse

import benchmark_accuracy
import benchmark_audit
import benchmark_cost
import benchmark_detection
import benchmark_profile
import benchmark_startup
import torch
import transformers


SUBCOMMANDS = (
    *(benchmark_cost, benchmark_profile, benchmark_startup),
    *(benchmark_audit, benchmark_accuracy, benchmark_detection),
)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True)
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
