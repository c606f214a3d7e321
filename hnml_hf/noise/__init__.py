"""Label noise as pure functions of tensors: transition matrices, draws from them, and neighbor swaps in a batch.

Shapes: b batch size, d feature size, n number of samples, k number of classes, s number of pixel values of an image.
`transition_matrix[i, j] = P(noisy = j | clean = i)`: rows sum to 1 (cleanlab's `noise_matrix` is the transpose).
Read `transitions.py`, then `draws.py`, which draws from them. To add a kind of noise, write its function here and a
branch of `draw_noise` in `../data/synthetic.py` (docs/extending.md).
All random numbers are drawn on the CPU, so that a seed gives the same labels whatever the device of the tensors.
"""

from .draws import corrupt_labels, corrupt_labels_exact
from .instance import instance_dependent_labels
from .neighbors import neighbor_labels
from .transitions import (
    CIFAR10_FLIPS,
    CIFAR100_SUPERCLASSES,
    check_transition_matrix,
    cifar100_flips,
    flip_transition_matrix,
    pair_flip_transition_matrix,
    symmetric_transition_matrix,
)


__all__ = [
    "CIFAR100_SUPERCLASSES",
    "CIFAR10_FLIPS",
    "check_transition_matrix",
    "cifar100_flips",
    "corrupt_labels",
    "corrupt_labels_exact",
    "flip_transition_matrix",
    "instance_dependent_labels",
    "neighbor_labels",
    "pair_flip_transition_matrix",
    "symmetric_transition_matrix",
]
