import numpy as np
import pytest
import torch
from torch.testing import assert_close
from trainers import assert_same_networks, build_trainer, logged, weights_of

from hnml_hf import MixupCollator, collate_images, create_transforms
from hnml_hf.data.splits import held_out_labels
from hnml_hf.training.memorization import FULL_AT, MemorizationGauge, default_fraction
from hnml_hf.training.visits import VisitLog


def gauge(fraction=0.25, samples=100):
    return MemorizationGauge(fraction=fraction, samples=samples)


def visits(taught_fitted, taught, held_out_fitted, held_out):
    """`held_out` and `fitted` of so many visits."""
    groups = np.repeat([False, True], [taught, held_out])
    fitted = np.concatenate([np.arange(taught) < taught_fitted, np.arange(held_out) < held_out_fitted])
    return groups, fitted


def test_memorized_share_by_hand():
    """60 of 75 taught labels are fitted and 10 of 25 held out: (0.8 - 0.4) / (1 - 0.4) = 2/3."""
    dial = gauge()
    dial.count(*visits(60, 75, 10, 25))
    assert dial.strength == 0  # nothing moves before `update`
    dial.update()
    assert_close(dial.memorized_share(), 2 / 3)
    held_out, taught = 12 / 29, 62 / 79  # with two more of either kind
    error = 2 * (held_out * (1 - held_out) / 29 + taught * (1 - taught) / 79) ** 0.5 / 0.6
    assert_close(dial.uncertainty(), error)
    assert dial.strength == min((2 / 3 - error) / FULL_AT, 1) == 1


def test_strength_is_zero_without_memorisation_and_grows_with_it():
    strengths = []
    for fitted in (40, 45, 53, 56, 70, 99):
        dial = gauge(samples=1000)
        dial.count(*visits(10 * fitted, 1000, 100, 250))
        dial.update()
        strengths.append(dial.strength)
    assert strengths[:2] == [0, 0] and strengths[-1] == 1
    assert strengths == sorted(strengths) and 0 < strengths[2] < strengths[3] < 1


def test_an_insignificant_gap_moves_nothing():
    """The same rates, seen on few held-out samples and on many."""
    few, many = gauge(samples=40), gauge(samples=4000)
    few.count(*visits(18, 30, 4, 10))
    many.count(*visits(1800, 3000, 400, 1000))
    few.update(), many.update()
    assert few.memorized_share() == many.memorized_share()
    assert few.strength == 0 < many.strength


@pytest.mark.parametrize(("taught_fitted", "taught"), [(8, 36), (300, 3000)])
def test_no_fit_of_a_few_samples_is_no_sure_one(taught_fitted, taught):
    """None of 4 held-out labels fitted, beside 22 or 10 per cent of the others."""
    dial = gauge(samples=4000, fraction=0.1)
    dial.count(*visits(taught_fitted, taught, 0, 4))
    dial.update()
    assert dial.memorized_share() > 0 and dial.strength == 0


def test_a_label_of_weight_zero_is_neither_taught_nor_held_out():
    """Sixty of a hundred labels weigh nothing and are not fitted: only the others are counted."""
    index = torch.arange(100)
    weights = (index < 40).float()
    labels = torch.zeros(100, dtype=torch.int64)
    log = VisitLog(gauge=gauge(), statistics=None)
    held_out = torch.arange(100) % 4 == 0
    seen = {
        "probabilities": torch.zeros(100, 2),
        "held_out": held_out,
        "voted": (index >= 40).long(),
        "foreground_logits": None,
    }
    log.add(index, labels, **seen, weights=weights, step=0, epoch=0)
    log.flush()
    assert log.gauge.pending.tolist() == [30, 30, 10, 10]


def test_visits_of_one_epoch_fade_in_the_next():
    dial = gauge(samples=100)
    dial.count(*visits(75, 75, 0, 25))
    dial.update()
    dial.count(*visits(0, 75, 0, 25))
    dial.update()
    assert_close(dial.fits()[0], np.exp(-1) / (1 + np.exp(-1)))


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (5, 5, 0, 0), (0, 0, 5, 5), (5, 5, 5, 5), (0, 5, 0, 5)])
def test_nothing_seen_divides_by_nothing(counts):
    dial = gauge()
    dial.count(*visits(*counts))
    dial.update()
    assert dial.strength == 0


