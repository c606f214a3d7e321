"""What is printed of a run: lines with names and units, and bars on a terminal alone."""

import math

import pytest
from trainers import build_trainer

from hnml_hf.training.progress import duration, evaluation_lines, training_line, written


@pytest.mark.parametrize(("seconds", "written"), [(0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (7325, "2:02:05")])
def test_durations(seconds, written):
    assert duration(seconds) == written


def test_a_training_line_names_its_figures():
    logs = {
        "loss": 1.2144,
        "consistency": -0.0,
        "label_agreement": 0.6249,
        "memorized_share": -0.02,
        "noise_rate": 0.4111,
        "grad_norm": 3.0,
        "epoch": 3.0,
    }
    line = training_line(logs, epochs=25, images_per_second=1830.4, seconds_left=130.0)
    assert line.split("  ") == [
        "epoch 3/25",
        "loss 1.214",
        "consistency 0.000",
        "agreement 62.5%",
        "memorized 0.0%",  # an estimate a little below 0
        "estimated noise 41.1%",
        "1,830 images/s",
        "2:10 left",
    ]


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (-1.0520, "{:.3f}", "-1.052"),
        (-0.0004, "{:.3f}", "0.000"),
        (-0.0005001, "{:.3f}", "-0.001"),
        (0.0, "{:.3f}", "0.000"),
        (math.nan, "{:.3f}", "nan"),
        (-math.inf, "{:.3f}", "-inf"),
        (math.nan, "{:.1%}", "nan%"),
        (-0.02, "{:.1%}", "0.0%"),
    ],
)
def test_a_loss_below_zero_is_shown_as_it_is(value, form, text):
    assert written(value, form) == text


def test_what_is_not_known_yet_is_left_out():
    line = training_line({"loss": 2.0, "epoch": 0.5}, epochs=2, images_per_second=None, seconds_left=float("inf"))
    assert line == "epoch 0.5/2  loss 2.000"


def test_evaluation_lines_name_split_and_network():
    logs = {
        "eval_validation_loss": 1.0,
        "eval_validation_accuracy": 0.5,
        "eval_validation_top5_accuracy": 0.9,
        "eval_test_accuracy": 0.8,
        "eval_test_student_accuracy": 0.7,
        "eval_runtime": 2.0,
        "eval_loss": 0.25,
        "eval_student_loss": -0.0,
    }
    assert evaluation_lines(logs, evaluated="teacher") == [
        "  validation, teacher: agreement 50.0%  loss 1.000",
        "  test, teacher: accuracy 80.0%",
        "  test, student: accuracy 70.0%",
        "  held-out images, teacher: loss 0.250",
        "  held-out images, student: loss 0.000",
    ]
    assert evaluation_lines({"loss": 1.0, "epoch": 1.0}, evaluated="teacher") == []


def test_a_redirected_log_has_whole_lines(tiny_dataset, tmp_path, capsys):
    options = {"logging_strategy": "steps", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = build_trainer(tmp_path, tiny_dataset, disable_tqdm=False, **options)
    trainer.train()
    trainer.predict(trainer.eval_dataset)
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err and printed.err == ""
    steps = [line for line in printed.out.splitlines() if line.startswith("epoch ")]
    assert len(steps) == trainer.state.max_steps and "images/s" in steps[-1] and "{" not in printed.out
    assert (
        "held-out images, teacher: agreement" in printed.out and "held-out images, student: agreement" in printed.out
    )


def test_bars_have_names_and_right_totals(tiny_dataset, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, *, total, desc, initial=0, **options):
            self.total, self.name, self.done, self.hidden = total, desc, initial, options["disable"]
            bars.append(self)

        def update(self, count=1):
            self.done += count

        def close(self):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731
        write = print

    monkeypatch.setattr("hnml_hf.training.progress.tqdm", Bar)
    trainer = build_trainer(tmp_path, tiny_dataset, disable_tqdm=False, eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.predict(trainer.eval_dataset)
    measuring = {"measuring the teacher", "measuring the student", "statistics of batch norm"}
    assert {bar.name for bar in bars} == {"training"} | measuring
    assert all(bar.done == bar.total for bar in bars) and not any(bar.hidden for bar in bars)
