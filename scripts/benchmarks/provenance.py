"""Where a measured figure comes from."""

import platform
from pathlib import Path

import torch

from hnml_hf.training.provenance import commit, versions


def provenance(device: str = "cpu", *, threads: int) -> dict:
    """Commit, hardware and versions, for the file that a figure is written to."""
    return {
        "commit": commit(),
        "hardware": hardware(device),
        "threads": threads,
        "versions": versions(),
    }


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{models[0] if models else platform.processor() or platform.machine()} ({len(models) or '?'} cores)"
