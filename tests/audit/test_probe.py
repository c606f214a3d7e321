"""A linear probe is the logistic regression it says, chosen on held-out labels, and ends in an ordinary model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import load_script
from safetensors.torch import load_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold

from hnml_hf import (
    TimmCAMForImageClassification,
    TransformedDataset,
    create_transforms,
    load_audit,
    load_noisy_dataset,
)
from hnml_hf.audit.dynamics import probe_dynamics, run_dynamics
from hnml_hf.audit.probe import cross_validate_probe, fit_linear_probe, pooled_features, set_head, start_from_probe


def clusters(n: int, k: int, wrong: float, seed: int):
    """k clusters in 5 dimensions of very different scale; a share of the given labels is wrong."""
    random = np.random.default_rng(seed)
    clean = np.arange(n) % k
    features = np.eye(5)[clean] * 4 + random.normal(size=(n, 5))
    labels = np.where(random.random(n) < wrong, (clean + random.integers(1, k, n)) % k, clean)
    return (features * [1, 100, 0.01, 1, 10] + 7).astype(np.float32), labels, clean


def save_small_quickstart(every: int) -> list[str]:
    """A part of the quickstart in `data`; the options that load it."""
    data = load_noisy_dataset("quickstart")
    data["train"], data["test"] = (
        data[split].select(range(0, len(data[split]), every)) for split in ("train", "test")
    )
    data.save_to_disk("data")
    return ["--dataset", "data", "--clean_label_column", "clean_label", "--index_column", "index"]


@pytest.mark.parametrize("num_labels", [2, 3])
def test_weights_are_those_of_the_features_as_they_come(num_labels):
    """Standardisation is part of the weights: they classify raw features, and find the clean classes."""
    features, labels, _ = clusters(300, num_labels, 0.2, seed=0)
    held_out, noisy, clean = clusters(200, num_labels, 0.2, seed=1)
    probe = fit_linear_probe(features, labels, held_out, noisy, num_labels=num_labels)
    logits = torch.from_numpy(held_out) @ probe.weight.T + probe.bias
    assert probe.weight.shape == (num_labels, 5)
    predicted = logits.argmax(-1).numpy()
    assert (predicted == noisy).mean() == pytest.approx(probe.accuracies[probe.strength])
    assert (predicted == clean).mean() > 0.97


def test_the_gradient_of_the_loss_is_zero():
    """At the optimum of C sum CE + |W|^2 / 2 in standardised features: C X^T (P - Y) + W = 0."""
    features, labels, _ = clusters(300, 3, 0.3, seed=0)
    probe = fit_linear_probe(features, labels, features, labels, num_labels=3, strengths=[0.01])
    scale, centre = features.std(0, dtype=np.float64), features.mean(0, dtype=np.float64)
    standard = torch.from_numpy((features - centre) / scale)
    weight = probe.weight.double() * torch.from_numpy(scale)
    logits = torch.from_numpy(features).double() @ probe.weight.double().T + probe.bias.double()
    residual = logits.softmax(-1) - torch.eye(3, dtype=torch.float64)[labels]
    gradient = 0.01 * residual.T @ standard + weight
    assert gradient.abs().max() < 2e-3 < weight.abs().max() / 10


def test_cross_validation_never_asks_a_probe_that_learned_the_label():
    """Features that say nothing, more of them than samples: a probe repeats what it learned, and guesses the rest."""
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(200, 400)), generator.integers(0, 4, 200)
    index = generator.permutation(1000)[:200]
    how = {"num_labels": 4, "strength": 1.0}
    learned = fit_linear_probe(features, labels, features, labels, num_labels=4, strengths=[1.0])
    assert learned.accuracies[1.0] == 1
    records = cross_validate_probe(features, labels, index, **how)
    assert records["held_out"].all() and (records["times_seen"] == 1).all()
    assert records["index"].tolist() == sorted(index) and (records["label"] == labels[index.argsort()]).all()
    assert 0.15 < (records["given"] > 0.5).mean() < 0.35
    again, other = (cross_validate_probe(features, labels, index, seed=seed, **how) for seed in (0, 1))
    assert (again == records).all() and not (other["given"] == records["given"]).all()


def test_each_part_is_predicted_by_the_probe_of_the_others():
    features, labels, _ = clusters(60, 3, 0.2, seed=0)
    records = cross_validate_probe(features, labels, np.arange(60), num_labels=3, strength=0.1, folds=3, seed=5)
    for taught, asked in StratifiedKFold(3, shuffle=True, random_state=5).split(features, labels):
        samples = (features[taught], labels[taught], features[asked], labels[asked])
        probe = fit_linear_probe(*samples, num_labels=3, strengths=[0.1])
        logits = torch.from_numpy(features[asked]) @ probe.weight.T + probe.bias
        given = logits.softmax(-1).numpy()[np.arange(len(asked)), labels[asked]]
        np.testing.assert_allclose(records["given"][asked], given, atol=1e-4)


def test_samples_of_weight_zero_are_asked_but_teach_nothing():
    features, labels, _ = clusters(120, 3, 0.2, seed=0)
    weights, elsewhere = (np.arange(120) % 4 > 0).astype(float), features.copy()
    elsewhere[weights == 0] *= -50
    how = {"index": np.arange(120), "num_labels": 3, "strength": 0.01, "sample_weights": weights}
    records, others = (cross_validate_probe(there, labels, **how) for there in (features, elsewhere))
    np.testing.assert_allclose(records["given"][weights == 1], others["given"][weights == 1], rtol=1e-5)
    assert (records["times_seen"] == 1).all() and (records["given"][weights == 0] > 0.4).mean() > 0.5


def test_classes_of_few_samples_are_cross_validated_as_far_as_they_go():
    """Two samples of a class are asked about by each other; the only one of another cannot be told, and is not."""
    features, labels, _ = clusters(90, 3, 0.0, seed=0)
    keep = np.concatenate(
        [np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:2], np.flatnonzero(labels == 2)[:1]]
    )
    records = cross_validate_probe(features[keep], labels[keep], np.arange(33), num_labels=3, strength=1.0)
    assert records["times_seen"].tolist() == [1] * 32 + [0]
    assert (records["given"][30:32] > 0.1).all()
    with pytest.raises(ValueError, match="class of two samples"):
        cross_validate_probe(features[:3], labels[:3], np.arange(3), num_labels=3, strength=1.0)


def test_training_starts_from_the_probe(tmp_path, monkeypatch, capfd):
    """With a rate of zero the run ends as the probe that the other script fits on the same data."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=2, image_size=64).save_pretrained("weights")
    weights = Path("weights", "model.safetensors").rename("backbone.safetensors")
    common = [
        *save_small_quickstart(10),
        "--noise",
        "symmetric",
        "--noise_rate",
        "0.3",
        "--validation_fraction",
        "0.1",
    ]
    common += ["--backbone", "test_resnet", "--image_size", "64", "--pretrained", str(weights), "--use_cpu", "true"]
    load_script("probe").main([*common, "--audit", "false", "--output_dir", "probe"])
    assert not Path("probe", "_audit").exists()
    start = ["--start_from_probe", "true", "--learning_rate", "0", "--max_steps", "2", "--freeze_batch_norm", "true"]
    start += ["--monitor_fraction", "0"]  # the other script sees all labels
    load_script("train").main([*common, *start, "--audit", "false", "--output_dir", "run"])
    assert probe_dynamics("run") is None
    probe, run = (load_file(Path(folder, "model.safetensors")) for folder in ("probe", "run"))
    assert probe.keys() == run.keys() and all(torch.equal(probe[name], run[name]) for name in probe)
    assert "starts from a linear probe that agrees with " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("--pretrained", "`start_from_probe` need pretrained features: give `--pretrained true`"),
        ("--validation_fraction", "`start_from_probe` needs held-out labels to choose by"),
    ],
)
def test_a_start_that_needs_more_is_refused(missing, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=10, image_size=64).save_pretrained("weights")
    options = {"--pretrained": "weights", "--validation_fraction": "0.1"}
    del options[missing]
    words = [word for option in options.items() for word in option]
    common = ["--dataset", "quickstart", "--backbone", "test_resnet", "--image_size", "64", "--output_dir", "run"]
    with pytest.raises(SystemExit) as error:
        load_script("train").main([*common, *words, "--start_from_probe", "true", "--use_cpu", "true"])
    assert said in str(error.value) + capfd.readouterr().err


