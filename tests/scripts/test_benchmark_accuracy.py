"""A suite is a grid of runs; what is finished is kept, whatever happens, and the table is arithmetic."""

import json
import re

import pytest
import yaml
from benchmark_accuracy import TRAIN
from commands import load_script
from matplotlib import pyplot


SUITE = {
    "recipe": str(TRAIN.parent / "recipes" / "quickstart.yaml"),
    "noises": {"half": {"noise_rate": 0.5}, "none": {"noise_rate": 0.0}},
    "backbones": {"narrow": {"model_args": {"output_stride": 8, "channels": [8, 8, 8, 8], "stem_width": 8}}},
    "methods": {"CE": {"objective": "ce", "eval_teacher": True}, "HNML": None},
    "grid": [{"noise": ["half", "none"], "backbone": ["narrow"], "method": ["CE", "HNML"], "seed": [0, 1]}],
}


@pytest.fixture(scope="module")
def script():
    return load_script("benchmark_accuracy")


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (SUITE | changes).items() if value is not None}))
        return path

    return write


def record(cell, *, last, method="CE", seed=0, **more):
    figures = {"best": last + 0.1, "memorized": None, "auroc": None, "cost_ce": 1.0}
    figures["curve"] = [{"validation": 0.1}, {"validation": 0.2}]
    return {"cell": cell, "noise": "half", "method": method, "seed": seed, "last": last, **figures, **more}


# -- suites -----------------------------------------------------------------------------------------------------------


def test_a_grid_is_a_product_and_each_run_comes_once(script, write):
    again = {"noise": ["none"], "backbone": ["narrow"], "method": ["HNML"], "seed": [1, 2]}
    cells = script.load_suite(write(grid=[*SUITE["grid"], again]))
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == 2 * 2 * 2 + 1
    assert names[0] == "half, narrow, CE, seed 0" and names[-1] == "none, narrow, HNML, seed 2"
    assert len({cell.folder for cell in cells}) == len(cells)


def test_options_reach_the_script_as_it_reads_them(script, write):
    cell = script.load_suite(write())[0]
    train = load_script("train")
    model_args, data_args, args = train.parse_arguments([*cell.arguments(), "--output_dir", "x"])
    assert json.loads(model_args.model_args)["channels"] == [8, 8, 8, 8]
    assert (json.loads(data_args.noise)["rate"], args.objective, args.eval_teacher, args.seed) == (0.5, "ce", True, 0)


def test_an_option_that_is_null_is_left_to_the_recipe(script, write):
    (cell, *_) = script.load_suite(write(methods={"CE": {"objective": "ce", "noise_seed": None}, "HNML": None}))
    _, data_args, args = load_script("train").parse_arguments([*cell.arguments(), "--output_dir", "x"])
    assert "None" not in cell.command and args.objective == "ce" and json.loads(data_args.noise)["draw"] == "exact"


@pytest.mark.parametrize("name", sorted(path.stem for path in (TRAIN.parent / "benchmarks" / "suites").glob("*.yaml")))
def test_the_suites_that_come_with_the_scripts_are_read(script, name):
    train = load_script("train")
    for cell in script.load_suite(TRAIN.parent / "benchmarks" / "suites" / f"{name}.yaml"):
        _, data_args, args = train.parse_arguments([*cell.arguments(), "--output_dir", "x", "--use_cpu", "true"])
        assert data_args.eval_test and data_args.validation_fraction > 0 and args.eval_strategy == "epoch", cell.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": None}, "a suite has `recipe`, `grid`"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml, which is not there"),
        ({"recipe": None}, "a suite has `recipe`, `grid`"),
        ({"method": {}}, "this one has .*`method`"),
        ({"grid": [{"noise": ["half"], "method": ["CE"]}]}, "has `seed` and some of noise, backbone, method"),
        ({"grid": [{"objective": ["ce"], "seed": [0]}]}, "has `seed` and some of"),
        ({"grid": [{"noise": ["double"], "seed": [0]}]}, r"`double` is none of its noises: \['half', 'none'\]"),
    ],
)
def test_mistakes_in_a_suite_are_named(script, write, changes, message):
    with pytest.raises(ValueError, match=message):
        script.load_suite(write(**changes))


