import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.lib.recfunctions import rename_fields

from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    TimmCAMForImageClassification,
    TransformedDataset,
    collate_images,
    create_transforms,
)
from hnml_hf.audit.dynamics import (
    OLD_FIELDS,
    TOP_LABELS,
    TrainingDynamics,
    judge_dynamics,
    read_dynamics,
    run_dynamics,
    save_dynamics,
    save_judge_dynamics,
)


def weights(observations: int, decay: float = 0.9) -> np.ndarray:
    """Weight of each of `observations` observations in a running average: decay^(t - s), divided by their sum."""
    raw = decay ** np.arange(observations)[::-1]
    return raw / raw.sum()


@pytest.fixture
def dynamics():
    return TrainingDynamics(np.array([30, 10, 20]), np.array([0, 1, 2]), 3)


def test_worked_by_hand(dynamics):
    """One sample, label 1, two observations with p = (.6, .3, .1) and (.2, .7, .1); the student predicts 0, then 2.

    Weights are .9 / 1.9 and 1 / 1.9: given = (.27 + .7) / 1.9, candidate 0 = (.54 + .2) / 1.9, candidate 2 = .1.
    The margins are .3 - .6 and .7 - .2, their mean is .1. The given label wins in epoch 1 only.
    """
    dynamics.update(np.array([10]), np.array([[0.6, 0.3, 0.1]]), epoch=0, foreground=np.array([0]))
    dynamics.update(
        np.array([10]),
        np.array([[0.2, 0.7, 0.1]]),
        epoch=1,
        student_predictions=np.array([2]),
        foreground=np.array([2]),
    )
    record = dynamics.records[0]
    assert record["index"] == 10 and record["label"] == 1 and record["times_seen"] == 2
    np.testing.assert_allclose(record["given"], 0.97 / 1.9, rtol=1e-6)
    followed = dict(zip(record["top_labels"].tolist(), record["top_probabilities"].tolist(), strict=True))
    assert followed == pytest.approx({0: 0.74 / 1.9, 2: 0.1})
    frequencies = dict(zip(record["top_labels"].tolist(), record["top_frequencies"].tolist(), strict=True))
    assert frequencies == pytest.approx({0: 0.9 / 1.9, 2: 1 / 1.9}) and record["given_frequency"] == 0
    np.testing.assert_allclose(record["margin"], 0.1, atol=1e-6)
    assert (record["first_learned"], record["last_learned"], record["last_epoch"]) == (1, 1, 1)
    np.testing.assert_allclose(record["foreground_agreement"], 0.9 / 1.9, rtol=1e-6)
    assert dynamics.records["times_seen"].tolist() == [2, 0, 0]
    assert dynamics.records["first_learned"].tolist() == [1, -1, -1]


def test_running_probabilities_are_exact_up_to_ten_classes():
    generator = np.random.default_rng(0)
    n, k, epochs = 50, 10, 12
    index, labels = generator.permutation(1000)[:n], generator.integers(0, k, n)
    dynamics = TrainingDynamics(index, labels, k)
    observations = generator.dirichlet(np.full(k, 0.3), (epochs, n))
    for epoch in range(epochs):
        for part in np.array_split(generator.permutation(n), 4):
            dynamics.update(index[part], observations[epoch, part], epoch=epoch)
    expected = np.einsum("e,enk->nk", weights(epochs), observations)
    found = np.zeros((n, k))
    rows = dynamics.rows(index)
    found[np.arange(n)[:, None], dynamics.records["top_labels"][rows]] = dynamics.records["top_probabilities"][rows]
    found[np.arange(n), labels] = dynamics.records["given"][rows]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_with_many_classes_the_top_other_label_is_found():
    """Label 77 has most of the weight every third time, and noise on the other 199 labels must not push it out."""
    generator = np.random.default_rng(0)
    dynamics = TrainingDynamics(np.arange(20), np.zeros(20, int), 200)
    for epoch in range(30):
        p = generator.dirichlet(np.full(200, 0.05), 20)
        if epoch % 3 == 0:
            p = 0.3 * p
            p[:, 77] += 0.7
        dynamics.update(np.arange(20), p, epoch=epoch)
    records = dynamics.records
    assert records["top_probabilities"].shape == (20, TOP_LABELS)
    top = records["top_labels"][np.arange(20), records["top_probabilities"].argmax(-1)]
    assert (top == 77).all()
    assert all(len(set(row)) == TOP_LABELS for row in records["top_labels"].tolist())
    assert (records["given"] + records["top_probabilities"].sum(-1) <= 1 + 1e-5).all()


