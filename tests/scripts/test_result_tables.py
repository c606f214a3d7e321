"""The accuracies in README and docs are those of the records."""

import json

import pytest
from commands import load_script


@pytest.fixture
def script(monkeypatch, tmp_path):
    script = load_script("result_tables")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    return script


def write(folder, suite: str, *records: dict):
    lines = [json.dumps({"cell": str(number), **record}) for number, record in enumerate(records)]
    (folder / f"accuracy-{suite}.runs.jsonl").write_text("\n".join(lines))


def run(method: str, last: float, **more) -> dict:
    return {
        "noise": "half",
        "method": method,
        "last": last,
        "last_student": last - 0.05,
        "auroc": 0.9,
        "cost_ce": 1.25,
        **more,
    }


def test_the_pages_show_the_records():
    load_script("result_tables").main(["--check"])


def test_a_row_per_method_and_a_column_per_noise(script, tmp_path):
    runs = [run("A", 0.5), run("A", 0.6), run("A", 0.7), run("B", 0.4), run("B", 0.25, noise="none")]
    write(tmp_path, "x", *runs)
    table = script.by_noise("last", "x", {"half": "symmetric, 50 %", "none": "none"}, ["A", "B"])
    assert table.splitlines()[2:] == [
        "| A | 60.0 ± 10.0 |  | 55.0 ± 10.0 | 0.900 ± 0.000 | 1.25 |",
        "| B | 40.0 (1) | 25.0 (1) | 35.0 | 0.900 | 1.25 |",
    ]
    assert table.splitlines()[0] == "|  | symmetric, 50 % | none | student, symmetric | AUROC, symmetric | cost |"


def test_leads_are_differences_of_unrounded_means(script, tmp_path):
    runs = [
        run("A", 0.5004, best=0.52),
        run("A", 0.5, best=0.52),
        run("B", 0.4, best=0.5),
        run("A", 0.3, noise="none"),
    ]
    write(tmp_path, "x", *({"best": 0.0, **record} for record in runs))
    table = script.leads("x", {"half": "50 %", "none": "none"}, "A", ["B"])
    assert table.splitlines()[2:] == [
        "| last epoch above B | +10.0 |  |",
        "| best epoch above B | +2.0 |  |",
        "| last epoch above its own best | -2.0 | +30.0 |",
    ]


def test_candidates_of_a_method_stand_together(script, tmp_path):
    write(
        tmp_path,
        "tuning",
        run("ELR, 3 and 0.7", 0.5, curve=[{"validation": 0.1}, {"validation": 0.35}]),
        run("constant learning rate 0.2, decay 0.9", 0.4, curve=[{"validation": 0.25}]),
        run("ELR, 7 and 0.9", 0.6, curve=[{"validation": 0.375}]),
    )
    assert script.tuning().splitlines()[2:] == [
        "| cross-entropy | constant learning rate 0.2, decay 0.9 | 25.0 | 40.0 |",
        "| ELR | 3 and 0.7 | 35.0 | 50.0 |",
        "| ELR | 7 and 0.9 | 37.5 | 60.0 |",
    ]


def test_a_figure_that_was_changed_by_hand_is_noticed(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "TABLES", {"page.md": {"T": lambda: "| 54.3 |"}})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- T -->\n| 55.3 |\n<!-- /T -->\nafter\n")
    with pytest.raises(SystemExit):
        script.main(["--check"])
    assert "page.md" in capsys.readouterr().out and "55.3" in page.read_text()
    script.main([])
    assert page.read_text() == "before\n<!-- T -->\n| 54.3 |\n<!-- /T -->\nafter\n"
    script.main(["--check"])
    page.write_text("no place for it\n")
    with pytest.raises(ValueError, match="there 0 times"):
        script.main([])


def test_tables_of_no_page_are_printed(capsys, monkeypatch):
    script = load_script("result_tables")
    monkeypatch.setattr(script, "SHOWN", {"a": lambda: "| 1 |", "b": lambda: "| 2 |", "c": lambda: "| 3 |"})
    script.main(["--show", "a", "c"])
    assert capsys.readouterr().out == "a\n\n| 1 |\n\nc\n\n| 3 |\n"


def test_every_table_of_no_page_has_its_records(capsys):
    script = load_script("result_tables")
    script.main(["--show", *script.SHOWN])
    assert "| extrapolation alone | alpha 4 | 33.6 | 42.7 |" in capsys.readouterr().out


