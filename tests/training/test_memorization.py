import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import Subset
from trainers import assert_same_networks, build_trainer, logged, weights_of

from hnml_hf import MixupCollator, collate_images, create_transforms
from hnml_hf.data.splits import held_out_labels
from hnml_hf.training.dynamics_buffer import DynamicsBuffer
from hnml_hf.training.memorization import FULL_AT, MemorizationMonitor, default_fraction


def new_monitor(fraction=0.25, samples=100):
    return MemorizationMonitor(fraction=fraction, samples=samples)


def observations(trained_agree, trained, held_out_agree, held_out):
    """`held_out` and `agrees` of so many observations."""
    groups = np.repeat([False, True], [trained, held_out])
    agrees = np.concatenate([np.arange(trained) < trained_agree, np.arange(held_out) < held_out_agree])
    return groups, agrees


def test_memorized_share_by_hand():
    """60 of 75 trained labels are fitted and 10 of 25 held out: (0.8 - 0.4) / (1 - 0.4) = 2/3."""
    monitor = new_monitor()
    monitor.count(*observations(60, 75, 10, 25))
    assert monitor.meta_weight == 0  # nothing moves before `update`
    monitor.update()
    assert_close(monitor.memorized_share(), 2 / 3)
    held_out, trained = 12 / 29, 62 / 79  # with two more of either kind
    error = 2 * (held_out * (1 - held_out) / 29 + trained * (1 - trained) / 79) ** 0.5 / 0.6
    assert_close(monitor.uncertainty(), error)
    assert monitor.meta_weight == min((2 / 3 - error) / FULL_AT, 1) == 1


def test_strength_is_zero_without_memorization_and_grows_with_it():
    meta_weights = []
    for fitted in (40, 45, 53, 56, 70, 99):
        monitor = new_monitor(samples=1000)
        monitor.count(*observations(10 * fitted, 1000, 100, 250))
        monitor.update()
        meta_weights.append(monitor.meta_weight)
    assert meta_weights[:2] == [0, 0] and meta_weights[-1] == 1
    assert meta_weights == sorted(meta_weights) and 0 < meta_weights[2] < meta_weights[3] < 1


def test_an_insignificant_gap_moves_nothing():
    """The same rates, seen on few held-out samples and on many."""
    few, many = new_monitor(samples=40), new_monitor(samples=4000)
    few.count(*observations(18, 30, 4, 10))
    many.count(*observations(1800, 3000, 400, 1000))
    few.update(), many.update()
    assert few.memorized_share() == many.memorized_share()
    assert few.meta_weight == 0 < many.meta_weight


@pytest.mark.parametrize(("trained_agree", "trained"), [(8, 36), (300, 3000)])
def test_no_fit_of_a_few_samples_is_no_sure_one(trained_agree, trained):
    """None of 4 held-out labels fitted, beside 22 or 10 per cent of the others."""
    monitor = new_monitor(samples=4000, fraction=0.1)
    monitor.count(*observations(trained_agree, trained, 0, 4))
    monitor.update()
    assert monitor.memorized_share() > 0 and monitor.meta_weight == 0


def test_a_label_of_weight_zero_is_neither_taught_nor_held_out():
    """Sixty of a hundred labels weigh nothing and are not fitted: only the others are counted."""
    index = torch.arange(100)
    weights = (index < 40).float()
    labels = torch.zeros(100, dtype=torch.int64)
    log = DynamicsBuffer(monitor=new_monitor(), dynamics=None)
    held_out = torch.arange(100) % 4 == 0
    seen = {
        "probabilities": torch.zeros(100, 2),
        "held_out": held_out,
        "student_predictions": (index >= 40).long(),
        "foreground_logits": None,
    }
    log.add(index, labels, **seen, weights=weights, step=0, epoch=0)
    log.flush()
    assert log.monitor.pending.tolist() == [30, 30, 10, 10]


def test_observations_of_one_epoch_fade_in_the_next():
    monitor = new_monitor(samples=100)
    monitor.count(*observations(75, 75, 0, 25))
    monitor.update()
    monitor.count(*observations(0, 75, 0, 25))
    monitor.update()
    assert_close(monitor.agreement()[0], np.exp(-1) / (1 + np.exp(-1)))


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (5, 5, 0, 0), (0, 0, 5, 5), (5, 5, 5, 5), (0, 5, 0, 5)])
def test_nothing_seen_divides_by_nothing(counts):
    monitor = new_monitor()
    monitor.count(*observations(*counts))
    monitor.update()
    assert monitor.meta_weight == 0


@pytest.mark.parametrize(("samples", "fraction"), [(48, 0.1), (3600, 0.1), (10_000, 0.05), (10**6, 0.01)])
def test_share_held_out_by_default(samples, fraction, tiny_dataset, tmp_path):
    assert default_fraction(samples) == fraction
    if samples == len(tiny_dataset):
        assert (
            build_trainer(tmp_path, tiny_dataset, objective="hnml", monitor_fraction=None).monitor.fraction == fraction
        )
        assert build_trainer(tmp_path, tiny_dataset, objective="hnml", monitor_fraction=0).monitor is None


def test_state_goes_on_where_it_was():
    whole, before, after = new_monitor(), new_monitor(), new_monitor()
    for monitor in (whole, before):
        monitor.count(*observations(60, 75, 10, 25))
        monitor.update()
        monitor.count(*observations(10, 20, 1, 5))
    after.load_state_dict(before.state_dict())
    for monitor in (whole, after):
        monitor.count(*observations(9, 10, 1, 5))
        monitor.update()
    assert after.state_dict() == whole.state_dict()


