"""Soft targets travel as columns, and reach the batch; what a person has said goes before them."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hnml_hf import TransformedDataset, collate_images, create_transforms
from hnml_hf.data.resident import ResidentDataset, create_batch_transforms, stack_images
from hnml_hf.data.targets import add_targets, targets_of, top_targets


CONFIG = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}


def posterior_of(rows, num_labels=3):
    return np.random.default_rng(0).dirichlet(np.ones(num_labels), rows)


def test_the_likeliest_classes_are_kept_and_sum_to_one():
    classes, probabilities = top_targets(np.array([[0.1, 0.5, 0.0, 0.4], [0.25, 0.25, 0.3, 0.2]]), top_k=2)
    assert classes.tolist() == [[1, 3], [2, 0]]  # of equals the first
    assert top_targets(np.array([[0.2, 0.8]]), np.array([[7, 3]]))[0].tolist() == [[3, 7]]
    assert_close(probabilities, np.array([[5 / 9, 4 / 9], [6 / 11, 5 / 11]], np.float32))


@pytest.mark.parametrize("resident", [False, True])
def test_targets_reach_the_batch(tiny_dataset, resident):
    posterior = posterior_of(48)
    dataset = add_targets(tiny_dataset, posterior)
    plain = TransformedDataset(dataset, create_transforms(CONFIG, augmentation="none")[0])
    if resident:
        plain = ResidentDataset(dataset, stack_images(plain), create_batch_transforms(CONFIG, (32, 32))[1])
    batch = collate_images(plain.__getitems__([4, 1]))
    spread = torch.zeros(2, 3).scatter(1, batch["target_classes"], batch["target_probabilities"])
    assert_close(spread, torch.tensor(posterior[[4, 1]], dtype=torch.float32))
    assert batch["target_classes"].dtype == torch.int64


@pytest.mark.parametrize("action", ["annotated", "marked"])  # the second of an earlier version
def test_an_annotation_goes_first_and_new_targets_replace_old_ones(tiny_dataset, action):
    annotated = tiny_dataset.add_column("audit_action", [action] + ["kept"] * 47)
    dataset = add_targets(add_targets(annotated, posterior_of(48)[::-1]), posterior_of(48))
    classes, probabilities = targets_of(dataset)
    assert classes[0, 0] == tiny_dataset[0]["label"] and probabilities[0].tolist() == [1, 0, 0]
    assert classes[1, 0] == posterior_of(48)[1].argmax()
    assert targets_of(tiny_dataset) is None


def test_an_annotated_label_that_is_not_the_likeliest_is_named_once(tiny_dataset):
    """A class that is named twice would be spread over itself, with a probability of 0."""
    annotated = tiny_dataset.add_column("audit_action", ["annotated"] * 48)
    classes, _ = targets_of(add_targets(annotated, posterior_of(48)))
    assert (posterior_of(48).argmax(1) != tiny_dataset["label"][:]).any()
    assert (classes[:, 0] == tiny_dataset["label"][:]).all() and (np.sort(classes, 1) == [0, 1, 2]).all()


def test_what_are_no_targets_is_refused(tiny_dataset):
    with pytest.raises(ValueError, match="targets for 40 rows, but the dataset has 48"):
        add_targets(tiny_dataset, posterior_of(40))
    bad = posterior_of(48)
    bad[7] *= 2
    with pytest.raises(ValueError, match="Row 7 of the targets"):
        add_targets(tiny_dataset, bad)
    with pytest.raises(ValueError, match=r"shape \(rows, classes\), not \(48,\)"):
        add_targets(tiny_dataset, np.ones(48))
    with pytest.raises(ValueError, match=r"`top_labels` has the shape \(48, 2\), but the targets \(48, 3\)"):
        add_targets(tiny_dataset, posterior_of(48), np.zeros((48, 2), int))
    twice = np.tile([0, 1, 2], (48, 1))
    twice[5] = [2, 1, 2]
    with pytest.raises(ValueError, match="Row 5 of `top_labels` names a class twice"):
        add_targets(tiny_dataset, posterior_of(48), twice)


def test_targets_may_be_lists(tiny_dataset):
    classes, _ = targets_of(add_targets(tiny_dataset, posterior_of(48).tolist()))
    assert (classes[:, 0] == posterior_of(48).argmax(1)).all()
