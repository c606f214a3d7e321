"""Which learning rate each method of a suite chose by held-out noisy labels, as patterns for `--only`.

    python scripts/benchmarks/chosen_rates.py outputs/finetune/runs.jsonl 1 2

A method named `NAME, rate R` is `NAME` at another rate. Prints one line `NOISE, METHOD, seed S` for each noise, method
and given seed.
"""

import json
import re
import sys
from pathlib import Path


def chosen(records: list[dict]) -> dict[tuple[str, str], str]:
    """The best variant, by accuracy on held-out noisy labels after the last epoch, by noise and method."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for record in records:
        if record["seed"] != 0:
            continue
        key = (record["noise"], re.sub(r", rate [0-9.]+$", "", record["method"]))
        score = record["curve"][-1]["validation"]
        if key not in best or score > best[key][0]:
            best[key] = (score, record["method"])
    return {key: method for key, (_, method) in best.items()}


def main(path: str, *seeds: str):
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for (noise, _), method in chosen(records).items():
        for seed in seeds:
            print(f"{noise}, {method}, seed {seed}")


if __name__ == "__main__":
    main(*sys.argv[1:])
