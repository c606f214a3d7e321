"""What a trainer's log says over the epochs: which splits were evaluated, their accuracies, and a picture of them."""

import math
import os
import re

from transformers.utils import logging

from ..common.atomic import atomic_write


logger = logging.get_logger(__name__)


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
    """Draw loss and accuracy over the epochs as a PNG file; tells whether there was something to draw, and with."""
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
            "wrong labels memorized": "eval_memorized" if any("eval_memorized" in e for e in log) else "memorized",
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
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("The model card has no curves: matplotlib is not installed.")
        return False
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.set(title=title, xlabel="epoch")
        for label, points in series.items():
            axes.plot(*zip(*points, strict=True), label=label)
        if series:
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="png")
    return True