def test_a_sample_counts_once_an_epoch(dynamics):
    """The last uneven batch is filled up with copies: in one call, and across calls."""
    p = np.array([[0.8, 0.1, 0.1]])
    dynamics.update(np.array([30, 10, 30, -1]), p.repeat(4, 0), epoch=np.array([0, 0, 0, -1]))
    dynamics.update(np.array([20, 10]), 1 - p.repeat(2, 0), epoch=0)
    assert dynamics.records["times_seen"].tolist() == [1, 1, 1]
    np.testing.assert_allclose(dynamics.records["given"][0], 0.1, rtol=1e-6)
    dynamics.update(np.array([30, 30]), p.repeat(2, 0), epoch=np.array([1, 2]))
    assert dynamics.records["times_seen"].tolist() == [1, 1, 3]


def test_order_of_processes_does_not_matter():
    generator = np.random.default_rng(1)
    p, labels = generator.dirichlet(np.ones(4), 8), generator.integers(0, 4, 8)
    one, two = (TrainingDynamics(np.arange(8), labels, 4) for _ in range(2))
    order = generator.permutation(8)
    one.update(np.arange(8), p, epoch=0)
    two.update(order, p[order], epoch=0)
    assert np.array_equal(one.records, two.records)


def test_errors_teach():
    with pytest.raises(ValueError, match="Sample id 5 occurs more than once"):
        TrainingDynamics(np.array([5, 1, 5]), np.zeros(3, int), 2)
    with pytest.raises(ValueError, match="Sample 7 has label 3, but there are 3 classes"):
        TrainingDynamics(np.array([5, 7]), np.array([0, 3]), 3)
    with pytest.raises(KeyError, match="not in the training set"):
        TrainingDynamics(np.arange(3), np.zeros(3, int), 2).update(np.array([9]), np.ones((1, 2)), epoch=0)


def test_save_and_go_on(dynamics, tmp_path):
    p = np.array([[0.5, 0.3, 0.2]])
    dynamics.update(np.array([10]), p, epoch=0)
    dynamics.save(tmp_path / "s.npy")
    again = TrainingDynamics(np.array([10, 20, 30]), np.array([1, 2, 0]), 3)
    again.load(tmp_path / "s.npy")
    for one in (dynamics, again):
        one.update(np.array([10]), p[:, ::-1], epoch=1)
    assert np.array_equal(dynamics.records, again.records)
    assert not list(tmp_path.glob("*.part*"))
    with pytest.raises(ValueError, match="other sample ids or labels"):
        TrainingDynamics(np.array([10, 20, 30]), np.array([1, 2, 1]), 3).load(tmp_path / "s.npy")
    with pytest.raises(ValueError, match="another number of classes"):
        TrainingDynamics(np.array([10, 20, 30]), np.array([1, 2, 0]), 4).load(tmp_path / "s.npy")


def test_files_that_are_none(tmp_path):
    np.save(tmp_path / "other.npy", np.zeros(3))
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("other", "empty", "pickle"):
        with pytest.raises(ValueError, match="holds no training dynamics"):
            read_dynamics(tmp_path / f"{name}.npy")
    with pytest.raises(FileNotFoundError):
        read_dynamics(tmp_path / "missing.npy")


