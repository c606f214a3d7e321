"""The card says what happened, nothing else, and the Hub's own library reads it."""

import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from loopback_hub import check_card
from PIL import Image

from hnml_hf import HNMLTrainingArguments
from hnml_hf.hub.curves import epochs_of, eval_prefixes, training_curves
from hnml_hf.hub.model_card import (
    changed_options,
    command_line,
    dataset_name,
    generate_model_card,
    noise_statement,
    plain,
)


LABELS, CLEAN = np.array([0, 1, 2, 0, 1, 2, 0, 1]), np.array([0, 1, 2, 1, 1, 0, 0, -1])
LOG = [
    {"loss": 1.2, "epoch": 1.0, "label_agreement": 0.4, "memorized": 0.1},
    {"eval_accuracy": 0.5, "eval_loss": 1.1, "epoch": 1.0},
    {"eval_student_accuracy": 0.4, "epoch": 1.0},
    {"loss": 0.9, "epoch": 2.0, "label_agreement": 0.6, "memorized": 0.3},
    {"eval_accuracy": 0.75, "eval_loss": 0.8, "epoch": 2.0},
    {"eval_student_accuracy": 0.7, "epoch": 2.0},
    {"loss": 0.7, "epoch": 3.0, "label_agreement": 0.8, "memorized": 0.5},
    {"eval_accuracy": 0.625, "eval_loss": 0.9, "epoch": 3.0},
    {"eval_student_accuracy": 0.6, "epoch": 3.0},
    {"train_runtime": 12.5, "epoch": 3.0},
    {"eval_accuracy": 0.8125, "epoch": 3.0},
]
RESULTS = {
    "eval_accuracy": 0.8125,
    "eval_student_accuracy": 0.71875,
    "eval_loss": 0.5,
    "train_runtime": 12.5,
    "peak_memory_mib": 512.5,
    "train_samples_per_second": 96.0,
    "train_noise_auroc": 0.91,
}
CONFIG = {
    "architecture": "resnet10t",
    "num_classes": 3,
    "label_names": ["cat", "| <script>alert(1)</script> |", "[x](http://evil) `#` {{ 7 * 7 }}\n# Title"],
    "pretrained_cfg": {"input_size": [3, 28, 28]},
}


def write(folder, *, results=RESULTS, log_history=LOG, arguments=None, **facts):
    if results:
        (folder / "all_results.json").write_text(json.dumps(results))
    args = HNMLTrainingArguments(str(folder), use_cpu=True, seed=7, report_to="none", **(arguments or {}))
    card = generate_model_card(
        folder,
        args=args,
        config=CONFIG,
        log_history=log_history,
        labels=LABELS,
        clean_labels=CLEAN,
        evaluated="teacher",
        parameters=1234567,
        max_steps=60,
        **facts,
    )
    assert (folder / "README.md").read_text() == str(card)
    return str(card)


def test_the_card_tells_what_happened(tmp_path):
    text = write(
        tmp_path,
        arguments={"meta_lr": 0.3, "learning_rate": 0.02},
        dataset="quickstart",
        noise="symmetric, rate 0.25, seed 0",
        noise_estimate="an audit estimates 30.0%",
        license="apache-2.0",
        start="timm/resnet10t.c3_in1k",
        command="python scripts/train.py --recipe scripts/recipes/quickstart.yaml",
    )
    for part in (
        "independent reconstruction from the abstract",
        "not been validated against the authors' results",
        "| accuracy | 0.8125 | 0.8125 | 0.7188 |",
        "best 0.75\n(epoch 2), last 0.625",
        "symmetric, rate 0.25, seed 0; 28.6% of the 7 labels with a known true label are wrong; an audit estimates 30",
        "| `meta_lr` | 0.3 |",
        "| `learning_rate` | 0.02 |",
        "| seed | 7 |",
        "| steps | 60 |",
        "area under the ROC curve of 0.91",
        "| seconds of training | 12.5 |",
        "| peak memory in MiB | 512.5 |",
        "| parameters | 1,234,567 |",
        "timm 1.",
        '"local-dir:" + path',
        "![Training curves](training_curves.png)",
        "License of the weights: apache-2.0",
        "--recipe scripts/recipes/quickstart.yaml",
    ):
        assert part in text, part
    assert "cam_examples" not in text and "consistency_weight" not in text
    with Image.open(tmp_path / "training_curves.png") as picture:
        assert picture.size == (1200, 500)


