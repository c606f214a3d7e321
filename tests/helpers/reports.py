"""Tables and evidence for reports."""

import numpy as np
import pandas as pd
from PIL import Image

from hnml_hf.audit.report import Evidence


EVIL = "</script><script>alert(1)</script>\"'<img src=x onerror=alert(2)>"


def make_table(n=30, names=("cat", "dog", EVIL), seed=0):
    generator = np.random.default_rng(seed)
    k = len(names)
    labels = generator.integers(0, k, n)
    suggested = (labels + generator.integers(1, k, n)) % k  # never the given class, as a judge has them
    score = np.sort(generator.random(n))[::-1]
    table = pd.DataFrame(
        {
            "index": 1000 + generator.permutation(n),
            "path": [f"photos/{EVIL}{i}.jpg" for i in range(n)],
            "label": labels,
            "label_name": np.array(names, dtype=object)[labels],
            "suggested_label": suggested,
            "suggested_name": np.array(names, dtype=object)[suggested],
            "noise_score": score,
            "rank": np.arange(1, n + 1),
            "given_probability": generator.random(n),
            "suggested_probability": generator.random(n),
            "margin": generator.normal(size=n),
            "foreground_agreement": np.where(np.arange(n) % 2, 0.5, np.nan),
            "times_seen": 3,
            "first_epoch_learned": -1,
            "last_epoch_learned": 2,
        }
    )
    matrix = np.full((k, k), 0.1) + (1 - 0.1 * k) * np.eye(k)
    table.attrs = {
        "class_names": list(names),
        "noise_rate": 0.3,
        "noise_rate_interval": [0.25, 0.36],
        "transition_matrix": matrix.tolist(),
        "transition_matrix_interval": [(matrix * 0.9).tolist(), (matrix * 1.1).tolist()],
        "dataset_fingerprint": "f" * 32,
        "source": EVIL,
        "provenance": EVIL,
    }
    return table


def make_evidence(n, side=32):
    generator = np.random.default_rng(1)
    return [
        Evidence(
            Image.fromarray(generator.integers(0, 255, (side, side, 3), dtype=np.uint8)),
            generator.random((4, 4)),
            generator.random((4, 4)),
        )
        for _ in range(n)
    ]


CURVES = [
    {"epoch": 1.0, "eval_accuracy": 0.4, "label_agreement": 0.3},
    {"epoch": 2.0, "eval_accuracy": 0.6, "label_agreement": 0.5},
    {"epoch": 2.0, "eval_accuracy": 0.9},
]