def test_the_probe_does_not_see_what_the_monitor_holds_out(tmp_path, monkeypatch):
    """Else the monitor, and the audit after it, would find those labels learned as well as the others."""
    monkeypatch.chdir(tmp_path)
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=10, image_size=64).save_pretrained("weights")
    train, seen = load_script("train"), {}

    def spying(model, dataset, held_out, **options):
        seen["probe"] = dataset.index
        return start_from_probe(model, dataset, held_out, **options)

    monkeypatch.setattr(train, "start_from_probe", spying)
    common = [*save_small_quickstart(5), "--backbone", "test_resnet", "--image_size", "64", "--pretrained", "weights"]
    common += ["--validation_fraction", "0.1", "--start_from_probe", "true", "--max_steps", "1"]
    train.main([*common, "--use_cpu", "true", "--output_dir", "run"])
    records = run_dynamics("run")
    assert probe_dynamics("run")["index"].tolist() == sorted(seen["probe"])
    held_out = records["index"][records["held_out"]]
    assert len(held_out) > 40 and len(seen["probe"]) + len(held_out) == len(records)
    assert not np.isin(held_out, seen["probe"]).any()


def test_samples_of_weight_zero_have_no_part():
    features, labels, _ = clusters(300, 3, 0.3, seed=0)
    weights = (np.arange(300) < 200).astype(float)
    weighted = fit_linear_probe(features, labels, features, labels, num_labels=3, sample_weights=weights)
    alone = fit_linear_probe(features[:200], labels[:200], features, labels, num_labels=3)
    torch.testing.assert_close(weighted.weight, alone.weight, rtol=1e-3, atol=1e-4)
    assert weighted.strength == alone.strength


