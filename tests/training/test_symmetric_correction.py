"""The loss on given labels, corrected by the noise rate that training estimates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from trainers import FORMS, assert_same_networks, build_model, build_trainer, logged, weights_of

from hnml_hf import HNMLTrainer, MixupCollator
from hnml_hf.audit.dynamics import score_predictions
from hnml_hf.audit.noise_model import estimate_noise_rate
from hnml_hf.noise import symmetric_transition_matrix
from hnml_hf.objectives.cross_entropy import cross_entropy
from hnml_hf.training.callbacks import HIGHEST_RATE


THREE_EPOCHS = {"max_steps": 12, "symmetric_correction": True, "lr_scheduler_type": "constant"}  # of four steps each
CORRECTED = ["ce", "elr", "mean_teacher", "mlnt", "momentum"]


def test_by_hand():
    """p = (3/4, 1/4) and a fifth of the labels wrong: 0.8 * 1/4 + 0.2 * 3/4 = 0.35; half of it at weight 1/2."""
    logits, labels, rate = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([1]), torch.tensor(0.2)
    assert_close(cross_entropy(logits, labels, noise_rate=rate), torch.tensor([-math.log(0.35)]))
    halved = cross_entropy(logits, labels, torch.tensor([0.5]), rate)
    assert_close(halved, torch.tensor([-math.log(0.35) / 2]))


@given(rate=st.floats(0, 0.7), classes=st.integers(4, 12), seed=st.integers(0, 1000))
def test_it_is_the_cross_entropy_of_a_symmetric_channel(rate, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(6, classes, generator=generator, dtype=torch.float32)
    labels = torch.randint(classes, (6,), generator=generator)
    channel = torch.as_tensor(symmetric_transition_matrix(classes, rate, include_true=False), dtype=torch.float32)
    given = (logits.softmax(-1) @ channel).gather(-1, labels[:, None])[:, 0]
    assert_close(cross_entropy(logits, labels, noise_rate=torch.tensor(rate)), -given.log(), rtol=1e-4, atol=1e-5)


def test_a_rate_of_zero_is_cross_entropy_and_its_gradient():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).mul(8).requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0])
    losses = [cross_entropy(logits, labels), cross_entropy(logits, labels, noise_rate=torch.tensor(0.0))]
    assert_close(*losses)
    assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in losses))


def test_the_gradient_weighs_a_label_by_what_the_network_thinks_of_it():
    """That of cross-entropy times a p_y / (a p_y + o), o = r / (k - 1), a = 1 - r - o; the loss itself is bounded."""
    logits = torch.tensor([[4.0, 0.0, 1.0], [4.0, 0.0, 1.0], [-60.0, 60.0, 0.0]], requires_grad=True)
    labels, rate = torch.tensor([0, 1, 0]), torch.tensor(0.4)
    corrected = cross_entropy(logits, labels, noise_rate=rate)
    (gradient,) = torch.autograd.grad(corrected.sum(), logits)
    (plain,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), logits)
    likely = 0.4 * logits.detach().softmax(-1).gather(-1, labels[:, None])
    assert_close(gradient, plain * likely / (likely + 0.2))
    assert corrected.max() <= -math.log(0.2) + 1e-6 and gradient[2].abs().max() < 1e-6


@pytest.mark.parametrize("form", CORRECTED)
def test_the_rate_is_estimated_from_the_second_epoch_on_and_then_used(form, tiny_dataset, tmp_path):
    """Two epochs are those without it, bit for bit; the third is not."""
    ends = []
    for corrects in (False, True):
        options = {**FORMS[form], **THREE_EPOCHS, "max_steps": 8, "symmetric_correction": corrects}
        trainer = build_trainer(tmp_path, tiny_dataset, **options)
        trainer.train()
        ends.append(trainer)
    assert_same_networks(*ends)
    assert ends[0].noise_rate is None
    records = ends[1].dynamics.records
    expected = estimate_noise_rate(records, 3, seed=ends[1].args.seed)
    assert 0 < ends[1].noise_rate == min(expected, HIGHEST_RATE * 2 / 3)

    longer = build_trainer(tmp_path, tiny_dataset, **{**FORMS[form], **THREE_EPOCHS})
    plain = build_trainer(tmp_path, tiny_dataset, **{**FORMS[form], **THREE_EPOCHS, "symmetric_correction": False})
    longer.train(), plain.train()
    assert logged(longer, "loss")[:8] == logged(plain, "loss")[:8]
    assert logged(longer, "loss")[8] != logged(plain, "loss")[8]
    assert logged(longer, "noise_rate") == [ends[1].noise_rate] * 4 and not logged(plain, "noise_rate")


def test_a_cross_validation_gives_the_rate_from_the_first_step_on(tiny_dataset, tmp_path, monkeypatch):
    """And it stays, in a resumed run too, whatever the records of training would say."""
    options = {**THREE_EPOCHS, "objective": "ce", "seed": 0, "save_strategy": "steps", "save_steps": 10}
    used, step = [], HNMLTrainer.objective_step

    def spy(trainer, *args, **kwargs):
        used.append(trainer.noise_rate)
        return step(trainer, *args, **kwargs)

    def trained(start=None, **others):
        trainer = build_trainer(tmp_path, tiny_dataset, **{**options, **others})
        data, wrong = trainer.train_dataset, np.arange(48) % 4 == 0
        sure = 0.9 * np.eye(3)[(data.labels + wrong) % 3] + 0.1 / 3
        if trainer.rate_estimate is not None:
            records = score_predictions(data.index, data.labels, sure, held_out=True)
            trainer.rate_estimate.cross_validated = records
        trainer.train(resume_from_checkpoint=start)
        return trainer

    monkeypatch.setattr(HNMLTrainer, "objective_step", spy)
    whole = trained()
    rate = estimate_noise_rate(whole.rate_estimate.cross_validated, 3)
    assert 0.15 < rate < 0.35 and used == [rate] * 12 == logged(whole, "noise_rate")
    assert_same_networks(whole, trained(str(tmp_path / "checkpoint-10")))

    used.clear()
    trained(symmetric_correction=False, save_strategy="no")
    assert used == [None] * 12


def test_the_loss_of_a_step_is_the_corrected_one(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, objective="ce", **{**THREE_EPOCHS, "max_steps": 1})
    trainer.rate_estimate.on_train_begin = lambda *args, **kwargs: setattr(trainer.rate_estimate, "rate", 0.3)
    batches, compute_loss = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kw: batches.append(inputs) or compute_loss(model, inputs, **kw)
    trainer.train()
    logits = build_model().train()(batches[0]["pixel_values"]).logits
    expected = cross_entropy(logits, batches[0]["labels"], noise_rate=torch.tensor(0.3)).mean()
    assert_close(logged(trainer, "loss")[0], expected.item(), rtol=1e-4, atol=0)


def test_a_resumed_run_has_the_rate_of_the_uninterrupted_one(tiny_dataset, tmp_path):
    """From a checkpoint inside the third epoch, and from one at the end of the second."""
    options = {**THREE_EPOCHS, "objective": "hnml", "save_strategy": "steps", "save_steps": 2}
    whole = build_trainer(tmp_path, tiny_dataset, **options)
    whole.train()
    for step in (8, 10):
        resumed = build_trainer(tmp_path, tiny_dataset, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_networks(whole, resumed)
        assert resumed.noise_rate == whole.noise_rate > 0


def test_a_second_training_forgets_the_rate_of_the_first(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, objective="ce", **THREE_EPOCHS)
    trainer.train()
    assert trainer.noise_rate is not None
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.noise_rate is None


def test_labels_that_say_nothing_are_never_trained_against(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("hnml_hf.training.callbacks.estimate_noise_rate", lambda records, classes, seed: 1.0)
    trainer = build_trainer(tmp_path, tiny_dataset, objective="ce", **THREE_EPOCHS)
    before = weights_of(trainer.model)
    trainer.train()
    assert_close(trainer.noise_rate, HIGHEST_RATE * 2 / 3)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert not torch.equal(trainer.model.state_dict()["timm_model.fc.weight"], before["timm_model.fc.weight"])


def test_where_it_cannot_be_had(tiny_dataset, tmp_path):
    with pytest.raises(ValueError, match="objective `gce` has no cross-entropy"):
        build_trainer(tmp_path, tiny_dataset, objective="gce", symmetric_correction=True)
    with pytest.raises(ValueError, match="of mixed images no record is kept"):
        mixing = MixupCollator(3, mixup_alpha=0.5)
        build_trainer(tmp_path, tiny_dataset, objective="ce", symmetric_correction=True, collator=mixing)
    weighted = tiny_dataset.add_column("weight", np.linspace(0, 1, 48))
    with pytest.raises(ValueError, match="the weights of the samples already are"):
        build_trainer(tmp_path, weighted, objective="ce", symmetric_correction=True)
