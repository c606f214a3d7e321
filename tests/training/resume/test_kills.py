"""A run that is killed at any moment, and resumed, ends as if it had not been: bit for bit, in one or two processes.

`resume_worker.py` does the training, in forks of one process that has imported everything.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import resume_worker
from safetensors.torch import load_file

from hnml_hf.training.resume.files import check
from hnml_hf.training.resume.signals import EXIT_CODE


TWO = {"processes": 2, "options": {"per_device_train_batch_size": 2}}
ORDINARY = {
    "one": {},
    "one killed": {  # an epoch has 8 steps, a checkpoint comes every 4
        "kills": [
            ["training_step", 2, 0, "SIGKILL"],  # before the first checkpoint
            ["_save_optimizer_and_scheduler", 1, 0, "SIGKILL"],  # its weights are written, no more
            ["_publish", 1, 0, "SIGKILL"],  # its files are there, without a manifest
            ["publish", 1, 0, "SIGKILL"],  # sealed, not renamed
            ["rotate", 2, 0, "SIGKILL"],  # at the end of an epoch
            ["training_step", 6, 0, "SIGKILL"],  # in the second epoch
            ["prediction_step", 2, 0, "SIGKILL"],  # in the evaluation
            ["training_step", 3, 0, "SIGTERM"],
            ["render_report", 1, 0, "SIGKILL"],  # trained; the scores are there, the report is not
            ["replace", 4, 0, "SIGKILL"],  # after statistics, scores and summary: the report is written, not renamed
        ]
    },
    "one killed, loaders": {
        "options": {"dataloader_num_workers": 2},
        "kills": [
            ["training_step", 14, 0, "SIGKILL"],
            ["training_step", 1, 0, "SIGINT"],
            ["training_step", 2, 0, "SIGTERM"],
        ],
    },
    "one killed, persistent loaders": {
        "options": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        "kills": [
            ["training_step", 3, 0, "SIGINT"],  # in the first loader, whose workers must not die of it
            ["training_step", 10, 0, "SIGKILL"],
            ["training_step", 3, 0, "SIGKILL"],
        ],
    },
    "two": TWO,
    "two killed": {
        **TWO,
        "kills": [
            ["training_step", 6, 0, "SIGKILL"],
            ["_save_rng_state", 1, 1, "SIGKILL"],
            ["training_step", 7, 1, "SIGTERM"],
        ],
    },
    **{fault: {**TWO, "fault": fault} for fault in ("bad file", "out of memory", "not finite", "other options")},
}
SYNTHETIC = {"objective": "hnml_synthetic", "meta_scope": "full"}
FORMS = {
    "elr": {"objective": "elr", "lr_scheduler_type": "constant"},
    "memory": {"teacher_source": "memory", "eval_teacher": False},
    "draws": {**SYNTHETIC, "num_meta_draws": 2},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 5},
    "best": {
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "eval_strategy": "steps",
        "eval_steps": 4,
    },
    "corrected": {"symmetric_correction": True, "num_train_epochs": 3},
    "adamw": {"optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-3},
}


AUDIT = ("noise_scores.parquet", "summary.json", "report.html", "training_dynamics.npy")


def work(folder: Path, runs: dict) -> dict:
    command = [sys.executable, resume_worker.__file__, str(folder), json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    return folder, work(folder, ORDINARY)


def assert_same_end(folder: Path, one: str, other: str):
    tensors, others = (load_file(folder / name / "final.safetensors") for name in (one, other))
    assert any(name.startswith("optimizer.") for name in tensors) and tensors.keys() == others.keys()
    different = [name for name, value in tensors.items() if not value.equal(others[name])]
    assert not different
    assert (folder / one / "facts.json").read_text() == (folder / other / "facts.json").read_text()
    audits = [
        {  # the report names the folder of its run
            path.name: path.read_bytes().replace(str(folder / name).encode(), b"RUN")
            for path in (folder / name / "_audit").iterdir()
        }
        for name in (one, other)
    ]
    assert audits[0].keys() == audits[1].keys() == set(AUDIT)  # no half-written file is left either
    assert not [name for name in AUDIT if audits[0][name] != audits[1][name]]


EXPECTED_CODE = {"SIGKILL": -9, "SIGTERM": EXIT_CODE, "SIGINT": EXIT_CODE}


@pytest.mark.parametrize(
    ("whole", "killed"),
    [
        ("one", "one killed"),
        ("one", "one killed, loaders"),
        ("one", "one killed, persistent loaders"),
        ("two", "two killed"),
    ],
)
def test_killed_and_resumed_is_uninterrupted(whole, killed, ordinary):
    folder, report = ordinary
    *kills, end = report[killed]["exit_codes"]
    for codes, (_, _, rank, number) in zip(kills, ORDINARY[killed]["kills"], strict=True):
        assert codes[rank] == EXPECTED_CODE[number]
        assert number == "SIGKILL" or set(codes) == {EXIT_CODE}  # all processes stop at the same step
    assert set(end) == {0}
    facts = json.loads((folder / killed / "facts.json").read_text())
    assert facts["num_processes"] == ORDINARY[killed].get("processes", 1) and facts["steps"] == 16
    assert_same_end(folder, whole, killed)


@pytest.mark.parametrize("run", ["one", "two"])
def test_every_epoch_has_its_own_augmentation(run, ordinary):
    assert (ordinary[0] / run / "epoch_of_the_data.txt").read_text() == "1"


@pytest.mark.parametrize("run", ["one killed", "two killed"])
def test_nothing_half_written_is_left(run, ordinary):
    names = {path.name for path in (ordinary[0] / run).iterdir() if path.is_dir()} - {"_audit"}
    assert len(names) == 2 and "checkpoint-16" in names  # `save_total_limit`
    for name in names:
        check(ordinary[0] / run / name)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("bad file", "UnreadableImageError: Image `broken.png` of the sample with index"),
        ("out of memory", "OutOfMemoryError: tried to allocate 80 GiB"),
        (
            "other options",
            "The processes of this run were started differently: `learning_rate` is 0.05 on process 0",
        ),
        ("not finite", "NonFiniteError: Step 4: not finite: `base` of the samples with index ["),
    ],
)
def test_a_process_that_fails_ends_all(fault, message, ordinary):
    """Without a launcher that would kill the others, which is the harder case."""
    folder, report = ordinary
    assert report[fault]["exit_codes"] == [[1, 1]] and report[fault]["seconds"] < 60
    logs = [(folder / fault / f"rank_{rank}.log").read_text() for rank in (0, 1)]
    assert any(message in log for log in logs)
    if fault == "not finite":  # both say which sample it was, though one alone has it
        sample = logs[1].partition("poisoned ")[2].split()[0]
        assert all(sample in log.partition(message)[2].partition("]")[0] for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_resumes_exactly(form, processes, tmp_path):
    size = {"per_device_train_batch_size": 4 // processes}
    run = {"processes": processes, "options": {**size, **FORMS[form]}}
    kills = [["training_step", n, (processes - 1) * (n % 2), "SIGKILL"] for n in (7, 5, 7)]
    report = work(tmp_path, {"whole": run, "killed": {**run, "kills": kills}})
    assert [set(codes) for codes in report["whole"]["exit_codes"]] == [{0}]
    assert set(report["killed"]["exit_codes"][-1]) == {0}
    assert all(-9 in codes for codes in report["killed"]["exit_codes"][:-1])
    facts = json.loads((tmp_path / "killed" / "facts.json").read_text())
    assert facts["num_processes"] == processes
    assert_same_end(tmp_path, "whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_signal_leaves_loader_workers_that_are_not_forked_at_work(start, tmp_path):
    options = {"num_train_epochs": 1, "eval_strategy": "no"}
    loaders = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": start}
    killed = {"options": {**options, **loaders}, "kills": [["training_step", 3, 0, "SIGINT"]]}
    report = work(tmp_path, {"whole": {"options": options}, "killed": killed})
    assert report["killed"]["exit_codes"] == [[EXIT_CODE], [0]]
    assert_same_end(tmp_path, "whole", "killed")
