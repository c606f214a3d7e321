"""[`HNMLTrainer`]: transformers' Trainer around an objective, a teacher and the look-ahead."""

import hashlib
import inspect
import os
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather, gather_object
from timm.utils import ModelEmaV3
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.utils import logging

from ..audit.noise_model import estimate_noise_rate
from ..hub.trainer import PublishingMixin
from ..objectives import OBJECTIVES, sigmoid_rampup
from ..objectives.inner_step import look_ahead, running_directions
from ..objectives.soft_targets import dense_targets
from .args import TEACHER_OBJECTIVES, HNMLTrainingArguments
from .data_checks import check_sample_weights, check_training_data
from .distributed import broadcast_buffers, check_ranks_agree, tensor_digests
from .dynamics import AUDIT_FOLDER, STATISTICS_FILE, SampleStatistics
from .evaluation import EvaluationMixin
from .flops import CostMeter, peak_memory_mib
from .memorization import UPDATE_EVERY, create_gauge
from .resume.state import TrainingStateMixin
from .resume.trainer import ResumableTrainer, any_process
from .step_monitor import StepMonitor, label_fit, non_finite_error
from .target_memory import create_memory
from .visits import VisitLog


logger = logging.get_logger(__name__)

# what a step gives its objective
PROVIDED = ("wanted", "teacher", "generator", "remember", "class_prior", "sample_weights", "noise_rate")
HIGHEST_RATE = 0.9  # noise rate of the forward correction, as a share of the one at which labels say nothing
VISITS_KEPT = 32  # batches whose predictions wait on the device, at most


