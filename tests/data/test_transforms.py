import gc
import math
import random

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch.testing import assert_close
from transformers import AutoImageProcessor

from hnml_hf import MixupCollator, TransformedDataset, UnreadableImageError, collate_images, create_transforms
from hnml_hf.data.transforms import (
    create_image_processor,
    create_strong_transform,
    preserved_generators,
    seed_generators,
)


SMALL = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "crop_pct": 1.0}
LARGE = {"input_size": (3, 96, 96), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 0.875}


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_draws_follow_from_the_key_and_leave_no_trace():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    outside = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with preserved_generators():
        seed_generators(0, 3, 7)
        inside = draw()
    assert draw() == outside
    with preserved_generators():
        seed_generators(0, 3, 7)
        assert draw() == inside
        seed_generators(0, 3, 8)
        assert all(a != b for a, b in zip(draw(), inside, strict=True))


def test_generators_go_on_after_an_error():
    torch.manual_seed(1)
    expected = torch.rand(())
    torch.manual_seed(1)
    with pytest.raises(RuntimeError), preserved_generators():
        seed_generators(5)
        raise RuntimeError
    assert torch.equal(torch.rand(()), expected)


@pytest.mark.parametrize("augmentation", ["standard", "randaugment"])
@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["small", "large"])
def test_augmentation_belongs_to_seed_epoch_and_sample(augmentation, config, tiny_dataset):
    training, _ = create_transforms(config, augmentation=augmentation)

    def samples(rows, epoch=0, seed=0, dataset=tiny_dataset):
        transformed = TransformedDataset(dataset, training, seed=seed)
        transformed.set_epoch(epoch)
        return {sample["index"]: sample["pixel_values"] for sample in transformed.__getitems__(rows)}

    first = samples([0, 1, 2])
    assert all(torch.equal(first[index], value) for index, value in samples([2, 0, 1]).items())
    shuffled = tiny_dataset.select([2, 1, 0])  # other rows, same ids
    assert all(torch.equal(first[index], value) for index, value in samples([0, 1, 2], dataset=shuffled).items())
    for other in (samples([0, 1, 2], epoch=1), samples([0, 1, 2], seed=1)):
        assert any(not torch.equal(first[index], value) for index, value in other.items())


def test_persistent_workers_see_the_epoch(tiny_dataset):
    training, _ = create_transforms(SMALL, augmentation="standard")
    dataset = TransformedDataset(tiny_dataset, training)
    options = {"batch_size": 12, "collate_fn": collate_images}
    workers = torch.utils.data.DataLoader(dataset, num_workers=1, persistent_workers=True, **options)
    plain = torch.utils.data.DataLoader(dataset, **options)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append([batch["pixel_values"] for batch in workers])
        assert all(torch.equal(a, b["pixel_values"]) for a, b in zip(epochs[-1], plain, strict=True))
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_evaluation_by_hand():
    """A gray level of 102 = 0.4 becomes (0.4 - mean) / std per channel; nothing is cut at `crop_pct` 1."""
    _, evaluation = create_transforms(SMALL, augmentation="none")
    pixels = evaluation(PILImage.new("RGB", (32, 32), (102, 102, 102)))
    assert_close(pixels.mean((1, 2)), torch.tensor([-0.5, 0.0, 0.5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(130, 96), (96, 96), (32, 50)])
def test_the_processor_is_the_evaluation_transform(size):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = PILImage.fromarray(pixels).resize((8, 8)).resize(size, PILImage.Resampling.BICUBIC)  # smooth
    _, evaluation = create_transforms(LARGE)
    processed = create_image_processor(LARGE)(image, return_tensors="pt")["pixel_values"][0]
    assert processed.shape == (3, 96, 96)
    assert (processed - evaluation(image)).abs().mean() < 0.02


@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
def test_a_squashed_image_is_prepared_alike_by_three_libraries(crop_pct, tmp_path):
    """A wide image with a red left edge: of the part that `center` keeps nothing is red, of `squash` something is."""
    config = {**LARGE, "crop_mode": "squash", "crop_pct": crop_pct}
    pixels = np.full((96, 192, 3), (0, 0, 255), np.uint8)
    pixels[:, :40] = (255, 0, 0)
    image = PILImage.fromarray(pixels)
    _, ours = create_transforms(config)
    natively = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    assert torch.equal(ours(image), natively(image))
    create_image_processor(config).save_pretrained(tmp_path)
    processed = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    assert processed.shape == (3, 96, 96)
    assert_close(processed, ours(image), atol=0.02, rtol=0)
    assert ours(image)[0].max() == 1 and create_transforms(LARGE)[1](image)[0].max() == -1


def test_a_crop_that_transformers_cannot_express_is_refused():
    for create in (create_transforms, create_image_processor):
        with pytest.raises(ValueError, match="`crop_mode='border'`.* both know center and squash only.*`config.json`"):
            create({**LARGE, "crop_mode": "border"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("mean", value) for value in (["x"] * 3, None, 0.5, [0.5], [math.nan] * 3, [True] * 3)),
        *(("std", value) for value in ([0, 0, 0], [-0.2] * 3, [math.inf] * 3, "abc")),
        *(("crop_pct", value) for value in ("x", 0, math.nan)),
        *(("input_size", value) for value in ("x", [3, 32], [3, 0, 32], [3, -1, 32], [3, 32.5, 32], [1, 32, 32])),
        *(("input_size", value) for value in ([3, math.nan, 32], [3, 10**6, 32], None)),
        *(("interpolation", value) for value in ("cubic-ish", 3)),
    ],
)
def test_a_preparation_that_cannot_be_is_refused(name, value):
    for create in (create_transforms, create_image_processor):
        with pytest.raises(ValueError, match=f"has `{name}=.*it must be .*`config.json`"):
            create({**LARGE, name: value})


