"""What a trainer's log says over the epochs: which splits were evaluated, their accuracies, and a picture of them."""

import math
import os
import re

from PIL import Image, ImageDraw, ImageFont

from ..atomic import atomic_write


COLOURS = ("#1f4e9c", "#e07b00", "#3a8f3a", "#c02020", "#7a4fa3", "#6b6b6b")


def while_training(log_history: list[dict]) -> list[dict]:
    """The log without what was measured after training, on a test set for instance."""
    ends = [position for position, entry in enumerate(log_history) if "train_runtime" in entry]
    return log_history[: ends[-1] if ends else None]


def eval_prefixes(log_history: list[dict]) -> dict[str, str]:
    """The splits that were evaluated while training, by the prefix of their figures.

    One evaluation dataset logs `eval_accuracy`, several by name log `eval_<name>_accuracy`; those of the other model
    (`eval_student_accuracy`) are no split.
    """
    keys = dict.fromkeys(key for entry in while_training(log_history) for key in entry)
    found = {}
    for key in keys:
        name = re.fullmatch(r"eval(?:_(\w+))?_accuracy", key)
        if name and not re.search(r"(^|_)(student|teacher|top5)$", name[1] or ""):
            found[key.removesuffix("_accuracy")] = name[1] or "evaluation"
    return found


def epochs_of(log_history: list[dict]) -> list[dict]:
    """The evaluations made while training, as `{"epoch", "eval_accuracy"}`, of the split that may choose an epoch.

    With several splits that is `validation`, or else the first: a test set beside it chooses nothing.
    """
    prefixes = eval_prefixes(log_history)
    if not prefixes:
        return []
    prefix = "eval_validation" if "eval_validation" in prefixes else next(iter(prefixes))
    key = f"{prefix}_accuracy"
    return [
        {"epoch": entry["epoch"], "eval_accuracy": entry[key]} for entry in while_training(log_history) if key in entry
    ]


def training_curves(log_history: list[dict], path: str | os.PathLike, *, evaluated: str, other: str | None) -> bool:
    """Draw loss and accuracy over the epochs as a PNG file; tells whether there was anything to draw."""
    log = while_training(log_history)
    models = {evaluated: "", **({other: f"_{other}"} if other else {})}
    names = {
        "loss": {"training loss": "loss"},
        "accuracy": {
            **{
                f"{model}, {split} split": f"{prefix}{infix}_accuracy"
                for prefix, split in eval_prefixes(log).items()
                for model, infix in models.items()
            },
            "agreement with the given labels": "label_agreement",
            "wrong labels memorized": "memorized",
        },
    }
    panels = {
        title: {
            label: points
            for label, key in series.items()
            if len(points := [(e["epoch"], e[key]) for e in log if key in e and math.isfinite(e[key])]) > 1
        }
        for title, series in names.items()
    }
    if not any(panels.values()):
        return False
    picture = Image.new("RGB", (1200, 500), "white")
    for position, (title, series) in enumerate(panels.items()):
        _panel(ImageDraw.Draw(picture), (70 + 600 * position, 50, 570 + 600 * position, 370), title, series)
    with atomic_write(path) as unfinished:
        picture.save(unfinished, "PNG")
    return True


def _panel(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], title: str, series: dict[str, list]):
    left, top, right, bottom = box
    small, large = ImageFont.load_default(15), ImageFont.load_default(20)
    draw.text((left, top - 38), title, "black", font=large)
    points = [point for line in series.values() for point in line]
    if not points:
        draw.text((left, top), "not measured", "gray", font=small)
        return
    (x_low, x_high), (y_low, y_high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    x_high, y_high = (high if high > low else low + 1 for low, high in ((x_low, x_high), (y_low, y_high)))

    def place(x, y):
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    for step in range(5):
        y = y_low + (y_high - y_low) * step / 4
        height = place(x_low, y)[1]
        draw.line([(left, height), (right, height)], "#dddddd")
        draw.text((left - 8, height), f"{y:.3g}", "black", font=small, anchor="rm")
        x = x_low + (x_high - x_low) * step / 4
        draw.text((place(x, y_low)[0], bottom + 8), f"{x:.3g}", "black", font=small, anchor="mt")
    draw.text(((left + right) / 2, bottom + 30), "epoch", "black", font=small, anchor="mt")
    for number, (label, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        draw.line([place(*point) for point in line], colour, width=3, joint="curve")
        column, row = number % 2, number // 2
        draw.text((left + 250 * column, bottom + 56 + 22 * row), label, colour, font=small)
