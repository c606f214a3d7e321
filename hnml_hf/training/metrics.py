"""What is measured: accuracy, and how well the model's doubt finds wrong labels."""

import math

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transformers import EvalPrediction


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 accuracy, and top-5 where there are more than five classes.

    Args:
        prediction (`EvalPrediction`): logits of shape `(n, k)` and labels of shape `(n,)`.

    Example:

        compute_metrics(EvalPrediction(predictions=np.eye(3), label_ids=np.array([0, 1, 0])))  # accuracy 2/3
    """
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    metrics = {"accuracy": float((logits.argmax(-1) == labels).mean())}
    if logits.shape[-1] > 5:
        top5 = np.argpartition(logits, -5, axis=-1)[:, -5:]
        metrics["top5_accuracy"] = float((top5 == labels[:, None]).any(-1).mean())
    return metrics


def noise_auroc(logits: np.ndarray, labels: np.ndarray, clean_labels: np.ndarray) -> float | None:
    """Area under the ROC curve of 1 - q_y as a detector of wrong labels (confident learning's self-confidence).

    Args:
        logits (`np.ndarray` of shape `(n, k)`): q is their softmax.
        labels (`np.ndarray` of shape `(n,)`): given labels y.
        clean_labels (`np.ndarray` of shape `(n,)`): true labels; samples with -1 are left out.

    Returns:
        `float` in [0, 1], or `None` where no clean label is known or all labels are right, or all are wrong.
    """
    known = clean_labels >= 0
    wrong = (labels != clean_labels)[known]
    if wrong.all() or not wrong.any():
        return None
    probabilities = torch.as_tensor(logits).float().softmax(-1).numpy()[known]
    return float(roc_auc_score(wrong, 1 - probabilities[np.arange(len(wrong)), labels[known]]))


def estimate_accuracy(
    agreement: float, count: int, noise_rate: float, noise_range: tuple[float, float], num_labels: int
) -> tuple[float, float, float]:
    """Accuracy on true labels, from agreement A with `count` held-out labels of which a share r is wrong.

    Two assumptions bound it. If the model errs as often where the label is wrong, and repeats a wrong label by chance
    alone, the accuracy a follows from A = (1 - r) a + r (1 - a) / (k - 1). If it repeats wrong labels as often as it
    finds the true class there, because models and people err on the same images, the accuracy is A. The estimate is
    halfway between. The range spans both, the range of r, and the 95 % sampling error of A, by Wilson's interval,
    which is not empty where all labels agree (Wilson, JASA 1927).

    Args:
        agreement (`float`): A, share of held-out labels that the model predicts, in [0, 1].
        count (`int`): number of held-out labels.
        noise_rate (`float`): r, in [0, 1].
        noise_range (`tuple[float, float]`): low and high of r.
        num_labels (`int`): k, number of classes.

    Returns:
        `tuple[float, float, float]`: the estimate, and low and high of its range, in [0, 1].
    """

    def without_noise(agreement: float, rate: float) -> float:
        by_chance = rate / (num_labels - 1)
        if rate + by_chance >= 1:  # the labels say nothing any more
            return 1.0
        return min(max((agreement - by_chance) / (1 - rate - by_chance), agreement), 1.0)

    share = 1.96**2 / count
    middle = (agreement + share / 2) / (1 + share)
    error = math.sqrt(share * agreement * (1 - agreement) + share**2 / 4) / (1 + share)
    low = max(middle - error, 0.0)
    high = without_noise(min(middle + error, 1.0), noise_range[1])
    return (agreement + without_noise(agreement, noise_rate)) / 2, low, high
