import numpy as np
import pytest

from hnml_hf import TrainingDynamics, noise_scores


@pytest.fixture
def scored(tiny_dataset):
    """Scores as from a good model: probability 0.8 on the true class, over three epochs."""
    clean = np.array(tiny_dataset["clean_label"])
    probabilities = np.full((48, 3), 0.1)
    probabilities[np.arange(48), clean] = 0.8
    statistics = TrainingDynamics(np.array(tiny_dataset["index"]), np.array(tiny_dataset["label"]), 3)
    for epoch in range(3):
        statistics.update(np.array(tiny_dataset["index"]), probabilities, epoch=epoch)
    return statistics.records


@pytest.fixture
def table(scored, tiny_dataset):
    return noise_scores(scored, tiny_dataset.features["label"].names)
