import numpy as np
import pandas as pd
import torch
from datasets import Dataset, Image

from hnml_hf.audit import judge
from hnml_hf.audit.features import Features
from hnml_hf.audit.judge import Projection, judge_labels, most_similar
from hnml_hf.audit.leaks import find_leaks


def split_of(vectors, index, readable=None, tmp_path="."):
    """A split without files, and its features."""
    dataset = Dataset.from_dict({"image": [f"{number}.png" for number in index], "index": index})
    readable = np.ones(len(index), bool) if readable is None else np.array(readable)
    values, groups = np.array(vectors, dtype=np.float32), np.arange(len(index))
    return dataset.cast_column("image", Image()), Features(values, groups, readable, 0, {}, tmp_path)


def test_pairs_worked_by_hand():
    """Ids come in no order, images that cannot be read are never alike, and a training image may be in two splits."""
    train = split_of([[1, 0], [0, 1], [1, 1], [0, 0]], [12, 10, 13, 11], [True, True, True, False])
    test = split_of([[0, 0], [0.1, 1], [0, 2]], [7, 5, 6], [False, True, True])
    validation = split_of([[3, 0], [0.3, 1]], [1, 0])
    projection = Projection(torch.zeros(2), torch.eye(2))
    found = find_leaks(*train, {"test": test, "validation": validation}, projection)
    assert found.to_dict("records") == [
        {"index": 10, "path": "10.png", "other_split": "test", "other_index": 6, "other_path": "6.png", "cosine": 1},
        {
            "index": 12,
            "path": "12.png",
            "other_split": "validation",
            "other_index": 1,
            "other_path": "1.png",
            "cosine": 1,
        },
        {
            "index": 10,
            "path": "10.png",
            "other_split": "validation",
            "other_index": 0,
            "other_path": "0.png",
            "cosine": 0.9578,
        },
    ]
    assert len(find_leaks(*train, {"validation": validation}, projection, threshold=0.96)) == 1
    none = find_leaks(*train, {"test": split_of([[-1, -1]], [0])}, projection)
    assert none.empty and "cosine" in none


def test_copies_are_found_in_lists_beyond_the_limit_of_pairs(monkeypatch):
    generator = np.random.default_rng(0)
    test = generator.normal(size=(4_000, 24))
    train = np.r_[test[:20] + 0.01, generator.normal(size=(100, 24))]
    projection = Projection(torch.zeros(24), torch.eye(24))
    splits = *split_of(train, range(120)), {"test": split_of(test, range(4_000))}, projection
    exact = find_leaks(*splits)
    monkeypatch.setattr(judge, "NEIGHBOR_LIMIT", 600)
    found, exact = (part.sort_values("index", ignore_index=True) for part in (find_leaks(*splits), exact))
    pd.testing.assert_frame_equal(found, exact, rtol=1e-3)
    assert exact["index"].tolist() == exact["other_index"].tolist() == list(range(20))


def test_cosines_are_those_of_the_neighbors_of_the_judge():
    features = np.random.default_rng(0).normal(size=(80, 8)).astype(np.float32)
    judgement = judge_labels(features, np.arange(80) % 2, num_labels=2)
    vectors = judgement.projection(features)
    nearest, cosines = most_similar(vectors[:10], vectors[10:])
    mine = np.where(judgement.nearest[:10] >= 10, judgement.similarities[:10], -1)
    np.testing.assert_allclose(cosines, mine.max(1), rtol=1e-5)
    assert nearest.tolist() == (judgement.nearest[np.arange(10), mine.argmax(1)] - 10).tolist()
    assert judge_labels(features, np.arange(80) % 2, num_labels=2, neighbors=0).projection is None
