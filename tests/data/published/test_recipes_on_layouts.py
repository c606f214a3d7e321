"""The recipes of the known datasets on their official layouts, with a small backbone; the other scripts on a part."""

import json
import re
from pathlib import Path

import pytest
import yaml
from commands import TRAIN, load_script

from hnml_hf import TimmCAMForImageClassification, create_image_processor


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


def test_every_script_takes_a_part_of_a_known_dataset(cifar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    part = ["--dataset", "cifar10n-worse", "--data_dir", str(cifar.root / "python")]
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=10, image_size=64)
    model.save_pretrained("model")
    create_image_processor(model.config.pretrained_cfg).save_pretrained("model")
    check, evaluate, predict = (load_script(name).main for name in ("check", "evaluate", "predict"))
    assert check(part) == 1 and "pass `partial=True`" in capsys.readouterr().err
    assert check([*part, "--partial"]) != 1
    assert re.search(r"^train +100 +100 ", capsys.readouterr().out, re.M)
    evaluate(["model", *part, "--partial", "true"])
    assert "accuracy" in capsys.readouterr().out
    predict(["model", *part, "--partial", "true", "--split", "test", "--output", "predictions.csv"])
    assert len(Path("predictions.csv").read_text("utf-8").splitlines()) == 11
