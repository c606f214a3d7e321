"""What goes on around the steps of training: one callback each, with its own state, which it writes into checkpoints.

transformers' `ExportableState` is JSON of the first process alone, and comes back as a new object; these hold tensors,
and figures of each process, and are held by the trainer.
"""

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather, gather_object
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ..audit.dynamics import AUDIT_FOLDER, DYNAMICS_FILE, TrainingDynamics
from ..audit.noise_model import estimate_noise_rate
from ..audit.table import noise_scores
from ..data.schema import image_paths
from .distributed import any_process, broadcast_buffers, check_ranks_agree, tensor_digests
from .dynamics_buffer import DynamicsBuffer
from .flops import CostMeter, peak_memory_mib
from .memorization import UPDATE_EVERY, MemorizationMonitor, create_monitor
from .step_monitor import StepMonitor, label_agreement, non_finite_error
from .target_memory import create_memory


TEACHER_FOLDER = "teacher"
MEMORY_FILE = "target_memory.safetensors"
TARGETS_FILE = "targets.safetensors"
MONITOR_FILE = "memorization_monitor.json"
HIGHEST_RATE = 0.9  # noise rate of the symmetric correction, as a share of the one at which labels say nothing
BATCHES_KEPT = 32  # batches whose predictions wait on the device, at most


class CheckpointedCallback(TrainerCallback):
    """A callback with a state: fresh at the start of a run, written into its checkpoints, and read when it goes on."""

    follows_the_weights = False  # whether its files are read again when the best epoch's weights are loaded

    def reset(self):
        """Forget what an earlier run of this trainer left."""

    def before_save(self):
        """Get ready for a checkpoint. All processes are asked."""

    def save(self, folder: Path):
        """Write files into a checkpoint. The first process alone is asked."""

    def load(self, folder: Path):
        """Go on from the files of a checkpoint. All processes are asked."""

    def progress(self) -> dict:
        """What each process keeps for itself, beside the files; JSON values."""
        return {}

    def load_progress(self, progress: dict):
        """Go on from [`~CheckpointedCallback.progress`]."""

    def figures(self) -> dict[str, float]:
        """What it adds to an entry of the log that has a training loss. All processes are asked."""
        return {}


class EvaluationDelay(TrainerCallback):
    """Ends a run before its first step if `eval_delay` leaves nothing of it to evaluate."""

    def on_train_begin(self, args, state, control, **kwargs):
        unit, end = ("steps", state.max_steps) if args.eval_strategy == "steps" else ("epochs", state.num_train_epochs)
        if args.eval_strategy != "no" and (args.eval_delay or 0) > end:
            raise ValueError(
                f"`eval_delay={args.eval_delay:g}` lies beyond the end of the run, after {end} {unit}: nothing would "
                "be evaluated. Lower it, or set `eval_strategy` to `no`."
            )


