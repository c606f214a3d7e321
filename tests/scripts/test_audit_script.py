"""`scripts/train.py` writes the audit, `scripts/audit.py` repeats, exports, applies and judges by other models."""

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import audit
import benchmark_audit
import clean
import numpy as np
import pandas as pd
import pytest
import review
import timm
import torch
import train
from options import DataArguments
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from hnml_hf import TrainingDynamics, load_audit, load_noisy_dataset
from hnml_hf.audit.dynamics import score_predictions
from hnml_hf.audit.report import map_values
from hnml_hf.audit.review.queue import Query
from hnml_hf.data.schema import image_paths


TRAIN = (
    '--backbone test_resnet --image_size 32 --model_args {"output_stride":8} --per_device_train_batch_size 12'
    " --max_steps 8 --learning_rate 0.02 --save_strategy no --report_to none --disable_tqdm true --use_cpu true"
    " --augmentation none"
).split()


@pytest.fixture(scope="module")
def scripts():
    return train.main, audit.main


@pytest.fixture(scope="module")
def run(scripts, tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny_dataset.save_to_disk(folder / "data")
    train, _ = scripts
    train([*TRAIN, "--dataset", str(folder / "data"), "--output_dir", str(folder / "out")])
    return folder


def test_training_writes_the_audit_by_default(run):
    assert {path.name for path in (run / "out" / "_audit").iterdir()} == {
        "noise_scores.parquet",
        "summary.json",
        "report.html",
        "training_dynamics.npy",
        "dataset.json",
    }
    table = load_audit(run / "out")
    assert len(table) == 48 and (table["times_seen"] == 2).all()
    assert "test_resnet, objective hnml, 2 epochs" in table.attrs["provenance"]
    assert '"maps": true' in (run / "out" / "_audit" / "report.html").read_text(encoding="utf-8")


def test_a_review_makes_maps_of_a_run_on_demand(run):
    """Those of the report, for which the model was asked at the end of training."""
    images, table = review.RunImages(str(run / "out")), load_audit(run / "out").sort_values("rank")
    page = (run / "out" / "_audit" / "report.html").read_text(encoding="utf-8")
    shown = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["items"][0]
    assert shown["id"] == int(table["index"].iloc[0])
    found = images.maps(shown["id"])
    assert [map_values(found.given_map), map_values(found.suggested_map)] == shown["maps"]
    assert images.picture(shown["id"]).size == (32, 32)


def test_and_not_if_told_so(run, scripts, tmp_path):
    options = ["--dataset", str(run / "data"), "--output_dir", str(tmp_path), "--audit", "false", "--max_steps", "1"]
    scripts[0]([*TRAIN, *options])
    assert not (tmp_path / "_audit" / "report.html").exists()


def test_a_finished_run_gives_the_same_scores_again(run, scripts, tmp_path, capsys):
    first = load_audit(run / "out")
    scripts[1](["--run", str(run / "out"), "--output_dir", str(tmp_path), "--export", "csv", "cleanlab"])
    pd.testing.assert_frame_equal(load_audit(tmp_path), first)
    said = capsys.readouterr().out
    assert "Estimated noise:" in said and "report.html" in said
    assert (tmp_path / "_audit" / "exports" / "noise_scores.csv").exists()
    assert (tmp_path / "_audit" / "exports" / "cleanlab_issues.csv").exists()


def test_marks_become_a_dataset_that_training_takes(run, scripts, tmp_path):
    table = load_audit(run / "out").sort_values("rank")
    wrong, right = table["index"].iloc[[0, 1]].tolist()
    to = int(table["suggested_label"].iloc[0])
    (tmp_path / "annotations.csv").write_text(
        f"index,mark,new_label,new_label_name\r\n{wrong},wrong,{to},\r\n{right},right,0,\r\n"
    )
    where = tmp_path / "cleaned"
    clean.main([str(run / "out"), "--annotations", str(tmp_path / "annotations.csv"), "--output_dir", str(where)])
    cleaned = load_noisy_dataset(str(where))["train"].to_pandas().set_index("index")
    assert cleaned.loc[wrong, "label"] == to and len(cleaned) == 48
    scripts[0]([*TRAIN, "--dataset", str(where), "--output_dir", str(tmp_path / "second"), "--max_steps", "2"])
    again = load_audit(tmp_path / "second").set_index("index")
    assert again.loc[wrong, "label"] == to

    (tmp_path / "annotations.csv").write_text("index,mark,new_label\n424242,wrong,0\n")
    with pytest.raises(SystemExit, match="sample id 424242 is not among the scored samples"):
        other = ["--annotations", str(tmp_path / "annotations.csv"), "--output_dir", str(tmp_path / "other")]
        clean.main([str(run / "out"), *other])


def test_weights_of_the_audit_reach_the_loss(run, scripts, tmp_path, caplog):
    """They are found by themselves in a cleaned dataset; `audit` then reads the second run like any other."""
    where = str(tmp_path / "weighted")
    clean.main([str(run / "out"), "--how", "weight", "--output_dir", where])
    table = load_audit(run / "out").set_index("index")
    data = load_noisy_dataset(where)["train"].to_pandas().set_index("index")
    np.testing.assert_allclose(data["weight"], 1 - table.loc[data.index, "noise_score"])
    assert "labels count as far as the column `weight` says" in caplog.text
    scripts[0]([*TRAIN, "--dataset", where, "--output_dir", str(tmp_path / "second"), "--max_steps", "2"])
    scripts[1](["--run", str(tmp_path / "second")])
    assert len(load_audit(tmp_path / "second")) == 48


def test_options_that_are_given_go_before_those_of_the_run(scripts, tiny_dataset, tmp_path):
    """The folder was moved and its name is all that is given: columns and held-out share are those of the run."""
    renamed = tiny_dataset.rename_columns({"label": "said", "clean_label": "true"})
    renamed.save_to_disk(tmp_path / "before")
    options = "--label_column said --clean_label_column true --validation_fraction 0.25 --max_steps 1".split()
    out = tmp_path / "out"
    scripts[0]([*TRAIN, "--dataset", str(tmp_path / "before"), "--output_dir", str(out), *options])
    (tmp_path / "before").rename(tmp_path / "moved")
    _, data_args = audit.parse_arguments(["--run", str(out)])
    assert data_args.dataset == str(tmp_path / "before")
    _, data_args = audit.parse_arguments(["--run", str(out), "--data_dir", "D", "--noise_seed", "3"])
    assert (data_args.data_dir, data_args.noise_seed, data_args.label_column) == ("D", 3, "said")
    scripts[1](["--run", str(out), "--dataset", str(tmp_path / "moved")])
    assert len(load_audit(out)) == 36


def test_a_dataset_that_has_changed_is_refused(run, scripts, tiny_dataset, tmp_path):
    tiny_dataset.select(range(40)).save_to_disk(tmp_path / "less")
    with pytest.raises(SystemExit, match=r"run of 48 rows, and .*less has 40 rows .*\(scored rows that are gone: 8,"):
        scripts[1](["--run", str(run / "out"), "--dataset", str(tmp_path / "less"), "--output_dir", str(tmp_path)])


def test_a_run_is_not_scored_on_the_data_of_another_audit(run, scripts, photos, tmp_path, monkeypatch):
    """Such an audit was written into its folder: that is said before its network is loaded, and what to do works."""
    folder = str(shutil.copytree(run / "out", tmp_path / "out"))
    saved = Path(folder, "_audit", "dataset.json")
    options = json.loads(saved.read_text(encoding="utf-8"))
    saved.write_text(json.dumps({**options, "dataset": str(photos)}), encoding="utf-8")
    load = audit.load_classifier
    monkeypatch.setattr(audit, "load_classifier", None)
    with pytest.raises(SystemExit) as end:
        scripts[1]([folder])
    said = str(end.value)
    assert f"{folder} is a training run of 48 rows, and {photos} has " in said and "new ones: " in said
    assert "_audit/dataset.json" in said and "Give `--dataset` and its options as they were in training" in said
    monkeypatch.setattr(audit, "load_classifier", load)
    scripts[1]([folder, "--dataset", str(run / "data")])
    assert len(load_audit(folder)) == 48
    assert json.loads(saved.read_text(encoding="utf-8"))["dataset"] == str(run / "data")


def test_any_timm_classifier_by_one_pass(run, scripts, tmp_path):
    scripts[1](["--model", str(run / "out"), "--dataset", str(run / "data"), "--output_dir", str(tmp_path)])
    table = load_audit(tmp_path)
    assert len(table) == 48 and (table["times_seen"] == 1).all() and "One forward pass" in table.attrs["provenance"]
    assert '"maps": true' in (tmp_path / "_audit" / "report.html").read_text(encoding="utf-8")


def test_the_batch_size_is_that_of_every_pass(run, scripts, tmp_path, monkeypatch):
    """Over the suspects for their maps and, without a run, over all images first."""
    sizes, load_classifier = [], audit.load_classifier

    def watched(*args):
        model, *others = load_classifier(*args)
        model.register_forward_pre_hook(lambda _, args, images: sizes.append(len(*images.values())), with_kwargs=True)
        return model, *others

    monkeypatch.setattr(audit, "load_classifier", watched)
    scripts[1](["--run", str(run / "out"), "--output_dir", str(tmp_path), "--batch_size", "20"])
    assert sizes == [20, 20, 8]
    source = ["--model", str(run / "out"), "--dataset", str(run / "data")]
    scripts[1]([*source, "--output_dir", str(tmp_path), "--batch_size", "20"])
    assert sizes == 3 * [20, 20, 8]


def save_vit(folder, names):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **size, **labels)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_any_transformers_classifier_by_one_pass(run, scripts, tmp_path):
    model = save_vit(tmp_path / "vit", ["bottom", "left", "right", "sky"])
    scripts[1](["--model", model, "--dataset", str(run / "data"), "--output_dir", str(tmp_path / "o")])
    table = load_audit(tmp_path / "o")
    assert len(table) == 48 and table["noise_score"].between(0, 1).all()
    assert '"maps": false' in (tmp_path / "o" / "_audit" / "report.html").read_text(encoding="utf-8")


