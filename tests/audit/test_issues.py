import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Image
from PIL import Image as Pillow
from safetensors.torch import save_file

from hnml_hf import create_transforms, find_label_issues, load_audit
from hnml_hf.audit.features import extract_features, load_backbone
from hnml_hf.audit.issues import as_dataset, judge_classifier, judge_dataset, judge_features, worst_pairs
from hnml_hf.audit.judge import fit_head
from hnml_hf.audit.run import write_report
from hnml_hf.audit.table import likely_classes, write_audit


COLORS = {"blue": (20, 20, 200), "green": (20, 200, 20), "red": (200, 20, 20)}
FEATURES = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
WRONG = [0, 4, 20]  # rows whose label is another color's


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def colored(tmp_path_factory) -> pd.DataFrame:
    """60 images of one color and some noise; three have a wrong label."""
    folder, generator, rows = tmp_path_factory.mktemp("colors"), np.random.default_rng(0), []
    names = sorted(COLORS)
    for row in range(60):
        pixels = np.array(COLORS[names[row % 3]]) + generator.integers(-20, 20, (32, 32, 3))
        Pillow.fromarray(pixels.astype(np.uint8)).save(folder / f"{row}.png")
        given = names[(row + (row in WRONG)) % 3]
        rows.append({"image": str(folder / f"{row}.png"), "label": given})
    return pd.DataFrame(rows)


def options(weights) -> dict:
    return {"backbone": "test_resnet", "pretrained": weights, "image_size": 64, "num_workers": 0}


def test_a_table_of_paths(colored, weights, tmp_path):
    issues = find_label_issues(colored, **options(weights))
    assert len(issues) == 60 and sorted(issues["index"][:3]) == WRONG
    first = issues[issues["index"] == 0].iloc[0]
    assert (first["label_name"], first["suggested_name"]) == ("green", "blue") and first["path"].endswith("0.png")
    assert (issues["rank"].to_numpy() == np.arange(1, 61)).all()
    assert issues.attrs["class_names"] == sorted(COLORS)
    low, high = issues.attrs["noise_rate_interval"]
    assert low <= 3 / 60 <= high and low <= issues.attrs["noise_rate"] <= high
    pd.testing.assert_frame_equal(load_audit(write_audit(tmp_path, issues)), issues.reset_index(drop=True))


def test_a_dataset_a_folder_and_names_of_columns(colored, weights, tmp_path):
    expected = find_label_issues(colored, **options(weights))
    data = Dataset.from_pandas(colored.rename(columns={"image": "photo", "label": "kind"}))
    found = find_label_issues(data, image_column="photo", label_column="kind", **options(weights))
    pd.testing.assert_frame_equal(found, expected)
    for row, sample in colored.iterrows():
        folder = tmp_path / sample["label"]
        folder.mkdir(exist_ok=True)
        shutil.copy(sample["image"], folder / f"{row}.png")
    found = find_label_issues(tmp_path, **options(weights))
    assert {path.rsplit("/", 1)[1] for path in found["path"][:3]} == {f"{row}.png" for row in WRONG}


def test_features_and_labels_without_images():
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    features = generator.normal(size=(300, 8)) + 6 * np.eye(8)[labels]
    given = np.array(["x", "y", "z"])[np.where(np.arange(300) < 9, (labels + 1) % 3, labels)]
    issues = find_label_issues((features, given))
    assert sorted(issues["index"][:9]) == list(range(9))
    assert issues.attrs["class_names"] == ["x", "y", "z"] and issues["suggested_name"].iloc[0] in "xyz"
    pairs = worst_pairs(issues, 3)
    assert {pair[:2] for pair in pairs} == {("y", "x"), ("z", "y"), ("x", "z")}
    assert all(number == pytest.approx(3, abs=1.5) for _, _, number in pairs)