class Teacher(CheckpointedCallback):
    """A moving average of the student's weights, batch-norm statistics included.

    teacher <- d teacher + (1 - d) student; in step n d = min(decay, 1 - n^(-2/3)) (timm's warm-up), so that a short
    run's average does not still hold the start.

    Args:
        model ([`TimmCAMForImageClassification`]): the student.
        decay (`float`): d, in [0, 1).
    """

    follows_the_weights = True

    def __init__(self, model, *, decay: float):
        self.student, self.decay = model, decay
        self.reset()

    def reset(self):
        self.network = copy.deepcopy(self.student).eval().requires_grad_(False)

    def on_train_begin(self, args, state, control, **kwargs):
        # weights stay where they are during training: to list them in each step takes longer than to average them
        pairs = list(zip(self.network.state_dict().values(), self.student.state_dict().values(), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._caches = any(hasattr(module, "attention_bias_cache") for module in self.network.modules())

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        if args.world_size > 1:  # each process has its own batch-norm statistics; those of the first one count
            broadcast_buffers(self.student)
        decay = min(self.decay, 1 - (state.global_step + 1) ** (-2 / 3))  # the warm-up of timm's ModelEmaV3
        averages, weights = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, count in self._counts:
            average.copy_(count)
        if self._caches:  # timm's tiny_vit and others keep what they computed from older weights
            self.network.train().eval()

    @torch.no_grad()
    def answer(self, pixel_values: torch.Tensor, **requests):
        """The average's output for a batch `(b, channels, height, width)`; requests are further arguments of its
        `forward`."""
        return self.network(pixel_values, **requests)

    def save(self, folder):
        self.network.save_pretrained(folder / TEACHER_FOLDER)

    def load(self, folder):
        self.network.load_state_dict(load_file(folder / TEACHER_FOLDER / "model.safetensors"))


def create_teacher(model, args) -> Teacher | None:
    """The teacher of a run that learns from it or is measured by it."""
    return Teacher(model, decay=args.teacher_decay) if args.uses_teacher or args.eval_teacher else None


class PredictionMemory(CheckpointedCallback):
    """Each training sample's running average of the student's predictions; arguments as of [`create_memory`]."""

    follows_the_weights = True

    def __init__(self, index, num_labels: int, **options):
        self.create = lambda: create_memory(index, num_labels, **options)
        self.reset()

    def reset(self):
        self.store = self.create()

    def save(self, folder):
        save_file(self.store.state_dict(), folder / MEMORY_FILE)

    def load(self, folder):
        self.store.load_state_dict(load_file(folder / MEMORY_FILE))

    @torch.compiler.disable  # files, and exchange between processes, are not for a compiler
    def update(self, index: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        """Fold the probabilities `(b, k)` of the samples `(b,)`, of all processes, into their averages; those of this
        process."""
        self.store.update(gather(index), gather(probabilities))
        return self.store[index]


def create_prediction_memory(model, args, dataset) -> PredictionMemory | None:
    """The memory of a run whose targets or regularizer come from it."""
    if dataset is None or not (args.uses_memory or args.objective == "elr"):
        return None
    options = {"decay": args.elr_decay, "device": args.device, "folder": args.output_dir}
    return PredictionMemory(dataset.index, model.config.num_labels, **options)


class RefreshedTargets(CheckpointedCallback):
    """Soft targets that are judged again after every epoch but the last, by features of the evaluated network.

    Args:
        trainer ([`HNMLTrainer`]): with `evaluated_model` and `as_it_is_saved`.
        judge_again (`Callable`): from a network to the targets of all training samples, as [`targets_of`] gives them;
            the first process alone asks.
    """

    def __init__(self, trainer, judge_again):
        self.trainer, self.judge_again = trainer, judge_again
        order = np.argsort(trainer.train_dataset.index)
        self.ids = torch.as_tensor(trainer.train_dataset.index[order], device=trainer.args.device)
        self.rows = torch.as_tensor(order, device=trainer.args.device)
        self.reset()

    def reset(self):
        self._take(self.trainer.train_dataset.targets)

    def _take(self, targets):
        self.classes, self.probabilities = (torch.as_tensor(part, device=self.ids.device) for part in targets)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classes and probabilities `(b, t)` of the samples `(b,)`."""
        rows = self.rows[torch.searchsorted(self.ids, index)]
        return self.classes[rows], self.probabilities[rows]

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:
            network = self.trainer.evaluated_model()
            with self.trainer.as_it_is_saved(network):
                newest = self.trainer.on_first_process(self.judge_again, network)
            self._take(newest)
            self.trainer.cost.meter.forward_passes(len(self.ids) / args.per_device_train_batch_size)

    def save(self, folder):
        save_file({"classes": self.classes, "probabilities": self.probabilities}, folder / TARGETS_FILE)

    def load(self, folder):
        state = load_file(folder / TARGETS_FILE)
        self._take((state["classes"], state["probabilities"]))


def create_refreshed_targets(trainer, judge_again) -> RefreshedTargets | None:
    """The targets of a run with `targets=refreshed`."""
    return RefreshedTargets(trainer, judge_again) if trainer.targets == "refreshed" else None


class DynamicsRecorder(CheckpointedCallback):
    """Training dynamics: what the steps saw of each sample goes, now and then, to the monitor and to the records.

    Args:
        dataset ([`TransformedDataset`]): with `index`, `labels` and `held_out`.
        num_labels (`int`): number of classes.
        monitor ([`MemorizationMonitor`], *optional*): on every process.
        keep_dynamics (`bool`): whether this process keeps the [`TrainingDynamics`].
        path (`str`): where these are saved at the end.
    """

    def __init__(
        self, dataset, num_labels: int, *, monitor: MemorizationMonitor | None, keep_dynamics: bool, path: str
    ):
        self.dataset, self.num_labels, self.path = dataset, num_labels, path
        self.monitor, self.keep_dynamics = monitor, keep_dynamics
        self.reset()

    def reset(self):
        data, self.dynamics = self.dataset, None
        if self.keep_dynamics:
            self.dynamics = TrainingDynamics(
                data.index, data.labels, self.num_labels, path=self.path, held_out=data.held_out
            )
        if self.monitor is not None:
            self.monitor.reset()
        self.buffer = DynamicsBuffer(monitor=self.monitor, dynamics=self.dynamics)

    def watch(self, inputs: dict, monitors: dict, state):
        """Take one batch and the monitors of its objective in, without waiting for the device; `state` is the
        Trainer's."""
        logits = monitors["logits"].detach()
        self.buffer.add(
            inputs["index"],
            inputs["labels"],
            probabilities=monitors.get("teacher_probabilities", logits.float().softmax(-1)),
            student_predictions=logits.argmax(-1),
            foreground_logits=monitors.get("foreground_logits"),
            weights=inputs.get("sample_weights"),
            held_out=inputs.get("held_out"),
            step=state.global_step,
            epoch=int(state.epoch or 0),
        )

    def figures(self):
        if self.monitor is None:
            return {}
        return {"memorized_share": self.monitor.memorized_share(), "meta_weight": self.monitor.meta_weight}

    def scores(self, id2label: Mapping[int, str], **facts) -> pd.DataFrame:
        """The table of [`noise_scores`] of what was seen so far, most probably wrong first; `facts` as there. Classes
        are called as in the dataset: a model that was built with a number of classes has none but numbers."""
        names = getattr(self.dataset.dataset.features["label"], "names", ())
        if len(names) != self.num_labels:
            names = [id2label[label] for label in range(self.num_labels)]
        table = noise_scores(self.dynamics.records, names, **facts)
        table["path"] = image_paths(self.dataset.dataset)
        return table.sort_values("rank")

    def on_step_end(self, args, state, control, **kwargs):
        if len(self.buffer) >= BATCHES_KEPT:  # between steps, where a checkpoint would take them in too
            self.buffer.flush()
        if self.monitor is not None and state.global_step % UPDATE_EVERY == 0:
            self.buffer.flush()
            self.monitor.update()

    def before_save(self):
        self.buffer.flush()

    def on_train_end(self, args, state, control, **kwargs):
        self.buffer.flush()
        if self.dynamics is not None:
            self.dynamics.save(self.path)

    def save(self, folder):
        if self.monitor is not None:
            (folder / MONITOR_FILE).write_text(json.dumps(self.monitor.state_dict()), encoding="utf-8")
        if self.dynamics is not None:
            self.dynamics.save(folder / DYNAMICS_FILE)

    def load(self, folder):
        if self.monitor is not None:
            self.monitor.load_state_dict(json.loads((folder / MONITOR_FILE).read_text(encoding="utf-8")))
        if self.dynamics is not None:
            self.dynamics.load(folder / DYNAMICS_FILE)


def create_recorder(trainer, *, mixes: bool) -> DynamicsRecorder | None:
    """The recorder of a run, with its monitor, for which labels of the training set are held out of every loss.

    Args:
        trainer ([`HNMLTrainer`]): with `args`, `model` and `train_dataset`.
        mixes (`bool`): whether images are mixed: a mixed one is no sample, and nothing is kept of it.
    """
    args, data = trainer.args, trainer.train_dataset
    if data is None:
        return None
    monitor = create_monitor(args, len(data))
    data.hold_out(0 if monitor is None else monitor.fraction, seed=args.seed)
    return DynamicsRecorder(
        data,
        trainer.model.config.num_labels,
        monitor=monitor,
        keep_dynamics=trainer.is_world_process_zero() and not mixes,
        path=os.path.join(args.output_dir, AUDIT_FOLDER, DYNAMICS_FILE),
    )


class NoiseRate(CheckpointedCallback):
    """The share of wrong labels for the symmetric correction: estimated from the run's own records after each epoch,
    or once by the judge that the run started from.

    Args:
        trainer ([`HNMLTrainer`]): with `dynamics`.
        cross_validated (structured `np.ndarray` of shape `(m,)`, *optional*): of [`judge_records`].
    """

    def __init__(self, trainer, cross_validated=None):
        self.trainer, self.cross_validated = trainer, cross_validated
        self.reset()

    def reset(self):
        self.rate: float | None = None  # none estimated yet

    def on_train_begin(self, args, state, control, **kwargs):
        if self.cross_validated is not None:
            self._estimate()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.cross_validated is None:
            self._estimate()

    def _estimate(self):
        self.trainer.recorder.buffer.flush()
        self.rate = self.trainer.on_first_process(self._estimated)

    def _estimated(self) -> float | None:
        records, classes = self.cross_validated, self.trainer.model.config.num_labels
        if records is None:
            records = self.trainer.recorder.dynamics.records
            if not (records["times_seen"] > 1).any():  # that one prediction agrees with itself says nothing
                return None
        rate = estimate_noise_rate(records[records["times_seen"] > 0], classes, seed=self.trainer.args.seed)
        return min(rate, HIGHEST_RATE * (classes - 1) / classes)

    def progress(self):
        return {"rate": self.rate}

    def load_progress(self, progress):
        self.rate = progress["rate"]

    def figures(self):
        return {} if self.rate is None else {"noise_rate": self.rate}


def create_noise_rate(trainer, cross_validated) -> NoiseRate | None:
    """The noise rate of a run with `symmetric_correction`."""
    wanted = trainer.args.symmetric_correction and trainer.train_dataset is not None
    return NoiseRate(trainer, cross_validated) if wanted else None


class Cost(CheckpointedCallback):
    """Counts what the steps cost; see [`CostMeter`]."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.meter = CostMeter()

    def progress(self):
        kinds = [[sorted(kind), ratio, self.meter.steps[kind]] for kind, ratio in self.meter.ratios.items()]
        return {"kinds": kinds, "between": self.meter.between}

    def load_progress(self, progress):
        self.meter.between = progress["between"]
        for kind, ratio, steps in progress["kinds"]:
            self.meter.ratios[frozenset(kind)], self.meter.steps[frozenset(kind)] = ratio, steps

    def summary(self, device: torch.device) -> dict[str, float]:
        """What the end of the log says of the whole run."""
        return {"cost_ce": round(self.meter.cost, 3), "peak_memory_mib": round(peak_memory_mib(device), 1)}


class FiniteCheck(CheckpointedCallback):
    """Keeps what the log averages, and stops before the optimizer step that would spread a value that is not finite.

    The wish to stop of any process goes round in the same message.

    Args:
        trainer ([`HNMLTrainer`]): with `gradient_norm`, of the step, `signals` and `stop_asked`.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.reset()

    def reset(self):
        self.monitor = StepMonitor()

    def watch(self, inputs: dict, terms: dict[str, torch.Tensor], monitors: dict[str, torch.Tensor]):
        """Take one batch, its losses `(b,)` and the monitors of its objective in, without waiting for the device."""
        figures = {name: value for name, value in monitors.items() if value.ndim == 0}
        predicted = monitors["logits"].detach().argmax(-1)
        figures |= label_agreement(predicted, inputs["labels"], inputs["clean_labels"])
        self.monitor.watch(inputs["index"], terms, figures)

    def figures(self):
        return self.monitor.averages()  # of all processes

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        norm = self.trainer.gradient_norm
        scaler = self.trainer.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1:  # float16: an overflow is how its scale is found
            norm = torch.zeros_like(norm)
        stop = torch.tensor(self.trainer.signals.received is not None, device=norm.device)
        non_finite, stop = any_process([self.monitor.non_finite(norm), stop], args.world_size)
        self.trainer.stop_asked |= stop
        if non_finite:
            found, samples = gather_object([self.monitor.non_finite_terms()]), self.monitor.samples()
            raise non_finite_error(found, gather_object(samples), step=state.global_step + 1)

    def progress(self):
        return {"figures": self.monitor.state()}

    def load_progress(self, progress):
        self.monitor.load_state(progress["figures"], self.trainer.args.device)


class RanksAgree(TrainerCallback):
    """Raises [`RanksDifferError`] if the processes hold different weights, compared by a hash every so many steps."""

    def __init__(self, trainer, *, every: int = 1):
        self.trainer, self.every = trainer, every

    def on_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step + 1
        if args.world_size == 1 or step % self.every:
            return
        tensors = {f"student.{name}": parameter for name, parameter in self.trainer.model.named_parameters()}
        if self.trainer.teacher is not None:
            tensors |= {f"teacher.{name}": value for name, value in self.trainer.teacher.network.state_dict().items()}
        digests = gather(tensor_digests(tensors).to(args.device)[None])
        check_ranks_agree(list(tensors), digests.cpu(), step=step)
