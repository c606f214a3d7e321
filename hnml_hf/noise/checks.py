"""Arguments that the functions of this package share: what they must be, said in one place."""

import torch


def check_share(value: float, *, name: str) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` is a share and must lie in [0, 1], got {value}.")


def check_generator(generator: torch.Generator) -> None:
    if generator.device.type != "cpu":
        raise ValueError(
            f"`generator` must be on the CPU, got {generator.device}: one seed gives the same labels on every device. "
            'Create it with `torch.Generator("cpu")`.'
        )


def check_num_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(f"`num_classes` must be at least 2, got {num_classes}: label noise needs another class.")


def check_labels(labels: torch.Tensor, *, num_classes: int) -> torch.Tensor:
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"`labels` must be integers of shape (n,), got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"`labels` must lie in 0..{num_classes - 1}, got {labels.min().item()}..{labels.max().item()}. "
            "Labels that are unknown cannot be corrupted: leave these rows out."
        )
    return labels.to(torch.int64)
