"""`hnml` answers what needs no library without importing one, and knows the options that the scripts have."""

import argparse
import ast
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import load_script

import hnml_hf
import hnml_hf.__main__ as entry
from hnml_hf import cli
from hnml_hf.data.load import DATASET_NAMES


ROOT = Path(__file__).parents[1]
HEAVY = (
    "{'torch', 'torchvision', 'timm', 'transformers', 'datasets', 'accelerate', 'sklearn', 'pandas', 'numpy', 'PIL'}"
)


def run_python(code: str, *words, **environment) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([*environment.pop("before", []), str(ROOT)])
    variables = {**os.environ, **environment, "PYTHONPATH": paths}
    return subprocess.run([sys.executable, *words, "-c", code], env=variables, capture_output=True, text=True)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["hnml", *words])
    entry.main()


def test_answers_come_before_the_heavy_imports():
    lines = ["", "--help", "--version", "train --help", "train --help-all", "trian", "evaluate --modle x"]
    lines += [
        "train --data_dir nowhere --dataset imagefolder",
        "audit",
        "audit none",
        "train no/such/path",
        "review none",
    ]
    lines += [*(f"{command} --help" for command in cli.COMMANDS)]
    done = run_python(
        "import contextlib, io, sys\n"
        "from hnml_hf.__main__ import main\n"
        f"for line in {lines!r}:\n"
        "    sys.argv = ['hnml', *line.split()]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        f"print(sorted({HEAVY} & set(sys.modules)))\n"
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_command_lists_its_scripts(monkeypatch, capsys):
    call(monkeypatch)
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert (cli.scripts_folder() / f"{name}.py").is_file() and f"\n  {name} " in shown
    call(monkeypatch, "--version")
    assert capsys.readouterr().out == f"hnml {hnml_hf.__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "there is no command `trian`. Did you mean `train`?"),
        ("frobnicate", "there is no command `frobnicate`. There are audit, check,"),
        ("audit_data photos", "hnml: `audit_data` is now called `check`."),
        ("train --bakbone resnet50", "there is no option --bakbone; did you mean --backbone?"),
        ("train --lr 0.1", "there is no option --lr; did you mean --learning_rate?"),
        ("train --batch-size=8", "did you mean --per_device_train_batch_size?"),
        ("evaluate ./none quickstart", "error: ./none: there is no such file or folder"),
        ("evaluate user/x --dataset rows.csv", "--dataset rows.csv: there is no such file or folder"),
        ("predict user/x none.jpg", "error: none.jpg: there is no such file or folder"),
        ("predict --model x a.jpg", "there is no option --model any more: the model comes first"),
        ("clean run --how drop --output out", "there is no option --output any more: the folder is `--output_dir`"),
        ("audit", "hnml audit: error: give a dataset or the folder of a finished training run"),
        ("audit --max_issues 5", "hnml audit: error: give a dataset or the folder"),
        ("audit no_such", "no_such: there is no such file or folder, nor a known dataset of that name; a dataset on"),
        ("audit no_such/", "no_such/: there is no such file or folder, nor a known dataset"),
        ("check 'my photos/cats", "'my: there is no such file or folder"),
        ("train quickstrat", "quickstrat: there is no such file or folder, nor a known dataset of that name; did you"),
        ("train no/such/path", "error: no/such/path: there is no such file or folder"),
        ("check", "hnml check: error: give a dataset: a folder of images, a table"),
        ("evaluate user/x", "hnml evaluate: error: give a dataset: a folder of images, a table"),
        ("evaluate none quickstart", "none: there is no such folder; a repository on the Hub is called user/name"),
        ("export none --output m.onnx", "none: there is no such folder; a repository on the Hub is called user/name"),
        ("export user/x", "hnml export: error: give --output (a file) or --hub_model_id (a repository)"),
        ("predict user/x", "hnml predict: error: give image files or folders, or else --dataset"),
        ("review none", "none: there is no such file or folder: give the `output_dir` of an earlier audit"),
        ("review .", ".: there are no scores of labels (_audit/noise_scores.parquet); `hnml audit` writes them"),
        ("clean none --output_dir x", "none: there is no such file or folder: give the `output_dir`"),
        ("clean . --output_dir x", ".: there are no scores of labels"),
        ("clean .", "hnml clean: error: give --output_dir, a new folder for the corrected dataset"),
        (
            "audit . --clean drop",
            "there is no option --clean any more: `hnml clean RUN --how drop --output_dir FOLDER`",
        ),
        ("audit . --apply a.csv", "there is no option --apply any more: `hnml clean RUN --annotations FILE"),
        ("audit . --threshold 0.9", "there is no option --threshold any more: `hnml clean RUN --how drop"),
        ("train --data_dir=none", "--data_dir none: there is no such file or folder"),
        (
            "clean . --annotations none.csv --output_dir x",
            "--annotations none.csv: there is no such file or folder: give",
        ),
        (
            "audit quickstart --annotations none.csv",
            "--annotations none.csv: there is no such file or folder: give a file",
        ),
        ("review . --import none.csv", "--import none.csv: there is no such file or folder: give a file that the"),
        (
            "audit quickstart --exclude none.jsonl",
            "--exclude none.jsonl: there is no such file or folder: give a list",
        ),
        ("train --recipe dreams", "--recipe dreams: there is no such file, nor a recipe of that name. Known: "),
        ("train --objective magic", "argument --objective: invalid choice: 'magic'"),
        ("train --noise_rate much", "argument --noise_rate: invalid float value: 'much'"),
    ],
)
def test_a_mistyped_line_ends_with_one_line(line, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, *line.split())
    shown = capsys.readouterr().err or str(end.value.code)
    assert message in shown and len(shown.splitlines()) == 1 and end.value.code


