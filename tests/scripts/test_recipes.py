"""A recipe can be read: every option exists, the dataset and the network too, and its header says what it is."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import yaml
from options import (
    DataArguments,
    ModelArguments,
    add_noise_options,
    find_recipe,
    load_data,
    noise_options,
    parse_arguments,
)
from transformers import TrainingArguments

from hnml_hf import HNMLTrainingArguments
from hnml_hf.cli import RETIRED
from hnml_hf.data.load import DATASET_NAMES


SCRIPTS = Path(__file__).parents[2] / "scripts"
RECIPES = sorted((SCRIPTS / "recipes").glob("*.yaml"))
BUILT_FROM_FILES = re.compile(r"data/\w|[\w-]+/[\w-]+$")  # a local folder, or an id of the Hub


def header(path: Path) -> str:
    """The comment at the top, without its marks."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.lstrip("#")[1:] for line in lines[:end])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_complete(path):
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    given = [] if "output_dir" in options else ["--output_dir", "outputs/recipe"]
    model_args, data_args, args = parse_arguments(["--recipe", str(path), *given])
    assert data_args.dataset in DATASET_NAMES or BUILT_FROM_FILES.match(data_args.dataset)
    assert timm.is_model(model_args.backbone)
    assert (args.num_train_epochs, args.learning_rate) == (options["num_train_epochs"], options["learning_rate"])
    assert args.extrapolation == (40 if args.objective == "hnml" else 0)
    assert args.mask_weight == 0


@pytest.mark.parametrize(
    "path", [*RECIPES, SCRIPTS / "benchmarks" / "suites" / "full.yaml"], ids=lambda path: path.stem
)
def test_header_says_what_is_needed(path):
    text = header(path)
    for part in ("Data", "Command", "Hardware", "Expected"):
        assert re.search(rf"^{part}: +\S", text, re.M), part
    command = re.search(r"^Command: +(.*)", text, re.M)[1]
    words = shlex.split(command)
    assert any((SCRIPTS.parent / word).is_file() for word in words if word.startswith("scripts/"))
    if "--recipe" in words:
        assert find_recipe(words[words.index("--recipe") + 1]).samefile(path)


def test_a_recipe_is_found_by_name_and_by_path(tmp_path):
    assert find_recipe("cifar10n").name == "cifar10n.yaml"
    (tmp_path / "mine.yaml").write_text("dataset: quickstart\nbackbone: resnet10t\noutput_dir: out\n")
    model_args, _, _ = parse_arguments([f"--recipe={tmp_path / 'mine.yaml'}"])
    assert model_args.backbone == "resnet10t"
    with pytest.raises(SystemExit, match="Known: animal10n, .*quickstart"):
        parse_arguments(["--recipe", "my_dreams"])


def test_an_option_that_is_null_keeps_its_default(tmp_path):
    """As text, `None` would be the name of a noise, and no number."""
    (tmp_path / "mine.yaml").write_text(
        "dataset: quickstart\nbackbone: resnet10t\noutput_dir: out\nnoise: null\nextrapolation:\nmonitor_fraction: ~\n"
    )
    _, data_args, args = parse_arguments(["--recipe", str(tmp_path / "mine.yaml")])
    assert data_args.noise is None and args.monitor_fraction is None
    assert args.extrapolation == (40 if args.objective == "hnml" else 0)


def test_a_noise_is_one_mapping_however_it_is_given(tiny_dataset, tmp_path):
    full = {"kind": "symmetric", "rate": 0.4, "seed": 3}
    for given in (
        {"noise": "symmetric", "noise_rate": 0.4, "noise_seed": 3},
        {"noise": json.dumps(full)},
        {"noise": {"kind": "symmetric", "rate": 0.1, "seed": 3}, "noise_rate": 0.4},
    ):
        assert noise_options(DataArguments(**given)) == full
    assert noise_options(DataArguments(noise_seed=3, validation_fraction=0.1)) is None  # it draws the held-out labels
    path, labels = str(tmp_path / "labels.json"), tiny_dataset["label"][:]
    tiny_dataset = tiny_dataset.remove_columns("clean_label").add_column("clean_label", labels)
    drawn = add_noise_options(tiny_dataset, {**full, "output": path})
    assert drawn["label"][:] != labels
    assert add_noise_options(tiny_dataset, {"file": path})["label"][:] == drawn["label"][:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise_rate": 0.4}, "--noise_rate 0.4: nothing says which noise. Give its kind, as `--noise symmetric`"),
        ({"noise": {"kind": "symmetric", "shape": 1}}, "it takes `kind` and, optionally, `rate`"),
        ({"noise": {"rate": 0.4}}, "it takes `kind`"),
        ({"noise": {"file": "n.json", "rate": 0.4}}, "or `file` alone"),
        ({"noise": {"manifest": "n.json"}}, "it is `file` now"),
        ({"noise": "{rate"}, "not valid JSON"),
    ],
)
def test_a_noise_that_makes_no_sense(given, message):
    with pytest.raises((ValueError, SystemExit), match=message):
        load_data(DataArguments(dataset="no_such_folder", **given))


@pytest.mark.parametrize("name", RETIRED)
def test_an_option_that_is_gone_says_what_took_its_place(name, tmp_path, capsys):
    """On the command line and in a recipe."""
    (tmp_path / "old.yaml").write_text(f"dataset: quickstart\nbackbone: resnet10t\noutput_dir: out\n{name}: 1\n")
    with pytest.raises(SystemExit):
        parse_arguments(["--recipe", "quickstart", f"--{name}", "1"])
    assert capsys.readouterr().err.endswith(f"error: there is no option --{name} any more: {RETIRED[name]}\n")
    with pytest.raises(ValueError, match="old.yaml:4: ") as error:
        parse_arguments(["--recipe", str(tmp_path / "old.yaml")])
    assert str(error.value).endswith(f"no option `{name}` any more: {RETIRED[name]}")
    options = {
        option.name for kind in (DataArguments, ModelArguments, HNMLTrainingArguments) for option in fields(kind)
    }
    assert name not in options


def test_the_method_has_few_options():
    assert len(HNMLTrainingArguments.__annotations__.keys() - TrainingArguments.__dataclass_fields__.keys()) <= 20


@pytest.mark.parametrize(("given", "meant"), [("true", True), ("False", False), ("weights/x.safetensors",) * 2])
def test_pretrained_is_a_switch_or_a_path(given, meant):
    model_args, _, _ = parse_arguments(["--recipe", "quickstart", "--pretrained", given])
    assert model_args.pretrained == meant


def test_an_exclusion_list_of_the_whole_dataset_goes_before_a_balanced_part(tiny_dataset, tmp_path):
    tiny_dataset.save_to_disk(tmp_path / "data")
    bad = tiny_dataset["index"][:20]
    lines = (json.dumps({"split": "train", "index": index}) for index in bad)
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    options = {"dataset": str(tmp_path / "data"), "class_balanced_samples": 15}
    data = load_data(DataArguments(**options, exclude=str(tmp_path / "q.jsonl")))["train"]
    labels = data["label"][:]
    assert [labels.count(label) for label in range(3)] == [5, 5, 5] and not set(data["index"]) & set(bad)
