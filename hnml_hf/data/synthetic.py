"""Synthetic label noise on any dataset with the features of this package.

`draw_noise` draws the labels (`noise_file.py` saves them), `add_noise` draws and applies.

Draw on the full training set, in its stored order and before any split. A validation set cut from the result has noisy
labels (as in ELR and Co-teaching); the evaluation splits stay clean.
"""

import csv
import logging
import os
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from .. import noise
from ..common.words import counted
from .decoding import MAX_PIXELS, decode
from .noise_file import NoiseFile, apply_noise_file, clean_labels, unique_index
from .schema import UNKNOWN, column, labels_fingerprint


logger = logging.getLogger(__name__)

KINDS = ("symmetric", "asymmetric", "pairflip", "instance", "matrix")
ASYMMETRIC_SCHEMES = ("cifar10", "cifar100_superclass", "cifar100_legacy_block5")


def add_noise(dataset: Dataset, **options) -> Dataset:
    """Draw synthetic noise and apply it.

    Args:
        dataset (`datasets.Dataset`), options: see [`draw_noise`].

    Returns:
        `datasets.Dataset`: see [`apply_noise_file`].

    Raises:
        ValueError: if the labels are not known to be true, or an option is missing, misplaced or out of range.

    Example:

        clean = load_noisy_dataset("quickstart")["train"]
        noisy = add_noise(clean, kind="symmetric", rate=0.4, seed=0)
    """
    return apply_noise_file(dataset, draw_noise(dataset, **options))


