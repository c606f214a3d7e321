"""A recipe can be read: every option exists, the dataset and the network too, and its header says what it is."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import yaml
from options import DataArguments, check_noise, find_recipe, load_data, parse_arguments

from hnml_hf.data import DATASET_NAMES


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
    given += ["--use_cpu", "true"]  # bf16 asks for a GPU otherwise
    model_args, data_args, args = parse_arguments(["--recipe", str(path), *given])
    assert data_args.dataset in DATASET_NAMES or BUILT_FROM_FILES.match(data_args.dataset)
    assert timm.is_model(model_args.backbone)
    assert (args.num_train_epochs, args.learning_rate) == (options["num_train_epochs"], options["learning_rate"])
    assert args.meta_lr == pytest.approx(40 * args.learning_rate)  # in steps, as far as with any learning rate


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
        "dataset: quickstart\nbackbone: resnet10t\noutput_dir: out\nnoise: null\nmeta_lr:\ngauge_fraction: ~\n"
    )
    _, data_args, args = parse_arguments(["--recipe", str(tmp_path / "mine.yaml")])
    assert data_args.noise is None and args.gauge_fraction is None
    assert args.meta_lr == pytest.approx(40 * args.learning_rate)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noise_rate": 0.4}, "--noise_rate 0.4: nothing says which noise. Give its kind, as `--noise symmetric`"),
        ({"noise_draw": "exact", "noise_output": "n.json"}, "--noise_draw exact, --noise_output n.json: nothing says"),
    ],
)
def test_options_of_a_noise_that_nobody_names(given, message):
    with pytest.raises(ValueError, match=message):
        load_data(DataArguments(dataset="no_such_folder", **given))
    check_noise(DataArguments(noise="symmetric", **given))
    check_noise(DataArguments(noise_manifest="n.json", **given))
    check_noise(DataArguments(noise_seed=3, validation_fraction=0.1))  # it draws the held-out labels too


def test_a_quarantine_list_of_the_whole_dataset_goes_before_a_balanced_part(tiny_dataset, tmp_path):
    tiny_dataset.save_to_disk(tmp_path / "data")
    bad = tiny_dataset["index"][:20]
    lines = (json.dumps({"split": "train", "index": index}) for index in bad)
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    options = {"dataset": str(tmp_path / "data"), "class_balanced_samples": 15}
    data = load_data(DataArguments(**options, quarantine=str(tmp_path / "q.jsonl")))["train"]
    labels = data["label"][:]
    assert [labels.count(label) for label in range(3)] == [5, 5, 5] and not set(data["index"]) & set(bad)
