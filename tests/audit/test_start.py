"""Training starts from the judge: its classifier is the head of an ordinary model, and what it says is kept."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from commands import load_script
from safetensors.torch import load_file

from hnml_hf import (
    TimmCAMForImageClassification,
    TransformedDataset,
    create_transforms,
    judge_labels,
    load_audit,
    load_noisy_dataset,
)
from hnml_hf.audit.dynamics import judge_dynamics, run_dynamics
from hnml_hf.audit.features import extract_features, load_backbone
from hnml_hf.audit.judge import Head, fit_head
from hnml_hf.audit.start import as_sure_as_labels, judge_records, pooled_features, set_head, start_from_judge


WIDTH = 96  # of the features of a test_resnet
RESNET = ["--backbone", "test_resnet", "--image_size", "64", "--pretrained", "weights"]
SHORT = [*"--max_steps 2 --save_strategy no --report_to none --use_cpu true".split(), "--output_dir", "run"]


def save_small_quickstart(every: int) -> list[str]:
    """A part of the quickstart in `data`; the options that load it."""
    data = load_noisy_dataset("quickstart")
    data["train"], data["test"] = (
        data[split].select(range(0, len(data[split]), every)) for split in ("train", "test")
    )
    data.save_to_disk("data")
    return ["--dataset", "data", "--clean_label_column", "clean_label", "--index_column", "index"]


def weights_of_the_test(size: int):
    return load_backbone("test_resnet", pretrained="weights", image_size=size)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with weights of ten classes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=10, image_size=64).save_pretrained("weights")
    return tmp_path


def test_training_starts_from_the_head_of_the_judge(folder, capfd):
    """With a rate of zero the run ends as the judge's classifier."""
    start = ["--start_from_judge", "true", "--learning_rate", "0", "--freeze_batch_norm", "true"]
    options = [*save_small_quickstart(10), *RESNET, *SHORT, *start, "--monitor_fraction", "0", "--audit", "false"]
    load_script("train").main(options)
    assert "Judged 400 labels from pretrained features: about " in capfd.readouterr().out
    rows = load_noisy_dataset("data", clean_label_column="clean_label", index_column="index")["train"]
    found = extract_features(rows, weights_of_the_test(64), cache_dir="cache", batch_size=8, num_workers=0)
    labels, how = np.array(rows["label"]), {"num_labels": 10, "device": "cpu"}
    judgement = judge_labels(found.values, labels, groups=found.groups, seed=42, **how)
    head = fit_head(found.values[:, :WIDTH], judgement, **how)
    run = load_file("run/model.safetensors")
    torch.testing.assert_close(run["fc.weight"], head.weight, rtol=1e-4, atol=1e-5)
    before = load_file("weights/model.safetensors")
    assert all(torch.equal(run[name], before[name]) for name in before if not name.startswith("fc."))


def test_a_head_is_as_sure_as_noisy_labels_allow():
    """38 of 50 samples on each side have its label, so the best head says 38 to 12; its logits are 10 apart."""
    features = np.repeat([[-1.0], [1.0]], 50, axis=0).astype(np.float32)
    left = np.tile([0, 0, 0, 1], 13)[:50]
    labels = np.concatenate([left, 1 - left])
    head = Head(torch.tensor([[-5.0], [5.0]]), torch.zeros(2))
    scaled = as_sure_as_labels(head, features, labels)
    torch.testing.assert_close(scaled.weight, math.log(38 / 12) / 10 * head.weight, rtol=1e-3, atol=0)
    right = (labels == (features[:, 0] > 0)).astype(np.float32)  # without the others no head is too sure
    torch.testing.assert_close(as_sure_as_labels(head, features, labels, right).weight, head.weight, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ("--targets given", "given"),
        ("--targets posterior", "posterior"),
        ("--objective gce", "given"),
        ("--objective ce --mixup_alpha 0.2", "given"),
        ("--objective ce --symmetric_correction true", "given"),
    ],
)
def test_the_start_is_as_sure_as_its_targets(folder, options, targets):
    """With the given labels as targets, chosen or all that can be had, the head's loss on them is as low as its scale
    allows."""
    start = ["--start_from_judge", "true", "--learning_rate", "0", "--freeze_batch_norm", "true", *options.split()]
    options = [*save_small_quickstart(10), *RESNET, *SHORT, *start, "--audit", "false", "--monitor_fraction", "0"]
    load_script("train").main(options)
    rows = load_noisy_dataset("data", clean_label_column="clean_label", index_column="index")["train"]
    found = extract_features(rows, weights_of_the_test(64), cache_dir="cache", batch_size=8, num_workers=0)
    values, labels = found.values[:, :WIDTH], np.array(rows["label"])
    run = load_file("run/model.safetensors")
    head = Head(run["fc.weight"], run["fc.bias"])
    scaled = as_sure_as_labels(head, values, labels)
    assert (float(scaled.weight.norm() / head.weight.norm()) > 0.99) == (targets == "given")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--targets posterior --objective gce", "objective `gce` takes labels alone"),
        ("--targets posterior --objective ce --mixup_alpha 0.2", "images are mixed"),
        ("--judge_image_size 0", "`judge_image_size=0` must be at least 1 pixel"),
        ("--judge_image_size 0 --start_from_judge false", "give `--start_from_judge true`"),
        ("--extrapolation 5 --optim_args momentum=0", "along the optimizer's momentum, and `SGD`"),
        ("--optim adafactor --optim_args=", "and `Adafactor` keeps none here"),
        ("--mask_weight inf", "`mask_weight=inf` must be a number from 0 on"),
        ("--elr_weight nan", "`elr_weight=nan` must be a number from 0 on"),
        ("--extrapolation inf", "`extrapolation=inf` must be a number from 0 on"),
    ],
)
def test_what_cannot_be_is_said_before_the_labels_are_judged(folder, capfd, options, said):
    start = ["--start_from_judge", "true", *options.split()]
    with pytest.raises(SystemExit, match=said):
        load_script("train").main([*save_small_quickstart(20), *RESNET, *SHORT, *start])
    assert "Judged" not in capfd.readouterr().out


