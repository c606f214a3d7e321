"""[`EvaluationMixin`]: what is measured is what is saved, the teacher or the student."""

import math
import os
from contextlib import contextmanager, nullcontext

from safetensors.torch import load_file
from torch.utils.data import Subset

from ..common.finite import require_finite_outputs
from ..data.resident import ResidentDataset
from .distributed import broadcast_buffers
from .own_statistics import buffers_put_back, needs_own_statistics, put_back, some_samples, take_statistics
from .resume.trainer import LAST_FOLDER, replaced


WORKER_OPTIONS = {
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
}
MAPS = ["features", "feature_maps", "last_hidden_state"]  # outputs that evaluation must not gather


class EvaluationMixin:
    """The evaluation methods of transformers' Trainer, for a student and its moving average.

    For a Trainer with `teacher` (a [`Teacher`], or `None`), `_evaluated`, which says which of them is measured,
    `measure_both`, `wrongly_labeled` and `display` (a [`Progress`]).
    """

    def evaluated_model(self):
        """The model that `evaluate` measures and `save_model` writes."""
        return self.teacher.network if self._evaluated == "teacher" else self.model

    def networks(self):
        return [self.model] if self.teacher is None else [self.model, self.teacher.network]

    def _unmixed(self):
        return replaced(self, data_collator=getattr(self.data_collator, "unmixed", self.data_collator))

    def _without_workers(self, dataset):
        """Batches that are prepared on the device come from this process, and need no pinned memory."""
        whole = dataset.dataset if isinstance(dataset, Subset) else dataset
        return replaced(self.args, **(WORKER_OPTIONS if isinstance(whole, ResidentDataset) else {}))

    def get_train_dataloader(self):
        with self._without_workers(self.train_dataset):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        """As the parent's, but images are not mixed, and a dataset that is given is the one that is measured: with
        workers that persist, the parent takes the loader of the first one without a name for all others."""
        if not (eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset):
            return self.get_test_dataloader(eval_dataset)
        named = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else self.eval_dataset
        with self._unmixed(), self._without_workers(named):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As the parent's, but images are not mixed, and its workers, which are used once, end with it."""
        with (
            self._unmixed(),
            replaced(self.args, dataloader_persistent_workers=False),
            self._without_workers(test_dataset),
        ):
            return super().get_test_dataloader(test_dataset)

    # -- batch norm: statistics of the weights that are measured ------------------------------------------------------

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As in [`~hnml_hf.training.resume.trainer.ResumableTrainer`]. Where steps looked at extrapolated weights, or
        averaged ones are saved, batch norm then takes the statistics of the weights themselves."""
        self._taken = {}
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if needs_own_statistics(self.args, self.model):
            for network in self.networks():
                self._take_statistics(network)
        return output

    def _take_statistics(self, network):
        size, processes = self.args.per_device_train_batch_size, self.args.world_size
        samples = some_samples(self.train_dataset, batch_size=size, processes=processes, seed=self.args.seed)
        steps = math.ceil(len(samples) / size / processes)
        with self.display.phase("statistics of batch norm", steps, args=self.args), self.accelerator.autocast():
            take_statistics(network, self._images_of(samples, batch_size=size))
        if processes > 1:
            broadcast_buffers(network)

    def _images_of(self, samples, *, batch_size):
        with replaced(self.args, per_device_eval_batch_size=batch_size):
            loader = self.get_test_dataloader(samples)
        for inputs in loader:
            yield inputs["pixel_values"].to(self.args.device)
            self.display.on_prediction_step(self.args, self.state, self.control)

    @contextmanager
    def as_it_is_saved(self, network):
        """Inside, a network has the statistics of its own weights; training goes on with those that it had."""
        step = self.state.global_step
        if not (self.is_in_train and step and needs_own_statistics(self.args, self.model)):
            yield
            return
        with buffers_put_back(network):
            known_at, known = self._taken.get(network, (None, []))
            if known_at == step:  # of another dataset's evaluation
                put_back(network.buffers(), known)
            else:
                self._take_statistics(network)
                self._taken[network] = step, [buffer.clone() for buffer in network.buffers()]
            yield

    def evaluation_loop(self, dataloader, *args, **kwargs):
        if self.args.world_size > 1:  # each has its own batch-norm statistics; those of the first one are saved
            broadcast_buffers(self.model)
        with self.display.phase(f"measuring the {self._evaluated}", len(dataloader), args=self.args):
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        if output.predictions is not None:
            require_finite_outputs(
                output.predictions,
                of=f"the {self._evaluated} after step {self.state.global_step}",
                advice="Lower `--learning_rate`, or look at `mean` and `std` of the model's `config.json`.",
            )
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._evaluated == "teacher":
            model = self.teacher.network
        inputs = {name: inputs[name] for name in ("pixel_values", "labels")}
        ignored = (ignore_keys or []) + MAPS
        with self.accelerator.autocast():  # the student has it of its wrapper, the teacher has none
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignored)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Metrics of the evaluated model and, under `<prefix>_student_` or `<prefix>_teacher_`, of the other one, if
        both are to be measured."""
        one_dataset = not isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        with self.as_it_is_saved(self.evaluated_model()) if one_dataset else nullcontext():  # else it asks for each
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.teacher is not None and self.measure_both and one_dataset:
            other = "student" if self._evaluated == "teacher" else "teacher"
            with replaced(self, _evaluated=other), self.as_it_is_saved(self.networks()[other == "teacher"]):
                output = self.evaluation_loop(
                    self.get_eval_dataloader(eval_dataset),
                    f"Evaluation of the {other}",
                    metric_key_prefix=f"{metric_key_prefix}_{other}",
                )
            others = {name: value for name, value in output.metrics.items() if "preparation" not in name}
            self.log(others)
            metrics.update(others)
        if self.is_in_train and eval_dataset is None:
            require_measured(self.args.metric_for_best_model, metrics)
            if self.wrongly_labeled is not None:
                self.log({"eval_memorized": self._memorized()})
        return metrics

    def _memorized(self):
        """The share of the labels known to be wrong that the network predicts which is saved."""
        with self.as_it_is_saved(self.evaluated_model()):
            loader = self.get_test_dataloader(self.wrongly_labeled)
            output = self.evaluation_loop(loader, "Memorization", prediction_loss_only=False)
        return float((output.predictions.argmax(-1) == output.label_ids).mean())

    @contextmanager
    def last_weights(self):
        """Inside, the evaluated model has the last epoch's weights, kept when the best epoch's were loaded."""
        model = self.evaluated_model()
        best = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(load_file(os.path.join(self.args.output_dir, LAST_FOLDER, "model.safetensors")))
        try:
            yield
        finally:
            model.load_state_dict(best)


def require_measured(chosen: str | None, metrics: dict[str, float]):
    """Raise `ValueError` if what chooses the best model is not among the metrics; transformers has a `KeyError`.

    Args:
        chosen (`str`, *optional*): `metric_for_best_model`, with or without `eval_`.
        metrics (`dict[str, float]`): of an evaluation in training.
    """
    if chosen is not None and f"eval_{chosen.removeprefix('eval_')}" not in metrics:
        raise ValueError(
            f"`metric_for_best_model={chosen}` is not measured. There are {', '.join(sorted(metrics))}. Name one of "
            "them, or return it from `compute_metrics`."
        )