def test_few_labels_of_a_class_tell_a_range_alone():
    generator = np.random.default_rng(0)
    few = "with {} of each class, on average, it is often far off"
    for count, words in (
        (4, few.format("1 label")),
        (30, few.format("10 labels")),
        (89, few.format("29 labels")),
        (180, None),
    ):
        labels = np.arange(count) % 3
        issues = find_label_issues((generator.normal(size=(len(labels), 8)) + 6 * np.eye(8)[labels], labels))
        low, high = issues.attrs["noise_rate_interval"]
        assert words is None or f"only its range counts, {low:.0%} to {high:.0%}." in issues.attrs["caution"]
        assert issues.attrs["caution"] is None if words is None else words in issues.attrs["caution"]


def test_a_row_without_a_readable_image_keeps_its_place(colored, weights, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    data = colored.copy()
    data.loc[7, "image"] = str(broken)
    issues = find_label_issues(data, **options(weights)).set_index("index")
    assert len(issues) == 60 and issues.loc[7, "times_seen"] == 0
    assert issues.loc[7, "noise_score"] == pytest.approx(issues.attrs["noise_rate"])
    assert issues.loc[7, "rank"] == 60


def broken(data: pd.DataFrame, rows, folder) -> pd.DataFrame:
    """The same with files that are no images in some rows."""
    paths = data["image"].copy()
    for row in np.flatnonzero(rows):
        paths[row] = str(folder / f"{row}.png")
        (folder / f"{row}.png").write_bytes(b"no image")
    return data.assign(image=paths)


def test_unreadable_images_are_counted_and_classes_without_any_other_are_named(colored, weights, tmp_path, caplog):
    data = broken(colored, colored["label"] == "blue", tmp_path)
    issues = find_label_issues(data, **options(weights))
    first = data["image"][data["label"] == "blue"].iloc[0]
    assert f"20 images cannot be read, the first is {first}." in caplog.text
    caution = "No image of 1 class can be read (blue): the noise rate is that of the others."
    assert caution in issues.attrs["caution"] and caution in caplog.text
    data = broken(colored, colored["label"] != "red", tmp_path)
    with pytest.raises(ValueError, match="one class with a readable image, `red`; .* takes at least two classes"):
        find_label_issues(data, **options(weights))


def test_missing_files_of_a_table_are_an_error(colored, tmp_path):
    paths = colored["image"].where(np.arange(60) % 3 == 0, str(tmp_path / "none.png"))
    message = "Row 1, column `image`: no such image: 40 of 60 rows, first: .*none.png"
    for data in (colored.assign(image=paths), Dataset.from_pandas(colored.assign(image=paths))):
        with pytest.raises(ValueError, match=message):
            as_dataset(data)


def test_a_column_may_mix_paths_bytes_and_images(colored):
    images = colored["image"].tolist()
    images[0], images[1] = Path(images[0]), Path(images[1]).read_bytes()
    with Pillow.open(images[2]) as image:
        images[2] = image.copy()
    mixed = as_dataset(colored.assign(image=images))
    assert mixed[:4]["image"] == as_dataset(colored)[:4]["image"]


def test_people_decide_and_the_judge_learns_from_it(colored, weights, tmp_path):
    dataset, backbone = as_dataset(colored), load_backbone("test_resnet", pretrained=weights, image_size=64)
    features = extract_features(dataset, backbone, cache_dir=tmp_path, num_workers=0)
    before = judge_dataset(dataset, features)
    rows = [(0, "wrong", 0, "blue"), (1, "right", 1, "green"), (2, "unsure", -1, ""), (3, "wrong", -1, "pink")]
    columns = ["index", "annotation", "new_label", "new_label_name"]
    annotations = pd.DataFrame(rows, columns=columns).set_index("index").assign(annotator="a")
    after = judge_dataset(dataset, features, annotations=annotations)
    assert after["noise_score"][[0, 1, 3]].tolist() == [1, 0, 1]
    assert after["annotation"][:5].tolist() == ["wrong", "right", "unsure", "wrong", ""]
    assert after["suggested_name"][0] == "blue" and after["rank"][1] == 60
    assert 0 < after["noise_score"][2] < 0.5 and (after["noise_score"][4:] != before["noise_score"][4:]).any()
    folder = write_report(tmp_path, after, dataset)
    shown = json.loads(re.search(r'id="data">(.*?)</script>', (folder / "report.html").read_text(), re.S)[1])
    assert {item["id"] for item in shown["items"] if item["before"]} == {0, 1, 3}


def test_the_judge_is_left_as_a_model(colored, weights, tmp_path):
    data, broken = as_dataset(colored), tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    paths = [*colored["image"][:-1], str(broken)]  # the last image has no features
    data = data.remove_columns("image").add_column("image", paths).cast_column("image", Image())
    backbone = load_backbone("test_resnet", pretrained=weights, image_size=64)
    features = extract_features(data, backbone, cache_dir=tmp_path, num_workers=0)
    judgement = judge_features(data, features)
    model = judge_classifier(data, features, judgement, backbone)
    assert list(model.config.id2label.values()) == sorted(COLORS)
    width = model.class_weights.shape[1]
    head = fit_head(features.values[:-1, :width], judgement, num_labels=3)
    _, prepare = create_transforms(model.config.pretrained_cfg, augmentation="none")
    images = [Pillow.open(path).convert("RGB") for path in paths[:-1]]
    with torch.no_grad():
        logits = model(torch.stack([prepare(image) for image in images])).logits
    expected = torch.tensor(features.values[:-1, :width]) @ head.weight.T + head.bias
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-2)
    truth = (np.arange(60) % 3)[:-1]
    assert (logits.argmax(1).numpy() == truth).all() and (data["label"][:-1] != truth).sum() == len(WRONG)

    said = {"annotation": ["wrong"], "new_label": [-1], "new_label_name": [""]}
    elsewhere = pd.DataFrame(said, index=pd.Index([7], name="index"))
    judgement = judge_features(data, features, annotations=elsewhere)
    model = judge_classifier(data, features, judgement, backbone, annotations=elsewhere)
    seen = np.arange(59) != 7
    head = fit_head(features.values[:-1, :width], judgement, num_labels=3, weights=seen.astype(np.float32))
    torch.testing.assert_close(model.class_weights, head.weight)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "give a path, a DataFrame"),
        (pd.DataFrame({"a": [1], "label": [0]}), "looks like the image: name it by `image_column`"),
        ("", "`name_or_path` is empty"),
        (pd.DataFrame({"image": ["a", "b"], "label": ["x", None]}), "Row 1 has no label"),
        (pd.DataFrame({"image": ["a", "b"], "label": ["x", " "]}), "Row 1 has no label"),
        (
            pd.DataFrame({"image": ["a", "b"], "label": ["x", ["x"]]}),
            r"Row 1, column `label`: the label \"\['x'\]\" is",
        ),
        (
            pd.DataFrame({"image": ["a", "b"], "kind": [0, 1], "label": [np.eye(2), np.eye(2)]}),
            "Row 0, column `label`",
        ),
        (pd.DataFrame({"image": ["a", "b"], "label": [1.0, 0.5]}), "the label '0.5' is not a class"),
        (Dataset.from_dict({"image": ["a", "b"], "label": [["x"], ["x", "y"]]}), "Row 0, column `label`"),
        (Dataset.from_dict({"image": ["a", "b"], "label": [{"x": 1}, {"x": 2}]}), "Row 0, column `label`"),
        (pd.DataFrame({"image": ["a", "b"], "label": ["x", "x"]}), "have one class, `x`"),
        (pd.DataFrame({"image": [], "label": []}), "have no rows"),
        (pd.DataFrame({"img": [3, 4], "label": ["x", "y"]}), "Row 0, column `img`: .* int"),
        (Dataset.from_dict({"image": [3, 4], "label": ["x", "y"]}), "column of images is of the type int64"),
        (pd.DataFrame({"image": ["a"] * 3, "label": [0, 1, 1], "index": [7, 7, 8]}), "another for each"),
        (Dataset.from_dict({"image": ["a"] * 3, "label": [0, 1, 1], "index": ["u", "v", "w"]}), "whole number"),
        (
            pd.DataFrame({"image": ["a"] * 3, "label": [4, 7, 2]}),
            r"two different samples \(3 samples, 3 classes, by the column `label`\).*, or another column of labels",
        ),
        (
            Dataset.from_dict({"image": ["a", "b"], "label": [0, -1]}).cast_column("label", ClassLabel(names=["x"])),
            "Row 1 has no label",
        ),
    ],
)
def test_bad_input_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        as_dataset(data)


