"""The check as a user runs it, on an image folder and tables with one planted defect of each kind."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A clean image folder: 2 classes, 4 training and 2 test images each."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "photos"
    for seed, name in enumerate(
        f"{s}/{c}/{i}.png" for s, n in (("train", 4), ("test", 2)) for c in "ab" for i in range(n)
    ):
        write_image(root / name, seed)
    return root


def test_a_clean_folder(script, folder, tmp_path, capsys):
    arguments = ["--dataset", "imagefolder", "--data_dir", str(folder), "--num_workers", "2"]
    outputs = ["--output", str(tmp_path / "audit.json"), "--exclude_output", str(tmp_path / "q.jsonl")]
    assert script.main(arguments + outputs) == 0
    assert "defects: none" in capsys.readouterr().out
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["num_defects"] == 0
    assert report["splits"]["train"]["class_counts"] == {"a": 4, "b": 4}
    assert (tmp_path / "q.jsonl").read_text() == ""


def test_planted_defects(script, folder, tmp_path, capsys):
    (folder / "train/a/0.png").write_bytes(b"")
    (folder / "train/a/1.png").write_text("<html>404</html>")
    whole = (folder / "train/a/2.png").read_bytes()
    (folder / "train/a/2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train/b/0.png").write_bytes((folder / "train/a/3.png").read_bytes())  # same bytes, other label
    (folder / "train/b/1.png").write_bytes((folder / "test/b/1.png").read_bytes())  # train-test overlap
    write_image(folder / "train/lost.png", 99)  # in no class folder
    arguments = ["--dataset", "imagefolder", "--data_dir", str(folder), "--output", str(tmp_path / "audit.json")]
    assert script.main([*arguments, "--exclude_output", str(tmp_path / "q.jsonl")]) == 2
    defects = json.loads((tmp_path / "audit.json").read_text())["defects"]
    assert {kind: len(entries) for kind, entries in defects.items() if entries} == {
        "empty_file": 1,
        "html_file": 1,
        "truncated": 1,
        "conflicting_duplicates": 1,
        "split_overlap": 1,
        "file_without_row": 1,
    }
    assert defects["file_without_row"][0]["path"] == str(folder / "train/lost.png")
    listed = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert sorted((row["split"], row["index"]) for row in listed) == [("train", i) for i in range(6)]
    assert "6 rows to leave out" in capsys.readouterr().out


def write_table(folder, rows):
    path = folder / "train.csv"
    path.write_text("image,label\n" + "".join(f"{image},{label}\n" for image, label in rows))
    return path


def test_a_row_without_file_is_a_defect_and_the_rest_is_audited(script, folder, tmp_path):
    rows = [(f"train/{c}/{i}.png", c) for c in "ab" for i in range(4)] + [("train/a/absent.png", "a")]
    table = write_table(folder, rows)
    (folder / "train/a/0.png").write_bytes(b"garbage")
    assert script.main(["--dataset", str(table), "--output", str(tmp_path / "audit.json")]) == 2
    report = json.loads((tmp_path / "audit.json").read_text())
    assert "train/a/absent.png" in report["defects"]["loading"][0]["reason"]
    assert len(report["defects"]["undecodable"]) == 1
    assert report["splits"]["train"]["num_rows"] == 8


@pytest.mark.parametrize("label", ["", "0.5"])
def test_an_unusable_label_is_a_defect(script, folder, tmp_path, label):
    table = write_table(folder, [("train/a/0.png", "a"), ("train/b/0.png", label)])
    assert script.main(["--dataset", str(table), "--output", str(tmp_path / "audit.json")]) == 2
    report = json.loads((tmp_path / "audit.json").read_text())
    assert "train.csv:3: " in report["defects"]["loading"][0]["reason"]
    assert report["num_defects"] == 1


def test_names_for_the_classes(script, folder, tmp_path):
    """Numbers from 1 have no class 0 once the classes are named, as the errors of the loader advise."""
    rows = [(f"train/{c}/{i}.png", label) for label, c in enumerate("ab", start=1) for i in range(4)]
    table = write_table(folder, rows)
    arguments = ["--dataset", str(table), "--output", str(tmp_path / "audit.json")]
    for option, counts in (([], {"0": 0, "1": 4, "2": 4}), (["--class_names", '["1", "2"]'], {"1": 4, "2": 4})):
        script.main(arguments + option)
        assert json.loads((tmp_path / "audit.json").read_text())["splits"]["train"]["class_counts"] == counts
    with pytest.raises(SystemExit, match="--class_names takes a list, got '\"12\"'"):
        script.main([*arguments, "--class_names", '"12"'])


def test_a_class_of_the_test_set_alone_is_a_defect(script, folder, tmp_path):
    write_image(folder / "test/c/0.png", 50)
    assert script.main(["--dataset", "imagefolder", "--data_dir", str(folder), "--output", str(tmp_path / "a")]) == 2
    (found,) = json.loads((tmp_path / "a").read_text())["defects"]["loading"]
    assert "label 'c' of test is none of the 2 classes" in found["reason"]


def test_file_names_that_are_no_utf8_are_written(script, folder, tmp_path):
    table = write_table(folder, [(f"train/{c}/{i}.png", c) for c in "ab" for i in range(4)])
    stray = os.fsdecode(b"caf\xe9.png")
    (folder / "train" / "a" / "0.png").rename(folder / "train" / "a" / stray)
    report = tmp_path / "new" / "audit.json"
    assert script.main(["--dataset", str(table), "--output", str(report)]) == 2
    found = json.loads(report.read_text(encoding="utf-8"))["defects"]["file_without_row"]
    assert str(folder / "train" / "a" / stray) in [entry["path"] for entry in found]
    row = {"split": "train", "index": 3, "path": stray, "reason": "0 bytes"}
    listed = script.checks.empty_report()
    listed["defects"]["empty_file"].append(row)
    assert script.checks.save_exclusions(tmp_path / "q.jsonl", listed) == 1
    assert json.loads((tmp_path / "q.jsonl").read_text(encoding="utf-8"))["path"] == stray


def test_a_folder_below_home(script, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    write_image(folder / "train/lost.png", 99)
    assert script.main(["--dataset", "imagefolder", "--data_dir", "~/photos"]) == 2
    assert script.main(["--dataset", "~/photos"]) == 2


def test_exit_code_1_when_it_cannot_run(script, tmp_path, capsys):
    assert script.main(["--dataset", "imagefolder", "--data_dir", str(tmp_path / "absent")]) == 1
    assert "could not run" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("../x.jpg", b"")
    assert script.main(["--dataset", "imagefolder", "--data_dir", str(tmp_path / "data.zip")]) == 1
    assert "lead outside" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--data_set", "imagefolder"])
    assert exit_info.value.code == 1


@pytest.mark.slow
def test_exit_code_of_the_process(folder):
    (folder / "train/a/0.png").write_bytes(b"")
    command = [sys.executable, str(SCRIPT), "--dataset", "imagefolder", "--data_dir", str(folder)]
    environment = {"HF_DATASETS_CACHE": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "1  empty_file" in done.stdout
