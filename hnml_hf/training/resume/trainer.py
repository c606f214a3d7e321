"""[`ResumableTrainer`]: transformers' Trainer that can be killed at any moment and goes on as if it had not been."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ...common.finite import require_finite_weights
from ...common.words import counted
from ..callbacks import CheckpointedCallback
from ..distributed import any_process, on_first_process, require_same_on_all_processes, tensor_digests
from . import files as checkpoints
from .configuration import changeable_configuration, fixed_configuration
from .files import UNFINISHED_FOLDER, CheckpointError
from .loading import guarded_workers, set_sampler_epoch
from .signals import StopSignals, TrainingInterrupted


logger = logging.get_logger(__name__)

LAST_FOLDER = "last"  # the last epoch's weights, where the best epoch's are loaded at the end

OF_EACH_PROCESS = ("local_rank", "logging_dir", "hub_token")  # options that processes need not have in common


def _steps_done(checkpoint: str) -> int:
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


class ResumableTrainer(Trainer):
    """Checkpoints that are complete or not there, resumed exactly; SIGTERM and SIGINT finish the step and save.

    One run at a time may train in an output folder. All processes resume from the checkpoint that the first one found.
    What a run has learned beside its weights is in its callbacks ([`CheckpointedCallback`]). What must not change
    between runs, and what not without notice, is in `configuration.py`.
    """

    def __init__(self, model, args, **kwargs):
        checkpoints.require_writable(args.output_dir)
        super().__init__(model, args, **kwargs)
        self.signals = StopSignals()
        self.stop_asked = False  # the same on all processes
        self._resumed_from: str | None = None
        self._first_step = 0
        self.add_callback(SaveWhenTheEpochIsOver(self))

    def on_first_process(self, function: Callable, *arguments):
        """Call it on the first process alone; its result, or its error, reaches all of them."""
        return on_first_process(function, *arguments)

    # -- a run --------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As in transformers, with `resume_from_checkpoint` as in [`~hnml_hf.training.resume.files.resolve`].

        Raises:
            CheckpointError: nothing complete to resume from, a checkpoint that cannot be written, or another run that
                is writing to the output folder.
            TrainingInterrupted: after SIGTERM or SIGINT, when the checkpoint is written. Runs that save none
                (`save_strategy="no"`) leave both signals alone.
            ValueError: the checkpoint belongs to a run with another [`fixed_configuration`]. What differs
                in [`changeable_configuration`] is named in a warning, and takes effect.
        """
        if self.args.world_size > 1 and self.train_dataset is not None:
            require_same_on_all_processes(self._started_with())
        with ExitStack() as held:
            start = self.on_first_process(self._start, held, resume_from_checkpoint)
            self._resumed_from, self.stop_asked = start, False
            self._first_step = 0 if start is None else _steps_done(start)
            if self.state.global_step:  # trained before: what was seen then is no part of this run
                for part in self.parts:
                    part.reset()
            if start is not None:  # the run was evaluated when it started
                held.enter_context(replaced(self.args, eval_on_start=False))
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
            **fixed_configuration(self),
            **changeable_configuration(self),
            "weights at the start": hash(tuple(digests)),
        }

    def _end_if_asked_to_stop(self):
        """A signal since the last step, as in the last evaluation: what comes after training can come later."""
        asked = torch.tensor(self.signals.received is not None, device=self.args.device)
        (self.stop_asked,) = any_process([asked], self.args.world_size)
        if self.stop_asked:
            name = self.signals.received.name if self.signals.received else "A stop of another process"
            raise TrainingInterrupted(
                f"{name}: all {counted(self.state.global_step, 'step', 'are')} done, their results are not written. "
                "Go on by `--resume_from_checkpoint true`."
            )

    def _start(self, held: ExitStack, resume_from_checkpoint) -> str | None:
        folder = self.args.output_dir
        held.enter_context(checkpoints.run_lock(folder))
        start = checkpoints.resolve(resume_from_checkpoint, folder)
        if start is not None:
            checkpoints.require_same_run(start, fixed_configuration(self), changeable_configuration(self))
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
                f"{counted(len(self.train_dataset), 'training image', 'give')} {self.args.world_size} process(es) "
                "no batch of "
                f"{self.args.per_device_train_batch_size}. Lower `--per_device_train_batch_size`, or leave out "
                "`--dataloader_drop_last`."
            )
        return guarded_workers(loader, self.args.seed)

    def get_eval_dataloader(self, eval_dataset=None):
        return guarded_workers(super().get_eval_dataloader(eval_dataset), self.args.seed)

    def get_test_dataloader(self, test_dataset):
        return guarded_workers(super().get_test_dataloader(test_dataset), self.args.seed)

    def _run_epoch(self, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at the very end: the parent would do a step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        folder, step = self._get_output_dir(trial), self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self.require_finite("No checkpoint was written; lower `--learning_rate` and resume from the last one.")
        for part in self.parts:
            part.before_save()
        with self._written_aside(folder) as unfinished:
            super()._save_checkpoint(model, trial)
            self._save_parts(unfinished / name)
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = os.path.join(folder, name)
            self.accelerator.wait_for_everyone()  # the files of all processes are there
            if self.args.should_save:
                self._publish(unfinished / name, os.path.join(folder, name))
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _written_aside(self, folder: str):
        unfinished = os.path.join(folder, UNFINISHED_FOLDER)
        if self.args.should_save:
            checkpoints.remove(Path(unfinished))
        self.accelerator.wait_for_everyone()
        try:
            with replaced(self.args, output_dir=unfinished, push_to_hub=False):
                yield Path(unfinished)
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

    def _publish(self, unfinished: Path, checkpoint: str):
        folder = os.path.dirname(checkpoint)
        self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))  # again: it names the best checkpoint
        checkpoints.seal(
            unfinished,
            fixed_configuration(self),
            changeable_configuration(self),
            order=checkpoints.next_order(folder),
        )
        checkpoints.publish(unfinished, checkpoint)
        unfinished.parent.rmdir()
        protected = (checkpoint, self.state.best_model_checkpoint)
        checkpoints.rotate(folder, keep=self.args.save_total_limit, protected=protected)

    def save_model(self, output_dir=None, _internal_call=False):
        """Write what was evaluated; into a checkpoint, the student."""
        output_dir = output_dir or self.args.output_dir
        self.require_finite("They were not saved; lower `--learning_rate`, and start again or from a checkpoint.")
        aside = os.path.basename(os.path.dirname(output_dir)) == UNFINISHED_FOLDER
        network = self.model if aside else self.evaluated_model()
        with nullcontext() if aside else self.as_it_is_saved(network):
            if self.args.should_save:
                network.save_pretrained(output_dir)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def networks(self) -> list[torch.nn.Module]:
        """All networks whose weights are saved."""
        return [self.model]

    def require_finite(self, advice: str):
        """Before weights are written, on all processes, so that none waits for another."""
        for network in self.networks():
            of = f"the model after step {self.state.global_step}"
            require_finite_weights(network.state_dict(), of=of, advice=advice)

    def evaluated_model(self):
        """The model that is measured and saved."""
        return self.model

    @contextmanager
    def as_it_is_saved(self, network: torch.nn.Module):
        """Inside, a network is what a reader of its file gets, where training has it otherwise."""
        yield

    @property
    def parts(self) -> list[CheckpointedCallback]:
        """The callbacks with a state of their own."""
        return [part for part in self.callback_handler.callbacks if isinstance(part, CheckpointedCallback)]

    def _save_parts(self, folder: Path):
        if self.args.should_save:
            for part in self.parts:
                part.save(folder)
        progress = {"": self.progress(), **{type(part).__name__: part.progress() for part in self.parts}}
        self._progress_file(folder).write_text(json.dumps(progress), encoding="utf-8")

    def rescale_learning_rate(self, checkpoint: str):
        """transformers restores the learning rate too, so that another one in the command would change nothing."""
        before = checkpoints.changeable_configuration(checkpoint)["learning_rate"]
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

    def _progress_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint, f"progress_{self.args.process_index}.json")

    def restore(self):
        """When transformers has restored its part."""
        checkpoint = self._resumed_from
        if checkpoint is None:
            return
        self.rescale_learning_rate(checkpoint)
        progress = json.loads(self._progress_file(checkpoint).read_text(encoding="utf-8"))
        self.load_progress(progress[""])
        for part in self.parts:
            part.load(Path(checkpoint))
            part.load_progress(progress[type(part).__name__])
        if self.state.best_global_step:  # the folder may have been moved since
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            best = os.path.join(os.path.dirname(checkpoint), name)
            if os.path.isdir(best):
                self.state.best_model_checkpoint = best

    @cached_property
    def _num_weights(self) -> int:
        return self.model.num_parameters(exclude_embeddings=True)

    def floating_point_ops(self, inputs):
        """As in transformers, which counts the weights again in each step."""
        return 6 * inputs["pixel_values"].numel() * self._num_weights

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
            if self.state.global_step == self._first_step:  # no step was left to time
                logs.pop("train_samples_per_second", None)
                logs.pop("train_steps_per_second", None)
        super().log(logs, start_time)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        self.save_model(os.path.join(self.args.output_dir, LAST_FOLDER), _internal_call=True)
        self.on_first_process(checkpoints.check, best)
        super()._load_best_model()
        for part in self.parts:
            if part.follows_the_weights:
                part.load(Path(best))


