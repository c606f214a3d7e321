"""Targets that are distributions over the classes instead of the given labels."""

import torch


def dense_targets(classes: torch.Tensor, probabilities: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Spread the likeliest classes of each example over all classes; those that are not named get 0.

    Args:
        classes (`torch.LongTensor` of shape `(b, t)`): t different classes of each example.
        probabilities (`torch.Tensor` of shape `(b, t)`): their probabilities.
        num_labels (`int`): number of classes k.

    Returns:
        `torch.Tensor` of shape `(b, k)`.
    """
    return probabilities.new_zeros(len(classes), num_labels).scatter_(1, classes, probabilities)
