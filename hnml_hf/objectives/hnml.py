"""HNML: consistency of the predictions (meta-training) and mask-guided self-learning of the features (meta-testing).

An independent reconstruction from the abstract of Liu et al., IEEE SPL 31:3020-3024, 2024. The abstract names the two
levels; their form here is ours, built on the parents MLNT (CVPR 2019) and SANM (CVPR 2023).
"""

import torch

from ..modeling.cam import foreground_mask, normalize_cams
from .cross_entropy import cross_entropy
from .mean_teacher import balance_loss, consistency_loss, label_trust, own_evidence, refurbishment, teacher_evidence
from .mlnt import VirtualPredictions, draw_synthetic_labels, first_pass, virtual_predictions


def mask_guided_loss(
    region_logits: torch.Tensor,
    cams: torch.Tensor,
    teacher_probabilities: torch.Tensor,
    teacher_maps: torch.Tensor,
    foreground: torch.Tensor,
    *,
    cam_weight: float,
    background_weight: float,
    temperature: float,
) -> torch.Tensor:
    """Self-learning on the regions that a teacher's activation map marks, per example. The form is ours.

    omega [ KL(sharpen(q, T) || p_fg) + mu_c sum_u M |a' - a| / sum_u M ] + mu_b KL(uniform || p_bg), omega = max_c
    q_c. The foreground alone must give the teacher's prediction; the student's map must agree with the teacher's
    there; what lies outside must speak for no class.

    Args:
        region_logits (`torch.Tensor` of shape `(..., r, b, k)`): head's output on the foreground and, with r = 2, on
            the background.
        cams (`torch.Tensor` of shape `(..., b, h, w)`): the student's raw maps of the teacher's classes.
        teacher_probabilities (`torch.Tensor` of shape `(b, k)`): q.
        teacher_maps (`torch.Tensor` of shape `(b, h, w)`): a, the teacher's normalised maps.
        foreground (`torch.Tensor` of shape `(b, h, w)`): M in [0, 1].
        cam_weight (`float`), background_weight (`float`): mu_c, mu_b >= 0; `mu_b` > 0 needs r = 2.
        temperature (`float`): T > 0; below 1 it sharpens.

    Returns:
        `torch.Tensor` of shape `(..., b)`, at least 0.
    """
    confidence = teacher_probabilities.amax(-1)
    sharpened = (teacher_probabilities.clamp_min(1e-12).log() / temperature).softmax(-1)
    loss = consistency_loss(region_logits[..., 0, :, :], sharpened)
    if cam_weight:
        difference = foreground * (normalize_cams(cams) - teacher_maps).abs()
        loss = loss + cam_weight * difference.sum((-2, -1)) / foreground.sum((-2, -1)).clamp_min(1e-6)
    loss = confidence * loss
    if background_weight:
        uniform = torch.full_like(teacher_probabilities, 1 / teacher_probabilities.shape[-1])
        loss = loss + background_weight * consistency_loss(region_logits[..., 1, :, :], uniform)
    return loss


def hnml(
    student,
    labels,
    *,
    wanted,
    teacher,
    generator,
    class_prior,
    inner_direction: str,
    meta_scope: str,
    second_order: bool,
    meta_lr: float,
    num_meta_draws: int,
    label_draw: str,
    perturb_ratio: float,
    num_neighbors: int,
    inner_consistency_weight: float,
    consistency_form: str,
    mask_level: str,
    cam_weight: float,
    background_weight: float,
    cam_threshold: float,
    mask_temperature: float,
    remember=None,
    sample_weights=None,
    noise_rate=None,
):
    """Objective `hnml`.

    With `inner_direction="synthetic"` both levels are taken at virtual weights, one step along the gradient of
    synthetic labels away. With `"momentum"` the trainer has already put the whole network ahead along its running
    gradient, and all terms are taken there.

    Without a teacher the targets are the samples' running averages and the maps the student's own, detached: the map
    agreement then only asks that a virtual step leaves the map where it is, and is 0 with `"momentum"`.

    With `mask_level="image"` the regions are cut out of the image, not of the feature map, and the network looks at
    each again: a pass more for each region.
    """
    if wanted == {"base"}:
        logits = student().logits
        return {"base": cross_entropy(logits, labels, sample_weights, noise_rate)}, {"logits": logits}

    passed = None
    if teacher is None:
        passed = first_pass(student, meta_scope if inner_direction == "synthetic" else "head")
        evidence = own_evidence(student, passed[1], remember, with_cams="mask_guided" in wanted)
    else:
        evidence = teacher_evidence(teacher)
    probabilities = evidence.probabilities
    requests = {}
    if "mask_guided" in wanted:
        teacher_maps = normalize_cams(evidence.cams)
        foreground = foreground_mask(teacher_maps, threshold=cam_threshold)
        regions = [foreground, 1 - foreground] if background_weight else [foreground]
        requests = {"cam_classes": probabilities.argmax(-1)}
        if mask_level == "feature":
            requests["region_masks"] = torch.stack(regions)

    monitors = {}
    if inner_direction == "momentum":
        output = student(**requests) if passed is None else student.look(passed[1], **requests)
        region_logits = output.region_logits
        if requests and mask_level == "image":
            region_logits = torch.stack([student.masked(region).logits for region in regions])
        virtual = VirtualPredictions(
            output.logits[None],
            region_logits[None] if requests else None,
            output.cams[None] if requests else None,
        )
    else:
        synthetic_labels = draw_synthetic_labels(
            evidence,
            labels,
            label_draw=label_draw,
            num_neighbors=num_neighbors,
            perturb_ratio=perturb_ratio,
            num_draws=num_meta_draws,
            generator=generator,
        )
        output, virtual, monitors["swapped_label_loss_drop"] = virtual_predictions(
            student,
            labels,
            synthetic_labels,
            requests,
            scope=meta_scope,
            lr=meta_lr,
            second_order=second_order,
            teacher_probabilities=probabilities,
            inner_consistency_weight=inner_consistency_weight,
            passed=passed,
        )

    terms = {"base": cross_entropy(output.logits, labels, sample_weights, noise_rate)}
    if "consistency" in wanted:
        consistencies = consistency_loss(virtual.logits, probabilities).mean(0)
        if consistency_form == "refurbished":
            trust = label_trust(probabilities, labels)
            monitors["trust"] = trust.mean()
            consistencies = refurbishment(terms["base"], consistencies, trust)
        terms["consistency"] = consistencies
    if "balance" in wanted:
        terms["balance"] = balance_loss(output.logits, class_prior)
    if "mask_guided" in wanted:
        monitors["foreground_logits"] = virtual.region_logits[0, 0].detach()
        terms["mask_guided"] = mask_guided_loss(
            virtual.region_logits,
            virtual.cams,
            probabilities,
            teacher_maps,
            foreground,
            cam_weight=cam_weight,
            background_weight=background_weight,
            temperature=mask_temperature,
        ).mean(0)
    return terms, {"logits": output.logits, **monitors}