def test_audits_by_hand(script, tmp_path):
    def scored(dataset, scorer, auroc, cost, **more):
        names = ("average_precision", "precision_at_n", "ece")
        facts = {"dataset": dataset, "scorer": scorer, "seed": 0, "auroc": auroc, "cost_ce": cost}
        return {**facts, **dict.fromkeys(names), **more}

    rate = {"estimated_rate": 0.25, "true_rate": 0.285, "estimated_rate_interval": [0.2, 0.3], "ece": 0.0625}
    results = [
        scored("cifar10n-10k worse", "hnml_hf, objective hnml", 0.8755, 1.1, **rate),
        scored("quickstart symmetric 50 %", "hnml_hf, objective hnml", 0.75, 1.25, **(rate | {"true_rate": 0.25})),
        scored("cifar10n-10k worse", "AUM", 0.5, 1.0),
        scored("cifar10n-10k worse", "hnml_hf, objective hnml", 0.25, 9.0, **rate, seed=1),
        scored("quickstart symmetric 50 %", "hnml_hf, cross-validated probe", 0.5, None, **rate),
    ]
    (tmp_path / "audit_benchmark.json").write_text(json.dumps({"results": results}))
    first, other_seed, second, probe = script.audit_rates().splitlines()[2:]
    assert other_seed.startswith("| CIFAR-10N `worse` | objective hnml | 1 | 0.250 |")
    assert first == (
        "| CIFAR-10N `worse` | objective hnml | 0 | 0.875 | - | - | 0.062 | 28.5 % | 25.0 % (20 to 30) | **no** |"
    )
    assert probe.startswith("| quickstart, symmetric 50 % | cross-validated probe | 0 | 0.500 |")
    assert second.endswith("| 25.0 % | 25.0 % (20 to 30) | yes |")
    assert script.audit_scorers().splitlines()[2:] == [
        "| hnml_hf, objective hnml | 1.10 to 1.25 | 0.875 | 0.750 |  |  |  |",
        "| AUM | 1.00 | 0.500 |  |  |  |  |",
        "| hnml_hf, cross-validated probe |  |  | 0.500 |  |  |  |",
    ]


def test_recovered_is_a_share_of_what_the_noise_costs(script, tmp_path):
    """Cross-entropy has 0.6 under noise and 0.9 on clean labels; 0.675 is a quarter of the way."""
    noise, clean = {"noise": "human 40 %", "suite": "finetune"}, {"noise": "clean", "suite": "finetune"}
    found = [
        run("A", 0.675, best=0.7, memorized=0.1, **noise),
        run("cross-entropy, sure head", 0.5, best=0.5, memorized=0.1, **noise),
        run("A, 224 px", 0.1, **noise),
        run("cross-entropy, sure head", 0.9, best=0.9, **clean),
    ]
    lines = [json.dumps({"cell": str(number), **record}) for number, record in enumerate(found)]
    (tmp_path / "full.runs.jsonl").write_text("\n".join(lines))
    write(tmp_path, "finetune-given", run("cross-entropy", 0.6, best=0.6, memorized=0.1, noise="human 40 %"))
    assert script.whole_cifar().splitlines()[2:] == [
        "| cross-entropy, sure head | 1 | 50.0 | 50.0 | 45.0 | -33 % | 0.900 | 10.0 | 1.25 |",
        "| cross-entropy | 1 | 60.0 | 60.0 | 55.0 | 0 % | 0.900 | 10.0 | 1.25 |",
        "| A | 1 | 67.5 | 70.0 | 62.5 | 25 % | 0.900 | 10.0 | 1.25 |",
        "| cross-entropy, clean labels | 1 | 90.0 | 90.0 | 85.0 | 100 % |  |  | 1.25 |",
    ]


def test_frozen_targets_are_means_over_seeds(script, tmp_path):
    tests = {"cross-entropy": [0.8, 0.8], "posterior": [0.84, 0.86], "cross-entropy on clean labels": [0.9]}
    runs = [
        {"method": method, "seed": seed, "learning_rate": 0.02, "test": value}
        for method, values in tests.items()
        for seed, value in enumerate(values)
    ]
    runs.append({**runs[0], "learning_rate": 0.05, "test": 0.1})  # of another table
    (tmp_path / "frozen-targets.json").write_text(json.dumps({"runs": runs}))
    assert script.frozen_targets().splitlines()[2:] == [
        "| cross-entropy | 2 | 80.0 ± 0.0 | 0 % |",
        "| posterior | 2 | 85.0 ± 1.4 | 50 % |",
        "| cross-entropy on clean labels | 1 | 90.0 | 100 % |",
    ]
