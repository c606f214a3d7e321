"""Train in two processes, kill them at random, damage files in between, and compare the end with an undisturbed run.

    python scripts/maintenance/soak.py --minutes 30 --output_dir outputs/soak

Every cycle trains the quickstart data twice with `scripts/train.py`: once undisturbed, once killed (SIGKILL, now and
then SIGTERM) after random times and resumed by `--resume_from_checkpoint auto` until it is done. Between attempts the
newest checkpoint may be damaged, as long as an older one is complete. At the end weights, teacher, optimizer, audit,
report and logged figures must be the same to the bit. Only processes that this script started are signalled.

Prints kills survived, samples seen and differences found; ends with 1 if there is a difference.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from hnml_hf.training.resume.files import check
from hnml_hf.training.resume.signals import EXIT_CODE


sys.path.insert(0, str(Path(__file__).parents[1]))  # the scripts that users call
import train


STEPS, SAVE_STEPS, BATCH, PROCESSES = 60, 6, 16, 2
OPTIONS = [
    *("--recipe", "quickstart", "--class_balanced_samples", 400, "--augmentation", "standard"),
    *("--max_steps", STEPS, "--per_device_train_batch_size", BATCH, "--save_strategy", "steps"),
    *("--save_steps", SAVE_STEPS, "--save_total_limit", 3, "--eval_strategy", "steps", "--eval_steps", 20),
    *("--logging_strategy", "steps", "--logging_steps", 7, "--use_cpu", "true", "--disable_tqdm", "true"),
]
AUDIT = ("training_dynamics.npy", "noise_scores.parquet", "summary.json", "report.html")
TIMES = ("runtime", "per_second", "peak_memory")  # figures that no two runs have in common


def start(output_dir: Path) -> list[int]:
    """Fork the processes of one attempt; their ids."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    children = []
    for rank in range(PROCESSES):
        child = os.fork()
        if child:
            children.append(child)
            continue
        log = os.open(output_dir.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(PROCESSES)}
        code = 1
        try:
            torch.set_num_threads(1)
            options = [*OPTIONS, "--output_dir", output_dir, "--resume_from_checkpoint", "auto"]
            train.main([str(option) for option in options])
            code = 0
        except SystemExit as end:
            print(end.code)
            code = end.code if isinstance(end.code, int) else 1  # else it is the message of an error
        except BaseException:  # this process must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(code)
    return children


def finish(children: list[int], *, deadline: float | None, number: signal.Signals) -> list[int]:
    """Wait for an attempt, or signal its processes when the deadline has come. Their exit codes."""
    codes, signalled = {}, False
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
        elif deadline is not None and not signalled and time.monotonic() > deadline:
            signalled = True
            for other in set(children) - set(codes):
                os.kill(other, number)
        else:
            time.sleep(0.02)
    return [codes[child] for child in children]


def damage(output_dir: Path, dice: random.Random) -> str | None:
    """Harm the newest checkpoint, if there is an older one to fall back to. What was done."""
    there = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if len(there) < 2 or dice.random() < 0.6:
        return None
    files = sorted(path for path in there[-1].rglob("*") if path.is_file())
    path, kind = dice.choice(files), dice.choice(["cut off", "bit changed", "removed"])
    content = bytearray(path.read_bytes())
    if kind == "removed" or not content:
        path.unlink()
    elif kind == "cut off":
        path.write_bytes(content[: dice.randrange(len(content))])
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
    return f"{path.relative_to(output_dir)} {kind}"


def differences(one: Path, other: Path) -> list[str]:
    """Names of what two finished runs do not have in common."""
    last = f"checkpoint-{STEPS}"
    same_bytes = ["model.safetensors", f"{last}/model.safetensors", f"{last}/teacher/model.safetensors"]
    same_bytes += [f"{last}/training_dynamics.npy", *(f"_audit/{name}" for name in AUDIT)]
    found = [name for name in same_bytes if (one / name).read_bytes() != (other / name).read_bytes()]
    states = [torch.load(run / last / "optimizer.pt", weights_only=True)["state"] for run in (one, other)]
    for number, state in states[0].items():
        found += [
            f"optimizer {number} {name}"
            for name, value in state.items()
            if value is not None and not torch.equal(value, states[1][number][name])
        ]
    histories = [
        [
            {name: value for name, value in entry.items() if not any(time in name for time in TIMES)}
            for entry in json.loads((run / "trainer_state.json").read_text())["log_history"]
        ]
        for run in (one, other)
    ]
    for one_entry, other_entry in zip(*histories, strict=False):
        found += [f"logged {name}" for name in one_entry if one_entry[name] != other_entry.get(name)]
    return found + (["number of log entries"] if len(histories[0]) != len(histories[1]) else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/soak"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice, end = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    counts, different, whole = Counter(), [], args.output_dir / "whole"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    shutil.rmtree(whole, ignore_errors=True)
    codes = finish(start(whole), deadline=None, number=signal.SIGKILL)
    if codes != [0] * PROCESSES:
        raise SystemExit(f"The undisturbed run failed with {codes}; see `{args.output_dir}/whole.*.log`.")
    duration = time.monotonic() - begun
    print(f"undisturbed run: {duration:.0f} s", flush=True)
    while time.monotonic() < end:
        run = args.output_dir / "killed"
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        codes = [None]
        while codes != [0] * PROCESSES:
            number = signal.SIGTERM if dice.random() < 0.2 else signal.SIGKILL
            patience = dice.uniform(0.1, 0.7) * duration
            codes = finish(start(run), deadline=time.monotonic() + patience, number=number)
            if any(code not in (0, EXIT_CODE, -signal.SIGKILL, -signal.SIGTERM) for code in codes):
                raise SystemExit(f"An attempt failed with {codes}; see `{args.output_dir}/killed.*.log`.")
            counts["kills" if number == signal.SIGKILL else "terminations"] += codes != [0] * PROCESSES
            if codes != [0] * PROCESSES and (harm := damage(run, dice)):
                counts["faults"] += 1
                print(f"  damaged {harm}", flush=True)
        found = differences(whole, run)
        different += found
        fixed = check(run / f"checkpoint-{STEPS}")
        counts["cycles"] += 1
        counts["samples"] += STEPS * BATCH * fixed["processes"]
        print(f"cycle {counts['cycles']}: {dict(counts)}, different: {found or 'nothing'}", flush=True)
    print(
        f"kills survived: {counts['kills']} (and {counts['terminations']} SIGTERM); "
        f"files damaged: {counts['faults']}; samples seen in finished runs: {counts['samples']}; "
        f"differences found: {len(different)}"
    )
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
