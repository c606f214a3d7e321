"""Soft targets that are judged again after an epoch: the newest count, their cost, and an exact resume."""

import json

import numpy as np
import pytest
import torch
from commands import load_script
from torch.testing import assert_close
from trainers import arguments, assert_same_networks, build_model

from hnml_hf import HNMLTrainer, TransformedDataset, collate_images, create_transforms
from hnml_hf.data.targets import add_targets, top_targets
from hnml_hf.objectives.soft_targets import dense_targets


THREE_EPOCHS = {"max_steps": 12, "objective": "ce", "targets": "refreshed"}  # of four steps each


def posterior(seed):
    return np.random.default_rng(seed).dirichlet(np.ones(3), 48).astype(np.float32)


def build(folder, dataset, judge_again, **options):
    model = build_model()
    transform, _ = create_transforms(model.config.pretrained_cfg, augmentation="none")
    return HNMLTrainer(
        model=model,
        args=arguments(folder, **{**THREE_EPOCHS, **options}),
        train_dataset=TransformedDataset(dataset, transform),
        data_collator=collate_images,
        judge_again=judge_again,
    )


class Judge:
    """Says something else each time, and keeps whom it was asked about."""

    def __init__(self):
        self.asked = []

    def __call__(self, network):
        self.asked.append(network)
        return top_targets(posterior(len(self.asked)))


@pytest.fixture(scope="module")
def with_targets(tiny_dataset):
    shuffled = tiny_dataset.select(np.random.default_rng(5).permutation(48))  # rows are not in the order of ids
    return add_targets(shuffled, posterior(0))


def test_targets_are_those_of_the_newest_judgement(with_targets, tmp_path):
    judge = Judge()
    trainer = build(tmp_path, with_targets, judge, eval_teacher=True)
    trainer.train()
    assert judge.asked == [trainer.teacher.network] * 2  # not after the last epoch
    rows = [7, 30, 2]
    index = torch.as_tensor(trainer.train_dataset.index[rows])
    expected = posterior(2)[rows]
    assert_close(dense_targets(*trainer.refreshed[index], 3), torch.from_numpy(expected))

    seen = []
    trainer.objective = lambda view, labels, **given: seen.append(labels) or ({}, {})
    trainer.objective_step(
        trainer.model, None, inputs=collate_images([trainer.train_dataset[row] for row in rows]), active_terms={"base"}
    )
    assert_close(seen[0], torch.from_numpy(expected))


def test_the_first_epoch_is_that_of_a_run_without(with_targets, tmp_path):
    ends = []
    for steps in (4, 8):
        for targets in ("posterior", "refreshed"):
            options = {"max_steps": steps, "targets": targets, "lr_scheduler_type": "constant"}
            trainer = build(tmp_path / f"{steps}{targets}", with_targets, Judge(), **options)
            trainer.train()
            ends.append(trainer)
    assert_same_networks(*ends[:2])
    weights = [trainer.model.timm_model.fc.weight for trainer in ends[2:]]
    assert not torch.equal(*weights)


def test_every_pass_of_all_images_costs_a_third_of_an_epoch(with_targets, tmp_path):
    trainer = build(tmp_path, with_targets, Judge())
    trainer.train()
    assert trainer.cost.meter.cost == pytest.approx((3 + 2 / 3) / 3)


@pytest.mark.parametrize("step", [4, 6])  # right after the first refresh, and inside of the second epoch
def test_an_exact_resume(with_targets, tmp_path, step):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = build(tmp_path, with_targets, Judge(), **saving)
    whole.train()
    judge = Judge()
    judge.asked.append("in the first epoch")
    resumed = build(tmp_path, with_targets, judge, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_same_networks(whole, resumed)
    assert len(judge.asked) == 2 and resumed.cost.meter.cost == whole.cost.meter.cost


def test_what_cannot_be_refreshed_is_refused(with_targets, tiny_dataset, tmp_path):
    for dataset, judge, options, reason in (
        (tiny_dataset, Judge(), {}, "`targets=refreshed` is not available here: the training set has no soft targets"),
        (with_targets, Judge(), {"objective": "gce"}, "takes labels alone"),
        (with_targets, None, {}, "nobody judges again"),
        (with_targets, Judge(), {"max_steps": -1, "num_train_epochs": 1}, "after the last epoch nothing is judged"),
    ):
        with pytest.raises(ValueError, match=reason):
            build(tmp_path, dataset, judge, **options)


def test_the_script_judges_by_the_network_that_it_trains(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_dataset.save_to_disk("data")
    build_model().save_pretrained("weights")
    train, found = load_script("train"), []
    trainer_of_the_script = train.HNMLTrainer

    def spying(**options):
        found.append(trainer_of_the_script(**options))
        return found[-1]

    monkeypatch.setattr(train, "HNMLTrainer", spying)
    words = "--dataset data --backbone test_resnet --image_size 32 --pretrained weights --start_from_judge true"
    words += " --per_device_train_batch_size 12 --num_train_epochs 2 --objective ce --eval_teacher true"
    words += " --targets refreshed --freeze_batch_norm true --augmentation none --use_cpu true --audit false"
    words += " --report_to none --output_dir run"
    train.main([*words.split(), "--model_args", '{"output_stride":8}'])
    (trainer,) = found
    first = dense_targets(*map(torch.from_numpy, trainer.train_dataset.targets), 3)
    newest = dense_targets(*trainer.refreshed[torch.as_tensor(trainer.train_dataset.index)], 3)
    assert not torch.equal(first, newest)
    with open("run/all_results.json", encoding="utf-8") as file:
        assert json.load(file)["cost_ce"] == pytest.approx((2 + 1 / 3) / 2, abs=1e-3)
