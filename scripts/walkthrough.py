"""From a messy folder to a published model in a few minutes, on images with wrong labels that this script makes.

    python scripts/walkthrough.py
    python scripts/walkthrough.py --hub_model_id user/walkthrough     # and publish the result, privately

Check the folder, train, find the label issues, annotate, train again, compare, publish, load back. Each step prints
the command that does the same by hand, and the seconds it took. The annotations are those of a person who knows the
truth: this shows how the parts fit together, not how good the method is.
"""

import argparse
import csv
import json
import shlex
import time
from pathlib import Path

import check
import clean
import evaluate
import numpy as np
import train

from hnml_hf import load_audit, load_noisy_dataset, push_to_hub
from hnml_hf.cli import HelpFormatter
from hnml_hf.hub.upload import HubError


SMALL = ["--backbone", "resnet10t", "--image_size", "28", "--augmentation", "none", "--report_to", "none"]
SMALL += ["--model_args", '{"output_stride": 8, "channels": [16, 32, 48, 64], "stem_width": 8}']
SMALL += ["--per_device_train_batch_size", "32", "--learning_rate", "0.05"]
SMALL += ["--save_strategy", "no", "--logging_strategy", "epoch", "--disable_tqdm", "true"]


def step(title: str, main, *words: object):
    """Call the `main` of a script as from the command line."""
    words = [str(word) for word in words]
    print(f"\n== {title}\n$ python scripts/{main.__module__}.py {shlex.join(words)}", flush=True)
    start = time.perf_counter()
    code = main(words)
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)
    return code


def make_folder(root: Path, images: int, wrong: float) -> dict[str, int]:
    """A folder for each class; a share of the training images lies in a wrong one, and one file is cut off.

    Returns:
        `dict[str, int]`: the true class of each training image, by file name.
    """
    data = load_noisy_dataset("quickstart")
    names = [name.replace("/", "_") for name in data["train"].features["label"].names]
    random, truth = np.random.default_rng(0), {}
    for split, count in (("train", images), ("test", images // 2)):
        rows = data[split].select(np.linspace(0, len(data[split]) - 1, count).astype(int))
        for number, row in enumerate(rows):
            label = row["label"]
            if split == "train":
                truth[f"{number:05}.png"] = label
                if random.random() < wrong:
                    label = (label + random.integers(1, len(names))) % len(names)
            folder = root / split / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{number:05}.png")
    broken = next((root / "train").rglob("*.png"))
    broken.write_bytes(broken.read_bytes()[:100])
    return truth


def write_annotations(path: Path, run: Path, truth: dict[str, int], looked_at: int) -> int:
    """What a person says of the first label issues; the number of labels that turn out to be wrong."""
    table = load_audit(run).nsmallest(looked_at, "rank")
    true = [truth[Path(name).name] for name in table["path"]]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "annotation", "new_label"])
        for index, given, right in zip(table["index"], table["label"], true, strict=True):
            writer.writerow([index, "right" if given == right else "wrong", right])
    return int((table["label"].to_numpy() != np.array(true)).sum())


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/walkthrough"), help="Gets all files.")
    parser.add_argument("--images", type=int, default=2000, help="Training images.")
    parser.add_argument("--num_train_epochs", type=int, default=10, help="Of each of the two trainings.")
    parser.add_argument("--hub_model_id", help="Publish the result under this name, privately.")
    options = parser.parse_args(argv)
    out = options.output_dir
    photos, first, second = out / "photos", out / "first", out / "second"
    if photos.exists():
        raise SystemExit(f"{photos} is there already: delete {out}, or choose another --output_dir.")
    truth = make_folder(photos, options.images, wrong=0.4)
    source = ["--dataset", photos]
    print(f"{photos}: {len(truth)} training images, four in ten in a wrong folder, and one that cannot be read")

    exclusions, annotations, cleaned = out / "excluded.jsonl", out / "annotations.csv", out / "cleaned"
    found = ["--output", out / "check.json", "--exclude_output", exclusions]
    code = step("Look before you train", check.main, *source, *found)
    if code != check.DEFECTS:
        raise RuntimeError(f"The broken file was not found: code {code}.")
    training = [*SMALL, "--num_train_epochs", options.num_train_epochs]
    step("Train", train.main, *source, "--exclude", exclusions, *training, "--output_dir", first)
    wrong = write_annotations(annotations, first, truth, looked_at=options.images // 4)
    print(f"   {first / '_audit' / 'report.html'}: of its first {options.images // 4} label issues {wrong} are wrong")
    changes = ["--annotations", annotations, "--how", "relabel", "--threshold", "0.9", "--output_dir", cleaned]
    step("Apply the annotations, and the surest scores", clean.main, first, *changes)
    step("Train again", train.main, "--dataset", cleaned, *training, "--output_dir", second)

    def accuracy(title: str, model: object, name: str) -> float:
        output = out / f"{name}.json"
        step(title, evaluate.main, model, *source, "--split", "test", "--output", output)
        return json.loads(output.read_text())["accuracy"]

    results = {
        "first": accuracy("Measure the first model on clean test images", first, "first"),
        "second": accuracy("Measure the second", second, "second"),
        "issues": options.images // 4,
        "issues_wrong": wrong,
    }
    if options.hub_model_id:
        try:
            where = push_to_hub(second, options.hub_model_id)
        except HubError as error:
            raise SystemExit(str(error)) from error
        print(f"\n== Published: {where.repo_url}")
        results["loaded_back"] = accuracy("Load it back and measure it", options.hub_model_id, "loaded_back")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nAccuracy: {results['first']:.1%} on the labels as they were, {results['second']:.1%} after cleaning.")


if __name__ == "__main__":
    main()