def test_a_suite_is_read_as_a_recipe_is(script, tmp_path):
    """Numbers, words and places of mistakes; aliases and `<<` as well, which recipes do not have."""
    path, recipe = tmp_path / "suite.yaml", SUITE["recipe"]
    head = f"recipe: {recipe}\n"
    path.write_text(
        f"{head}methods:\n  A: &a {{learning_rate: 1e-5, eval_strategy: no, run_name: 010}}\n"
        "  B: {<<: *a, learning_rate: 2}\n  no: {<<: *a}\ngrid:\n- {method: [A, B, no], seed: [1]}\n"
    )
    first, second, third = script.load_suite(path)
    assert dict(first.options) == {"learning_rate": 1e-5, "eval_strategy": "no", "run_name": "010", "seed": 1}
    assert dict(second.options) == {**dict(first.options), "learning_rate": 2} and dict(third.names)["method"] == "no"
    for text, line, message in (
        ("methods: {A: {seed: 1,}\ngrid: [", 3, "no YAML that a suite may have: "),
        ("methods:\n  A: {seed: 1}\n  A: {seed: 2}\n", 4, "no YAML that a suite may have: `A` is there twice"),
        ("methods: !!python/object:os.system 1\n", 2, "no YAML that a suite may have: could not determine"),
    ):
        path.write_text(head + text)
        with pytest.raises(ValueError, match=f"suite.yaml:{line}: {message}"):
            script.load_suite(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="suite.yaml:1: a suite has lines `name: value`; got list"):
        script.load_suite(path)


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_finished_runs_are_skipped_and_an_incomplete_line_is_run_again(script, write, tmp_path, monkeypatch, capsys):
    """Three of eight were finished; the line of the third was cut off by a kill: six are run again."""
    suite, work = write(), tmp_path / "work"
    work.mkdir()
    cells = script.load_suite(suite)
    names = [cell.name for cell in cells]
    lines = [json.dumps(record(cell.name, last=0.5, command=cell.command)) for cell in cells[:3]]
    (work / "runs.jsonl").write_text("\n".join(lines)[:-20])
    ran = []

    def run_cell(cell, *ignored):
        ran.append(cell.name)
        if cell.name == names[-1]:
            raise RuntimeError(f"{cell.name} ended with code 1")
        return record(cell.name, **{**dict(cell.names), "last": 0.25, "command": cell.command})

    monkeypatch.setattr(script, "run_cell", run_cell)
    benchmark = load_script("benchmark")
    with pytest.raises(SystemExit, match="1 of 6 runs failed; call again"):
        benchmark.main(["accuracy", "--suite", str(suite), "--work_dir", str(work)])
    assert ran == names[2:] and "8 runs, 2 of them finished before" in capsys.readouterr().out
    assert set(script.finished(work / "runs.jsonl")) == set(names[:-1])
    ran.clear()
    benchmark.main(["accuracy", "--suite", str(suite), "--work_dir", str(work), "--only_existing"])
    assert ran == []


def test_a_record_of_other_options_is_not_taken_for_this_run(script, write, tmp_path):
    """Order does not matter; a value that the suite has changed since does."""
    suite, work = write(), tmp_path / "work"
    work.mkdir()
    first = script.load_suite(suite)[0]
    words = first.command.split()
    assert script.same_options(first.command, " ".join([*words[:2], *words[-2:], *words[2:-2]]))
    (work / "runs.jsonl").write_text(json.dumps(record(first.name, last=0.5, command=first.command)))
    changed = write(methods={"CE": {"objective": "elr"}, "HNML": None})
    with pytest.raises(SystemExit, match=f"{first.name} was `.*--objective ce.*` and is `.*--objective elr"):
        load_script("benchmark").main(["accuracy", "--suite", str(changed), "--work_dir", str(work)])


