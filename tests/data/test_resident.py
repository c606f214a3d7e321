"""Whole batches on the device: pixels as the transforms of single images give them, and draws of their own."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import functional

from hnml_hf import TimmCAMForImageClassification, TransformedDataset, collate_images, create_transforms
from hnml_hf.data.resident import (
    DRAWS,
    BatchTransform,
    ResidentDataset,
    create_batch_transforms,
    crop_boxes,
    resample,
    shift_boxes,
    stack_images,
    uniform_draws,
)


def config_of(side=32, **changes):
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=side, output_stride=8)
    return {**model.config.pretrained_cfg, **changes}


PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}


@pytest.fixture
def photo():
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC)


def batch_of(*images):
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in images])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(12, 10), (64, 96)])  # smaller and larger
@pytest.mark.parametrize("flip", [False, True])
def test_a_resized_box_is_pillows(photo, interpolation, size, flip):
    left, top, right, bottom = 4, 6, 34, 27
    crop = photo.resize(size[::-1], Image.Resampling[interpolation.upper()], box=(left, top, right, bottom))
    crop = functional.hflip(crop) if flip else crop
    ours = resample(
        batch_of(photo), torch.tensor([[left, top, right, bottom]]).float(), torch.tensor([flip]), size, interpolation
    )
    assert_close(ours, batch_of(crop).float(), atol=1.6, rtol=0)  # Pillow rounds twice


@pytest.mark.parametrize("size", [(24, 0.95), (64, 0.875), (32, 1.0)])
def test_the_evaluation_view_is_that_of_single_images(photo, size):
    side, crop_pct = size
    config = config_of(side, crop_pct=crop_pct)
    _, evaluation = create_transforms(config)
    _, batched = create_batch_transforms(config, photo.size[::-1])
    ours = batched(batch_of(photo, photo), torch.zeros(2, DRAWS))
    for one in ours:
        assert_close(one, evaluation(photo), atol=0.03, rtol=0)  # 255 levels are 4.4 units here


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_evaluation_view_of_the_size_of_the_images_keeps_their_pixels(photo, interpolation):
    image = batch_of(photo, photo)
    view = BatchTransform("center", size=photo.size[::-1], **{**PLAIN, "interpolation": interpolation})
    whole = torch.tensor([[0.0, 0, *photo.size]])
    resampled = resample(image, whole, torch.tensor([False]), photo.size[::-1], interpolation)
    assert torch.equal(view(image, torch.zeros(2, DRAWS)), resampled / 255)


def test_a_shift_moves_whole_pixels_and_mirrors_the_border():
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    view = BatchTransform("shift", size=(8, 8), **PLAIN)
    # reach 1: draws of 0, 1/2 and nearly 1 are offsets of -1, 0 and 1; the third draw mirrors below 1/2
    moved = view(image, torch.tensor([[0.0, 0.5, 0.9, 0, 0]]))[0, 0] * 255
    expected = torch.cat([image[0, 0, :, 1:2], image[0, 0, :, :-1]], 1).float()
    assert_close(moved, expected)
    mirrored = view(image, torch.tensor([[0.5, 0.99, 0.1, 0, 0]]))[0, 0] * 255
    expected = torch.cat([image[0, 0, 1:], image[0, 0, 6:7]]).flip(1).float()
    assert_close(mirrored, expected)


def test_boxes_reach_an_eighth_and_crops_stay_inside():
    draws = torch.from_numpy(uniform_draws(0, 0, np.arange(5000), DRAWS))
    boxes = shift_boxes(draws, 32, 16)
    assert boxes[:, 0].unique().tolist() == [-2, -1, 0, 1, 2]
    assert boxes[:, 1].unique().tolist() == list(range(-4, 5))
    boxes = crop_boxes(draws, 30, 40)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([40, 30])).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    share = sides.prod(1) / 1200
    assert share.min() > 0.06 and 0.4 < share.mean() < 0.55
    ratio = sides[:, 0] / sides[:, 1]
    inside = share < 0.5
    assert 0.6 < ratio[inside].min() and ratio[inside].max() < 1.6


def test_draws_follow_seed_epoch_and_sample_alone():
    draws = uniform_draws(3, 1, np.array([7, 2**40, 8]), 4)
    assert draws.shape == (3, 4) and draws.dtype == np.float32 and (draws >= 0).all() and (draws < 1).all()
    np.testing.assert_array_equal(uniform_draws(3, 1, np.array([8]), 4)[0], draws[2])
    for other in (uniform_draws(4, 1, np.array([7]), 4), uniform_draws(3, 2, np.array([7]), 4)):
        assert not (other[0] == draws[0]).any()
    many = uniform_draws(0, 0, np.arange(20000), 2)
    assert abs(many.mean() - 0.5) < 0.01 and abs(np.corrcoef(many.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 0.03  # neighboring ids


@pytest.fixture
def resident(tiny_dataset):
    images = stack_images(TransformedDataset(tiny_dataset, lambda image: image))
    view, _ = create_batch_transforms(config_of(), images.shape[2:])
    return ResidentDataset(tiny_dataset, images, view, seed=3)


def test_a_sample_is_the_same_in_every_batch(resident):
    batch = collate_images(resident.__getitems__([5, 0, 7]))
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["index"].tolist() == resident.index[[5, 0, 7]].tolist()
    assert batch["labels"].tolist() == resident.labels[[5, 0, 7]].tolist()
    assert_close(resident[0]["pixel_values"], batch["pixel_values"][1], atol=1e-5, rtol=0)
    resident.set_epoch(1)
    assert not torch.equal(resident[0]["pixel_values"], batch["pixel_values"][1])


def test_images_of_several_sizes_and_large_ones_are_not_stacked(tiny_dataset):
    plain = TransformedDataset(tiny_dataset, lambda image: image)
    assert stack_images(plain, largest=16) is None
    images = [tiny_dataset[0]["image"], tiny_dataset[1]["image"].resize((16, 16))]
    mixed = Dataset.from_dict({**tiny_dataset[:2], "image": images}, features=tiny_dataset.features)
    assert stack_images(TransformedDataset(mixed, lambda image: image)) is None


def test_what_batches_cannot_do_is_refused():
    with pytest.raises(ValueError, match="not by `randaugment`"):
        create_batch_transforms(config_of(), (32, 32), augmentation="randaugment")
    with pytest.raises(ValueError, match="not by `lanczos`"):
        create_batch_transforms(config_of(interpolation="lanczos"), (32, 32))


def test_a_batch_without_augmentation_by_hand(tiny_dataset, monkeypatch):
    """Bit for bit, and without a draw; the images that are kept stay as they are."""
    images = stack_images(TransformedDataset(tiny_dataset, lambda image: image))
    view, _ = create_batch_transforms(config_of(), images.shape[2:], augmentation="none")
    monkeypatch.setattr("hnml_hf.data.resident.uniform_draws", None)
    kept, rows = images.clone(), [5, 0, 7]
    batch = ResidentDataset(tiny_dataset, images, view).__getitems__(rows)
    mean, std = (torch.tensor(values)[:, None, None] for values in (view.mean, view.std))
    assert torch.equal(batch["pixel_values"], (images[rows].float() / 255 - mean) / std)
    assert torch.equal(images, kept)


@pytest.mark.gpu
def test_a_batch_is_the_same_on_a_gpu(resident):
    rows = list(range(16))
    here = resident.__getitems__(rows)
    resident.pixels = resident.pixels.cuda()
    there = resident.__getitems__(rows)
    assert there["pixel_values"].is_cuda
    assert_close(there["pixel_values"].cpu(), here["pixel_values"], atol=1e-4, rtol=0)
