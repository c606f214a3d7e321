"""Consistency with a mean teacher: the outer loss of MLNT and HNML, and a baseline by itself."""

from typing import NamedTuple

import torch

from .cross_entropy import ce, cross_entropy


class Evidence(NamedTuple):
    """The targets of a batch (b images, k classes, d features, h x w cells); nothing here is differentiated."""

    probabilities: torch.Tensor  # (b, k), q
    features: torch.Tensor  # (b, d), in which neighbors are looked for
    cams: torch.Tensor | None  # (b, h, w), raw maps of the classes argmax q
    from_teacher: bool = False  # or from the samples' running averages

    def monitors(self) -> dict[str, torch.Tensor]:
        """What a teacher said of the batch, for the training dynamics."""
        return {"teacher_probabilities": self.probabilities} if self.from_teacher else {}


def teacher_evidence(teacher) -> Evidence:
    """From a teacher's own pass over the batch."""
    output = teacher()
    return Evidence(output.logits.float().softmax(-1), output.features, output.cams, from_teacher=True)


@torch.no_grad()
def own_evidence(student, output, remember, *, with_cams: bool = False) -> Evidence:
    """Without a teacher's pass: q is each sample's running average of the student's predictions, this one included.

    Features and maps are the student's own. Temporal ensembling (Laine & Aila, ICLR 2017) with the moment's maps.

    Args:
        student (`BatchView`), output (`TimmCAMOutput`): the batch and the student's output for it.
        remember (`Callable`): folds probabilities `(b, k)` into the running averages and returns those.
        with_cams (`bool`): whether maps are needed.
    """
    average = remember(output.logits.float().softmax(-1))
    probabilities = average / average.sum(-1, keepdim=True)
    cams = None
    if with_cams:
        cams = student.class_activation_maps(output, student.class_weights[probabilities.argmax(-1)])
    return Evidence(probabilities, output.features.detach(), cams)


def consistency_loss(logits: torch.Tensor, teacher_probabilities: torch.Tensor) -> torch.Tensor:
    """KL(q || p) per example, p = softmax(logits) (MLNT, Li et al., CVPR 2019, Eq. 3).

    Args:
        logits (`torch.Tensor` of shape `(..., b, k)`): the student's, or those of virtual students.
        teacher_probabilities (`torch.Tensor` of shape `(b, k)`): q, detached.

    Returns:
        `torch.Tensor` of shape `(..., b)`, at least 0.
    """
    cross = -(teacher_probabilities * logits.float().log_softmax(-1)).sum(-1)
    return cross - torch.special.entr(teacher_probabilities).sum(-1)


def mean_teacher(student, labels, *, active_terms, teacher, remember=None, sample_weights=None, noise_rate=None):
    """Objective `mean_teacher` (Tarvainen & Valpola, NeurIPS 2017) = HNML without inner step and without mask."""
    if "consistency" not in active_terms:
        return ce(student, labels, sample_weights=sample_weights, noise_rate=noise_rate)
    evidence = None if teacher is None else teacher_evidence(teacher)
    output = student()
    evidence = evidence or own_evidence(student, output, remember)
    terms = {
        "base": cross_entropy(output.logits, labels, sample_weights, noise_rate),
        "consistency": consistency_loss(output.logits, evidence.probabilities),
    }
    return terms, {"logits": output.logits, **evidence.monitors()}
