"""Every option of transformers is used, changed or refused; what cannot work is refused before data are read."""

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from trainers import arguments
from transformers import TrainingArguments

from hnml_hf.training.parent_options import PARENT_OPTIONS, take_launcher_options


def test_every_option_of_transformers_is_in_the_table():
    """Decide what becomes of a new one: try it, then say so in the table."""
    assert {option.name for option in fields(TrainingArguments)} <= PARENT_OPTIONS.keys()
    assert all(option.text for option in PARENT_OPTIONS.values() if option.use != "used")


OTHER = {  # a value that is not the default, where none follows from the type of the default
    "optim_target_modules": "all-linear",
    "neftune_noise_alpha": 5.0,
    "liger_kernel_config": {"rope": True},
    "include_num_input_tokens_seen": "all",
    "include_for_metrics": ["inputs"],
    "label_names": ["clean_labels"],
    "activation_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "length_column_name": "width",
    "parallelism_config": object(),
    "debug": "underflow_overflow",
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2},
    "deepspeed": "zero3.json",
    "label_smoothing_factor": 0.1,
}


@pytest.mark.parametrize("name", [name for name, option in PARENT_OPTIONS.items() if option.use == "refused"])
def test_what_is_refused_is_refused_with_its_reason(name, tmp_path):
    present = {option.name: option for option in fields(TrainingArguments)}
    if name not in present:
        pytest.skip("not an option of this release of transformers")
    value = OTHER[name] if name in OTHER else name == "remove_unused_columns" or not present[name].default
    with pytest.raises(ValueError, match=f"`{name}=.* is not available here: .*Leave it out"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_epochs": 0.0}, "`num_train_epochs=0.0` cannot work: it must be a finite number above 0"),
        ({"num_train_epochs": math.inf}, "finite number above 0"),
        ({"max_steps": 0}, "`max_steps=0` cannot work: it must be at least 1, or -1"),
        ({"learning_rate": math.nan}, "`learning_rate=nan` cannot work"),
        ({"learning_rate": math.inf}, "`learning_rate=inf` cannot work"),
        ({"weight_decay": -0.1}, "`weight_decay=-0.1` cannot work: it must be a finite number, at least 0"),
        ({"max_grad_norm": math.nan}, "`max_grad_norm=nan` cannot work"),
        ({"warmup_steps": -1}, "`warmup_steps=-1`"),
        ({"adam_beta1": 1.0}, "`adam_beta1=1.0` cannot work"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size=0`"),
        ({"per_device_eval_batch_size": -8}, "`per_device_eval_batch_size=-8`"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps=0`"),
        ({"per_device_train_batch_size": 2.5}, "`per_device_train_batch_size=2.5` .* a whole number, at least 1"),
        ({"max_steps": 1.5}, "`max_steps=1.5` cannot work"),
        ({"max_steps": math.inf}, "`max_steps=inf` cannot work"),
        ({"seed": 1.5}, "`seed=1.5` cannot work"),
        ({"dataloader_num_workers": 0.5}, "`dataloader_num_workers=0.5` cannot work"),
        ({"load_best_model_at_end": True}, "`load_best_model_at_end` chooses nothing without evaluations"),
        ({"logging_steps": -1}, "`logging_steps=-1`"),
        ({"save_steps": 0}, "`save_steps=0`"),
        ({"save_total_limit": -1}, "`save_total_limit=-1`"),
        ({"seed": -1}, "`seed=-1` cannot work: it must be a whole number, between 0 and (4294967295|4.29497e.09)"),
        ({"seed": 2**32}, "`seed=4294967296` cannot work"),
        ({"dataloader_num_workers": -1}, "`dataloader_num_workers=-1`"),
        pytest.param(
            {"dataloader_multiprocessing_context": "thread"},
            "one of .*spawn",
            marks=pytest.mark.skipif(
                not hasattr(TrainingArguments, "dataloader_multiprocessing_context"),
                reason="newer than transformers 5.5",
            ),
        ),
        ({"log_level": "loud"}, "`log_level='loud'` cannot work: it must be one of .*passive"),
        ({"train_sampling_strategy": "group_by_length"}, "one of random, sequential"),
        ({"torch_compile_backend": "nonsense"}, "`torch_compile_backend='nonsense'` cannot work: .*inductor"),
        ({"torch_compile_mode": "fastest"}, "`torch_compile_mode='fastest'` cannot work"),
        ({"do_train": False}, "`do_train=False` cannot work: it must be true"),
        ({"do_eval": True}, "`do_eval` does nothing by itself"),
        ({"report_to": ["tensorbord"]}, "there is no tracker `tensorbord`"),
        ({"save_strategy": "best", "eval_strategy": "steps"}, "`save_strategy=best` saves nothing without"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "`use_seedable_sampler=False` is not available"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches=True` is not available"),
        ({"accelerator_config": {"split_batches": True}}, "`split_batches=True` is not available"),
        ({"fp16": True}, "`fp16` needs a GPU"),
        ({"ddp_backend": "gloo"}, "`ddp_backend=gloo` is how several processes talk, and this one is alone. Start"),
        ({"optim": "adam"}, "`optim='adam'` cannot work: it must be one of adamw_torch, .*sgd"),
        ({"optim_args": "0.9"}, "`optim_args='0.9'` cannot work: it must be pairs `name=value`"),
        ({"lr_scheduler_kwargs": "2"}, "`lr_scheduler_kwargs='2'` cannot work: it must be a mapping"),
        ({"accelerator_config": "5"}, "`accelerator_config='5'` cannot work: it must be a mapping, or a JSON file"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "`lr_scheduler_type=warmup_stable_decay` .* cannot be made"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "`lr_scheduler_type=cosine_with_min_lr` .* cannot be made"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "`lr_scheduler_kwargs=.*cycles.* cannot be made"),
        (
            {
                "lr_scheduler_type": "cosine_with_restarts",
                "lr_scheduler_kwargs": {"num_cycles": "x"},
                "warmup_steps": 2,
            },
            "`lr_scheduler_type=cosine_with_restarts` .* cannot be made",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "learning_rate": 0.0},
            "`lr_scheduler_type=cosine_with_min_lr` .* cannot be made: .*division",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": math.nan}},
            "cannot be made: `min_lr` is not finite",
        ),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}}, "cannot be made: (0.0|zero)"),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}}, "cannot be made: .*zero"),
        ({"optim_args": "momentum=nan"}, "`optim_args='momentum=nan'` cannot be made: `momentum` is not finite"),
        ({"accelerator_config": {"dispatch": True}}, "`accelerator_config=.* there is no `dispatch`"),
        ({"optim": "galore_adamw"}, "`optim=galore_adamw` .* cannot be made"),
        ({"optim_args": "momentum=lots"}, "`optim_args='momentum=lots'` cannot be made"),
        ({"optim_args": "impetus=0.9"}, "`optim_args='impetus=0.9'` cannot be made"),
        ({"optim_args": "momentum"}, "`optim_args='momentum'` cannot work: it must be pairs"),
    ],
)
def test_a_value_that_cannot_work_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_what_works_is_let_through(tmp_path):
    arguments(
        tmp_path,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 2},
        warmup_steps=0.1,
        accelerator_config={"non_blocking": True},
        max_grad_norm=0,
        save_total_limit=0,
        eval_strategy="epoch",
        optim="adamw_torch",
        optim_args=None,
    )


