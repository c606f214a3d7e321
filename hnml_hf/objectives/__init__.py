"""Objectives: what a training step asks of a batch.

An objective is a function `objective(student, labels, *, ...) -> (terms, monitors)`:

* `student` is the batch as the network sees it; `student()` gives its output. See
  [`~hnml_hf.objectives.batch_view.BatchView`].
* `terms` maps `base`, `consistency`, `mask_guided` to per-example losses of shape `(b,)`. The trainer alone
  averages and weighs them.
* `monitors` maps names to tensors for the log; `logits` of shape `(b, k)` is always among them.
* Keyword-only arguments are filled by name. `active_terms` is the set of terms with a weight above zero in this step,
  `teacher()` gives the teacher's output with its class activation maps (`teacher` is None without such a forward
  pass), `remember(probabilities)` gives each example's running average, `generator` is the source of randomness,
  `sample_weights` says the confidence in each label (None = all alike), `noise_rate` which share of them is wrong
  (None = do not ask). All others are fields of [`HNMLTrainingArguments`] of the same name.

Read `cross_entropy.py`, then `hnml.py`; the files beside them are its parts and the baselines. To add one, write a
file, and name it in `OBJECTIVES` and in the choices of `objective` in `../training/args.py`, where its options are
fields too (docs/extending.md).
"""

from collections.abc import Callable

from .cross_entropy import ce
from .elr import elr
from .gce import gce
from .hnml import hnml, hnml_synthetic
from .mean_teacher import mean_teacher


OBJECTIVES: dict[str, Callable] = {
    "hnml": hnml,
    "hnml_synthetic": hnml_synthetic,
    "mlnt": hnml_synthetic,  # Li et al., CVPR 2019: the mask-guided term, which is HNML's, is not asked for
    "ce": ce,
    "gce": gce,
    "elr": elr,
    "mean_teacher": mean_teacher,
}

__all__ = ["OBJECTIVES"]