def test_millions_are_mapped(tmp_path):
    path = tmp_path / "_audit" / "s.npy"
    n = 100_000
    dynamics = TrainingDynamics(np.arange(n), np.zeros(n, int), 1000, path=path, in_memory=1)
    assert isinstance(dynamics.records, np.memmap) and not path.exists()
    assert dynamics.records.dtype.itemsize < 200  # bytes a sample, for any number of classes
    dynamics.update(np.array([99_999]), np.full((1, 1000), 1e-3), epoch=0)
    dynamics.save(tmp_path / "checkpoint" / "s.npy")
    dynamics.update(np.array([5]), np.full((1, 1000), 1e-3), epoch=0)
    dynamics.save(path)
    dynamics.save(path)
    assert read_dynamics(tmp_path / "checkpoint" / "s.npy")["times_seen"].sum() == 1
    assert read_dynamics(path)["times_seen"].sum() == 2
    assert isinstance(read_dynamics(path), np.memmap)


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_statistics_and_they_survive_a_kill(tiny_dataset, tmp_path):
    """Interrupted after an odd step and resumed, every sample is seen once an epoch, with the same dynamics."""

    def train(folder, resume=None, stop=None):
        torch.manual_seed(0)
        model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=32, output_stride=8)
        transform, _ = create_transforms(model.config.pretrained_cfg, augmentation="none")
        args = HNMLTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=20,  # the last batch of an epoch is smaller
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_num_workers=0,
            monitor_fraction=0,
            mask_weight=1,  # the mask level from the first step
        )
        trainer = HNMLTrainer(
            model=model,
            args=args,
            train_dataset=TransformedDataset(tiny_dataset, transform),
            data_collator=collate_images,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole")
    records = run_dynamics(tmp_path / "whole")
    assert (records["times_seen"] == 3).all() and (records["last_epoch"] == 2).all()
    assert sorted(records["index"]) == sorted(tiny_dataset["index"])
    assert (records["foreground_seen"] == 3).all()
    total = records["given"] + records["top_probabilities"].sum(-1)
    np.testing.assert_allclose(total, 1, rtol=1e-4)
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert (resumed.dynamics.records["times_seen"] == 3).all()
    for name in records.dtype.names:
        np.testing.assert_allclose(resumed.dynamics.records[name], whole.dynamics.records[name], atol=1e-5)


WORKER = """
import sys
import numpy as np, torch
from datasets import load_from_disk
from hnml_hf import *

torch.manual_seed(0)
model = TimmCAMForImageClassification.from_timm("test_vit", num_labels=3, image_size=32, patch_size=8)
transform, _ = create_transforms(model.config.pretrained_cfg, augmentation="none")
args = HNMLTrainingArguments(
    output_dir=sys.argv[1] + "/out", per_device_train_batch_size=4, num_train_epochs=3, save_strategy="no",
    report_to="none", disable_tqdm=True, use_cpu=True,
)
data = TransformedDataset(load_from_disk(sys.argv[1] + "/data"), transform)
trainer = HNMLTrainer(model=model, args=args, train_dataset=data, data_collator=collate_images)
trainer.train()
assert args.world_size == 2 and (trainer.dynamics is not None) == trainer.is_world_process_zero()
"""


@pytest.mark.slow
def test_two_processes_see_every_sample_once_an_epoch(tiny_dataset, tmp_path):
    """29 images in batches of 2 x 4: the last batch is filled up with 3 images that came before."""
    tiny_dataset.select(range(29)).save_to_disk(tmp_path / "data")
    (tmp_path / "worker.py").write_text(WORKER)
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --mixed_precision no --dynamo_backend no"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        *launch.split(),
        "--main_process_port",
        str(port),
        tmp_path / "worker.py",
        tmp_path,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    records = run_dynamics(tmp_path / "out")
    assert sorted(records["index"]) == sorted(tiny_dataset["index"][:29])
    assert (records["times_seen"] == 3).all() and (records["foreground_seen"] == 3).all()
    np.testing.assert_allclose(records["given"] + records["top_probabilities"].sum(-1), 1, rtol=1e-4)


def test_a_header_that_is_no_header_is_refused(tmp_path):
    """NumPy reads it as Python and lets the tokenizer's error pass; found by `scripts/maintenance/fuzz.py`."""
    TrainingDynamics(np.arange(3), np.arange(3), 3).save(tmp_path / "s.npy")
    content = (tmp_path / "s.npy").read_bytes()
    (tmp_path / "s.npy").write_bytes(content.replace(b"'fortran_order'", b"('ortran_order'"))
    with pytest.raises(ValueError, match=r"s\.npy holds no training dynamics"):
        read_dynamics(tmp_path / "s.npy")


def test_files_of_earlier_versions_are_read(dynamics, tmp_path):
    """Under their old names, with the old names of their fields."""
    dynamics.update(np.array([10]), np.array([[0.6, 0.3, 0.1]]), epoch=0)
    old = {new: before for before, new in OLD_FIELDS.items()}
    (tmp_path / "_audit").mkdir()
    np.save(tmp_path / "_audit" / "sample_statistics.npy", rename_fields(dynamics.records, old))
    np.save(tmp_path / "_audit" / "probe_statistics.npy", rename_fields(dynamics.records, old))
    for read in (run_dynamics, judge_dynamics):
        assert np.array_equal(read(tmp_path), dynamics.records)
    save_dynamics(
        tmp_path / "_audit" / "training_dynamics.npy", TrainingDynamics(np.arange(2), np.arange(2), 3).records
    )
    assert len(run_dynamics(tmp_path)) == 2  # the new one goes first
    save_judge_dynamics(tmp_path, None)
    assert judge_dynamics(tmp_path) is None
