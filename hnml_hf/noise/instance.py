"""Noise that depends on the image: which wrong class it gets follows from its pixels."""

from collections.abc import Callable

import torch

from .checks import check_generator, check_labels, check_num_classes
from .draws import invert_cdf, rows_by_class


def instance_dependent_labels(
    load_pixels: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    *,
    num_classes: int,
    num_pixels: int,
    rate: float,
    rate_std: float = 0.1,
    pixel_scaling: str = "raw",
    chunk_size: int = 256,
    generator: torch.Generator,
) -> torch.Tensor:
    """Instance-dependent (part-dependent, PDN) noise: the wrong class of an image depends on its pixels.

    q_i ~ N(rate, rate_std^2) truncated to [0, 1]; W_y ~ N(0, 1)^{s x k} for each class y. For image x_i of class y:
    a = x_i W_y with a_y = -inf, p = q_i softmax(a), p_y = 1 - q_i, y'_i ~ Categorical(p).

    Only the weights of one class and the pixels of one chunk are in memory at a time. The matrix product is in
    float32, so a label whose two best classes tie to the last digits may differ between machines: save the labels.

    Args:
        load_pixels (`Callable`):
            Gets positions, int64 of shape `(m,)`, and returns the pixels of these images, shape `(m, num_pixels)`,
            with values 0..255 of any dtype.
        labels (`torch.Tensor` of shape `(n,)`): true labels in 0..k-1.
        num_classes (`int`): k, at least 2.
        num_pixels (`int`): s, values of an image (height x width x channels).
        rate (`float`): mean of the flip rates before truncation (which moves it inwards), strictly between 0 and 1.
        rate_std (`float`): standard deviation of the flip rates, positive; 0.1 in the paper.
        pixel_scaling (`str`):
            Part of the definition: report it. `"raw"`: values 0..255, as in the released code. `"unit"`: 0..1. In
            both the mean image dominates, and on CIFAR-10 about 70 % of a class's flips go to one class.
            `"standardized"`: each image minus its mean, divided by its standard deviation; about 25 % there.
        chunk_size (`int`): images loaded at a time; does not change the result.
        generator (`torch.Generator`): on the CPU.

    Returns:
        `torch.Tensor` of shape `(n,)`, int64, on the device of `labels`.

    Raises:
        ValueError: if an argument is out of range or `load_pixels` returns another shape.

    References:
        Xia et al., Part-dependent Label Noise: Towards Instance-dependent Label Noise, NeurIPS 2020, and its released
        code (`tools.get_instance_noisy_label`).
    """
    check_num_classes(num_classes)
    check_generator(generator)
    if not 0.0 < rate < 1.0 or not rate_std > 0.0:
        raise ValueError(
            f"`rate` must lie strictly between 0 and 1 and `rate_std` be positive, got {rate} and {rate_std}: "
            "the flip rates scatter around `rate`, so 0 would not mean clean labels."
        )
    if pixel_scaling not in ("raw", "unit", "standardized"):
        raise ValueError(f'`pixel_scaling` must be "raw", "unit" or "standardized", got {pixel_scaling!r}.')

    clean = check_labels(labels, num_classes=num_classes).cpu()
    flip_rates = _truncated_normal(len(clean), mean=rate, std=rate_std, generator=generator)
    uniform = torch.rand(len(clean), generator=generator, dtype=torch.float64)
    noisy = torch.empty_like(clean)
    for true_class, rows in enumerate(rows_by_class(clean, num_classes=num_classes)):
        weight = torch.randn(num_pixels, num_classes, generator=generator)
        for chunk in rows.split(chunk_size) if len(rows) else ():
            pixels = _scale_pixels(load_pixels(chunk), pixel_scaling, expected_shape=(len(chunk), num_pixels))
            scores = (pixels @ weight).to(torch.float64)  # (m, k)
            scores[:, true_class] = -torch.inf
            probabilities = flip_rates[chunk, None] * scores.softmax(dim=1)
            probabilities[:, true_class] = 1 - flip_rates[chunk]
            noisy[chunk] = invert_cdf(probabilities, uniform[chunk, None]).squeeze(1)
    return noisy.to(labels.device)


def _truncated_normal(num_samples: int, *, mean: float, std: float, generator: torch.Generator) -> torch.Tensor:
    """N(mean, std^2) restricted to [0, 1] by drawing the outliers again; float64 of shape (num_samples,)."""
    values = torch.full((num_samples,), -1.0, dtype=torch.float64)
    while (outside := (values < 0) | (values > 1)).any():
        count = int(outside.sum())
        values[outside] = mean + std * torch.randn(count, generator=generator, dtype=torch.float64)
    return values


def _scale_pixels(pixels: torch.Tensor, scaling: str, *, expected_shape: tuple[int, int]) -> torch.Tensor:
    if tuple(pixels.shape) != expected_shape:
        raise ValueError(
            f"`load_pixels` returned shape {tuple(pixels.shape)}, expected {expected_shape}: all images must have "
            "`num_pixels` values. Resize them to one size first."
        )
    pixels = pixels.float()
    if scaling == "unit":
        return pixels / 255
    if scaling == "standardized":
        std, mean = torch.std_mean(pixels, dim=1, keepdim=True)
        return (pixels - mean) / std.clamp(min=1e-6)  # a uniform image becomes all zeros
    return pixels