def test_a_folder_of_other_options_is_not_gone_on_with(script, write, tmp_path, monkeypatch):
    """Else a checkpoint of the old options would end under the new ones."""
    started = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, **ignored: started.append(command) or exit(3))
    first = script.load_suite(write())[0]
    with pytest.raises(SystemExit):
        script.run_cell(first, tmp_path, [], threads=1)
    changed = script.load_suite(write(methods={"CE": {"objective": "elr"}, "HNML": None}))[0]
    assert changed.name == first.name
    with pytest.raises(
        RuntimeError, match="started with other options.*remove it(?s:.*)objective ce(?s:.*)objective elr"
    ):
        script.run_cell(changed, tmp_path, [], threads=1)
    assert len(started) == 1


def test_runs_are_picked_by_name(script, write, tmp_path, monkeypatch):
    ran = []

    def run_cell(cell, *ignored):
        ran.append(cell.name)
        return record(cell.name, **{**dict(cell.names), "last": 0.25, "command": cell.command})

    monkeypatch.setattr(script, "run_cell", run_cell)
    main, suite = load_script("benchmark").main, ["--suite", str(write()), "--work_dir", str(tmp_path)]
    main(["accuracy", *suite, "--only", "none, *, CE, seed ?"])
    assert ran == ["none, narrow, CE, seed 0", "none, narrow, CE, seed 1"]
    with pytest.raises(SystemExit, match="is called some, \\* or other"):
        main(["accuracy", *suite, "--only", "some, *", "other"])


# -- figures ----------------------------------------------------------------------------------------------------------


def test_mean_and_spread_by_hand(script):
    """60, 70 and 80 %: mean 70, sample standard deviation 10; what is missing is left out."""
    assert script.mean_spread([0.6, 0.7, 0.8]) == "70.0 ± 10.0"
    assert script.mean_spread([0.5, None]) == "50.0" and script.mean_spread([None]) == ""
    assert script.mean_spread([0.25, 0.75], percent=False) == "0.500 ± 0.354"


def test_table_by_hand(script):
    records = [
        record("a", last=0.6, auroc=0.9, last_student=0.5, best_student=0.5),
        record("b", last=0.8, auroc=0.8, last_student=0.5, best_student=0.5, seed=1),
        record("c", last=0.9, method="HNML", cost_ce=1.333),
    ]
    assert script.table(records).splitlines() == [
        "| noise | method | seeds | last | best | student last / best | validation | AUROC | cost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| half | CE | 2 | 70.0 ± 14.1 | 80.0 ± 14.1 | 50.0 ± 0.0 / 50.0 ± 0.0 | 20.0 ± 0.0 | 0.850 ± 0.071 | 1.00 |",
        "| half | HNML | 1 | 90.0 | 100.0 |  /  | 20.0 |  | 1.33 |",
    ]


def test_the_best_epoch_is_that_of_the_held_out_labels(script, tmp_path):
    """The test set is best in epoch 1, the held-out labels in epoch 2: best is the test accuracy of epoch 2."""
    log = [
        {"epoch": 1, "eval_validation_accuracy": 0.5, "eval_test_accuracy": 0.9, "memorized": 0.1},
        {"epoch": 2, "eval_validation_accuracy": 0.6, "eval_test_accuracy": 0.8, "memorized": 0.2},
        {"epoch": 2, "eval_memorized": 0.25},
        {"epoch": 3, "eval_validation_accuracy": 0.4, "eval_test_accuracy": 0.7, "memorized": 0.3},
        {"epoch": 3, "train_runtime": 1.0},
        {"epoch": 3, "eval_accuracy": 0.7},
    ]
    results = {"objective": "ce", "evaluated": "student", "cost_ce": 1.0, "dataset": "x", "train_noise_auroc": 0.9}
    for name, content in (
        ("all_results", results),
        ("trainer_state", {"log_history": log}),
        ("config", {"architecture": "resnet10t"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = script.summarize(tmp_path)
    assert (found["last"], found["best"], found["best_epoch"], found["memorized"]) == (0.7, 0.8, 2, 0.3)
    assert [entry["memorized"] for entry in found["curve"]] == [0.1, 0.25, 0.3]
    assert "noise_rate" not in found
    (tmp_path / "_audit").mkdir()
    estimate = {"noise_rate": 0.3, "noise_rate_interval": [0.2, 0.4]}
    (tmp_path / "_audit" / "summary.json").write_text(json.dumps({**estimate, "inverse_temperature": 2.0}))
    assert estimate.items() <= script.summarize(tmp_path).items()
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log[4:]}))
    with pytest.raises(RuntimeError, match="need `eval_strategy` and `eval_test`"):
        script.summarize(tmp_path)


