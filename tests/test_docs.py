"""What README, docs and recipes tell a reader to type exists; what is cheap is run."""

import argparse
import dataclasses
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from commands import load_script
from transformers import TrainingArguments

from hnml_hf.cli import COMMANDS, IN_SOURCES


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PROGRAMS = ("git", "make", "python -m pip", "python -m pytest", "pytest", "cd", "pip")
STAND_INS = {"--recipe": "quickstart", "--dataset": "quickstart"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[str]:
    """Of blocks for a shell, of indented lines and of inline code, each on one line."""
    fenced = "\n".join(blocks(text, "bash"))
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = "\n".join(re.findall(r"^    (.*)$", text, flags=re.MULTILINE))
    found = []
    for source in (fenced, indented, *re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", text)):
        for line in re.split(r"&&|\n", source.replace("\\\n", " ")):
            line = re.sub(r"\s+", " ", line.partition(" #")[0]).strip()
            if "hnml COMMAND" in line:
                continue
            if re.match(r"(python |accelerate launch |hnml )", line) and ("scripts/" in line or "hnml" in line):
                found.append(line)
    return list(dict.fromkeys(found))


class Parsed(Exception):
    """The options of a script were read without complaint."""


def parse(command: str, monkeypatch):
    """Let the parsers of the launcher and of the script read a command; raises if an option does not exist."""
    words = shlex.split(command)
    if words[0] == "hnml" or "hnml_hf" in words:
        at = 1 if words[0] == "hnml" else words.index("hnml_hf") + 1
        assert words[at] in [*COMMANDS, *IN_SOURCES], command
        if words[at:] == words[-1:]:  # the name of a command in a sentence
            return
        if words[at] in IN_SOURCES:
            words[at] = IN_SOURCES[words[at]].removesuffix(".py")
        words[at] = f"scripts/{words[at]}.py"
    at = next(number for number, word in enumerate(words) if word.startswith("scripts/") and word.endswith(".py"))
    script, options = words[at], words[at + 1 :]
    assert (ROOT / script).is_file(), command
    if words[0] == "accelerate":
        launch_command_parser().parse_args([*words[2:at], script])
    for place, word in enumerate(options):
        if word.startswith("scripts/"):
            options[place] = str(ROOT / word)
        elif word == "...":
            options[place] = STAND_INS.get(options[place - 1]) if place else None
        elif re.fullmatch("[A-Z]+", word):
            options[place] = "1"
    options = [word for word in options if word is not None]
    name = Path(script).stem
    module = load_script(name)
    if name == "train":
        cpu = ["--use_cpu", "true"] if options else []  # bf16 asks for a GPU otherwise
        module.parse_arguments([*options, *cpu])
    elif name == "audit":
        module.parse_arguments([re.sub("^outputs/photos$", "outputs/quickstart", word) for word in options])
    else:

        def then_stop(read):
            def parse(self, *given, **more):
                read(self, *given, **more)
                raise Parsed

            return parse

        for method in ("parse_args", "parse_intermixed_args"):
            read = getattr(argparse.ArgumentParser, method)
            monkeypatch.setattr(argparse.ArgumentParser, method, then_stop(read))
        monkeypatch.setattr(sys, "argv", [script, *options])
        with pytest.raises(Parsed):
            module.main(*([options] if module.main.__code__.co_argcount else []))


COMMANDS_BY_DOCUMENT = [(path, command) for path in DOCUMENTS for command in commands(path.read_text("utf-8"))]


@pytest.mark.parametrize(("path", "command"), COMMANDS_BY_DOCUMENT, ids=lambda part: getattr(part, "stem", part))
def test_a_command_has_options_that_exist(path, command, request, tmp_path, monkeypatch):
    needs_run = "--run" in command
    monkeypatch.chdir(request.getfixturevalue("quickstart")[0] if needs_run else tmp_path)
    if "--help" in command:
        with pytest.raises(SystemExit) as end:
            parse(command, monkeypatch)
        assert not end.value.code
    else:
        parse(command, monkeypatch)


def test_an_option_that_does_not_exist_is_seen(monkeypatch):
    with pytest.raises((SystemExit, ValueError)):
        parse("python scripts/evaluate.py a b --no_such_option 1", monkeypatch)
    with pytest.raises((SystemExit, ValueError)):
        parse("accelerate launch --no_such_option scripts/train.py", monkeypatch)
    assert len(COMMANDS_BY_DOCUMENT) > 30


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_blocks_have_a_language_that_is_checked(path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"^```(\w*)$", text, flags=re.MULTILINE)) - {""} <= {"python", "bash", "bibtex", "text"}
    for block in blocks(text, "bash"):
        for line in filter(None, re.split(r"&&|\n", block.replace("\\\n", " "))):
            known = re.sub(r"\s+", " ", line).strip()
            assert known.startswith(("#", "accelerate", "hnml", "python scripts/", *OTHER_PROGRAMS)), line
            if known.startswith("make "):
                assert f"\n{known.split()[1]}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", [*COMMANDS, "walkthrough"])
def test_help_explains_every_option_of_ours(name, monkeypatch, capfd):
    """`--help` ends well, opens with the commands of the script, and no option of ours is without a word."""
    parsers, print_help = [], argparse.ArgumentParser.print_help

    def note(self, file=None):
        parsers.append(self)
        return print_help(self, file)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", note)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    module, code = load_script(name), 0
    try:
        module.main(["--help"])
    except SystemExit as end:
        code = end.code
    shown = capfd.readouterr().out
    assert not code and module.__doc__.splitlines()[0] in shown
    hidden = {field.name for field in dataclasses.fields(TrainingArguments)} | {argparse.SUPPRESS}
    silent = [action.dest for action in parsers[0]._actions if not action.help and action.dest not in hidden]
    assert silent == []
    assert len(shown.partition("\n\n")[0].splitlines()) < 12  # the usage is no wall of brackets


PYTHON = [path for path in DOCUMENTS if blocks(path.read_text("utf-8"), "python") and path.stem != "README"]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.stem)
def test_the_code_of_the_docs_runs(path, quickstart, monkeypatch):
    """All blocks of a document, in order; those of the README are in test_readme."""
    monkeypatch.chdir(quickstart[0])
    monkeypatch.syspath_prepend(str(quickstart[0]))
    module = f"code_of_{path.stem}"  # a file, as a reader would have it: builders look theirs up
    Path(f"{module}.py").write_text("\n".join(blocks(path.read_text("utf-8"), "python")), encoding="utf-8")
    importlib.import_module(module)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_links_between_files_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_files_that_are_named_exist(path):
    named = r"(?<![\w./-])((?:tests|hnml_hf|scripts)/[\w/.-]+\.(?:py|yaml|sh)|test_\w+\.py)"
    for name in set(re.findall(named, path.read_text(encoding="utf-8"))) - {"scripts/probe.py"}:  # of an early commit
        assert (ROOT / name).is_file() or list((ROOT / "tests").rglob(name)), name


def test_the_site_names_every_page():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert f": {path.name}\n" in site, path.name


def test_the_figures_of_two_processes_come_from_two():
    """A launch command may quietly start only one."""
    for processes, name in ((1, "cost-one-process"), (2, "cost-two-processes")):
        assert json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())["processes"] == processes