@pytest.mark.parametrize("collator", [collate_images, MixupCollator(3, mixup_alpha=1.0)])
def test_labels_held_out_teach_nothing(collator, tiny_dataset, tmp_path):
    """Other labels on the samples held out change no weight, though the meta terms are at full weight; also if they
    are mixed with others."""

    def trained(folder, dataset, fraction=0.3):
        options = {"objective": "hnml", "monitor_fraction": fraction}
        trainer = build_trainer(tmp_path / folder, dataset, collator=collator, **options)
        trainer.meta_weight = lambda: 1.0
        trainer.train()
        assert (trainer.dynamics is None) == (collator is not collate_images)  # a mixed image is no sample
        return weights_of(trainer.model)

    held_out = held_out_labels(np.array(tiny_dataset["index"]), 0.3, seed=42).tolist()
    assert 0 < sum(held_out) < len(held_out)
    labels = [(y + 1) % 3 if spared else y for y, spared in zip(tiny_dataset["label"], held_out, strict=True)]
    feature = tiny_dataset.features["label"]
    others = tiny_dataset.remove_columns("label").add_column("label", labels).cast_column("label", feature)
    first, second = trained("a", tiny_dataset), trained("b", others)
    assert all(torch.equal(first[name], second[name]) for name in first)
    trained = trained("c", tiny_dataset, fraction=0), trained("d", others, fraction=0)
    assert any(not torch.equal(trained[0][name], trained[1][name]) for name in first)


def test_training_is_plain_until_something_is_memorized(tiny_dataset, tmp_path):
    """The monitor starts at 0: no teacher looks, no extrapolation; and it is in the log."""
    trainer = build_trainer(tmp_path, tiny_dataset, objective="hnml", monitor_fraction=0.3)
    trainer.train()
    assert logged(trainer, "meta_weight") == [0.0] * 3
    assert not logged(trainer, "consistency") and not logged(trainer, "mask_guided")
    assert logged(trainer, "cost_ce") == [1.0]


def test_memorization_raises_the_meta_weight(tiny_dataset, tmp_path):
    options = {"objective": "hnml", "monitor_fraction": 0.3, "max_steps": 160, "learning_rate": 0.05}
    trainer = build_trainer(tmp_path, tiny_dataset, **options)
    trainer.train()
    meta_weights = logged(trainer, "meta_weight")
    assert meta_weights[0] == 0 < max(meta_weights)
    assert logged(trainer, "consistency")


def test_each_evaluation_looks_up_the_labels_that_are_known_to_be_wrong(tiny_dataset, tmp_path):
    """By the network that is saved, with the statistics of its own weights; and training goes on as without."""
    options = {"objective": "hnml", "extrapolation": 20, "max_steps": 8, "learning_rate": 0.05}
    plain = build_trainer(tmp_path / "a", tiny_dataset, **options)
    plain.train()
    watched = build_trainer(tmp_path / "b", tiny_dataset, **options, eval_strategy="steps", eval_steps=4)
    rows = [5, 2, 40, 17, 33]
    watched.wrongly_labeled = Subset(watched.eval_dataset, rows)
    watched.eval_dataset = {"validation": watched.eval_dataset, "test": watched.eval_dataset}
    watched.train()
    assert_same_networks(plain, watched)
    pixels = torch.stack([watched.wrongly_labeled[row]["pixel_values"] for row in range(5)])
    with torch.no_grad():
        predicted = watched.teacher.network(pixels).logits.argmax(-1).numpy()
    found = logged(watched, "eval_memorized")
    assert len(found) == 2 and found[1] == (predicted == watched.train_dataset.labels[rows]).mean()
    assert logged(plain, "eval_memorized") == []


def test_resume_goes_on_with_the_monitor(tiny_dataset, tmp_path, monkeypatch):
    """Interrupted between two updates of a monitor that has found something: the same weights as without a break."""
    monkeypatch.setattr("hnml_hf.training.callbacks.UPDATE_EVERY", 8)
    options = {"objective": "hnml", "monitor_fraction": 0.3, "learning_rate": 0.1, "max_steps": 24}
    options |= {"save_strategy": "steps", "save_steps": 18}
    whole = build_trainer(tmp_path / "whole", tiny_dataset, **options)
    whole.train()
    assert logged(whole, "meta_weight")[17] > 0
    resumed = build_trainer(tmp_path / "resumed", tiny_dataset, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-18"))
    assert_same_networks(whole, resumed)
    assert resumed.monitor.state_dict() == whole.monitor.state_dict()


def test_strong_view_is_the_students_and_the_weak_one_the_teachers(tiny_dataset, tmp_path):
    seen = {"student": [], "teacher": []}
    trainer = build_trainer(tmp_path, tiny_dataset, objective="hnml", max_steps=1)
    transform, _ = create_transforms(trainer.model.config.pretrained_cfg, augmentation="none")
    trainer.train_dataset.views["strong_pixel_values"] = lambda image: -transform(image)
    first_layer = {"student": trainer.model.timm_model.conv1, "teacher": trainer.teacher.network.timm_model.conv1}
    for who, layer in first_layer.items():
        layer.register_forward_pre_hook(lambda _, args, who=who: seen[who].append(args[0].clone()))
    trainer.train()
    batches = {who: [batch for batch in seen[who] if type(batch) is torch.Tensor][0] for who in seen}  # no fake ones
    assert torch.equal(batches["student"], -batches["teacher"])
