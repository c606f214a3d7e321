"""Label noise as pure functions of tensors: transition matrices, draws from them, and neighbour swaps in a batch.

Shapes: b batch size, d feature size, n number of samples, k number of classes, s number of pixel values of an image.
`transition_matrix[i, j] = P(noisy = j | clean = i)`: rows sum to 1 (cleanlab's `noise_matrix` is the transpose).
All random numbers are drawn on the CPU, so that a seed gives the same labels whatever the device of the tensors.
"""

from collections.abc import Callable

import torch


# ---- synthetic, dynamically changing noise of a batch ---------------------------------------------------------------


@torch.no_grad()
def neighbor_labels(
    features: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_neighbors: int,
    perturb_ratio: float,
    num_draws: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """
    Draws synthetic labels: some rows of the batch take the label of one of their nearest neighbours in the batch.

    In each draw a new random subset S of `round(perturb_ratio * b)` rows is picked. For i in S, y'_i = y_j with j
    uniform on the nearest neighbours of i (Euclidean distance of the features, i itself excluded); otherwise
    y'_i = y_i. A neighbour may carry the same label, so the share of changed labels is at most `perturb_ratio`.

    Equal distances are ordered by the position in the batch. Non-finite distances count as the farthest: such rows are
    neighbours of nobody while enough finite ones exist.

    Args:
        features (`torch.Tensor` of shape `(b, d)`): of any floating dtype; distances are computed in float32.
        labels (`torch.Tensor` of shape `(b,)`): integer labels.
        num_neighbors (`int`): at least 1; capped at b - 1.
        perturb_ratio (`float`): share of the batch that is relabelled in a draw, in [0, 1].
        num_draws (`int`): number of draws, at least 1.
        generator (`torch.Generator`): on the CPU.

    Returns:
        `torch.Tensor` of shape `(num_draws, b)`, int64, on the device of `labels`. A batch of fewer than two rows has
        no neighbours: its labels come back unchanged.

    Raises:
        `ValueError`: if shapes do not match, an argument is out of range or the generator is not on the CPU.

    References:
        Li et al., Learning to Learn from Noisy Labeled Data, CVPR 2019 (MLNT), meta-train step; the released code uses
        `perturb_ratio=0.5`, `num_neighbors=10`, `num_draws=10`.
    """
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels):
        raise ValueError(
            "`features` must have shape (b, d) and `labels` shape (b,), "
            f"got {tuple(features.shape)} and {tuple(labels.shape)}. Flatten or pool the features first."
        )
    if num_neighbors < 1 or num_draws < 1:
        raise ValueError(
            f"`num_neighbors` and `num_draws` must be at least 1, got {num_neighbors} and {num_draws}. "
            "Set `perturb_ratio=0` for labels without synthetic noise."
        )
    _check_share(perturb_ratio, name="perturb_ratio")
    _check_generator(generator)

    batch_size = len(labels)
    drawn = labels.to(torch.int64).repeat(num_draws, 1)  # (num_draws, b)
    if batch_size < 2:
        return drawn
    num_neighbors = min(num_neighbors, batch_size - 1)
    num_perturbed = round(perturb_ratio * batch_size)

    rows = torch.rand(num_draws, batch_size, generator=generator).argsort(dim=1)[:, :num_perturbed]
    picks = torch.randint(num_neighbors, (num_draws, num_perturbed), generator=generator)
    rows, picks = rows.to(labels.device), picks.to(labels.device)

    neighbors = _nearest_neighbors(features, num_neighbors).to(labels.device)  # (b, num_neighbors)
    return drawn.scatter(1, rows, labels.to(torch.int64)[neighbors[rows, picks]])


def _nearest_neighbors(features: torch.Tensor, num_neighbors: int) -> torch.Tensor:
    """The positions, shape (b, num_neighbors), of the nearest other rows; ties by position, non-finite ones last."""
    features = features.float()
    # the matrix-product form of cdist loses the digits that decide between close neighbours
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    farthest = torch.finfo(distances.dtype).max
    distances = distances.nan_to_num(nan=farthest, posinf=farthest).fill_diagonal_(torch.inf)
    return distances.argsort(dim=1, stable=True)[:, :num_neighbors]


