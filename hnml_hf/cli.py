"""Answers that need no library: help, and typos in commands, options and paths.

Importing torch, timm, transformers and datasets takes seconds. What the options are called and what they do is written
down as literals, in dataclasses (`field(default=..., metadata={"help": ...})`) and in calls of `add_argument`; here it
is read from the source of the scripts, which parse the command line by the same definitions.
"""

import argparse
import ast
import difflib
import errno
import os
import re
import select
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO


PACKAGE = Path(__file__).parent
COMMANDS = ("audit", "check", "review", "clean", "train", "predict", "evaluate", "export")
IN_SOURCES = {"benchmark": "benchmarks/benchmark.py"}  # commands that a wheel does not have

# where a command's options are written: files of scripts/ that call `add_argument`, and dataclasses
ADDED = {command: f"{command}.py" for command in COMMANDS} | {"train": "options.py"}
DATACLASSES = {
    "train": ("ModelArguments", "DataArguments", "HNMLTrainingArguments"),
    "evaluate": ("SourceArguments",),
    "predict": ("SourceArguments",),
    "audit": ("AuditArguments", "DataArguments"),
    "review": (),
    "clean": (),
    "check": ("SourceArguments",),
    "export": (),
}
TITLES = {
    "ModelArguments": "model",
    "SourceArguments": "dataset",
    "DataArguments": "data",
    "AuditArguments": "audit",
    "HNMLTrainingArguments": "method and training",
}

WITH_RECIPES, OWN_DATA = ("train",), "own_folder"  # commands that take one, and the one for DATA of the user

_SOURCE = ("dataset", "dataset_config", "data_dir", "image_column", "label_column", "clean_label_column")
_RUN = ("output_dir", "seed", "per_device_eval_batch_size", "dataloader_num_workers", "use_cpu")
# what `--help` shows of commands that have many more options; `--help-all` shows all
COMMON = {
    "train": (
        *("data", "recipe", "backbone", "pretrained", "start_from_judge", "image_size"),
        *_SOURCE,
        *("validation_fraction", "noise", "noise_rate", "exclude", "augmentation", "cache_images"),
        *("objective", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "bf16", "resume_from_checkpoint", "push_to_hub", *_RUN),
    ),
    "audit": (
        *("data", "backbone", "pretrained", "image_size", "num_workers", "cache_dir", "check", "compare_splits"),
        *("annotations", "run", "model", "output_dir", "max_issues", "batch_size", "device", "export"),
        *(*_SOURCE, "validation_fraction", "noise", "noise_rate", "exclude"),
    ),
}

# options whose value is a path that must be there, and those where it is one if it looks like one
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
PATHS = ("data_dir", "run", "exclude", "inputs", "annotations", "import")
PATHS_OR_NAMES = ("dataset", "model", "data", "pretrained")
MADE = {"review": ("annotations",)}  # and those that a command writes
ADVICE = {  # what to give instead of a file that is not there
    **dict.fromkeys(("annotations", "import"), ": give a file that the report or `hnml review` has saved"),
    "exclude": ": give a list that `hnml check DATA --exclude_output FILE` has written",
    "run": ": give the `output_dir` of an earlier audit or training",
}

A_DATASET = "give a dataset: a folder of images, a table, a known dataset or a Hub id"
NEEDED = {  # what a command cannot do without: one of some arguments, and how to say so
    "audit": (("data", "dataset", "run"), "give a dataset or the folder of a finished training run"),
    "check": (("data", "dataset"), A_DATASET),
    "evaluate": (("data", "dataset"), A_DATASET),
    "predict": (("inputs", "dataset"), "give image files or folders, or else --dataset"),
    "export": (("output", "hub_model_id"), "give --output (a file) or --hub_model_id (a repository)"),
    "clean": (("output_dir",), "give --output_dir, a new folder for the corrected dataset"),
}
NAMED_DATASETS = (
    *("quickstart", "clothing1m", "webvision", "mini-webvision", "animal10n", "food101n", "imagefolder"),
    *("cifar10", "cifar100", "cifar10n", "cifar10n-aggre", "cifar10n-rand1", "cifar10n-rand2", "cifar10n-rand3"),
    *("cifar10n-worse", "cifar100n"),
)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
AUDITED = ("review", "clean")  # commands that read the scores of a run, which is one of these below it
SCORES = ("_audit/noise_scores.parquet", "noise_scores.parquet")

