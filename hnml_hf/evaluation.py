"""[`EvaluationMixin`]: what is measured is what is saved, the teacher or the student."""

import os
from contextlib import contextmanager

from safetensors.torch import load_file


LAST_FOLDER = "last"  # the last epoch's weights, where the best epoch's are loaded at the end
MAPS = ["features", "feature_maps", "last_hidden_state"]  # outputs that evaluation must not gather


class EvaluationMixin:
    """The evaluation methods of transformers' Trainer, for a student and its moving average.

    For a Trainer with `teacher` (a `ModelEmaV3`, or `None`) and `_evaluated`, which says which of them is measured.
    """

    def evaluated_model(self):
        """The model that `evaluate` measures and `save_model` writes."""
        return self.teacher.module if self._evaluated == "teacher" else self.model

    @contextmanager
    def _evaluating(self, which: str):
        self._evaluated, before = which, self._evaluated
        try:
            yield
        finally:
            self._evaluated = before

    @contextmanager
    def _unmixed(self):
        collator = self.data_collator
        self.data_collator = getattr(collator, "unmixed", collator)
        try:
            yield
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, eval_dataset=None):
        """As the parent's, but images are not mixed, and a dataset that is given is the one that is measured: with
        workers that persist, the parent takes the loader of the first one without a name for all others."""
        if not (eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset):
            return self.get_test_dataloader(eval_dataset)
        with self._unmixed():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As the parent's, but images are not mixed."""
        with self._unmixed():
            return super().get_test_dataloader(test_dataset)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self._evaluated == "teacher":
            model = self.teacher.module
        inputs = {name: inputs[name] for name in ("pixel_values", "labels")}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=(ignore_keys or []) + MAPS)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Metrics of the evaluated model and, under `<prefix>_student_` or `<prefix>_teacher_`, of the other one."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        one_dataset = not isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        if self.teacher is not None and one_dataset:
            other = "student" if self._evaluated == "teacher" else "teacher"
            with self._evaluating(other):
                output = self.evaluation_loop(
                    self.get_eval_dataloader(eval_dataset),
                    f"Evaluation of the {other}",
                    metric_key_prefix=f"{metric_key_prefix}_{other}",
                )
            others = {name: value for name, value in output.metrics.items() if "preparation" not in name}
            self.log(others)
            metrics.update(others)
        return metrics

    def _load_best_model(self):
        self.save_model(os.path.join(self.args.output_dir, LAST_FOLDER), _internal_call=True)
        super()._load_best_model()

    def load_last_weights(self):
        """Put the last epoch's weights, kept when the best epoch's were loaded, into the evaluated model."""
        weights = os.path.join(self.args.output_dir, LAST_FOLDER, "model.safetensors")
        self.evaluated_model().load_state_dict(load_file(weights))