def test_a_strong_view_comes_on_request(tiny_dataset):
    training, evaluation = create_transforms(SMALL, augmentation="randaugment")
    dataset = TransformedDataset(tiny_dataset, evaluation, strong_transform=training)
    batch = collate_images([dataset[0], dataset[1]])
    assert batch["strong_pixel_values"].shape == batch["pixel_values"].shape == (2, 3, 32, 32)
    assert not torch.equal(batch["strong_pixel_values"], batch["pixel_values"])


def test_collate_keeps_ids_and_clean_labels(tiny_dataset):
    dataset = TransformedDataset(tiny_dataset, create_transforms(SMALL)[1])
    batch = collate_images([dataset[row] for row in (5, 0)])
    for name, column in (("labels", "label"), ("clean_labels", "clean_label"), ("index", "index")):
        assert batch[name].tolist() == [tiny_dataset[5][column], tiny_dataset[0][column]]


def test_mixup_mixes_both_views_alike(tiny_dataset):
    """A strong view that is twice the weak one stays so."""
    dataset = TransformedDataset(tiny_dataset, create_transforms(SMALL)[1])
    samples = [dataset[row] for row in range(6)]
    samples = [{**sample, "strong_pixel_values": 2 * sample["pixel_values"]} for sample in samples]
    batch = MixupCollator(3, mixup_alpha=1.0, seed=0)(samples)
    assert_close(batch["strong_pixel_values"], 2 * batch["pixel_values"])
    assert not torch.equal(batch["pixel_values"], torch.stack([sample["pixel_values"] for sample in samples]))


def test_mixup_keeps_the_mass_and_repeats(tiny_dataset):
    dataset = TransformedDataset(tiny_dataset, create_transforms(SMALL)[1])
    samples = [dataset[row] for row in range(6)]
    collate = MixupCollator(3, mixup_alpha=1.0, seed=0)
    one, two = collate(samples), collate(samples)
    assert_close(one["soft_labels"].sum(1), torch.ones(6))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert not torch.equal(one["pixel_values"], collate_images(samples)["pixel_values"])
    odd = collate(samples[:5])
    assert odd["soft_labels"].argmax(1).tolist() == odd["labels"].tolist() and odd["soft_labels"].max() == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves the bad file open
def test_a_bad_image_stops_the_run_and_names_itself(tiny_dataset, tmp_path):
    tiny_dataset[0]["image"].save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    columns = {"label": [0, 1], "clean_label": [0, 1], "index": [10, 11]}
    paths = [str(tmp_path / name) for name in ("good.png", "bad.png")]
    dataset = Dataset.from_dict({"image": paths, **columns}).cast_column("image", Image())
    transformed = TransformedDataset(dataset, create_transforms(SMALL)[1])
    with pytest.raises(UnreadableImageError, match=r"hnml check") as error:
        transformed.__getitems__([0, 1])
    assert "11" in str(error.value) and "bad.png" in str(error.value)
    assert transformed[0]["index"] == 10
    del error
    gc.collect()  # now, while the warning about the open file is expected


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="none, standard, shift, randaugment"):
        create_transforms(SMALL, augmentation="wild")