class HNMLTrainer(EvaluationMixin, TrainingStateMixin, PublishingMixin, ResumableTrainer):
    """Trains a [`TimmCAMForImageClassification`] on noisy labels by HNML or one of its baselines.

    What `evaluate` measures is what `save_model` writes: the teacher, if `args.eval_teacher`.

    Over several processes each takes its own synthetic labels and its own virtual step on its own part of the batch,
    and the gradients are averaged: W processes equal one process with W accumulation steps.

    Args:
        model ([`TimmCAMForImageClassification`]): the student.
        args ([`HNMLTrainingArguments`]): the options.
        train_dataset ([`TransformedDataset`], *optional*): needed for training.
        cross_validated (structured `np.ndarray` of shape `(m,)`, *optional*): of [`cross_validate_probe`]. Then
            `forward_correction` has its noise rate from there, from the first step on.
        kwargs: as in transformers' Trainer, as `eval_dataset`, `data_collator` and `compute_metrics`.

    Raises:
        ValueError: before training starts, on data or options that cannot work.
        NonFiniteError: during training, before the optimizer step that would spread it.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a plain mean; the parent divides it by the accumulation steps

    def __init__(self, model, args: HNMLTrainingArguments, *, train_dataset=None, cross_validated=None, **kwargs):
        if kwargs.get("model_init") is not None:
            raise ValueError(
                "`model_init` would put another model in the place of the one that the teacher is a copy of. Give the "
                "model itself, and build a new trainer for each run."
            )
        self.card_facts: dict = {}
        if args.n_gpu > 1:
            logger.warning(
                f"{args.n_gpu} GPUs are visible and this is one process: it uses the first. For all of them: "
                f"`accelerate launch --multi_gpu --num_processes {args.n_gpu} scripts/train.py ...`."
            )
            args._n_gpu = 1  # else transformers would cut the batch up and leave its labels whole (DataParallel)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed hold a part of the weights on each process, but the teacher and the virtual step "
                "need all of them. Start with `accelerate launch --multi_gpu` instead."
            )
        if train_dataset is not None:
            check_training_data(train_dataset, self.model.config.num_labels)
        self.model.batch_norm_frozen = args.freeze_batch_norm
        self._bind_objective()
        if getattr(train_dataset, "weights", None) is not None:
            if "sample_weights" not in self.provided:
                raise ValueError(f"Objective `{args.objective}` takes no weights of samples; leave them out.")
            check_sample_weights(train_dataset, mixes=self._mixes())
        self.targets = self._chosen_targets()
        self.cross_validated = cross_validated
        self._check_forward_correction()
        self._create_teacher_and_memory()
        self._create_gauge_and_statistics()
        self._evaluated = "teacher" if args.eval_teacher else "student"
        self.cost_meter = CostMeter()
        self.gradient_norm: torch.Tensor | None = None
        self.monitor = StepMonitor()
        self.add_callback(StepCallback(self))

    def _mixes(self) -> bool:
        return getattr(self.data_collator, "mixup", None) is not None

    def _bind_objective(self):
        """`objective`, with its options, and `provided`: what each step has to give it besides."""
        args, function = self.args, OBJECTIVES[self.args.objective]
        if self._mixes() and not args.takes_soft_labels():
            raise ValueError(
                f"Mixup makes soft labels, which objective `{args.objective}` does not take as it is set. Use `ce`, "
                "or `hnml` with the momentum direction, the additive consistency and the moving average as a teacher."
            )
        if args.objective == "hnml" and args.mask_weight > 0:
            self.model.check_spatial_evidence()
        needs = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = {name: getattr(args, name) for name in needs if name not in PROVIDED}
        self.objective, self.provided = partial(function, **options), [name for name in PROVIDED if name in needs]
        self._second_order_attention = args.second_order and args.meta_scope != "head" and "second_order" in options
        if self._second_order_attention:
            logger.info(
                "Second-order virtual steps run attention by the math kernel; fused ones have no second derivative."
            )

    def _chosen_targets(self) -> str:
        """`posterior` or `given`: as the options say, or by what the dataset and the objective have."""
        chosen, data = self.args.targets, self.train_dataset
        there = getattr(data, "targets", None) is not None
        reason = None
        if not there:
            reason = "the training set has no soft targets; start from the judge's head, or `add_targets`"
        elif self._mixes():
            reason = "images are mixed"
        elif not self.args.takes_soft_targets():
            reason = f"objective `{self.args.objective}` takes labels alone, as it is set"
        elif self.args.forward_correction:
            reason = "`forward_correction` corrects the loss on given labels"
        if chosen == "posterior" and reason is not None:
            raise ValueError(f"`targets=posterior` cannot be had here: {reason}. Leave it out, or give `given`.")
        if chosen is None and there and reason is None and data.weights is not None:
            reason = "the weights of the samples say how far each given label is believed"
        if chosen is None and there:
            chosen = "posterior" if reason is None else "given"
            logger.info(f"Targets: {chosen}" + ("." if reason is None else f", since {reason}."))
        return chosen or "given"

    def _check_forward_correction(self):
        if not self.args.forward_correction:
            return
        reason = None
        if "noise_rate" not in self.provided:
            reason = f"objective `{self.args.objective}` has no cross-entropy that it could correct"
        elif self._mixes():
            reason = "of mixed images no record is kept, from which the noise rate is estimated"
        elif getattr(self.train_dataset, "weights", None) is not None:
            reason = "the weights of the samples already say how far each label is believed"
        if reason is not None:
            raise ValueError(f"`forward_correction` cannot be had here: {reason}. Set it to false.")

    def _create_teacher_and_memory(self):
        """Where targets come from: the moving average of the weights, or of each sample's predictions."""
        args, data = self.args, self.train_dataset
        from_memory = args.teacher_source == "memory" and args.objective in TEACHER_OBJECTIVES
        self._teacher_looks = args.objective in TEACHER_OBJECTIVES and not from_memory
        self._taught: torch.Tensor | None = None
        self.teacher = self.memory = self.class_prior = None
        if args.eval_teacher or self._teacher_looks:
            self.teacher = ModelEmaV3(self.model, decay=args.teacher_decay, use_warmup=True)
            self.teacher.module.requires_grad_(False)
        if data is None:
            return
        num_labels = self.model.config.num_labels
        if from_memory or args.objective == "elr":
            self.memory = create_memory(
                data.index,
                num_labels,
                decay=args.elr_decay,
                top_k=args.memory_top_k,
                device=args.device,
                folder=args.output_dir,
            )
        shares = np.bincount(data.labels, minlength=num_labels) / len(data)
        self.class_prior = torch.tensor(shares, dtype=torch.float32, device=args.device)

    def _create_gauge_and_statistics(self):
        """Who learns what training sees of each sample: the dial of the meta terms, and the records of the audit."""
        args, data = self.args, self.train_dataset
        self.gauge = self.statistics = None
        self.noise_rate: float | None = None  # none estimated yet
        self.statistics_path = os.path.join(args.output_dir, AUDIT_FOLDER, STATISTICS_FILE)
        if data is not None:
            self.gauge = create_gauge(args, len(data))
        if data is not None and self.is_world_process_zero() and not self._mixes():  # a mixed image is no sample
            self.statistics = SampleStatistics(
                data.index,
                data.labels,
                self.model.config.num_labels,
                path=self.statistics_path,
                held_out=None if self.gauge is None else self.gauge.held_out(torch.as_tensor(data.index)).numpy(),
            )
        self.visits = VisitLog(gauge=self.gauge, statistics=self.statistics)

    # -- one training step --------------------------------------------------------------------------------------------

    def meta_strength(self) -> float:
        """How much of the meta terms this step takes, in [0, 1]: 0 before `meta_start_step`, then a ramp, and never
        more than the measured memorisation asks for.

        It scales the look-ahead and the weights of both levels; 0 is plain cross-entropy.
        """
        total = max(self.state.max_steps, 1)
        start, ramp = (s if s >= 1 else s * total for s in (self.args.meta_start_step, self.args.meta_rampup_steps))
        step, measured = self.state.global_step, 1.0 if self.gauge is None else self.gauge.strength
        if step < start:
            return 0.0
        return measured * (sigmoid_rampup((step - start) / ramp) if ramp else 1.0)

    def term_weights(self) -> dict[str, float]:
        """Weight of each term of the loss in this step."""
        strength = self.meta_strength() if self.state.global_step % self.args.meta_every == 0 else 0.0
        return {
            "base": 1.0,
            "consistency": strength * self.args.consistency_weight,
            "mask_guided": strength * self.args.mask_weight,
            "balance": strength * self.args.balance_weight,
        }

    def training_step(self, model, inputs, num_items_in_batch=None):
        kind = frozenset(name for name, weight in self.term_weights().items() if weight > 0)
        counting = self.cost_meter.step(kind, self.model, inputs["pixel_values"])
        with self._one_pass_statistics(), self._look_ahead(), self._attention_kernel(), self._memory_advice():
            with self._compilation(), counting:
                return super().training_step(model, inputs, num_items_in_batch)

    def _look_ahead(self):
        if self.args.objective != "hnml" or self.args.inner_direction != "momentum":
            return nullcontext()
        distance = self.meta_strength() * self.args.meta_lr
        if not distance and self.state.global_step > 1:  # the first steps show whether the optimizer can serve later
            return nullcontext()
        return look_ahead(running_directions(self.optimizer), lr=distance)

    @contextmanager
    def _one_pass_statistics(self):
        """Activation checkpointing runs layers again in the backward pass; batch norm counts the first time alone."""
        self._passed_buffers = None
        yield
        if self._passed_buffers is not None:
            for buffer, once in zip(self.model.buffers(), self._passed_buffers, strict=True):
                buffer.copy_(once)

    @contextmanager
    def _memory_advice(self):
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{error}\n{self.args.memory_advice()}") from error

    @contextmanager
    def _compilation(self):
        """A virtual step takes two gradients through one compiled pass, so that its buffers cannot be given away."""
        if not self.args.torch_compile:
            yield
            return
        errors = torch._dynamo.config.patch(suppress_errors=self.args.allow_uncompiled)
        with errors, torch._functorch.config.patch(donated_buffer=False):
            try:
                yield
            except torch._dynamo.exc.TorchDynamoException as error:
                raise RuntimeError(
                    f"`torch_compile` failed: {error}\nTrain without it, or go on uncompiled where it fails by "
                    "`--allow_uncompiled true`."
                ) from error

    def _attention_kernel(self):
        return sdpa_kernel(SDPBackend.MATH) if self._second_order_attention else nullcontext()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self.is_in_train and model.training):
            inputs = {name: inputs[name] for name in ("pixel_values", "labels")}
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        weights = self.term_weights()
        step = partial(self._objective_step, inputs=inputs, wanted={name for name in weights if weights[name] > 0})
        view = inputs.get("strong_pixel_values", inputs["pixel_values"])  # the teacher sees the weak one
        terms, monitors = model(pixel_values=view, step=step)
        if self.args.recomputes_activations:
            self._passed_buffers = [buffer.clone() for buffer in self.model.buffers()]
        if self.gauge is not None:  # the mask-guided term has no use for the given labels
            taught = (~self.gauge.held_out(inputs["index"])) / (1 - self.gauge.fraction)
            if "soft_labels" in inputs:  # neither of two labels that are mixed may be one held out
                taught = taught * taught.flip(0)
            terms |= {name: taught * terms[name] for name in ("base", "consistency") if name in terms}
        self._watch(terms, monitors, inputs)
        return sum(weights[name] * term.mean() for name, term in terms.items())

    def _objective_step(self, student, *, inputs, wanted):
        """Runs inside the wrapped model's forward, so that distributed training sees every gradient."""
        index, labels = inputs["index"], inputs.get("soft_labels", inputs["labels"])
        if self.targets == "posterior":
            labels = dense_targets(
                inputs["target_classes"], inputs["target_probabilities"], self.model.config.num_labels
            )
        teach = partial(self._teach, inputs["pixel_values"], with_cams="mask_guided" in wanted)
        providers = {
            "wanted": wanted,
            "teacher": teach if self._teacher_looks else None,
            "generator": batch_generator(self.args.seed, self.state.global_step, index)
            if self.args.draws_labels
            else None,
            "remember": partial(self._remember, index),
            "class_prior": self.class_prior,
        }
        if "sample_weights" in inputs:
            providers["sample_weights"] = inputs["sample_weights"]
        if self.noise_rate is not None:
            providers["noise_rate"] = torch.full((), self.noise_rate, device=labels.device)
        return self.objective(
            student, labels, **{name: providers[name] for name in self.provided if name in providers}
        )

    @torch.no_grad()
    def _teach(self, pixel_values, *, with_cams: bool):
        output = self.teacher.module(pixel_values, cam_classes="predicted" if with_cams else None)
        self._taught = output.logits
        return output

    @torch.compiler.disable  # files, and exchange between processes, are not for a compiler
    def _remember(self, index, probabilities):
        self.memory.update(gather(index), gather(probabilities))
        return self.memory[index]

    def _watch(self, terms, monitors, inputs):
        """Keep what the log, the check for finite values and the statistics need, without waiting for the device."""
        logits = monitors["logits"].detach()
        predicted = logits.argmax(-1)
        figures = {name: value for name, value in monitors.items() if value.ndim == 0}
        figures |= label_fit(predicted, inputs["labels"], inputs["clean_labels"])
        self.monitor.watch(inputs["index"], terms, figures)
        said, self._taught = logits if self._taught is None else self._taught, None
        self.visits.add(
            inputs["index"],
            inputs["labels"],
            logits=said,
            voted=predicted,
            foreground_logits=monitors.get("foreground_logits"),
            weights=inputs.get("sample_weights"),
            step=self.state.global_step,
            epoch=int(self.state.epoch or 0),
        )

    def update_statistics(self):
        """Take what was seen of samples since the last time into gauge and statistics. All processes must call it."""
        self.visits.flush()

    def update_noise_rate(self):
        """Estimate the noise rate of the forward correction anew. All processes must call it."""
        if self.args.forward_correction:
            self.update_statistics()
            self.noise_rate = self.on_first_process(self._estimated_noise_rate)

    def _estimated_noise_rate(self) -> float | None:
        records, classes = self.cross_validated, self.model.config.num_labels
        if records is None:
            records = self.statistics.records
            if not (records["times_seen"] > 1).any():  # what votes of one visit agree on says nothing
                return None
        rate = estimate_noise_rate(records[records["times_seen"] > 0], classes, seed=self.args.seed)
        return min(rate, HIGHEST_RATE * (classes - 1) / classes)

    def _get_grad_norm(self, model, grad_norm=None):
        """The parent has to go through all gradients anyway; the check for finite values takes the norm from here."""
        self.gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self.gradient_norm

    def update_teacher(self):
        """teacher <- d teacher + (1 - d) student, batch-norm statistics included; in step n d = min(decay, 1 -
        n^(-2/3)) (timm's warm-up), so that a short run's average does not still hold the start."""
        if self.teacher is None:
            return
        if self.args.world_size > 1:  # each process has its own batch-norm statistics; those of the first one count
            broadcast_buffers(self.model)
        self.teacher.update(self.model, step=self.state.global_step + 1)

    def check_ranks(self):
        """Raise [`RanksDifferError`] if the processes hold different weights; every `rank_sync_steps` steps."""
        every, step = self.args.rank_sync_steps, self.state.global_step + 1
        if not every or self.args.world_size == 1 or step % every:
            return
        tensors = {f"student.{name}": parameter for name, parameter in self.model.named_parameters()}
        if self.teacher is not None:
            tensors |= {f"teacher.{name}": value for name, value in self.teacher.module.state_dict().items()}
        digests = gather(tensor_digests(tensors).to(self.args.device)[None])
        check_ranks_agree(list(tensors), digests.cpu(), step=step)

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs.update(self.monitor.averages())  # of all processes
            if self.gauge is not None:
                logs["memorized_share"], logs["strength"] = self.gauge.memorized_share(), self.gauge.strength
            if self.noise_rate is not None:
                logs["noise_rate"] = self.noise_rate
        if "train_runtime" in logs:  # the summary, which `train` also returns
            logs["cost_ce"] = round(self.cost_meter.cost, 3)
            logs["peak_memory_mib"] = round(peak_memory_mib(self.args.device), 1)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        if self.state.global_step:  # trained before: what was seen then is no part of this run
            self._create_teacher_and_memory()
            self._create_gauge_and_statistics()
        self.cost_meter = CostMeter()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    train.__doc__ = ResumableTrainer.train.__doc__


