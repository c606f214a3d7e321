"""Which sources and versions a result comes from."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


PACKAGES = ("torch", "timm", "transformers", "datasets", "accelerate")
ROOT = Path(__file__).parents[2]


def versions() -> dict[str, str]:
    """Of Python and of the libraries that training rests on."""
    return {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}


def commit() -> str:
    """The commit of these sources, and whether they were changed since; `HNML_COMMIT` where they came without it."""
    if os.environ.get("HNML_COMMIT"):
        return os.environ["HNML_COMMIT"]

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    if not (ROOT / ".git").exists():  # an environment may lie in another project's repository
        return "unknown"
    try:
        return (
            git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "") or "unknown"
        )
    except FileNotFoundError:
        return "unknown"