@pytest.mark.parametrize(
    ("given", "labels", "names"),
    [
        ([2.0, 10.0, 2.0], [0, 1, 0], ["2", "10"]),  # as pandas writes numbers in a column that had empty cells
        ([" b", "a", "b "], [1, 0, 1], ["a", "b"]),
        ([True, False, True], [1, 0, 1], ["0", "1"]),
        (["True", "False", "True"], [1, 0, 1], ["False", "True"]),
        (["b", 1, "b"], [1, 0, 1], ["1", "b"]),
        (pd.Categorical(["z", "y", "z"]), [1, 0, 1], ["y", "z"]),
    ],
)
def test_labels_are_read_as_those_of_files(given, labels, names):
    dataset = as_dataset(pd.DataFrame({"image": [None] * 3, "label": given}))
    assert dataset["label"] == labels and dataset.features["label"].names == names


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((FEATURES, ["a"] * 9), "have one class, `a`"),
        ((FEATURES[:0], []), "have no rows"),
        ((FEATURES, np.eye(9)), r"must have the shape \(n,\), one class each; given \(9, 9\)"),
        ((FEATURES, [["a"]] * 8 + [["a", "b"]]), "Row 0: the label"),
        ((FEATURES, ["a"] * 9, 3), "a tuple of 3"),
        ((FEATURES[:, :0], ["a", "b", "c"] * 3), r"the shape \(9, 0\): no feature to judge labels by"),
        ((FEATURES.astype(str), ["a", "b", "c"] * 3), "give numbers"),
    ],
)
def test_bad_features_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        find_label_issues(data)


