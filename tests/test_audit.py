import csv
import json
import socket
import subprocess
import sys
import warnings

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    TimmCAMForImageClassification,
    TransformedDataset,
    audit_run,
    clean_dataset,
    collate_images,
    create_transforms,
    export_audit,
    load_audit,
    load_noisy_dataset,
    noise_scores,
    read_marks,
    run_records,
    score_model,
)
from hnml_hf.audit import (
    align_classes,
    check_dataset,
    cleanlab_issues,
    collect_evidence,
    escape_formula,
    num_suspects,
    score_predictions,
    write_audit,
)
from hnml_hf.sample_statistics import SampleStatistics


NAMES = ["left", "right", "bottom"]


def simulate(rate, *, n=3000, k=5, epochs=15, pair=False, seed=0, difficulty=1.0, memorized=0.0, held_out=0.0):
    """Noisy labels, a teacher that did not learn them by heart, and a student right as often as of one mind.

    Each sample has a true posterior from a softmax of Gaussian logits around its class. The teacher sees it tempered
    by half (a network on noisy labels is less sure than right); the student votes from it. Both repeat the given label
    of a share `memorized` of what they say, but not of the samples held out.
    """
    generator = np.random.default_rng(seed)
    clean = generator.integers(0, k, n)
    logits = generator.normal(size=(n, k)) * 1.2 * difficulty
    logits[np.arange(n), clean] += 4 * generator.random(n) ** 0.5
    posterior = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    cumulated = posterior.cumsum(-1)[:, :-1]

    def draw():
        return (generator.random((n, 1)) > cumulated).sum(-1)

    clean = draw()
    wrong = generator.random(n) < rate
    shift = np.ones(n, int) if pair else generator.integers(1, k, n)
    labels = np.where(wrong, (clean + shift) % k, clean)
    soft = posterior**0.5
    soft /= soft.sum(-1, keepdims=True)
    spared = np.arange(n) < held_out * n
    known = memorized * ~spared[:, None]
    soft = (1 - known) * soft + known * np.eye(k)[labels]
    statistics = SampleStatistics(np.arange(n) * 3 + 7, labels, k, held_out=spared)
    for epoch in range(epochs):
        voted = np.where(np.random.default_rng(epoch).random(n) < known[:, 0], labels, draw())
        statistics.update(statistics.ids, soft, epoch=epoch, voted=voted)
    return statistics.records, clean, labels


@pytest.mark.parametrize("rate", [0.2, 0.4])
def test_labels_held_out_tell_the_rate_of_a_run_that_knows_the_others_by_heart(rate):
    records, clean, labels = simulate(rate, memorized=0.6, held_out=0.15)
    wrong = clean != labels
    table = noise_scores(records, list("abcde"))
    low, high = table.attrs["noise_rate_interval"]
    assert abs(table.attrs["noise_rate"] - wrong.mean()) < 0.06 and low <= wrong.mean() <= high
    assert abs(table["noise_score"].mean() - table.attrs["noise_rate"]) < 1e-6
    matrix = np.array(table.attrs["transition_matrix"])
    assert abs(1 - matrix.diagonal().mean() - wrong.mean()) < 0.08
    blind = records.copy()
    blind["held_out"] = False
    fooled = noise_scores(blind, list("abcde"))
    assert fooled.attrs["noise_rate"] < wrong.mean() - 0.1
    assert (fooled["rank"] == table["rank"]).all()  # the order is the same, what it means is not


