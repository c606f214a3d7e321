"""[`ResumableTrainer`]: transformers' Trainer that can be killed at any moment and goes on as if it had not been."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, SkipBatchSampler
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..distributed import on_first_process, require_same_on_all_processes, tensor_digests
from . import files as checkpoints
from .files import UNFINISHED_FOLDER, CheckpointError
from .signals import StopSignals, TrainingInterrupted


logger = logging.get_logger(__name__)

# options of transformers that make batches, or that belong to what comes back with the state (the optimizer, the best
# figure so far), where another value is lost
FIXED_OPTIONS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last", "train_sampling_strategy"),
    *("seed", "data_seed", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("metric_for_best_model", "greater_is_better"),
)
# those that take effect from here on; the learning rate by [`ResumableTrainer`]
FREE_OPTIONS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("activation_checkpointing", "torch_compile_backend", "torch_compile_mode", "full_determinism", "eval_delay"),
    *("max_grad_norm", "bf16", "fp16", "tf32", "torch_compile", "ignore_data_skip", "eval_strategy", "eval_steps"),
)


OF_EACH_PROCESS = ("local_rank", "logging_dir", "hub_token")  # options that processes need not have in common


class ResumableTrainer(Trainer):
    """Checkpoints that are whole or not there, resumed exactly; SIGTERM and SIGINT finish the step and save.

    One run at a time may train in an output folder. All processes resume from the checkpoint that the first one found.
    A subclass says by `run_facts` and `run_settings` what must not change between runs, and what not without notice,
    and adds to `progress` what else the log needs.
    """

    def __init__(self, model, args, **kwargs):
        checkpoints.require_writable(args.output_dir)
        super().__init__(model, args, **kwargs)
        self.signals = StopSignals()
        self.stop_asked = False  # the same on all processes
        self._resumed_from: str | None = None
        self._saved_step: int | None = None
        self._writing_aside = False
        self._epoch_ends = False  # what belongs to the end of an epoch is still to come
        self.add_callback(SaveWhenTheEpochIsOver(self))

    def run_facts(self) -> dict:
        """What a run that goes on must have in common with the one that it continues; JSON values."""
        options = self.args.to_dict()
        return {"processes": self.args.world_size, **{name: options.get(name) for name in FIXED_OPTIONS}}

    def run_settings(self) -> dict:
        """What else its course depends on, and may be changed for the rest of it; JSON values."""
        options = self.args.to_dict()
        return {name: options.get(name) for name in FREE_OPTIONS}

    def on_first_process(self, function: Callable, *arguments):
        """Call it on the first process alone; its result, or its error, reaches all of them."""
        return on_first_process(function, *arguments)

    # -- a run --------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As in transformers, with `resume_from_checkpoint` as in [`~checkpoint.resolve`].

        Raises:
            CheckpointError: nothing whole to resume from, a checkpoint that cannot be written, or another run that is
                writing to the output folder.
            TrainingInterrupted: after SIGTERM or SIGINT, when the checkpoint is written. Runs that save none
                (`save_strategy="no"`) leave both signals alone.
            ValueError: the checkpoint belongs to a run with other [`run_facts`]. Other [`run_settings`] are named in a
                warning, and take effect.
        """
        if self.args.world_size > 1 and self.train_dataset is not None:
            require_same_on_all_processes(self._started_with())
        with ExitStack() as held:
            start = self.on_first_process(self._start, held, resume_from_checkpoint)
            self._resumed_from, self._saved_step = start, None
            self.stop_asked = self._epoch_ends = False
            if self.args.save_strategy != "no":
                held.enter_context(self.signals)
            output = super().train(start, trial, ignore_keys_for_eval)
            if self.args.save_strategy != "no":
                self._end_if_asked_to_stop()
        return output._replace(training_loss=output.metrics["train_loss"])

    def _started_with(self) -> dict:
        options = self.args.to_dict()
        digests = tensor_digests(self.model.state_dict()).tolist()
        return {
            **{name: value for name, value in options.items() if name not in OF_EACH_PROCESS},
            **self.run_facts(),
            **self.run_settings(),
            "weights at the start": hash(tuple(digests)),
        }

    def _end_if_asked_to_stop(self):
        """A signal since the last step, as in the last evaluation: what comes after training can come later."""
        asked = torch.tensor(self.signals.received is not None, device=self.args.device)
        (self.stop_asked,) = any_process([asked], self.args.world_size)
        if self.stop_asked:
            name = self.signals.received.name if self.signals.received else "A stop of another process"
            raise TrainingInterrupted(
                f"{name}: all {self.state.global_step} steps are done, their results are not written. Go on by "
                "`--resume_from_checkpoint true`."
            )

    def _start(self, held: ExitStack, resume_from_checkpoint) -> str | None:
        folder = self.args.output_dir
        held.enter_context(checkpoints.run_lock(folder))
        start = checkpoints.resolve(resume_from_checkpoint, folder)
        if start is not None:
            checkpoints.require_same_run(start, self.run_facts(), self.run_settings())
        others = [path.name for path in checkpoints.checkpoints(folder) if str(path) != start]
        if start is None and others:
            logger.warning(
                f"`{folder}` holds {', '.join(others)} of an earlier run, but this one starts from nothing. To go on "
                "where that one ended, use `--resume_from_checkpoint true`."
            )
        return start

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if not len(loader):
            raise ValueError(
                f"{len(self.train_dataset)} training images give {self.args.world_size} process(es) no batch of "
                f"{self.args.per_device_train_batch_size}. Lower `--per_device_train_batch_size`, or leave out "
                "`--dataloader_drop_last`."
            )
        return loader

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self._resumed_from is not None:  # `eval_on_start`, of a run that started before
            return {}
        with self._metric_is_measured():
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _determine_best_metric(self, metrics, trial):
        with self._metric_is_measured():
            return super()._determine_best_metric(metrics, trial)

    @contextmanager
    def _metric_is_measured(self):
        try:
            yield
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            raise ValueError(str(error.args[0])) from error  # a user's mistake, and its message says what there is

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        inner = loader.base_dataloader  # accelerate's wrapper reads its attributes there, but does not set them there
        inner.worker_init_fn = partial(leave_process_group, inner.worker_init_fn)
        # an iterator draws the seed of its workers when it is made, and a resumed run makes more of them: out of the
        # global generator, every draw after it (dropout, drop path) would be another one
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _run_epoch(self, *, epoch, train_dataloader, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at the very end: the parent would do a step more
            self.control.should_training_stop = True
            return
        if hasattr(self.train_dataset, "set_epoch"):  # without augmentation there is no need for one
            self.train_dataset.set_epoch(epoch)
        set_sampler_epoch(train_dataloader, epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if not self.stop_asked or self._epoch_ends:
            return
        step = self.state.global_step
        if self._saved_step != step:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        name = self.signals.received.name if self.signals.received else "A stop of another process"
        raise TrainingInterrupted(
            f"{name}: training stopped after step {step} of {self.state.max_steps}. Go on from "
            f"`{PREFIX_CHECKPOINT_DIR}-{step}` by `--resume_from_checkpoint true`."
        )

    # -- writing ------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED_FOLDER) if self._writing_aside else folder

    def _save_checkpoint(self, model, trial):
        folder, step = self._get_output_dir(trial), self.state.global_step
        checkpoint = os.path.join(folder, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        with self._written_aside(folder):
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = checkpoint
            self.accelerator.wait_for_everyone()  # the files of all processes are there
            if self.args.should_save:
                self._publish(folder, checkpoint)
        self.accelerator.wait_for_everyone()
        self._saved_step = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(checkpoint)

    @contextmanager
    def _written_aside(self, folder: str):
        unfinished = os.path.join(folder, UNFINISHED_FOLDER)
        if self.args.should_save:
            checkpoints.remove(Path(unfinished))
        self.accelerator.wait_for_everyone()
        self._writing_aside = True
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            room = ""
            if os.path.isdir(folder):  # `torch.save` does not say that the disk is full
                room = f", where {shutil.disk_usage(folder).free / 2**20:.1f} MiB are left"
            if self.args.should_save:
                checkpoints.remove(Path(unfinished))  # half a checkpoint must not fill the disk
            raise CheckpointError(
                f"The checkpoint of step {self.state.global_step} could not be written to `{folder}`{room}: {error}. "
                "Those written before are as they were. Make room there, or give it back, and resume with "
                "`--resume_from_checkpoint true`."
            ) from error
        finally:
            self._writing_aside = False

    def _publish(self, folder: str, checkpoint: str):
        unfinished = Path(folder, UNFINISHED_FOLDER, os.path.basename(checkpoint))
        self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))  # again: it names the best checkpoint
        checkpoints.seal(unfinished, self.run_facts(), self.run_settings(), order=checkpoints.next_order(folder))
        checkpoints.publish(unfinished, checkpoint)
        unfinished.parent.rmdir()
        protected = (checkpoint, self.state.best_model_checkpoint)
        checkpoints.rotate(folder, keep=self.args.save_total_limit, protected=protected)

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._writing_aside:
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """transformers restores the learning rate too, so that another one in the command would change nothing."""
        super()._load_optimizer_and_scheduler(checkpoint)
        before = self.args.learning_rate if checkpoint is None else checkpoints.settings(checkpoint)["learning_rate"]
        if self.args.learning_rate == before:
            return
        if before == 0:
            raise ValueError(
                f"The checkpoint was written with `learning_rate=0`, which cannot be scaled to "
                f"{self.args.learning_rate}; start a new run."
            )
        scale = self.args.learning_rate / before
        for group in self.optimizer.param_groups:
            group |= {name: scale * group[name] for name in ("lr", "initial_lr") if name in group}
        if isinstance(self.lr_scheduler, LambdaLR):  # the others go on from the rates in the groups
            self.lr_scheduler.base_lrs = [scale * rate for rate in self.lr_scheduler.base_lrs]

    # -- the sums behind the log: a resumed run logs what an uninterrupted one would --------------------------------

    def progress(self) -> dict:
        """What this process has added up and not logged yet; JSON values."""
        return {
            "running_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def load_progress(self, progress: dict):
        self._tr_loss.fill_(progress["running_loss"])
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]

    def _progress_file(self, checkpoint: str) -> Path:
        return Path(checkpoint, f"progress_{self.args.process_index}.json")

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self._progress_file(output_dir).write_text(json.dumps(self.progress()), encoding="utf-8")

    def _restore(self):
        """When transformers has restored its part."""
        if self._resumed_from is None:
            return
        self.load_progress(json.loads(self._progress_file(self._resumed_from).read_text(encoding="utf-8")))
        if self.state.best_global_step:  # the folder may have been moved since
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            best = os.path.join(os.path.dirname(self._resumed_from), name)
            if os.path.isdir(best):
                self.state.best_model_checkpoint = best

    def store_flos(self):
        """As in transformers, which adds up in single precision: the sum would depend on how often it was stored."""
        flos = torch.tensor(self.current_flos, dtype=torch.float64)
        if self.args.world_size > 1:
            flos = flos.to(self.args.device)
            torch.distributed.all_reduce(flos)
        self.state.total_flos += flos.item()
        self.current_flos = 0

    def log(self, logs, start_time=None):
        if "train_runtime" in logs:  # the summary: of the whole run, not of the part since it was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    def _load_best_model(self):
        self.on_first_process(checkpoints.check, self.state.best_model_checkpoint)
        super()._load_best_model()


class SaveWhenTheEpochIsOver(TrainerCallback):
    """A checkpoint of an epoch's last step is written after the epoch's evaluation, or a resumed run would skip that.

    The evaluation's figures and its draws from the random generators would be missing.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self.waiting = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.waiting = False
        self.trainer._restore()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._epoch_ends = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        self.waiting = self.trainer._epoch_ends and control.should_save
        if self.waiting:
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._epoch_ends = False
        if self.waiting:
            control.should_save, self.waiting = True, False


def leave_process_group(initialize: Callable | None, worker: int):
    """Start of a loader worker, before its own one.

    A signal to the process group, as a terminal and some launchers send it, must not take the data away from the step
    that is to be finished. PyTorch ends a worker by SIGTERM, and it notices by itself that its parent is gone.
    """
    if os.name == "posix":
        os.setpgrp()
    if initialize is not None:
        initialize(worker)


def set_sampler_epoch(dataloader, epoch: int):
    """Tell the sampler which epoch's order to draw.

    accelerate tells it the epoch, or the dataset, but not always both: over several processes the dataset is left out,
    and after a resume inside an epoch the one or the other, so that augmentation or order are those of another epoch.

    Raises:
        ValueError: if the order does not follow from seed and epoch, so that no resume could repeat it.
    """
    batches = dataloader.batch_sampler
    while isinstance(batches, (BatchSamplerShard, SkipBatchSampler)):
        batches = batches.batch_sampler
    if isinstance(batches.sampler, SeedableRandomSampler):
        batches.sampler.set_epoch(epoch)
    elif not isinstance(batches.sampler, SequentialSampler):
        raise ValueError(
            f"The order of samples comes from a `{type(batches.sampler).__name__}`, which no resume can repeat. Leave "
            "`accelerator_config` at its defaults, and `train_sampling_strategy` at `random` or `sequential`."
        )


def any_process(flags: list[torch.Tensor], world_size: int) -> list[bool]:
    """Whether each of some flags, of shape `()`, is set on any process. Waits for the device, in one message."""
    together = torch.stack([flag.to(torch.int32) for flag in flags])
    if world_size > 1:
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
    return together.bool().tolist()
