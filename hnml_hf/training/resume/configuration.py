"""What a run of [`HNMLTrainer`] that goes on must have in common with the one that it continues."""

import hashlib
import re

from ..args import HNMLTrainingArguments


def fixed_of_method(trainer) -> dict:
    """What the state of teacher, memory, monitor and records is made of or belongs to; JSON values."""
    args, data = trainer.args, trainer.train_dataset
    return {
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


def changeable_of_method(trainer) -> dict:
    """What else the course of a run depends on; JSON values."""
    options, data = trainer.args.to_dict(), trainer.train_dataset
    own = HNMLTrainingArguments.__annotations__.keys() - trainer.fixed_configuration().keys()
    return {
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
