"""Incomplete checkpoints, disks that are full, folders that are gone or not ours: a clear end, and nothing lost."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
import torch
from checkpoints import steps
from safetensors import SafetensorError
from trainers import build_trainer
from transformers import Trainer, TrainerCallback

import hnml_hf.training.resume.files as checkpoints
from hnml_hf import CheckpointError, MixupCollator, NonFiniteError, TrainingInterrupted
from hnml_hf.training.resume import signals as interrupt
from hnml_hf.training.resume.files import LOCK_FILE, MANIFEST, UNFINISHED_FOLDER, run_lock
from hnml_hf.training.resume.signals import StopSignals


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "objective": "ce"}


@pytest.fixture(scope="module")
def finished(tiny_dataset, tmp_path_factory):
    """A finished run with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    build_trainer(folder, tiny_dataset, **SAVING).train()
    return folder


@pytest.fixture
def written(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def make(folder, step, *, order, content="x"):
    """A small sealed checkpoint."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(content)
    checkpoints.seal(path, {}, {}, order=order)
    return path


# -- incomplete checkpoints --

TEARS = {
    "a pipe": lambda path: ((path / MANIFEST).unlink(), os.mkfifo(path / MANIFEST)),  # which nobody waits for
    "a file that is a pipe": lambda path: ((path / "optimizer.pt").unlink(), os.mkfifo(path / "optimizer.pt")),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "half a manifest": lambda path: (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes()[:99]),
    "a file is missing": lambda path: (path / "optimizer.pt").unlink(),
    "a file is cut off": lambda path: os.truncate(path / "model.safetensors", 1000),
    "a bit has changed": lambda path: flip(path / "model.safetensors"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("tear", TEARS)
def test_an_incomplete_checkpoint_is_passed_over_and_named(tear, written, monkeypatch):
    warnings = []
    monkeypatch.setattr(checkpoints.logger, "warning", warnings.append)
    assert checkpoints.newest_complete(written).name == "checkpoint-6" and not warnings
    TEARS[tear](written / "checkpoint-6")
    assert checkpoints.newest_complete(written).name == "checkpoint-4"
    assert len(warnings) == 1 and "checkpoint-6` is an incomplete checkpoint" in warnings[0]
    with pytest.raises(
        CheckpointError, match="checkpoint-6` is an incomplete .* newest complete one there is .*checkpoint-4"
    ):
        checkpoints.resolve(str(written / "checkpoint-6"), written)


def test_a_run_goes_on_from_the_last_whole_checkpoint(written, tiny_dataset):
    weights = (written / "checkpoint-6" / "model.safetensors").read_bytes()
    TEARS["a file is cut off"](written / "checkpoint-6")
    resumed = build_trainer(written, tiny_dataset, **SAVING)
    started = []
    resumed.add_callback(Watch(on_train_begin=lambda state: started.append(state.global_step)))
    resumed.train(resume_from_checkpoint=True)
    assert started == [4]
    checkpoints.check(written / "checkpoint-6")  # written again, with the same weights
    assert (written / "checkpoint-6" / "model.safetensors").read_bytes() == weights


class Watch(TrainerCallback):
    def __init__(self, **events):
        for name, function in events.items():
            setattr(self, name, lambda args, state, control, f=function, **kwargs: f(state))


def test_nothing_to_resume_from(tiny_dataset, tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint to resume from"):
        build_trainer(tmp_path, tiny_dataset, **SAVING).train(resume_from_checkpoint="true")
    with pytest.raises(CheckpointError, match="is not there. Was it moved or deleted"):
        build_trainer(tmp_path, tiny_dataset, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trainer = build_trainer(tmp_path, tiny_dataset, **SAVING)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 6


@pytest.mark.parametrize(("word", "found"), [("yes", 2), ("On", 2), ("true", 2), ("no", 0), ("off", 0), ("False", 0)])
def test_to_resume_is_a_switch_in_the_words_of_yaml(tmp_path, word, found):
    checkpoint = make(tmp_path, 2, order=1)
    assert checkpoints.resolve(word, tmp_path) == (str(checkpoint) if found else None)


def test_resuming_a_finished_run_trains_no_further(written, tiny_dataset):
    """transformers would take one step more where the last one was inside an epoch, as here (4 steps an epoch)."""
    trainer = build_trainer(written, tiny_dataset, **SAVING)
    output = trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == output.global_step == 6
    assert steps(written) == [2, 4, 6]
    assert "train_loss" in output.metrics and not any("per_second" in name for name in output.metrics)  # no step timed


def test_the_newest_is_the_one_written_last(tmp_path):
    """A run that went back from step 8 to 4 and reached 6: 6 is where it goes on."""
    for order, step in enumerate((4, 8, 6), start=1):
        make(tmp_path, step, order=order)
    assert checkpoints.newest_complete(tmp_path).name == "checkpoint-6"
    assert checkpoints.next_order(tmp_path) == 4


def test_rotation_keeps_what_was_written_last_and_the_best(tmp_path):
    for order, step in enumerate((2, 4, 9, 6), start=1):
        make(tmp_path, step, order=order)
    TEARS["no manifest"](make(tmp_path, 7, order=5))
    checkpoints.rotate(tmp_path, keep=None, protected=())
    assert steps(tmp_path) == [2, 4, 6, 7, 9]
    checkpoints.rotate(tmp_path, keep=4, protected=(str(tmp_path / "checkpoint-6"),))
    assert steps(tmp_path) == [2, 4, 6, 9]  # what is incomplete goes first
    checkpoints.rotate(tmp_path, keep=2, protected=(tmp_path / "checkpoint-6", tmp_path / "checkpoint-2"))
    assert steps(tmp_path) == [2, 6]
    checkpoints.rotate(tmp_path, keep=1, protected=(tmp_path / "checkpoint-6", tmp_path / "checkpoint-2"))
    assert steps(tmp_path) == [2, 6]


def test_rotation_unlinks_what_is_no_folder_and_never_ends_a_run(tmp_path, monkeypatch):
    elsewhere = make(tmp_path / "elsewhere", 1, order=1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(elsewhere)
    (run / "checkpoint-2").symlink_to(tmp_path / "nowhere")
    (run / "checkpoint-3").write_text("a file")
    make(run, 4, order=2)
    checkpoints.rotate(run, keep=1, protected=())
    assert steps(run) == [4] and (elsewhere / "model.safetensors").read_text() == "x"

    warnings = []
    monkeypatch.setattr(checkpoints.logger, "warning", warnings.append)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path: os.rmdir(path))  # refused: it is not empty
    make(run, 5, order=3)
    checkpoints.rotate(run, keep=1, protected=())
    assert steps(run) == [4, 5] and len(warnings) == 1 and "checkpoint-4` is no longer needed" in warnings[0]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_a_checkpoint_takes_the_place_of_what_is_no_folder(kind, tmp_path):
    old, there = make(tmp_path / "elsewhere", 1, order=1), tmp_path / "checkpoint-4"
    there.write_text("x") if kind == "file" else there.symlink_to(old if kind == "link" else tmp_path / "nowhere")
    checkpoints.publish(make(tmp_path / UNFINISHED_FOLDER, 4, order=2, content="new"), there)
    assert (there / "model.safetensors").read_text() == "new" and not there.is_symlink()
    assert (old / "model.safetensors").read_text() == "x" and not list((tmp_path / UNFINISHED_FOLDER).iterdir())


def test_no_flipped_bit_of_a_manifest_changes_what_is_read(written):
    """Each is damage that is passed over, or changes nothing, as one in white space may."""
    manifest = written / "checkpoint-6" / MANIFEST
    whole, fixed = manifest.read_bytes(), checkpoints.check(written / "checkpoint-6")
    changeable, fallen_back, random = checkpoints.changeable_configuration(written / "checkpoint-6"), 0, Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] ^= 1 << random.randrange(8)
        manifest.write_bytes(damaged)
        newest = checkpoints.newest_complete(written)
        if newest.name == "checkpoint-4":
            fallen_back += 1
            with pytest.raises(CheckpointError, match="is an incomplete checkpoint"):
                checkpoints.require_same_run(written / "checkpoint-6", fixed, changeable)
        else:
            assert checkpoints.check(newest) == fixed and checkpoints.changeable_configuration(newest) == changeable
    assert fallen_back > 270


@pytest.mark.parametrize(
    "content", ["null", "[]", "{}", '"x"', '{"blake2b": null}', '{"content": {}, "blake2b": []}', "[" * 10**5, "\x00"]
)
def test_a_manifest_of_another_shape_is_damage(content, written):
    (written / "checkpoint-6" / MANIFEST).write_text(content)
    assert checkpoints.newest_complete(written).name == "checkpoint-4"
    assert checkpoints.next_order(written) == 3
    with pytest.raises(CheckpointError, match="newest complete one there is .*checkpoint-4"):
        checkpoints.resolve(str(written / "checkpoint-6"), written)


def test_a_file_that_cannot_be_read_is_damage(written, monkeypatch):
    digest = checkpoints._digest

    def failing(path):
        if path.parent.name == "checkpoint-6":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return digest(path)

    monkeypatch.setattr(checkpoints, "_digest", failing)
    assert checkpoints.newest_complete(written).name == "checkpoint-4"


def test_a_checkpoint_of_an_earlier_version_says_how_to_go_on(written):
    manifest = written / "checkpoint-6" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text())["content"]))
    with pytest.raises(
        CheckpointError, match="no digest of itself.*earlier version.*--pretrained .*model.safetensors"
    ):
        checkpoints.check(written / "checkpoint-6")


def test_a_checkpoint_with_the_old_names_of_its_configuration_says_how_to_go_on(written):
    manifest = written / "checkpoint-6" / MANIFEST
    content = json.loads(manifest.read_text())["content"]
    content["facts"], content["settings"] = (content.pop(name) for name in checkpoints.CONFIGURATION)
    manifest.write_text(json.dumps({"blake2b": checkpoints._content_digest(content), "content": content}))
    with pytest.raises(CheckpointError, match="no fixed_configuration.*earlier version.*--pretrained"):
        checkpoints.check(written / "checkpoint-6")


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    make(tmp_path, 4, order=1, content="old")
    unfinished = make(tmp_path / UNFINISHED_FOLDER, 4, order=2, content="new")
    checkpoints.publish(unfinished, tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_text() == "new"
    assert not list((tmp_path / UNFINISHED_FOLDER).iterdir())


def test_best_checkpoint_survives_rotation_and_a_move(tiny_dataset, tmp_path):
    options = {
        **SAVING,
        "save_total_limit": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
    trainer = build_trainer(tmp_path / "run", tiny_dataset, **options)
    scores = iter([0.9, 0.2, 0.1])
    trainer.compute_metrics = lambda prediction: {"accuracy": next(scores)}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    assert steps(tmp_path / "run") == [2]  # transformers keeps the best one alone at the end
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "run" / "checkpoint-2")

    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = build_trainer(tmp_path / "moved", tiny_dataset, **options)
    scores = iter([0.2, 0.1])
    moved.compute_metrics = lambda prediction: {"accuracy": next(scores)}
    moved.train(resume_from_checkpoint=True)
    assert moved.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")


# -- another run --


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 6}, "`per_device_train_batch_size` was 12 and is 6"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` was 1 and is 2"),
        ({"seed": 7}, "`seed` was 42 and is 7"),
        ({"metric_for_best_model": "accuracy"}, "`metric_for_best_model` was None and is accuracy"),
        ({"objective": "gce"}, "`objective` was ce and is gce"),
        ({"weight_decay": 0.1}, "`weight_decay` was 0.0 and is 0.1"),
        ({"optim_args": "momentum=0.5"}, "`optim_args` was momentum=0.9 and is momentum=0.5"),
        ({"dataloader_drop_last": True}, "`dataloader_drop_last` was False and is True"),
        ({"eval_teacher": True}, "`eval_teacher` was False and is True"),
        ({"collator": MixupCollator(3)}, "`data_collator` was <function collate_images> and is MixupCollator"),
    ],
)
def test_a_run_that_would_not_go_on_exactly_is_refused(options, message, written, tiny_dataset):
    with pytest.raises(ValueError, match=message):
        build_trainer(written, tiny_dataset, **{**SAVING, **options}).train(resume_from_checkpoint=True)


def test_another_share_held_out_is_refused(tiny_dataset, tmp_path):
    """Labels that were held out have been taught, or the other way round; the default depends on the data."""
    options = {**SAVING, "objective": "hnml", "max_steps": 2}
    build_trainer(tmp_path, tiny_dataset, **options, monitor_fraction=None).train()
    with pytest.raises(ValueError, match="`monitor_fraction` was 0.1 and is 0.2"):
        build_trainer(tmp_path, tiny_dataset, **options, monitor_fraction=0.2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="`monitor_fraction` was 0.1 and is 0.0"):
        build_trainer(tmp_path, tiny_dataset, **options, monitor_fraction=0).train(resume_from_checkpoint=True)
    build_trainer(tmp_path, tiny_dataset, **options, monitor_fraction=0.1).train(resume_from_checkpoint=True)


def resume_and_listen(monkeypatch, folder, dataset, **options):
    """A run that goes on from its second step: the warnings and the learning rates of its steps."""
    warnings, rates = [], []
    monkeypatch.setattr(checkpoints.logger, "warning", warnings.append)
    trainer = build_trainer(folder, dataset, **{**SAVING, **options})
    trainer.add_callback(Watch(on_step_begin=lambda state: rates.append(trainer.optimizer.param_groups[0]["lr"])))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return warnings, rates


def test_a_changed_setting_is_named_and_takes_effect(written, tiny_dataset, monkeypatch):
    """transformers takes the learning rate back from the checkpoint, whatever the command says."""
    assert resume_and_listen(monkeypatch, written, tiny_dataset)[0] == []
    options = {"learning_rate": 0.01, "teacher_decay": 0.9, "augmentation": "randaugment"}
    warnings, rates = resume_and_listen(monkeypatch, written, tiny_dataset, **options)
    cosine = [0.01 * (1 + math.cos(math.pi * step / 6)) / 2 for step in (2, 3, 4, 5)]
    assert rates == pytest.approx(cosine)
    assert len(warnings) == 1 and "checkpoint-2` is resumed with other options" in warnings[0]
    for change in (
        "`learning_rate` was 0.02 and is 0.01",
        "`teacher_decay` was 0.99 and is 0.9",
        "`transform to pixel_values` was Compose( Resize(",
        "RandAugment(n=2",
    ):
        assert change in warnings[0]
    for option in ("mask_weight", "model_args", "optim"):
        assert f"`{option}`" not in warnings[0]
    again = resume_and_listen(monkeypatch, written, tiny_dataset, learning_rate=0.01, lr_scheduler_type="constant")
    assert again[1] == pytest.approx([0.01 * 0.75] + 3 * [0.01]) and "is constant" in again[0][0]


def test_a_rate_of_zero_cannot_be_scaled(tiny_dataset, tmp_path):
    build_trainer(tmp_path, tiny_dataset, **{**SAVING, "learning_rate": 0.0}).train()
    with pytest.raises(ValueError, match="`learning_rate=0`, which cannot be scaled to 0.01"):
        build_trainer(tmp_path, tiny_dataset, **{**SAVING, "learning_rate": 0.01, "max_steps": 9}).train(
            resume_from_checkpoint=True
        )


def test_settings_that_came_or_went_are_named_too(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(checkpoints.logger, "warning", warnings.append)
    checkpoints.seal(tmp_path, {}, {"strong view": "x", "same": (1, 2)})
    checkpoints.require_same_run(tmp_path, {}, {"same": (1, 2), "new": 3})
    assert len(warnings) == 1 and ": `strong view` was x and is None, `new` was None and is 3." in warnings[0]


def test_other_data_is_refused(written, tiny_dataset):
    relabelled = tiny_dataset.map(lambda row: {"label": (row["label"] + 1) % 3}, load_from_cache_file=False)
    with pytest.raises(ValueError, match="`their ids and labels` was"):
        build_trainer(written, relabelled, **SAVING).train(resume_from_checkpoint=True)


def test_other_weights_of_samples_are_refused(written, tiny_dataset):
    weighted = tiny_dataset.add_column("weight", [0.5] * len(tiny_dataset))
    with pytest.raises(ValueError, match="`their weights` was"):
        build_trainer(written, weighted, **SAVING).train(resume_from_checkpoint=True)


def test_another_number_of_processes_is_refused(written, tiny_dataset):
    """Even at the end of an epoch: sums over other batches are not the same to the bit."""
    manifest = json.loads((written / "checkpoint-4" / MANIFEST).read_text())["content"]
    (written / "checkpoint-4" / MANIFEST).unlink()
    checkpoints.seal(
        written / "checkpoint-4",
        {**manifest["fixed_configuration"], "processes": 2},
        manifest["changeable_configuration"],
        order=4,
    )
    with pytest.raises(ValueError, match="`processes` was 2 and is 1.*--pretrained"):
        build_trainer(written, tiny_dataset, **SAVING).train(resume_from_checkpoint=str(written / "checkpoint-4"))


HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_on_one_folder(tiny_dataset, tmp_path):
    held, done = threading.Event(), threading.Event()

    def hold():
        with run_lock(tmp_path):
            held.set()
            done.wait()

    other = threading.Thread(target=hold)
    other.start()
    try:
        held.wait()
        with pytest.raises(RuntimeError, match=f"Another run is writing .*process {os.getpid()} on .*another folder"):
            build_trainer(tmp_path, tiny_dataset, **SAVING).train()
    finally:
        done.set()
        other.join()
    assert not steps(tmp_path)


def test_who_has_the_folder_trains_in_it(tiny_dataset, tmp_path):
    """A script takes it before it loads data, and keeps it until all is written."""
    with run_lock(tmp_path):
        build_trainer(tmp_path, tiny_dataset, **SAVING).train()
        (tmp_path / LOCK_FILE).write_bytes(b"\xff")  # what somebody wrote there is no reason to fail
        with pytest.raises(RuntimeError, match="Another run is writing"):
            in_another_thread(lambda: run_lock(tmp_path).__enter__())


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_named(kind, tmp_path):
    path = tmp_path / LOCK_FILE
    {"link": lambda: path.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(CheckpointError, match=f"`{path}` is no regular file, .* delete it, or give another folder"):
        run_lock(tmp_path).__enter__()


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_lock_does_not_outlive_its_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / LOCK_FILE)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="Another run is writing"), run_lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    with run_lock(tmp_path):
        pass


def test_the_lock_is_let_go_of_after_an_error(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, **SAVING)
    for _ in range(2):
        with pytest.raises(CheckpointError):
            trainer.train(resume_from_checkpoint=True)


FORKED_HOLDER = """
import os, sys, time
from hnml_hf.training.resume.files import run_lock
with run_lock(sys.argv[1]):
    child = os.fork()
    if not child:
        print("held", flush=True)
        os.close(1)
        time.sleep(30)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_lock_does_not_outlive_its_process_in_its_loader_workers(tmp_path):
    """They are forks, which notice only seconds later that the process was killed."""
    holder = subprocess.Popen([sys.executable, "-c", FORKED_HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with holder.stdout:
        assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    with run_lock(tmp_path):
        pass


def test_what_a_killed_run_left_half_written_is_swept(tmp_path):
    part = f"summary.part-{'0' * 32}.json"
    left_over = ["_saving-x/model.safetensors", "last/_saving-x/config.json", f"_audit/{part}", part]
    left_over += [f"{UNFINISHED_FOLDER}/checkpoint-2/optimizer.pt"]
    kept = ["model.safetensors", "notes.part-1.txt", "last/config.json", "_audit/summary.json", "mine/_saving-x/a"]
    for name in left_over + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with run_lock(tmp_path), run_lock(tmp_path):
        pass
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, LOCK_FILE}


# -- the disk --

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (
            "hnml_hf.training.callbacks.save_file",
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        ("hnml_hf.training.resume.files.seal", FULL),
        ("hnml_hf.training.resume.files.publish", FULL),
    ],
)
def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoints(
    place, error, tiny_dataset, tmp_path, monkeypatch
):
    trainer = build_trainer(tmp_path, tiny_dataset, **{**SAVING, "objective": "elr"})

    def fail(*args, **kwargs):
        raise error

    def fill(state):
        if state.global_step == 3:
            monkeypatch.setattr(place, fail)

    trainer.add_callback(Watch(on_step_end=fill))
    with pytest.raises(CheckpointError, match="checkpoint of step 4 could not be written .*(No space|write failed)"):
        trainer.train()
    monkeypatch.undo()
    assert steps(tmp_path) == [2] and not (tmp_path / UNFINISHED_FOLDER).exists()
    build_trainer(tmp_path, tiny_dataset, **{**SAVING, "objective": "elr"}).train(resume_from_checkpoint=True)
    assert steps(tmp_path) == [2, 4, 6]


def test_a_folder_that_cannot_be_written_to(tiny_dataset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`output_dir=.*file/run'` cannot be written to: Not a directory"):
        build_trainer(tmp_path / "file" / "run", tiny_dataset, **SAVING)

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoints.tempfile, "TemporaryFile", read_only)
    with pytest.raises(ValueError, match="cannot be written to: Read-only file system"):
        build_trainer(tmp_path / "run", tiny_dataset, **SAVING)


def test_checkpoints_deleted_during_the_run(tiny_dataset, tmp_path):
    """The next ones are written; a best one that is gone is missed at the end, when the last weights are saved."""
    trainer = build_trainer(tmp_path / "run", tiny_dataset, **SAVING)
    trainer.add_callback(
        Watch(on_step_end=lambda state: shutil.rmtree(tmp_path / "run") if state.global_step == 3 else None)
    )
    trainer.train()
    assert steps(tmp_path / "run") == [4, 6]

    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = build_trainer(tmp_path / "best", tiny_dataset, **SAVING, **options)
    trainer.add_callback(
        Watch(on_save=lambda state: shutil.rmtree(state.best_model_checkpoint) if state.global_step == 6 else None)
    )
    with pytest.raises(CheckpointError, match="is not there. Was it moved or deleted"):
        trainer.train()
    assert (tmp_path / "best" / "last" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_saved(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, **SAVING)

    def spoil(state):
        if state.global_step == 4:
            trainer.model.class_weights.data[0, 0] = torch.inf

    trainer.add_callback(Watch(on_step_end=spoil))
    with pytest.raises(NonFiniteError, match="1 tensor is not finite in the model after step 4, .*fc.weight"):
        trainer.train()
    assert steps(tmp_path) == [2]


# -- signals --


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 3), (signal.SIGINT, 4)], ids=["SIGTERM, mid-epoch", "SIGINT, epoch end"]
)
def test_a_signal_saves_and_stops(number, step, tiny_dataset, tmp_path):
    options = {**SAVING, "eval_strategy": "epoch", "save_steps": 100}
    whole = build_trainer(tmp_path / "whole", tiny_dataset, **options)
    whole.train()
    trainer = build_trainer(tmp_path / "run", tiny_dataset, **options)
    trainer.add_callback(
        Watch(on_step_begin=lambda state: signal.raise_signal(number) if state.global_step == step - 1 else None)
    )
    with pytest.raises(TrainingInterrupted, match=f"{number.name}: training stopped after step {step} of 6"):
        trainer.train()
    assert signal.getsignal(number) is not trainer.signals._take
    evaluated = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(evaluated) == (step == 4)  # no evaluation inside an epoch that the whole run would not have made
    resumed = build_trainer(tmp_path / "run", tiny_dataset, **options)
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_resumed_run_does_not_evaluate_at_a_start_that_is_none(tiny_dataset, tmp_path):
    options = {**SAVING, "eval_on_start": True}
    build_trainer(tmp_path, tiny_dataset, **options).train()
    resumed = build_trainer(tmp_path, tiny_dataset, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["step"] for entry in resumed.state.log_history if "eval_accuracy" in entry] == [0]