class SaveWhenTheEpochIsOver(TrainerCallback):
    """Says when to save: after the epoch's evaluation, or a resumed run would skip that, with its figures and its
    draws from the random generators; and when the run was asked to stop, which it does once that is saved.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self.waiting = self.epoch_ends = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.waiting = self.epoch_ends = False
        self.trainer.restore()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        epoch = int(state.epoch or 0)
        if hasattr(self.trainer.train_dataset, "set_epoch"):  # without augmentation there is no need for one
            self.trainer.train_dataset.set_epoch(epoch)
        set_sampler_epoch(train_dataloader, epoch)

    def on_step_end(self, args, state, control, **kwargs):
        self.epoch_ends = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        control.should_save |= self.trainer.stop_asked
        self.waiting = self.epoch_ends and control.should_save
        if self.waiting:
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epoch_ends = False
        if self.waiting:
            control.should_save, self.waiting = True, False

    def on_save(self, args, state, control, **kwargs):
        trainer = self.trainer
        if args.push_to_hub:
            trainer.push_checkpoint()
        if not trainer.stop_asked:
            return
        name = trainer.signals.received.name if trainer.signals.received else "A stop of another process"
        raise TrainingInterrupted(
            f"{name}: training stopped after step {state.global_step} of {state.max_steps}. Go on from "
            f"`{PREFIX_CHECKPOINT_DIR}-{state.global_step}` by `--resume_from_checkpoint true`."
        )


@contextmanager
def replaced(options, **values):
    """Inside, some attributes of an object have other values."""
    before = {name: getattr(options, name) for name in values}
    for name, value in values.items():
        setattr(options, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(options, name, value)