def test_held_out_labels_choose_the_strength():
    """Neither too tight to learn nor so loose that it fits wrong labels; among equals the tightest is taken."""
    features, labels, clean = clusters(90, 3, 0.4, seed=0)
    wide = np.concatenate([features, np.random.default_rng(2).normal(size=(90, 200))], axis=1)
    held_out, _, right = clusters(300, 3, 0.0, seed=1)
    held_out = np.concatenate([held_out, np.random.default_rng(3).normal(size=(300, 200))], axis=1)
    probe = fit_linear_probe(wide, labels, held_out, right, num_labels=3, strengths=[100.0, 1e-4, 1e-2])
    assert probe.strength == 1e-2 and probe.accuracies[1e-2] == max(probe.accuracies.values())
    probe = fit_linear_probe(features, clean, features, clean, num_labels=3, strengths=[10, 1e-3, 1])
    assert set(probe.accuracies.values()) == {1.0} and probe.strength == 1e-3


def test_a_fit_that_needs_more_iterations_says_so_and_can_have_them():
    features, labels, _ = clusters(90, 3, 0.4, seed=0)
    with pytest.warns(ConvergenceWarning):
        fit_linear_probe(features, labels, features, labels, num_labels=3, max_iter=2)
    fit_linear_probe(features, labels, features, labels, num_labels=3)  # warnings are errors


def test_what_cannot_be_fitted_is_refused():
    features, labels, _ = clusters(30, 3, 0.0, seed=0)
    with pytest.raises(ValueError, match="held-out"):
        fit_linear_probe(features, labels, features[:0], labels[:0], num_labels=3)
    with pytest.raises(ValueError, match=r"Classes \[3\] have no training sample"):
        fit_linear_probe(features, labels, features, labels, num_labels=4)