# ---- transition matrices --------------------------------------------------------------------------------------------

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
    """
    Symmetric noise. With the true class excluded T = (1 - r) I + r / (k - 1) off the diagonal, and a share r of the
    labels is wrong; with it included T = (1 - r) I + r / k everywhere, and a share r (1 - 1/k) is wrong.

    The two differ: every report of a symmetric rate must say which one it means.

    Args:
        num_classes (`int`): k, at least 2.
        rate (`float`): r, in [0, 1].
        include_true (`bool`): whether a redrawn label may be the true one.

    Returns:
        `torch.Tensor` of shape `(num_classes, num_classes)`, float64.

    Raises:
        `ValueError`: if an argument is out of range.

    References:
        Excluded: Patrini et al., Making Deep Neural Networks Robust to Label Noise, CVPR 2017; Han et al.,
        Co-teaching, NeurIPS 2018. Included: released code of DivideMix (Li et al., ICLR 2020) and ELR (Liu et al.,
        NeurIPS 2020).
    """
    _check_num_classes(num_classes)
    _check_share(rate, name="rate")
    identity = torch.eye(num_classes, dtype=torch.float64)
    if include_true:
        return (1 - rate) * identity + rate / num_classes
    return (1 - rate) * identity + rate / (num_classes - 1) * (1 - identity)


def pair_flip_transition_matrix(num_classes: int, rate: float) -> torch.Tensor:
    """
    Pair flip: class i becomes i + 1 (the last one becomes 0) with probability r.

    Args:
        num_classes (`int`): k, at least 2.
        rate (`float`): r, in [0, 1]. From 0.5 on the given label no longer tells the true one.

    Returns:
        `torch.Tensor` of shape `(num_classes, num_classes)`, float64.

    Raises:
        `ValueError`: if an argument is out of range.

    References:
        Han et al., Co-teaching, NeurIPS 2018 (r = 0.45).
    """
    _check_num_classes(num_classes)
    return flip_transition_matrix(num_classes, rate, flips={i: (i + 1) % num_classes for i in range(num_classes)})


def flip_transition_matrix(num_classes: int, rate: float, *, flips: dict[int, int]) -> torch.Tensor:
    """
    Asymmetric noise by a table: class i becomes `flips[i]` with probability r; classes not in the table keep theirs.

    Both directions of a table are read from the true label, so 3 -> 5 together with 5 -> 3 swaps them (a loop that
    relabels in place would flip some images back).

    Args:
        num_classes (`int`): k, at least 2.
        rate (`float`): r, in [0, 1].
        flips (`dict[int, int]`): true class to wrong class, for example `CIFAR10_FLIPS` or `cifar100_flips(...)`.

    Returns:
        `torch.Tensor` of shape `(num_classes, num_classes)`, float64.

    Raises:
        `ValueError`: if an argument is out of range or a class flips to itself.

    References:
        Patrini et al., Making Deep Neural Networks Robust to Label Noise, CVPR 2017 (the CIFAR tables).
    """
    _check_num_classes(num_classes)
    _check_share(rate, name="rate")
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
    """
    The flip tables in use for CIFAR-100, each a circle of five classes.

    Args:
        scheme (`str`):
            `"superclass"`: the next fine class of the true superclass, in ascending fine id, circular.
            `"legacy_block5"`: circles inside the id blocks 0..4, 5..9, ... of widely copied code. Fine ids are
            alphabetical, so only 6 of its 100 flips stay inside a superclass. For comparison with old numbers only.

    Returns:
        `dict[int, int]`: true fine class to wrong fine class, all 100 classes.

    Raises:
        `ValueError`: if the scheme is unknown.
    """
    if scheme == "superclass":
        circles = [[i for i, coarse in enumerate(CIFAR100_SUPERCLASSES) if coarse == group] for group in range(20)]
    elif scheme == "legacy_block5":
        circles = [list(range(start, start + 5)) for start in range(0, 100, 5)]
    else:
        raise ValueError(f'`scheme` must be "superclass" or "legacy_block5", got {scheme!r}.')
    return {circle[i]: circle[(i + 1) % 5] for circle in circles for i in range(5)}