def test_the_judge_may_see_larger_images_than_the_network(folder, monkeypatch):
    """Its posterior is of the features at its own size, the head of those at the network's; a second run has both."""
    train, found, passes = load_script("train"), [], []

    def spying(model, dataset, *others, **options):
        found.append(start_from_judge(model, dataset, *others, **options))
        return found[-1]

    def counting(*given, **options):
        passes.append(extract_features(*given, **options))
        return passes[-1]

    monkeypatch.setattr(train, "start_from_judge", spying)
    monkeypatch.setattr("hnml_hf.audit.start.extract_features", counting)
    start = ["--start_from_judge", "true", "--learning_rate", "0", "--freeze_batch_norm", "true"]
    options = [*save_small_quickstart(20), *RESNET, *SHORT, *start, "--judge_image_size", "96", "--audit", "false"]
    options += ["--monitor_fraction", "0"]
    train.main(options)
    rows = load_noisy_dataset("data", clean_label_column="clean_label", index_column="index")["train"]
    values = {
        size: extract_features(rows, weights_of_the_test(size), cache_dir="cache", batch_size=8, num_workers=0)
        for size in (64, 96)
    }
    labels, how = np.array(rows["label"]), {"num_labels": 10, "device": "cpu"}
    judgement = judge_labels(values[96].values, labels, groups=values[96].groups, seed=42, **how)
    np.testing.assert_allclose(found[0].posterior, judgement.posterior, atol=1e-4)
    head = fit_head(values[64].values[:, :WIDTH], judgement, **how)
    run = load_file("run/model.safetensors")
    torch.testing.assert_close(run["fc.weight"], head.weight, rtol=1e-4, atol=1e-5)
    assert [part.computed for part in passes] == [200, 200]
    train.main([*options, "--learning_rate", "0.1"])
    assert [part.computed for part in passes] == [200, 200, 0, 0]


def test_a_run_takes_the_features_of_the_run_beside_it(folder, monkeypatch):
    passes = []

    def counting(*given, **options):
        passes.append(extract_features(*given, **options))
        return passes[-1]

    monkeypatch.setattr("hnml_hf.audit.start.extract_features", counting)
    options = [*save_small_quickstart(40), *RESNET, *SHORT, "--start_from_judge", "true", "--monitor_fraction", "0"]
    for output in ("runs/first", "runs/second", "elsewhere/third"):
        load_script("train").main([*options, "--audit", "false", "--output_dir", output])
    assert [part.computed for part in passes] == [100, 0, 100]


def test_a_size_of_the_judge_needs_a_judge(folder):
    with pytest.raises(SystemExit, match="`judge_image_size` is of the judge: give `--start_from_judge true`"):
        load_script("train").main([*save_small_quickstart(40), *RESNET, *SHORT, "--judge_image_size", "96"])


def test_an_image_that_cannot_be_read_is_named_before_training(folder):
    options = save_small_quickstart(40)
    data = datasets.load_from_disk("data")
    stored = data["train"].cast_column("image", datasets.Image(decode=False)).to_list()
    stored[3]["image"] = {"bytes": b"no image", "path": None}
    features = data["train"].features
    data["train"] = datasets.Dataset.from_list(stored, features=features)
    data.save_to_disk("other")
    options[1] = "other"
    start = [*options, *RESNET, *SHORT, "--start_from_judge", "true", "--monitor_fraction", "0"]
    with pytest.raises(SystemExit, match="1 image cannot be read, the first is in row 3. `hnml check` lists them"):
        load_script("train").main(start)
    Path("broken.png").write_bytes(b"no image")
    stored[3]["image"] = {"bytes": None, "path": "broken.png"}
    data["train"] = datasets.Dataset.from_list(stored, features=features)
    data.save_to_disk("named")
    start[1] = "named"
    with pytest.raises(SystemExit, match="1 image cannot be read, the first is .*broken.png. `hnml check` lists them"):
        load_script("train").main(start)


