"""Feed damaged files to every reader for a while: each must give data, or one error that names the file.

    python scripts/maintenance/fuzz.py --seconds 300
    python scripts/maintenance/fuzz.py --seconds 300 --engine atheris           # after `pip install atheris`

Damages valid files of each format and opens them by the functions that users call: `ValueError` and `OSError` that
name the file, or its folder, are right. The engine `random` cuts, inserts and changes bytes and swaps pieces of two
files; `atheris` keeps the inputs that reach other code of this package, Pillow or json, and goes on from these. Prints
the inputs per format and every other exception, with the bytes that caused it; ends with 1 if there was one.
"""

import argparse
import base64
import contextlib
import gc
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import PIL.Image

from hnml_hf import (
    TimmCAMForImageClassification,
    TrainingDynamics,
    audit_run,
    load_annotations,
    load_audit,
    load_noisy_dataset,
    open_image,
)
from hnml_hf.audit.dynamics import run_dynamics
from hnml_hf.data.checks import load_exclusions
from hnml_hf.data.noise_file import load_noise_file, save_noise_file
from hnml_hf.data.synthetic import draw_noise
from hnml_hf.inference import NotAnImageError


REFUSALS = (ValueError, OSError, NotAnImageError)
PIECES = (
    *(
        b"",
        b" ",
        b"\t",
        b",",
        b'"',
        b"\r",
        b"\n",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"../x",
        b"/etc/passwd",
        b"{",
        b"]",
    ),
    *(
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
        b"9" * 400,
        b"\xed\xa0\x80",
        b"\\ud800",
        b"<script>",
        b"=1+1",
        b"\x1a",
        b"[[[[",
    ),
)


def damaged(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """One to four changes of one file, now and then with a piece of another one."""
    for _ in range(dice.randint(1, 4)):
        at = dice.randint(0, len(content))
        kind = dice.random()
        if kind < 0.15:
            content = content[:at]
        elif kind < 0.3 and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :]
        elif kind < 0.4 and other:
            start = dice.randrange(len(other))
            content = content[:at] + other[start : start + dice.randint(1, 200)] + content[at:]
        else:
            content = content[:at] + dice.choice(PIECES) + content[at + dice.choice([0, 0, 1, 3, 30]) :]
    return content


def open_animal10n(path: Path):
    options = {"partial": True, "cache_dir": str(path.parent / "cache")}
    load_noisy_dataset("animal10n", data_dir=str(path.parent), **options)


def formats(folder: Path) -> dict:
    """Name of each format: a valid file of it, and what opens it."""
    for row in range(6):
        PIL.Image.fromarray(np.full((8, 8, 3), 40 * row, np.uint8)).save(folder / f"{row}.png")
    rows = [{"image": f"{row}.png", "label": row % 2, "index": row} for row in range(6)]
    valid = {
        "csv": "image,label,index\n" + "".join(f"{r['image']},{r['label']},{r['index']}\n" for r in rows),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows),
    }
    found = {}
    for suffix, text in valid.items():
        path = folder / f"table.{suffix}"
        path.write_text(text)
        found[f"table {suffix}"] = (path, lambda path: load_noisy_dataset(str(path), cache_dir=str(folder / "cache")))
    dataset = load_noisy_dataset(str(folder / "table.csv"), cache_dir=str(folder / "cache"))["train"]
    save_noise_file(folder / "noise.json", draw_noise(dataset, kind="symmetric", rate=0.5, seed=0))
    found["noise file"] = (folder / "noise.json", load_noise_file)
    (folder / "excluded.jsonl").write_text('{"split": "train", "index": 1, "image": "1.png", "problem": "x"}\n')
    found["exclusion list"] = (folder / "excluded.jsonl", load_exclusions)
    found["image"] = (folder / "1.png", open_image)
    dynamics = TrainingDynamics(dataset["index"], dataset["label"], 2)
    dynamics.update(np.arange(6), np.full((6, 2), 0.5, np.float32), epoch=0)
    dynamics.save(folder / "_audit" / "training_dynamics.npy")
    table = audit_run(folder, dynamics.records, dataset, transform=np.asarray)
    found["dynamics"] = (folder / "_audit" / "training_dynamics.npy", lambda path: run_dynamics(folder))
    found["scores"] = (folder / "_audit" / "noise_scores.parquet", load_audit)
    (folder / "annotations.csv").write_text("index,annotation,new_label\n1,wrong,0\n2,right,1\n")
    found["annotations"] = (folder / "annotations.csv", lambda path: load_annotations(path, table))
    (folder / "animal10n").mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records = [bytes((0, 0, 0, row, 0, 0, 0, row)) + bytes(3 * 64 * 64) for row in range(2)]
        (folder / "animal10n" / name).write_bytes(b"".join(records))
    found["animal10n"] = (folder / "animal10n" / "data_batch_1.bin", open_animal10n)
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=2)
    model.save_pretrained(folder / "model")
    for name in ("config.json", "model.safetensors"):
        opened = TimmCAMForImageClassification.from_pretrained
        found[f"model {name}"] = (folder / "model" / name, lambda path, opened=opened: opened(path.parent))
    return found