def test_options_of_images_are_refused_for_features_and_doubts_are_logged(caplog):
    labels = np.arange(9) % 3
    with pytest.raises(ValueError, match="`backbone='zzz'`, `image_size=-4`, `label_column='x'`: without an effect"):
        find_label_issues((FEATURES, labels), image_size=-4, backbone="zzz", label_column="x")
    issues = find_label_issues((FEATURES, labels))
    assert issues.attrs["caution"] and issues.attrs["caution"] in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "nonsense"}, "`device='nonsense'` cannot be used here: "),
        ({"device": "meta"}, "`device='meta'` cannot be used here: "),
        ({"seed": -1}, "`seed=-1` must be a whole number, at least 0"),
        ({"image_size": 64.5}, "`image_size=64.5` must be a whole number, at least 1"),
        ({"image_size": (64, 64)}, r"`image_size=\(64, 64\)` must be a whole number"),
        ({"batch_size": 0}, "`batch_size=0` must be a whole number, at least 1"),
        ({"num_workers": -1}, "`num_workers=-1` must be a whole number, at least 0"),
        ({"backbone": None}, "`backbone=None` is no name of a timm model"),
        ({"cache_dir": __file__}, "`cache_dir='.*'`: .* is a file; give a folder"),
        ({"cache_dir": f"{__file__}/features"}, "is a file; give a folder"),
    ],
)
def test_values_that_cannot_be_are_named_before_the_pass(given, message, colored, weights, monkeypatch):
    monkeypatch.setattr("hnml_hf.audit.features.run_over", None)
    with pytest.raises(ValueError, match=message):
        find_label_issues(colored, **(options(weights) | given))
    if given.keys() <= {"device", "seed"}:
        with pytest.raises(ValueError, match=message):
            find_label_issues((FEATURES, np.arange(9) % 3), **given)


