"""What is measured: accuracy, and how well the model's doubt finds wrong labels."""

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