@pytest.mark.parametrize(
    "line",
    [
        "train --backbone resnet18 --no_audit --bf16 --use-cpu true --optim_args momentum=0.9 --dataset user/name",
        "audit --run . --export csv cleanlab --max_issues 7",
        "predict user/name --top_k 2 . --top_k 3 --skip_unreadable",
        "review . --annotations made_by_it.jsonl",
        "train --dataset user/name --data_dir inside --backbone x",
    ],
)
def test_a_right_line_passes(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise_scores.parquet").touch()
    command, *words = line.split()
    cli.check_words(command, words)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            FileNotFoundError(2, "No such file", "none.csv"),
            "none.csv: there is no such file or folder; check the path",
        ),
        (IsADirectoryError(21, "Is a directory", Path("photos")), "photos: this is a folder; give a file"),
        (OSError(28, "No space left", b"out"), "out: the disk is full; make room, or give a path on another"),
        (
            OSError(30, "Read-only", "c"),
            "c: nothing can be written there, since this disk is read-only; give another path",
        ),
        (OSError(12, "8 MiB could not be reserved"), "8 MiB could not be reserved"),
        (PermissionError("an own sentence"), "an own sentence"),
        (ValueError("of no file"), "of no file"),
    ],
)
def test_an_error_of_a_file_names_it_without_a_number(error, message):
    assert cli.plain_message(error) == message


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["-m hnml_hf", "-m hnml_hf train --help-all", "scripts/review.py --help"])
def test_a_reader_that_goes_away_ends_a_command_quietly(command, unbuffered):
    started = subprocess.Popen(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    started.stdout.close()
    errors = started.stderr.read()
    started.stderr.close()
    assert errors == b"" and started.wait() in (0, cli.PIPE_CLOSED)  # argparse says nothing of a reader that is gone


def test_help_says_what_own_data_get_and_where_it_is_from(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "train", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "or of a folder that has one. (default for your own DATA: true, from the recipe own_folder; without" in shown
    )
    assert "images or paths. --label" in shown and "own DATA: imagefolder" not in shown  # DATA says which


def test_a_broken_pipe_of_something_else_is_an_error(capsys):
    with pytest.raises(BrokenPipeError, match="of a worker"), cli.quiet_pipes():
        raise BrokenPipeError("of a worker")


def test_the_exit_code_of_a_typo_is_not_that_of_defects(monkeypatch):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "check", "--datset", "x")
    assert end.value.code == 1


class Found(Exception):
    """The parser of a script is known."""


def parser_of(command: str, monkeypatch) -> argparse.ArgumentParser:
    """The parser that a script really uses."""

    def look(self, *given, **more):
        raise Found(self)

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_known_args", look)
        with pytest.raises(Found) as found:
            load_script(command).main(["--output_dir", "x"])
    return found.value.args[0]


def actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {(action.option_strings or [action.dest])[0]: action for action in parser._actions}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_options_read_are_those_of_the_script(command, monkeypatch):
    real, light = actions(parser_of(command, monkeypatch)), actions(cli.create_parser(command))
    assert set(real) == set(light)
    for name, action in real.items():
        ours = light[name]
        assert set(ours.option_strings) == set(action.option_strings)
        assert ours.nargs == action.nargs, name
        assert action.choices is None or ours.choices is None or list(ours.choices) == list(action.choices), name
        if name in ("--help", "-h") or name.startswith("--no_"):
            continue
        assert ours.help in (action.help, ""), name  # what transformers computes is left out
        assert ours.default in (action.default, None, ""), name
        assert ours.type in (action.type, None), name


def test_the_datasets_that_have_a_name_are_known():
    assert sorted(cli.NAMED_DATASETS) == sorted(DATASET_NAMES)


