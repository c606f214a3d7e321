"""Options of [`HNMLTrainer`]."""

from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging

from .parent_options import check_parent_options, check_resolved_options, take_launcher_options


logger = logging.get_logger(__name__)

DEFAULT_META_LR = {"head": 20.0, "last_stage": 1.0, "full": 0.2}  # prototypes; MLNT has 0.2 for `full`
HORIZON = 40  # steps that the momentum direction looks ahead at the peak learning rate; see docs/ablations.md
TEACHER_OBJECTIVES = ("hnml", "mlnt", "mean_teacher")

SYNTHETIC_OPTIONS = ("meta_scope", "second_order", "num_meta_draws", "label_draw", "perturb_ratio", "num_neighbors")
TEACHER_OPTIONS = ("consistency_weight", "meta_start_step", "meta_rampup_steps", "meta_every", "teacher_source")
HNML_OPTIONS = (
    *("inner_direction", "inner_consistency_weight", "consistency_form", "balance_weight", "gauge_fraction"),
    *("mask_weight", "mask_level", "cam_weight", "background_weight", "cam_threshold", "mask_temperature"),
)


@dataclass
class HNMLTrainingArguments(TrainingArguments):
    """transformers' [`TrainingArguments`] with the options of the method. Sources: "MLNT" is Li et al., CVPR 2019,
    "ELR" Liu et al., NeurIPS 2020, "GCE" Zhang & Sabuncu, NeurIPS 2018, "ours" a choice of this project."""

    _argument_group_name = "method and training"  # of `--help`; the first ones are transformers' own

    # -- objective --
    objective: Literal["hnml", "mlnt", "ce", "gce", "elr", "mean_teacher"] = field(
        default="hnml", metadata={"help": "What to minimise: `hnml`, or one of the baselines in the same trainer."}
    )
    gce_q: float = field(
        default=0.7, metadata={"help": "GCE's q in (0, 1]: 0 is cross-entropy, 1 mean absolute error (GCE)."}
    )
    elr_weight: float = field(default=3.0, metadata={"help": "Weight of ELR's regulariser (ELR, CIFAR-10)."})
    elr_decay: float = field(
        default=0.7,
        metadata={"help": "Decay of a sample's running predictions, in [0, 1); `teacher_source=memory` too (ELR)."},
    )

    targets: Literal["given", "posterior"] | None = field(
        default=None,
        metadata={
            "help": "What the base loss asks for: the given label, or the probability of each class to be the true "
            "one, by the judge of the frozen features. Default: `posterior` where training starts from the judge's "
            "head, unless samples have weights, images are mixed, or the objective takes labels alone (ours)."
        },
    )

    # -- meta-training: the virtual step --
    inner_direction: Literal["synthetic", "momentum"] = field(
        default="momentum",
        metadata={
            "help": "Where the virtual step goes: down the gradient of synthetic labels (MLNT), or ahead along the "
            "running gradient of the given labels (ours)."
        },
    )
    meta_scope: Literal["head", "last_stage", "full"] = field(
        default="full", metadata={"help": "Weights that a synthetic virtual step moves; `head` has a closed form."}
    )
    second_order: bool | None = field(
        default=None,
        metadata={"help": "Differentiate through the virtual step; default: only for `head`, where it costs nothing."},
    )
    meta_lr: float | None = field(
        default=None,
        metadata={
            "help": "Length of the virtual step. Defaults: momentum 40 times the learning rate, head 20 in units of "
            "1 / mean kernel diagonal, last_stage 1.0 (ours); full 0.2 (MLNT)."
        },
    )
    num_meta_draws: int = field(default=1, metadata={"help": "Synthetic label sets per step (MLNT has 10)."})
    label_draw: Literal["neighbors", "uniform", "confusion"] = field(
        default="neighbors",
        metadata={
            "help": "What a relabelled sample's synthetic label is: a nearest neighbour's (MLNT), that of any other "
            "class, or of one with which the teacher confuses its class in the batch (ours)."
        },
    )
    perturb_ratio: float = field(default=0.5, metadata={"help": "Share of the batch that a draw relabels (MLNT)."})
    num_neighbors: int = field(
        default=10,
        metadata={"help": "A relabelled sample takes the label of one of so many nearest neighbours (MLNT)."},
    )
    inner_consistency_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the consistency inside the virtual step's loss (ours; 0 as in MLNT)."},
    )

    # -- the two levels of the outer loss --
    consistency_weight: float = field(
        default=3.0, metadata={"help": "Weight of the consistency with the teacher (ours)."}
    )
    consistency_form: Literal["additive", "refurbished"] = field(
        default="additive",
        metadata={
            "help": "`additive`: beside the loss on the given label. `refurbished`: in its place as far as the label "
            "is estimated to be wrong; its weight is at most 1 (ours)."
        },
    )
    mask_weight: float = field(default=1.0, metadata={"help": "Weight of the mask-guided self-learning (ours)."})
    mask_level: Literal["feature", "image"] = field(
        default="feature",
        metadata={
            "help": "Cut the foreground out of the feature map, at no cost, or out of the image, for one more pass "
            "(`inner_direction=momentum` only) (ours)."
        },
    )
    cam_weight: float = field(default=0.5, metadata={"help": "Weight of the map agreement within it (ours)."})
    background_weight: float = field(
        default=0.0, metadata={"help": "Weight of the background's uniformity within it (ours)."}
    )
    cam_threshold: float = field(
        default=0.3, metadata={"help": "Share of a map's maximum above which a cell is foreground, in [0, 1] (ours)."}
    )
    mask_temperature: float = field(
        default=1.0, metadata={"help": "Below 1 the foreground's target is sharpened (ours)."}
    )
    balance_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the term by which a batch's predictions leave no class out (Tanaka et al., 2018)."
        },
    )
    forward_correction: bool = field(
        default=False,
        metadata={
            "help": "Ask the network for the probability of the given labels, where a share of them is wrong, not for "
            "the labels themselves (Patrini et al., CVPR 2017, for symmetric noise). The share is estimated from the "
            "run's own records after each epoch, from the second one on, or by the cross-validation of the probe that "
            "it starts from (ours)."
        },
    )
    gauge_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training labels that no loss sees: how well they are fitted beside the others tells "
            "how much is memorised, and the meta terms are as strong as that. Default: as many as 500 labels are, "
            "from 0.01 to 0.1. 0: none, the meta terms are always at full strength (ours)."
        },
    )
    meta_start_step: float = field(
        default=0.0,
        metadata={"help": "Steps of plain training first; below 1 a share of all steps (MLNT: 500 steps)."},
    )
    meta_rampup_steps: float = field(
        default=0.0,
        metadata={"help": "Steps over which the meta terms grow to full strength; below 1 a share of all steps."},
    )

    meta_every: int = field(
        default=1,
        metadata={
            "help": "Take the meta terms every so many steps only, unscaled; the look-ahead is taken in all (ours)."
        },
    )

    # -- teacher --
    teacher_source: Literal["ema", "memory"] = field(
        default="ema",
        metadata={
            "help": "Where targets come from: a pass of the averaged weights over each batch, or each sample's "
            "running average of the student's predictions, which costs no pass (ours)."
        },
    )
    memory_top_k: int = field(
        default=0,
        metadata={
            "help": "Classes kept per sample in that average, in a file on disk; 0 keeps all if they take at most "
            "256 MiB, else 10 (ours)."
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

    # -- pretrained backbones --
    freeze_batch_norm: bool = field(
        default=False,
        metadata={
            "help": "Keep the backbone's batch-norm statistics as they came. Those of a small dataset, or of another "
            "image size, may be far from what pretrained weights expect (ours)."
        },
    )

    # -- several processes --
    rank_sync_steps: int = field(
        default=0,
        metadata={"help": "Stop if the processes hold different weights: compare a hash of them every so many steps."},
    )

    allow_uncompiled: bool = field(
        default=False,
        metadata={"help": "Where `torch_compile` fails, go on with that part uncompiled instead of stopping (ours)."},
    )

    # -- defaults of the parent that are changed; what becomes of the others: parent_options.py --
    do_train: bool = field(default=True, metadata={"help": "Always true: other scripts evaluate and predict."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Train in bfloat16. Default: on a GPU that has it, unless `fp16` is set."}
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
            ("cam_threshold", 0, 1),
            ("teacher_decay", 0, 1),
            ("gauge_fraction", 0, 0.5),
        ):
            value = getattr(self, name)
            self._require(name, value is None or low <= value <= high, f"between {low} and {high}")
        self._require("gce_q", self.gce_q > 0, "above 0")
        for name in ("elr_decay", "teacher_decay"):  # an average with a decay of 1 stays what it was at the start
            self._require(name, getattr(self, name) < 1, "below 1")
        self._require("cam_threshold", self.cam_threshold < 1, "below 1")  # no cell lies above its map's maximum
        for name in ("num_meta_draws", "num_neighbors", "meta_every"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "elr_weight",
            "inner_consistency_weight",
            "consistency_weight",
            "mask_weight",
            "cam_weight",
            "background_weight",
            "balance_weight",
            "meta_start_step",
            "meta_rampup_steps",
            "rank_sync_steps",
            "memory_top_k",
        ):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("mask_temperature", self.mask_temperature > 0, "above 0")
        self._require("meta_lr", self.meta_lr is None or self.meta_lr >= 0, "at least 0")
        for name, kind in HNMLTrainingArguments.__annotations__.items():
            if name == "targets" and self.targets is None:
                continue
            kind = get_args(kind)[0] if name == "targets" else kind
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"`{name}={getattr(self, name)!r}` is none of {', '.join(get_args(kind))}.")
        if self.consistency_form == "refurbished" and self.consistency_weight > 1:
            raise ValueError(
                f"`consistency_form='refurbished'` with `consistency_weight={self.consistency_weight}` would train "
                "against the given labels: it takes their place by that share. Set `consistency_weight` to at most 1."
            )
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
                "`meta_scope='head'`, `inner_direction='momentum'` or a smaller batch with "
                "`gradient_accumulation_steps`."
            )
        if self.fp16 and synthetic and self.meta_scope != "head":
            raise ValueError(
                "`fp16` scales the loss, but not that of a virtual step, whose gradient would be rounded to 0. Use "
                "`bf16`, `meta_scope='head'` or `inner_direction='momentum'`."
            )
        if synthetic and self.mask_level == "image":
            raise ValueError(
                "`mask_level='image'` looks at the batch again at the network's own weights, which a synthetic step "
                "moves. Use `inner_direction='momentum'`, or `mask_level='feature'`."
            )
        if self.meta_lr is None:
            self.meta_lr = DEFAULT_META_LR[self.meta_scope] if synthetic else HORIZON * self.learning_rate
        if self.second_order is None:
            self.second_order = self.meta_scope == "head"
        if self.torch_compile and synthetic and self.meta_scope != "head" and self.second_order:
            raise ValueError(
                "`torch_compile` cannot differentiate a compiled backward again, which second-order virtual steps "
                "need. Use `second_order=False`, `meta_scope='head'` or `inner_direction='momentum'`."
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
                f"Without effect in this run, which has `objective={self.objective}` and `inner_direction="
                f"{self.inner_direction}`: {', '.join(f'`{name}`' for name in without_effect)}."
            )

    def _without_effect(self) -> list[str]:
        """Options of the method that differ from their defaults, and that the objective does not look at."""
        unused = [] if self.draws_labels else ["inner_consistency_weight", *SYNTHETIC_OPTIONS]
        unused += [] if self.objective in TEACHER_OBJECTIVES else TEACHER_OPTIONS
        unused += [] if self.objective == "hnml" else HNML_OPTIONS
        unused += [] if self.objective in ("hnml", "mlnt") else ["meta_lr"]
        unused += [] if self.objective == "gce" else ["gce_q"]
        unused += [] if self.objective == "elr" else ["elr_weight"]
        remembers = self.objective == "elr" or self.teacher_source == "memory"
        unused += [] if remembers else ["elr_decay", "memory_top_k"]
        defaults = {option.name: option.default for option in fields(self)}
        return [name for name in dict.fromkeys(unused) if getattr(self, name) != defaults[name]]

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
    def draws_labels(self) -> bool:
        """Whether a step goes down the gradient of synthetic labels."""
        return self.objective == "mlnt" or (self.objective == "hnml" and self.inner_direction == "synthetic")

    @property
    def recomputes_activations(self) -> bool:
        """`activation_checkpointing`, which older versions of transformers know as `gradient_checkpointing` only."""
        return bool(getattr(self, "activation_checkpointing", False) or self.gradient_checkpointing)

    def takes_soft_labels(self) -> bool:
        """Whether the objective has a meaning for images, and labels, that are mixed."""
        additive = self.inner_direction == "momentum" and self.consistency_form == "additive"
        return self.objective == "ce" or (self.objective == "hnml" and additive and self.teacher_source == "ema")

    def takes_soft_targets(self) -> bool:
        """Whether the base loss of the objective has a meaning for a distribution in the place of a label."""
        additive = self.inner_direction == "momentum" and self.consistency_form == "additive"
        return self.objective in ("ce", "elr", "mean_teacher") or (self.objective == "hnml" and additive)

    def memory_advice(self) -> str:
        """What to change when a training step does not fit into memory, the mildest change first."""
        advice = []
        if self.draws_labels:
            if self.num_meta_draws > 1 and self.meta_scope != "head":
                advice.append(f"`--num_meta_draws 1` (each of the {self.num_meta_draws} keeps a whole pass)")
            if self.second_order and self.meta_scope != "head":
                advice.append("`--second_order false`")
            smaller = {"full": ("last_stage", "head"), "last_stage": ("head",), "head": ()}[self.meta_scope]
            advice += [f"`--meta_scope {scope}`" for scope in smaller]
        if self.objective in TEACHER_OBJECTIVES and self.teacher_source == "ema":
            advice.append("`--teacher_source memory --eval_teacher false` (no second network)")
        if self.per_device_train_batch_size > 1:
            half, steps = self.per_device_train_batch_size // 2, self.gradient_accumulation_steps * 2
            advice.append(f"`--per_device_train_batch_size {half} --gradient_accumulation_steps {steps}`")
        return (
            f"A step of `{self.objective}` does not fit. In this order: {', then '.join(advice)}. `--meta_every` "
            "makes such steps rarer, not smaller. `python scripts/benchmarks/benchmark.py cost` shows what each form "
            "needs."
        )

    def _require(self, name: str, holds: bool, wanted: str):
        if not holds:
            raise ValueError(f"`{name}={getattr(self, name)}` must be {wanted}.")


def cuda_has_bf16() -> bool:
    """Whether there is a CUDA device that computes in bfloat16, and does not only emulate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
