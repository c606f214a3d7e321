"""The quickstart as a new user runs it; only shorter. The README: test_readme."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from commands import ROOT, load_script
from options import noise_options
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hnml_hf import TimmCAMForImageClassification


def test_without_options_the_quickstart_runs():
    train = load_script("train")
    model_args, data_args, args = train.parse_arguments([])
    assert (data_args.dataset, noise_options(data_args)["rate"], args.objective) == ("quickstart", 0.5, "hnml")
    assert (model_args.backbone, args.output_dir) == ("resnet10t", "outputs/quickstart")


def test_without_a_dataset_every_option_refines_the_quickstart(capsys):
    model_args, data_args, args = load_script("train").parse_arguments(["--seed", "1", "--use_cpu", "true"])
    assert (data_args.dataset, model_args.backbone, args.seed) == ("quickstart", "resnet10t", 1)
    assert "Recipe: quickstart" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--data_dir photos: which dataset lies there.*hnml train photos"):
        load_script("train").parse_arguments(["--data_dir", "photos"])


def test_a_dataset_is_a_word_and_own_data_have_a_recipe(tmp_path, capsys):
    parse, photos, cpu = load_script("train").parse_arguments, str(tmp_path), ["--use_cpu", "true"]
    model_args, data_args, _ = parse([photos, *cpu])
    assert (data_args.dataset, data_args.validation_fraction, model_args.backbone) == (photos, 0.1, "resnet50")
    model_args, data_args, _ = parse(["--backbone", "resnet18", *cpu, photos])
    assert (data_args.dataset, data_args.validation_fraction, model_args.backbone) == (photos, 0.1, "resnet18")
    assert parse(["--dataset", photos, "--backbone", "resnet18", *cpu])[1].validation_fraction == 0  # no recipe
    assert (
        parse(["user/name", *cpu])[0].backbone == "resnet50" and parse(["quickstart", *cpu])[0].backbone == "resnet10t"
    )
    assert parse(["cifar10", "--recipe", "quickstart", *cpu])[1].dataset == "cifar10"  # before that of a recipe
    capsys.readouterr()
    for words, message in (
        ([photos, "--dataset", "cifar10"], "are two datasets; give one of them"),
        (["cifar10n-worse"], "--backbone is needed, or a recipe that has one"),
    ):
        with pytest.raises(SystemExit):
            parse([*words, *cpu])
        assert message in capsys.readouterr().err


def test_a_run_is_called_by_its_data_and_objective_and_keeps_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    parse, cpu = load_script("train").parse_arguments, ["--use_cpu", "true"]
    assert parse(["photos", *cpu])[2].output_dir == "outputs/photos_hnml"
    assert parse(["photos/", "--objective", "elr", *cpu])[2].output_dir == "outputs/photos_elr"
    folder = ["imagefolder", "--data_dir", "photos", "--backbone", "resnet18"]
    assert parse([*folder, *cpu])[2].output_dir == "outputs/photos_hnml"
    assert parse(["--dataset", "photos", "--backbone", "resnet18", *cpu])[2].output_dir == "outputs/photos_hnml"
    run = tmp_path / "outputs" / "photos_hnml"
    (run / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="outputs/photos_hnml holds a run already: name another folder by --output"):
        parse(["photos", *cpu])
    assert parse(["photos", *cpu, "--resume_from_checkpoint", "auto"])[2].output_dir == "outputs/photos_hnml"
    assert parse(["photos", *cpu, "--output_dir", str(run)])[2].output_dir == str(run)  # whoever names it means it


def test_the_workers_of_a_recipe_are_for_a_machine_with_as_many_cores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse, words = load_script("train").parse_arguments, ["user/name", "--use_cpu", "true"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    assert parse(words)[2].dataloader_num_workers == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert parse(words)[2].dataloader_num_workers == 1
    assert parse([*words, "--dataloader_num_workers", "9"])[2].dataloader_num_workers == 9
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert parse(words)[2].dataloader_num_workers == 4


def test_agreement_with_noisy_labels_is_not_called_accuracy(capsys):
    train, data_args = load_script("train"), SimpleNamespace(validation_fraction=0.1)
    table = SimpleNamespace(attrs={"noise_rate": 0.4, "noise_rate_interval": [0.4, 0.4]})
    metrics = {"eval_split": "validation", "eval_accuracy": 0.4}
    metrics |= train.accuracy_estimate(metrics, data_args, 10**6, table, num_labels=5)
    train.print_table("Saved", metrics)
    shown = capsys.readouterr().out
    assert "agreement with held-out labels, as saved  0.4\n" in shown and "accuracy, as saved" not in shown
    assert re.search(r"accuracy, estimated +0.5 \(0.4 to 0.6\)", shown)  # (0.4 - 0.1) / (1 - 0.4 - 0.1) = 0.6
    data_args.validation_fraction = 0  # a split of its own, whose labels may be cleaner
    assert train.accuracy_estimate(metrics, data_args, 10**6, table, num_labels=5) == {}
    assert train.accuracy_estimate({**metrics, "eval_split": "test"}, data_args, 10**6, table, num_labels=5) == {}


def test_the_command_line_overrides_the_recipe():
    train = load_script("train")
    recipe = str(ROOT / "scripts" / "recipes" / "quickstart.yaml")
    _, data_args, args = train.parse_arguments(["--recipe", recipe, "--objective", "ce", "--noise_rate", "0.2"])
    assert (args.objective, noise_options(data_args)["rate"], noise_options(data_args)["draw"]) == ("ce", 0.2, "exact")


def test_result_contract(quickstart):
    folder, done = quickstart
    output = folder / "outputs" / "quickstart"
    results = json.loads((output / "all_results.json").read_text())
    assert results["objective"] == "hnml"
    for name in ("eval_accuracy", "eval_accuracy_last", "train_noise_auroc"):
        assert 0 <= results[name] <= 1
    assert results["train_samples_per_second"] > 0
    assert {"model.safetensors", "config.json", "preprocessor_config.json"} <= {path.name for path in output.iterdir()}
    assert not list(output.glob("*.bin"))
    assert "accuracy, as saved" in done.stdout


def test_three_libraries_give_the_same_logits(quickstart):
    folder = quickstart[0] / "outputs" / "quickstart"
    models = [
        TimmCAMForImageClassification.from_pretrained(folder),
        AutoModelForImageClassification.from_pretrained(folder),
        timm.create_model(f"local-dir:{folder}", pretrained=True),
    ]
    pixel_values = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs, native = (model.eval()(pixel_values) for model in models)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.logits, native)


class Unpredictable:
    """A trainer that must not be asked for predictions."""

    args = SimpleNamespace(load_best_model_at_end=False)


@pytest.mark.parametrize("clean", [[-1, -1, -1], [0, -1, -1], [0, 1, 0]])
def test_without_a_known_wrong_label_nothing_is_predicted_to_find_one(clean):
    train_set = SimpleNamespace(labels=np.array([0, 1, 0]), clean_labels=np.array(clean))
    assert load_script("train").measure(Unpredictable(), train_set, {}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone", "resnet_of_my_dreams"], "`resnet_of_my_dreams` is not a timm"),
        (["--dataset", "no_such_folder"], "no_such_folder"),
        (["--objective", "magic"], "magic"),
        (["--teacher_decay", "2"], "`teacher_decay=2.0` must be between 0 and 1"),
        (["--learning_rate", "-0.1"], "`learning_rate=-0.1` cannot work: it must be a finite number, at least 0"),
        (["--lerning_rate", "0.1"], "there is no option --lerning_rate; did you mean --learning_rate"),
        (["--model_args", "{stem_width:8}"], "--model_args '{stem_width:8}' is not valid JSON"),
        (["--model_args", '{"no_such": 8}'], "timm cannot build `resnet10t` with the arguments {'no_such': 8}"),
        (["--model_args", '{"output_stride": 7}'], "{'output_stride': 7}: it does not take one of these values."),
        (["--backbone", "test_vit", "--model_args", "{}", "--image_size", "33"], "takes no images of 33x33 pixels"),
        (["--metric_for_best_model", "f1"], "`metric_for_best_model=f1` is not measured. There are loss, accuracy"),
        (
            ["--metric_for_best_model", "teacher_accuracy", "--objective", "ce"],
            "`metric_for_best_model=teacher_accuracy` is not measured. There are loss, accuracy, top5_accuracy.",
        ),
        (
            ["--metric_for_best_model", "student_accuracy", "--eval_both", "false"],
            "`metric_for_best_model=student_accuracy` is not measured. There are loss, accuracy, top5_accuracy.",
        ),
        (
            ["--metric_for_best_model", "teacher_accuracy", "--eval_both", "true"],
            "There are loss, accuracy, top5_accuracy, student_loss",
        ),
        (["--metric_for_best_model", "validation_accuracy"], "`metric_for_best_model=validation_accuracy` is not mea"),
        (["--metric_for_best_model", "test_loss"], "`metric_for_best_model=test_loss` is of the test set"),
        (["--label_names", "a", "b"], "`label_names=['a', 'b']` is not available here"),
        (["--prediction_loss_only", "true"], "`prediction_loss_only=True` is not available here"),
        (["--neftune_noise_alpha", "5"], "`neftune_noise_alpha=5.0` is not available here"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "`lr_scheduler_type=warmup_stable_decay` with"),
        (["--num_train_epochs", "0"], "`num_train_epochs=0.0` cannot work"),
        (
            ["--validation_fraction", "0", "--load_best_model_at_end", "true", "--save_strategy", "epoch"],
            "the test set chooses nothing",
        ),
        (
            ["--validation_fraction", "0", "--save_strategy", "best", "--eval_strategy", "epoch"]
            + ["--metric_for_best_model", "accuracy"],
            "`save_strategy=best` needs held-out labels to choose by; the test set chooses nothing",
        ),
        (
            ["--validation_fraction", "0", "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch"],
            "`lr_scheduler_type=reduce_lr_on_plateau` needs held-out labels to choose by",
        ),
        (
            ["--eval_strategy", "steps", "--eval_delay", "2"],
            "`eval_delay=2` lies beyond the end of the run, after 1 st",
        ),
        (
            ["--eval_strategy", "epoch", "--eval_delay", "2"],
            "`eval_delay=2` lies beyond the end of the run, after 1 ep",
        ),
        (
            "--load_best_model_at_end true --save_strategy epoch --metric_for_best_model test_accuracy".split(),
            "`metric_for_best_model=test_accuracy` is of the test set, which chooses nothing",
        ),
        (["--dataset", "imagefolder", "--data_dir", "one"], "have one class, `a`; a classifier needs at least two"),
        (["--dataset", "imagefolder", "--data_dir", "empty"], "No image in a class folder below"),
    ],
)
def test_mistakes_end_the_script_before_training(options, message, tmp_path, monkeypatch, capfd):
    train = load_script("train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "a").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "one" / "a" / "1.png")
    recipe = ["--recipe", str(ROOT / "scripts" / "recipes" / "quickstart.yaml")]
    with pytest.raises(SystemExit) as error:
        train.main([*recipe, "--max_steps", "1", "--noise_rate", "0", *options])
    assert message in str(error.value) + capfd.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_best_model_is_chosen_beside_curves_of_the_test_set(tmp_path, monkeypatch):
    train = load_script("train")
    monkeypatch.chdir(tmp_path)
    options = "--dataset quickstart --backbone test_resnet --image_size 64 --audit false --use_cpu true --max_steps 2 "
    options += "--validation_fraction 0.1 --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 "
    options += "--load_best_model_at_end true --eval_test true --metric_for_best_model accuracy --output_dir run "
    options += "--class_balanced_samples 200 --per_device_eval_batch_size 250 --eval_both false "
    options += "--noise symmetric --noise_rate 0.5"
    train.main(options.split())
    state, key = json.loads(Path("run", "trainer_state.json").read_text()), "eval_validation_accuracy"
    scores = [entry[key] for entry in state["log_history"] if key in entry]
    assert len(scores) == 2 and state["best_metric"] == max(scores)
    memorized = [entry["eval_memorized"] for entry in state["log_history"] if "eval_memorized" in entry]
    results = json.loads(Path("run", "all_results.json").read_text())  # of all wrong labels, at the best step
    assert len(memorized) == 2 and results["train_memorized"] == pytest.approx(memorized[int(np.argmax(scores))])


def test_what_is_pushed_is_what_was_measured(tmp_path, monkeypatch):
    """With the best epoch's weights, also after those of the last epoch were measured beside them."""
    train, sent = load_script("train"), {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hnml_hf.hub.upload.create_repo", lambda repo_id, **options: f"me/{repo_id}")
    monkeypatch.setattr(
        "hnml_hf.hub.upload.push_to_hub", lambda folder, *names, **options: sent.update(weights(folder))
    )

    def weights(folder):
        return load_file(Path(folder, "model.safetensors"))

    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # in step 2
    options = [word for name, value in best.items() for word in (f"--{name}", str(value))]
    options += ["--push_to_hub", "true", "--hub_model_id", "model", "--audit", "false", "--cache_images", "true"]
    train.main(["--recipe", "quickstart", *options, "--output_dir", "out", "--save_total_limit", "3"])
    step = json.loads(Path("out/trainer_state.json").read_text())["best_global_step"]
    assert step == 2
    expected, last = weights(f"out/checkpoint-{step}/teacher"), weights("out/last")
    statistics = {name for name in sent if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert sent.keys() == expected.keys()  # a checkpoint has the statistics of training, to go on from
    assert all(torch.equal(sent[name], expected[name]) for name in sent.keys() - statistics)
    assert any(not torch.equal(value, last[name]) for name, value in sent.items())


@pytest.mark.parametrize(
    ("options", "targets", "words"),
    [
        ({"objective": "ce"}, "given", "ce"),
        ({"objective": "ce", "symmetric_correction": True}, "given", "ce, loss corrected for symmetric noise"),
        ({"objective": "hnml"}, "refreshed", "hnml, targets judged again each epoch"),
    ],
)
def test_the_summary_says_what_the_loss_allows_for(options, targets, words):
    args = SimpleNamespace(**{"symmetric_correction": False, **options})
    assert load_script("train").loss_in_words(args, targets) == words
