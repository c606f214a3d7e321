"""Transition matrices: with what probability a class is given as which."""

import torch

from .checks import check_num_classes, check_share


# truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog
CIFAR10_FLIPS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}

# the true superclass of each fine class of CIFAR-100, in the order of the fine ids (which are alphabetical)
# fmt: off
CIFAR100_SUPERCLASSES = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11,
    6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5,
    5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
    10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13,
    16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)
# fmt: on


def symmetric_transition_matrix(num_classes: int, rate: float, *, include_true: bool) -> torch.Tensor:
    """Symmetric noise. With the true class excluded T = (1 - r) I + r / (k - 1) off the diagonal, and a share r of the
    labels is wrong; with it included T = (1 - r) I + r / k everywhere, and a share r (1 - 1/k) is wrong.

    The two differ: every report of a symmetric rate must say which one it means.

    Args:
        num_classes (`int`): k, at least 2.
        rate (`float`): r, in [0, 1].
        include_true (`bool`): whether a redrawn label may be the true one.

    Returns:
        `torch.Tensor` of shape `(num_classes, num_classes)`, float64.

    Raises:
        ValueError: if an argument is out of range.

    References:
        Excluded: Patrini et al., Making Deep Neural Networks Robust to Label Noise, CVPR 2017; Han et al.,
        Co-teaching, NeurIPS 2018. Included: released code of DivideMix (Li et al., ICLR 2020) and ELR (Liu et al.,
        NeurIPS 2020).
    """
    check_num_classes(num_classes)
    check_share(rate, name="rate")
    identity = torch.eye(num_classes, dtype=torch.float64)
    if include_true:
        return (1 - rate) * identity + rate / num_classes
    return (1 - rate) * identity + rate / (num_classes - 1) * (1 - identity)


def pair_flip_transition_matrix(num_classes: int, rate: float) -> torch.Tensor:
    """Pair flip: class i becomes i + 1 (the last one becomes 0) with probability r.

    Args:
        num_classes (`int`): k, at least 2.
        rate (`float`): r, in [0, 1]. From 0.5 on the given label no longer tells the true one.

    Returns:
        `torch.Tensor` of shape `(num_classes, num_classes)`, float64.

    Raises:
        ValueError: if an argument is out of range.

    References:
        Han et al., Co-teaching, NeurIPS 2018 (r = 0.45).
    """
    check_num_classes(num_classes)
    return flip_transition_matrix(num_classes, rate, flips={i: (i + 1) % num_classes for i in range(num_classes)})


def flip_transition_matrix(num_classes: int, rate: float, *, flips: dict[int, int]) -> torch.Tensor:
    """Asymmetric noise by a table: class i becomes `flips[i]` with probability r; a class that is not in it stays.

    Both directions of a table are read from the true label, so 3 -> 5 together with 5 -> 3 swaps them (a loop that
    relabels in place would flip some images back).

    Args:
        num_classes (`int`): k, at least 2.
        rate (`float`): r, in [0, 1].
        flips (`dict[int, int]`): true class to wrong class, for example `CIFAR10_FLIPS` or `cifar100_flips(...)`.

    Returns:
        `torch.Tensor` of shape `(num_classes, num_classes)`, float64.

    Raises:
        ValueError: if an argument is out of range or a class flips to itself.

    References:
        Patrini et al., Making Deep Neural Networks Robust to Label Noise, CVPR 2017 (the CIFAR tables).
    """
    check_num_classes(num_classes)
    check_share(rate, name="rate")
    matrix = torch.eye(num_classes, dtype=torch.float64)
    for source, target in flips.items():
        if not (0 <= source < num_classes and 0 <= target < num_classes) or source == target:
            raise ValueError(
                f"`flips` holds {source} -> {target}; it must map a class to another class in 0..{num_classes - 1}."
            )
        matrix[source, source] = 1 - rate
        matrix[source, target] = rate
    return matrix


def cifar100_flips(scheme: str) -> dict[int, int]:
    """The flip tables in use for CIFAR-100, each a circle of five classes.

    Args:
        scheme (`str`):
            `"superclass"`: the next fine class of the true superclass, in ascending fine id, circular.
            `"legacy_block5"`: circles inside the id blocks 0..4, 5..9, ... of widely copied code. Fine ids are
            alphabetical, so only 6 of its 100 flips stay inside a superclass. For comparison with old numbers only.

    Returns:
        `dict[int, int]`: true fine class to wrong fine class, all 100 classes.

    Raises:
        ValueError: if the scheme is unknown.
    """
    if scheme == "superclass":
        circles = [[i for i, coarse in enumerate(CIFAR100_SUPERCLASSES) if coarse == group] for group in range(20)]
    elif scheme == "legacy_block5":
        circles = [list(range(start, start + 5)) for start in range(0, 100, 5)]
    else:
        raise ValueError(f'`scheme` must be "superclass" or "legacy_block5", got {scheme!r}.')
    return {circle[i]: circle[(i + 1) % 5] for circle in circles for i in range(5)}


def check_transition_matrix(transition_matrix: torch.Tensor) -> torch.Tensor:
    """Check a user's transition matrix `T[i, j] = P(noisy = j | clean = i)`.

    Args:
        transition_matrix (`torch.Tensor` of shape `(num_classes, num_classes)`): T.

    Returns:
        `torch.Tensor` of shape `(num_classes, num_classes)`, float64.

    Raises:
        ValueError: if it is not square, has an entry outside [0, 1] or a row that does not sum to 1 within 1e-6.
    """
    matrix = transition_matrix.to(torch.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(
            f"The transition matrix must be square with a row for each class, got shape {tuple(matrix.shape)}."
        )
    if not ((matrix >= 0) & (matrix <= 1)).all():  # also refuses NaN
        row, column = (~((matrix >= 0) & (matrix <= 1))).nonzero()[0].tolist()
        raise ValueError(
            "The entries of a transition matrix are probabilities in [0, 1], "
            f"got {matrix[row, column].item()} in row {row}, column {column}."
        )
    sums = matrix.sum(dim=1)
    row = (sums - 1).abs().argmax().item()
    if abs(sums[row].item() - 1) > 1e-6:
        raise ValueError(
            f"Row {row} of the transition matrix sums to {sums[row].item():.6f}, and must sum to 1: row i holds "
            "P(noisy = j | clean = i). Transpose a matrix whose columns sum to 1, and write enough digits."
        )
    return matrix