@pytest.mark.parametrize(
    ("labels", "clean", "statement"),
    [
        ([0, 1, 2, 0], [0, 1, 2, 1], "25.0% of the 4 labels with a known true label are wrong"),
        ([0, 1, 2, 0], [0, 1, 2, 0], "0.0% of the 4 labels with a known true label are wrong"),
        ([0, 1, 2, 0], [0, 2, -1, -1], "50.0% of the 2 labels with a known true label are wrong"),
        ([0, 1, 2, 0], [0, 1, -1, -1], "not known: the data do not say which labels are wrong"),  # as in Food-101N
        ([0, 1, 2, 0], [-1, -1, -1, -1], "not known: the data do not say which labels are wrong"),
        ([], [], "not known: the data do not say which labels are wrong"),
    ],
)
def test_a_rate_is_told_where_the_data_tell_it(labels, clean, statement):
    assert noise_statement(None, np.array(labels), np.array(clean)) == statement


SEVERAL = [  # what `--eval_test true` logs
    {"eval_validation_accuracy": 0.5, "eval_validation_student_accuracy": 0.4, "eval_validation_top5_accuracy": 1.0}
    | {"epoch": 1.0},
    {"eval_test_accuracy": 0.9, "eval_test_student_accuracy": 0.8, "epoch": 1.0},
    {"eval_validation_accuracy": 0.75, "eval_validation_student_accuracy": 0.7, "epoch": 2.0},
    {"eval_test_accuracy": 0.7, "eval_test_student_accuracy": 0.6, "epoch": 2.0},
    {"train_runtime": 12.5, "epoch": 2.0},
    {"eval_accuracy": 0.8125, "eval_student_accuracy": 0.71875, "epoch": 2.0},
]


def test_several_evaluation_splits_are_told_apart(tmp_path, monkeypatch):
    """The best epoch is that of the validation labels (the second), although the test set would choose the first."""
    assert eval_prefixes(SEVERAL) == {"eval_validation": "validation", "eval_test": "test"}
    assert epochs_of(SEVERAL) == [{"epoch": 1.0, "eval_accuracy": 0.5}, {"epoch": 2.0, "eval_accuracy": 0.75}]
    assert epochs_of(list(reversed(SEVERAL[:4])))[0] == {"epoch": 2.0, "eval_accuracy": 0.75}
    drawn = {}
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda axes, x, y, label: drawn.update({label: [*zip(x, y, strict=True)]})
    )
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes, **how: None)
    assert "best 0.75\n(epoch 2), last 0.75" in write(tmp_path, log_history=SEVERAL)
    assert drawn == {
        "teacher, validation split": [(1.0, 0.5), (2.0, 0.75)],
        "student, validation split": [(1.0, 0.4), (2.0, 0.7)],
        "teacher, test split": [(1.0, 0.9), (2.0, 0.7)],
        "student, test split": [(1.0, 0.8), (2.0, 0.6)],
    }


def test_the_metadata_are_valid(tmp_path):
    text = write(tmp_path, dataset="quickstart", license="apache-2.0", start="timm/resnet10t.c3_in1k")
    assert check_card(text) == []
    data = ModelCard(text).data
    assert data.library_name == "timm" and data.pipeline_tag == "image-classification"
    assert data.datasets == ["zalando-datasets/fashion_mnist"] and data.base_model == "timm/resnet10t.c3_in1k"
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.8125, "test")
    assert ModelCard(str(ModelCard(text))).data.to_dict() == data.to_dict()


def test_the_validator_can_say_no():
    assert check_card("---\nlicense: [a]\nmodel-index:\n- results:\n  - task: {}\n---\n")
    assert check_card("---\na: [\n---\n") and check_card("---\nbase_model: a b\n---\n")
    assert check_card("# no metadata\n") == []


def test_names_of_the_user_do_nothing(tmp_path):
    text = write(tmp_path, dataset="my | data <b>")
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "](http" not in text.partition("## Training data")[2].partition("## Training\n")[0]
    assert "\n# Title" not in text and "49" not in text.partition("| classes |")[2].partition("\n")[0]
    row = next(line for line in text.splitlines() if line.startswith("| classes |"))
    assert row.replace("\\|", "").count("|") == 3
    assert check_card(text) == []


@pytest.mark.parametrize("place", ["pathlib.Path.write_text", "PIL.Image.Image.save"], ids=["card", "picture"])
def test_a_full_disk_leaves_the_card_before_and_no_half_of_another(place, tmp_path, monkeypatch):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fill(*arguments, **options):
        path = Path(next(argument for argument in arguments if isinstance(argument, (str, Path))))
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(place, fill)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, results=None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a_b", r"a\_b"), ("x" * 100, "x" * 79 + "…"), ("a\n\tb\x00c", "a b c"), ("*a*", r"\*a\*"), ("é", "é")],
)
def test_plain(text, shown):
    assert plain(text) == shown


