"""What becomes of each option of transformers' `TrainingArguments` here: used, refused with a reason, or changed.

One table of all fields; a test fails when transformers adds one that is not in it. What cannot work is refused when
the options are made, before any data are read.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from typing import Any, Literal

import torch
from accelerate.utils import DynamoBackend, str_to_bool
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames
from transformers.utils.logging import log_levels

from .extrapolation import running_directions


@dataclass(frozen=True)
class ParentOption:
    """What becomes of an option.

    Args:
        use (`"used"`, `"refused"` or `"changed"`): as in transformers; only its default is accepted; or it has
            another default or meaning here.
        text (`str`): why it is refused, or what it means here.
        holds (`Callable`): whether a value that is not None can work.
        wanted (`str`): the same in words.
        resolved (`tuple`): of a refused option, what transformers makes of the default.
    """

    use: Literal["used", "refused", "changed"]
    text: str = ""
    holds: Callable[[Any], bool] = lambda value: True
    wanted: str = ""
    resolved: tuple = ()


def used(holds: Callable[[Any], bool] = lambda value: True, wanted: str = "") -> ParentOption:
    return ParentOption("used", holds=holds, wanted=wanted)


def between(low: float, high: float = math.inf) -> ParentOption:
    """A finite number of this range."""
    wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
    return used(lambda value: low <= value <= high and math.isfinite(value), f"a finite number, {wanted}")


def whole(low: int, high: float = math.inf) -> ParentOption:
    """A whole number of this range."""
    entry = between(low, high)
    return used(lambda value: value == int(value) and entry.holds(value), entry.wanted.replace("finite", "whole"))


def above(low: float) -> ParentOption:
    return used(lambda value: value > low and math.isfinite(value), f"a finite number above {low:g}")


def one_of(*values) -> ParentOption:
    return used(lambda value: value in values, f"one of {', '.join(map(str, values))}")


def refused(reason: str, *resolved) -> ParentOption:
    return ParentOption("refused", reason, resolved=resolved)


def changed(text: str, holds: Callable[[Any], bool] = lambda value: True, wanted: str = "") -> ParentOption:
    return ParentOption("changed", text, holds=holds, wanted=wanted)


NO_TOKENS = "an image has no tokens"
NO_CHOICES = "timm switches activation checkpointing on or off and takes no options for it"
LANGUAGE_MODELS = "it is of language models"
SHARDED = (
    "FSDP and DeepSpeed hold a part of the weights on each process, but the teacher and the virtual step need all of "
    "them; start with `accelerate launch --multi_gpu` instead"
)
COUNT, SHARE, SEED = whole(1), used(lambda value: 0 <= value < 1, "at least 0 and below 1"), whole(0, 2**32 - 1)
LIMIT = between(0)
RATE = (LIMIT.holds, LIMIT.wanted)
INTERVAL = above(0)  # below 1 it is a share of all steps
OPTIMIZERS = [name.value for name in OptimizerNames]
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate reads them

PARENT_OPTIONS = {
    "output_dir": used(),
    "per_device_train_batch_size": COUNT,
    "num_train_epochs": above(0),
    "max_steps": used(
        lambda value: value == -1 or COUNT.holds(value), "at least 1, or -1 to train for `num_train_epochs`"
    ),
    "learning_rate": changed("0.05 by default, for SGD from random weights.", *RATE),
    "lr_scheduler_type": changed("Cosine by default."),
    "lr_scheduler_kwargs": used(
        lambda value: isinstance(value, dict) or value.lstrip().startswith("{"), "a mapping of its arguments"
    ),
    "warmup_steps": LIMIT,
    "warmup_ratio": used(lambda value: 0 <= value <= 1, "between 0 and 1"),
    "optim": changed("SGD by default.", OPTIMIZERS.__contains__, f"one of {', '.join(OPTIMIZERS)}"),
    "optim_args": changed(
        "Momentum 0.9 by default.",
        lambda value: all("=" in pair for pair in value.split(",")) or not value,
        "pairs `name=value` with commas between them",
    ),
    "optim_target_modules": refused(
        "no optimizer that it is for (GaLore, APOLLO) keeps a running gradient per weight"
    ),
    "weight_decay": LIMIT,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": LIMIT,
    "gradient_accumulation_steps": COUNT,
    "average_tokens_across_devices": refused(NO_TOKENS),
    "max_grad_norm": used(lambda value: value >= 0, "at least 0, which is no clipping"),
    "label_smoothing_factor": refused("label smoothing is not part of these objectives"),
    "bf16": used(),
    "fp16": used(),
    "bf16_full_eval": refused("it would convert the student alone; `bf16` already evaluates in half precision"),
    "fp16_full_eval": refused("it would convert the student alone; `fp16` already evaluates in half precision"),
    "tf32": used(),
    "activation_checkpointing": used(),
    "activation_checkpointing_kwargs": refused(NO_CHOICES),
    "gradient_checkpointing": used(),
    "gradient_checkpointing_kwargs": refused(NO_CHOICES),
    "torch_compile": used(),
    "torch_compile_backend": one_of(*sorted(backend.value.lower() for backend in DynamoBackend)),
    "torch_compile_mode": one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "use_liger_kernel": refused(LANGUAGE_MODELS),
    "liger_kernel_config": refused(LANGUAGE_MODELS),
    "use_cache": refused(LANGUAGE_MODELS),
    "neftune_noise_alpha": refused(f"{LANGUAGE_MODELS}: it adds noise to the embeddings of tokens"),
    "torch_empty_cache_steps": COUNT,
    "auto_find_batch_size": refused(
        "a run that starts again with half a batch keeps the weights and the records of the steps before; when a step "
        "does not fit into memory, the error says what to change"
    ),
    "logging_strategy": used(),
    "logging_steps": INTERVAL,
    "logging_first_step": used(),
    "log_on_each_node": used(),
    "logging_nan_inf_filter": used(),
    "include_num_input_tokens_seen": refused(NO_TOKENS, "no", False),
    "log_level": one_of(*log_levels, "passive"),
    "log_level_replica": one_of(*log_levels, "passive"),
    "logging_dir": used(),
    "disable_tqdm": used(),
    "report_to": used(),
    "run_name": used(),
    "project": used(),
    "trackio_space_id": used(),
    "trackio_bucket_id": used(),
    "trackio_static_space_id": used(),
    "eval_strategy": used(),
    "eval_steps": INTERVAL,
    "eval_delay": LIMIT,
    "per_device_eval_batch_size": COUNT,
    "prediction_loss_only": refused(
        "accuracy, audit and card come from the predictions; leave evaluation out by `eval_strategy=no`"
    ),
    "eval_on_start": used(),
    "eval_do_concat_batches": refused("the metrics are of all predictions together"),
    "eval_use_gather_object": refused("the outputs are tensors, which are gathered as such"),
    "eval_accumulation_steps": COUNT,
    "include_for_metrics": refused("the metrics look at predictions and labels alone"),
    "batch_eval_metrics": refused("the metrics are of all predictions together"),
    "save_only_model": used(),
    "save_strategy": used(),
    "save_steps": INTERVAL,
    "save_on_each_node": refused("one checkpoint, on a disk that all nodes see, is what all of them resume from"),
    "save_total_limit": whole(0),
    "enable_jit_checkpoint": refused("SIGTERM already finishes the step and saves, on all processes at the same step"),
    "push_to_hub": used(),
    "hub_token": used(),
    "hub_private_repo": changed("Whether a new repository on the Hub is private. Default: it is."),
    "hub_model_id": used(),
    "hub_strategy": used(),
    "hub_always_push": used(),
    "hub_revision": used(),
    "load_best_model_at_end": used(),
    "metric_for_best_model": used(),
    "greater_is_better": used(),
    "ignore_data_skip": refused(
        "a resumed run would see some images of its epoch twice and others not at all; to skip the batches costs "
        "little, since their images are not decoded"
    ),
    "restore_callback_states_from_checkpoint": used(),
    "full_determinism": used(),
    "seed": SEED,
    "data_seed": SEED,
    "use_cpu": used(),
    "accelerator_config": changed(
        "Only `non_blocking` can be set.",
        lambda value: not isinstance(value, str) or value.lstrip().startswith("{") or os.path.isfile(value),
        "a mapping, or a JSON file that is there",
    ),
    "parallelism_config": refused(SHARDED),
    "dataloader_drop_last": used(),
    "dataloader_num_workers": whole(0),
    "dataloader_pin_memory": used(),
    "dataloader_persistent_workers": used(),
    "dataloader_prefetch_factor": COUNT,
    "dataloader_multiprocessing_context": one_of(*multiprocessing.get_all_start_methods()),
    "dataloader_in_order": refused("batches that come in another order each time cannot be resumed exactly"),
    "remove_unused_columns": refused("sample ids and clean labels must reach the trainer"),
    "label_names": refused("a batch has its labels in `labels`; for the names of classes there is `class_names`"),
    "train_sampling_strategy": one_of("random", "sequential"),
    "group_by_length": refused("an image has no length"),
    "length_column_name": refused("an image has no length"),
    "ddp_find_unused_parameters": changed("False by default: timm classifiers use all of their parameters."),
    "ddp_bucket_cap_mb": COUNT,
    "ddp_broadcast_buffers": used(),
    "ddp_static_graph": refused("not all steps compute the same terms"),
    "ddp_backend": used(),
    "ddp_timeout": COUNT,
    "fsdp": refused(SHARDED, "", []),
    "fsdp_config": refused(SHARDED),
    "deepspeed": refused(SHARDED),
    "debug": refused("a step that is not finite stops the run and names its images", []),
    "skip_memory_metrics": used(),
    "do_train": changed("Always true: this trains. Other scripts evaluate and predict.", bool, "true"),
    "do_eval": changed("Follows `eval_strategy`; at the end the test set is measured in any case."),
    "do_predict": refused("`scripts/predict.py` predicts"),
    "resume_from_checkpoint": changed(
        "Go on from a checkpoint: its folder, `true` for the newest complete one in `output_dir`, or `auto` for that "
        "one if there is any."
    ),
    "local_rank": used(),
}


def check_parent_options(args: TrainingArguments):
    """Raise `ValueError` on an option as it was given, before transformers has made anything of it."""
    for option in fields(args):
        entry, value = PARENT_OPTIONS.get(option.name), getattr(args, option.name)
        if entry is None or value is None:
            continue
        default = option.default
        if default is MISSING and option.default_factory is not MISSING:
            default = option.default_factory()
        if entry.use == "refused" and value != default and value not in entry.resolved:
            raise ValueError(f"`{option.name}={value!r}` is not available here: {entry.text}. Leave it out.")
        if not _holds(entry, value):
            raise ValueError(f"`{option.name}={value!r}` cannot work: it must be {entry.wanted}.")
    given = args.accelerator_config
    if isinstance(given, str) and given.lstrip().startswith("{"):
        given = json.loads(given)
    unknown = (
        sorted(given.keys() - {option.name for option in fields(AcceleratorConfig)}) if isinstance(given, dict) else ()
    )
    if unknown:
        raise ValueError(f"`accelerator_config={given}`: there is no `{unknown[0]}`. Only `non_blocking` can be set.")
    if args.ddp_backend is not None and not _one_of_several_processes():
        raise ValueError(
            f"`ddp_backend={args.ddp_backend}` is how several processes talk, and this one is alone. Start them by "
            "`accelerate launch --multi_gpu --num_processes 2 -m hnml_hf train ...`, or leave it out."
        )
    if args.do_eval and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError("`do_eval` does nothing by itself; say when to evaluate by `eval_strategy`, or leave it out.")
    if args.load_best_model_at_end and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError("`load_best_model_at_end` chooses nothing without evaluations: say when by `eval_strategy`.")
    measured = args.eval_strategy != IntervalStrategy.NO and args.metric_for_best_model is not None
    if args.save_strategy == SaveStrategy.BEST and not measured:
        raise ValueError("`save_strategy=best` saves nothing without `eval_strategy` and `metric_for_best_model`.")


def _one_of_several_processes() -> bool:
    return "LOCAL_RANK" in os.environ or any(os.environ.get(name, "1") != "1" for name in WORLD_SIZES)


def _holds(entry: ParentOption, value) -> bool:
    try:
        return bool(entry.holds(value))
    except (TypeError, ValueError, OverflowError):  # of another type, or no number
        return False


def take_launcher_options(args: TrainingArguments):
    """Make options of what accelerate's launcher says by environment variables, so that the same checks see it.

    Raises:
        ValueError: if that cannot work here.
    """
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if str_to_bool(os.environ.get(f"ACCELERATE_USE_{kind}", "false")):
            raise ValueError(f"The launcher asks for {kind}, which is not available here: {SHARDED}.")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"The launcher asks for `mixed_precision={precision}`; there are `no`, `fp16` and `bf16`.")
    if precision != "no" and not (args.fp16 or args.bf16):
        setattr(args, precision, True)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no" and not args.torch_compile:
        if not PARENT_OPTIONS["torch_compile_backend"].holds(backend):
            wanted = PARENT_OPTIONS["torch_compile_backend"].wanted
            raise ValueError(f"The launcher asks for `dynamo_backend={backend}`; it must be {wanted}.")
        args.torch_compile, args.torch_compile_backend = True, backend
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        args.use_cpu = True  # or else transformers takes each process for the only one


def check_resolved_options(args: TrainingArguments):
    """Raise `ValueError` on options that only show together, or on this machine, that they cannot work."""
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("`fp16` needs a GPU. On a CPU leave it out, or use `bf16` with `use_cpu`.")
    defaults = AcceleratorConfig()
    for option in fields(defaults):
        value, default = (getattr(config, option.name, None) for config in (args.accelerator_config, defaults))
        if option.name != "non_blocking" and value != default:
            raise ValueError(
                f"`accelerator_config` with `{option.name}={value!r}` is not available here: the sample order would "
                "not follow from seed and epoch, or not alike on all processes. Only `non_blocking` can be set."
            )
    check_optimizer(args)


FAILURES = (ValueError, TypeError, ImportError, KeyError, AttributeError, ArithmeticError, RuntimeError)


def check_optimizer(args: TrainingArguments):
    """Make optimizer and schedule for one weight.

    Raises:
        ValueError: if they cannot be made, or if the run extrapolates along a momentum that the optimizer has not.
    """
    weight = torch.nn.ParameterList([torch.zeros(2, 2)])
    chosen = f"`optim={_word(args.optim)}` with `optim_args={args.optim_args!r}`"
    try:
        make, options = Trainer.get_optimizer_cls_and_kwargs(args, weight)
        real = isinstance(make, type) and issubclass(make, torch.optim.Optimizer)  # else a factory for whole models
        if real:
            optimizer = make(weight.parameters(), **options)
        else:
            optimizer = torch.optim.SGD(weight.parameters(), lr=args.learning_rate)
        _require_finite(options)
    except FAILURES as error:
        raise ValueError(f"{chosen} cannot be made: {_said(error)}") from error
    default = next(option.default for option in fields(args) if option.name == "optim_args")
    if args.optim_args and args.optim_args != default and type(optimizer).__module__.startswith("torch.optim"):
        names = {pair.partition("=")[0] for pair in args.optim_args.replace(" ", "").split(",")}
        ignored = sorted(names - options.keys())  # transformers takes what it knows
        if ignored:
            raise ValueError(f"{chosen} cannot be made: `{ignored[0]}` has no effect on it.")
    if real and getattr(args, "extrapolation", None):
        running_directions(optimizer)
    schedule_options = f"`lr_scheduler_kwargs={args.lr_scheduler_kwargs}`"
    chosen = f"`lr_scheduler_type={_word(args.lr_scheduler_type)}` with {schedule_options}"
    steps = args.max_steps if args.max_steps > 0 else 1000  # how many it will be is not known before the data are
    try:
        _require_finite(args.lr_scheduler_kwargs or {})
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        # some look at their options only when the warmup is over, or at the end
        for step in sorted({0, 1, steps // 2, steps - 1, steps}):
            for factor in getattr(schedule, "lr_lambdas", ()):
                rate = args.learning_rate * factor(step)
                if not (isinstance(rate, Real) and math.isfinite(rate) and float(rate) > -1e-12):
                    raise ValueError(f"the learning rate of step {step} would be {rate}.")
    except FAILURES as error:
        raise ValueError(f"{chosen} cannot be made: {_said(error)}") from error


def _require_finite(options: Mapping):
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` is not finite.")


def _word(choice) -> str:
    return getattr(choice, "value", choice)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