@pytest.mark.parametrize(("rate", "pair"), [(0.0, False), (0.2, False), (0.5, False), (0.35, True)])
def test_rate_matrix_and_scores_are_right_without_being_told_a_rate(rate, pair):
    records, clean, labels = simulate(rate, pair=pair)
    table = noise_scores(records, list("abcde"))
    wrong = clean != labels
    low, high = table.attrs["noise_rate_interval"]
    assert abs(table.attrs["noise_rate"] - wrong.mean()) < 0.06
    assert low <= table.attrs["noise_rate"] <= high
    matrix = np.array(table.attrs["transition_matrix"])
    true = np.stack([np.bincount(labels[clean == c], minlength=5) / (clean == c).sum() for c in range(5)])
    np.testing.assert_allclose(matrix.sum(-1), 1)
    assert np.abs(matrix - true).max() < 0.12
    bounds = np.array(table.attrs["transition_matrix_interval"])
    assert (bounds[0] <= matrix).all() and (matrix <= bounds[1]).all()
    score = table["noise_score"].to_numpy()
    assert ((score >= 0) & (score <= 1)).all()
    assert sorted(table["rank"]) == list(range(1, len(table) + 1))
    bins = np.minimum((score * 10).astype(int), 9)
    calibration = sum(abs(score[bins == b].mean() - wrong[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert calibration < 0.08
    if rate:
        margin = records["candidates"].max(-1) - records["given"]
        ours = roc_auc_score(wrong, -table["rank"])
        assert ours > 0.85 and ours >= roc_auc_score(wrong, margin) - 0.01


def test_the_channel_beats_the_margin_where_one_class_is_renamed():
    """Half of class 0 is called 1: the channel learns that a 1 may be a 0, the margin does not know."""
    records, clean, labels = simulate(0.4, pair=True, seed=1)
    table = noise_scores(records, list("abcde"))
    margin = records["candidates"].max(-1) - records["given"]
    wrong = clean != labels
    assert roc_auc_score(wrong, -table["rank"]) > roc_auc_score(wrong, margin)
    found = table["suggested_label"].to_numpy()[wrong] == clean[wrong]
    assert found.mean() > 0.7


def test_scores_do_not_depend_on_the_order_of_rows_and_repeat():
    records, _, _ = simulate(0.3, n=400)
    one, two = noise_scores(records, list("abcde")), noise_scores(records, list("abcde"))
    pd.testing.assert_frame_equal(one, two)
    assert one.attrs == two.attrs
    assert (one.sort_values("rank")["noise_score"].diff().dropna() <= 1e-12).all()


def test_unseen_samples_get_the_rate_and_the_last_ranks():
    records, _, _ = simulate(0.3, n=400)
    records = records.copy()
    records["times_seen"][:5] = 0
    table = noise_scores(records, list("abcde"))
    assert (table["noise_score"][:5] == table.attrs["noise_rate"]).all()
    assert set(table["rank"][:5]) == set(range(396, 401))
    assert table["given_probability"][:5].isna().all()
    assert (table["suggested_label"][:5] == table["label"][:5]).all()


def test_more_classes_than_are_followed():
    generator = np.random.default_rng(0)
    k, n = 40, 800
    clean = generator.integers(0, k, n)
    labels = np.where(generator.random(n) < 0.25, generator.integers(0, k, n), clean)
    statistics = SampleStatistics(np.arange(n), labels, k)
    for epoch in range(6):
        p = generator.dirichlet(np.full(k, 0.3), n) * 0.5
        p[np.arange(n), clean] += 0.5
        statistics.update(np.arange(n), p, epoch=epoch)
    table = noise_scores(statistics.records, [str(i) for i in range(k)])
    assert roc_auc_score(labels != clean, table["noise_score"]) > 0.95
    assert abs(table.attrs["noise_rate"] - (labels != clean).mean()) < 0.06


def test_runs_without_scores_and_bad_records():
    records, _, _ = simulate(0.3, n=50)
    with pytest.raises(ValueError, match="not one was seen"):
        noise_scores(SampleStatistics(np.arange(3), np.zeros(3, int), 2).records, ["a", "b"])
    with pytest.raises(ValueError, match="has label 4, but the model knows 3 classes|has label 3, but"):
        noise_scores(records, NAMES)
    twice = np.concatenate([records, records[:1]])
    with pytest.raises(ValueError, match="Sample id 7 occurs more than once"):
        noise_scores(twice, list("abcde"))


# -- a small dataset, with and without a trainer ----------------------------------------------------------------------


@pytest.fixture
def scored(tiny_dataset):
    """Scores as from a good model: probability 0.8 on the true class, over three epochs."""
    clean = np.array(tiny_dataset["clean_label"])
    probabilities = np.full((48, 3), 0.1)
    probabilities[np.arange(48), clean] = 0.8
    statistics = SampleStatistics(np.array(tiny_dataset["index"]), np.array(tiny_dataset["label"]), 3)
    for epoch in range(3):
        statistics.update(np.array(tiny_dataset["index"]), probabilities, epoch=epoch)
    return statistics.records


def build_model():
    torch.manual_seed(0)
    return TimmCAMForImageClassification.from_timm(
        "test_resnet", id2label=dict(enumerate(NAMES)), image_size=32, output_stride=8
    )


def test_a_run_leaves_statistics_and_they_survive_a_kill(tiny_dataset, tmp_path):
    """Interrupted after an odd step and resumed, every sample is seen once an epoch, with the same statistics."""

    def train(folder, resume=None, stop=None):
        model = build_model()
        transform, _ = create_transforms(model.config.pretrained_cfg, augmentation="none")
        args = HNMLTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=20,  # the last batch of an epoch is smaller
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_num_workers=0,
            gauge_fraction=0,  # the mask level from the first step
        )
        trainer = HNMLTrainer(
            model=model,
            args=args,
            train_dataset=TransformedDataset(tiny_dataset, transform),
            data_collator=collate_images,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole")
    records = run_records(tmp_path / "whole")
    assert (records["times_seen"] == 3).all() and (records["last_epoch"] == 2).all()
    assert sorted(records["index"]) == sorted(tiny_dataset["index"])
    assert (records["foreground_seen"] == 3).all()
    total = records["given"] + records["candidates"].sum(-1)
    np.testing.assert_allclose(total, 1, rtol=1e-4)
    resumed = train(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert (resumed.statistics.records["times_seen"] == 3).all()
    for name in records.dtype.names:
        np.testing.assert_allclose(resumed.statistics.records[name], whole.statistics.records[name], atol=1e-5)


WORKER = """
import sys
import numpy as np, torch
from datasets import load_from_disk
from hnml_hf import *

torch.manual_seed(0)
model = TimmCAMForImageClassification.from_timm("test_vit", num_labels=3, image_size=32, patch_size=8)
transform, _ = create_transforms(model.config.pretrained_cfg, augmentation="none")
args = HNMLTrainingArguments(
    output_dir=sys.argv[1] + "/out", per_device_train_batch_size=4, num_train_epochs=3, save_strategy="no",
    report_to="none", disable_tqdm=True, use_cpu=True,
)
data = TransformedDataset(load_from_disk(sys.argv[1] + "/data"), transform)
trainer = HNMLTrainer(model=model, args=args, train_dataset=data, data_collator=collate_images)
trainer.train()
assert args.world_size == 2 and (trainer.statistics is not None) == trainer.is_world_process_zero()
"""


@pytest.mark.slow
def test_two_processes_see_every_sample_once_an_epoch(tiny_dataset, tmp_path):
    """29 images in batches of 2 x 4: the last batch is filled up with 3 images that came before."""
    tiny_dataset.select(range(29)).save_to_disk(tmp_path / "data")
    (tmp_path / "worker.py").write_text(WORKER)
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --mixed_precision no --dynamo_backend no"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        *launch.split(),
        "--main_process_port",
        str(port),
        tmp_path / "worker.py",
        tmp_path,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    records = run_records(tmp_path / "out")
    assert sorted(records["index"]) == sorted(tiny_dataset["index"][:29])
    assert (records["times_seen"] == 3).all() and (records["foreground_seen"] == 3).all()
    np.testing.assert_allclose(records["given"] + records["candidates"].sum(-1), 1, rtol=1e-4)


def test_audit_of_a_run_and_its_report(tiny_dataset, scored, tmp_path):
    model = build_model()
    _, transform = create_transforms(model.config.pretrained_cfg)
    table = audit_run(
        tmp_path, scored, tiny_dataset, transform=transform, model=model, source="tiny", provenance="test"
    )
    wrong = set(
        np.array(tiny_dataset["index"])[np.array(tiny_dataset["label"]) != np.array(tiny_dataset["clean_label"])]
    )
    assert set(table.loc[table["noise_score"] >= 0.5, "index"]) == wrong
    assert {p.name for p in (tmp_path / "_audit").iterdir()} == {"noise_scores.parquet", "summary.json", "report.html"}
    loaded = load_audit(tmp_path)
    pd.testing.assert_frame_equal(loaded, table)
    assert loaded.attrs == table.attrs == json.loads((tmp_path / "_audit" / "summary.json").read_text())
    pd.testing.assert_frame_equal(load_audit(tmp_path / "_audit" / "noise_scores.parquet"), table)
    page = (tmp_path / "_audit" / "report.html").read_text()
    assert page.count('"given_map"') == 48 and "tiny" in page


def test_evidence_follows_the_order_and_survives_bad_images(tiny_dataset, scored, tmp_path):
    for row, image in enumerate(tiny_dataset["image"]):
        image.save(tmp_path / f"{row}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes((tmp_path / "4.png").read_bytes()[:200])
    paths = [str(tmp_path / f"{row}.png") for row in range(48)]
    dataset = tiny_dataset.remove_columns("image").add_column("image", paths).cast_column("image", datasets.Image())
    model = build_model()
    _, transform = create_transforms(model.config.pretrained_cfg)
    table = audit_run(tmp_path, scored, dataset, transform=transform, model=model)
    assert table.set_index("index").loc[dataset["index"][5], "path"] == paths[5]
    evidence = collect_evidence(dataset, table, transform=transform, model=model, batch_size=7)
    at = dict(zip(table["index"], evidence, strict=True))
    for row, reason in ((1, "UnidentifiedImageError"), (2, "FileNotFoundError"), (3, "")):
        assert at[dataset["index"][row]].image is None and reason in at[dataset["index"][row]].reason
    good = at[dataset["index"][5]]
    assert np.array_equal(np.asarray(good.image), np.asarray(tiny_dataset[5]["image"]))
    model.eval()
    with torch.no_grad():
        given = torch.tensor([tiny_dataset[5]["label"]])
        cams = model(pixel_values=transform(tiny_dataset[5]["image"])[None], cam_classes=given).cams[0].relu()
    np.testing.assert_allclose(good.given_map, cams / (cams.max() + 1e-5), atol=1e-5)
    page = (tmp_path / "_audit" / "report.html").read_text()
    assert page.count("FileNotFoundError") == 1


def test_a_dataset_that_has_changed_is_refused(tiny_dataset, scored, tmp_path):
    table = noise_scores(scored, NAMES)
    check_dataset(table, tiny_dataset)
    check_dataset(table, tiny_dataset.shuffle(seed=1))
    with pytest.raises(ValueError, match="has changed since it was scored: 2 scored rows are gone, 0 are new"):
        check_dataset(table, tiny_dataset.select(range(46)))
    labels = [(tiny_dataset[0]["label"] + 1) % 3, *tiny_dataset["label"][1:]]
    other = tiny_dataset.remove_columns("label").add_column("label", labels, feature=tiny_dataset.features["label"])
    with pytest.raises(ValueError, match="0 are new, 1 have another label"):
        check_dataset(table, other)
    renamed = tiny_dataset.cast_column("label", datasets.ClassLabel(names=["x", "y", "z"]))
    with pytest.raises(ValueError, match="its classes are"):
        check_dataset(table, renamed)
    with pytest.raises(ValueError, match="has changed"):
        audit_run(tmp_path, scored, other, transform=lambda image: image)


def test_files_that_are_no_audit(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no `_audit/noise_scores.parquet`"):
        load_audit(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no scores of samples"):
        run_records(tmp_path)
    (tmp_path / "noise_scores.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a table of noise scores"):
        load_audit(tmp_path)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "noise_scores.parquet")
    with pytest.raises(ValueError, match="is not a table of noise scores"):
        load_audit(tmp_path)


# -- any model --------------------------------------------------------------------------------------------------------


def test_one_pass_of_any_classifier(tiny_dataset):
    """A classifier that looks at the bright quarter, with its classes in another order and one more."""

    def classify(pixels):
        quarters = torch.stack([pixels[:, :, :16, :16], pixels[:, :, :16, 16:], pixels[:, :, 16:, :16]], -1)
        brightness = quarters.mean((1, 2, 3)) * 12
        return torch.stack([brightness[:, 2], brightness[:, 0], torch.zeros(len(pixels)), brightness[:, 1]], -1)

    def transform(image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255

    records = score_model(tiny_dataset, classify, transform, ["bottom", "left", "sky", "right"], batch_size=10)
    table = noise_scores(records, NAMES).set_index("index").loc[tiny_dataset["index"]]
    wrong = np.array(tiny_dataset["label"]) != np.array(tiny_dataset["clean_label"])
    assert roc_auc_score(wrong, table["noise_score"]) > 0.99
    assert (table["suggested_label"].to_numpy()[wrong] == np.array(tiny_dataset["clean_label"])[wrong]).all()
    assert (table["times_seen"] == 1).all()


def test_images_that_cannot_be_read_have_no_score_of_their_own():
    seen = np.array([True] * 9 + [False])
    p = np.tile([[0.9, 0.1]], (10, 1))
    records = score_predictions(np.arange(10), np.array([0] * 8 + [1, 0]), p, seen=seen)
    table = noise_scores(records, ["a", "b"])
    assert table["times_seen"].tolist() == [1] * 9 + [0] and table["rank"].iloc[9] == 10


def test_classes_are_matched_by_name():
    assert align_classes(["b", "c", "a"], ["a", "b"]).tolist() == [2, 0]
    assert align_classes(["LABEL_0", "LABEL_1"], ["cat", "dog"]).tolist() == [0, 1]
    assert align_classes(["0", "1"], ["cat", "dog"]).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"does not know 1 of the dataset's 2 classes: \['dog'\]"):
        align_classes(["cat", "bird", "fish"], ["cat", "dog"])


# -- exports and cleaning ---------------------------------------------------------------------------------------------


def test_number_of_suspects():
    table = pd.DataFrame({"noise_score": np.linspace(0, 1, 1000)})
    assert num_suspects(table) == 500 and num_suspects(table, 100) == 100
    assert num_suspects(table.head(30)) == 30 and num_suspects(table.head(300)) == 48


def test_formulas_are_escaped(tiny_dataset, scored, tmp_path):
    table = noise_scores(scored, ["=1+1", "@x", "plain"], paths=["+a.png"] * 48)
    table["path"] = "-b.png"
    for value in ("=1", "+1", "-1", "@a", "\tx", "\rx"):
        assert escape_formula(value) == f"'{value}"
    assert escape_formula("a=1") == "a=1" and escape_formula(-1) == -1
    from hnml_hf.audit import export_csv

    with open(export_csv(table, tmp_path / "t.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48 and rows[0]["rank"] == "1"
    for row in rows:
        assert row["path"] == "'-b.png"
        assert row["label_name"] in ("'=1+1", "'@x", "plain")


def test_exports_for_other_tools(tiny_dataset, scored, tmp_path):
    table = noise_scores(scored, NAMES)
    files = export_audit(table, tiny_dataset, tmp_path / "exports")
    assert all(file.exists() for file in files) and len(files) == 4
    issues = pd.read_csv(tmp_path / "exports" / "cleanlab_issues.csv", index_col="index")
    wrong = np.array(tiny_dataset["label"]) != np.array(tiny_dataset["clean_label"])
    assert set(issues.index[issues["is_label_issue"]]) == set(np.array(tiny_dataset["index"])[wrong])
    assert (issues["label_score"][issues["is_label_issue"]] < 0.5).all()

    labels = json.loads((tmp_path / "exports" / "fiftyone" / "labels.json").read_text())
    where = json.loads((tmp_path / "exports" / "fiftyone" / "data.json").read_text())
    assert labels["classes"] == NAMES and len(labels["labels"]) == 48 and set(where) == set(labels["labels"])
    first = str(tiny_dataset[0]["index"])
    assert labels["labels"][first]["label"] == tiny_dataset[0]["label"]
    with Image.open(where[first]) as image:
        assert np.array_equal(np.asarray(image), np.asarray(tiny_dataset[0]["image"]))

    content = json.loads((tmp_path / "exports" / "datumaro" / "annotations" / "default.json").read_text())
    assert [c["name"] for c in content["categories"]["label"]["labels"]] == NAMES
    item = next(item for item in content["items"] if item["id"] == first)
    assert item["annotations"][0]["label_id"] == tiny_dataset[0]["label"] and item["image"]["path"] == where[first]
    with pytest.raises(ValueError, match="none of csv, cleanlab, fiftyone, datumaro"):
        export_audit(table, tiny_dataset, tmp_path, ["excel"])


def test_cleanlab_columns_are_those_of_datalab(tiny_dataset, scored):
    cleanlab = pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    table = noise_scores(scored, NAMES).set_index("index").loc[tiny_dataset["index"]].reset_index()
    labels, probabilities = np.array(tiny_dataset["label"]), np.full((48, 3), 0.1)
    probabilities[np.arange(48), tiny_dataset["clean_label"]] = 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, on pandas
        lab = cleanlab.Datalab({"label": labels}, label_name="label", task="classification", verbosity=0)
        lab.find_issues(pred_probs=probabilities, issue_types={"label": {}})
    theirs, ours = lab.get_issues("label"), cleanlab_issues(table)
    assert list(theirs.columns) == list(ours.columns)
    assert (theirs["is_label_issue"].to_numpy() == ours["is_label_issue"].to_numpy()).all()
    assert (theirs["predicted_label"].to_numpy() == ours["predicted_label"].to_numpy()).all()


@pytest.fixture
def table(scored, tmp_path):
    table = noise_scores(scored, NAMES)
    write_audit(tmp_path / "_audit", table)
    return table


def write_marks(path, rows, header="index,mark,new_label,new_label_name"):
    path.write_text("\r\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\r\n", encoding="utf-8")
    return path


def test_marks_that_are_no_text_are_named_by_line(table, tmp_path):
    path = tmp_path / "marks.csv"
    path.write_bytes(b"index,mark,new_label\n\xff\xfe,wrong,1\n")
    with pytest.raises(ValueError, match=r"marks.csv:1: no CSV in UTF-8"):
        read_marks(path, table)
    path.write_text("index,mark,new_label\n" + "1" * 200_000 + ",wrong,1\n")
    with pytest.raises(ValueError, match=r"marks.csv:2: no CSV in UTF-8"):
        read_marks(path, table)


def test_marks_are_checked(table, tmp_path):
    good = int(table["index"][0])
    marks = read_marks(write_marks(tmp_path / "m.csv", [(good, "wrong", 2, "bottom")]), table)
    assert marks.loc[good].tolist() == ["wrong", 2]
    for rows, message in (
        ([(good, "right", 0, ""), (5, "wrong", 0, "")], "m.csv:3: sample id 5 is not among the scored"),
        ([(good, "right", 0, ""), (good, "wrong", 0, "")], "m.csv:3: sample id .* is marked twice"),
        ([(good, "maybe", 0, "")], "m.csv:2: the mark 'maybe' is none of wrong, right, unsure"),
        ([(good, "wrong", 3, "")], "m.csv:2: `new_label` 3 is none of the 3 classes"),
        ([("x", "wrong", 0, "")], "m.csv:2: `index` and `new_label` must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            read_marks(write_marks(tmp_path / "m.csv", rows), table)
    with pytest.raises(ValueError, match="m.csv:1: no column mark, new_label"):
        read_marks(write_marks(tmp_path / "m.csv", [], header="index,x"), table)


def test_cleaned_datasets_keep_their_lineage(tiny_dataset, table, tmp_path):
    clean, given = np.array(tiny_dataset["clean_label"]), np.array(tiny_dataset["label"])
    relabelled = clean_dataset(tiny_dataset, table, how="relabel")
    assert relabelled["label"][:] == clean.tolist() and relabelled["original_label"][:] == given.tolist()
    assert relabelled["index"][:] == tiny_dataset["index"][:]
    assert [a == "relabelled" for a in relabelled["audit_action"]] == (clean != given).tolist()
    dropped = clean_dataset(tiny_dataset, table, how="drop")
    assert dropped["index"][:] == np.array(tiny_dataset["index"])[clean == given].tolist()
    weighted = clean_dataset(tiny_dataset, table, how="weight")
    assert len(weighted) == 48 and weighted["label"][:] == given.tolist()
    assert (np.array(weighted["weight"])[clean != given] < 0.5).all()
    assert np.array_equal(
        np.asarray(dropped[0]["image"]), np.asarray(tiny_dataset[int((clean == given).argmax())]["image"])
    )

    dropped.save_to_disk(tmp_path / "cleaned")
    again = load_noisy_dataset(str(tmp_path / "cleaned"))["train"]
    assert again["label"][:] == dropped["label"][:] and again["index"][:] == dropped["index"][:]
    with pytest.raises(ValueError, match="Nothing to do"):
        clean_dataset(tiny_dataset, table)
    with pytest.raises(ValueError, match="none of drop, relabel, weight"):
        clean_dataset(tiny_dataset, table, how="burn")
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        clean_dataset(tiny_dataset, table, how="drop", threshold=2)


def test_marks_go_before_scores(tiny_dataset, table, tmp_path):
    suspects = table.sort_values("rank")["index"].tolist()
    right, wrong = suspects[0], suspects[-1]  # both against the score
    to = (int(table.set_index("index").loc[wrong, "label"]) + 1) % 3
    marks = read_marks(write_marks(tmp_path / "m.csv", [(right, "right", 0, ""), (wrong, "wrong", to, "")]), table)
    cleaned = clean_dataset(tiny_dataset, table, how="drop", marks=marks).to_pandas().set_index("index")
    assert right in cleaned.index and cleaned.loc[wrong, "label"] == to
    assert cleaned.loc[[right, wrong], "audit_action"].tolist() == ["marked", "marked"]
    only = clean_dataset(tiny_dataset, table, marks=marks)
    changed = np.array(only["label"]) != np.array(only["original_label"])
    assert np.array(only["index"])[changed].tolist() == [wrong]
