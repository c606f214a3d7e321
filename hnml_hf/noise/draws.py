"""Labels drawn from a transition matrix, each on its own or for an exact share of the samples."""

import torch

from .checks import check_generator, check_labels, check_share
from .transitions import check_transition_matrix


def corrupt_labels(
    labels: torch.Tensor, transition_matrix: torch.Tensor, *, generator: torch.Generator
) -> torch.Tensor:
    """Draw a noisy label for each sample on its own: y'_i ~ Categorical(T[y_i]). How many are wrong is random.

    Args:
        labels (`torch.Tensor` of shape `(n,)`): true labels in 0..k-1.
        transition_matrix (`torch.Tensor` of shape `(k, k)`): T, rows sum to 1.
        generator (`torch.Generator`): on the CPU; exactly n numbers are taken from it.

    Returns:
        `torch.Tensor` of shape `(n,)`, int64, on the device of `labels`.

    Raises:
        ValueError: if the matrix is no transition matrix, a label is out of range or the generator is not on the
        CPU.
    """
    matrix = check_transition_matrix(transition_matrix.cpu())
    check_generator(generator)
    clean = check_labels(labels, num_classes=len(matrix)).cpu()
    uniform = torch.rand(len(clean), generator=generator, dtype=torch.float64)
    noisy = torch.empty_like(clean)
    for true_class, rows in enumerate(rows_by_class(clean, num_classes=len(matrix))):
        noisy[rows] = invert_cdf(matrix[true_class], uniform[rows])
    return noisy.to(labels.device)


def corrupt_labels_exact(
    labels: torch.Tensor, flip_matrix: torch.Tensor, *, rate: float, generator: torch.Generator
) -> torch.Tensor:
    """Redraw the labels of exactly floor(r n) samples, picked at random among all, from the rows of `flip_matrix`.

    `flip_matrix` is a transition matrix at rate 1: what happens to a sample once it is picked. With
    `symmetric_transition_matrix(k, 1.0, include_true=False)` exactly floor(r n) labels are wrong; with
    `include_true=True` about floor(r n) (1 - 1/k) are.

    Args:
        labels (`torch.Tensor` of shape `(n,)`): true labels in 0..k-1.
        flip_matrix (`torch.Tensor` of shape `(k, k)`): rows sum to 1.
        rate (`float`): r, in [0, 1].
        generator (`torch.Generator`): on the CPU.

    Returns:
        `torch.Tensor` of shape `(n,)`, int64, on the device of `labels`.

    Raises:
        ValueError: as `corrupt_labels`, or if `rate` is out of range.

    References:
        Released code of DivideMix (Li et al., ICLR 2020): an exact share of all indices, then uniform or by a table.
    """
    check_share(rate, name="rate")
    check_generator(generator)
    noisy = check_labels(labels, num_classes=len(flip_matrix)).clone()
    # 0.29 * 100 is 28.999999999999996 in floating point and means 29
    num_picked = int(rate * len(noisy) + 1e-9)
    picked = torch.randperm(len(noisy), generator=generator)[:num_picked].to(labels.device)
    noisy[picked] = corrupt_labels(noisy[picked], flip_matrix, generator=generator)
    return noisy


def rows_by_class(labels: torch.Tensor, *, num_classes: int) -> tuple[torch.Tensor, ...]:
    """The positions of each class in ascending order, found by one sort."""
    counts = labels.bincount(minlength=num_classes)
    return labels.argsort(stable=True).split(counts.tolist())


def invert_cdf(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Classes drawn from `uniform` in [0, 1); a class of probability 0 is never drawn, whatever the rounding."""
    cdf = probabilities.cumsum(dim=-1)
    # dividing makes the last value, and all before it that equal it, exactly 1
    return torch.searchsorted(cdf / cdf[..., -1:], uniform, right=True)
