"""One loop runs a model over a dataset."""

import numpy as np
import torch

from hnml_hf.data.collate import collate_readable
from hnml_hf.modeling.forward import run_over


class Numbers(torch.utils.data.Dataset):
    """Row n is an image of the value n; those in `missing` have none."""

    def __init__(self, number: int, missing: set[int]):
        self.number, self.missing = number, missing

    def __len__(self):
        return self.number

    def __getitem__(self, row):
        return {"row": row, "pixel_values": None if row in self.missing else torch.full((1, 2, 2), float(row))}


def test_each_batch_comes_in_order_with_what_the_model_says_of_its_images():
    weight = torch.ones(1, requires_grad=True)
    found = list(
        run_over(lambda x: (weight * x).sum((1, 2, 3)), Numbers(7, {1, 4, 5}), collate_readable, batch_size=2)
    )
    assert [batch["row"].tolist() for batch, _ in found] == [[0, 1], [2, 3], [4, 5], [6]]
    assert [None if output is None else output.tolist() for _, output in found] == [[0], [8, 12], None, [24]]
    assert not found[0][1].requires_grad


def test_gradients_are_the_callers_own_between_batches():
    for _ in run_over(lambda x: x, Numbers(3, set()), collate_readable, batch_size=1):
        assert torch.is_grad_enabled()


def test_samples_without_an_image_keep_their_other_columns():
    samples = [{"row": 3, "digest": np.array([1, 2]), "pixel_values": None}] * 2
    batch = collate_readable([*samples, {"row": 4, "digest": np.array([5, 6]), "pixel_values": torch.ones(3, 2, 2)}])
    assert batch["row"].tolist() == [3, 3, 4] and batch["digest"].tolist() == [[1, 2], [1, 2], [5, 6]]
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert collate_readable(samples)["pixel_values"] is None
