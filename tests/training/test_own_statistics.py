"""Batch-norm statistics of what is saved are those of its own weights, if these are averaged or steps look ahead."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from trainers import arguments, assert_same_networks, build_model, build_trainer, logged
from transformers import TrainerCallback

from hnml_hf import HNMLTrainer, TransformedDataset, collate_images, create_transforms
from hnml_hf.data.targets import add_targets, top_targets
from hnml_hf.training import evaluation, publishing
from hnml_hf.training.own_statistics import IMAGES, buffers_put_back, some_samples, take_statistics


AHEAD = {"objective": "hnml", "extrapolation": 20, "mask_weight": 0}
RUNNING = ("running_mean", "running_var")


def as_in_a_file(network):
    return {name.removeprefix("timm_model."): value for name, value in network.state_dict().items()}


def statistics(network):
    return {name: value.clone() for name, value in network.state_dict().items() if name.endswith(RUNNING)}


def own_statistics_of(network, trainer):
    """By the definition: the mean over batches of what each layer sees of them in training mode."""
    seen: dict[str, list] = {}
    network = copy.deepcopy(network).train()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):

            def watch(module, inputs, name=name):
                (values,) = inputs
                moments = values.mean((0, 2, 3)), values.var((0, 2, 3), unbiased=True)
                seen.setdefault(name, []).append(moments)

            module.register_forward_pre_hook(watch)
    rows = some_samples(trainer.train_dataset, batch_size=12, processes=1, seed=trainer.args.seed)
    with torch.no_grad():
        for start in range(0, len(rows), 12):
            network(torch.stack([rows[row]["pixel_values"] for row in range(start, start + 12)]))
    return {
        f"{name}.{part}": torch.stack([moments[place] for moments in batches]).mean(0)
        for name, batches in seen.items()
        for place, part in enumerate(RUNNING)
    }


def test_statistics_by_hand():
    layer = nn.BatchNorm1d(1, momentum=0.1)
    layer.running_mean.fill_(7.0)
    layer.eval()
    take_statistics(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])])
    assert layer.running_mean.item() == (1 + 6) / 2
    assert layer.running_var.item() == (2 + 8) / 2
    assert layer.momentum == 0.1 and not layer.training


def test_nothing_is_dropped_at_random():
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(1)).train()
    take_statistics(network, [torch.ones(1_000, 1)])
    assert network[1].running_mean.item() == 1 and network[0].training and network[1].training


def test_without_batch_norm_no_batch_is_read():
    network = nn.Linear(2, 2)
    take_statistics(network, (pytest.fail("read") for _ in range(1)))


class Frozen(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize("layer", [Frozen(1), nn.BatchNorm1d(1, momentum=0.0)], ids=["mode", "momentum"])
def test_frozen_layers_keep_their_statistics(layer):
    layer.running_var.fill_(3.0)
    network = nn.Sequential(nn.BatchNorm1d(1), layer)
    take_statistics(network, [torch.tensor([[1.0], [3.0]])])
    assert layer.running_var.item() == 3 and network[0].running_mean.item() == 2


def test_layers_that_see_no_batch_keep_their_statistics():
    network = nn.BatchNorm1d(1)
    network.elsewhere = nn.BatchNorm1d(1)
    network.elsewhere.running_var.fill_(3.0)
    take_statistics(network, [torch.tensor([[1.0], [3.0]])])
    assert network.running_mean.item() == 2 and network.elsewhere.running_var.item() == 3
    assert network.elsewhere.momentum == 0.1


def test_an_interrupted_pass_leaves_all_as_it_was():
    network = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout()).train()
    network[0].eval().running_mean.fill_(7.0)

    def batches():
        yield torch.tensor([[1.0], [3.0]])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_statistics(network, batches())
    assert network[0].running_mean.item() == 7 and network[0].num_batches_tracked == 0
    assert network[0].momentum == 0.1 and not network[0].training and network[1].training


def test_buffers_are_put_back_after_an_error():
    layer = nn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), buffers_put_back(layer):
        take_statistics(layer, [torch.randn(4, 3)])
        assert not torch.equal(layer.running_mean, before["running_mean"])
        raise KeyboardInterrupt
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@given(
    st.integers(1, 5_000),
    st.integers(1, 600),
    st.integers(1, 8),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_some_samples_are_whole_batches(rows, batch_size, processes, seed):
    found = some_samples(range(rows), batch_size=batch_size, processes=processes, seed=seed)
    again = some_samples(range(rows), batch_size=batch_size, processes=processes, seed=seed)
    assert found.indices == again.indices
    assert len(set(found.indices)) == len(found) <= max(IMAGES, batch_size) * processes
    if rows >= batch_size * processes:
        assert len(found) % (batch_size * processes) == 0
    else:
        assert sorted(found.indices) == list(range(rows))


@pytest.mark.parametrize("options", [AHEAD, {"objective": "ce", "eval_teacher": True}], ids=["ahead", "average"])
def test_saved_networks_have_the_statistics_of_their_weights(options, tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, **options, max_steps=6)
    trainer.train()
    for network in (trainer.model, trainer.teacher.network):
        assert_close(statistics(network), own_statistics_of(network, trainer), rtol=1e-4, atol=1e-5)
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert_close(saved, as_in_a_file(trainer.teacher.network), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"objective": "ce"}, {**AHEAD, "extrapolation": 0, "eval_teacher": False}])
def test_steps_at_the_weights_themselves_keep_the_running_statistics(options, tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, **options, save_strategy="steps", save_steps=3)
    trainer.train()
    kept = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert_close(kept, as_in_a_file(trainer.model), rtol=0, atol=0)


def test_frozen_batch_norm_stays(tiny_dataset, tmp_path):
    model = build_model()
    model.batch_norm_frozen = True
    before = statistics(model)
    trainer = build_trainer(tmp_path, tiny_dataset, model=model, **AHEAD, eval_strategy="steps", eval_steps=1)
    trainer.train()
    for network in (trainer.model, trainer.teacher.network):
        assert_close(statistics(network), before, rtol=0, atol=0)


@pytest.mark.parametrize("augmentation", ["none", "standard"])
def test_evaluation_measures_what_will_be_saved_and_changes_no_training(augmentation, tiny_dataset, tmp_path):
    options = {**AHEAD, "max_steps": 8, "augmentation": augmentation}
    watched = build_trainer(tmp_path / "a", tiny_dataset, **options, eval_strategy="steps", eval_steps=2)
    watched.train()
    alone = build_trainer(tmp_path / "b", tiny_dataset, **options)
    alone.train()
    assert_same_networks(watched, alone)
    for name in ("eval_loss", "eval_student_loss"):
        assert logged(watched, name)[-1] == pytest.approx(watched.evaluate()[name], rel=1e-5)


def test_a_run_resumed_at_its_very_end_saves_the_same(tiny_dataset, tmp_path):
    options = {**AHEAD, "max_steps": 8, "augmentation": "standard", "save_strategy": "steps", "save_steps": 8}
    whole = build_trainer(tmp_path, tiny_dataset, **options)
    whole.train()
    again = build_trainer(tmp_path, tiny_dataset, model=build_model(seed=1), **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert_same_networks(whole, again)


@pytest.mark.parametrize("augmentation", ["none", "standard"])
def test_the_best_weights_are_saved_as_they_were_measured(augmentation, tiny_dataset, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    options = {**AHEAD, **steps, "max_steps": 12, "load_best_model_at_end": True, "augmentation": augmentation}
    trainer = build_trainer(tmp_path, tiny_dataset, **options)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(logged(trainer, "eval_loss")), rel=1e-5)


def test_one_pass_serves_all_datasets_of_an_evaluation(tiny_dataset, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(evaluation, "take_statistics", lambda network, batches: taken.append(network))
    trainer = build_trainer(tmp_path, tiny_dataset, **AHEAD, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
    trainer.train()
    teacher, student = trainer.teacher.network, trainer.model
    assert taken == [teacher, student] * 2 + [student, teacher]


def test_inside_it_is_as_saved_and_afterwards_as_before(tiny_dataset, tmp_path):
    trainer = build_trainer(tmp_path, tiny_dataset, **AHEAD, max_steps=4)
    trainer.train()
    trainer.is_in_train = True  # as at the end of an epoch
    own = statistics(trainer.teacher.network)
    for name, value in trainer.teacher.network.state_dict().items():
        if name.endswith(RUNNING):
            value.fill_(5.0)
    trainer._taken.clear()
    with trainer.as_it_is_saved(trainer.teacher.network):
        assert_close(statistics(trainer.teacher.network), own, rtol=1e-5, atol=1e-6)
    assert (statistics(trainer.teacher.network)["timm_model.bn1.running_mean"] == 5).all()


def test_a_judge_asked_again_sees_own_statistics(tiny_dataset, tmp_path):
    def judge_again(network):
        asked.append(network)
        assert_close(statistics(network), own_statistics_of(network, trainer), rtol=1e-4, atol=1e-5)
        return targets

    asked: list = []
    posterior = np.random.default_rng(5).dirichlet(np.ones(3), len(tiny_dataset)).astype(np.float32)
    targets, model = top_targets(posterior), build_model()
    transform, _ = create_transforms(model.config.pretrained_cfg, augmentation="none")
    trainer = HNMLTrainer(
        model=model,
        args=arguments(tmp_path, **{**AHEAD, "targets": "refreshed", "max_steps": -1, "num_train_epochs": 2}),
        train_dataset=TransformedDataset(add_targets(tiny_dataset, posterior), transform),
        data_collator=collate_images,
        judge_again=judge_again,
    )
    trainer.train()
    assert asked == [trainer.teacher.network]


def test_what_is_pushed_during_training_has_its_own_statistics(tiny_dataset, tmp_path, monkeypatch):
    class Pushing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                expected.append(own_statistics_of(trainer.teacher.network, trainer))
                trainer.push_checkpoint()
                trainer._finish_current_push()

    def push(folder, *args, **kwargs):
        pushed.append(load_file(f"{folder}/model.safetensors"))

    pushed: list = []
    expected: list = []
    trainer = build_trainer(tmp_path, tiny_dataset, **AHEAD, max_steps=5)
    trainer.push_in_progress = None
    trainer.add_callback(Pushing())
    monkeypatch.setattr(publishing.hub, "push_to_hub", push)
    trainer.train()
    (found,), (wanted,) = pushed, expected
    assert_close({f"timm_model.{name}": found[name] for name in found if name.endswith(RUNNING)}, wanted)


def test_the_last_weights_have_their_own_statistics_too(tiny_dataset, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = build_trainer(tmp_path, tiny_dataset, **AHEAD, **steps, max_steps=6, load_best_model_at_end=True)
    trainer.train()
    best = copy.deepcopy(trainer.teacher.network.state_dict())
    kept = load_file(tmp_path / "last" / "model.safetensors")
    with trainer.last_weights():
        assert_close(kept, as_in_a_file(trainer.teacher.network), rtol=0, atol=0)
        last = trainer.teacher.network
        assert_close(statistics(last), own_statistics_of(last, trainer), rtol=1e-4, atol=1e-5)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(logged(trainer, "eval_loss")[2], rel=1e-5)
    assert_close(trainer.teacher.network.state_dict(), best, rtol=0, atol=0)
    assert_close(
        statistics(trainer.teacher.network), own_statistics_of(trainer.teacher.network, trainer), rtol=1e-4, atol=1e-5
    )


def test_weights_that_were_never_trained_are_measured_as_they_are(tiny_dataset, tmp_path):
    trainer: HNMLTrainer = build_trainer(tmp_path, tiny_dataset, **AHEAD, eval_on_start=True, eval_strategy="steps")
    before, first = statistics(trainer.model), trainer.evaluate()["eval_loss"]
    assert_close(statistics(trainer.model), before, rtol=0, atol=0)
    trainer.train()
    assert logged(trainer, "eval_loss")[0] == pytest.approx(first, rel=1e-6)
    assert np.isfinite(logged(trainer, "eval_loss")).all()
