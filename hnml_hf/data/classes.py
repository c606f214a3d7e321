"""Classes of two sources, as a model and a dataset, compared by their names."""

from collections.abc import Sequence

import numpy as np

from ..common.words import counted
from .files import as_name, first_few


def align_classes(model_names: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Which output of a model is which class of a dataset, by name; by position if the model's names say nothing.

    Args:
        model_names (`Sequence[str]`): the model's classes, in the order of its outputs; it may have more.
        names (`Sequence[str]`): classes of the dataset.

    Returns:
        `np.ndarray` of shape `(k,)`: the model's output for each class of the dataset.

    Raises:
        ValueError: if the model does not know a class, or has its name twice.
    """
    model_names, names = [as_name(str(name)) for name in model_names], [as_name(str(name)) for name in names]
    if model_names == names:
        return np.arange(len(names))
    at = {name: output for output, name in enumerate(model_names)}
    unknown = [name for name in names if name not in at]
    placeholders = ([str(i) for i in range(len(model_names))], [f"LABEL_{i}" for i in range(len(model_names))])
    if unknown and model_names in placeholders and len(model_names) == len(names):
        return np.arange(len(names))
    if unknown:
        raise ValueError(
            f"The model does not know {len(unknown)} of the dataset's {counted(len(names), 'class')}: "
            f"{first_few(unknown)}. "
            f"Its own {len(model_names)} are {first_few(model_names)}. Rename the classes, or take a model trained on "
            "them."
        )
    twice = [name for name in names if model_names.count(name) > 1]
    if twice:
        raise ValueError(
            f"The model has several outputs called {first_few(twice)}: which one is the dataset's is not known. Give "
            "them different names in the `label_names` of its `config.json`."
        )
    return np.array([at[name] for name in names])