def test_nothing_is_drawn_from_the_global_generator(tmp_path):
    """To make an optimizer on trial must not change what a seed means."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    arguments(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


ALIASES = [
    ({"gradient_checkpointing": True}, "`activation_checkpointing` does not go with"),
    ({"torch_compile_backend": "eager", "second_order": True}, "`torch_compile` cannot differentiate"),
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(("options", "message"), ALIASES)
def test_an_alias_is_refused_like_the_option(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, objective="hnml_synthetic", meta_scope="full", **options)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "`fp16` scales the loss"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision=fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "`torch_compile` cannot differentiate"),
        ("ACCELERATE_DYNAMO_BACKEND", "NONSENSE", "`dynamo_backend=nonsense`; it must be one of .*inductor"),
        ("ACCELERATE_USE_FSDP", "true", "The launcher asks for FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "The launcher asks for DEEPSPEED"),
    ],
)
def test_what_the_launcher_says_is_checked_like_an_option(variable, value, message, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, objective="hnml_synthetic", meta_scope="full", second_order=True)


@pytest.mark.parametrize(("processes", "gpu", "cpu"), [(2, False, True), (2, True, False), (1, False, False)])
def test_several_processes_without_a_gpu_are_processes_of_the_cpu(processes, gpu, cpu, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: gpu)
    args = SimpleNamespace(use_cpu=False, fp16=False, bf16=False, torch_compile=False)
    take_launcher_options(args)
    assert args.use_cpu == cpu


def test_the_launchers_precision_is_an_option_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments(tmp_path).bf16