def test_the_options_that_help_shows_exist():
    for command in cli.COMMANDS:
        known = [name for options in cli.option_groups(command).values() for name in options]
        assert set(cli.COMMON.get(command, ())) <= set(known)
        assert len(set(known)) == len(known)
    everywhere = {name for command in cli.COMMANDS for group in cli.option_groups(command).values() for name in group}
    assert {*cli.PATHS, *cli.PATHS_OR_NAMES, *cli.MEANINGS} <= everywhere
    assert 25 <= len(cli.COMMON["train"]) <= 35


def test_help_is_short_and_help_all_has_everything(monkeypatch, capsys):
    shown = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            call(monkeypatch, "train", word)
        assert end.value.code == 0
        shown[word] = capsys.readouterr().out
    assert "--learning_rate VALUE" in shown["--help"] and "--help-all" in shown["--help"]
    assert "--adam_beta2" not in shown["--help"] and "--adam_beta2 VALUE" in shown["--help-all"]
    assert (
        "usage: hnml train [DATA] [options]" in shown["--help"]
        and "\n    hnml train photos" in shown["--help"]
        and "scripts/train.py" not in shown["--help"]
    )


def test_the_help_of_clean_names_what_an_option_takes():
    from hnml_hf.audit import cleaning, outputs

    (options,) = cli.option_groups("clean").values()
    for name, values in (("how", cleaning.HOW), ("output_format", outputs.FORMATS), ("files", outputs.FILES)):
        assert ", ".join(values[:-1]) + f" or {values[-1]}" in options[name].help


def test_a_script_gives_the_same_help(monkeypatch, capfd):
    for command in ("train", "audit"):
        with pytest.raises(SystemExit):
            call(monkeypatch, command, "--help")
        shown = capfd.readouterr().out
        with contextlib.suppress(SystemExit):  # which torch's `record` swallows if it is 0
            load_script(command).main(["--help"])
        assert capfd.readouterr().out == shown


def test_the_command_runs_a_script_as_if_it_were_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "export", "user/name", "--output", "model.txt")
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert "usage: hnml export" in shown and "must end in .onnx or .pt2" in shown


MODELS = ["evaluate outputs quickstart", "predict outputs x.png", "export outputs --output m.onnx"]


@pytest.mark.parametrize("line", MODELS)
def test_a_model_that_is_not_there_is_named(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").touch()
    command, *words = line.split()
    with pytest.raises(
        SystemExit, match="outputs: there is no such folder; a repository on the Hub is called user/name"
    ):
        load_script(command).main(words)


def test_a_finished_run_is_published_by_one_command(monkeypatch, capsys):
    export, sent = load_script("export"), []
    monkeypatch.setattr(export, "push_to_hub", lambda *names: sent.append(names) or argparse.Namespace(repo_url="url"))
    export.main(["outputs/run", "--hub_model_id", "user/name"])
    assert sent == [("outputs/run", "user/name")] and capsys.readouterr().out == "Published: url\n"
    with pytest.raises(SystemExit):
        export.main(["outputs/run"])
    assert "give --output (a file) or --hub_model_id" in capsys.readouterr().err


def test_ctrl_c_during_imports_ends_with_one_line(tmp_path):
    """The first library that `export` imports is one that is interrupted while it is imported."""
    (tmp_path / "transformers.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    )
    code = "import sys, hnml_hf.__main__ as m; sys.argv = 'hnml export u/m --output m.onnx'.split(); m.main()"
    done = run_python(code, before=[str(tmp_path)])
    assert (done.returncode, done.stderr) == (130, "hnml: interrupted\n")


# -- the package: names on demand --


def test_public_names_are_imported_on_demand():
    source = ast.parse((ROOT / "hnml_hf" / "__init__.py").read_text())
    block = next(node for node in source.body if isinstance(node, ast.If))
    declared = [alias.name for node in block.body for alias in node.names]
    assert sorted(declared) == sorted(hnml_hf.__all__) and set(hnml_hf.__all__) <= set(dir(hnml_hf))
    for name in hnml_hf.__all__:
        assert getattr(hnml_hf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'HNMLTrainr'"):
        hnml_hf.HNMLTrainr  # noqa: B018


def test_backbones_are_registered_in_either_order():
    done = run_python(
        "import sys, importlib.util, hnml_hf\n"
        "print('timm' in sys.modules)\n"
        "importlib.util.find_spec('timm')\n"  # as transformers looks whether it is there
        "import timm\n"
        "print(timm.is_model('resnet18_cifar'))\n"
        "del sys.modules['hnml_hf'], sys.modules['hnml_hf.modeling.backbones'], sys.modules['hnml_hf.modeling']\n"
        "import hnml_hf\n"
        "print('hnml_hf.modeling.backbones' in sys.modules)\n",
        "-W",
        "ignore",
    )
    assert done.stdout.split() == ["False", "True", "True"], done.stderr
