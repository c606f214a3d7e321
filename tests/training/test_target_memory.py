import os

import numpy as np
import pytest
import torch
from distributed_worker import CASES, VIT, make_trainer, weights_of
from torch.testing import assert_close

from hnml_hf import TrainingDynamics, collate_images
from hnml_hf.common.atomic import mapped_array
from hnml_hf.objectives.mean_teacher import consistency_loss
from hnml_hf.training.target_memory import DENSE_BYTES, TargetMemory, TopKMemory, create_memory


IDS = np.array([7, 3, 100, 42])
NUM_LABELS = 5


def ids(*values):
    return torch.tensor(values)


def random_probabilities(rows, generator, num_labels=NUM_LABELS):
    return torch.randn(rows, num_labels, generator=generator).softmax(-1)


@pytest.fixture(params=["dense", "top-k"])
def memory(request, tmp_path):
    if request.param == "dense":
        return TargetMemory(IDS, NUM_LABELS, decay=0.5)
    return TopKMemory(IDS, NUM_LABELS, decay=0.5, top_k=NUM_LABELS - 1, folder=str(tmp_path))


def test_running_average_by_hand(memory):
    """beta = 1/2 from 0: p = (1, 0, ..) makes the average (1/2, 0, ..), then p = (0, 1, ..) makes (1/4, 1/2, ..)."""
    first, second = torch.eye(NUM_LABELS)[:2]
    memory.update(ids(100), first[None])
    assert_close(memory[ids(100)], 0.5 * first[None])
    memory.update(ids(100), second[None])
    assert_close(memory[ids(100)], (0.25 * first + 0.5 * second)[None])
    assert not memory[ids(7, 3, 42)].any()


def test_samples_are_found_by_id_in_any_order(memory, generator):
    p = random_probabilities(4, generator)
    memory.update(ids(3, 100, 7, 42), p)
    assert_close(memory[ids(42, 3, 100, 7)], 0.5 * p[[3, 0, 1, 2]])


def test_a_sample_that_fills_up_a_batch_counts_once(memory, generator):
    p = random_probabilities(3, generator)
    memory.update(ids(7, 3, 7), p)
    assert_close(memory[ids(7, 3)], 0.5 * p[:2])


def test_unknown_ids_are_named(memory):
    with pytest.raises(KeyError, match=r"\[8\] are not in the training set"):
        memory[ids(7, 8)]


def test_repeated_ids_are_refused(tmp_path):
    for top_k in (0, 2):
        with pytest.raises(ValueError, match="4 samples have only 3 distinct"):
            create_memory(
                np.array([1, 1, 2, 3]), NUM_LABELS, decay=0.5, top_k=top_k, device="cpu", folder=str(tmp_path)
            )


def test_state_goes_round(memory, tmp_path, generator):
    memory.update(ids(3, 100), random_probabilities(2, generator))
    state = {name: value.clone() for name, value in memory.state_dict().items()}
    before = memory[ids(3, 100, 7)]
    memory.update(ids(3, 7), random_probabilities(2, generator))
    assert not torch.equal(memory[ids(3, 100, 7)], before)
    memory.load_state_dict(state)
    assert torch.equal(memory[ids(3, 100, 7)], before)
    state["ids"] = state["ids"] + 1
    with pytest.raises(ValueError, match="other sample ids"):
        memory.load_state_dict(state)


def test_a_state_of_another_form_is_refused(tmp_path):
    dense, kept = TargetMemory(IDS, 5, decay=0.5), TopKMemory(IDS, 5, decay=0.5, top_k=2, folder=str(tmp_path))
    with pytest.raises(ValueError, match="training set and classes"):
        kept.load_state_dict(dense.state_dict())
    with pytest.raises(ValueError, match="training set and classes"):
        TopKMemory(IDS, 5, decay=0.5, top_k=3, folder=str(tmp_path)).load_state_dict(kept.state_dict())


def test_the_rest_is_read_back_in_equal_parts(tmp_path):
    """p = (.5, .3, .1, .08, .02), two kept: .2 is left for three classes. Halved by the first update from 0."""
    memory = TopKMemory(IDS, 5, decay=0.5, top_k=2, folder=str(tmp_path))
    memory.update(ids(42), torch.tensor([[0.5, 0.3, 0.1, 0.08, 0.02]]))
    expected = torch.tensor([[0.25, 0.15, 0.1 / 3, 0.1 / 3, 0.1 / 3]])
    assert_close(memory[ids(42)], expected)
    assert_close(memory[ids(42)].sum(), torch.tensor(0.5))


def test_few_classes_kept_stay_close_to_all_of_them(tmp_path, generator):
    """Predictions that wander, with most of their mass on few of 50 classes: the largest class and the mass agree."""
    kept = TopKMemory(IDS, 50, decay=0.7, top_k=5, folder=str(tmp_path))
    dense = TargetMemory(IDS, 50, decay=0.7)
    base = 6 * torch.randn(4, 50, generator=generator)
    for _ in range(30):
        p = (base + torch.randn(4, 50, generator=generator)).softmax(-1)
        kept.update(torch.from_numpy(IDS), p)
        dense.update(torch.from_numpy(IDS), p)
    ours, exact = kept[torch.from_numpy(IDS)], dense[torch.from_numpy(IDS)]
    assert torch.equal(ours.argmax(-1), exact.argmax(-1))
    assert_close(ours.sum(-1), exact.sum(-1))
    assert (ours - exact).abs().sum(-1).max() < 0.05


