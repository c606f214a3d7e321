"""Trains, is killed where it was told to, and goes on until it is done; `test_kills.py` starts it.

    python tests/resume_worker.py FOLDER RUNS        # RUNS: JSON, {name: {"processes", "options", "kills", "fault"}}

Libraries are imported once. Each attempt is a fork, which trains in FOLDER/name and ends by a signal that it sends to
itself at its kill (place, count, rank, signal), by an error when another process of its run was killed, or by
finishing. With a fault there is one attempt.
"""

import atexit
import gc
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import distributed_worker
import torch
import transformers
from datasets import Dataset, Image
from safetensors.torch import save_file

import hnml_hf.audit.run
import hnml_hf.training.resume.files
from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    TimmCAMForImageClassification,
    TrainingInterrupted,
    TransformedDataset,
    audit_run,
    collate_images,
    compute_metrics,
    create_transforms,
)
from hnml_hf.training.resume.signals import EXIT_CODE


DEFAULTS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "weight_decay": 1e-4,
    "eval_strategy": "epoch",
    "save_strategy": "steps",
    "save_steps": 4,  # an epoch has 8 steps
    "save_total_limit": 2,
    "logging_steps": 3,
    "num_neighbors": 1,
    "monitor_fraction": 0,
    "mask_weight": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "log_level": "error",
}
OWNERS = (HNMLTrainer, hnml_hf.training.resume.files, hnml_hf.audit.run, Path)  # of what a run may be killed in
TIMES = ("runtime", "per_second", "peak_memory")  # what no two runs have in common


def build_trainer(folder: Path, options: dict, broken: int | None = None) -> HNMLTrainer:
    """A network with batch norm, dropout and drop path, and 30 augmented images: an epoch's last batch is short."""
    transformers.set_seed(0)
    drops = {"drop_rate": 0.2, "drop_path_rate": 0.2}
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=64, **drops)
    training, evaluation = create_transforms(model.config.pretrained_cfg, augmentation="randaugment")
    dataset = distributed_worker.make_dataset().select(range(30))
    if broken is not None:
        rows = dataset.cast_column("image", Image(decode=False)).to_list()
        rows[broken]["image"] = {"bytes": b"no image", "path": "broken.png"}
        dataset = Dataset.from_list(rows, features=dataset.features)
    return HNMLTrainer(
        model=model,
        args=HNMLTrainingArguments(output_dir=str(folder), **{**DEFAULTS, **options}),
        train_dataset=TransformedDataset(dataset, training),
        eval_dataset=TransformedDataset(dataset, evaluation),
        data_collator=collate_images,
        compute_metrics=compute_metrics,
    )


def die_at(place: str, count: int, number: str = "SIGKILL"):
    """Signal the process group, as a terminal does, at the count-th call of a function of `OWNERS`."""
    os.setpgrp()  # the other processes of the test are spared
    owner = next(owner for owner in OWNERS if hasattr(owner, place))
    original = getattr(owner, place)

    def deadly(*args, **kwargs):
        nonlocal count
        count -= 1
        if count == 0:
            command = f"kill -s {number.removeprefix('SIG')} -- -{os.getpgrp()}"
            subprocess.run(command, shell=True)  # workers end in silence if their parent itself sends it
        return original(*args, **kwargs)

    setattr(owner, place, deadly)


def record(trainer: HNMLTrainer, folder: Path):
    """All that a run leaves behind, apart from times."""
    tensors = distributed_worker.weights_of(trainer)
    for number, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value.clone() for name, value in state.items() if value is not None}
    save_file(tensors, folder / "final.safetensors")
    assert trainer.dynamics.records["times_seen"].min() >= 1
    audit_run(
        folder,
        trainer.dynamics.records,
        trainer.train_dataset.dataset,
        transform=trainer.eval_dataset.views["pixel_values"],
        model=trainer.evaluated_model(),
        curves=trainer.state.log_history,
    )
    history = [
        {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
        for entry in trainer.state.log_history
    ]
    facts = {
        "num_processes": trainer.accelerator.num_processes,
        "steps": trainer.state.global_step,
        "history": history,
    }
    (folder / "epoch_of_the_data.txt").write_text(str(int(trainer.train_dataset._epoch)))
    (folder / "facts.json").write_text(json.dumps(facts, indent=1, sort_keys=True))


def attempt(folder: Path, options: dict, kill: list | None):
    """Train from the newest checkpoint, if there is one, to the end or to the kill."""
    if kill is not None:
        die_at(*kill)
    trainer = build_trainer(folder, options)
    trainer.train(resume_from_checkpoint="auto")
    if trainer.is_world_process_zero():
        record(trainer, folder)


def fail(folder: Path, options: dict, fault: str, rank: int):
    """Train with something that goes wrong on one process only."""
    if fault == "other options" and rank == 1:
        options = {**options, "seed": 7, "learning_rate": 0.1}
    trainer = build_trainer(folder, options, broken=17 if fault == "bad file" else None)
    assert trainer.accelerator.num_processes == 2

    def run_out_of_memory(*args, **kwargs):
        if trainer.state.global_step == 2 and rank == 1:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return objective(*args, **kwargs)

    def collate_and_poison(samples):
        batch = collate_images(samples)
        if rank == 1 and trainer.state.global_step == 2:
            batch["pixel_values"][1] = math.nan
            print("poisoned", int(batch["index"][1]), flush=True)
        return batch

    objective = trainer.objective
    if fault == "out of memory":
        trainer.objective = run_out_of_memory
    if fault == "not finite":
        trainer.data_collator = collate_and_poison
    trainer.train()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def fork_all(processes: int, function, folder: Path) -> list[int]:
    """Call `function(rank)` in forks of this process, one per rank, with a log each; their process ids."""
    port, children = free_port(), []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if processes > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        status = 1
        try:
            function(rank)
            status = 0
        except TrainingInterrupted:
            status = EXIT_CODE
        except BaseException:  # this process must not go on as its parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return children


def wait_for_all(children: list[int], *, machine_dies: bool) -> list[int]:
    """Exit codes, one per rank. If the machine dies, a process that is gone takes the others with it."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if machine_dies and codes[child] not in (0, EXIT_CODE):
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[child] for child in children]


def run_until_killed(folder: Path, options: dict, kill: list | None, processes: int) -> list[int]:
    """One attempt; exit codes, one per rank."""
    place, count, victim, number = kill or (None, 0, 0, "")
    mine = [place, count, number] if kill else None
    children = fork_all(processes, lambda rank: attempt(folder, options, mine if rank == victim else None), folder)
    return wait_for_all(children, machine_dies=True)


def main(folder: Path, runs: dict):
    torch.set_num_threads(1)
    gc.collect()
    atexit.register(gc.unfreeze)
    gc.freeze()  # what is imported stays: the collector, which every training calls, may pass it over
    report = {}
    for name, run in runs.items():
        target, options, processes = folder / name, run.get("options", {}), run.get("processes", 1)
        target.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        if "fault" in run:
            fault = run["fault"]
            children = fork_all(processes, lambda rank, f=fault, t=target, o=options: fail(t, o, f, rank), target)
            codes = [wait_for_all(children, machine_dies=False)]
        else:
            codes = [run_until_killed(target, options, kill, processes) for kill in [*run.get("kills", []), None]]
        report[name] = {"exit_codes": codes, "seconds": round(time.monotonic() - start, 1)}
    (folder / "report.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
