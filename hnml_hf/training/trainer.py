"""[`HNMLTrainer`]: transformers' Trainer around an objective; here is one step, from a batch to its loss.

What goes on around the steps is in `callbacks.py`, what a step runs inside of in `step.py`; evaluation, publishing and
resuming are in files of these names.
"""

from functools import partial

import pandas as pd
import torch

from ..objectives.batch_view import BatchView
from .args import HNMLTrainingArguments
from .callbacks import (
    Cost,
    EvaluationDelay,
    FiniteCheck,
    create_noise_rate,
    create_prediction_memory,
    create_recorder,
    create_refreshed_targets,
    create_teacher,
)
from .data_checks import check_arguments, check_data, check_whole_weights, chosen_targets
from .evaluation import EvaluationMixin
from .extrapolation import extrapolated_step
from .progress import show_progress
from .publishing import PublishingMixin
from .resume.trainer import ResumableTrainer
from .step import batch_generator, bind_objective, step_context, targets_of_step, without_held_out_labels


class HNMLTrainer(EvaluationMixin, PublishingMixin, ResumableTrainer):
    """Trains a [`TimmCAMForImageClassification`] on noisy labels by HNML or one of its baselines.

    What `evaluate` measures is what `save_model` writes: the teacher, if `args.eval_teacher`.

    Over several processes each takes its own synthetic labels and its own virtual step on its own part of the batch,
    and the gradients are averaged: W processes equal one process with W accumulation steps.

    Args:
        model ([`TimmCAMForImageClassification`]): the student.
        args ([`HNMLTrainingArguments`]): the options.
        train_dataset ([`TransformedDataset`], *optional*): needed for training.
        cross_validated (structured `np.ndarray` of shape `(m,)`, *optional*): of [`judge_records`]. Then
            `symmetric_correction` has its noise rate from there, from the first step on.
        judge_again (`Callable`, *optional*): from a network to the soft targets of the training set, see
            [`RefreshedTargets`]; `targets=refreshed` needs it.
        wrongly_labeled (`torch.utils.data.Dataset`, *optional*): training images as evaluation sees them, whose
            labels are known to be wrong. After each evaluation during training the log says in `eval_memorized` how
            many of these labels the network that is saved predicts.
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
        wrongly_labeled=None,
        measure_both: bool = True,
        **kwargs,
    ):
        check_arguments(args, **kwargs)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        check_whole_weights(self)
        self.model_accepts_loss_kwargs = False  # the parent divides our mean by the accumulation steps
        self.card_facts: dict = {}
        self.measure_both, self.wrongly_labeled = measure_both, wrongly_labeled
        self._evaluated = "teacher" if args.eval_teacher else "student"
        self.display = show_progress(self, evaluated=self._evaluated)

        mixes = getattr(self.data_collator, "mixup", None) is not None
        self.objective, self.provided = bind_objective(args, self.model, mixes=mixes)
        check_data(args, train_dataset, self.model.config.num_labels, mixes=mixes, provided=self.provided)
        self.targets = chosen_targets(
            args,
            there=getattr(train_dataset, "targets", None) is not None,
            weighted=getattr(train_dataset, "weights", None) is not None,
            mixes=mixes,
            can_judge=judge_again is not None,
        )

        self.finite_check, self.cost = FiniteCheck(self), Cost()  # each of the others is there if this run uses it
        self.teacher = create_teacher(self.model, args)
        self.memory = create_prediction_memory(self.model, args, train_dataset)
        self.recorder = create_recorder(self, mixes=mixes)
        self.rate_estimate = create_noise_rate(self, cross_validated)
        self.refreshed = create_refreshed_targets(self, judge_again)
        parts = (self.finite_check, self.teacher, self.memory, self.recorder, self.rate_estimate, self.refreshed)
        for part in (*parts, self.cost, EvaluationDelay()):
            if part is not None:
                self.add_callback(part)

    # -- one step: the gradient is taken at the extrapolated weights, and applied at the weights themselves -----------

    def training_step(self, model, inputs, num_items_in_batch=None):
        meta_weight = self.meta_weight()
        kind = frozenset(self.args.term_weights(meta_weight))
        counting = self.cost.meter.step(kind, self.model, inputs["pixel_values"])
        ahead = extrapolated_step(self.args, self.optimizer, meta_weight=meta_weight, step=self.state.global_step)
        with step_context(self.args, self.model), ahead, counting:
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.is_in_train and model.training):
            inputs = {name: inputs[name] for name in ("pixel_values", "labels")}
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        weights = self.args.term_weights(self.meta_weight())
        step = partial(self.objective_step, inputs=inputs, active_terms=set(weights))
        view = inputs.get("strong_pixel_values", inputs["pixel_values"])  # the teacher sees the weak one
        terms, monitors = model(pixel_values=view, step=step)  # within the wrapped forward: it sees all gradients
        if "held_out" in inputs:
            terms = without_held_out_labels(terms, inputs, fraction=self.monitor.fraction)
        self.finite_check.watch(inputs, terms, monitors)
        self.recorder.watch(inputs, monitors, self.state)
        return sum(weights[name] * term.mean() for name, term in terms.items())

    def objective_step(self, model, pixel_values, *, inputs, active_terms):
        """The objective on one batch: terms `(b,)` by name, and monitors."""
        index, args = inputs["index"], self.args
        labels = targets_of_step(inputs, self.targets, self.refreshed, self.model.config.num_labels)
        provided = {"active_terms": active_terms, "teacher": None, "generator": None}
        if args.uses_teacher:
            cams = "predicted" if "mask_guided" in active_terms else None
            provided["teacher"] = partial(self.teacher.answer, inputs["pixel_values"], cam_classes=cams)
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

    def _get_grad_norm(self, model, grad_norm=None):
        """As in transformers, which has the norm before clipping; [`FiniteCheck`] looks at it too."""
        self.gradient_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.gradient_norm

    def log(self, logs: dict[str, float], start_time: float | None = None):
        for part in self.parts if "loss" in logs else []:
            logs.update(part.figures())
        if "train_runtime" in logs:  # the summary, which `train` also returns
            logs.update(self.cost.summary(self.args.device))
        super().log(logs, start_time)

    # -- what is known of the labels so far ---------------------------------------------------------------------------

    def meta_weight(self) -> float:
        """How much of the meta terms and of the extrapolation this step takes, in [0, 1]: as much as is memorized, or
        all of it where nothing measures that. 0 is plain cross-entropy."""
        return 1.0 if self.monitor is None else self.monitor.meta_weight

    @property
    def monitor(self):
        """The [`MemorizationMonitor`] of the run, None without one."""
        return None if self.recorder is None else self.recorder.monitor

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
        if self.recorder is None or self.dynamics is None:
            raise ValueError(
                "Nothing was kept of single samples: there is no training set, or its images are mixed. Train without "
                "mixup, or give the dataset to `find_label_issues`."
            )
        crossed = None if self.rate_estimate is None else self.rate_estimate.cross_validated
        return self.recorder.scores(self.model.config.id2label, cross_validated=crossed, **facts)
