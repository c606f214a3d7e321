"""Trains on a small disk until it is full, on it read-only, on it with room, and on one that is too small for the end;
`test_full_disk.py` starts it in a mount namespace of its own, with which the disk vanishes.

    python tests/disk_worker.py FOLDER KIB OPTIONS      # FOLDER/disk is the disk; OPTIONS of scripts/train.py
"""

import shutil
import subprocess
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import train


def attempt(folder: Path, name: str, options: list[str]):
    """Train; what was said at the end, and what was left behind, are kept in FOLDER/name."""
    try:
        train.main([*options, "--output_dir", str(folder / "disk" / "run"), "--resume_from_checkpoint", "auto"])
        said = "finished"
    except SystemExit as end:
        said = str(end)
    shutil.copytree(folder / "disk" / "run", folder / name)
    (folder / f"{name}.txt").write_text(said)


def main(folder: Path, kib: int, options: list[str]):
    def mount(how: str):
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder / "disk"], check=True)

    mount(f"size={kib}k")
    attempt(folder, "full", options)
    mount("remount,ro")
    attempt(folder, "read-only", options)
    mount("remount,rw,size=256m")
    attempt(folder, "room", options)
    mount("size=1000k")  # less than the weights: without checkpoints the end alone needs room
    attempt(folder, "end", [*options, "--save_strategy", "no"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
