"""From rows to samples: decoding, and augmentation whose randomness belongs to the sample, not to the process."""

import copy
import hashlib
import math
import random
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import PIL.Image
import timm.data
import torch
from datasets import Dataset, Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, str_to_interp_mode
from torchvision import transforms
from transformers import CLIPImageProcessor

from .decoding import MAX_PIXELS, UNREADABLE, decode
from .splits import held_out_labels
from .targets import targets_of


LARGEST_SIDE = 8192  # of what a network sees, in pixels
SMALL_IMAGE = 64  # pixels; below, the field shifts images by a few pixels instead of cutting out a part of random size

CROP_MODES = ("center", "squash")  # of timm's; its third, `border`, no image processor of transformers can express
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
AUGMENTATIONS = ("none", "standard", "shift", "randaugment")
# the strength varies below 9 of 10 only: at 10 timm keeps no bit of a posterized image, which Pillow refuses
RANDAUGMENT = "rand-m9-mmax9-mstd0.5-inc1"
IMMOBILE_OPERATIONS = [
    "AutoContrast",
    "Equalize",
    "Invert",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
]


def seed_generators(*key: int):
    """Let the global random generators (Python, NumPy, torch on the CPU) follow from `key` alone.

    The transforms of timm and torchvision draw from the global generators. Seeding them by (seed, epoch, sample)
    makes a sample's augmentation the same whatever the number of workers or processes and wherever a run was resumed.
    """
    digest = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    random.seed(digest)
    np.random.seed(digest % 2**32)
    torch.default_generator.manual_seed(digest % 2**63)