def test_a_start_without_pretrained_features_is_refused(folder, capfd):
    options = [*save_small_quickstart(40), *RESNET[:-2], *SHORT, "--start_from_judge", "true"]
    with pytest.raises(SystemExit) as error:
        load_script("train").main(options)
    assert "`start_from_judge` needs pretrained features" in str(error.value) + capfd.readouterr().err


def test_the_judge_does_not_see_what_the_monitor_holds_out(folder, monkeypatch):
    """Else the monitor, and the audit after it, would find those labels learned as well as the others."""
    train, seen = load_script("train"), []

    def spying(model, dataset, *others, **options):
        seen.extend(dataset["index"])
        return start_from_judge(model, dataset, *others, **options)

    monkeypatch.setattr(train, "start_from_judge", spying)
    train.main([*save_small_quickstart(5), *RESNET, *SHORT, "--start_from_judge", "true"])
    records = run_dynamics("run")
    assert judge_dynamics("run")["index"].tolist() == sorted(seen)
    held_out = records["index"][records["held_out"]]
    assert len(held_out) > 40 and len(seen) + len(held_out) == len(records)
    assert not np.isin(held_out, seen).any()


def test_the_rate_of_a_run_is_that_of_the_judge_before_it(folder):
    """In the audit, in one that is made again from the files, and in the correction of the loss."""
    options = [*save_small_quickstart(10), *RESNET, *SHORT, "--monitor_fraction", "0"]
    train = load_script("train").main
    train([*options, "--start_from_judge", "true"])
    audit = load_audit("run")
    assert "the judge that it started from" in audit.attrs["provenance"]
    rate = pytest.approx(audit.attrs["noise_rate"])
    assert audit["noise_score"].mean() == rate
    assert "the judge of the pretrained features estimates" in Path("run", "README.md").read_text("utf-8")
    load_script("audit").main(["--run", "run"])
    assert load_audit("run").attrs["noise_rate"] == rate
    corrected = ["--targets", "given", "--symmetric_correction", "true", "--logging_steps", "1", "--audit", "false"]
    train([*options, "--start_from_judge", "true", *corrected])
    log = json.loads(Path("run", "trainer_state.json").read_text("utf-8"))["log_history"]
    assert [entry["noise_rate"] for entry in log if "noise_rate" in entry] == [rate, rate]
    train(options)
    assert judge_dynamics("run") is None and load_audit("run").attrs["noise_rate"] != rate
    assert "estimates" not in Path("run", "README.md").read_text("utf-8")  # no label was kept from the model


def test_the_judges_classifier_is_the_head_of_an_ordinary_model(tiny_dataset, tmp_path):
    torch.manual_seed(0)
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=64)
    _, transform = create_transforms(model.config.pretrained_cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = TransformedDataset(tiny_dataset, transform)
    features, labels = pooled_features(model, dataset, batch_size=20)
    assert features.shape == (48, model.class_weights.shape[1]) and labels.tolist() == tiny_dataset["label"]
    head = judge_labels(features, labels, num_labels=3).head
    set_head(model.classifiers, head)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(changed) == ["timm_model.fc.bias", "timm_model.fc.weight"]
    model.save_pretrained(tmp_path)
    again = TimmCAMForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = again(torch.stack([dataset[row]["pixel_values"] for row in range(48)])).logits
    torch.testing.assert_close(logits, torch.from_numpy(features) @ head.weight.T + head.bias, atol=1e-4, rtol=1e-4)


def test_records_hold_what_the_judge_says_without_the_label():
    """P(c | h) is proportional to P(c | h, y) / T[c, y], so that a label is no evidence for itself."""
    random = np.random.default_rng(0)
    clean = np.arange(300) % 3
    features = (np.eye(5)[clean] * 4 + random.normal(size=(300, 5))).astype(np.float32)
    labels = np.where(random.random(300) < 0.3, (clean + 1) % 3, clean)
    judgement = judge_labels(features, labels, num_labels=3)
    records = judge_records(np.arange(300)[::-1].copy(), labels, judgement)
    assert records["index"].tolist() == list(range(300)) and records["held_out"].all()
    transition = judgement.transition_matrix[judgement.top_labels, labels[:, None]]
    without = judgement.posterior / transition
    given = np.take_along_axis(without / without.sum(1, keepdims=True), labels[:, None], 1)[:, 0]
    np.testing.assert_allclose(records["given"][::-1], given, atol=0.01)  # cells of T near 0


def test_labels_that_are_all_different_are_refused_before_the_pass(tmp_path):
    data = datasets.Dataset.from_dict({"image": [None] * 3, "label": [0, 1, 2]})
    with pytest.raises(ValueError, match="No class has two different samples"):
        start_from_judge(None, data, None, cache_dir=tmp_path)
