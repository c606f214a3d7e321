"""Recipes: YAML files of options, read by the parser's own types; errors name file and line. Suites of runs as well.

What stands in a recipe means what it means on the command line: an option that takes text gets the text as it is
written, so that `eval_strategy: no` is no boolean and `class_names: [on, off]` are two names. Options that are JSON on
the command line, and those that transformers takes as lists or dicts, may be lists and mappings of YAML.
"""

import argparse
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hnml_hf.cli import RETIRED, inside_of


JSON_OPTIONS = {"class_names": list, "splits": dict, "dataset_options": dict, "model_args": dict, "noise": dict}
NAMES = ("class_names", "splits")  # of these, what looks like a number or a boolean is a name all the same
TAGS = [f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "float", "int", "str", "seq", "map")]
NULL, BOOL, FLOAT, INT, *_ = TAGS
KINDS = {int: "a whole number", float: "a number", string_to_bool: "true or false"}


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's core schema, without octal and hexadecimal numbers: bare words are null, booleans, numbers or text.

    PyYAML by itself takes `no` for false, `1e-5` for text, `010` for 8, `1:30` for 90 and `2026-01-01` for a date.
    """

    KIND = "recipe"
    yaml_implicit_resolvers = {}

    def compose_node(self, parent, index):
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):  # lists of lists of lists would fill the memory
            raise yaml.composer.ComposerError(problem="an alias of a list or mapping", problem_mark=node.start_mark)
        return node


class SuiteLoader(RecipeLoader):
    """The same words, with aliases and `<<`, which a grid of runs uses."""

    KIND = "suite"

    def compose_node(self, parent, index):
        return yaml.SafeLoader.compose_node(self, parent, index)

    def flatten_mapping(self, node):
        if not hasattr(node, "is_flat"):  # another `<<` may have been here before
            node.is_flat = True
            for number, (key, _) in enumerate(node.value):
                if key.value in [other.value for other, _ in node.value[:number]]:
                    raise yaml.constructor.ConstructorError(
                        problem=f"`{key.value}` is there twice", problem_mark=key.start_mark
                    )
            super().flatten_mapping(node)


WHOLE = "[-+]?(0|[1-9][0-9]*)"
for tag, pattern, first in (
    (NULL, "~|null|Null|NULL|", ["~", "n", "N", ""]),
    (BOOL, "true|True|TRUE|false|False|FALSE", list("tTfF")),
    (INT, WHOLE, list("-+0123456789")),
    (FLOAT, rf"({WHOLE}(\.[0-9]*)?|[-+]?\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    RecipeLoader.add_implicit_resolver(tag, re.compile(f"(?:{pattern})$"), first)

SuiteLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("<<$"), ["<"])


def expand_home(word: str) -> str:
    """`~` at the start of a word, or of the value in `--option=value`, as the home folder, as shells do."""
    option, tilde, rest = re.fullmatch(r"(--[\w-]+=)?(~[\w.-]*(?=/|$))?(.*)", word, re.DOTALL).groups()
    return f"{option or ''}{os.path.expanduser(tilde or '')}{rest}"


def likely_options(actions: Iterable[argparse.Action], name: str) -> str:
    """`; did you mean ...?` with the options that are spelled most like `--name`, or nothing."""
    known = [option for action in actions for option in action.option_strings if "-" not in option[2:]]
    close = difflib.get_close_matches(f"--{name}", known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def apply_recipe(parser: HfArgumentParser, path: Path) -> dict[str, str]:
    """Make the options of a recipe the defaults of a parser; one that is null stays what it was.

    Returns:
        `dict[str, str]`: the file and line of each option, for [`name_place`].

    Raises:
        ValueError: in one line with file and line number, for what is no YAML, no option, or no value of an option.
    """
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    actions = {action.dest: action for action in parser._actions if action.dest in hints and action.nargs != 0}
    places, retired = {}, []
    for key, node in _pairs(_compose(path), path):
        name = key.value.replace("-", "_")
        action, where = actions.get(name), _at(path, key)
        if action is None and name in RETIRED:
            retired.append(f"{where}: no option `{key.value}` any more: {RETIRED[name]}")
            continue
        if action is None and name == "recipe":
            raise ValueError(f"{where}: no option `recipe`: a recipe names no other one; put its options here.")
        if action is None:
            hint = inside_of(name) or likely_options(actions.values(), name)
            raise ValueError(f"{where}: no option `{key.value}`{hint}")
        if node.tag != NULL:
            places[name] = where
            parser.set_defaults(**{action.dest: _value(node, action, hints[action.dest], path)})
            action.required = False
    if retired:
        raise ValueError("\n".join(retired))
    return places


def name_place(message: str, places: Mapping[str, str], words: Sequence[str]) -> str:
    """An error of the options, with the place in the recipe of the first one that it names and that comes from there.

    Args:
        message: that names options as `name` or `name=value` between backticks, as `--name`, or, where that is no
            word of English, bare.
        places: of [`apply_recipe`].
        words: of the command line, which goes before a recipe.
    """
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    bare = [name for name in re.findall(r"\w+", message) if re.search(r"[_\d]", name)]  # no word of a sentence
    for name in [*re.findall(r"(?:`|--)(\w+)", message), *bare]:
        if name in places and not {name, f"no_{name}"} & given:
            return f"{places[name]}: {' '.join(message.split())}"
    return message


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def read_suite(path: Path) -> dict:
    """The mapping of a suite of runs.

    Raises:
        ValueError: in one line with file and line number, for what is no YAML or no mapping.
    """
    root = _read(path, yaml.load, SuiteLoader)
    if not isinstance(root, dict):
        raise ValueError(f"{path}:1: a suite has lines `name: value`; got {type(root).__name__}.")
    return root


def _compose(path: Path) -> yaml.Node:
    """The mapping of a recipe, before anything becomes a Python object."""
    root = _read(path, yaml.compose, RecipeLoader)
    if not isinstance(root, yaml.MappingNode):
        where, found = (_at(path, root), f"got {_text(root)}") if root else (f"{path}:1", "it is empty")
        raise ValueError(f"{where}: a recipe has lines `option: value`; {found}.")
    return root


def _read(path: Path, read: Callable, loader: type):
    """What a function of PyYAML makes of a file."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
        return read(text, Loader=loader)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text ({error.reason}).") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{path}:{line}: a control character, {chr(error.character)!r}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{path}:{mark.line + 1}: no YAML that a {loader.KIND} may have: {error.problem}.") from None
    except RecursionError:
        raise ValueError(f"{path}:1: lists or mappings lie too deep in one another.") from None


