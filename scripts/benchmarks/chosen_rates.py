"""Which step size each method of a suite chose by held-out noisy labels, as patterns for `--only`.

    python scripts/benchmarks/chosen_rates.py outputs/finetune/runs.jsonl 1 2

A method named `NAME, learning rate R` is `NAME` at another one, and `NAME, clipped` is one with clipped gradients.
Prints one line `NOISE, METHOD, seed S` for each noise, method and given seed.
"""

import re
import sys
from pathlib import Path

from benchmark_accuracy import finished


def chosen(records: list[dict]) -> dict[tuple[str, str], str]:
    """The best variant, by accuracy on held-out noisy labels after the last epoch, by noise and method."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for record in records:
        if record["seed"] != 0:
            continue
        key = (record["noise"], re.sub(r", (learning rate [0-9.]+|clipped)$", "", record["method"]))
        score = record["curve"][-1]["validation"]
        if key not in best or score > best[key][0]:
            best[key] = (score, record["method"])
    return {key: method for key, (_, method) in best.items()}


def main(path: str, *seeds: str):
    for (noise, _), method in chosen(list(finished(Path(path)).values())).items():
        for seed in seeds:
            print(f"{noise}, {method}, seed {seed}")


if __name__ == "__main__":
    main(*sys.argv[1:])
