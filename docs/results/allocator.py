"""What it costs a training on a CPU to give freed memory back to the system: the record beside this file.

python docs/results/allocator.py docs/results/allocator.json

Forward and backward of networks of timm, frozen batch norm, channels_last, one thread; each way in a process of its
own, by turns.
"""

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import timm
import torch

from hnml_hf.common.allocator import keep_freed_memory


sys.path.append(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))

from provenance import provenance


CASES = [
    ("tf_efficientnet_lite0", 32, 128),
    ("tf_efficientnet_lite0", 144, 64),
    ("tf_efficientnet_lite0", 224, 8),
    ("tf_efficientnet_lite0", 224, 64),
    ("resnet18", 224, 32),
    ("vit_small_patch16_224", 224, 32),
]
ROUNDS = 3


def processor_seconds() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


def measure(name: str, size: int, batch: int):
    """Print milliseconds of a processor per image, user and system, of a step and of a pass, and the peak in MiB."""
    torch.set_num_threads(1)
    network = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last).eval()
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)

    def step():
        network(images).square().mean().backward()
        network.zero_grad()

    found = {}
    for what, run in {"step": step, "pass": torch.no_grad()(lambda: network(images))}.items():
        run()
        times, before = max(2, 128 // batch), processor_seconds()
        for _ in range(times):
            run()
        spent = [1000 * (b - a) / times / batch for a, b in zip(before, processor_seconds(), strict=True)]
        found[what] = dict(zip(("user", "system"), spent, strict=True))
    print(json.dumps(found | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main(output: str):
    results = []
    for name, size, batch in CASES:
        runs: dict[str, list[dict]] = {"as usual": [], "kept": []}
        for _ in range(ROUNDS):
            for way, those in runs.items():
                line = [sys.executable, __file__, "--one", way, name, str(size), str(batch)]
                those.append(json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout))
        case = {"network": name, "pixels": size, "batch": batch, "runs": runs}
        for what in ("step", "pass"):
            ratios = [sum(a[what].values()) / sum(b[what].values()) for a, b in zip(*runs.values(), strict=True)]
            case[f"{what}_ratio"] = [round(of(ratios), 2) for of in (statistics.median, min, max)]
        peaks = [b["peak_mib"] / a["peak_mib"] for a, b in zip(*runs.values(), strict=True)]
        case["peak_ratio"] = round(statistics.median(peaks), 2)
        print({key: value for key, value in case.items() if key != "runs"}, flush=True)
        results.append(case)
    about = {"what": __doc__.splitlines()[0], "unit": "milliseconds of a processor per image"}
    Path(output).write_text(
        json.dumps(about | {"provenance": provenance(threads=1)} | {"cases": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        if sys.argv[2] == "kept" and not keep_freed_memory():
            raise SystemExit("This system has no glibc, or its settings are in the environment.")
        measure(sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main(sys.argv[1])
