"""Soft targets instead of the given labels: the loss, the choice between the two, and an exact resume."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from trainers import arguments, assert_same_networks, build_model, build_trainer

from hnml_hf import HNMLTrainer, MixupCollator, TransformedDataset, collate_images, create_transforms
from hnml_hf.data.resident import ResidentDataset, create_batch_transforms, stack_images
from hnml_hf.data.targets import add_targets
from hnml_hf.objectives.soft_targets import dense_targets


@pytest.fixture(scope="module")
def posterior():
    return np.random.default_rng(0).dirichlet(np.ones(3), 48).astype(np.float32)


@pytest.fixture(scope="module")
def with_targets(tiny_dataset, posterior):
    return add_targets(tiny_dataset, posterior)


def test_classes_that_are_not_named_get_nothing():
    dense = dense_targets(torch.tensor([[3, 1], [0, 2]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]), 4)
    assert dense.tolist() == [[0, 0.25, 0, 0.75], [1, 0, 0, 0]]


@pytest.mark.parametrize("objective", ["ce", "elr", "hnml", "mean_teacher"])
def test_the_base_loss_asks_for_the_posterior(with_targets, posterior, tmp_path, objective):
    trainer = build_trainer(tmp_path, with_targets, objective=objective)
    assert trainer.targets == "posterior"
    trainer.is_in_train = True
    trainer.model.train()
    rows = [3, 40, 7, 12]
    batch = collate_images([trainer.train_dataset[row] for row in rows])
    seen, function = [], trainer.objective
    trainer.objective = lambda *args, **given: seen.append(function(*args, **given)) or seen[-1]
    trainer.compute_loss(trainer.model, batch)
    ((terms, monitors),) = seen
    logits = monitors["logits"]
    expected = -(torch.from_numpy(posterior[rows]) * logits.log_softmax(-1)).sum(-1)
    base = terms["base"]
    if objective == "elr":  # its regularizer of the first observation, with t = 0.3 p
        base = base - 3 * torch.log1p(-(0.3 * logits.softmax(-1) ** 2).sum(-1))
    assert_close(base, expected, atol=1e-3, rtol=0)


def test_given_labels_are_a_choice(with_targets, tiny_dataset, tmp_path):
    given = build_trainer(tmp_path / "1", with_targets, objective="ce", targets="given", max_steps=2)
    plain = build_trainer(tmp_path / "2", tiny_dataset, objective="ce", max_steps=2)
    soft = build_trainer(tmp_path / "3", with_targets, objective="ce", max_steps=2)
    for trainer in (given, plain, soft):
        trainer.train()
    assert_same_networks(given, plain)
    assert not torch.equal(given.model.timm_model.fc.weight, soft.model.timm_model.fc.weight)


def test_what_goes_before_the_posterior(with_targets, tmp_path):
    weighted = with_targets.add_column("weight", np.linspace(0, 1, 48))
    assert build_trainer(tmp_path, weighted, objective="ce").targets == "given"
    assert build_trainer(tmp_path, with_targets, objective="gce").targets == "given"
    assert build_trainer(tmp_path, with_targets, objective="ce", symmetric_correction=True).targets == "given"
    mixed = MixupCollator(3, mixup_alpha=1.0)
    assert build_trainer(tmp_path, with_targets, objective="ce", collator=mixed).targets == "given"


def test_a_posterior_that_cannot_be_had_is_refused(with_targets, tiny_dataset, tmp_path):
    for dataset, options, reason in (
        (tiny_dataset, {"objective": "ce"}, "no soft targets"),
        (with_targets, {"objective": "gce"}, "takes labels alone"),
        (with_targets, {"objective": "ce", "symmetric_correction": True}, "corrects the loss on given labels"),
    ):
        with pytest.raises(ValueError, match=reason):
            build_trainer(tmp_path, dataset, targets="posterior", **options)
    beyond = add_targets(tiny_dataset, np.full((48, 1), 1.0), np.full((48, 1), 3))
    with pytest.raises(ValueError, match="classes that the model does not have"):
        build_trainer(tmp_path, beyond, objective="ce")


def resident_trainer(folder, dataset, **options):
    model = build_model()
    view, evaluation = create_batch_transforms(model.config.pretrained_cfg, (32, 32))
    pixels = stack_images(TransformedDataset(dataset, create_transforms(model.config.pretrained_cfg)[1]))
    return HNMLTrainer(
        model=model,
        args=arguments(folder, dataloader_num_workers=2, dataloader_persistent_workers=True, **options),
        train_dataset=ResidentDataset(dataset, pixels, view, seed=1),
        eval_dataset=ResidentDataset(dataset, pixels, evaluation),
        data_collator=collate_images,
    )


def test_batches_of_the_device_need_no_workers_and_resume_exactly(with_targets, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "max_steps": -1}
    whole = resident_trainer(tmp_path / "whole", with_targets, **saving)
    assert whole.get_train_dataloader().num_workers == whole.get_eval_dataloader().num_workers == 0
    assert whole.args.dataloader_num_workers == 2 and whole.args.dataloader_persistent_workers
    whole.train()
    resumed = resident_trainer(tmp_path / "whole", with_targets, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_networks(whole, resumed)
    assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


def test_other_targets_of_a_resumed_run_are_named(with_targets, tiny_dataset, posterior, tmp_path, caplog):
    """As of a judge that sees the images at another size."""
    saving = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "max_steps": -1}
    resident_trainer(tmp_path, with_targets, **saving).train()
    checkpoint, named = str(tmp_path / "checkpoint-3"), "likeliest classes of the targets"
    for dataset, times in ((with_targets, 0), (add_targets(tiny_dataset, np.roll(posterior, 1, axis=1)), 1)):
        resident_trainer(tmp_path, dataset, **saving).train(resume_from_checkpoint=checkpoint)
        assert caplog.text.count(named) == times