def draw_noise(
    dataset: Dataset,
    *,
    kind: str,
    seed: int,
    rate: float | None = None,
    draw: str = "per_sample",
    include_true: bool = False,
    asymmetric_scheme: str | None = None,
    transition_matrix: str | os.PathLike | torch.Tensor | None = None,
    pixel_scaling: str = "raw",
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> NoiseFile:
    """Draw a noisy label for every row of a dataset whose labels are true. The dataset is not changed.

    The draw runs over the rows in the order of the dataset, with a generator of its own. The definitions are in
    `hnml_hf.noise`.

    Args:
        dataset (`datasets.Dataset`): with the features `image`, `label`, `clean_label`, `index`.
        kind (`str`):
            `"symmetric"`, `"asymmetric"` (needs `asymmetric_scheme`), `"pairflip"`, `"instance"` (part-dependent
            noise) or `"matrix"` (needs `transition_matrix`).
        seed (`int`): of the generator.
        rate (`float`): noise rate in [0, 1]; below 0.5 for `"pairflip"`; not for `"matrix"`.
        draw (`str`):
            `"per_sample"`: each label is drawn on its own. `"exact"`: exactly floor(rate x rows) samples are picked
            and redrawn; for `"symmetric"`, `"asymmetric"` and `"pairflip"`.
        include_true (`bool`):
            For `"symmetric"`: whether a redrawn label may be the true one, so that a share of rate (1 - 1/k) is wrong.
        asymmetric_scheme (`str`):
            `"cifar10"`, `"cifar100_superclass"` or `"cifar100_legacy_block5"`. For other data write a matrix.
        transition_matrix (`str` or `torch.Tensor`):
            k x k, row i holds P(noisy = j | clean = i): a CSV file without header, or the values.
        pixel_scaling (`str`): for `"instance"`: `"raw"`, `"unit"` or `"standardized"`.
        image_size (`int`):
            For `"instance"`: resize all images to this many pixels a side. Needed if they differ in size; wise above
            64 pixels, since the weights of a class take 4 x 3 x side^2 x k bytes.
        max_pixels (`int`): for `"instance"`: a larger image is refused.

    Returns:
        `NoiseFile`.

    Raises:
        ValueError: if the labels are not known to be true, or an option is missing, misplaced or out of range.
    """
    clean = clean_labels(dataset)
    index = unique_index(dataset)
    num_classes = dataset.features["label"].num_classes
    settings = _check_options(
        kind,
        num_classes,
        rate=rate,
        draw=draw,
        include_true=include_true,
        asymmetric_scheme=asymmetric_scheme,
        transition_matrix=transition_matrix,
        pixel_scaling=pixel_scaling,
        image_size=image_size,
    )
    unknown = int((column(dataset, "clean_label") == UNKNOWN).sum())
    if unknown:
        logger.warning("`clean_label` is unknown in %d rows: their `label` is taken as true.", unknown)

    generator = torch.Generator().manual_seed(seed)
    labels = torch.from_numpy(clean)
    share: Any = rate  # None for a matrix alone, which `_check_options` has seen to
    if kind == "instance":
        load_pixels, num_pixels = _pixel_loader(dataset, index, image_size, max_pixels)
        noisy = noise.instance_dependent_labels(
            load_pixels,
            labels,
            num_classes=num_classes,
            num_pixels=num_pixels,
            rate=share,
            pixel_scaling=pixel_scaling,
            generator=generator,
        )
    elif draw == "exact":
        flip_matrix = _transition_matrix(settings, num_classes, rate=1.0)
        noisy = noise.corrupt_labels_exact(labels, flip_matrix, rate=share, generator=generator)
    else:
        matrix = _transition_matrix(settings, num_classes, rate=rate)
        noisy = noise.corrupt_labels(labels, matrix, generator=generator)

    noisy = noisy.numpy()
    order = np.argsort(index)
    drawn = NoiseFile(
        dataset_fingerprint=labels_fingerprint(index, clean, num_classes),
        num_classes=num_classes,
        noise={"kind": kind, "seed": seed, **settings},
        actual_rate=float((noisy != clean).mean()),
        index=index[order],
        labels=noisy[order],
    )
    logger.info(
        "Synthetic noise %s, rate %s, seed %d: %.2f %% of %d labels are wrong.",
        kind,
        rate,
        seed,
        100 * drawn.actual_rate,
        len(clean),
    )
    return drawn


def load_transition_matrix(path: str | os.PathLike) -> torch.Tensor:
    """Read a transition matrix from a CSV file: k lines of k numbers, no header, row i = P(noisy = j | clean = i).

    Returns:
        `torch.Tensor` of shape `(num_classes, num_classes)`, float64.

    Raises:
        ValueError: naming file and line, if an entry is no number, lines differ in length, or it is no transition
        matrix.
    """
    rows = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue  # blank line
            try:
                rows.append([float(field) for field in fields])
            except ValueError as error:
                raise ValueError(
                    f"{path}:{reader.line_num}: {error}. A transition matrix is a CSV file of numbers without header, "
                    "with commas between and dots inside the numbers."
                ) from error
            if len(rows[-1]) != len(rows[0]):
                raise ValueError(
                    f"{path}:{reader.line_num}: {len(rows[-1])} entries, but the first line has {len(rows[0])}."
                )
    try:
        return noise.check_transition_matrix(torch.tensor(rows, dtype=torch.float64))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ---- options --------------------------------------------------------------------------------------------------------


def _check_options(kind: str, num_classes: int, **options) -> dict:
    """The options that belong to `kind`, for the noise file; raises for missing, misplaced and unknown ones."""
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
    if options["draw"] not in ("per_sample", "exact"):
        raise ValueError(f'`draw` must be "per_sample" or "exact", got {options["draw"]!r}.')
    belongs = {
        "symmetric": ("rate", "draw", "include_true"),
        "asymmetric": ("rate", "draw", "asymmetric_scheme"),
        "pairflip": ("rate", "draw"),
        "instance": ("rate", "pixel_scaling", "image_size"),
        "matrix": ("transition_matrix",),
    }[kind]
    defaults = {"draw": "per_sample", "include_true": False, "pixel_scaling": "raw"}
    for name, value in options.items():
        if name not in belongs and value is not None and value != defaults.get(name):
            raise ValueError(f"`{name}` has no meaning for {kind} noise: leave it out.")
    for name in ("rate", "asymmetric_scheme", "transition_matrix"):
        if name in belongs and options[name] is None:
            raise ValueError(f"{kind} noise needs `{name}`.")

    if kind == "pairflip" and not options["rate"] < 0.5:
        raise ValueError(
            f"`rate` of pairflip noise must be below 0.5, got {options['rate']}: from there on most images of a class "
            "carry the next class's label, and nothing tells the two apart."
        )
    if kind == "asymmetric":
        scheme = options["asymmetric_scheme"]
        if scheme not in ASYMMETRIC_SCHEMES:
            raise ValueError(f"`asymmetric_scheme` must be one of {', '.join(ASYMMETRIC_SCHEMES)}, got {scheme!r}.")
        needed = 10 if scheme == "cifar10" else 100
        if num_classes != needed:
            raise ValueError(
                f"The scheme {scheme} is a table of {counted(needed, 'class')}, the dataset has {num_classes}. "
                "Write the flips "
                'of your classes as a transition matrix and use `kind="matrix"`.'
            )
    settings = {name: options[name] for name in belongs}
    if kind == "matrix":
        matrix = options["transition_matrix"]
        matrix = noise.check_transition_matrix(matrix) if torch.is_tensor(matrix) else load_transition_matrix(matrix)
        if len(matrix) != num_classes:
            raise ValueError(
                f"The transition matrix has {counted(len(matrix), 'row')}, the dataset has "
                f"{counted(num_classes, 'class')}; it needs one "
                "row for each class, in id order."
            )
        settings["transition_matrix"] = matrix.tolist()
    return settings


def _transition_matrix(settings: dict, num_classes: int, *, rate: Any) -> torch.Tensor:
    if "transition_matrix" in settings:
        return torch.tensor(settings["transition_matrix"], dtype=torch.float64)
    if "include_true" in settings:
        return noise.symmetric_transition_matrix(num_classes, rate, include_true=settings["include_true"])
    if "asymmetric_scheme" in settings:
        scheme = settings["asymmetric_scheme"]
        flips = noise.CIFAR10_FLIPS if scheme == "cifar10" else noise.cifar100_flips(scheme.removeprefix("cifar100_"))
        return noise.flip_transition_matrix(num_classes, rate, flips=flips)
    return noise.pair_flip_transition_matrix(num_classes, rate)


def _pixel_loader(dataset: Dataset, index: np.ndarray, image_size: int | None, max_pixels: int):
    """A function from positions to RGB pixels 0..255 of shape (m, s), and s."""
    images = dataset.select_columns(["image"]).with_format(None).cast_column("image", datasets.Image(decode=False))
    size = (image_size, image_size) if image_size else decode(images[0]["image"], max_pixels=max_pixels).size

    def load_pixels(rows: torch.Tensor) -> torch.Tensor:
        pixels = []
        for row, image in zip(rows.tolist(), images[rows.tolist()]["image"], strict=True):
            image = decode(image, max_pixels=max_pixels)
            if image_size and image.size != size:
                image = image.resize(size, Image.Resampling.BILINEAR)
            if image.size != size:
                raise ValueError(
                    f"Instance-dependent noise needs images of one size; index {index[row]} has {image.size}, the "
                    f"first one {size}. Pass `image_size`, for example 32, to resize them for the draw."
                )
            pixels.append(np.asarray(image).reshape(-1))
        return torch.from_numpy(np.stack(pixels))

    return load_pixels, 3 * size[0] * size[1]
