"""What goes on around the steps of training: one callback each, with its own state, which it writes into checkpoints.

transformers' `ExportableState` is JSON of the first process alone, and comes back as a new object; these hold tensors,
and figures of each process, and are held by the trainer.
"""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather, gather_object
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from ..audit.dynamics import DYNAMICS_FILE, TrainingDynamics
from ..audit.noise_model import estimate_noise_rate
from ..data.targets import mean_targets
from .distributed import any_process, broadcast_buffers, check_ranks_agree, tensor_digests
from .dynamics_buffer import DynamicsBuffer
from .flops import CostMeter
from .memorization import UPDATE_EVERY, MemorizationMonitor
from .step_monitor import StepMonitor, non_finite_error
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
        self.average = ModelEmaV3(self.student, decay=self.decay, use_warmup=True)
        self.average.module.requires_grad_(False)

    @property
    def network(self):
        return self.average.module

    def on_optimizer_step(self, args, state, control, **kwargs):
        if args.world_size > 1:  # each process has its own batch-norm statistics; those of the first one count
            broadcast_buffers(self.student)
        self.average.update(self.student, step=state.global_step + 1)

    def save(self, folder):
        self.network.save_pretrained(folder / TEACHER_FOLDER)

    def load(self, folder):
        self.network.load_state_dict(load_file(folder / TEACHER_FOLDER / "model.safetensors"))


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


class RefreshedTargets(CheckpointedCallback):
    """Soft targets that are judged again after every epoch but the last: the mean of the first judgement, by features
    that no label has touched, and the newest, by those of the evaluated network.

    Args:
        trainer ([`HNMLTrainer`]): with `evaluated_model`.
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
            newest = self.trainer.on_first_process(self.judge_again, self.trainer.evaluated_model())
            self._take(mean_targets(self.trainer.train_dataset.targets, newest))
            self.trainer.cost.meter.forward_passes(len(self.ids) / args.per_device_train_batch_size)

    def save(self, folder):
        save_file({"classes": self.classes, "probabilities": self.probabilities}, folder / TARGETS_FILE)

    def load(self, folder):
        state = load_file(folder / TARGETS_FILE)
        self._take((state["classes"], state["probabilities"]))


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


class NoiseRate(CheckpointedCallback):
    """The share of wrong labels for the symmetric correction: estimated from the run's own records after each epoch,
    or once by the cross-validation of the probe that the run started from.

    Args:
        trainer ([`HNMLTrainer`]): with `dynamics`.
        cross_validated (structured `np.ndarray` of shape `(m,)`, *optional*): of [`cross_validate_probe`].
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


class FiniteCheck(CheckpointedCallback):
    """Keeps what the log averages, and stops before the optimizer step that would spread a value that is not finite.

    The wish to stop of any process goes round in the same message.

    Args:
        trainer ([`HNMLTrainer`]): with `signals` and `stop_asked`.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.reset()

    def reset(self):
        self.monitor = StepMonitor()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
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