def check_transition_matrix(transition_matrix: torch.Tensor) -> torch.Tensor:
    """
    Checks a user's transition matrix `T[i, j] = P(noisy = j | clean = i)`.

    Returns:
        `torch.Tensor` of shape `(num_classes, num_classes)`, float64.

    Raises:
        `ValueError`: if it is not square, has an entry outside [0, 1] or a row that does not sum to 1 within 1e-6.
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


# ---- drawing labels -------------------------------------------------------------------------------------------------


def corrupt_labels(
    labels: torch.Tensor, transition_matrix: torch.Tensor, *, generator: torch.Generator
) -> torch.Tensor:
    """
    Draws a noisy label for each sample on its own: y'_i ~ Categorical(T[y_i]). The number of wrong labels is random.

    Args:
        labels (`torch.Tensor` of shape `(n,)`): true labels in 0..k-1.
        transition_matrix (`torch.Tensor` of shape `(k, k)`): T, rows sum to 1.
        generator (`torch.Generator`): on the CPU; exactly n numbers are taken from it.

    Returns:
        `torch.Tensor` of shape `(n,)`, int64, on the device of `labels`.

    Raises:
        `ValueError`: if the matrix is no transition matrix, a label is out of range or the generator is not on the
        CPU.
    """
    matrix = check_transition_matrix(transition_matrix.cpu())
    _check_generator(generator)
    clean = _check_labels(labels, num_classes=len(matrix)).cpu()
    uniform = torch.rand(len(clean), generator=generator, dtype=torch.float64)
    noisy = torch.empty_like(clean)
    for true_class, rows in enumerate(_rows_by_class(clean, num_classes=len(matrix))):
        noisy[rows] = _invert_cdf(matrix[true_class], uniform[rows])
    return noisy.to(labels.device)


def corrupt_labels_exact(
    labels: torch.Tensor, flip_matrix: torch.Tensor, *, rate: float, generator: torch.Generator
) -> torch.Tensor:
    """
    Redraws the labels of exactly floor(r n) samples, picked at random among all, from the rows of `flip_matrix`.

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
        `ValueError`: as `corrupt_labels`, or if `rate` is out of range.

    References:
        Released code of DivideMix (Li et al., ICLR 2020): an exact share of all indices, then uniform or by a table.
    """
    _check_share(rate, name="rate")
    _check_generator(generator)
    noisy = _check_labels(labels, num_classes=len(flip_matrix)).clone()
    # 0.29 * 100 is 28.999999999999996 in floating point and means 29
    num_picked = int(rate * len(noisy) + 1e-9)
    picked = torch.randperm(len(noisy), generator=generator)[:num_picked].to(labels.device)
    noisy[picked] = corrupt_labels(noisy[picked], flip_matrix, generator=generator)
    return noisy


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
    """
    Instance-dependent (part-dependent, PDN) noise: the wrong class of an image depends on its pixels.

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
        `ValueError`: if an argument is out of range or `load_pixels` returns another shape.

    References:
        Xia et al., Part-dependent Label Noise: Towards Instance-dependent Label Noise, NeurIPS 2020, and its released
        code (`tools.get_instance_noisy_label`).
    """
    _check_num_classes(num_classes)
    _check_generator(generator)
    if not 0.0 < rate < 1.0 or not rate_std > 0.0:
        raise ValueError(
            f"`rate` must lie strictly between 0 and 1 and `rate_std` be positive, got {rate} and {rate_std}: "
            "the flip rates scatter around `rate`, so 0 would not mean clean labels."
        )
    if pixel_scaling not in ("raw", "unit", "standardized"):
        raise ValueError(f'`pixel_scaling` must be "raw", "unit" or "standardized", got {pixel_scaling!r}.')

    clean = _check_labels(labels, num_classes=num_classes).cpu()
    flip_rates = _truncated_normal(len(clean), mean=rate, std=rate_std, generator=generator)
    uniform = torch.rand(len(clean), generator=generator, dtype=torch.float64)
    noisy = torch.empty_like(clean)
    for true_class, rows in enumerate(_rows_by_class(clean, num_classes=num_classes)):
        weight = torch.randn(num_pixels, num_classes, generator=generator)
        for chunk in rows.split(chunk_size) if len(rows) else ():
            pixels = _scale_pixels(load_pixels(chunk), pixel_scaling, expected_shape=(len(chunk), num_pixels))
            scores = (pixels @ weight).to(torch.float64)  # (m, k)
            scores[:, true_class] = -torch.inf
            probabilities = flip_rates[chunk, None] * scores.softmax(dim=1)
            probabilities[:, true_class] = 1 - flip_rates[chunk]
            noisy[chunk] = _invert_cdf(probabilities, uniform[chunk, None]).squeeze(1)
    return noisy.to(labels.device)


def _rows_by_class(labels: torch.Tensor, *, num_classes: int) -> tuple[torch.Tensor, ...]:
    """The positions of each class in ascending order, found by one sort."""
    counts = labels.bincount(minlength=num_classes)
    return labels.argsort(stable=True).split(counts.tolist())


def _invert_cdf(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Classes drawn from `uniform` in [0, 1); a class of probability 0 is never drawn, whatever the rounding."""
    cdf = probabilities.cumsum(dim=-1)
    # dividing makes the last value, and all before it that equal it, exactly 1
    return torch.searchsorted(cdf / cdf[..., -1:], uniform, right=True)


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


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_share(value: float, *, name: str) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` is a share and must lie in [0, 1], got {value}.")


def _check_generator(generator: torch.Generator) -> None:
    if generator.device.type != "cpu":
        raise ValueError(
            f"`generator` must be on the CPU, got {generator.device}: one seed gives the same labels on every device. "
            'Create it with `torch.Generator("cpu")`.'
        )


def _check_num_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(f"`num_classes` must be at least 2, got {num_classes}: label noise needs another class.")


def _check_labels(labels: torch.Tensor, *, num_classes: int) -> torch.Tensor:
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
