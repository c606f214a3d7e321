"""The README: short, and each of its blocks runs, on a small folder of photos and with a small network."""

import argparse
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, load_script
from PIL import Image

from hnml_hf import TimmCAMForImageClassification
from hnml_hf.cli import COMMANDS, check_words


README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = ("python -m pip install -e . && accelerate launch scripts/train.py", "python -m pytest")


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [code for named, code in found if named == language]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with two classes of photos, some for prediction, and weights that stand in for pretrained ones."""
    root = tmp_path_factory.mktemp("readme")
    random = np.random.default_rng(0)
    for folder, count in (("photos", 20), ("new_photos", 1), ("checked_photos", 2)):
        for shade, name in ((40, "cat"), (160, "dog")):
            (root / folder / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(shade, shade + 60, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / name / f"{number}.png")
    torch.manual_seed(0)
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=2, image_size=64).save_pretrained(
        root / "weights"
    )
    return root


def test_it_is_short_and_sets_everything_up():
    assert len(README.split()) < 900
    for command in SETUP:
        assert command in README


def test_its_commands_run(photos, monkeypatch, capfd):
    """In their order; `review` up to the server that waits for a browser."""
    monkeypatch.chdir(photos)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(photos / "cache"))
    small = ["--backbone", "test_resnet", "--pretrained", "weights", "--image_size", "64"]
    training = ["--max_steps", "2", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"]
    training += ["--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"]
    more = {
        "audit": [*small, "--num_workers", "0", "--device", "cpu"],
        "train": [*small, *training],
        "review": ["--port", "0"],
    }
    monkeypatch.setattr("socketserver.BaseServer.serve_forever", lambda *args, **options: None)
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hnml ")]
    assert [line.split()[1] for line in lines] == [*"audit review clean train predict evaluate export".split()]
    for line in lines:
        _, command, *words = shlex.split(line)
        if command == "export":
            pytest.importorskip("onnxscript")
        assert command in COMMANDS
        check_words(command, words)
        load_script(command).main([*words, *more.get(command, [])])
    assert "Estimated noise" in capfd.readouterr().out
    assert Path("outputs/photos/_audit/report.html").is_file() and Path("photos_cleaned").is_dir()
    assert len(Path("predictions.csv").read_text().splitlines()) == 3


def test_the_issues_are_a_table(photos, monkeypatch):
    (code,) = [block for block in blocks("") if "find_label_issues" in block]
    monkeypatch.chdir(photos)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(photos / "cache"))
    small = 'find_label_issues("photos", backbone="test_resnet", pretrained="weights", image_size=64, num_workers=0)'
    exec(compile(code.replace('find_label_issues("photos")', small), "README.md", "exec"), names := {})
    assert len(names["issues"]) == 40 and 0 <= names["issues"]["noise_score"].iloc[0] <= 1


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split()[1])
def test_its_code_runs(code, quickstart, monkeypatch):
    monkeypatch.chdir(quickstart[0])
    exec(compile(code, "README.md", "exec"), {})


def test_the_shown_options_exist():
    """Of commands and options inside sentences."""
    options = {action.option_strings[0] for action in parser("train")._actions if action.option_strings}
    for option in re.findall(r"`(--[a-z_]+)", README):
        assert option in options or option in ("--multi_gpu", "--num_processes"), option


def parser(command: str) -> argparse.ArgumentParser:
    from hnml_hf.cli import create_parser

    return create_parser(command)
