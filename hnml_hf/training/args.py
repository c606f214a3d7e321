"""Options of [`HNMLTrainer`]."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging

from .parent_options import check_parent_options, check_resolved_options, take_launcher_options


logger = logging.get_logger(__name__)

DEFAULT_META_LR = {"head": 20.0, "full": 0.2}  # `head` by prototypes, `full` of MLNT
DEFAULT_EXTRAPOLATION = 40  # steps of SGD, of `hnml`; see docs/ablations.md
# Adam steps as far for a small gradient as for a large one: 40 steps ahead a pretrained network knows nothing
ADAM_EXTRAPOLATION = 1
SYNTHETIC_OBJECTIVES = ("hnml_synthetic", "mlnt")
HNML_OBJECTIVES = ("hnml", "hnml_synthetic")
WITHOUT_MOMENTS = ("sgd", "adagrad", "rmsprop", "adafactor")  # optimizers that have none of Adam's options
TEACHER_OBJECTIVES = ("hnml", "hnml_synthetic", "mlnt", "mean_teacher")

# option: the runs that look at it, and the option that decides; those that are not here matter to all
APPLIES = {
    "gce_q": (lambda args: args.objective == "gce", "objective"),
    "elr_weight": (lambda args: args.objective == "elr", "objective"),
    "elr_decay": (lambda args: args.objective == "elr" or args.teacher_source == "memory", "objective"),
    "extrapolation_normalized": (lambda args: bool(args.extrapolation), "extrapolation"),
    **dict.fromkeys(
        ("meta_scope", "second_order", "meta_lr", "num_meta_draws", "perturb_ratio", "num_neighbors"),
        (lambda args: args.objective in SYNTHETIC_OBJECTIVES, "objective"),
    ),
    **dict.fromkeys(
        ("consistency_weight", "teacher_source"), (lambda args: args.objective in TEACHER_OBJECTIVES, "objective")
    ),
    **dict.fromkeys(
        ("mask_weight", "monitor_fraction"), (lambda args: args.objective in HNML_OBJECTIVES, "objective")
    ),
    # of transformers
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "adam_epsilon"), (lambda args: args.optim not in WITHOUT_MOMENTS, "optim")
    ),
    "eval_steps": (lambda args: args.eval_strategy == "steps", "eval_strategy"),
    "eval_delay": (lambda args: args.eval_strategy != "no", "eval_strategy"),
    "save_steps": (lambda args: args.save_strategy == "steps", "save_strategy"),
    "logging_steps": (lambda args: "steps" in (args.logging_strategy, args.eval_strategy), "logging_strategy"),
    "dataloader_persistent_workers": (lambda args: args.dataloader_num_workers > 0, "dataloader_num_workers"),
}


@dataclass
class HNMLTrainingArguments(TrainingArguments):
    """transformers' [`TrainingArguments`] with the options of the method. Sources: "MLNT" is Li et al., CVPR 2019,
    "ELR" Liu et al., NeurIPS 2020, "GCE" Zhang & Sabuncu, NeurIPS 2018, "ours" a choice of this project.

    Example:

        args = HNMLTrainingArguments("outputs/run", objective="elr", learning_rate=0.02, num_train_epochs=30)
    """

    _argument_group_name = "method and training"  # of `--help`; the first ones are transformers' own

    # -- objective --
    objective: Literal["hnml", "hnml_synthetic", "mlnt", "ce", "gce", "elr", "mean_teacher"] = field(
        default="hnml",
        metadata={
            "help": "What to minimize: `hnml`, `hnml_synthetic` (with MLNT's virtual step), or one of the "
            "baselines in the same trainer."
        },
    )
    gce_q: float = field(
        default=0.7, metadata={"help": "GCE's q in (0, 1]: 0 is cross-entropy, 1 mean absolute error (GCE)."}
    )
    elr_weight: float = field(default=3.0, metadata={"help": "Weight of ELR's regularizer (ELR, CIFAR-10)."})
    elr_decay: float = field(
        default=0.7,
        metadata={"help": "Decay of a sample's running predictions, in [0, 1); `teacher_source=memory` too (ELR)."},
    )

    targets: Literal["given", "posterior", "refreshed"] | None = field(
        default=None,
        metadata={
            "help": "What the base loss asks for: the given label, or the probability of each class to be the true "
            "one, by the judge of the frozen features; `refreshed`: judged again after every epoch but the last, by "
            "the features of the network that is evaluated. Default: `posterior` where training starts from the "
            "judge's head, unless samples have weights, images are mixed, or the objective takes labels alone (ours)."
        },
    )

    # -- where the gradient is taken --
    extrapolation: float | None = field(
        default=None,
        metadata={
            "help": "Take the gradient so many optimizer steps ahead along the optimizer's momentum: steps x peak "
            "learning rate x momentum (Momentum-SAM without its normalization, Becker et al., 2024). Default for "
            "`hnml`: 40 with SGD, 1 with Adam or AdamW; else 0."
        },
    )
    extrapolation_normalized: bool = field(
        default=False,
        metadata={"help": "Divide the momentum by its norm over all weights, as in Momentum-SAM: a control."},
    )

    # -- meta-training: the virtual step on synthetic labels --
    meta_scope: Literal["head", "full"] = field(
        default="full", metadata={"help": "Weights that the virtual step moves; `head` has a closed form."}
    )
    second_order: bool | None = field(
        default=None,
        metadata={"help": "Differentiate through the virtual step; default: only for `head`, where it costs nothing."},
    )
    meta_lr: float | None = field(
        default=None,
        metadata={
            "help": "Length of the virtual step. Defaults: head 20 in units of 1 / mean kernel diagonal (ours); full "
            "0.2 (MLNT)."
        },
    )
    num_meta_draws: int = field(default=1, metadata={"help": "Synthetic label sets per step (MLNT has 10)."})
    perturb_ratio: float = field(default=0.5, metadata={"help": "Share of the batch that a draw relabels (MLNT)."})
    num_neighbors: int = field(
        default=10,
        metadata={"help": "A relabeled sample takes the label of one of so many nearest neighbors (MLNT)."},
    )
    # -- the two levels of the outer loss --
    consistency_weight: float = field(
        default=3.0, metadata={"help": "Weight of the consistency with the teacher (ours)."}
    )
    mask_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mask-guided self-learning (ours). Off by default, since it gained nothing on any "
            "dataset; docs/ablations.md measured 1."
        },
    )
    symmetric_correction: bool = field(
        default=False,
        metadata={
            "help": "Correct the loss for symmetric noise (Patrini et al., CVPR 2017). The noise rate is estimated "
            "from the training dynamics after each epoch, from the second one on, or by cross-validation of "
            "the judge that the run starts from (ours)."
        },
    )
    monitor_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training labels that no loss sees. How much better the model agrees with the other "
            "labels measures memorization, and sets the weight of the meta terms. Default: about 500 labels, "
            "between 0.01 and 0.1. 0: the meta terms are always at full weight (ours)."
        },
    )
    # -- teacher --
    teacher_source: Literal["ema", "memory"] = field(
        default="ema",
        metadata={
            "help": "Where targets come from: a forward pass of the averaged weights over each batch, or "
            "each sample's running average of the student's predictions, which costs none (ours)."
        },
    )
    teacher_decay: float = field(
        default=0.99,
        metadata={
            "help": "Decay of the teacher's weights, in [0, 1) (MLNT); at most 1 - n^(-2/3) in step n, so that a "
            "short run's average does not still hold the start."
        },
    )
    eval_teacher: bool | None = field(
        default=None,
        metadata={
            "help": "Evaluate and save the teacher instead of the student; default: if the objective has a teacher."
        },
    )

    # -- defaults of the parent that are changed; what becomes of the others: parent_options.py --
    do_train: bool = field(default=True, metadata={"help": "Always true: other scripts evaluate and predict."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Train in bfloat16. Default: on a GPU that has it, unless `fp16` is set.",
        },
    )
    optim: str = field(default="sgd", metadata={"help": "Optimizer (transformers: AdamW)."})
    optim_args: str | None = field(default="momentum=0.9", metadata={"help": "Arguments of the optimizer."})
    learning_rate: float = field(default=0.05, metadata={"help": "Peak learning rate, for SGD from random weights."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Sample ids and clean labels must reach the trainer."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "timm classifiers use all of their parameters."}
    )

    def __post_init__(self):
        without_effect = self._without_effect()
        check_parent_options(self)
        take_launcher_options(self)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin it for, and PyTorch would warn
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # none that could persist, and PyTorch would refuse
        if self.bf16 is None:
            self.bf16 = not (self.use_cpu or self.fp16) and cuda_has_bf16()
        super().__post_init__()  # before the checks, which look at what it makes of aliases
        for name, low, high in (
            ("gce_q", 0, 1),
            ("elr_decay", 0, 1),
            ("perturb_ratio", 0, 1),
            ("teacher_decay", 0, 1),
            ("monitor_fraction", 0, 0.5),
        ):
            value = getattr(self, name)
            self._require(name, value is None or low <= value <= high, f"between {low} and {high}")
        self._require("gce_q", self.gce_q > 0, "above 0")
        for name in ("elr_decay", "teacher_decay"):  # an average with a decay of 1 stays what it was at the start
            self._require(name, getattr(self, name) < 1, "below 1")
        for name in ("num_meta_draws", "num_neighbors"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "elr_weight",
            "consistency_weight",
            "mask_weight",
        ):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number from 0 on")
        for name in ("meta_lr", "extrapolation"):
            value = getattr(self, name)
            self._require(name, value is None or 0 <= value < math.inf, "a number from 0 on")
        for name, kind in HNMLTrainingArguments.__annotations__.items():
            if name == "targets" and self.targets is None:
                continue
            kind = get_args(kind)[0] if name == "targets" else kind
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"`{name}={getattr(self, name)!r}` is none of {', '.join(get_args(kind))}.")
        if self.save_only_model and self.save_strategy != "no":
            raise ValueError(
                "`save_only_model` writes checkpoints that no run can go on from. Leave it out, or set "
                "`save_strategy` to `no`; the model of the end is saved in any case."
            )
        synthetic = self.draws_labels
        if self.recomputes_activations and synthetic and self.meta_scope != "head":
            raise ValueError(
                f"`activation_checkpointing` does not go with `meta_scope={self.meta_scope!r}`: it would recompute "
                "activations of the virtual weights with the real ones and give wrong gradients without notice. Use "
                "`meta_scope='head'`, `objective='hnml'` or a smaller batch with "
                "`gradient_accumulation_steps`."
            )
        if self.fp16 and synthetic and self.meta_scope != "head":
            raise ValueError(
                "`fp16` scales the loss, but not that of a virtual step, whose gradient would be rounded to 0. Use "
                "`bf16`, `meta_scope='head'` or `objective='hnml'`."
            )
        if self.meta_lr is None and synthetic:
            self.meta_lr = DEFAULT_META_LR[self.meta_scope]
        if self.extrapolation is None:
            length = ADAM_EXTRAPOLATION if "adam" in str(self.optim).lower() else DEFAULT_EXTRAPOLATION
            self.extrapolation = length if self.objective == "hnml" else 0
        if self.second_order is None:
            self.second_order = self.meta_scope == "head"
        if self.torch_compile and synthetic and self.meta_scope != "head" and self.second_order:
            raise ValueError(
                "`torch_compile` cannot differentiate a compiled backward again, which second-order virtual steps "
                "need. Use `second_order=False`, `meta_scope='head'` or `objective='hnml'`."
            )
        if self.eval_teacher is None:
            self.eval_teacher = self.objective in TEACHER_OBJECTIVES
        if synthetic and self.num_neighbors >= self.per_device_train_batch_size:
            raise ValueError(
                f"`num_neighbors={self.num_neighbors}` needs a batch of more images than that on each device, but "
                f"`per_device_train_batch_size={self.per_device_train_batch_size}`. Lower the one or raise the other."
            )
        check_resolved_options(self)
        self._check_trackers()
        if without_effect and self.process_index == 0:
            logger.warning(
                "Without effect in this run: "
                + "; ".join(
                    f"{', '.join(f'`{name}`' for name in names)}, since `{option}={getattr(value, 'value', value)}`"
                    for (option, value), names in without_effect.items()
                )
                + "."
            )

    def _without_effect(self) -> dict[tuple[str, Any], list[str]]:
        """Options that differ from their defaults, and that this run does not look at, by the option that decides."""
        defaults = {option.name: option.default for option in fields(self)}
        found: dict[tuple[str, Any], list[str]] = {}
        for name, (applies, decides) in APPLIES.items():
            if getattr(self, name) != defaults[name] and not applies(self):
                found.setdefault((decides, getattr(self, decides)), []).append(name)
        return found

    def _check_trackers(self):
        """Say before training that a tracker's package is missing; transformers would, with a traceback."""
        unknown = set(self.report_to) - set(INTEGRATION_TO_CALLBACK)
        if unknown:
            raise ValueError(
                f"`report_to={self.report_to}`: there is no tracker `{sorted(unknown)[0]}`, only `none`, `all` and "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )
        known = set(INTEGRATION_TO_CALLBACK) - {"azure_ml", "flyte"}  # packages with other names
        missing = known.intersection(self.report_to) - set(get_available_reporting_integrations())
        if missing:
            raise ValueError(
                f"`report_to={self.report_to}` needs packages that are not installed. Install them, `pip install "
                f"{' '.join(sorted(missing))}`, or leave them out."
            )

    @property
    def device(self) -> torch.device:
        """Of this process. Several processes on a CPU have `cpu:0`, where torch restores no state of an optimizer."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def draws_labels(self) -> bool:
        """Whether a step goes down the gradient of synthetic labels."""
        return self.objective in SYNTHETIC_OBJECTIVES

    @property
    def uses_memory(self) -> bool:
        """Whether the targets of the consistency come from each sample's running predictions."""
        return self.teacher_source == "memory" and self.objective in TEACHER_OBJECTIVES

    @property
    def uses_teacher(self) -> bool:
        """Whether they come from a forward pass of the averaged weights."""
        return self.teacher_source == "ema" and self.objective in TEACHER_OBJECTIVES

    @property
    def recomputes_activations(self) -> bool:
        """`activation_checkpointing`, which older versions of transformers know as `gradient_checkpointing` only."""
        return bool(getattr(self, "activation_checkpointing", False) or self.gradient_checkpointing)

    def term_weights(self, meta_weight: float) -> dict[str, float]:
        """Weight of each term of the loss that is above 0, where the meta terms have the weight `meta_weight`."""
        weights = {
            "base": 1.0,
            "consistency": meta_weight * self.consistency_weight * (self.objective in TEACHER_OBJECTIVES),
            "mask_guided": meta_weight * self.mask_weight * (self.objective in HNML_OBJECTIVES),
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def takes_soft_labels(self) -> bool:
        """Whether the objective has a meaning for images, and labels, that are mixed."""
        return self.objective == "ce" or (self.objective == "hnml" and self.teacher_source == "ema")

    def takes_soft_targets(self) -> bool:
        """Whether the base loss of the objective has a meaning for a distribution instead of a label."""
        return self.objective in ("ce", "elr", "mean_teacher", "hnml")

    def memory_advice(self) -> str:
        """What to change when a training step does not fit into memory, the mildest change first."""
        advice = []
        if self.draws_labels:
            if self.num_meta_draws > 1 and self.meta_scope != "head":
                advice.append(f"`--num_meta_draws 1` (each of the {self.num_meta_draws} keeps a whole forward pass)")
            if self.second_order and self.meta_scope != "head":
                advice.append("`--second_order false`")
            if self.meta_scope == "full":
                advice.append("`--meta_scope head`")
        if self.objective in TEACHER_OBJECTIVES and self.teacher_source == "ema":
            advice.append("`--teacher_source memory --eval_teacher false` (no second network)")
        if self.per_device_train_batch_size > 1:
            half, steps = self.per_device_train_batch_size // 2, self.gradient_accumulation_steps * 2
            advice.append(f"`--per_device_train_batch_size {half} --gradient_accumulation_steps {steps}`")
        return (
            f"A step of `{self.objective}` does not fit. In this order: {', then '.join(advice)}. `python "
            "scripts/benchmarks/benchmark.py cost` shows what each form needs."
        )

    def _require(self, name: str, holds: bool, wanted: str):
        if not holds:
            raise ValueError(f"`{name}={getattr(self, name)}` must be {wanted}.")


def cuda_has_bf16() -> bool:
    """Whether there is a CUDA device that computes in bfloat16, and does not only emulate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