def test_a_shift_shows_nothing_that_the_evaluation_does_not():
    """Of one color all over, no border; of stripes, the evaluation's interpolation."""
    white = PILImage.new("RGB", (32, 32), "white")
    stripes = PILImage.fromarray(np.tile(np.repeat([0, 255], 16).astype(np.uint8)[:, None, None], (1, 32, 3)))
    for interpolation in ("bilinear", "bicubic"):
        config = {**LARGE, "interpolation": interpolation, "crop_pct": 1.0}
        training, evaluation = create_transforms(config, augmentation="shift")
        for _ in range(10):
            torch.testing.assert_close(training(white), evaluation(white))
        seen = {round(float(v), 3) for v in training(stripes)[0].unique()}
        assert seen <= {round(float(v), 3) for v in evaluation(stripes)[0].unique()}


@pytest.mark.parametrize("augmentation", ["none", "standard"])
def test_strong_view_moves_nothing(augmentation):
    """A square of one color on another: whatever becomes of the two colors, it stays where it is."""
    pixels = np.full((32, 32, 3), (200, 120, 60), np.uint8)
    pixels[5:20, 9:30] = (40, 90, 230)
    columns = {"image": [PILImage.fromarray(pixels)] * 100, "label": [0] * 100, "clean_label": [0] * 100}
    dataset = Dataset.from_dict({**columns, "index": range(100)}).cast_column("image", Image())
    weak, _ = create_transforms(SMALL, augmentation=augmentation)
    transformed = TransformedDataset(dataset, weak, strong_transform=create_strong_transform(weak))
    compared = 0
    for sample in transformed.__getitems__(list(range(100))):
        square, strong = sample["pixel_values"][2] > 0.5, sample["strong_pixel_values"]
        padding = (sample["pixel_values"] < -1.2).all(0)
        left = ~padding & ~(strong == 0).all(0)  # an erased part is the mean color
        colors = strong[:, left]
        if colors.std(-1).max() > 0.05:
            pairs = torch.cat([square[left].float()[None], colors])
            assert torch.corrcoef(pairs)[0, 1:].nan_to_num().abs().max() > 0.6
            compared += not torch.equal(strong, sample["pixel_values"])
    assert compared > 50


def test_randaugment_never_asks_for_no_bits(tiny_dataset, monkeypatch):
    """At timm's full magnitude `PosterizeIncreasing` keeps 0 bits, and Pillow raises."""
    monkeypatch.setattr(random, "gauss", lambda mean, _: mean + 5)
    training, _ = create_transforms(SMALL, augmentation="randaugment")
    strong = create_strong_transform(create_transforms(SMALL)[0])
    transformed = TransformedDataset(tiny_dataset, training, strong_transform=strong)
    for epoch in range(20):
        transformed.set_epoch(epoch)
        transformed.__getitems__(list(range(len(tiny_dataset))))


@pytest.mark.parametrize("cache", ["images", "tensors"])
def test_what_is_cached_is_the_same_and_decoded_once(cache, tiny_dataset, monkeypatch):
    training, evaluation = create_transforms(SMALL, augmentation="standard")
    transform = training if cache == "images" else evaluation
    plain, cached = (TransformedDataset(tiny_dataset, transform, cache=kept) for kept in (None, cache))
    decoded = []
    decode = cached._decode
    monkeypatch.setattr(cached, "_decode", lambda rows: decoded.extend(rows) or decode(rows))
    for rows in ([3, 1, 3], [1, 2]):
        for one, other in zip(plain.__getitems__(rows), cached.__getitems__(rows), strict=True):
            assert torch.equal(one.pop("pixel_values"), other.pop("pixel_values")) and one == other
    assert sorted(set(decoded)) == [1, 2, 3] and decoded.count(1) == 1


def test_cached_images_are_augmented_anew(tiny_dataset):
    training, _ = create_transforms(SMALL, augmentation="standard")
    cached = TransformedDataset(tiny_dataset, training, cache="images")
    first = cached[0]["pixel_values"]
    cached.set_epoch(1)
    assert not torch.equal(cached[0]["pixel_values"], first)
    with pytest.raises(ValueError, match="neither"):
        TransformedDataset(tiny_dataset, training, cache="disk")
