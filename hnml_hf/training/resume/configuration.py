"""What a run of [`HNMLTrainer`] that goes on must have in common with the one that it continues."""

import hashlib
import re

from ..args import HNMLTrainingArguments


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


def fixed_configuration(trainer) -> dict:
    """What a run that goes on must have in common with the one that it continues: what its batches, and the state of
    optimizer, teacher, memory, monitor and records, are made of or belong to; JSON values."""
    args, data = trainer.args, trainer.train_dataset
    options = args.to_dict()
    return {
        "processes": args.world_size,
        **{name: options.get(name) for name in FIXED_OPTIONS},
        "objective": args.objective,
        "targets": trainer.targets,
        "monitor_fraction": 0.0 if trainer.monitor is None else trainer.monitor.fraction,
        "teacher_source": args.teacher_source,
        "eval_teacher": args.eval_teacher,
        "backbone": trainer.model.config.architecture,
        "data_collator": described(trainer.data_collator),
        "training samples": len(data),
        "their ids and labels": digest(data.index, data.labels),
        "their weights": None if data.weights is None else digest(data.weights),
    }


def changeable_configuration(trainer) -> dict:
    """What else its course depends on, and may be changed for the rest of it; JSON values."""
    options, data = trainer.args.to_dict(), trainer.train_dataset
    own = HNMLTrainingArguments.__annotations__.keys() - fixed_configuration(trainer).keys()
    judged = {} if trainer.targets == "given" else {"likeliest classes of the targets": digest(data.targets[0][:, 0])}
    return judged | {
        **{name: options.get(name) for name in FREE_OPTIONS},
        **{name: options[name] for name in sorted(own)},
        "batch_norm_frozen": trainer.model.batch_norm_frozen,
        "model_args": trainer.model.config.model_args,
        **{f"transform to {name}": described(view) for name, view in data.views.items()},
    }


def described(part) -> str:
    """Its `repr` on one line and without addresses in memory, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(part).split()))


def digest(*arrays) -> str:
    """A short hash of the contents of arrays."""
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8).hexdigest()
