"""HNML: consistency of the predictions (meta-training) and mask-guided self-learning of the features (meta-testing).

An independent reconstruction from the abstract of Liu et al., IEEE SPL 31:3020-3024, 2024. The abstract names the two
levels; their form here is ours, built on the parents MLNT (CVPR 2019) and SANM (CVPR 2023).
"""

import torch

from ..noise import neighbor_labels
from .cross_entropy import ce, cross_entropy
from .mean_teacher import Evidence, consistency_loss, own_evidence, teacher_evidence
from .virtual_step import VirtualPredictions, first_pass, virtual_predictions


CAM_WEIGHT = 0.5  # mu_c of the mask-guided loss
CAM_THRESHOLD = 0.3  # of a map's maximum, above which a cell is foreground
SMALL_MAP = 16  # cells; a hard mask on so coarse a map would cut objects in half


def foreground_mask(normalized_cams: torch.Tensor, *, threshold: float = CAM_THRESHOLD) -> torch.Tensor:
    """Cells that speak for the class: 1[a(u) >= threshold]; the soft map itself where it has at most 16 cells.

    A map that is nowhere positive, or that has no cell at the threshold, marks no foreground; its mask is 1
    everywhere, which leaves the head's output as it is.

    Args:
        normalized_cams (`torch.Tensor` of shape `(..., h, w)`): each divided by its maximum, in [0, 1].
        threshold (`float`): in [0, 1); Puzzle-CAM (Jo & Yu 2021) sweeps 0.10 to 0.45.

    Returns:
        `torch.Tensor` of shape `(..., h, w)`, detached, values in [0, 1].
    """
    maps = normalized_cams.detach()
    small = maps.shape[-2] * maps.shape[-1] <= SMALL_MAP
    mask = maps if small else (maps >= threshold).to(maps.dtype)
    highest = maps.amax(dim=(-2, -1), keepdim=True)
    return torch.where((highest > 0) & (highest >= threshold), mask, torch.ones_like(mask))


def mask_guided_loss(
    foreground_logits: torch.Tensor,
    maps: torch.Tensor,
    teacher_probabilities: torch.Tensor,
    teacher_maps: torch.Tensor,
    foreground: torch.Tensor,
    *,
    cam_weight: float = CAM_WEIGHT,
) -> torch.Tensor:
    """Self-learning on the regions that a teacher's activation map marks, per example. The form is ours.

    omega [ KL(q || p_fg) + mu_c sum_u M |a' - a| / sum_u M ], omega = max_c q_c. The foreground alone must give the
    teacher's prediction, and the student's map must agree with the teacher's there.

    Args:
        foreground_logits (`torch.Tensor` of shape `(..., b, k)`): head's output on the foreground.
        maps (`torch.Tensor` of shape `(..., b, h, w)`): a', the student's normalized maps of the teacher's classes.
        teacher_probabilities (`torch.Tensor` of shape `(b, k)`): q.
        teacher_maps (`torch.Tensor` of shape `(b, h, w)`): a, the teacher's normalized maps.
        foreground (`torch.Tensor` of shape `(b, h, w)`): M in [0, 1].
        cam_weight (`float`): mu_c >= 0.

    Returns:
        `torch.Tensor` of shape `(..., b)`, at least 0.
    """
    difference = (foreground * (maps - teacher_maps).abs()).sum((-2, -1)) / foreground.sum((-2, -1)).clamp_min(1e-6)
    loss = consistency_loss(foreground_logits, teacher_probabilities) + cam_weight * difference
    return teacher_probabilities.amax(-1) * loss


