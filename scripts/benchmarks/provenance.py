"""Where a measured figure comes from."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


PACKAGES = ("torch", "timm", "transformers", "datasets", "accelerate")


def provenance(device: str = "cpu", *, threads: int) -> dict:
    """Commit, hardware and versions, for the file that a figure is written to."""
    return {
        "commit": commit(),
        "hardware": hardware(device),
        "threads": threads,
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
    }


def commit() -> str:
    """The commit of these sources, and whether they were changed since; `HNML_COMMIT` where they came without it."""
    if os.environ.get("HNML_COMMIT"):
        return os.environ["HNML_COMMIT"]

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        found = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "") or "unknown"


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
