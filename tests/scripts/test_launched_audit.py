"""`scripts/audit.py` in two processes of a launcher, beside one."""

import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from commands import TRAIN, free_port, load_script
from PIL import Image
from safetensors.torch import save_file

from hnml_hf import load_audit


def launch(*options) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", free_port(), TRAIN.with_name("audit.py"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(300)
def test_two_processes_share_the_images_and_say_what_one_says(tmp_path, capsys):
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "model.safetensors")
    generator = np.random.default_rng(0)
    for row in range(31):
        color = np.eye(3)[row % 3] * 180 + generator.integers(0, 70, (32, 32, 3))
        folder = tmp_path / "photos" / f"class{(row + (row == 5)) % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(color.astype(np.uint8)).save(folder / f"{row}.png")
    options = [tmp_path / "photos", "--backbone", "test_resnet", "--pretrained", tmp_path / "model.safetensors"]
    options += ["--image_size", "64", "--num_workers", "0", "--device", "cpu"]
    load_script("audit").main([str(option) for option in [*options, "--output_dir", tmp_path / "one"]])
    apart = tmp_path / "elsewhere" / "two"  # the features of an audit beside it would be taken over
    told = {"one": capsys.readouterr().out, "two": launch(*options, "--output_dir", apart)}
    # the first of two computes one more than the other, and what is missing would have no features
    counts = {name: int(re.search(r"\((\d+) images;", shown)[1]) for name, shown in told.items()}
    assert counts == {"one": 31, "two": 16} and all(shown.count("Estimated noise") == 1 for shown in told.values())
    one, two = load_audit(tmp_path / "one"), load_audit(apart)
    assert (one["times_seen"] == 1).all() and (two["times_seen"] == 1).all()
    pd.testing.assert_frame_equal(one, two, rtol=0, atol=1e-6)
    assert one.attrs["noise_rate"] == pytest.approx(two.attrs["noise_rate"], abs=1e-6)