def hnml(student, labels, *, active_terms, teacher, remember=None, sample_weights=None, noise_rate=None):
    """Objective `hnml`: CE(p, y) + lambda KL(q || p) + mu mask-guided loss, where the trainer has put the network.

    With `extrapolation` that is ahead along the optimizer's momentum.

    Without a teacher the targets are the samples' running averages and the maps the student's own, detached: the map
    agreement is then 0.
    """
    if active_terms == {"base"}:
        return ce(student, labels, sample_weights=sample_weights, noise_rate=noise_rate)
    output = student() if teacher is None else None
    if teacher is None:
        evidence = own_evidence(student, output, remember, with_cams="mask_guided" in active_terms)
    else:
        evidence = teacher_evidence(teacher)
    teacher_maps, foreground, requests = mask_requests(student, evidence, active_terms)
    output = student(**requests) if output is None else student.add_cams(output, **requests)
    here = VirtualPredictions(
        output.logits[None],
        output.region_logits[None] if requests else None,
        output.cams[None] if requests else None,
    )
    base = cross_entropy(output.logits, labels, sample_weights, noise_rate)
    terms, monitors = outer_terms(student, here, evidence, teacher_maps, foreground, active_terms)
    return {"base": base, **terms}, {"logits": output.logits, **monitors}


def hnml_synthetic(
    student,
    labels,
    *,
    active_terms,
    teacher,
    generator,
    meta_scope: str,
    second_order: bool,
    meta_lr: float,
    num_meta_draws: int,
    perturb_ratio: float,
    num_neighbors: int,
    remember=None,
    sample_weights=None,
    noise_rate=None,
):
    """Objective `hnml_synthetic`: CE(p, y) + lambda KL(q || p') + mu mask-guided loss at p', where p' are the
    predictions one virtual step down the gradient of synthetic labels away. Without the mask-guided term it is MLNT
    (Li et al., CVPR 2019), whose released code is second order.

    Without a teacher the targets are the samples' running averages and the maps the student's own, detached: the map
    agreement then only asks that a virtual step leaves the map where it is.
    """
    if active_terms == {"base"}:
        return ce(student, labels, sample_weights=sample_weights, noise_rate=noise_rate)
    passed = first_pass(student, meta_scope) if teacher is None else None
    if passed is not None:
        evidence = own_evidence(student, passed[1], remember, with_cams="mask_guided" in active_terms)
    else:
        evidence = teacher_evidence(teacher)
    teacher_maps, foreground, requests = mask_requests(student, evidence, active_terms)
    synthetic_labels = neighbor_labels(
        evidence.features,
        labels,
        num_neighbors=num_neighbors,
        perturb_ratio=perturb_ratio,
        num_draws=num_meta_draws,
        generator=generator,
    )
    output, virtual, drop = virtual_predictions(
        student,
        labels,
        synthetic_labels,
        requests,
        scope=meta_scope,
        lr=meta_lr,
        second_order=second_order,
        passed=passed,
    )
    base = cross_entropy(output.logits, labels, sample_weights, noise_rate)
    terms, monitors = outer_terms(student, virtual, evidence, teacher_maps, foreground, active_terms)
    return {"base": base, **terms}, {"logits": output.logits, "swapped_label_loss_drop": drop, **monitors}


def mask_requests(student, evidence: Evidence, active_terms):
    """The teacher's normalized maps and their foreground, `(b, h, w)`, and what the student is asked for beside its
    logits; None, None and nothing where the mask-guided term is not active."""
    if "mask_guided" not in active_terms:
        return None, None, {}
    maps = student.normalize_cams(evidence.cams)
    foreground = foreground_mask(maps)
    return maps, foreground, {"cam_classes": evidence.probabilities.argmax(-1), "region_masks": foreground[None]}


def outer_terms(student, virtual: VirtualPredictions, evidence: Evidence, teacher_maps, foreground, active_terms):
    """Both levels of the outer loss, `(b,)` each, as means over the virtual steps, and monitors."""
    terms, monitors = {}, evidence.monitors()
    if "consistency" in active_terms:
        terms["consistency"] = consistency_loss(virtual.logits, evidence.probabilities).mean(0)
    if "mask_guided" in active_terms:
        assert virtual.region_logits is not None  # asked for with the term
        foreground_logits = virtual.region_logits[:, 0]
        monitors["foreground_logits"] = foreground_logits[0].detach()
        terms["mask_guided"] = mask_guided_loss(
            foreground_logits,
            student.normalize_cams(virtual.cams),
            evidence.probabilities,
            teacher_maps,
            foreground,
        ).mean(0)
    return terms, monitors
