"""What is wrong with training data is said before training starts."""

import numpy as np


def check_training_data(dataset, num_labels: int):
    """Raise `ValueError` unless a dataset can train a model of `num_labels` classes.

    Args:
        dataset ([`TransformedDataset`]): with `labels` and `index` as arrays of shape `(n,)`.
        num_labels (`int`): k; labels must lie in 0 to k - 1, and not all be the same.
    """
    if not all(hasattr(dataset, name) for name in ("labels", "clean_labels", "index")):
        raise ValueError("`train_dataset` must be a `TransformedDataset`: `TransformedDataset(dataset, transform)`.")
    if len(dataset) == 0:
        raise ValueError("The training set is empty.")
    labels = dataset.labels
    if labels.min() < 0 or labels.max() >= num_labels:
        first = int(((labels < 0) | (labels >= num_labels)).argmax())
        raise ValueError(
            f"Training sample {dataset.index[first]} has label {labels[first]}, but the model has {num_labels} "
            f"classes (0 to {num_labels - 1})."
        )
    if dataset.targets is not None and not ((dataset.targets[0] >= 0) & (dataset.targets[0] < num_labels)).all():
        raise ValueError(f"The soft targets name classes that the model does not have: it has {num_labels}.")
    if (labels == labels[0]).all():
        raise ValueError(
            f"All {len(dataset)} training samples have the one label {labels[0]}; there is nothing to learn. "
            "Check `--label_column`."
        )


def check_sample_weights(dataset, *, mixes: bool):
    """Raise `ValueError` unless the weights of a dataset, of shape `(n,)`, lie in [0, 1] and are not all 0.

    Args:
        dataset ([`TransformedDataset`]): with `weights`.
        mixes (`bool`): whether images are mixed.
    """
    if mixes:
        raise ValueError("A mixed image has two labels and no weight: leave out Mixup, or the weights of samples.")
    bad = np.flatnonzero(~((dataset.weights >= 0) & (dataset.weights <= 1)))
    if len(bad):
        raise ValueError(
            f"Training sample {dataset.index[bad[0]]} has the weight {dataset.weights[bad[0]]}; weights say how "
            "far a label is believed, from 0 to 1."
        )
    if not dataset.weights.any():
        raise ValueError(f"All {len(dataset)} training samples have weight 0; there is nothing to learn.")