def test_a_run_without_results_claims_nothing(tmp_path):
    text = write(tmp_path, results=None, log_history=[])
    assert "No test set was evaluated" in text and "model-index" not in text
    assert "Training curves" not in text and not (tmp_path / "training_curves.png").exists()
    assert check_card(text) == []


def test_baselines_carry_no_reconstruction_notice(tmp_path):
    text = write(tmp_path, arguments={"objective": "ce"})
    assert "reconstruction" not in text and "| objective | `ce` |" in text


def test_the_best_epoch_is_told_from_the_last(tmp_path):
    arguments = {
        "load_best_model_at_end": True,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "metric_for_best_model": "accuracy",
    }
    text = write(tmp_path, arguments=arguments, results={**RESULTS, "eval_accuracy_last": 0.5})
    assert "| accuracy | 0.8125 | 0.5 | 0.7188 |" in text


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (None, ("not stated", None)),
        ("cifar10n-worse", ("cifar10n-worse", "uoft-cs/cifar10")),
        ("user/set", ("user/set", "user/set")),
        ("/home/someone/photos", ("a local dataset", None)),
        ("./photos", ("a local dataset", None)),
        (".", ("a local dataset", None)),
    ],
)
def test_paths_are_not_told(dataset, expected):
    assert dataset_name(dataset) == expected


def test_options_hold_no_secret_and_no_path(tmp_path):
    args = HNMLTrainingArguments(
        str(tmp_path), use_cpu=True, hub_token="hf_secret", run_name="mine", weight_decay=0.1, report_to="none"
    )
    options = dict(changed_options(args))
    assert options["weight_decay"] == "0.1" and not {"hub_token", "run_name", "output_dir", "report_to"} & set(options)
    assert "secret" not in str(options) and str(tmp_path) not in str(options)


def test_a_token_in_the_command_is_not_told(tmp_path):
    (tmp_path / "faces").mkdir()
    words = [
        "--hub_token",
        "hf_secret",
        f"--data_dir={tmp_path / 'faces'}",
        "--pretrained",
        "/a/b.safetensors",
        "--lr=0.1",
    ]
    command = command_line("scripts/train.py", [*words, "--output_dir", "outputs/x", "--hub_token=hf_other"])
    assert command == (
        "python scripts/train.py --hub_token ... --data_dir=... --pretrained ... --lr=0.1 --output_dir outputs/x "
        "--hub_token=..."
    )


def test_a_path_within_json_is_not_told(tmp_path):
    (tmp_path / "t.csv").touch()
    values = ['{"imagenet_dir": "/home/me/imagenet"}', json.dumps({"train": [str(tmp_path / "t.csv")]})]
    kept = ['{"output_stride": 8}', "{not json", json.dumps({"note": "x" * 5000})]
    for value, told in [(value, False) for value in values] + [(value, True) for value in kept]:
        command = command_line("scripts/train.py", ["--splits", value])
        assert shlex.split(command)[2:] == ["--splits", value if told else "..."]


@dataclass
class Mixed:
    """Options of every kind."""

    learning_rate: float = 0.1
    note: str = "x"
    nothing: object = None
    listed: object = None


def test_only_plain_values_are_listed():
    assert changed_options(Mixed(learning_rate=0.2, note="a/b", nothing=3, listed=[1])) == [
        ("learning_rate", "0.2"),
        ("nothing", "3"),
    ]


def test_options_of_a_later_transformers_are_not_told(tmp_path):
    """A list of what is told cannot be passed by a new option, as one of what is not told could."""

    @dataclass
    class Later(HNMLTrainingArguments.__base__):
        pass

    Later.__annotations__ = {}
    args = Later(str(tmp_path), use_cpu=True, report_to="none", learning_rate=0.3, trackio_space_id="me/space")
    assert dict(changed_options(args)) == {"learning_rate": "0.3"}


def test_without_matplotlib_the_card_has_no_curves(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not training_curves(SEVERAL, tmp_path / "curves.png", evaluated="teacher", other="student")
    assert not (tmp_path / "curves.png").exists()


CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.mark.parametrize("path", sorted(set(CARDS.glob("*.md")) - {CARDS / "README.md"}), ids=lambda path: path.stem)
def test_a_committed_card_is_valid_and_in_the_index(path):
    text = path.read_text()
    assert check_card(text) == [] and ModelCard(text).data.library_name == "timm"
    assert f"({path.name})" in (CARDS / "README.md").read_text()
    command = text.partition("```\npython scripts/train.py")
    assert command[1], "a card says how it was made"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (CARDS / picture).is_file(), picture
