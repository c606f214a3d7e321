import json
import os
import subprocess
import sys
from pathlib import Path

import benchmark
import benchmark_cost
import benchmark_detection
import benchmark_startup
import numpy as np
import pytest
import torch
from benchmark_steps import StepClock


TINY = ["--backbone", "test_resnet", "--image_size", "64", "--device", "cpu", "--batch_size", "4", "--steps", "1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output = tmp_path_factory.mktemp("cost") / "cost.json"
    cases = ["bare loop", "plain trainer", "momentum", "head, 10 sets, memory", "full, 1 set, first order"]
    benchmark.main(["cost", *TINY, "--warmup", "1", "--rounds", "2", "--cases", *cases, "--output", str(output)])
    return json.loads(output.read_text())


def test_rows_name_what_was_measured(measured):
    rows = {row["case"]: row for row in measured["rows"]}
    assert list(rows)[0] == "ce" and len(rows) == 6
    wanted = {"backbone", "image_size", "objective", "scope", "second_order", "draws", "wall_ratio", "flops_ratio"}
    for row in rows.values():
        assert wanted | {"memory_ratio", "device"} <= set(row)
        assert row["wall_ratio_min"] <= row["wall_ratio"] <= row["wall_ratio_max"]
    assert rows["ce"]["wall_ratio"] == rows["ce"]["flops_ratio"] == rows["ce"]["memory_ratio"] == 1
    head = rows["head, 10 sets, memory"]
    assert (head["objective"], head["scope"], head["second_order"], head["draws"]) == (
        "hnml_synthetic",
        "head",
        True,
        10,
    )
    assert head["teacher_source"] == "memory"
    assert rows["bare loop"]["processor_ratio"] > 0 and rows["bare loop"]["memory_ratio"] is None


def test_figures_are_those_of_the_cost_table(measured):
    rows = {row["case"]: row for row in measured["rows"]}
    assert 1.3 < rows["momentum"]["flops_ratio"] < 1.36
    assert 0.99 < rows["head, 10 sets, memory"]["flops_ratio"] < 1.01
    assert 2.95 < rows["full, 1 set, first order"]["flops_ratio"] < 3.1
    assert rows["plain trainer"]["memory_ratio"] == pytest.approx(1, abs=0.01)
    assert rows["momentum"]["memory_ratio"] > 1


def test_figures_carry_where_they_come_from(measured):
    assert measured["command"].startswith("python scripts/benchmarks/benchmark.py") and measured["hardware"]
    assert measured["threads"] == 1 and {"torch", "transformers", "timm", "datasets", "accelerate", "python"} == set(
        measured["versions"]
    )
    assert measured["settings"]["rounds"] == 2


def test_table_and_plot(measured, tmp_path):
    lines = benchmark_cost.table(measured["rows"]).splitlines()
    assert len(lines) == 2 + len(measured["rows"]) and len({len(line) for line in lines}) == 1
    pytest.importorskip("matplotlib")
    benchmark_cost.plot(measured, str(tmp_path / "cost.svg"))
    assert "momentum" in (tmp_path / "cost.svg").read_text()


def test_two_processes_are_two(tmp_path):
    """On CPUs each would take itself for the only one, if the state were asked for before the device is told."""
    output, script = tmp_path / "cost.json", Path(benchmark.__file__)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [script, "cost", *TINY, "--warmup", "1", "--rounds", "1", "--cases", "momentum", "--output", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(output.read_text())["processes"] == 2 and done.stdout.count("| momentum") == 1


def test_ratios_pair_the_rounds():
    """3/2, 8/4, 5/5: a slow round is slow for both."""
    found = benchmark_cost.ratios("x", [3.0, 8.0, 5.0], [2.0, 4.0, 5.0])
    assert found == {"x": 1.5, "x_min": 1.0, "x_max": 2.0}


def test_the_median_of_the_steps_after_the_warm_up():
    """Steps of 1, 4, 2, 6 and 2 seconds, the first of them warm-up."""
    clock = StepClock(torch.device("cpu"))
    clock.marks = clock.processor = [1, 2, 6, 8, 14, 16]
    assert clock.seconds(2) == (3.0, 3.0)


def test_profile_lists_operators(capsys):
    benchmark.main(["profile", *TINY, "--warmup", "1", "--case", "ce", "--rows", "5"])
    assert "convolution" in capsys.readouterr().out


def test_startup_measures_each_command(tmp_path, monkeypatch):
    cases = {"import torch": ["-c", "sum(range(10**7))"], "pass": ["-c", "pass"]}
    monkeypatch.setattr(benchmark_startup, "COMMANDS", cases)
    benchmark.main(["startup", "--rounds", "2", "--output", str(tmp_path / "startup.json")])
    reference, nothing = json.loads((tmp_path / "startup.json").read_text())["rows"]
    assert reference["processor_ratio"] == 1 and 0 < nothing["processor_ratio"] < 1


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # cleanlab 2.9 with pandas 3.1
def test_the_detection_benchmark_compares_scores_of_one_set_of_features():
    pytest.importorskip("cleanlab")
    score, wrong = np.array([0.05, 0.05, 0.95, 1.0]), np.array([False, True, True, True])
    assert benchmark_detection.reliability(score, wrong) == [[0.05, 0.5, 2], [0.975, 1.0, 2]]
    generator = np.random.default_rng(0)
    true = np.arange(300) % 3
    features = (generator.normal(size=(300, 8)) + 5 * np.eye(8)[true]).astype(np.float32)
    labels = np.where(np.arange(300) < 60, (true + 1) % 3, true)
    ours = benchmark_detection.judge("made up", features, np.arange(300), labels, true)
    theirs = benchmark_detection.cleanlab("made up", features, labels, true)
    assert ours["auroc"] > 0.99 and abs(ours["estimated_rate"] - 0.2) < 0.05 and ours["true_rate"] == 0.2
    assert sum(number for _, _, number in ours["reliability"]) == 300
    assert [row["scorer"] for row in theirs][-1] == "Datalab, features" and len(theirs) == 4
    assert all(row["auroc"] > 0.9 and row["processor_seconds"] >= 0 for row in theirs)


def test_the_two_searches_of_neighbors_are_compared():
    features = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    features[300:304] = features[:4] + np.float32(1e-3)
    exact, lists = benchmark_detection.neighbors("made up", features, np.arange(600))
    assert (exact["search"], lists["search"]) == ("all pairs", "lists")
    assert lists["near_duplicates"] == lists["near_duplicates_found"] >= 8
    assert all(lists[f"found_of_the_nearest_{count}"] > 0.9 for count in (1, 10, 50))


def test_made_up_features_are_the_same_however_they_are_asked_for(tmp_path):
    features = benchmark_detection.MadeUp(10_000, 3, 4)
    rows = np.array([9_000, 5, 8_191, 8_192])
    np.testing.assert_array_equal(features[rows], np.concatenate([features[:8_192], features[8_192:]])[rows])
    output = tmp_path / "made_up.json"
    benchmark.main(["detection", "--made_up", "400x8x3", "--threads", "1", "--output", str(output)])
    (row,) = json.loads(output.read_text())["results"]
    assert row["images"] == 400 and row["auroc"] > 0.9 and row["peak_gib"] >= row["gib_before"] > 0


def test_the_reliability_of_each_record_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"dataset": "some photos", "images": 1_000, "reliability": [[0.1, 0.2, 900], [0.9, 0.8, 100]]}
    benchmark_detection.plot([row, {"dataset": "without", "images": 3}], tmp_path / "reliability.svg")
    drawn = (tmp_path / "reliability.svg").read_text()
    assert "some photos" in drawn and "1,000 rows" in drawn and "without" not in drawn
