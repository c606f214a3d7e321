"""[`HNMLTrainer`]: transformers' Trainer around an objective. What else goes on is in `callbacks.py`."""

import inspect
import os
from contextlib import nullcontext
from functools import partial

import pandas as pd
import torch
from transformers import PrinterCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import logging

from ..audit.dynamics import AUDIT_FOLDER, DYNAMICS_FILE
from ..audit.table import image_paths, noise_scores
from ..objectives import OBJECTIVES
from ..objectives.batch_view import BatchView
from ..objectives.soft_targets import dense_targets
from .args import TEACHER_OBJECTIVES, HNMLTrainingArguments
from .callbacks import (
    Cost,
    DynamicsRecorder,
    EvaluationDelay,
    FiniteCheck,
    NoiseRate,
    PredictionMemory,
    RefreshedTargets,
    Teacher,
)
from .data_checks import (
    check_sample_weights,
    check_symmetric_correction,
    check_training_data,
    chosen_targets,
)
from .evaluation import EvaluationMixin
from .extrapolation import extrapolated, running_directions
from .flops import peak_memory_mib
from .memorization import create_monitor
from .progress import Progress
from .publishing import PublishingMixin
from .resume.configuration import changeable_of_method, fixed_of_method
from .resume.trainer import ResumableTrainer
from .step import batch_generator, step_context
from .step_monitor import label_agreement


logger = logging.get_logger(__name__)

# what a step gives its objective; its other keyword-only arguments are options
PROVIDED = ("active_terms", "teacher", "generator", "remember", "sample_weights", "noise_rate")