def test_features_may_be_of_any_kind_and_names_of_mixed_types():
    labels = pd.Series([2, "b", "c"] * 3, index=np.arange(9) + 5)
    expected = find_label_issues((FEATURES, labels))
    assert expected.attrs["class_names"] == ["2", "b", "c"]
    tensor = torch.tensor(FEATURES, requires_grad=True)
    for features in (FEATURES.tolist(), pd.DataFrame(FEATURES).iloc[::-1].iloc[::-1], tensor):
        pd.testing.assert_frame_equal(find_label_issues((features, labels.tolist())), expected)


def test_ids_of_a_table_are_kept_and_a_row_without_an_image_has_a_place(colored):
    data = pd.DataFrame({"path": [None, *colored["image"][:2]], "label": ["x", "y", "y"], "index": [7, 5, 6]})
    assert list(as_dataset(data)["index"]) == [7, 5, 6]
    assert as_dataset(data).cast_column("image", Image(decode=False))[0]["image"] is None


def test_a_dataset_that_is_made_into_tensors_on_the_fly(colored, weights):
    data = Dataset.from_pandas(colored).cast_column("image", Image())
    expected = find_label_issues(data, **options(weights))
    ready = data.with_transform(lambda batch: {"pixel_values": [torch.zeros(3, 8, 8) for _ in batch["image"]]})
    pd.testing.assert_frame_equal(find_label_issues(ready, **options(weights)), expected)
    pd.testing.assert_frame_equal(find_label_issues(data.with_format("torch"), **options(weights)), expected)


def test_booleans_have_the_same_names_wherever_they_come_from(colored, tmp_path):
    data = colored.assign(label=colored["label"] == "red")
    data.assign(image=[Path(path).name for path in data["image"]]).to_parquet(tmp_path / "train.parquet")
    for path in data["image"]:
        shutil.copy(path, tmp_path)
    for given in (data, Dataset.from_pandas(data), tmp_path / "train.parquet"):
        assert as_dataset(given).features["label"].names == ["0", "1"]
    features = np.random.default_rng(0).normal(size=(60, 4))
    assert find_label_issues((features, data["label"].to_numpy())).attrs["class_names"] == ["0", "1"]


def test_class_labels_and_ids_are_kept(colored):
    data = Dataset.from_pandas(colored).cast_column("label", ClassLabel(names=["red", "green", "blue", "pink"]))
    data = data.add_column("index", np.arange(100, 160))
    made = as_dataset(data)
    assert made.features["label"].names == ["red", "green", "blue", "pink"] and made["index"][0] == 100


def test_the_table_keeps_the_likeliest_classes():
    """A posterior over six classes: five of them, the likeliest first, summing to 1; a label that was not judged."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 20)
    features = rng.normal(size=(120, 12)).astype(np.float32)
    features[np.arange(120), labels] += 4
    labels = np.append(labels, 6)  # the only one of its class
    features = np.vstack([features, rng.normal(size=(1, 12)).astype(np.float32)])
    table = find_label_issues((features, labels)).sort_values("index")
    classes, probabilities = likely_classes(table)
    assert classes.shape == probabilities.shape == (121, 5)
    assert all(len(set(row)) == 5 for row in classes.tolist())
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert (np.diff(probabilities, axis=1) <= 1e-6).all()
    assert (classes[:120, 0] == labels[:120]).mean() > 0.9
    assert (classes[120, 0], probabilities[120, 0]) == (6, 1)
    given = np.where(classes == labels[:, None], probabilities, 0).sum(1)[:120]
    np.testing.assert_allclose(given, table["given_probability"][:120], atol=2e-3)
