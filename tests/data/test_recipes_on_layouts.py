"""The recipes of the known datasets, from the official layout to the audit, on a small backbone."""

import json
from pathlib import Path

import pytest
import yaml
from test_launched_runs import TRAIN
from test_train_script import load_script


SMALL = ["--backbone", "test_resnet", "--pretrained", "false", "--image_size", "64", "--partial", "true"]
SMALL += ["--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--dataloader_num_workers", "0"]
SMALL += ["--dataloader_persistent_workers", "false", "--bf16", "false", "--use_cpu", "true", "--report_to", "none"]
ROOTS = {
    "animal10n": lambda root: root / "binary",
    "cifar10n": lambda root: root / "python",
    "clothing1m": lambda root: root,
    "food101n": lambda root: root,
    "mini_webvision": lambda root: root,
}


@pytest.mark.parametrize("name", ROOTS)
def test_one_epoch(name, request, tmp_path, monkeypatch):
    fixture = {"cifar10n": "cifar", "mini_webvision": "webvision"}.get(name, name)
    root = ROOTS[name](request.getfixturevalue(fixture).root)
    recipe = yaml.safe_load((TRAIN.parent / "recipes" / f"{name}.yaml").read_text("utf-8"))
    own = ["--eval_steps", "5", "--save_steps", "5"] if recipe["eval_strategy"] == "steps" else []
    own += ["--validation_fraction", "0.5"] if "validation_fraction" in recipe else []
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    load_script("train").main(
        ["--recipe", name, *SMALL, *own, "--data_dir", str(root.resolve()), "--output_dir", "run"]
    )
    results = json.loads(Path("run", "all_results.json").read_text("utf-8"))
    assert results["dataset"] == recipe["dataset"] and 0 <= results["eval_accuracy"] <= 1
    assert Path("run", "_audit", "report.html").is_file()