@pytest.mark.parametrize(("samples", "fraction"), [(48, 0.1), (3600, 0.1), (10_000, 0.05), (10**6, 0.01)])
def test_share_held_out_by_default(samples, fraction, tiny_dataset, tmp_path):
    assert default_fraction(samples) == fraction
    if samples == len(tiny_dataset):
        assert build_trainer(tmp_path, tiny_dataset, objective="hnml", gauge_fraction=None).gauge.fraction == fraction
        assert build_trainer(tmp_path, tiny_dataset, objective="hnml", gauge_fraction=0).gauge is None


def test_state_goes_on_where_it_was():
    whole, before, after = gauge(), gauge(), gauge()
    for dial in (whole, before):
        dial.count(*visits(60, 75, 10, 25))
        dial.update()
        dial.count(*visits(10, 20, 1, 5))
    after.load_state_dict(before.state_dict())
    for dial in (whole, after):
        dial.count(*visits(9, 10, 1, 5))
        dial.update()
    assert after.state_dict() == whole.state_dict()


@pytest.mark.parametrize("collator", [collate_images, MixupCollator(3, mixup_alpha=1.0)])
def test_labels_held_out_teach_nothing(collator, tiny_dataset, tmp_path):
    """Other labels on the samples held out change no weight, though the meta terms are at full strength; also if they
    are mixed with others."""

    def trained(folder, dataset, fraction=0.3):
        options = {"objective": "hnml", "gauge_fraction": fraction}
        trainer = build_trainer(tmp_path / folder, dataset, collator=collator, **options)
        trainer.meta_weight = lambda: 1.0
        trainer.train()
        assert (trainer.statistics is None) == (collator is not collate_images)  # a mixed image is no sample
        return weights_of(trainer.model)

    held_out = held_out_labels(np.array(tiny_dataset["index"]), 0.3, seed=42).tolist()
    assert 0 < sum(held_out) < len(held_out)
    labels = [(y + 1) % 3 if spared else y for y, spared in zip(tiny_dataset["label"], held_out, strict=True)]
    feature = tiny_dataset.features["label"]
    others = tiny_dataset.remove_columns("label").add_column("label", labels).cast_column("label", feature)
    first, second = trained("a", tiny_dataset), trained("b", others)
    assert all(torch.equal(first[name], second[name]) for name in first)
    taught = trained("c", tiny_dataset, fraction=0), trained("d", others, fraction=0)
    assert any(not torch.equal(taught[0][name], taught[1][name]) for name in first)


def test_training_is_plain_until_something_is_memorized(tiny_dataset, tmp_path):
    """The dial starts at 0: no teacher looks, no look-ahead; and it is in the log."""
    trainer = build_trainer(tmp_path, tiny_dataset, objective="hnml", gauge_fraction=0.3)
    trainer.train()
    assert logged(trainer, "strength") == [0.0] * 3
    assert not logged(trainer, "consistency") and not logged(trainer, "mask_guided")
    assert logged(trainer, "cost_ce") == [1.0]


def test_memorisation_raises_the_strength(tiny_dataset, tmp_path):
    options = {"objective": "hnml", "gauge_fraction": 0.3, "max_steps": 160, "learning_rate": 0.05}
    trainer = build_trainer(tmp_path, tiny_dataset, **options)
    trainer.train()
    strengths = logged(trainer, "strength")
    assert strengths[0] == 0 < max(strengths)
    assert logged(trainer, "consistency")


def test_resume_goes_on_with_the_gauge(tiny_dataset, tmp_path, monkeypatch):
    """Interrupted between two updates of a gauge that has found something: the same weights as without a break."""
    monkeypatch.setattr("hnml_hf.training.callbacks.UPDATE_EVERY", 8)
    options = {"objective": "hnml", "gauge_fraction": 0.3, "learning_rate": 0.1, "max_steps": 24}
    options |= {"save_strategy": "steps", "save_steps": 18}
    whole = build_trainer(tmp_path / "whole", tiny_dataset, **options)
    whole.train()
    assert logged(whole, "strength")[17] > 0
    resumed = build_trainer(tmp_path / "resumed", tiny_dataset, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-18"))
    assert_same_networks(whole, resumed)
    assert resumed.gauge.state_dict() == whole.gauge.state_dict()


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