def test_a_run_without_a_batch_is_refused(tiny_dataset, tmp_path):
    """transformers would save the untrained model, with an accuracy."""
    options = {"objective": "ce", "per_device_train_batch_size": 64, "dataloader_drop_last": True}
    with pytest.raises(ValueError, match="48 training images give 1 process.es. no batch of 64"):
        build_trainer(tmp_path, tiny_dataset, **options).train()


def test_a_metric_that_is_not_measured_is_named(tiny_dataset, tmp_path):
    """One of a `compute_metrics` of the user's own cannot be known before the first evaluation."""
    options = {"objective": "ce", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "f1"}
    with pytest.raises(ValueError, match="`metric_for_best_model=f1` is not measured. There are .*eval_accuracy"):
        build_trainer(tmp_path, tiny_dataset, **options).train()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_lies_where_checkpoints_are_written_is_put_away(kind, tiny_dataset, tmp_path):
    there, elsewhere = tmp_path / "run" / UNFINISHED_FOLDER, tmp_path / "elsewhere"
    there.parent.mkdir()
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("x")
    there.write_text("x") if kind == "file" else there.symlink_to(elsewhere)
    build_trainer(tmp_path / "run", tiny_dataset, **SAVING).train()
    assert steps(tmp_path / "run") == [2, 4, 6] and [path.name for path in elsewhere.iterdir()] == ["mine.txt"]


