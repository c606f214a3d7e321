"""`scripts/train.py` in two processes of a launcher: asked to stop, and with a bad file."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import TRAIN, free_port
from PIL import Image
from safetensors.torch import load_file

from hnml_hf.training.resume.files import check, checkpoints, newest_complete


QUICK = (
    *("--max_steps", "24", "--save_strategy", "steps", "--save_steps", "8", "--eval_strategy", "no"),
    *("--save_total_limit", "5", "--per_device_train_batch_size", "16", "--audit", "false"),
)


def launch(output_dir, *options, log) -> subprocess.Popen:
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--main_process_port", free_port(), "--mixed_precision", "no"),
        *("--dynamo_backend", "no", TRAIN, "--use_cpu", "true", "--output_dir", output_dir, *options),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([str(part) for part in command], env=environment, stdout=log, stderr=log, text=True)


def processes_of(output_dir) -> int:
    return check(newest_complete(output_dir))["processes"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_that_is_ended(number, tmp_path):
    """SIGTERM to the launcher reaches the processes, which save; after either, the run goes on to the same end."""
    recipe = ("--recipe", TRAIN.parent / "recipes" / "quickstart.yaml", *QUICK)
    with open(tmp_path / "log.txt", "w+") as log:
        assert launch(tmp_path / "whole", *recipe, log=log).wait(300) == 0
        run = launch(tmp_path / "run", *recipe, log=log)
        while not checkpoints(tmp_path / "run"):
            assert run.poll() is None
            time.sleep(0.1)
        run.send_signal(number)
        assert run.wait(60) != 0
        if number == signal.SIGTERM:
            step = int(newest_complete(tmp_path / "run").name.rpartition("-")[2])
            assert f"SIGTERM: training stopped after step {step} of 24" in (tmp_path / "log.txt").read_text()
        else:  # nobody tells the processes; they notice that they are alone, or finish
            time.sleep(40)
        assert launch(tmp_path / "run", *recipe, "--resume_from_checkpoint", "true", log=log).wait(300) == 0
    assert processes_of(tmp_path / "run") == 2
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(value.equal(other[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_launcher_shows_the_first_error_and_ends(tmp_path):
    random = np.random.default_rng(0)
    for row in range(48):
        path = tmp_path / "data" / "train" / "ab"[row % 2] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:300])
    options = ("--dataset", "imagefolder", "--data_dir", tmp_path / "data", "--backbone", "test_resnet")
    with open(tmp_path / "log.txt", "w+") as log:
        options += ("--per_device_train_batch_size", "4", "--image_size", "64", "--log_level", "info")
        run = launch(tmp_path / "run", *options, log=log)
        while "UnreadableImageError" not in (tmp_path / "log.txt").read_text():
            assert run.poll() is None
            time.sleep(0.1)
        assert run.wait(60) != 0  # a minute after the failure all of it has ended
    text = (tmp_path / "log.txt").read_text()
    summary = text.partition("Root Cause (first observed failure)")[2]
    assert "UnreadableImageError" in summary and path.name in summary
    assert "(w. parallel, distributed & accumulation) = 8" in text  # two processes with a batch of 4
