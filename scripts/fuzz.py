"""Feed damaged files to every reader for a while: each must give data, or one error that names the file.

    python scripts/fuzz.py --seconds 300

Damages valid files of each format (cut, inserted and changed bytes, swapped pieces of two files) and opens them by the
functions that users call: `ValueError` and `OSError` that name the file, or its folder, are right. Prints the inputs
per format and every other exception, with the bytes that caused it; ends with 1 if there was one.
"""

import argparse
import base64
import contextlib
import io
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image

from hnml_hf import (
    NotAnImageError,
    TimmCAMForImageClassification,
    draw_noise,
    load_manifest,
    load_noisy_dataset,
    load_quarantine,
    open_image,
    save_manifest,
)


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
    save_manifest(folder / "noise.json", draw_noise(dataset, kind="symmetric", rate=0.5, seed=0))
    found["noise manifest"] = (folder / "noise.json", load_manifest)
    (folder / "quarantine.jsonl").write_text('{"split": "train", "index": 1, "image": "1.png", "problem": "x"}\n')
    found["quarantine list"] = (folder / "quarantine.jsonl", load_quarantine)
    found["image"] = (folder / "1.png", open_image)
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=2)
    model.save_pretrained(folder / "model")
    for name in ("config.json", "model.safetensors"):
        opened = TimmCAMForImageClassification.from_pretrained
        found[f"model {name}"] = (folder / "model" / name, lambda path, opened=opened: opened(path.parent))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    dice, inputs, refused, escaped = random.Random(args.seed), Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as work:
        with contextlib.redirect_stderr(io.StringIO()):
            readers = formats(Path(work))
            for path, opened in readers.values():
                opened(path)  # as they are, they are fine
        contents = {name: path.read_bytes() for name, (path, _) in readers.items()}
        end = time.monotonic() + args.seconds
        while time.monotonic() < end:
            name = dice.choice(list(readers))
            path, opened = readers[name]
            content = damaged(contents[name], contents[dice.choice(list(readers))], dice)
            path.write_bytes(content)
            inputs[name] += 1
            try:
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    opened(path)
            except Exception as error:  # of any type: other ones are what is looked for
                kind = f"{name}: {type(error).__name__}"
                if isinstance(error, REFUSALS) and path.parent.name in str(error):
                    refused[name] += 1
                else:
                    escaped[kind] += 1
                    if escaped[kind] == 1:
                        print(
                            f"{kind}: {str(error)[:300]!a}\n  {base64.b64encode(content[:600]).decode()}", flush=True
                        )
            finally:
                path.write_bytes(contents[name])
            shutil.rmtree(Path(work, "cache"), ignore_errors=True)
    for name in sorted(inputs):
        print(f"{name:<26} {inputs[name]:>8} inputs, {refused[name]:>8} refused")
    print(f"inputs: {sum(inputs.values())}; other exceptions: {sum(escaped.values())} {dict(escaped) or ''}")
    sys.exit(bool(escaped))


if __name__ == "__main__":
    main()