class Reader:
    """Opens one format, and counts; the counts are shared with forked processes."""

    def __init__(self, name: str, path: Path, opened):
        self.name, self.path, self.opened = name, path, opened
        self.valid, self.seen = path.read_bytes(), set()
        self.inputs, self.refused, self.escaped = (multiprocessing.Value("q", 0) for _ in range(3))

    def __call__(self, content: bytes):
        self.path.write_bytes(content)
        self.inputs.value += 1
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                self.opened(self.path)
        except Exception as error:  # of any type: other ones are what is looked for
            if isinstance(error, REFUSALS) and self.path.parent.name in str(error):
                self.refused.value += 1
                return
            self.escaped.value += 1
            if type(error) not in self.seen:
                self.seen.add(type(error))
                shown = f"{self.name}: {type(error).__name__}: {str(error)[:300]!a}"
                print(f"{shown}\n  {base64.b64encode(content[:600]).decode()}", flush=True)
        finally:
            self.path.write_bytes(self.valid)
            shutil.rmtree(self.path.parent / "cache", ignore_errors=True)


def by_dice(readers: list[Reader], seconds: float, seed: int):
    dice, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        reader = dice.choice(readers)
        reader(damaged(reader.valid, dice.choice(readers).valid, dice))


def by_coverage(readers: list[Reader], seconds: float, seed: int):
    """A process per format, as libFuzzer ends the one it runs in; a crash of it counts as another exception."""
    import atheris

    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and str(thing.__module__).split(".")[0] in ("hnml_hf", "PIL", "json"):
            atheris.instrument_func(thing)
    for reader in readers:
        child = os.fork()
        if child == 0:
            corpus = tempfile.mkdtemp(dir=reader.path.parent)
            Path(corpus, "valid").write_bytes(reader.valid)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libFuzzer's own report
            limits = [f"-max_total_time={max(1, round(seconds / len(readers)))}", "-rss_limit_mb=0"]
            limits.append(f"-max_len={max(4096, 2 * len(reader.valid))}")
            places = [f"-artifact_prefix={corpus}/", corpus]
            atheris.Setup([sys.argv[0], *limits, f"-seed={seed + 1}", *places], reader)
            atheris.Fuzz()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            reader.escaped.value += 1
            print(f"{reader.name}: the process ended with {os.waitstatus_to_exitcode(status)}", flush=True)


ENGINES = {"random": by_dice, "atheris": by_coverage}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, default="random")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as work:
        with contextlib.redirect_stderr(io.StringIO()):
            readers = [Reader(name, path, opened) for name, (path, opened) in formats(Path(work)).items()]
            for reader in readers:
                reader.opened(reader.path)  # as they are, they are fine
        ENGINES[args.engine](readers, args.seconds, args.seed)
    for reader in readers:
        print(f"{reader.name:<26} {reader.inputs.value:>8} inputs, {reader.refused.value:>8} refused")
    escaped = sum(reader.escaped.value for reader in readers)
    print(f"inputs: {sum(reader.inputs.value for reader in readers)}; other exceptions: {escaped}")
    sys.exit(bool(escaped))


if __name__ == "__main__":
    main()