_CONSTANT = "it is a constant of the objective now; leave it out"
_NO_GAIN = "it brought nothing and was taken out (docs/ablations.md); leave it out"
_IN_NOISE = "it is a key of `noise` now: `noise: {kind: ..., %s}` in a recipe, JSON on the command line"
RETIRED = {  # options of earlier versions: what took their place
    "weights": "give the path to `--pretrained`",
    "inner_direction": "`momentum` is objective `hnml`, `synthetic` is objective `hnml_synthetic`",
    "label_draw": _NO_GAIN,
    "inner_consistency_weight": _NO_GAIN,
    "consistency_form": _NO_GAIN,
    "mask_level": _NO_GAIN,
    "balance_weight": _NO_GAIN,
    "meta_every": _NO_GAIN,
    "cam_weight": _CONSTANT,
    "cam_threshold": _CONSTANT,
    "background_weight": _CONSTANT,
    "mask_temperature": _CONSTANT,
    "meta_start_step": "the measured memorization says when the meta terms begin; see `--monitor_fraction`",
    "meta_rampup_steps": "the measured memorization sets the weight of the meta terms; see `--monitor_fraction`",
    "memory_top_k": "it follows from the number of samples and classes; leave it out",
    "rank_sync_steps": "add the callback `hnml_hf.training.callbacks.RanksAgree` to the trainer",
    "allow_uncompiled": "train without `--torch_compile` where it fails",
    "cutmix_alpha": "use `--mixup_alpha`",
    "noise_draw": _IN_NOISE % "draw: exact",
    "noise_include_true": _IN_NOISE % "include_true: true",
    "noise_scheme": _IN_NOISE % "scheme: cifar10",
    "noise_matrix": _IN_NOISE % "matrix: matrix.csv",
    "noise_pixel_scaling": _IN_NOISE % "pixel_scaling: unit",
    "noise_image_size": _IN_NOISE % "image_size: 32",
    "noise_output": _IN_NOISE % "output: labels.json",
    "noise_manifest": 'it is the key `file` of `noise` now: `--noise \'{"file": "labels.json"}\'`',
    "target_temperature": _NO_GAIN,
    "gauge_fraction": "it is `--monitor_fraction` now",
    "start_from_probe": "it is `--start_from_judge`, a classifier that needs no held-out labels",
    "forward_correction": "it is `--symmetric_correction` now",
    "quarantine": "it is `--exclude` now",
    "quarantine_output": "it is `--exclude_output` now",
    "max_suspects": "it is `--max_issues` now",
}
RENAMED = {"audit_data": "check", "probe": "audit"}  # commands of earlier versions

INSIDE = {  # what has its place in another option: how to write it there, on the command line and in a recipe
    "lr_scheduler_kwargs": ("--lr_scheduler_kwargs '{\"%s\": ...}'", "min_lr min_lr_rate num_cycles power lr_end"),
    "optim_args": ("--optim_args %s=...", "momentum nesterov dampening"),
    "model_args": ("--model_args '{\"%s\": ...}'", "drop_rate drop_path_rate output_stride global_pool in_chans"),
}

ELSEWHERE = {  # what other programs call an option of `train`
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "model": "backbone",
    "workers": "dataloader_num_workers",
}