@contextmanager
def preserved_generators():
    """Whatever is drawn or seeded inside the block, the global random generators go on after it as before."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _numbers(value, low: float) -> bool:
    """Whether these are three finite numbers above `low`."""
    numbers = value if isinstance(value, (list, tuple)) else ()
    real = [number for number in numbers if isinstance(number, Real) and not isinstance(number, bool)]
    return len(numbers) == len(real) == 3 and all(math.isfinite(number) and float(number) > low for number in real)


def _image_size(value) -> bool:
    """Whether these are channels, height and width of an image in colors."""
    whole = _numbers(value, low=0) and all(number == int(number) for number in value)
    return whole and value[0] == 3 and max(value) <= LARGEST_SIDE


# entries of `pretrained_cfg`: what a value must be, and the same in words
PREPARATION: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (_image_size, f"[3, height, width] with sides of 1 to {LARGEST_SIDE} pixels"),
    "mean": (partial(_numbers, low=-math.inf), "three finite numbers"),
    "std": (partial(_numbers, low=0), "three finite numbers above 0"),
    "interpolation": (lambda value: value is None or value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop_pct": (lambda value: value is None or _numbers([value] * 3, 0), "a finite number above 0"),
}


def data_config(pretrained_cfg: dict) -> dict:
    """How timm prepares images for a backbone, if timm and transformers can prepare them alike.

    Raises:
        ValueError: naming the entry of `pretrained_cfg` that cannot be used.
    """
    for name, (holds, wanted) in PREPARATION.items():
        value = pretrained_cfg.get(name)
        if name in pretrained_cfg and not holds(value):
            raise ValueError(
                f"The backbone's `pretrained_cfg` has `{name}={value!r}`; it must be {wanted}. Correct it there (in a "
                "saved folder: in `config.json`), or choose other weights."
            )
    config = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
    if config["crop_mode"] not in CROP_MODES:
        raise ValueError(
            f"The backbone's `pretrained_cfg` has `crop_mode={config['crop_mode']!r}`, but images must be prepared "
            f"alike by timm and transformers, and both know {' and '.join(CROP_MODES)} only. Set one of these in "
            "`pretrained_cfg` (in a saved folder: of `config.json`), or choose other weights."
        )
    return config


def create_transforms(pretrained_cfg: dict, *, augmentation: str = "standard") -> tuple[Callable, Callable]:
    """Training and evaluation transforms for a backbone, by timm's `create_transform` and the backbone's own data
    config.

    Args:
        pretrained_cfg (`dict`): timm's, as in `model.config.pretrained_cfg` (input size, mean, std, interpolation,
            and `crop_pct` and `crop_mode` of evaluation).
        augmentation (`str`): `none` (the evaluation transform), `standard` (random crop and flip; where image or input
            has at most 64 pixels a shift by up to an eighth instead of a random crop), `shift` (that shift whatever
            the size, and flip), or `randaugment` (`standard` with RandAugment and erasing).

    Returns:
        Two functions from an RGB image to a `torch.Tensor` of shape `(channels, height, width)`.

    Raises:
        ValueError: on another `augmentation`, or a `crop_mode` other than `center` and `squash`.

    Example:

        training, evaluation = create_transforms(model.config.pretrained_cfg, augmentation="randaugment")
        training(dataset[0]["image"]).shape
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"`augmentation={augmentation!r}` is none of {', '.join(AUGMENTATIONS)}.")
    config = data_config(pretrained_cfg)
    shared = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
    crop = {key: config[key] for key in ("crop_pct", "crop_mode")}
    evaluation = timm.data.create_transform(**shared, **crop, is_training=False)
    if augmentation == "none":
        return evaluation, evaluation
    randaugment = augmentation == "randaugment"
    training = timm.data.create_transform(
        **shared,
        is_training=True,
        color_jitter=None,
        auto_augment=RANDAUGMENT if randaugment else None,
        re_prob=0.25 if randaugment else 0.0,
    )
    size = config["input_size"][-1]
    # as the evaluation resizes, and with mirrored borders: a pretrained backbone never saw black ones
    resize = transforms.Resize((size, size), str_to_interp_mode(config["interpolation"]))
    shift = transforms.Compose([resize, transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect")])
    if augmentation == "shift" or size <= SMALL_IMAGE:
        training.transforms[0] = shift
    else:
        training.transforms[0] = BySize(shift, training.transforms[0])
    return training, evaluation


class BySize:
    """One transform for images of at most `SMALL_IMAGE` pixels, another one for larger ones."""

    def __init__(self, small: Callable, large: Callable):
        self.small, self.large = small, large

    def __call__(self, image: PIL.Image.Image):
        return (self.small if max(image.size) <= SMALL_IMAGE else self.large)(image)

    def __repr__(self) -> str:
        return f"BySize(small={self.small}, large={self.large})"


def create_strong_transform(weak: Callable) -> Callable:
    """`weak`, then changes of color, contrast and sharpness by RandAugment, then an erased rectangle (Cubuk et al.,
    CVPRW 2020; Zhong et al., AAAI 2020).

    Nothing is moved: drawn from the same seed, every pixel shows the same place as in the weak view, so that a map of
    the one marks the other.

    Args:
        weak (`Callable`): a training transform of [`create_transforms`].
    """
    operations = timm.data.auto_augment.rand_augment_ops(
        magnitude=9, hparams={"magnitude_std": 0.5, "magnitude_max": 9}, transforms=IMMOBILE_OPERATIONS
    )
    steps = list(weak.transforms)  # type: ignore[attr-defined]  # a `Compose`
    to_tensor = next(i for i, step in enumerate(steps) if isinstance(step, (MaybeToTensor, transforms.ToTensor)))
    colors = timm.data.auto_augment.RandAugment(operations, num_layers=2)
    erasing = RandomErasing(probability=0.5, mode="const", device="cpu")
    return transforms.Compose([*steps[:to_tensor], colors, *steps[to_tensor:], erasing])


def create_image_processor(pretrained_cfg: dict) -> CLIPImageProcessor:
    """The evaluation transform as a transformers image processor, so that `pipeline` needs nothing of ours.

    Args:
        pretrained_cfg (`dict`): `model.config.pretrained_cfg`.

    Example:

        create_image_processor(model.config.pretrained_cfg).save_pretrained("outputs/run")
    """
    config = data_config(pretrained_cfg)
    _, height, width = config["input_size"]
    sides = {name: int(side / config["crop_pct"]) for name, side in (("height", height), ("width", width))}
    return CLIPImageProcessor(
        size=sides if config["crop_mode"] == "squash" else {"shortest_edge": min(sides.values())},
        crop_size={"height": height, "width": width},
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
        resample=PIL.Image.Resampling[config["interpolation"].upper()].value,
    )


class UnreadableImageError(RuntimeError):
    """An image of the training data cannot be decoded.

    Example:

        try:
            trainer.train()
        except UnreadableImageError as error:
            print(error)  # which sample, and why
    """


class TransformedDataset(torch.utils.data.Dataset):
    """A dataset with the four features of this package, as samples for training.

    Args:
        dataset (`datasets.Dataset`): columns `image`, `label`, `clean_label`, `index`; `weight` (0 to 1) where some
            labels are to count less than others; and soft targets, as [`add_targets`] puts them there.
        transform (`Callable`): from an RGB image to a tensor.
        seed (`int`): of the augmentation, together with epoch and sample id.
        strong_transform (`Callable`, *optional*): gives a second view, `strong_pixel_values`. Both views draw from the
            same seed, so that transforms that start alike cut out the same part of the image.
        cache (`"images"` or `"tensors"`, *optional*): keep what was read in memory, in each worker: decoded images, at
            three bytes a pixel, or, of transforms that draw nothing, their results, at twelve. For small images, whose
            preparation costs as much as a step of a small network.
        max_pixels (`int`): larger images count as unreadable.

    A sample is a `dict` with `pixel_values`, `labels`, `clean_labels`, `index` and, if there are such columns,
    `sample_weights`, `target_classes` and `target_probabilities`; after [`~TransformedDataset.hold_out`] also
    `held_out`. `labels`, `clean_labels`, `index`, `weights`, `held_out` and `targets` (a pair of arrays), None where
    there is no such column, are also there as arrays of all rows.

    Raises:
        UnreadableImageError: when a bad image is reached; a row is never replaced by another one.

    Example:

        training, evaluation = create_transforms(model.config.pretrained_cfg)
        samples = TransformedDataset(dataset, training)
        samples[0]["pixel_values"], samples[0]["index"]
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        *,
        seed: int = 0,
        strong_transform: Callable[[PIL.Image.Image], torch.Tensor] | None = None,
        cache: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        missing = {"image", "label", "clean_label", "index"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"Columns {sorted(missing)} are missing; the dataset has {dataset.column_names}. Load it with "
                "`load_noisy_dataset`, or rename your columns."
            )
        self.dataset, self.seed, self.max_pixels = dataset, seed, max_pixels
        self._stored = dataset.select_columns(["image"]).with_format(None).cast_column("image", Image(decode=False))
        self.views = {"pixel_values": transform}
        if strong_transform is not None:
            self.views["strong_pixel_values"] = strong_transform
        self.features = dataset.features
        columns = dataset.select_columns(["label", "clean_label", "index"]).with_format("numpy")
        self.labels, self.clean_labels, self.index = (
            columns["label"][:],
            columns["clean_label"][:],
            columns["index"][:],
        )
        weighted = "weight" in dataset.column_names
        self.weights = dataset.select_columns(["weight"]).with_format("numpy")["weight"][:] if weighted else None
        self.targets = targets_of(dataset)
        self.held_out: np.ndarray | None = None
        if cache not in (None, "images", "tensors"):
            raise ValueError(f"`cache={cache!r}` is neither `images` nor `tensors`.")
        self._decoded: dict[int, PIL.Image.Image] | None = {} if cache == "images" else None
        self._prepared: dict[int, dict] | None = {} if cache == "tensors" else None
        self._columns = self.columns()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers must see it change

    def hold_out(self, fraction: float, *, seed: int):
        """Draw the samples whose labels no loss may see ([`~hnml_hf.data.splits.held_out_labels`]); 0 is none."""
        self.held_out = held_out_labels(self.index, fraction, seed=seed) if fraction else None
        self._columns = self.columns()
        if self._prepared is not None:
            self._prepared.clear()

    def set_epoch(self, epoch: int):
        """Called by the data loader at the start of each epoch."""
        self._epoch.fill_(epoch)

    def at_epoch(self, epoch: int) -> "TransformedDataset":
        """The same samples with the augmentation of one epoch, whatever epoch this dataset goes on to.

        Args:
            epoch (`int`): from 0.
        """
        other = copy.copy(self)
        other._epoch = torch.full((), epoch, dtype=torch.int64)
        return other

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict]:
        if self._prepared is None:
            return self._samples(rows)
        missing = [row for row in rows if row not in self._prepared]
        if missing:
            self._prepared.update(zip(missing, self._samples(missing), strict=True))
        return [dict(self._prepared[row]) for row in rows]

    def _samples(self, rows: list[int]) -> list[dict]:
        images = self.images(rows)
        with preserved_generators():
            return [self._sample(row, image) for row, image in zip(rows, images, strict=True)]

    def images(self, rows: list[int]) -> list[PIL.Image.Image]:
        """Decode some rows, in RGB."""
        if self._decoded is not None:
            missing = [row for row in rows if row not in self._decoded]
            if missing:
                self._decoded.update(zip(missing, self._decode(missing), strict=True))
            return [self._decoded[row] for row in rows]
        return self._decode(rows)

    def _decode(self, rows: list[int]) -> list[PIL.Image.Image]:
        ids = self.index[rows]  # outside of `try`: a row that is not there is no bad image
        try:
            return [decode(stored, max_pixels=self.max_pixels) for stored in self._stored[rows]["image"]]
        except UNREADABLE as error:
            raise UnreadableImageError(
                f"{self._first_unreadable(rows, ids)} cannot be read: {str(error) or type(error).__name__}. Find all "
                "bad files with `hnml check DATA --exclude_output excluded.jsonl` and "
                "leave them out with `--exclude excluded.jsonl`."
            ) from error

    def _first_unreadable(self, rows: list[int], ids: np.ndarray) -> str:
        for row, sample in zip(rows, ids.tolist(), strict=True):
            stored = self._stored[row]["image"]
            try:
                decode(stored, max_pixels=self.max_pixels)
            except UNREADABLE:
                return f"Image `{(stored or {}).get('path')}` of the sample with index {sample}"
        return f"One of the images of the samples with index {ids.tolist()}"

    def columns(self) -> dict[str, np.ndarray]:
        """What a sample has besides images: arrays of all rows, under their names in a batch."""
        columns = {"index": self.index, "labels": self.labels, "clean_labels": self.clean_labels}
        if self.weights is not None:
            columns["sample_weights"] = self.weights.astype(np.float32)
        if self.held_out is not None:
            columns["held_out"] = self.held_out
        if self.targets is not None:
            columns["target_classes"], columns["target_probabilities"] = self.targets
        return columns

    def _sample(self, row: int, image: PIL.Image.Image) -> dict:
        sample = {name: values[row] for name, values in self._columns.items()}
        for name, transform in self.views.items():
            seed_generators(self.seed, int(self._epoch), int(sample["index"]))
            sample[name] = transform(image)
        return sample