def test_one_tiny_run_from_end_to_end(script, write, tmp_path, capsys):
    """Two steps on the quickstart's data, in a process of its own; the second call finds it finished."""
    short = {
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "logging_steps": 1,
        "logging_strategy": "steps",
    }
    short |= {"save_strategy": "no", "eval_test": True, "audit": False, "report_to": "none", "use_cpu": True}
    short |= {"class_balanced_samples": 200, "per_device_eval_batch_size": 500}
    suite = write(noises={"half": short}, grid=[{"noise": ["half"], "method": ["CE"], "seed": [3]}])
    work, table = tmp_path / "work", tmp_path / "table.md"
    benchmark = load_script("benchmark")
    benchmark.main(["accuracy", "--suite", str(suite), "--work_dir", str(work), "--output", str(table)])
    (line,) = (work / "runs.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["cell"] == "half, CE, seed 3" and 0 <= found["last"] <= 1 and len(found["curve"]["test"]) == 2
    assert {"last_teacher", "best", "auroc", "cost_ce", "commit", "hardware", "versions", "command"} <= set(found)
    assert str(tmp_path) not in found["command"] and table.read_text().startswith("| noise | method |")
    capsys.readouterr()
    benchmark.main(["accuracy", "--suite", str(suite), "--work_dir", str(work)])
    assert "1 runs, 1 of them finished before" in capsys.readouterr().out


def test_a_curve_is_stored_by_name_and_read_by_epoch(script, tmp_path):
    curve = [{"epoch": 1, "test": 0.1, "test_student": 0.5}, {"epoch": 2, "test": 0.2, "validation": 0.3}]
    script.append(tmp_path / "runs.jsonl", record("new", last=0.2, curve=curve))
    (tmp_path / "old.jsonl").write_text(json.dumps(record("old", last=0.2, curve=curve)) + "\n")
    stored = json.loads((tmp_path / "runs.jsonl").read_text())["curve"]
    assert stored == {"epoch": [1, 2], "test": [0.1, 0.2], "validation": [None, 0.3]}
    (new,), (old,) = (script.finished(tmp_path / name).values() for name in ("runs.jsonl", "old.jsonl"))
    assert new["curve"] == [{"epoch": 1, "test": 0.1}, curve[1]] and old["curve"] == curve


# -- the plot ---------------------------------------------------------------------------------------------------------


def test_no_two_methods_look_alike_and_no_panel_is_empty(script, tmp_path):
    curve = [{"epoch": epoch, "test": 0.5, "memorized": 0.1} for epoch in (1, 2)]
    clean = [{"epoch": 1, "test": 0.5}]
    records = [record(str(i), last=0.5, method=f"method {i}", curve=curve) for i in range(25)]
    records.append(record("unwatched", last=0.5, method="unwatched", curve=clean))
    records.append(record("clean", last=0.5, method="method 0", noise="none", curve=clean))
    script.plot(records, tmp_path / "curves.svg")
    figure = pyplot.gcf()
    keys = figure.legends[0].get_lines()
    assert len({(key.get_color(), key.get_linestyle(), key.get_marker()) for key in keys}) == len(keys) == 26
    visible = {panel.get_title(): panel.get_visible() for panel in figure.axes}
    assert visible["half: wrong labels that are fitted"] and not visible["none: wrong labels that are fitted"]
    pyplot.close(figure)
    drawn = (tmp_path / "curves.svg").read_text()
    assert "method 0</text>" in drawn and "-0 " not in drawn and not re.search(r' [dxy]="[^"]*\d\.\d\d', drawn)