class StepCallback(TrainerCallback):
    """The two things that happen around an optimizer step: the check before it, the teacher's update after it."""

    def __init__(self, trainer: HNMLTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.cross_validated is not None:
            self.trainer.update_noise_rate()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer, norm = self.trainer, self.trainer.gradient_norm
        if norm is None:
            norm = get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
        trainer.gradient_norm = None
        scaler = trainer.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1:  # float16: an overflow is how its scale is found
            norm = norm.nan_to_num(posinf=0.0)
        stop = torch.tensor(trainer.signals.received is not None, device=norm.device)
        non_finite, stop = any_process([trainer.monitor.non_finite(norm), stop], args.world_size)
        trainer.stop_asked |= stop
        if non_finite:
            found, samples = gather_object([trainer.monitor.non_finite_terms()]), trainer.monitor.samples()
            raise non_finite_error(found, gather_object(samples), step=state.global_step + 1)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.update_teacher()
        self.trainer.check_ranks()

    def on_step_end(self, args, state, control, **kwargs):
        if len(self.trainer.visits) >= VISITS_KEPT:  # between steps, where a checkpoint would take them in too
            self.trainer.update_statistics()
        if self.trainer.gauge is not None and state.global_step % UPDATE_EVERY == 0:
            self.trainer.update_statistics()
            self.trainer.gauge.update()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.cross_validated is None:
            self.trainer.update_noise_rate()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.update_statistics()
        if self.trainer.statistics is not None:
            self.trainer.statistics.save(self.trainer.statistics_path)


@torch.compiler.disable  # it reads the ids, which no compiler can follow
def batch_generator(seed: int, step: int, index: torch.Tensor) -> torch.Generator:
    """Source of randomness for one batch, a function of the run's seed, the step and the sample ids alone.

    No state needs saving, every process draws its own synthetic labels, and a batch gets the same ones whether it is a
    process's share or an accumulation step.
    """
    key = repr((seed, step, index.tolist())).encode()
    digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(digest % 2**63)
