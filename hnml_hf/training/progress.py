"""What a person at the terminal sees of a run: a bar for each phase, and a line of figures for each entry of the log.

The entries themselves go to `trainer_state.json` and the trackers as they are.
"""

import math
import re
import time
from contextlib import contextmanager

from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK


TRAINING_FIGURES = {  # entry of the log: what it is called, and how it is written
    "loss": ("loss", "{:.3f}"),
    "consistency": ("consistency", "{:.3f}"),
    "mask_guided": ("mask-guided", "{:.3f}"),
    "label_agreement": ("agreement", "{:.1%}"),
    "memorized": ("wrong labels repeated", "{:.1%}"),
    "memorized_share": ("memorized", "{:.1%}"),
    "noise_rate": ("estimated noise", "{:.1%}"),
}
EVALUATION = re.compile(  # without top-5 accuracy, which is in the entries alone
    r"(?!.*top5)eval_(?:(?!student|teacher)(?P<split>\w+?)_)?(?:(?P<network>student|teacher)_)?(?P<figure>loss|accuracy)"
)


def duration(seconds: float) -> str:
    """As a clock writes it: `2:05`, `1:02:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def written(value: float, form: str) -> str:
    """A figure as `form` writes it: an estimated share a little below 0 as 0, and no zero with a minus.

    A loss below 0 keeps its sign: ELR's term is the logarithm of at most 1.
    """
    text = form.format(max(value, 0.0) if form.endswith("%}") else value)
    return text.removeprefix("-") if set(text) <= set("-0.%") else text


def training_line(logs: dict, *, epochs: float, images_per_second: float | None, seconds_left: float) -> str:
    """An entry of the log that has a training loss, as one line.

    Args:
        logs (`dict`): the entry.
        epochs (`float`): how many the run will have.
        images_per_second, seconds_left (`float`): inf or None where that is not known yet.
    """
    figures = [f"epoch {logs.get('epoch', 0):.4g}/{epochs:.4g}"]
    figures += [f"{name} {written(logs[key], form)}" for key, (name, form) in TRAINING_FIGURES.items() if key in logs]
    if images_per_second is not None:
        figures.append(f"{images_per_second:,.0f} images/s")
    if math.isfinite(seconds_left):
        figures.append(f"{duration(seconds_left)} left")
    return "  ".join(figures)


def evaluation_lines(logs: dict, *, evaluated: str) -> list[str]:
    """An entry of the log with measurements, as a line for each split and network; none if it has no measurement.

    Agreement is with the given labels, which may be wrong; on a test set, whose labels are trusted, it is accuracy.

    Args:
        logs (`dict`): the entry.
        evaluated (`str`): the network that has no name of its own in it.
    """
    measured: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in logs.items():
        found = EVALUATION.fullmatch(key)
        if found:
            of = (found["split"] or "held-out images", found["network"] or evaluated)
            measured.setdefault(of, {})[found["figure"]] = value
    lines = []
    for (split, network), figures in measured.items():
        share = "accuracy" if split == "test" else "agreement"
        texts = [f"{share} {figures['accuracy']:.1%}"] if "accuracy" in figures else []
        texts += ["loss " + written(figures["loss"], "{:.3f}")] if "loss" in figures else []
        lines.append(f"  {split}, {network}: {'  '.join(texts)}")
    return lines


class Progress(TrainerCallback):
    """Instead of transformers' bar and its printed dictionaries.

    Bars are drawn on a terminal alone, so that a log that goes to a file has no carriage returns; `disable_tqdm` draws
    none. The lines are printed by the first process.

    Args:
        images_per_step (`int`): by all processes.
        evaluated (`str`): the network that is measured first.
    """

    def __init__(self, *, images_per_step: int, evaluated: str):
        self.images_per_step, self.evaluated = images_per_step, evaluated
        self.training_bar = self.bar = None

    @contextmanager
    def phase(self, name: str, total: int | None, *, args):
        """A bar for a pass over so many batches, which `on_prediction_step` moves."""
        if args.process_index != 0:
            yield
            return
        hidden = True if args.disable_tqdm else None  # None: unless this is a terminal
        with tqdm(total=total, desc=name, unit="batch", leave=False, dynamic_ncols=True, disable=hidden) as self.bar:
            yield
        self.bar, self.last = None, time.perf_counter()

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update()

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = self.last = time.perf_counter()
        self.begun_at, self.steps, self.stepping = state.global_step, 0, 0.0
        if not state.is_world_process_zero:
            return
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=True if args.disable_tqdm else None,
        )
        self.say("Losses and agreement are against the given labels, right or wrong.")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.stepping, self.steps, self.last = self.stepping + now - self.last, self.steps + 1, now
        if self.training_bar is not None:
            self.training_bar.update()

    def on_save(self, args, state, control, **kwargs):
        self.last = time.perf_counter()

    def say(self, line: str):
        tqdm.write(line)  # above the bars

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            speed = self.images_per_step * self.steps / self.stepping if self.stepping else None
            done = state.global_step - self.begun_at
            pace = (time.perf_counter() - self.begun) / done if done else math.inf
            left = pace * (state.max_steps - state.global_step)
            self.say(training_line(logs, epochs=state.num_train_epochs, images_per_second=speed, seconds_left=left))
            self.steps, self.stepping = 0, 0.0
        if self.training_bar is not None:  # what is measured after training is in the summary
            for line in evaluation_lines(logs, evaluated=self.evaluated):
                self.say(line)
        self.last = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


def show_progress(trainer, *, evaluated: str) -> Progress:
    """Let [`Progress`] print, not transformers; `evaluated` is `teacher` or `student`."""
    args = trainer.args
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
    images = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    display = Progress(images_per_step=images, evaluated=evaluated)
    trainer.add_callback(display)
    return display