class HNMLTrainer(EvaluationMixin, PublishingMixin, ResumableTrainer):
    """Trains a [`TimmCAMForImageClassification`] on noisy labels by HNML or one of its baselines.

    What `evaluate` measures is what `save_model` writes: the teacher, if `args.eval_teacher`.

    Over several processes each takes its own synthetic labels and its own virtual step on its own part of the batch,
    and the gradients are averaged: W processes equal one process with W accumulation steps.

    Args:
        model ([`TimmCAMForImageClassification`]): the student.
        args ([`HNMLTrainingArguments`]): the options.
        train_dataset ([`TransformedDataset`], *optional*): needed for training.
        cross_validated (structured `np.ndarray` of shape `(m,)`, *optional*): of [`cross_validate_probe`]. Then
            `symmetric_correction` has its noise rate from there, from the first step on.
        judge_again (`Callable`, *optional*): from a network to the soft targets of the training set, see
            [`RefreshedTargets`]; `targets=refreshed` needs it.
        measure_both (`bool`): whether `evaluate` measures student and teacher, or only the one that is saved. Can be
            set later.
        kwargs: as in transformers' Trainer, as `eval_dataset`, `data_collator` and `compute_metrics`.

    Raises:
        ValueError: before training starts, on data or options that cannot work.
        NonFiniteError: during training, before the optimizer step that would spread it.

    Example:

        training, evaluation = create_transforms(model.config.pretrained_cfg)
        trainer = HNMLTrainer(
            model,
            HNMLTrainingArguments("outputs/run", learning_rate=0.02, num_train_epochs=1),
            train_dataset=TransformedDataset(dataset, training),
            data_collator=collate_images,
        )
        trainer.train()
    """

    def __init__(
        self,
        model,
        args: HNMLTrainingArguments,
        *,
        train_dataset=None,
        cross_validated=None,
        judge_again=None,
        measure_both: bool = True,
        **kwargs,
    ):
        if kwargs.get("model_init") is not None:
            raise ValueError(
                "`model_init` would put another model instead of the one that the teacher is a copy of. Give the "
                "model itself, and build a new trainer for each run."
            )
        self.card_facts: dict = {}
        self.measure_both = measure_both
        if args.n_gpu > 1:
            logger.warning(
                f"{args.n_gpu} GPUs are visible and this is one process: it uses the first. For all of them: "
                f"`accelerate launch --multi_gpu --num_processes {args.n_gpu} scripts/train.py ...`."
            )
            args._n_gpu = 1  # else transformers would cut the batch up and leave its labels whole (DataParallel)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        self.model_accepts_loss_kwargs = False  # the parent divides our mean by the accumulation steps
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed hold a part of the weights on each process, but the teacher and the virtual step "
                "need all of them. Start with `accelerate launch --multi_gpu` instead."
            )
        self._evaluated = "teacher" if args.eval_teacher else "student"
        self.remove_callback(PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        self.display = Progress(
            images_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            evaluated=self._evaluated,
        )
        self.add_callback(self.display)
        mixes = getattr(self.data_collator, "mixup", None) is not None
        self._bind_objective(mixes)
        if train_dataset is not None:
            check_training_data(train_dataset, self.model.config.num_labels)
            check_sample_weights(train_dataset, mixes=mixes, objective=args.objective, provided=self.provided)
        check_symmetric_correction(args, train_dataset, mixes=mixes, provided=self.provided)
        self.targets = chosen_targets(args, train_dataset, mixes=mixes, can_judge=judge_again is not None)
        self._add_parts(cross_validated, judge_again, mixes)

    def _bind_objective(self, mixes: bool):
        """`objective`, with its options, and `provided`: what each step has to give it besides."""
        args, function = self.args, OBJECTIVES[self.args.objective]
        if mixes and not args.takes_soft_labels():
            raise ValueError(
                f"Mixup makes soft labels, which objective `{args.objective}` does not take as it is set. Use `ce`, "
                "or `hnml` with the moving average as a teacher."
            )
        needs = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if "mask_guided" in self.term_weights(1.0):
            self.model.check_spatial_evidence()
        options = {name: getattr(args, name) for name in needs if name not in PROVIDED}
        self.objective, self.provided = partial(function, **options), [name for name in PROVIDED if name in needs]

    def _add_parts(self, cross_validated, judge_again, mixes: bool):
        """The parts with a state of their own: callbacks, each there if this run uses it."""
        args, data, num_labels = self.args, self.train_dataset, self.model.config.num_labels
        from_memory = args.teacher_source == "memory" and args.objective in TEACHER_OBJECTIVES
        self.uses_teacher = args.objective in TEACHER_OBJECTIVES and not from_memory
        self.finite_check, self.cost = FiniteCheck(self), Cost()
        self.teacher = self.memory = self.monitor = self.recorder = self.rate_estimate = self.refreshed = None
        if args.eval_teacher or self.uses_teacher:
            self.teacher = Teacher(self.model, decay=args.teacher_decay)
        if data is not None:
            if from_memory or args.objective == "elr":
                self.memory = PredictionMemory(
                    data.index, num_labels, decay=args.elr_decay, device=args.device, folder=args.output_dir
                )
            self.monitor = create_monitor(args, len(data))
            data.hold_out(0 if self.monitor is None else self.monitor.fraction, seed=args.seed)
            self.recorder = DynamicsRecorder(
                data,
                num_labels,
                monitor=self.monitor,
                keep_dynamics=self.is_world_process_zero() and not mixes,  # a mixed image is no sample
                path=os.path.join(args.output_dir, AUDIT_FOLDER, DYNAMICS_FILE),
            )
            if args.symmetric_correction:
                self.rate_estimate = NoiseRate(self, cross_validated)
            if self.targets == "refreshed":
                self.refreshed = RefreshedTargets(self, judge_again)
        parts = (self.finite_check, self.teacher, self.memory, self.recorder, self.rate_estimate, self.refreshed)
        for part in (*parts, self.cost):
            if part is not None:
                self.add_callback(part)
        self.add_callback(EvaluationDelay())

    @property
    def dynamics(self):
        """The [`TrainingDynamics`] of the run, on the first process; None where images are mixed."""
        return None if self.recorder is None else self.recorder.dynamics

    @property
    def noise_rate(self) -> float | None:
        """The share of wrong labels that the loss is corrected by; None before it is estimated, and without."""
        return None if self.rate_estimate is None else self.rate_estimate.rate

    def audit(self, **facts) -> pd.DataFrame | None:
        """Which training labels are probably wrong, from what training saw of each: the table of
        [`~hnml_hf.find_label_issues`], most probably wrong first. On the first process; the others have None.

        Args:
            facts: further entries of the summary, as `source` and `provenance`.

        Raises:
            ValueError: if no sample was seen yet, or images are mixed, which tells nothing about one label.
        """
        if not self.is_world_process_zero():
            return None
        if self.dynamics is None:
            raise ValueError(
                "Nothing was kept of single samples: there is no training set, or its images are mixed. Train without "
                "mixup, or give the dataset to `find_label_issues`."
            )
        names = [self.model.config.id2label[label] for label in range(self.model.config.num_labels)]
        crossed = None if self.rate_estimate is None else self.rate_estimate.cross_validated
        table = noise_scores(self.dynamics.records, names, cross_validated=crossed, **facts)
        table["path"] = image_paths(self.train_dataset.dataset)
        return table.sort_values("rank")

    # -- one training step --------------------------------------------------------------------------------------------

    def meta_weight(self) -> float:
        """How much of the meta terms and of the extrapolation this step takes, in [0, 1]: as much as is memorized, or
        all of it where nothing measures that. 0 is plain cross-entropy."""
        return 1.0 if self.monitor is None else self.monitor.meta_weight

    def term_weights(self, meta_weight: float) -> dict[str, float]:
        """Weight of each term of the loss that is above 0."""
        weights = {
            "base": 1.0,
            "consistency": meta_weight * self.args.consistency_weight * (self.args.objective in TEACHER_OBJECTIVES),
            "mask_guided": meta_weight * self.args.mask_weight * self.args.objective.startswith("hnml"),
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def training_step(self, model, inputs, num_items_in_batch=None):
        kind = frozenset(self.term_weights(self.meta_weight()))
        counting = self.cost.meter.step(kind, self.model, inputs["pixel_values"])
        with step_context(self.args, self.model), self._extrapolated(), counting:
            return super().training_step(model, inputs, num_items_in_batch)

    def _extrapolated(self):
        distance = self.meta_weight() * self.args.extrapolation * self.args.learning_rate
        # where it may be asked for later, the first steps show whether the optimizer can serve
        if not distance and not (self.args.extrapolation and self.state.global_step <= 1):
            return nullcontext()
        directions = running_directions(self.optimizer)
        return extrapolated(directions, distance=distance, normalized=self.args.extrapolation_normalized)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.is_in_train and model.training):
            inputs = {name: inputs[name] for name in ("pixel_values", "labels")}
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        weights = self.term_weights(self.meta_weight())
        step = partial(self.objective_step, inputs=inputs, active_terms=set(weights))
        view = inputs.get("strong_pixel_values", inputs["pixel_values"])  # the teacher sees the weak one
        terms, monitors = model(pixel_values=view, step=step)  # within the wrapped forward: it sees all gradients
        if "held_out" in inputs:  # the mask-guided term has no use for the given labels
            trained_on = ~inputs["held_out"] / (1 - self.monitor.fraction)
            if "soft_labels" in inputs:  # neither of two labels that are mixed may be one held out
                trained_on = trained_on * trained_on.flip(0)
            terms |= {name: trained_on * terms[name] for name in ("base", "consistency") if name in terms}
        self._watch(terms, monitors, inputs)
        return sum(weights[name] * term.mean() for name, term in terms.items())

    def objective_step(self, model, pixel_values, *, inputs, active_terms):
        """The objective on one batch: terms `(b,)` by name, and monitors."""
        index, labels, args = inputs["index"], inputs.get("soft_labels", inputs["labels"]), self.args
        if self.targets != "given":
            targets = inputs["target_classes"], inputs["target_probabilities"]
            if self.refreshed is not None:
                targets = self.refreshed[index]
            labels = dense_targets(*targets, self.model.config.num_labels)
        provided = {"active_terms": active_terms, "teacher": None, "generator": None}
        if self.uses_teacher:
            cams = "predicted" if "mask_guided" in active_terms else None
            provided["teacher"] = torch.no_grad()(
                partial(self.teacher.network, inputs["pixel_values"], cam_classes=cams)
            )
        if args.draws_labels:
            provided["generator"] = batch_generator(args.seed, self.state.global_step, index)
        if self.memory is not None:
            provided["remember"] = partial(self.memory.update, index)
        if "sample_weights" in inputs:
            provided["sample_weights"] = inputs["sample_weights"]
        if self.noise_rate is not None:
            provided["noise_rate"] = torch.full((), self.noise_rate, device=labels.device)
        given = {name: provided[name] for name in self.provided if name in provided}
        return self.objective(BatchView(model, pixel_values), labels, **given)

    def _watch(self, terms, monitors, inputs):
        """Keep what the log, the check for finite values and the dynamics need, without waiting for the device."""
        logits = monitors["logits"].detach()
        predicted = logits.argmax(-1)
        figures = {name: value for name, value in monitors.items() if value.ndim == 0}
        figures |= label_agreement(predicted, inputs["labels"], inputs["clean_labels"])
        self.finite_check.monitor.watch(inputs["index"], terms, figures)
        self.recorder.buffer.add(
            inputs["index"],
            inputs["labels"],
            probabilities=monitors.get("teacher_probabilities", logits.float().softmax(-1)),
            student_predictions=predicted,
            foreground_logits=monitors.get("foreground_logits"),
            weights=inputs.get("sample_weights"),
            held_out=inputs.get("held_out"),
            step=self.state.global_step,
            epoch=int(self.state.epoch or 0),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs.update(self.finite_check.monitor.averages())  # of all processes
            if self.monitor is not None:
                logs["memorized_share"], logs["meta_weight"] = self.monitor.memorized_share(), self.monitor.meta_weight
            if self.noise_rate is not None:
                logs["noise_rate"] = self.noise_rate
        if "train_runtime" in logs:  # the summary, which `train` also returns
            logs["cost_ce"] = round(self.cost.meter.cost, 3)
            logs["peak_memory_mib"] = round(peak_memory_mib(self.args.device), 1)
        super().log(logs, start_time)

    def fixed_configuration(self):
        return {**super().fixed_configuration(), **fixed_of_method(self)}

    def changeable_configuration(self):
        return {**super().changeable_configuration(), **changeable_of_method(self)}
