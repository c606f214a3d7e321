"""MLNT's virtual step: predictions after a step on synthetic labels, which must agree with the teacher's."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .inner_step import (
    gradient_step,
    head_step_logits,
    head_step_weights,
    label_residuals,
    swapped_label_loss_drop,
)


class VirtualPredictions(NamedTuple):
    """What the network would say after each of m virtual steps (b images, k classes, r regions, h x w cells)."""

    logits: torch.Tensor  # (m, b, k)
    region_logits: torch.Tensor | None  # (m, r, b, k), if regions were asked for
    cams: torch.Tensor | None  # (m, b, h, w), if classes were asked for


def first_pass(student, scope: str):
    """The weights that a virtual step of this scope moves (None for the closed form), and the student's own output."""
    return None if scope == "head" else student.parameters(), student()


def virtual_predictions(
    student,
    labels: torch.Tensor,
    synthetic_labels: torch.Tensor,
    requests: dict,
    *,
    scope: str,
    lr: float,
    second_order: bool,
    passed=None,
):
    """Take one virtual step per synthetic label set and look at the batch from there.

    Args:
        student (`BatchView`): the batch, as the network sees it.
        labels (`torch.LongTensor` of shape `(b,)`): given labels; only for the calibration of the step.
        synthetic_labels (`torch.LongTensor` of shape `(m, b)`).
        requests (`dict`): `region_masks` and `cam_classes` for the passes at the virtual weights.
        scope (`str`): `head` (closed form; `lr` counts in units of 1 / mean kernel diagonal) or `full`.
        lr (`float`), second_order (`bool`): see [`~hnml_hf.objectives.inner_step.gradient_step`].
        passed (*optional*): what [`first_pass`] returned, if it was made already.

    Returns:
        The output at the weights themselves, [`VirtualPredictions`], and the relative drop of the swapped labels'
        loss.
    """
    if scope == "head":
        output = student(**requests) if passed is None else student.add_cams(passed[1], **requests)
        virtual = _head_steps(student, output, synthetic_labels, requests, lr=lr, second_order=second_order)
    else:
        weights, output = first_pass(student, scope) if passed is None else passed
        passes = []
        for drawn in synthetic_labels:
            loss = F.cross_entropy(output.logits.float(), drawn)
            passes.append(student(gradient_step(loss, weights, lr=lr, second_order=second_order), **requests))
        virtual = VirtualPredictions(
            torch.stack([fast.logits for fast in passes]).float(),
            torch.stack([fast.region_logits for fast in passes]).float() if "region_masks" in requests else None,
            torch.stack([fast.cams for fast in passes]).float() if "cam_classes" in requests else None,
        )
    return output, virtual, swapped_label_loss_drop(output.logits, virtual.logits, labels, synthetic_labels)


def _head_steps(student, output, synthetic_labels, requests, *, lr, second_order) -> VirtualPredictions:
    # half precision loses the kernel: it is a sum of d products. The head itself is cheap in float32.
    with torch.autocast(output.logits.device.type, enabled=False):
        features, logits = output.features.float(), output.logits.float()
        residuals = label_residuals(logits, synthetic_labels)
        support = features
        if not second_order:
            residuals, support = residuals.detach(), support.detach()
        lr = lr / (1 + features.detach().square().sum(-1)).mean()
        fast_logits = head_step_logits(logits, features, support, residuals, lr=lr)
        region_logits = cams = None
        if "region_masks" in requests:
            regions = zip(output.region_logits.float(), output.region_features.float(), strict=True)
            region_logits = torch.stack([head_step_logits(z, h, support, residuals, lr=lr) for z, h in regions], dim=1)
        if "cam_classes" in requests:
            rows = head_step_weights(student.class_weights.float(), requests["cam_classes"], support, residuals, lr=lr)
    if "cam_classes" in requests:  # some heads have more layers, which half precision's autocast must run
        cams = student.class_activation_maps(output, rows.to(output.feature_maps.dtype)).float()
    return VirtualPredictions(fast_logits, region_logits, cams)
