"""Experiment trackers get what the log has, by transformers' own `report_to`."""

import pytest
from trainers import build_trainer, logged

from hnml_hf import HNMLTrainingArguments
from hnml_hf.training import args as training_args


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own generated code
def test_tensorboard_has_the_scalars_of_training_and_evaluation(tiny_dataset, tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = build_trainer(tmp_path, tiny_dataset, report_to="tensorboard", eval_strategy="steps", eval_steps=3)
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    scalars = tensorboard.EventAccumulator(str(events)).Reload()
    tags = set(scalars.Tags()["scalars"])
    assert {
        "train/loss",
        "train/label_agreement",
        "eval/accuracy",
        "eval/loss",
        "eval/student_accuracy",
        "train/cost_ce",
    } <= tags
    assert [(event.step, event.value) for event in scalars.Scalars("train/loss")] == [
        (step, pytest.approx(loss, rel=1e-5)) for step, loss in enumerate(logged(trainer, "loss"), start=1)
    ]
    assert scalars.Scalars("eval/accuracy")[0].value == pytest.approx(logged(trainer, "eval_accuracy")[0])


def test_a_tracker_that_is_not_installed_is_named_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(training_args, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="pip install trackio wandb"):
        HNMLTrainingArguments(output_dir=str(tmp_path), report_to=["wandb", "tensorboard", "trackio"])