def test_operations_are_added_up_exactly(tiny_dataset, tmp_path):
    """In single precision, as in transformers over several processes, 2^24 + 1 + 1 is 2^24."""
    trainer = build_trainer(tmp_path, tiny_dataset, objective="ce")
    for operations in (2.0**24, 1.0, 1.0):
        trainer.current_flos = operations
        trainer.store_flos()
    trainer.current_flos = 2.0**40 + 1
    trainer.store_flos()
    assert trainer.state.total_flos == 2**24 + 2 + 2**40 + 1 and trainer.current_flos == 0


def test_operations_are_those_of_transformers(tiny_dataset, tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path, tiny_dataset, objective="ce")
    counted, count = [], type(trainer.model).num_parameters

    def counting(model, **options):
        counted.append(options)
        return count(model, **options)

    batches = [{"pixel_values": torch.zeros(size, 3, 32, 32)} for size in (12, 5)]
    expected = [Trainer.floating_point_ops(trainer, batch) for batch in batches]
    monkeypatch.setattr(type(trainer.model), "num_parameters", counting)
    assert [trainer.floating_point_ops(batch) for batch in batches] == expected
    assert len(counted) == 1


def test_a_run_that_saves_nothing_leaves_signals_alone(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, objective="ce")
    trainer.add_callback(Watch(on_step_begin=lambda state: signal.raise_signal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_second_signal_ends_at_once_but_an_echo_does_not():
    code = Path(interrupt.__file__).read_text() + (
        "\n"
        "with StopSignals() as signals:\n"
        "    signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGTERM)\n"
        "    assert signals.received is signal.SIGTERM\n"
        "    print('first', flush=True); time.sleep(PATIENCE + 0.1)\n"
        "    signal.raise_signal(signal.SIGTERM); print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "first\n" and done.returncode == -signal.SIGTERM


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