def test_a_million_samples_of_a_thousand_classes_take_no_gigabytes(tmp_path):
    rows = 1_000_000
    memory = create_memory(np.arange(rows), 1000, decay=0.7, device="cpu", folder=str(tmp_path))
    assert isinstance(memory, TopKMemory)
    assert sum(getattr(memory, name).nbytes for name in ("classes", "values", "mass")) == 64 * rows
    p = torch.eye(1000)[[5, 999]]
    memory.update(ids(0, rows - 1), p)
    assert_close(memory[ids(0, rows - 1)], 0.3 * p)
    assert not list(tmp_path.iterdir())  # the file has no name, so that nothing is left behind


def test_a_small_memory_keeps_all_classes(tmp_path):
    assert isinstance(create_memory(IDS, 5, decay=0.7, device="cpu", folder=str(tmp_path)), TargetMemory)
    assert isinstance(create_memory(IDS, 5, decay=0.7, top_k=9, device="cpu", folder=str(tmp_path)), TargetMemory)
    assert isinstance(create_memory(IDS, 5, decay=0.7, top_k=4, device="cpu", folder=str(tmp_path)), TopKMemory)
    assert DENSE_BYTES == 2**28


# -- targets from the memory, in training -----------------------------------------------------------------------------

MEMORY = {"teacher_source": "memory", "per_device_train_batch_size": 8, "max_steps": 8}


@pytest.mark.parametrize("case", ["mean_teacher", "mlnt first", "head second", "full first", "momentum"])
def test_every_objective_trains_on_targets_from_the_memory(case):
    trainer = make_trainer(VIT, {**CASES[case], **MEMORY, "logging_strategy": "steps", "logging_steps": 1})
    trainer.teacher.network.forward = None  # no teacher looks at any batch
    trainer.train()
    first, later = trainer.state.log_history[0], trainer.state.log_history[6]
    assert later["consistency"] > 0
    if CASES[case]["objective"].startswith("hnml"):
        assert first["mask_guided"] >= 0 and "mask_guided" in later
    mass = trainer.memory.store[torch.from_numpy(trainer.train_dataset.index)].sum(-1)
    assert_close(mass, torch.full_like(mass, 1 - 0.7**2))  # two epochs: every sample was seen twice


def test_targets_are_the_normalized_average_of_the_own_predictions():
    """First observation: q = p, and the maps are the student's own, so that the map agreement is 0."""
    trainer = make_trainer(VIT, {**CASES["momentum"], **MEMORY})
    batch = collate_images([trainer.train_dataset[row] for row in range(4)])
    terms, monitors = trainer.objective_step(
        trainer.model, batch["pixel_values"], inputs=batch, active_terms={"base", "consistency", "mask_guided"}
    )
    assert_close(terms["consistency"], torch.zeros(4), atol=1e-6, rtol=0)
    q = monitors["logits"].softmax(-1)
    assert_close(terms["mask_guided"], q.amax(-1) * consistency_loss(monitors["foreground_logits"], q))
    terms, _ = trainer.objective_step(
        trainer.model, batch["pixel_values"].flip(-1), inputs=batch, active_terms={"base", "consistency"}
    )
    assert (terms["consistency"] > 0).all()  # now q is the average of two views


def test_resume_with_a_memory_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("hnml_hf.training.target_memory.DENSE_BYTES", 0)
    monkeypatch.setattr("hnml_hf.training.target_memory.DEFAULT_TOP_K", 2)
    options = {**CASES["full first"], **MEMORY, "eval_teacher": False}
    options |= {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path)}
    whole = make_trainer(VIT, options)
    whole.train()
    assert isinstance(whole.memory.store, TopKMemory) and whole.teacher is None
    resumed = make_trainer(VIT, options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_close(weights_of(resumed), weights_of(whole), rtol=0, atol=0)
    assert whole.memory.store.mass.any()


def test_space_is_reserved_before_it_is_mapped(tmp_path, monkeypatch):
    """A disk that is full under a mapping ends the process with SIGBUS; said before, it is an error."""
    reserved = []

    def reserve(descriptor, start, size):
        reserved.append(size)
        if size > 4 * 30:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    with pytest.raises(OSError, match=rf"0.0 MiB for what training keeps .* in {tmp_path} .No space left on device"):
        TopKMemory(np.arange(30), 100, decay=0.5, top_k=2, folder=str(tmp_path))
    assert reserved == [2 * 2 * 30, 4 * 2 * 30]  # classes as int16, values as float32
    with pytest.raises(OSError, match="No space left on device"):
        TrainingDynamics(np.arange(30), np.zeros(30, int), 1000, path=tmp_path / "x", in_memory=1)


def test_a_mapped_array_is_zeros_on_reserved_blocks(tmp_path):
    array = mapped_array((2**18,), np.float32, tmp_path)
    assert not array.any() and array.shape == (2**18,) and not list(tmp_path.iterdir())
    array[:] = 1
