"""The accuracy behind an agreement with noisy labels: by hand, and on recorded runs whose true accuracy is known."""

import pytest
from benchmark_accuracy import finished
from commands import ROOT

from hnml_hf.training.metrics import estimate_accuracy


RATES = {"human 9 %": 0.09, "human 40 %": 0.402, "symmetric 50 %": 0.5, "asymmetric 40 %": 0.2}


@pytest.mark.parametrize(
    ("agreement", "rate", "classes", "expected"),
    [
        (0.9, 0.0, 10, 0.9),  # no noise: what is measured
        (0.4, 0.4, 5, 0.5),  # between 0.4 and (0.4 - 0.1) / (1 - 0.4 - 0.1) = 0.6
        (0.05, 0.4, 5, 0.05),  # below chance: no less than was measured
        (0.5, 0.9, 10, 0.75),  # labels that say nothing: between 0.5 and 1
        (1.0, 0.3, 2, 1.0),
    ],
)
def test_by_hand(agreement, rate, classes, expected):
    estimate, low, high = estimate_accuracy(agreement, 10**9, rate, (rate, rate), classes)
    assert estimate == pytest.approx(expected, abs=1e-4) and 0 <= low <= estimate <= high <= 1


def test_few_labels_and_an_uncertain_rate_widen_the_range():
    _, low, high = estimate_accuracy(0.5, 100, 0.4, (0.3, 0.5), 5)
    assert low == pytest.approx(0.40383, abs=1e-4)  # Wilson: 0.5 - 1.96 sqrt(0.25 / 103.84)
    assert high == 1.0  # (0.596 - 0.125) / (1 - 0.5 - 0.125) > 1
    assert estimate_accuracy(0.5, 100, 0.4, (0.3, 0.4), 5)[2] == pytest.approx((0.59617 - 0.1) / 0.5, abs=1e-4)


def test_a_few_labels_that_all_agree_leave_a_range():
    estimate, low, high = estimate_accuracy(1.0, 20, 0.0, (0.0, 0.01), 3)
    assert (estimate, high) == (1, 1) and low == pytest.approx(0.8389, abs=1e-4)  # 20 / (20 + 1.96^2)


def test_the_range_holds_the_accuracy_of_the_recorded_runs():
    """Every run that was measured on clean test images and on noisy held-out labels, at its last epoch."""
    inside = total = 0
    for path in sorted((ROOT / "docs" / "results").glob("accuracy-*.runs.jsonl")):
        for record in finished(path).values():
            last = (record.get("curve") or [{}])[-1]
            if record["noise"] in RATES and {"validation", "test"} <= set(last):
                rate = RATES[record["noise"]]
                held_out = 5_000 if record.get("rows_train") == 45_000 else 1_000
                _, low, high = estimate_accuracy(last["validation"], held_out, rate, (rate, rate), 10)
                inside, total = inside + (low <= last["test"] <= high), total + 1
    assert total > 300 and inside / total > 0.95, (inside, total)