def test_a_probe_is_the_head_of_an_ordinary_model(tiny_dataset, tmp_path):
    torch.manual_seed(0)
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=64)
    _, transform = create_transforms(model.config.pretrained_cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = TransformedDataset(tiny_dataset, transform)
    features, labels = pooled_features(model, dataset, batch_size=20)
    assert features.shape == (48, model.class_weights.shape[1]) and labels.tolist() == tiny_dataset["label"]
    probe = fit_linear_probe(features, labels, features, labels, num_labels=3)
    set_head(model.classifiers, probe)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(changed) == ["timm_model.fc.bias", "timm_model.fc.weight"]
    model.save_pretrained(tmp_path)
    again = TimmCAMForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = again(torch.stack([dataset[row]["pixel_values"] for row in range(48)])).logits
    torch.testing.assert_close(logits, torch.from_numpy(features) @ probe.weight.T + probe.bias, atol=1e-4, rtol=1e-4)


def test_the_script_writes_what_training_writes(tmp_path, monkeypatch, capsys):
    """Weights from a file, noise by the options of training, results in the same file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = load_script("probe")
    torch.manual_seed(0)
    start = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=64)
    start.save_pretrained(tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    options = [*save_small_quickstart(20), "--backbone", "test_resnet", "--image_size", "64"]
    options += ["--validation_fraction", "0.2"]
    options += ["--output_dir", str(tmp_path / "out"), "--report_to", "none", "--use_cpu", "true"]
    with pytest.raises(SystemExit, match="needs pretrained features"):
        script.main(options)
    script.main([*options, "--pretrained", str(tmp_path / "start"), "--noise", "symmetric", "--noise_rate", "0.3"])
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["objective"] == "linear probe" and results["eval_split"] == "test"
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "all_results.json").write_text('{"objective": "hnml"}')
    with pytest.raises(SystemExit, match="holds a training run, which this would overwrite"):
        script.main([*options, "--pretrained", str(tmp_path / "start"), "--output_dir", str(tmp_path / "trained")])
    assert results["eval_accuracy"] > 0.2  # ten classes
    assert 0.5 < results["train_noise_auroc"] <= 1 and results["probe_strength"] > 0
    TimmCAMForImageClassification.from_pretrained(tmp_path / "out")
    said = capsys.readouterr().out
    assert "linear probe" in said and "Wrong labels: " in said


def test_an_audit_without_training_and_one_with(tmp_path, monkeypatch, capfd):
    """The probe's cross-validation is its audit; a run that starts from it takes the rate from there, and says so."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=10, image_size=64).save_pretrained("weights")
    options = [
        *save_small_quickstart(10),
        "--backbone",
        "test_resnet",
        "--image_size",
        "64",
        "--pretrained",
        "weights",
    ]
    options += ["--validation_fraction", "0.2", "--use_cpu", "true", "--report_to", "none"]
    load_script("probe").main([*options, "--output_dir", "probe"])
    audit = load_audit("probe")
    assert len(audit) == 320 and "had learned it" in audit.attrs["provenance"]
    assert Path("probe", "_audit", "report.html").is_file()
    load_script("audit").main(["--run", "probe", "--export", "csv"])
    assert load_audit("probe").attrs["noise_rate"] == audit.attrs["noise_rate"]

    train = [*options, "--monitor_fraction", "0", "--max_steps", "2", "--save_strategy", "no", "--output_dir", "run"]
    load_script("train").main([*train, "--start_from_probe", "true"])
    from_probe = load_audit("run")
    rate = pytest.approx(audit.attrs["noise_rate"])
    assert from_probe.attrs["noise_rate"] == rate and from_probe["noise_score"].mean() == rate
    assert "was cross-validated, gives the noise rate" in from_probe.attrs["provenance"]
    load_script("audit").main(["--run", "run"])
    assert load_audit("run").attrs["noise_rate"] == rate
    corrected = ["--start_from_probe", "true", "--symmetric_correction", "true", "--logging_steps", "1"]
    load_script("train").main([*train, *corrected, "--audit", "false"])
    log = json.loads(Path("run", "trainer_state.json").read_text("utf-8"))["log_history"]
    assert [entry["noise_rate"] for entry in log if "noise_rate" in entry] == [rate, rate]
    load_script("train").main(train)
    assert probe_dynamics("run") is None and load_audit("run").attrs["noise_rate"] != rate