def _text(node: yaml.Node) -> str:
    """A value in a message."""
    return repr(node.value[:80]) if isinstance(node, yaml.ScalarNode) else f"a {node.id}".replace("sequence", "list")


def _pairs(node: yaml.MappingNode, path: Path) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    seen: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{_at(path, key)}: a name is needed before the colon, got {_text(key)}.")
        if key.value in seen:
            raise ValueError(f"{_at(path, key)}: `{key.value}` is there twice, first in line {seen[key.value]}.")
        seen[key.value] = key.start_mark.line + 1
        for part in (key, value):
            if part.tag not in TAGS:
                raise ValueError(f"{_at(path, part)}: the tag `{part.tag}` is not allowed in a recipe.")
        yield key, value


def _value(node: yaml.Node, action: argparse.Action, hint, path: Path):
    """What the parser would make of an option, or what transformers takes in its place."""
    name, many = action.dest, action.nargs == "+"
    if isinstance(node, yaml.ScalarNode):
        return [_parsed(node, action, path)] if many else _parsed(node, action, path)
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    given = list if isinstance(node, yaml.SequenceNode) else dict
    if JSON_OPTIONS.get(name) is given:
        return json.dumps(_plain(node, path, names=name in NAMES), ensure_ascii=False)
    if given not in [get_origin(member) or member for member in members]:
        raise ValueError(f"{_at(path, node)}: `{name}` takes one value, got {_text(node)}.")
    return [_parsed(item, action, path) for item in node.value] if given is list else _plain(node, path)


def _parsed(node: yaml.Node, action: argparse.Action, path: Path):
    """One value by the type of its option, from the text as it is written."""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in TAGS or node.tag == NULL:
        raise ValueError(f"{_at(path, node)}: `{action.dest}` takes one value, got {_text(node)} ({node.tag}).")
    text = expand_home(node.value)
    if action.type is string_to_bool:
        text = {"on": "true", "off": "false"}.get(text.lower(), text)
    try:
        value = text if action.type is None else action.type(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        needed = KINDS.get(action.type, "another value")
        raise ValueError(f"{_at(path, node)}: `{action.dest}` takes {needed}, got {_text(node)}.") from None
    if action.choices is not None and value not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise ValueError(f"{_at(path, node)}: `{action.dest}` takes one of {choices}; got {_text(node)}.")
    return value


def _plain(node: yaml.Node, path: Path, *, names: bool = False):
    """Lists, dicts, numbers, booleans, null and text; all scalars are text if they are `names`."""
    if node.tag not in TAGS:
        raise ValueError(f"{_at(path, node)}: the tag `{node.tag}` is not allowed in a recipe.")
    if isinstance(node, yaml.MappingNode):
        return {key.value: _plain(value, path, names=names) for key, value in _pairs(node, path)}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path, names=names) for item in node.value]
    if names and node.tag == NULL:
        raise ValueError(f"{_at(path, node)}: an empty name; a class that is called {_text(node)} needs quotes.")
    if names or node.tag not in (NULL, BOOL, INT, FLOAT):
        return expand_home(node.value)
    return {NULL: lambda text: None, BOOL: string_to_bool, INT: int, FLOAT: float}[node.tag](node.value)
