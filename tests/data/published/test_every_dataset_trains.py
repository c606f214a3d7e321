"""Every dataset, in its official layout, trains 20 steps by `scripts/train.py`, in one process and in two."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[3] / "scripts" / "train.py"
DATASETS = {
    "quickstart": lambda trees: [],
    "clothing1m": lambda trees: ["--data_dir", trees("clothing1m").root, "--partial", "true"],
    "clothing1m-double": lambda trees: [
        *("--dataset", "clothing1m", "--dataset_config", "double_labelled"),
        *("--data_dir", trees("clothing1m").root, "--partial", "true"),
    ],
    "webvision": lambda trees: ["--data_dir", trees("webvision").root, "--partial", "true"],
    "mini-webvision": lambda trees: ["--data_dir", trees("webvision").root, "--partial", "true"],
    "cifar10n-worse": lambda trees: ["--data_dir", trees("cifar").root / "binary", "--partial", "true"],
    "animal10n-binary": lambda trees: [
        *("--dataset", "animal10n", "--data_dir", trees("animal10n").root / "binary", "--partial", "true"),
    ],
    "animal10n-folders": lambda trees: [
        *("--dataset", "animal10n", "--data_dir", trees("animal10n").root / "flat", "--partial", "true"),
    ],
    "food101n": lambda trees: ["--data_dir", trees("food101n").root, "--partial", "true"],
    "imagefolder": lambda trees: ["--data_dir", trees("animal10n").root / "nested"],
}


def launch(processes: int, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if processes > 1:  # on the CPU, accelerate starts several processes only under --multi_gpu
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        command += ["--multi_gpu", "--num_machines", "1", "--main_process_port", str(port)]
    command += ["--num_processes", str(processes), SCRIPT, *options, "--use_cpu", "true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", DATASETS)
def test_twenty_steps(name, processes, request, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    done = launch(
        processes,
        *("--dataset", name, *DATASETS[name](request.getfixturevalue)),
        *("--backbone", "test_resnet", "--image_size", "32", "--model_args", '{"output_stride": 8}'),
        *("--max_steps", "20", "--per_device_train_batch_size", "5", "--logging_steps", "10", "--save_strategy", "no"),
        *("--output_dir", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 20 and "eval_accuracy" in results and results["num_processes"] == processes
    seen = results["train_samples_per_second"] * results["train_runtime"]
    assert round(seen / 20 / 5) == processes  # two processes that ran as one would have seen half as many images


def test_bad_files_on_one_rank_end_both(animal10n, copy_of, tmp_path, monkeypatch):
    """Every file of one class is cut; the run ends with the path and the way out, and does not hang."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = copy_of(animal10n.root / "nested")
    for path in (root / "train" / "3").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    options = [
        *("--dataset", "imagefolder", "--data_dir", root, "--backbone", "test_resnet", "--image_size", "32"),
        *("--model_args", '{"output_stride": 8}', "--max_steps", "20", "--per_device_train_batch_size", "5"),
        *("--save_strategy", "no"),
    ]
    done = launch(2, *options, "--output_dir", tmp_path / "run")
    assert done.returncode != 0
    assert "UnreadableImageError" in done.stderr and "hnml check" in done.stderr
    audit = [sys.executable, SCRIPT.with_name("check.py"), root]
    audited = subprocess.run([*map(str, audit), "--exclude_output", str(tmp_path / "bad")], capture_output=True)
    assert audited.returncode == 2
    done = launch(2, *options, "--exclude", tmp_path / "bad", "--output_dir", tmp_path / "clean")
    assert done.returncode == 0, done.stderr[-3000:]