MOVED = {  # options that only one command has lost
    "predict": {"model": "the model comes first and has no option: `hnml predict MODEL IMAGES`"},
    "evaluate": {"model": "the model comes first and has no option: `hnml evaluate MODEL DATA`"},
    "export": {"model": "the model comes first and has no option: `hnml export MODEL --output FILE`"},
    "audit": {
        "apply": "`hnml clean RUN --annotations FILE --output_dir FOLDER` applies annotations",
        "clean": "`hnml clean RUN --how drop --output_dir FOLDER` writes a corrected copy",
        "clean_output": "`hnml clean RUN --output_dir FOLDER` writes a corrected copy",
        "threshold": "`hnml clean RUN --how drop --threshold 0.9 --output_dir FOLDER` takes it",
    },
    "clean": {"output": "the folder is `--output_dir`; `--output` names a single file"},
}

MEANINGS = {  # of options of transformers that mean something else here
    "output_dir": "Folder of the run. Default: the recipe's, else `outputs/` with the names of data and objective, as "
    "`outputs/photos_hnml`, which must not hold a run yet.",
    "resume_from_checkpoint": "Go on from a checkpoint: its folder, `true` for the newest complete one in "
    "`output_dir`, or `auto` for that one if there is any.",
    "log_level": "What is logged: debug, info, warning, error or critical.",
    "hub_private_repo": "Whether a new repository on the Hub is private. Default: it is.",
}


OF_FILES: dict[type, str] = {  # what an error of the operating system means, and what to do
    FileNotFoundError: "there is no such file or folder; check the path",
    IsADirectoryError: "this is a folder; give a file",
    NotADirectoryError: "a part of this path is a file, not a folder; check the path",
    PermissionError: "this may not be read or written; change its permissions, or give another path",
}
BY_NUMBER = {  # of errors that have no class of their own
    errno.EROFS: "nothing can be written there, since this disk is read-only; give another path",
    errno.ENOSPC: "the disk is full; make room, or give a path on another",
}
PIPE_CLOSED = 141  # 128 + SIGPIPE, as shells have it


def plain_message(error: Exception) -> str:
    """What an error says; of one that the operating system has with a file, the file, and what to do."""
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return str(error)
    said = OF_FILES.get(type(error)) or BY_NUMBER.get(error.errno, error.strerror)
    return said if error.filename is None else f"{os.fsdecode(error.filename)}: {said}"


