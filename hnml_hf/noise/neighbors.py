"""Synthetic, dynamically changing noise of a batch: labels of neighbors in feature space."""

import torch

from .checks import check_generator, check_share


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
    """Draw synthetic labels: some rows of the batch take the label of one of their nearest neighbors in the batch.

    In each draw a new random subset S of `round(perturb_ratio * b)` rows is picked. For i in S, y'_i = y_j with j
    uniform on the nearest neighbors of i (Euclidean distance of the features, i itself excluded); otherwise
    y'_i = y_i. A neighbor may carry the same label, so the share of changed labels is at most `perturb_ratio`.

    Equal distances are ordered by the position in the batch. Non-finite distances count as the farthest: such rows are
    neighbors of nobody while enough finite ones exist.

    Args:
        features (`torch.Tensor` of shape `(b, d)`): of any floating dtype; distances are computed in float32.
        labels (`torch.Tensor` of shape `(b,)`): integer labels.
        num_neighbors (`int`): at least 1; capped at b - 1.
        perturb_ratio (`float`): share of the batch that is relabeled in a draw, in [0, 1].
        num_draws (`int`): number of draws, at least 1.
        generator (`torch.Generator`): on the CPU.

    Returns:
        `torch.Tensor` of shape `(num_draws, b)`, int64, on the device of `labels`. A batch of fewer than two rows has
        no neighbors: its labels come back unchanged.

    Raises:
        ValueError: if shapes do not match, an argument is out of range or the generator is not on the CPU.

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
    check_share(perturb_ratio, name="perturb_ratio")
    check_generator(generator)

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
    # the matrix-product form of cdist loses the digits that decide between close neighbors
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    farthest = torch.finfo(distances.dtype).max
    distances = distances.nan_to_num(nan=farthest, posinf=farthest).fill_diagonal_(torch.inf)
    return distances.argsort(dim=1, stable=True)[:, :num_neighbors]
