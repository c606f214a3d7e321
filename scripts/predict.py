"""Classify images with a trained model.

    python scripts/predict.py outputs/quickstart photo.jpg more_photos/ --output predictions.csv
    python scripts/predict.py user/name --revision 1a2b3c photos/ --cams cams/ --output predictions.jsonl
    python scripts/predict.py outputs/quickstart --dataset quickstart --split test --output predictions.csv

A dataset needs no labels here. Nothing is written until all images are done. Files that cannot be read are named, the
others are written, and the exit code is 1, or 0 with `--skip_unreadable`. Works without a network where the model is
a folder.
"""

import argparse
import csv
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import transformers
from options import (
    add_source_options,
    chosen_split,
    command_words,
    inference_device,
    load_model,
    plain_errors,
    read_dataset,
)
from PIL import Image
from tqdm import tqdm

import hnml_hf
from hnml_hf import TransformedDataset, UnreadableImageError, open_image, predict
from hnml_hf.audit.export import escape_formula
from hnml_hf.cli import HelpFormatter
from hnml_hf.common.words import counted
from hnml_hf.data.files import is_image, walk
from hnml_hf.inference import NotAnImageError
from hnml_hf.training.resume.files import run_lock


atomic_write = hnml_hf.common.atomic.atomic_write


def find_images(inputs: list[Path]) -> list[Path]:
    """Files as given, and all images below the folders, by name."""
    found = []
    for path in inputs:
        if path.is_dir():
            names = [folder.prefix + name for folder in walk(path) for name in folder.files if is_image(name)]
            below = sorted(path / name for name in names)
            if not below:
                raise SystemExit(f"`{path}` has no image files (endings that Pillow reads, as .jpg).")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise SystemExit(f"`{path}` is {'no regular file' if path.exists() else 'not there'}.")
    return found


def readable(images: Iterable, read: Callable[..., Image.Image]) -> Iterator[Image.Image | None]:
    for image in images:
        try:
            yield read(image)
        except (NotAnImageError, UnreadableImageError) as error:
            print(f"Left out: {error}", file=sys.stderr)
            yield None


def as_csv(rows: list[dict], top_k: int) -> str:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["image", *(f"{name}_{rank}" for rank in range(1, top_k + 1) for name in ("label", "score"))])
    for row in rows:
        cells = [escape_formula(row["image"])]
        for label, score in zip(row["labels"], row["scores"], strict=True):
            cells += [escape_formula(label), f"{score:.6f}"]
        writer.writerow(cells)
    return table.getvalue()


@plain_errors()
def main(argv: list[str] | None = None):
    usage = "%(prog)s MODEL (IMAGES ... | --dataset DATASET) [options]"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False, usage=usage
    )
    parser.add_argument("model", help="A folder that training wrote, or a repository on the Hub.")
    parser.add_argument("inputs", nargs="*", type=Path, help="Image files and folders of them.")
    parser.add_argument("--revision", default="main", help="Commit or branch of the repository.")
    add_source_options(parser.add_argument_group("instead of files"))
    parser.add_argument("--split", help="Split of the dataset; default: `test`, or the only one.")
    parser.add_argument("--output", type=Path, help="File to write, .csv or .jsonl; default: CSV to the terminal.")
    parser.add_argument("--cams", type=Path, help="Folder for pictures with the activation map of the first class.")
    parser.add_argument("--top_k", type=int, default=5, help="Number of classes to list for each image.")
    parser.add_argument("--batch_size", type=int, default=32, help="Images at a time.")
    parser.add_argument("--device", help="Default: a GPU if there is one.")
    parser.add_argument(
        "--skip_unreadable", action="store_true", help="Do not end with an error if images cannot be read."
    )
    options = parser.parse_intermixed_args(command_words(argv))
    if bool(options.inputs) == bool(options.dataset):
        parser.error("give image files or folders, or else --dataset")
    if options.output and options.output.suffix not in (".csv", ".jsonl"):
        parser.error(f"--output {options.output}: the name must end in .csv or .jsonl")
    if options.top_k < 1 or options.batch_size < 1:
        parser.error("--top_k and --batch_size must be at least 1")
    transformers.utils.logging.disable_progress_bar()
    with run_lock(options.cams) if options.cams else nullcontext():
        predict_all(options)


def predict_all(options: argparse.Namespace):
    """Read model and images, predict, and write what was asked for."""
    device = inference_device(options.device)
    model = load_model(options)
    model.eval().to(device)

    if options.dataset:
        data = read_dataset(options, labels=False)
        split = chosen_split(data, options.split)
        names = [str(index) for index in data[split]["index"]]
        stored = TransformedDataset(data[split], lambda image: image, max_pixels=options.max_pixels)
        source = readable(range(len(stored)), lambda row: stored[row]["pixel_values"])
    else:
        paths, read = find_images(options.inputs), partial(open_image, max_pixels=options.max_pixels)
        names, source = [str(path) for path in paths], readable(paths, read)

    kept = []

    def wanted():
        for name, image in zip(names, source, strict=True):
            if image is not None:
                kept.append(name)
                yield image

    rows = []
    with tempfile.TemporaryDirectory() as aside:
        predictions = predict(
            model,
            wanted(),
            top_k=options.top_k,
            batch_size=options.batch_size,
            with_cams=options.cams is not None,
            max_pixels=options.max_pixels,
        )
        for number, prediction in enumerate(tqdm(predictions, total=len(names), unit="image", disable=None)):
            rows.append({"image": kept[number], "labels": prediction.labels, "scores": prediction.scores})
            if prediction.seen is not None:
                rows[-1]["cam"] = f"{number:06d}_{Path(kept[number]).stem[:80]}.png"
                prediction.seen.save(Path(aside, rows[-1]["cam"]))
        if not rows:
            raise SystemExit("No image could be read.")
        if options.cams:
            for picture in sorted(Path(aside).iterdir()):
                shutil.move(picture, options.cams / picture.name)
    if options.output and options.output.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = as_csv(rows, len(rows[0]["labels"]))
    # bytes of a file name that are no UTF-8, as JSON escapes them: `\udce9`
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if options.output:
        with atomic_write(options.output) as unfinished:
            unfinished.write_text(text, encoding="utf-8", newline="")
        print(f"{len(rows)} predictions in {options.output}" + (f", maps in {options.cams}" if options.cams else ""))
    else:
        print(text, end="")
    if len(rows) < len(names) and not options.skip_unreadable:
        raise SystemExit(
            f"error: {len(names) - len(rows)} of {counted(len(names), 'image')} could not be read; the others are "
            "written. With --skip_unreadable that is no error."
        )


if __name__ == "__main__":
    main()