@contextmanager
def quiet_pipes() -> Iterator[None]:
    """End without a traceback where the reader of what is printed has gone, as `head` does."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        broken = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
        if not broken:
            raise
        for stream in broken:  # what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(PIPE_CLOSED) from None


def _has_no_reader(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (OSError, AttributeError):  # no file, or a system that cannot tell
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they are written, each option under one name, and its default if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.const is False and action.option_strings[0].startswith("--no_"):  # made by HfArgumentParser
            return f"The same as --{action.dest} false."
        nothing = action.default in (None, [], "{}") or action.default is False
        return (action.help if nothing else super()._get_help_string(action)) or ""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]  # nor their twins with dashes
        if not names:
            return super()._format_action_invocation(action)
        values = self._format_args(action, "VALUE") if action.nargs != 0 else ""
        return f"{', '.join(names)} {values}".strip()


@dataclass(frozen=True)
class Option:
    """One option as its source describes it; a name without dashes is a positional argument."""

    name: str
    help: str = ""
    default: object = None
    nargs: int | str | None = None  # as of argparse; 0 for a flag
    convert: type | None = None  # int or float
    choices: tuple[str, ...] | None = None
    required: bool = False
    has_twin: bool = False  # `--no_...`, which HfArgumentParser adds


def scripts_folder() -> Path:
    """The scripts: in a wheel `hnml_hf/scripts`, in a source tree beside the package."""
    installed = PACKAGE / "scripts"
    return installed if installed.is_dir() else PACKAGE.parent / "scripts"


def script_of(command: str) -> Path:
    return scripts_folder() / IN_SOURCES.get(command, f"{command}.py")


def find_recipe(name: str) -> Path:
    """A recipe by its path, or by its name among those that come with the scripts."""
    recipes = scripts_folder() / "recipes"
    for path in (Path(os.path.expanduser(name)), recipes / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in recipes.glob("*.yaml")))
    raise SystemExit(f"--recipe {name}: there is no such file, nor a recipe of that name. Known: {known}.")


@cache
def _read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _literal(node: ast.expr | None, otherwise=None):
    """The value of a literal; of what would have to be run, and of nothing, `otherwise`."""
    try:
        return otherwise if node is None else ast.literal_eval(node)
    except ValueError:
        return otherwise


def _keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}


def _kind(annotation: ast.expr) -> str:
    """The type of an option as HfArgumentParser reads it: of a union with `str` the other one."""
    kind = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", ast.unparse(annotation))
    others = [part for part in kind.split(" | ") if part != "str"]
    return others[0] if kind.count(" | ") == 1 and "str" in kind.split(" | ") and others != ["None"] else kind


def _choices(annotation: ast.expr):
    """The values of a `Literal`, also of one that may be `None`; of another type None."""
    if isinstance(annotation, ast.BinOp) and ast.unparse(annotation.right) == "None":
        annotation = annotation.left
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        return _literal(annotation.slice)
    return None


def _dataclass_options(path: Path, name: str) -> dict[str, Option]:
    """Options of a dataclass of a file, after those of its parent, which may be transformers' `TrainingArguments`."""
    classes = {node.name: node for node in _read(path).body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        spec = find_spec("transformers")
        assert spec is not None and spec.submodule_search_locations is not None  # it is a dependency, and a package
        return _dataclass_options(Path(spec.submodule_search_locations[0], "training_args.py"), name)
    options = {}
    for parent in classes[name].bases:
        options |= _dataclass_options(path, ast.unparse(parent))
    for node in classes[name].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            continue
        facts = _keywords(node.value) if isinstance(node.value, ast.Call) else {"default": node.value}
        if _literal(facts.get("init"), True) is False:
            continue
        kind = _kind(node.annotation)
        is_bool = kind in ("bool", "bool | None")
        # without what is computed
        default, metadata = _literal(facts.get("default")), _literal(facts.get("metadata"), {})
        takes_none = kind == "bool" or (is_bool and default is not None)
        options[node.target.id] = Option(
            name=f"--{node.target.id}",
            help=metadata.get("help", ""),
            default=default,
            nargs="?"
            if takes_none
            else "+"
            if re.fullmatch(r"list\[\w+\]( \| None)?", kind)
            else metadata.get("nargs"),
            convert={"int": int, "float": float}.get(kind.removesuffix(" | None")),
            choices=_choices(node.annotation),
            has_twin=is_bool and default is True,
        )
    return options


def _added_options(path: Path) -> dict[str, Option]:
    """Options that a file adds to its parsers by `add_argument`, where their names are literals."""
    options = {}
    calls = [node for node in ast.walk(_read(path)) if isinstance(node, ast.Call) and node.args]
    for call in [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]:
        name, facts = _literal(call.args[0]), _keywords(call)
        if isinstance(name, str):
            options[name.removeprefix("--")] = Option(
                name=name,
                help=_literal(facts.get("help"), ""),
                default=_literal(facts.get("default")),
                nargs=0 if _literal(facts.get("action")) == "store_true" else _literal(facts.get("nargs")),
                convert={"int": int, "float": float}.get(ast.unparse(facts["type"]) if "type" in facts else ""),
                required=_literal(facts.get("required"), False),
            )
    return options


def _file_of(dataclass_name: str) -> Path:
    if dataclass_name == "HNMLTrainingArguments":
        return PACKAGE / "training" / "args.py"
    return scripts_folder() / ("audit.py" if dataclass_name == "AuditArguments" else "options.py")


def option_groups(command: str) -> dict[str, dict[str, Option]]:
    """All options of a command by name, those of its script first (""), then those of each dataclass by its title."""
    groups = {"": _added_options(scripts_folder() / ADDED[command])}
    for name in DATACLASSES[command]:
        groups[TITLES[name]] = {
            key: replace(option, help=MEANINGS.get(key, option.help)) if command == "train" else option
            for key, option in _dataclass_options(_file_of(name), name).items()
        }
    return groups


def create_parser(command: str, *, names: Collection[str] | None = None) -> argparse.ArgumentParser:
    """A parser that knows the options of a command but nothing of what they do.

    Args:
        command (`str`): one of `COMMANDS`.
        names (`Collection[str]`, *optional*): the options that its help lists; default: all.
    """
    doc = describe(command)
    for name in COMMANDS:  # the ways to call a script in a source tree
        doc = re.sub(rf"(python|accelerate launch) scripts/{name}\.py", f"hnml {name}", doc)
    parser = _Parser(prog=f"hnml {command}", description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    groups = option_groups(command)
    words: dict[object, str] = {None: "%s", "?": "[%s]", "*": "[%s ...]"}  # of argparse's `nargs`
    positional = [words[option.nargs] % key.upper() for key, option in groups[""].items() if option.name == key]
    parser.usage = " ".join(["hnml", command, *positional, "[options]"])
    for title, options in groups.items():
        group = parser.add_argument_group(title) if title else parser
        for key, option in options.items():
            listed = names is None or key in names
            facts: dict[str, Any] = {"help": option.help if listed else argparse.SUPPRESS, "default": option.default}
            if option.nargs == 0:
                group.add_argument(option.name, action="store_true", **facts)
                continue
            facts |= {"nargs": option.nargs, "type": option.convert, "choices": option.choices}
            spellings = [option.name]
            if "_" in key and command in ("train", "audit"):  # HfArgumentParser takes these as well
                spellings.append(f"--{key.replace('_', '-')}")
            group.add_argument(*spellings, **facts)
            if option.has_twin:
                twins = [f"--no_{key}", f"--no-{key.replace('_', '-')}"]
                group.add_argument(*twins, dest=key, action="store_false", help=argparse.SUPPRESS)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line; exit code 2, which of `check` means defects, and there 1."""
        message = re.sub(r"/--[\w-]+", "", message)  # the same option with dashes
        self.exit(1 if self.prog.endswith(" check") else 2, f"{self.prog}: error: {message}\n")


def describe(command: str) -> str:
    """The docstring of a command's script."""
    return ast.get_docstring(_read(script_of(command))) or ""


def print_help(command: str, *, everything: bool = False):
    """Print the options that a command's users need, or all of them."""
    common = None if everything else COMMON.get(command)
    parser = create_parser(command, names=common)
    if command in WITH_RECIPES:
        _add_defaults_of_own_data(parser)
    parser.print_help()
    if common is not None:
        print(f"\n`hnml {command} --help-all` lists all options.")


def _add_defaults_of_own_data(parser: argparse.ArgumentParser):
    """Say in the help which options have another default for DATA of the user, and where it is from."""
    import yaml  # not for a typo

    own = yaml.safe_load(find_recipe(OWN_DATA).read_text(encoding="utf-8"))
    for action in parser._actions:
        if (
            action.dest in own
            and action.dest != "dataset"
            and action.option_strings
            and action.help != argparse.SUPPRESS
        ):
            value = str(own[action.dest])
            value = value.lower() if isinstance(own[action.dest], bool) else value
            without = "" if action.default in (None, False) else "; without a recipe %(default)s"
            action.help = f"{action.help} (default for your own DATA: {value}, from the recipe {OWN_DATA}{without})"
            action.default = argparse.SUPPRESS if not without else action.default


def answer_help(command: str, words: list[str]):
    """Print the help and end, if a command line asks for it."""
    if {"-h", "--help", "--help-all", "--help_all"}.intersection(words):
        print_help(command, everything=not {"-h", "--help"}.intersection(words))
        raise SystemExit(0)


def check_words(command: str, words: list[str]):
    """End with one line if an option of a command line does not exist, or a path that must, or data are not named.

    What this lets pass is read again, and fully, by the script itself.
    """
    parser = create_parser(command)
    given, unknown = parser.parse_known_intermixed_args(words)
    for word in unknown:
        if word.startswith("-"):
            refuse_retired(parser, [word.lstrip("-").partition("=")[0]], MOVED.get(command, {}))
            known = [name for action in parser._actions for name in action.option_strings if "-" not in name[2:]]
            close = difflib.get_close_matches(word.partition("=")[0], known, n=3)
            usual = f"--{ELSEWHERE.get(word.lstrip('-').partition('=')[0].replace('-', '_'))}"
            close = [usual] if usual in known else close
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; see hnml {command} --help"
            parser.error(f"there is no option {word}{hint}")
    if getattr(given, "recipe", None):
        find_recipe(given.recipe)
    refuse_too_little(parser, command, given)
    of_the_hub = "/" in (getattr(given, "dataset", None) or "") and not os.path.exists(given.dataset)
    for name, value in vars(given).items():
        made = name in MADE.get(command, ()) or (name == "data_dir" and of_the_hub)  # a folder of the repository
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and not made and (problem := missing(name, path)):
                label = f"--{name} {path}" if f"--{name}" in parser._option_string_actions else path
                parser.error(f"{label}: {problem}")
    if command in AUDITED:
        run = Path(os.path.expanduser(given.run))
        if run.is_dir() and not any((run / scores).is_file() for scores in SCORES):
            parser.error(f"{run}: there are no scores of labels ({run / SCORES[0]}); `hnml audit` writes them")


def refuse_too_little(parser: argparse.ArgumentParser, command: str, given: argparse.Namespace):
    """End with one line if a command line lacks what the command cannot do without."""
    names, advice = NEEDED.get(command, ((), ""))
    if names and not any(getattr(given, name, None) for name in names):
        parser.error(advice)


def missing(name: str, path: str) -> str:
    """Why nothing can be read where an option says, with advice; nothing if it is there, or may be on the Hub."""
    if os.path.exists(os.path.expanduser(path)):
        return ""
    if name in PATHS or (name in PATHS_OR_NAMES and _looks_like_a_path(path)):
        return f"there is no such file or folder{ADVICE.get(name, '')}"
    if name == "model" and not HUB_ID.fullmatch(path):
        return "there is no such folder; a repository on the Hub is called user/name"
    if name in ("data", "dataset") and path not in NAMED_DATASETS and not HUB_ID.fullmatch(path):
        close = difflib.get_close_matches(path, NAMED_DATASETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; a dataset on the Hub is called user/name"
        return f"there is no such file or folder, nor a known dataset of that name{hint}"
    return ""


def inside_of(name: str) -> str:
    """`: it is a key of ...` for what has its place in another option, or nothing."""
    for option, (example, keys) in INSIDE.items():
        if name in keys.split():
            return f": it is part of `{option}`, as in `{example % name}`"
    return ""


def refuse_retired(parser: argparse.ArgumentParser, names: Iterable[str], moved: Mapping[str, str] = {}):
    """End with one line that says what replaces an option of an earlier version, or to which one it belongs."""
    replaced = {**RETIRED, **moved}
    for name in names:
        name = name.replace("-", "_")
        if name in replaced:
            parser.error(f"there is no option --{name} any more: {replaced[name]}")
        if inside_of(name):
            parser.error(f"there is no option --{name}{inside_of(name)}")


def _looks_like_a_path(text: str) -> bool:
    """Unlike the name of a dataset or the id of a repository, which has one slash at most."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or Path(text).suffix.lower() in TABLES
