"""Small images as one tensor on the training device: whole batches are augmented, resized and normalized there.

What is drawn for a sample follows from seed, epoch and sample id alone and is computed on the CPU, so that it is the
same on every device, for every batch that holds the sample and wherever a run was resumed.
"""

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F

from ..common.words import counted
from .transforms import SMALL_IMAGE, TransformedDataset, data_config


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
DRAWS = 5  # numbers that a training view takes of each sample: horizontal, vertical, flip, area, aspect ratio
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop, as in timm and torchvision
CHUNK = 1024  # images decoded at a time
BATCHED = ("none", "standard", "shift")  # augmentations that there are for whole batches


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014): neighboring integers become unrelated ones."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def uniform_draws(seed: int, epoch: int, index: np.ndarray, count: int) -> np.ndarray:
    """Numbers for the augmentation of samples, a function of seed, epoch and sample id alone.

    Args:
        seed, epoch (`int`): of the run and within it.
        index (`np.ndarray` of shape `(b,)`): sample ids.
        count (`int`): numbers for each.

    Returns:
        `np.ndarray` of shape `(b, count)`, float32 in [0, 1).
    """
    digest = hashlib.blake2b(repr((seed, epoch)).encode(), digest_size=8).digest()
    streams = _mix(index.astype(np.uint64) * GOLDEN + np.uint64(int.from_bytes(digest, "little")))
    numbers = _mix(streams[:, None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)
    return (numbers >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


# -- resampling -------------------------------------------------------------------------------------------------------


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp_min(0)


def _cubic(x: torch.Tensor, a: float = -0.5) -> torch.Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


FILTERS = {"bilinear": _triangle, "bicubic": _cubic}  # Pillow's


def resampling_weights(starts: torch.Tensor, ends: torch.Tensor, inside: int, outside: int, interpolation: str):
    """How the pixels of a line make up those of its resized part, as in Pillow (wider filters when it shrinks).

    Args:
        starts, ends (`torch.Tensor` of shape `(b,)`): the part, in pixels; it may reach out of the line.
        inside, outside (`int`): pixels of the line and of the result.
        interpolation (`str`): `bilinear` or `bicubic`.

    Returns:
        `torch.Tensor` of shape `(b, outside, inside)`; rows sum to 1, or are 0 where a pixel lies outside the line.
    """
    scale = ((ends - starts) / outside)[:, None]
    centers = starts[:, None] + (torch.arange(outside, device=starts.device) + 0.5) * scale
    distances = torch.arange(inside, device=starts.device) + 0.5 - centers[..., None]
    weights = FILTERS[interpolation](distances / scale[..., None].clamp_min(1.0))
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)
    return weights * ((centers > 0) & (centers < inside))[..., None]


def resample(images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, size: tuple[int, int], interpolation: str):
    """Cut a box out of each image, mirror it or not, and resize it.

    Args:
        images (`torch.Tensor` of shape `(b, c, h, w)`): uint8.
        boxes (`torch.Tensor` of shape `(b, 4)`): left, top, right and bottom, in pixels; black outside the image. One
            alone, of shape `(1, 4)`, is that of all images.
        flip (`torch.Tensor` of shape `(b,)`, or `(1,)`): bool.
        size (`tuple[int, int]`): height and width of the result.
        interpolation (`str`): `bilinear` or `bicubic`.

    Returns:
        `torch.Tensor` of shape `(b, c, *size)`, float32 in [0, 255].
    """
    left, top, right, bottom = boxes.unbind(1)
    rows = resampling_weights(top, bottom, images.shape[2], size[0], interpolation)
    columns = resampling_weights(left, right, images.shape[3], size[1], interpolation)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return (rows[:, None] @ images.float() @ columns.mT[:, None]).clamp(0, 255)


# -- views ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchTransform:
    """A view of whole batches, as a transform of [`create_transforms`] is one of single images.

    Args:
        kind (`str`): `center`, the evaluation's crop; `shift`, by up to an eighth of the side, with mirrored borders,
            or `crop`, a part of random area and aspect ratio, both mirrored every other time.
        size (`tuple[int, int]`), mean, std (`tuple[float, ...]`), interpolation (`str`), crop_pct (`float`), crop_mode
            (`str`): of timm's data config.
    """

    kind: str
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @property
    def is_random(self) -> bool:
        return self.kind != "center"

    def __call__(self, images: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """Prepare a batch.

        Args:
            images (`torch.Tensor` of shape `(b, 3, h, w)`): uint8.
            draws (`torch.Tensor` of shape `(b, 5)`): of [`uniform_draws`]; None for a view that is not random.

        Returns:
            `torch.Tensor` of shape `(b, 3, *size)`, normalized.
        """
        height, width = images.shape[2:]
        pixels = images
        if not self.is_random:
            box = self._center(height, width)
            if box != (0, 0, width, height) or self.size != (height, width):  # the same of all images
                boxes, flip = (torch.tensor([value], device=images.device) for value in (box, False))
                pixels = resample(images, boxes, flip, self.size, self.interpolation)
        else:
            assert draws is not None  # a random view is given some
            flip = draws[:, 2] < 0.5
            boxes = (shift_boxes if self.kind == "shift" else crop_boxes)(draws, height, width)
            if self.kind == "shift":
                images, boxes = mirror_borders(images, boxes)
            pixels = resample(images, boxes, flip, self.size, self.interpolation)
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (pixels / 255).sub_(mean).div_(std)

    def _center(self, height: int, width: int) -> tuple[float, float, float, float]:
        """What is left after a resize to `size` / `crop_pct` and a cut to `size`, in pixels of the image."""
        sides = [int(side / self.crop_pct) for side in self.size]
        if self.crop_mode != "squash":  # the shorter side is resized, the other one in proportion
            short = min(sides)
            sides = [int(short * side / min(height, width)) for side in (height, width)]
        (top, bottom), (left, right) = (
            _middle(side, kept, whole) for side, kept, whole in zip(sides, self.size, (height, width), strict=True)
        )
        return left, top, right, bottom


def _middle(resized: int, kept: int, whole: int) -> tuple[float, float]:
    start = round((resized - kept) / 2)
    return start * whole / resized, (start + kept) * whole / resized


def shift_boxes(draws: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The whole image, moved by up to an eighth of each side in whole pixels: boxes of shape `(b, 4)`."""
    reach = draws.new_tensor([width // 8, height // 8])
    offsets = (draws[:, :2] * (2 * reach + 1)).floor() - reach
    return torch.cat([offsets, offsets + draws.new_tensor([width, height])], 1)


def mirror_borders(images: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(b, c, h, w)` with an eighth of each side mirrored around them, and where `boxes` lie in those."""
    down, across = images.shape[2] // 8, images.shape[3] // 8
    padded = F.pad(images.float(), (across, across, down, down), mode="reflect")
    return padded, boxes + boxes.new_tensor([across, down, across, down])


def crop_boxes(draws: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A part of uniform area and log-uniform aspect ratio at a uniform place: boxes of shape `(b, 4)`.

    A part that is longer than the image is cut to it, where torchvision draws again.
    """
    area = (CROP_AREA[0] + draws[:, 3] * (CROP_AREA[1] - CROP_AREA[0])) * height * width
    low, high = (float(np.log(ratio)) for ratio in CROP_RATIO)
    ratio = (low + draws[:, 4] * (high - low)).exp()
    whole = draws.new_tensor([width, height])
    sides = torch.minimum(torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).round().clamp_min(1), whole)
    start = (draws[:, :2] * (whole - sides + 1)).floor()
    return torch.cat([start, start + sides], 1)


def create_batch_transforms(
    pretrained_cfg: dict, image_size: tuple[int, int], *, augmentation: str = "standard"
) -> tuple[BatchTransform, BatchTransform]:
    """Training and evaluation views of images of one size, as [`create_transforms`] makes them of single images.

    Args:
        pretrained_cfg (`dict`): timm's, as in `model.config.pretrained_cfg`.
        image_size (`tuple[int, int]`): height and width of the images as they are kept.
        augmentation (`str`): `none`, `standard` or `shift`.

    Raises:
        ValueError: on another `augmentation`, or an interpolation other than bilinear and bicubic.
    """
    if augmentation not in BATCHED:
        raise ValueError(f"Whole batches are augmented by {', '.join(BATCHED)}, not by `{augmentation}`.")
    config = data_config(pretrained_cfg)
    if config["interpolation"] not in FILTERS:
        raise ValueError(
            f"Whole batches are resized by {' or '.join(FILTERS)} interpolation, not by "
            f"`{config['interpolation']}`; give `--resident false`."
        )
    size = tuple(config["input_size"][1:])
    view = partial(
        BatchTransform,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=size,
        interpolation=config["interpolation"],
    )
    evaluation = view("center", crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
    if augmentation == "none":
        return evaluation, evaluation
    small = max(image_size) <= SMALL_IMAGE or max(size) <= SMALL_IMAGE
    return view("shift" if small or augmentation == "shift" else "crop"), evaluation


# -- datasets ---------------------------------------------------------------------------------------------------------


def stack_images(samples: TransformedDataset, *, largest: int | None = None) -> torch.Tensor | None:
    """Decode all images of a dataset.

    Args:
        samples ([`TransformedDataset`]): the dataset; its transform is not applied.
        largest (`int`, *optional*): longest side that an image may have, in pixels.

    Returns:
        `torch.Tensor` of shape `(n, 3, h, w)`, uint8; None if an image is larger, or of another size than the
        first.

    Raises:
        UnreadableImageError: at a bad image.
    """
    stacked = None
    for start in range(0, len(samples), CHUNK):
        images = samples.images(list(range(start, min(start + CHUNK, len(samples)))))
        width, height = images[0].size if stacked is None else stacked.shape[:1:-1]
        if (largest and max(width, height) > largest) or any(image.size != (width, height) for image in images):
            return None
        if stacked is None:
            stacked = torch.empty((len(samples), 3, height, width), dtype=torch.uint8)
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        stacked[start : start + len(images)] = pixels.permute(0, 3, 1, 2)
    return stacked


class ResidentDataset(TransformedDataset):
    """A [`TransformedDataset`] whose images are one tensor on a device, and whose batches are prepared there.

    [`collate_images`] passes on the batches that it gives. A loader needs no workers; each process of a distributed
    run holds all images.

    Args:
        dataset (`datasets.Dataset`): as of [`TransformedDataset`].
        images (`torch.Tensor` of shape `(n, 3, h, w)`): of its rows, uint8, as of [`stack_images`].
        transform ([`BatchTransform`]): the view.
        seed (`int`): of the augmentation, together with epoch and sample id.
    """

    def __init__(self, dataset: Dataset, images: torch.Tensor, transform: BatchTransform, *, seed: int = 0):
        super().__init__(dataset, transform, seed=seed)  # type: ignore[arg-type]  # a view of whole batches
        if len(images) != len(dataset):
            raise ValueError(f"There are {counted(len(images), 'image')} for {counted(len(dataset), 'row')}.")
        self.pixels = images

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        at, device = np.asarray(rows), self.pixels.device
        batch = {name: torch.as_tensor(values[at]) for name, values in self._columns.items()}
        images, draws = self.pixels[torch.as_tensor(at, device=device)], None
        view: BatchTransform = self.views["pixel_values"]  # type: ignore[assignment]
        if view.is_random:
            draws = torch.from_numpy(uniform_draws(self.seed, int(self._epoch), self.index[at], DRAWS)).to(device)
        return batch | {"pixel_values": view(images, draws)}

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}