def test_what_a_repetition_needs_is_written_first(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("in the middle of the audit")

    monkeypatch.setattr(train, "audit_run", fail)
    model = SimpleNamespace(config=SimpleNamespace(pretrained_cfg={}))
    with pytest.raises(RuntimeError, match="in the middle"):
        train.write_audit(model, DataArguments(dataset="x", max_pixels=7), None, None, None, output_dir=tmp_path)
    saved = json.loads((tmp_path / "_audit" / "dataset.json").read_text())
    assert (saved["dataset"], saved["max_pixels"]) == ("x", 7)


def test_the_folder_of_an_audit_is_not_its_data(scripts, tmp_path, capsys):
    other, own = tmp_path / "outputs", tmp_path / "photos"
    for folder in (other, own):
        (folder / "_audit").mkdir(parents=True)
        options = {"dataset": "imagefolder", "data_dir": str(own)}
        (folder / "_audit" / "dataset.json").write_text(json.dumps(options))
    with pytest.raises(SystemExit):
        scripts[1]([str(other)])
    assert f"{other} holds an audit of {own}; give these data, and --output_dir {other}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:  # a folder of images that the audit has written into
        scripts[1]([str(own), "--pretrained", "none.safetensors"])
    assert "none.safetensors" in str(end.value)


def test_labels_unknown_to_the_model(run, scripts, tmp_path):
    model = save_vit(tmp_path / "vit", ["cat", "left", "right"])
    with pytest.raises(SystemExit, match=r"does not know 1 of the dataset's 3 classes: bottom"):
        scripts[1](["--model", model, "--dataset", str(run / "data"), "--output_dir", str(tmp_path / "o")])


def test_options_that_do_not_fit(run, scripts, tmp_path, capsys):
    for options, message in (
        ([], "give a dataset or the folder"),
        (["--run", "a", "--model", "b"], "give --run"),
        (["--model", "b"], "give a dataset or the folder"),
        (["--run", str(run / "out"), "--clean", "drop"], "--clean any more: `hnml clean RUN --how drop"),
        (["--run", str(run / "out"), "--apply", "a.csv"], "--apply any more: `hnml clean RUN --annotations FILE"),
    ):
        with pytest.raises(SystemExit):
            scripts[1](options)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds no scores of samples"):
        scripts[1](["--run", str(tmp_path)])


def test_the_summary_is_plain_json(run):
    summary = json.loads((run / "out" / "_audit" / "summary.json").read_text())
    low, high = summary["noise_rate_interval"]
    assert 0 <= low <= summary["noise_rate"] <= high <= 1
    assert np.allclose(np.sum(summary["transition_matrix"], -1), 1)


def test_the_benchmark_compares_scorers_on_one_dataset(scripts):
    """Fake runs that see the truth with probability 0.7: every scorer is there, costs and rates are filled in."""
    pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    generator = np.random.default_rng(0)
    n, epochs = 400, 4
    images = object.__new__(benchmark_audit.MemoryImages)
    images.clean_labels = generator.integers(0, 10, n)
    images.labels = np.where(generator.random(n) < 0.3, generator.integers(0, 10, n), images.clean_labels)
    images.index = images.images = np.arange(n)

    def say(shape):
        said = generator.dirichlet(np.full(10, 0.5), shape) * 0.3
        said[..., np.arange(n), images.clean_labels] += 0.7
        return said.astype(np.float16)

    def run(cost):
        said, statistics = say((epochs, n)), TrainingDynamics(images.index, images.labels, 10)
        for epoch, probabilities in enumerate(said):
            statistics.update(images.index, probabilities.astype(np.float32), epoch=epoch)
        return {"S": said, "final": say((n,)), "records": statistics.records, "cost": cost, "commit": "c"}

    found = {"hnml": run(1.25)}
    assert [row["scorer"] for row in benchmark_audit.compare(images, found)] == ["hnml_hf, objective hnml"]
    found["ce"] = run(1.0)
    folds = np.array_split(generator.permutation(n), 5)
    found |= {f"fold{i}": {"rows": rows, "final": say((n,))[rows], "commit": "c"} for i, rows in enumerate(folds)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = {row["scorer"]: row for row in benchmark_audit.compare(images, found)}
    assert len(rows) == 8
    crossed = score_predictions(images.index, images.labels, say((n,)).astype(np.float32), held_out=True)
    found["ce"] |= {"wall": 40.0, "cross_validated": crossed}  # it started from the judge
    judge = {"records": crossed, "wall": 2.0, "commit": "c"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = {row["scorer"]: row for row in benchmark_audit.compare(images, {**found, "judge": judge})}
    ours = more.pop("hnml_hf, judge")
    theirs = more.pop("cleanlab judge, self_confidence")
    assert ours["images"] == theirs["images"] == n and ours["cost_ce"] == theirs["cost_ce"] == 0.05
    assert (
        ours["auroc"] > 0.9 and theirs["auroc"] > 0.9 and ours["estimated_rate_interval"][0] <= ours["estimated_rate"]
    )
    assert more.keys() - rows.keys() == {"cleanlab judge, normalized_margin"}
    del more["hnml_hf, objective ce"], found["ce"]["cross_validated"]  # whose rate is the judge's now
    assert all(row == rows[name] for name, row in more.items() if not name.startswith("cleanlab judge"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = {row["scorer"]: row for row in benchmark_audit.compare(images, {**found, "judge": judge})}
    assert other["hnml_hf, judge"]["cost_ce"] is None  # of another backbone
    assert all(row["auroc"] > 0.9 and abs(row["true_rate"] - 0.27) < 0.05 for row in rows.values())
    assert rows["cleanlab 5-fold, self_confidence"]["cost_ce"] == 4 and rows["AUM"]["cost_ce"] == 1
    ours, theirs = rows["hnml_hf, objective hnml"], rows["cleanlab 5-fold, self_confidence"]
    low, high = ours["auroc_lead_interval"]
    assert low <= ours["auroc_lead"] <= high and abs(ours["auroc_lead"] - (ours["auroc"] - theirs["auroc"])) < 1e-3
    some = {name: run for name, run in found.items() if name not in ("ce", "fold0", "fold1")}
    theirs = benchmark_audit.compare(images, some)[1]
    assert theirs["scorer"] == "cleanlab 5-fold, self_confidence" and theirs["images"] == 240
    assert rows["AUM"]["ece"] is None and 0 <= rows["hnml_hf, objective ce"]["ece"] < 0.5


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


def test_a_dataset_is_audited_without_training(run, scripts, weights, tmp_path, capsys):
    line = [str(run / "data"), "--backbone", "test_resnet", "--pretrained", str(weights), "--image_size", "64"]
    line += ["--num_workers", "0", "--output_dir", str(tmp_path), "--check", "true"]
    scripts[1](line)
    shown = capsys.readouterr().out
    table = load_audit(tmp_path)
    assert len(table) == 48 and (table["times_seen"] == 1).all()
    assert "Rows: 48" in shown and "48 images;" in shown and "Estimated noise:" in shown
    assert re.search(r"Most common label errors:\n  labeled \w+, probably \w+: about \d+\n", shown)
    assert (tmp_path / "_audit" / "report.html").is_file() and (tmp_path / "_audit" / "check.json").is_file()
    assert "test_resnet at 64 pixels" in table.attrs["provenance"]
    scripts[1]([*line, "--export", "csv"])  # the features are there
    assert "(0 images;" in capsys.readouterr().out and (tmp_path / "_audit" / "exports" / "noise_scores.csv").is_file()


def test_each_step_has_its_own_seconds(run, scripts, weights, tmp_path, capsys, monkeypatch):
    clock = [0.0]

    def taking(seconds, name):
        step = getattr(audit, name)

        def slow(*args, **options):
            clock[0] += seconds
            return step(*args, **options)

        monkeypatch.setattr(audit, name, slow)

    monkeypatch.setattr(audit, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    taking(100, "judge_features")
    taking(20, "write_report")
    taking(3, "save_classifier")
    line = [str(run / "data"), "--pretrained", str(weights), "--num_workers", "0", "--output_dir", str(tmp_path)]
    scripts[1]([*line, "--backbone", "test_resnet", "--image_size", "64"])
    said = "100 judging, 20 for the report, 3 for the classifier, 123 in all"
    assert said in capsys.readouterr().out


def test_the_judge_predicts_and_shows_where_it_looked(run, scripts, weights, tmp_path, capsys):
    line = [str(run / "data"), "--pretrained", str(weights), "--num_workers", "0", "--output_dir", str(tmp_path)]
    scripts[1]([*line, "--backbone", "test_resnet", "--image_size", "64"])
    assert f"Classifier: {tmp_path / '_judge'}" in capsys.readouterr().out
    classify = pipeline("image-classification", model=str(tmp_path / "_judge"))
    names = load_audit(tmp_path).attrs["class_names"]
    assert {found["label"] for found in classify(Image.new("RGB", (32, 32)), top_k=None)} == set(names)
    images, first = review.RunImages(str(tmp_path)), load_audit(tmp_path)["index"].iloc[0]
    found = images.maps(int(first))
    assert found.given_map.ndim == 2 and found.given_map.size > 1 and found.suggested_map is not None


def test_a_backbone_without_a_linear_layer_leaves_no_model(run, scripts, tmp_path, capsys):
    weights, name = tmp_path / "model.safetensors", "levit_128s"
    save_file(timm.create_model(name).state_dict(), weights)
    (tmp_path / "out" / "_judge").mkdir(parents=True)
    (tmp_path / "out" / "_judge" / "config.json").write_text('{"label_names": ["a"]}')  # of other classes
    scripts[1](
        [str(run / "data"), "--backbone", name, "--pretrained", str(weights), "--output_dir", str(tmp_path / "out")]
    )
    shown = capsys.readouterr().out
    assert "No classifier is saved: Backbone `levit_128s` ends in" in shown and "Classifier:" not in shown
    assert review.RunImages(str(tmp_path / "out")).model is None


def test_a_judge_that_cannot_be_written_costs_nothing_else(run, scripts, weights, tmp_path, capsys):
    (tmp_path / "_judge").write_text("a file")
    line = [str(run / "data"), "--pretrained", str(weights), "--num_workers", "0", "--output_dir", str(tmp_path)]
    scripts[1]([*line, "--backbone", "test_resnet", "--image_size", "64", "--export", "csv"])
    shown = capsys.readouterr().out
    assert "No classifier is saved: " in shown and "Report:" in shown and "Export:" in shown
    assert (tmp_path / "_judge").read_text() == "a file"


def test_a_review_names_a_broken_configuration(run, tmp_path):
    shutil.copytree(run / "out", tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="^error: "):
        review.main([str(tmp_path / "out")])


def test_maps_are_of_a_model_for_the_classes_of_the_audit(run, scripts, weights, tmp_path):
    line = ["--pretrained", str(weights), "--num_workers", "0", "--backbone", "test_resnet", "--image_size", "64"]
    shutil.copytree(run / "out", tmp_path / "trained")
    assert review.RunImages(str(tmp_path / "trained")).model == tmp_path / "trained"
    for color in ("red", "blue"):
        for number in range(9):
            (tmp_path / "photos" / color).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32 + number, 32), color).save(tmp_path / "photos" / color / f"{number}.png")
    scripts[1]([str(tmp_path / "photos"), *line, "--output_dir", str(tmp_path / "trained")])
    assert review.RunImages(str(tmp_path / "trained")).model == tmp_path / "trained" / "_judge"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes, `train` and `test` with as many images; one of the test set is saved again in training."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "test"):
        for row in range(30):
            pixels = generator.integers(0, 255, (4, 4, 3)).astype(np.uint8)
            path = folder / split / "ab"[row % 2] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((64, 64), Image.BICUBIC).save(path)
    with Image.open(folder / "test" / "a" / "4.png") as image:
        image.save(folder / "train" / "b" / "copy.jpg", quality=75)
    (folder / "train" / "b" / "29.png").unlink()  # as many rows as in the test set
    return folder


def test_training_images_that_are_nearly_in_the_test_set_are_listed(photos, scripts, weights, tmp_path, capsys):
    line = [str(photos), "--backbone", "test_resnet", "--pretrained", str(weights), "--image_size", "64"]
    line += ["--num_workers", "0", "--device", "cpu"]
    scripts[1]([*line, "--output_dir", str(tmp_path / "without")])
    assert "Compared with" not in capsys.readouterr().out
    scripts[1]([*line, "--output_dir", str(tmp_path / "with"), "--compare_splits", "test"])
    shown, audited = capsys.readouterr().out, tmp_path / "with" / "_audit"
    without, table = load_audit(tmp_path / "without"), load_audit(tmp_path / "with")
    pd.testing.assert_frame_equal(table, without)
    assert "Compared with test: 30 images" in shown and f"1, see {audited / 'leaks.jsonl'}" in shown
    assert "(30 images;" in shown  # those of training were there
    (found,) = map(json.loads, (audited / "leaks.jsonl").read_text().splitlines())
    assert (found["split"], found["path"]) == ("train", str(photos / "train" / "b" / "copy.jpg"))
    assert (found["other_split"], found["other_path"]) == ("test", str(photos / "test" / "a" / "4.png"))
    assert table.set_index("index").loc[found["index"], "path"] == found["path"] and 0.95 <= found["cosine"] <= 1
    assert image_paths(load_noisy_dataset(str(photos))["test"])[found["other_index"]] == found["other_path"]
    assert json.loads((audited / "summary.json").read_text()) == {**without.attrs, "leaks": {"test": 1}}
    assert "leaks.jsonl" in (audited / "report.html").read_text(encoding="utf-8")

    clean = [*line, "--output_dir", str(tmp_path / "clean"), "--exclude", str(audited / "leaks.jsonl")]
    scripts[1]([*clean, "--compare_splits", "test"])
    shown = capsys.readouterr().out
    assert "(0 images;" in shown  # neither split has overwritten the features of the other
    assert len(load_audit(tmp_path / "clean")) == 29 and "leaks.jsonl" not in shown
    assert (tmp_path / "clean" / "_audit" / "leaks.jsonl").read_text() == ""


def test_splits_that_cannot_be_compared_are_refused_before_the_pass(
    photos, run, scripts, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(audit, "load_frozen", lambda audit_args: object())  # no pass could use it
    line = [str(photos), "--output_dir", str(tmp_path), "--compare_splits"]
    with pytest.raises(SystemExit, match="`--compare_splits tests train`: .* the dataset has the splits test[.]"):
        scripts[1]([*line, "test", "tests", "train"])
    with pytest.raises(SystemExit, match="the dataset has no split[.] `--splits` says where one lies"):
        scripts[1]([str(photos / "train"), *line[1:], "test"])
    with pytest.raises(SystemExit):
        scripts[1]([str(run / "out"), "--compare_splits", "test"])
    assert "--compare_splits takes the features" in capsys.readouterr().err


def asked_about(run):
    """Ids of all rows that a review of a run would show, issues or not."""
    queue = review.open_review(str(run)).queue
    return set(queue.index[queue.view(Query(scope="all"))].tolist())


def test_an_audit_goes_on_from_what_people_have_decided(run, scripts, weights, tmp_path, capsys):
    line = [str(run / "data"), "--backbone", "test_resnet", "--pretrained", str(weights), "--image_size", "64"]
    line += ["--num_workers", "0", "--output_dir", str(tmp_path / "out")]
    marks = tmp_path / "marks.csv"
    first, second = load_audit(run / "out")["index"][:2]
    marks.write_text(f"index,annotation,new_label\n{first},right,\n{second},wrong,\n")
    with pytest.raises(SystemExit, match="of the audit in --output_dir, and .*/out has none: give the folder of the"):
        scripts[1]([*line, "--annotations", str(marks)])
    scripts[1](line)
    capsys.readouterr()
    scripts[1]([*line, "--annotations", str(marks)])
    assert "(0 images;" in capsys.readouterr().out
    table = load_audit(tmp_path / "out").set_index("index")
    assert table.loc[[first, second], "noise_score"].tolist() == [0, 1]
    assert table.loc[[first, second], "annotation"].tolist() == ["right", "wrong"]
    assert asked_about(tmp_path / "out") == set(table.index) - {first, second}
    marks.write_text(f"index,annotation,new_label,new_label_name\n{first},wrong,-1,cheese\n{second},wrong,,\n")
    scripts[1]([*line, "--annotations", str(marks)])
    assert "classes that the dataset does not have, and teach nothing: `cheese` (1).\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scripts[1]([str(run / "out"), "--annotations", str(marks)])
    assert "`hnml clean` applies" in capsys.readouterr().err


def test_decisions_hold_in_a_folder_that_has_grown(photos, scripts, weights, tmp_path, capsys):
    """An image that comes first gives every sample another id; one that was annotated is gone."""
    shutil.copytree(photos / "train", tmp_path / "grown")
    line = [str(tmp_path / "grown"), "--backbone", "test_resnet", "--pretrained", str(weights), "--image_size", "64"]
    line += ["--num_workers", "0", "--output_dir", str(tmp_path / "out")]
    scripts[1](line)
    table = load_audit(tmp_path / "out")
    log = review.open_review(str(tmp_path / "out"))
    log.annotate([{"index": index, "annotation": "right"} for index in table["index"][:3].tolist()], "anna", "ab" * 6)
    first, second, gone = table["path"][:3]
    with Image.open(second) as image:
        image.rotate(90).save(Path(first).with_name("0-new.png"))
    Path(gone).unlink()
    capsys.readouterr()
    scripts[1]([*line, "--annotations", str(log.log.path)])
    assert f"1 annotation is left out, since the image is gone or has another label by now: {gone}" in (
        capsys.readouterr().out
    )
    again = load_audit(tmp_path / "out")
    assert set(again["path"][again["annotation"] == "right"]) == {first, second}
    assert (again["annotation"] != "").sum() == 2
    assert again.set_index("path").loc[first, "index"] != table.set_index("path").loc[first, "index"]
    clean.main([str(tmp_path / "out"), "--output_dir", str(tmp_path / "copy")])
    assert "2 annotated" in capsys.readouterr().out


def test_a_second_round_knows_what_people_decided_in_the_first(run, scripts, weights, tmp_path):
    """Of the corrected copy: what they confirmed and what they corrected is right now, and judged by nobody."""
    line = ["--backbone", "test_resnet", "--pretrained", str(weights), "--image_size", "64", "--num_workers", "0"]
    scripts[1]([str(run / "data"), *line, "--output_dir", str(tmp_path / "one")])
    table = load_audit(tmp_path / "one")
    first, second, third = table["index"][:3]
    true = next(name for name in table.attrs["class_names"] if name != table["label_name"][1])
    marks = tmp_path / "marks.csv"
    marks.write_text(
        f"index,annotation,new_label,new_label_name\n{first},right,,\n{second},wrong,,{true}\n{third},unsure,,\n"
    )
    copy = str(tmp_path / "copy")
    clean.main([str(tmp_path / "one"), "--annotations", str(marks), "--output_dir", copy])
    scripts[1]([copy, *line, "--output_dir", str(tmp_path / "two")])
    again = load_audit(tmp_path / "two").set_index("index")
    assert again.loc[second, "label_name"] == true
    assert again.loc[[first, second], "noise_score"].tolist() == [0, 0]
    assert again.loc[[first, second, third], "annotation"].tolist() == ["right", "right", ""]
    assert (again["annotation"] != "").sum() == 2
    assert asked_about(tmp_path / "two") == set(again.index) - {first, second}


def test_a_folder_of_a_run_is_scored_as_one(run, scripts, tmp_path):
    scripts[1]([str(run / "out"), "--output_dir", str(tmp_path)])
    assert (load_audit(tmp_path)["times_seen"] == 2).all()


def test_labels_that_are_all_different_are_refused_before_the_pass(scripts, weights, tmp_path, capsys):
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    line = [str(tmp_path / "data"), "--backbone", "test_resnet", "--pretrained", str(weights), "--image_size", "64"]
    with pytest.raises(SystemExit, match=r"No class has two different samples \(3 samples, 3 classes\)"):
        scripts[1]([*line, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "_features").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "give a dataset or the folder of a finished training run"),
        ("quickstart --dataset imagefolder", "are two datasets"),
        ("quickstart --pretrained none.safetensors", "none.safetensors"),
        ("quickstart --export csv excel", "--export excel is none of csv, cleanlab"),
        ("quickstart --device gpu", "--device gpu cannot be used here"),
        ("quickstart --num_workers -1", "--num_workers must be at least 0"),
        ("quickstart --model m --output_dir o --image_size 32", "--image_size is for the judge of a dataset; --model"),
        ("--run r --cache_dir c", "--cache_dir is for the judge of a dataset; a training run is scored by its own"),
    ],
)
def test_a_mistake_is_named_before_the_pass(line, message, scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        scripts[1](line.split())
    assert message in capsys.readouterr().err + str(end.value)
