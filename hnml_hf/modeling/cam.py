"""Class activation maps (CAMs). Pure functions of tensors.

Shapes: b batch, k classes, d features before the last linear layer, c channels, h and w map height and width, r
regions.
"""

from collections.abc import Callable

import torch


EPSILON = 1e-5  # below the maximum of a map that is worth a mask; Puzzle-CAM (Jo & Yu 2021) uses the same constant


def class_activation_maps(feature_maps: torch.Tensor, class_weights: torch.Tensor) -> torch.Tensor:
    """Classical CAM of a head that averages its map and applies one linear layer.

    CAM(u) = <w, A(u)>, so that mean_u CAM(u) + bias is the logit (Zhou et al., CVPR 2016, Eq. 2).

    Args:
        feature_maps (`torch.Tensor` of shape `(b, d, h, w)`): A, the map that the head pools.
        class_weights (`torch.Tensor` of shape `(b, d)` or `(m, b, d)`): w, the classifier's row for each image's
            class; with a leading m, one such set for each of m classifiers.

    Returns:
        `torch.Tensor` of shape `(b, h, w)` or `(m, b, h, w)`.
    """
    return torch.einsum("bdhw,...bd->...bhw", feature_maps, class_weights)


def head_gradient_activation(
    head_input: torch.Tensor, pool: Callable[[torch.Tensor], torch.Tensor], class_weights: torch.Tensor
) -> torch.Tensor:
    """Gradient of the class logits with respect to the head's input, times that input (HiResCAM through the head).

    Summed over channels and multiplied by the number of cells this is the CAM of any head, and equals
    [`class_activation_maps`] when `pool` is the mean (Draelos & Carin 2020, arXiv 2011.08891, Eq. 4, restricted to the
    head). Only the head is differentiated, never the backbone.

    Args:
        head_input (`torch.Tensor`): A in the layout that `pool` wants, batch first.
        pool (`Callable`): what the head does between A and its last linear layer; returns `(b, d)`.
        class_weights (`torch.Tensor` of shape `(b, d)`): the classifier's row for each image's class.

    Returns:
        `torch.Tensor` shaped as `head_input`. Differentiable if gradients are enabled.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # a view: rows after a virtual step depend on `head_input` too, and that is no part of this gradient
        source = head_input.view_as(head_input) if head_input.requires_grad else head_input.detach().requires_grad_()
        # not the leaf itself: hooks on modules, such as a FLOP counter's, cannot follow one through autograd.grad
        class_logits = (pool(source.view_as(source)) * class_weights).sum()
        (gradient,) = torch.autograd.grad(class_logits, source, create_graph=differentiable)
    return (source if differentiable else head_input) * gradient


def normalize_cams(cams: torch.Tensor) -> torch.Tensor:
    """Positive part of each map divided by its maximum: relu(CAM) / (max CAM + 1e-5), in [0, 1] (as in Puzzle-CAM).

    Args:
        cams (`torch.Tensor` of shape `(..., h, w)`): raw maps. A map without a positive cell becomes all zero.

    Returns:
        `torch.Tensor` of shape `(..., h, w)`.
    """
    positive = cams.float().relu()
    return positive / (positive.amax(dim=(-2, -1), keepdim=True) + EPSILON)
