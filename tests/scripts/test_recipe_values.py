"""A recipe means what it says: values by the parser's own types; a mistake is one line with file and number."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from options import DataArguments, ModelArguments, from_json, parse_arguments
from recipe import expand_home, name_place

from hnml_hf import HNMLTrainingArguments
from hnml_hf.cli import RETIRED


ROOT = Path(__file__).parents[2]

START = "dataset: quickstart\nbackbone: resnet10t\noutput_dir: out\n"


@pytest.fixture
def parse(tmp_path):
    """Parses `text` after three lines of options that every recipe needs."""

    def read(text: str, *options: str):
        (tmp_path / "mine.yaml").write_text(START + text, encoding="utf-8")
        return parse_arguments(["--recipe", str(tmp_path / "mine.yaml"), *options])

    return read


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("eval_strategy: no", "eval_strategy", "no"),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("report_to: tensorboard", "report_to", ["tensorboard"]),
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("learning_rate: '0.25'", "learning_rate", 0.25),
        ("max_steps: '100'", "max_steps", 100),
        ("bf16: off", "bf16", False),
        ("eval_teacher: yes", "eval_teacher", True),
        ("run_name: 2026-01-01", "run_name", "2026-01-01"),
        ("run_name: 010", "run_name", "010"),
        ("run_name: 1:30", "run_name", "1:30"),
        ("warmup_steps: 0.1", "warmup_steps", 0.1),
        ("learning-rate: 0.5", "learning_rate", 0.5),
        ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}", "lr_scheduler_kwargs", None),
        ("per_device_train_batch_size: &size 7\nper_device_eval_batch_size: *size", "per_device_eval_batch_size", 7),
    ],
)
def test_options_of_training(parse, text, name, value):
    if name == "report_to":
        pytest.importorskip("tensorboard")
    args = parse(text)[2]
    if value is None:
        assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    else:
        found = getattr(args, name)
        assert found == value and type(getattr(found, "value", found)) is type(value)


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("class_names: [cat, dog]", "class_names", ["cat", "dog"]),
        ("class_names:\n  - yes\n  - no", "class_names", ["yes", "no"]),
        ("class_names: [true, 1e3, 01, 'null']", "class_names", ["true", "1e3", "01", "null"]),
        ('class_names: \'["cat", "dog"]\'', "class_names", ["cat", "dog"]),
        ("class_names: [\u00e9t\u00e9, \u51ac]", "class_names", ["\u00e9t\u00e9", "\u51ac"]),
        ("splits: {train: train, test: 2020}", "splits", {"train": "train", "test": "2020"}),
        ("model_args: {drop_rate: 1e-1, norm: off, act: null, deep: [+1, [True], 1., .5, 0x1]}", "model_args", None),
    ],
)
def test_lists_and_mappings(parse, text, option, value):
    model_args, data_args, _ = parse(text)
    given = getattr(model_args if option == "model_args" else data_args, option)
    wanted = value or {"drop_rate": 0.1, "norm": "off", "act": None, "deep": [1, [True], 1.0, 0.5, "0x1"]}
    assert from_json(option, given) == wanted


def test_the_command_line_still_overrides(parse):
    _, data_args, args = parse(
        "class_names: [a, b]\nlearning_rate: 1e-5\naudit: false", "--learning_rate", "2", "--audit"
    )
    assert (args.learning_rate, data_args.class_names, data_args.audit) == (2, '["a", "b"]', True)


def test_the_home_folder(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "data_dir: ~/photos\nexclude: ~\ndataset_options: {imagenet_dir: ~/images}\nnoise: ~sure\n"
    _, data_args, args = parse(text, "--output_dir=~/runs/1", "--label_column", "~/n.json")
    assert (data_args.data_dir, data_args.exclude, args.output_dir) == ("/home/me/photos", None, "/home/me/runs/1")
    assert json.loads(data_args.dataset_options) == {"imagenet_dir": "/home/me/images"}
    assert (data_args.label_column, data_args.noise) == ("/home/me/n.json", "~sure")
    words = ["~", "--to=~", "a~/b", "--x=a~", "~no_such_user/x", "-~", ""]
    assert [expand_home(word) for word in words] == ["/home/me", "--to=/home/me", *words[2:]]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("learning_rate: fast", 4, "`learning_rate` takes a number, got 'fast'"),
        ("max_steps: 1.5", 4, "`max_steps` takes a whole number, got '1.5'"),
        ("bf16: maybe", 4, "`bf16` takes true or false, got 'maybe'"),
        ("eval_strategy: never", 4, "`eval_strategy` takes one of no, steps, epoch; got 'never'"),
        ("objective: [ce, hnml]", 4, "`objective` takes one value, got a list"),
        ("learning_rate:\n  - 0.1", 5, "`learning_rate` takes one value, got a list"),
        ("image_size: {height: 3}", 4, "`image_size` takes one value, got a mapping"),
        ("report_to:\n  - {a: b}", 5, "`report_to` takes one value, got a mapping"),
        ("report_to: [[a]]", 4, "`report_to` takes one value, got a list"),
        ("report_to: [a, ~]", 4, "`report_to` takes one value, got '~'"),
        ("class_names: [cat, null]", 4, "an empty name; a class that is called 'null' needs quotes"),
        ("class_names: {cat: 0}", 4, "`class_names` takes one value, got a mapping"),
        ("model_args: [1]", 4, "`model_args` takes one value, got a list"),
        ("model_args:\n  a: 1\n  a: 2", 6, "`a` is there twice, first in line 5"),
        ("seed: 1\nbackbone: resnet18", 5, "`backbone` is there twice, first in line 2"),
        ("lerning_rate: 1", 4, "no option `lerning_rate`; did you mean --learning_rate"),
        ("recipe: quickstart", 4, "no option `recipe`: a recipe names no other one; put its options here."),
        ("help: true", 4, "no option `help`"),
        (
            "min_lr: 1e-5",
            4,
            "no option `min_lr`: it is part of `lr_scheduler_kwargs`, as in `--lr_scheduler_kwargs '{",
        ),
        ("drop_path_rate: 0.1", 4, "no option `drop_path_rate`: it is part of `model_args`"),
        ("momentum: 0.9", 4, "no option `momentum`: it is part of `optim_args`, as in `--optim_args momentum=...`"),
        # what the options themselves say of a value
        ("seed: 1\nlearning_rate: nan", 5, "`learning_rate=nan` cannot work"),
        ("label_names: [a]", 4, "`label_names=['a']` is not available here"),
        ("save_strategy: steps\nload_best_model_at_end: true", 5, "`load_best_model_at_end` chooses nothing"),
        ("optim_args: impetus=0.9", 4, "`optim=sgd` with `optim_args='impetus=0.9'` cannot be made"),
        ("lr_scheduler_type: warmup_stable_decay", 4, "`lr_scheduler_type=warmup_stable_decay` with"),
        ("elr_weight: -1", 4, "`elr_weight=-1.0` must be a number from 0 on"),
        ("report_to: tensorbord", 4, "`report_to="),
        (
            "eval_strategy: epoch\nsave_strategy: steps\nload_best_model_at_end: true",
            6,
            "--load_best_model_at_end requires the save and eval strategy to match",
        ),
        ("no_audit: true", 4, "no option `no_audit`"),
        ("<<: {a: 1}", 4, "no option `<<`"),
        ("1: 2", 4, "no option `1`"),
        ("? [a]\n: 1", 4, "a name is needed before the colon, got a list"),
        ("seed: !!python/object:os.system 1", 4, "the tag `tag:yaml.org,2002:python/object:os.system` is not allowed"),
        ("class_names: [!mine cat]", 4, "the tag `!mine` is not allowed in a recipe"),
        ("seed: 1\n\tlearning_rate: 1", 5, "no YAML that a recipe may have: "),
        ("seed: [1, 2", 4, "no YAML that a recipe may have: "),
        ("seed: 'a", 4, "no YAML that a recipe may have: "),
        ("seed: *b", 4, "no YAML that a recipe may have: found undefined alias"),
        ("model_args: &a {b: *a}", 4, "no YAML that a recipe may have: an alias of a list or mapping"),
        ("model_args: {a: &a [1, 1], b: [*a, *a]}", 4, "no YAML that a recipe may have: an alias of a list"),
        ("seed: 1\n---\nseed: 2", 5, "no YAML that a recipe may have: but found another document"),
        ("seed: 1\nbell: \a", 5, "a control character, '\\x07'"),
        ("class_names: " + 2_000 * "[", 1, "lists or mappings lie too deep in one another"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(parse, tmp_path, text, line, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    found = str(error.value)
    assert found.startswith(f"{tmp_path / 'mine.yaml'}:{line}: {message}") and "\n" not in found


def test_an_error_of_transformers_that_names_an_option_bare_has_its_place():
    places, message = (
        {"bf16": "mine.yaml:3", "seed": "mine.yaml:4"},
        "Your setup doesn't support bf16/gpu, nor a seed.",
    )
    assert name_place(message, places, ["--seed", "1"]) == f"mine.yaml:3: {message}"
    assert name_place(message, places, ["--bf16"]) == message  # `seed` is a word of English
    assert name_place(f"`seed=1`: {message}", places, []).startswith("mine.yaml:4: ")


def test_the_command_line_is_not_the_recipes_fault(parse):
    with pytest.raises(ValueError, match="^`learning_rate=nan` cannot work"):
        parse("learning_rate: 1", "--learning_rate", "nan")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1: a recipe has lines `option: value`; it is empty"),
        (b"# nothing yet\n", ":1: a recipe has lines `option: value`; it is empty"),
        (b"- seed: 1\n- bf16: true\n", ":1: a recipe has lines `option: value`; got a list"),
        (b"\nquickstart\n", ":2: a recipe has lines `option: value`; got 'quickstart'"),
        (b"seed: 1\nrun_name: \xe9t\xe9\n", ":2: not UTF-8 text"),
        ("seed: 1\n".encode("utf-16"), ":1: not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ValueError) as error:
        parse_arguments(["--recipe", str(tmp_path / "mine.yaml"), "--dataset", "quickstart"])
    assert str(error.value).startswith(f"{tmp_path / 'mine.yaml'}{message}")


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + START.replace("\n", "\r\n").encode())
    assert parse_arguments(["--recipe", str(tmp_path / "mine.yaml")])[0].backbone == "resnet10t"


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("model_args", "[1]", "--model_args takes an object, got '\\[1\\]'"),
        ("splits", '"train"', "--splits takes an object"),
        ("class_names", '{"a": 0}', "--class_names takes a list"),
        ("dataset_options", "null", "--dataset_options takes an object"),
        ("model_args", 100_000 * "[", "is not valid JSON"),
    ],
)
def test_json_of_another_kind(option, text, message):
    with pytest.raises(SystemExit, match=message):
        from_json(option, text)


@pytest.mark.parametrize(("written", "value"), [("yes", True), ("On", True), ("no", False), ("off", False)])
def test_pretrained_weights_by_the_words_of_yaml(tmp_path, written, value):
    (tmp_path / "mine.yaml").write_text(f"{START}\npretrained: {written}\n")
    assert parse_arguments(["--recipe", str(tmp_path / "mine.yaml")])[0].pretrained is value


def test_every_retired_option_of_a_recipe_is_named_at_once(parse):
    with pytest.raises(ValueError, match="no option") as error:
        parse("noise: symmetric\nnoise_draw: exact\ngauge_fraction: 0.1\n")
    first, second = str(error.value).splitlines()
    assert "mine.yaml:5: no option `noise_draw` any more" in first and "noise: {kind: ..., draw: exact}" in first
    assert "mine.yaml:6: no option `gauge_fraction` any more: it is `--monitor_fraction` now" in second


def test_a_wrong_key_of_noise_has_its_place_before_anything_is_read(parse):
    with pytest.raises(ValueError, match="mine.yaml:5: .*Did you mean `rate` by `rte`"):
        parse("use_cpu: true\nnoise: {kind: symmetric, rte: 0.3}\n")


def test_the_commands_of_the_records_have_options_that_exist_or_are_named():
    """An option that was taken out is answered with what replaced it."""
    known = {*RETIRED, "recipe"}
    known |= {field.name for kind in (ModelArguments, DataArguments, HNMLTrainingArguments) for field in fields(kind)}
    text = [path.read_text("utf-8") for path in (ROOT / "docs" / "results").glob("*.jsonl")]
    asked = {name for page in text for name in re.findall(r" --(\w+) ", page)}
    assert "learning_rate" in asked and not asked - known
