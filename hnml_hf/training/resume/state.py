"""[`TrainingStateMixin`]: what a checkpoint holds beside transformers' part: teacher, memory, gauge and records."""

import hashlib
import json
import os
import re

from safetensors.torch import load_file, save_file

from ...modeling.finite import require_finite_weights
from ..args import HNMLTrainingArguments
from ..dynamics import STATISTICS_FILE


TEACHER_FOLDER = "teacher"
MEMORY_FILE = "target_memory.safetensors"
GAUGE_FILE = "memorization_gauge.json"


class TrainingStateMixin:
    """Writing and reading the state of a [`HNMLTrainer`], for its parts as far as it has them."""

    def run_facts(self):
        data = self.train_dataset
        return {
            **super().run_facts(),
            "objective": self.args.objective,
            "targets": self.targets,
            "gauge_fraction": 0.0 if self.gauge is None else self.gauge.fraction,
            **{name: getattr(self.args, name) for name in ("teacher_source", "memory_top_k", "eval_teacher")},
            "backbone": self.model.config.architecture,
            "data_collator": described(self.data_collator),
            "training samples": len(data),
            "their ids and labels": digest(data.index, data.labels),
            "their weights": None if data.weights is None else digest(data.weights),
        }

    def run_settings(self):
        options, own = self.args.to_dict(), HNMLTrainingArguments.__annotations__.keys() - self.run_facts().keys()
        return {
            **super().run_settings(),
            **{name: options[name] for name in sorted(own)},
            "model_args": self.model.config.model_args,
            **{f"transform to {name}": described(view) for name, view in self.train_dataset.views.items()},
        }

    def progress(self):
        kinds = [[sorted(kind), ratio, self.cost_meter.steps[kind]] for kind, ratio in self.cost_meter.ratios.items()]
        return {
            **super().progress(),
            "figures": self.monitor.state(),
            "cost": kinds,
            "noise_rate": self.noise_rate,
        }

    def load_progress(self, progress):
        super().load_progress(progress)
        self.monitor.load_state(progress["figures"], self.args.device)
        self.noise_rate = progress["noise_rate"]
        for kind, ratio, steps in progress["cost"]:
            self.cost_meter.ratios[frozenset(kind)], self.cost_meter.steps[frozenset(kind)] = ratio, steps

    def _save_checkpoint(self, model, trial):
        self.update_statistics()
        self._require_finite("No checkpoint was written; lower `--learning_rate` and resume from the last one.")
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir=None, _internal_call=False):
        self._require_finite("They were not saved; lower `--learning_rate`, and start again or from a checkpoint.")
        super().save_model(output_dir, _internal_call)

    def _require_finite(self, advice: str):
        """Before weights are written, on all processes, so that none waits for another."""
        for network in filter(None, (self.model, self.teacher)):
            of = f"the model after step {self.state.global_step}"
            require_finite_weights(network.state_dict(), of=of, advice=advice)

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint holds the student, the teacher beside it and the memory; a final save what was evaluated."""
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        if self._writing_aside:  # a checkpoint, whatever the folder's name is
            self.model.save_pretrained(output_dir, state_dict=state_dict)
            if self.teacher is not None:
                self.teacher.module.save_pretrained(os.path.join(output_dir, TEACHER_FOLDER))
            if self.memory is not None:
                save_file(self.memory.state_dict(), os.path.join(output_dir, MEMORY_FILE))
            if self.gauge is not None:
                with open(os.path.join(output_dir, GAUGE_FILE), "w", encoding="utf-8") as file:
                    json.dump(self.gauge.state_dict(), file)
            if self.statistics is not None:
                self.statistics.save(os.path.join(output_dir, STATISTICS_FILE))
        else:
            self.evaluated_model().save_pretrained(output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_teacher_and_memory(resume_from_checkpoint)
        if self.gauge is not None:
            with open(os.path.join(resume_from_checkpoint, GAUGE_FILE), encoding="utf-8") as file:
                self.gauge.load_state_dict(json.load(file))
        if self.statistics is not None:
            self.statistics.load(os.path.join(resume_from_checkpoint, STATISTICS_FILE))

    def _load_best_model(self):
        super()._load_best_model()
        self._load_teacher_and_memory(self.state.best_model_checkpoint)

    def _load_teacher_and_memory(self, checkpoint: str):
        if self.teacher is not None:
            self.teacher.module.load_state_dict(
                load_file(os.path.join(checkpoint, TEACHER_FOLDER, "model.safetensors"))
            )
        if self.memory is not None:
            self.memory.load_state_dict(load_file(os.path.join(checkpoint, MEMORY_FILE)))


def described(part) -> str:
    """Its `repr` on one line and without addresses in memory, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(part).split()))


def digest(*arrays) -> str:
    """A short hash of the contents of arrays."""
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8).hexdigest()
