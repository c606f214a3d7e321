"""The scripts of the project, imported or launched as a user would."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train.py"


def load_script(name):
    (path,) = (ROOT / "scripts").rglob(f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def launch(*options, cwd, check=True):
    command = [sys.executable, "-m", "accelerate.commands.launch", ROOT / "scripts" / "train.py", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
