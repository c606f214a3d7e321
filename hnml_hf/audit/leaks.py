"""Which training images are nearly in another split, as a test set, by the features that the judge has of them."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from datasets import Dataset

from ..data.schema import column, image_paths
from .features import Features
from .findings import DUPLICATE
from .judge import Projection, most_similar


def find_leaks(
    dataset: Dataset,
    features: Features,
    others: Mapping[str, tuple[Dataset, Features]],
    projection: Projection,
    *,
    threshold: float = DUPLICATE,
) -> pd.DataFrame:
    """Training images with a copy or near-copy in other splits, by [`~hnml_hf.audit.judge.most_similar`].

    Args:
        dataset (`datasets.Dataset`): the training split, with `image` and `index`.
        features ([`Features`]): of its rows.
        others (`Mapping[str, tuple[datasets.Dataset, Features]]`): the same of other splits, by name.
        projection ([`Projection`]): of the judgement of the training split.
        threshold (`float`): cosine from which two images are nearly the same.

    Returns:
        `pd.DataFrame`: `index, path, other_split, other_index, other_path, cosine`: for each other split the training
        images that are nearly in it, with the most similar image there, the most similar pairs first.
    """
    rows, parts = np.flatnonzero(features.readable), []
    vectors = projection(features.values)[rows]
    index, paths = _ids_and_paths(dataset)
    for split, (other, seen) in others.items():
        readable = np.flatnonzero(seen.readable)
        nearest, cosines = most_similar(vectors, projection(seen.values)[readable])
        close = np.flatnonzero(cosines >= threshold)
        close = close[np.argsort(-cosines[close], kind="stable")]
        mine, its = rows[close], readable[nearest[close]]
        other_index, other_paths = _ids_and_paths(other)
        columns = {"index": index[mine], "path": paths[mine], "other_split": split}
        columns |= {"other_index": other_index[its], "other_path": other_paths[its]}
        parts.append(pd.DataFrame({**columns, "cosine": cosines[close].astype(np.float64).clip(max=1).round(4)}))
    return pd.concat(parts, ignore_index=True)


def _ids_and_paths(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, both of shape `(n,)`."""
    index, paths = column(dataset, "index"), np.empty(len(dataset), dtype=object)
    paths[np.argsort(index, kind="stable")] = image_paths(dataset)
    return index, paths
