"""Prediction for files, folders and datasets, from Python and from the command line."""

import csv
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hnml_hf import TimmCAMForImageClassification, open_image, overlay, predict
from hnml_hf.inference import NotAnImageError, cam_examples


ROOT = Path(__file__).parents[1]
NAMES = ['=HYPERLINK("x")', "@dog", "rose, red", "d", "e", "f"]


def script(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TimmCAMForImageClassification.from_timm(
        "test_resnet", id2label=dict(enumerate(NAMES)), image_size=64
    ).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, mode in enumerate(("RGB", "L", "RGBA", "P")):
        image = Image.fromarray(random.integers(0, 255, (50 + 7 * number, 70, 3), dtype=np.uint8)).convert(mode)
        image.save(folder / ("more" if number % 2 else "") / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_predictions_are_those_of_the_model(model, photos):
    paths = sorted(photos.rglob("*.png"))
    together = list(predict(model, paths, top_k=3, batch_size=4))
    alone = list(predict(model, (open_image(path) for path in paths), top_k=3, batch_size=1))
    for first, second in zip(together, alone, strict=True):
        assert first.labels == second.labels and len(first.labels) == 3
        np.testing.assert_allclose(first.scores, second.scores, rtol=1e-4)
    assert first.scores == sorted(first.scores, reverse=True) and first.cam is None
    assert sum(next(predict(model, paths[:1], top_k=99)).scores) == pytest.approx(1)


def test_maps_lie_where_the_model_says(model, photos):
    prediction = next(predict(model, [photos / "0.png"], with_cams=True))
    assert prediction.cam.shape == (2, 2) and prediction.cam.min() >= 0 and prediction.cam.max() <= 1
    assert prediction.seen.size == (224, 224)


def test_an_overlay_is_red_where_the_map_is_high():
    picture = np.asarray(overlay(Image.new("RGB", (224, 224)), np.array([[0.0, 1.0]]), strength=1.0))
    left, right = picture[112, 5], picture[112, -5]
    assert left[2] > left[0] and right[0] > right[2]


def test_examples_make_one_sheet(model, photos):
    sheet = cam_examples(model, sorted(photos.rglob("*.png")), columns=3)
    assert sheet.size == (3 * 224, 2 * (224 + 24))


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image(model, tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(NotAnImageError, match=r"x.jpg` cannot be read as an image"):
        list(predict(model, [tmp_path / "x.jpg"]))
    with pytest.raises(NotAnImageError, match="nowhere.jpg"):
        open_image(tmp_path / "nowhere.jpg")


def test_csv_escapes_formulas_and_pictures_are_written(saved, photos, tmp_path):
    script("predict").main(
        [
            str(saved),
            str(photos),
            "--output",
            str(tmp_path / "p.csv"),
            "--cams",
            str(tmp_path / "cams"),
            "--batch_size",
            "3",
        ]
    )
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [Path(row["image"]).name for row in rows] == ["0.png", "2.png", "1.png", "3.png"]
    assert len(list((tmp_path / "cams").glob("*.png"))) == 4
    cells = [cell for row in rows for cell in row.values()]
    assert '\'=HYPERLINK("x")' in cells and "'@dog" in cells and "rose, red" in cells
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_jsonl_holds_all(saved, photos, tmp_path):
    output = tmp_path / "new" / "p.jsonl"
    script("predict").main([str(saved), str(photos / "0.png"), "--output", str(output), "--top_k", "2"])
    (row,) = map(json.loads, output.read_text().splitlines())
    assert set(row) == {"image", "labels", "scores"} and len(row["labels"]) == 2 and set(row["labels"]) <= set(NAMES)


def test_what_can_be_read_is_written_and_the_rest_is_an_error(saved, photos, tmp_path, capsys, monkeypatch):
    (photos / "broken.jpg").write_bytes(b"no")
    arguments = [
        str(saved),
        str(photos),
        "--output",
        str(tmp_path / "p.csv"),
        "--cams",
        str(tmp_path / "cams"),
    ]
    with pytest.raises(SystemExit, match="error: 1 of 5 images could not be read; the others are written.*--skip_unr"):
        script("predict").main(arguments)
    assert "Left out: `" in (said := capsys.readouterr().err) and "broken.jpg` cannot be read" in said
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 5
    assert len(list((tmp_path / "cams").glob("*.png"))) == 4
    Image.new("1", (4000, 1000)).save(photos / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # Pillow refuses twice as many
    script("predict").main([*arguments, "--skip_unreadable"])
    said = capsys.readouterr().err
    assert said.count("Left out") == 2 and "bomb.png` cannot be read as an image: Image size (4000000 pixels)" in said
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_name_that_is_no_utf8_and_the_mode_of_the_output(saved, photos, tmp_path, capsys, ending):
    stray = photos / os.fsdecode(b"caf\xe9.png")
    (photos / "0.png").rename(stray)
    output = tmp_path / "out" / f"p.{ending}"
    arguments = [str(saved), str(photos)]
    script("predict").main([*arguments, "--output", str(output)])
    assert [path.name for path in output.parent.iterdir()] == [output.name]  # nothing stays behind
    (tmp_path / "plain").touch()
    assert output.stat().st_mode == (tmp_path / "plain").stat().st_mode
    text = output.read_text(encoding="utf-8")
    if ending == "csv":
        assert "caf\\udce9.png," in text
        capsys.readouterr()
        script("predict").main(arguments)
        assert capsys.readouterr().out.replace("\r\n", "\n") == text
    else:
        assert str(stray) in [json.loads(line)["image"] for line in text.splitlines()]


def test_images_of_a_dataset_that_cannot_be_read(saved, flowers, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (flowers / "test" / "blue" / "1.png").write_bytes(b"no")
    arguments = [str(saved), "--dataset", "imagefolder", "--data_dir", str(flowers)]
    arguments += ["--output", str(tmp_path / "p.jsonl")]
    with pytest.raises(SystemExit, match="error: 1 of 8 images could not be read"):
        script("predict").main(arguments)
    assert "1.png` of the sample with index 1 cannot be read" in capsys.readouterr().err
    script("predict").main([*arguments, "--skip_unreadable"])
    assert "Left out: Image" in capsys.readouterr().err
    rows = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
    assert [row["image"] for row in rows] == ["0", "2", "3", "4", "5", "6", "7"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{saved}", "missing.png"], "is not there"),
        (["{saved}", "{empty}"], "has no image files"),
        (["{empty}", "{photos}"], "has no model"),
        (["{saved}", "{photos}", "--dataset", "quickstart"], None),
        (["{saved}", "{photos}", "--output", "x.xlsx"], None),
        (["{saved}"], None),
        ([], None),
    ],
)
def test_bad_arguments(saved, photos, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    filled = [a.format(empty=tmp_path / "empty", photos=photos, saved=saved) for a in arguments]
    with pytest.raises(SystemExit, match=words):
        script("predict").main(filled)


@pytest.fixture
def flowers(tmp_path):
    """A folder of images, two classes, half of them of one color."""
    for number, name in enumerate(("blue", "red")):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for row in range(4):
            color = (0, 0, 40 * row) if number == 0 else (40 * row, 0, 0)
            for split in ("train", "test"):
                Image.new("RGB", (40, 40), color).save(tmp_path / "data" / split / name / f"{row}.png")
    return tmp_path / "data"


def test_evaluate_measures_what_predict_says(flowers, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = TimmCAMForImageClassification.from_timm(
        "test_resnet", id2label={0: "blue", 1: "red"}, image_size=64
    ).eval()
    model.save_pretrained(tmp_path / "two")
    output = tmp_path / "measured.json"
    script("evaluate").main(
        [
            str(tmp_path / "two"),
            str(flowers),
            "--output",
            str(output),
        ]
    )
    measured = json.loads(output.read_text())
    right = [
        next(predict(model, [path])).labels[0] == path.parent.name
        for path in sorted((flowers / "test").rglob("*.png"))
    ]
    assert measured["images"] == 8 and measured["accuracy"] == np.mean(right)
    assert set(measured["accuracy_of_class"]) == {"blue", "red"}


def evaluate(model, folder, output, *options):
    arguments = [str(model), "--output", str(output), str(folder)]
    script("evaluate").main([*arguments, *options])
    return json.loads(output.read_text())


def test_evaluate_compares_classes_by_name(flowers, tmp_path, monkeypatch):
    """The same network with its outputs in another order, and with a class that no image has."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = TimmCAMForImageClassification.from_timm("test_resnet", id2label={0: "blue", 1: "red"}, image_size=64)
    (head,) = model.classifiers
    head.bias.data[:] = torch.tensor([100.0, 0.0])  # all is blue
    model.save_pretrained(tmp_path / "model")
    plain = evaluate(tmp_path / "model", flowers, tmp_path / "plain.json")
    assert plain["accuracy_of_class"] == {"blue": 1, "red": 0}
    other = TimmCAMForImageClassification.from_timm(
        "test_resnet", id2label={0: "green", 1: "red", 2: "blue"}, image_size=64
    )
    weights = {name: value for name, value in model.state_dict().items() if value.shape[:1] != head.bias.shape}
    other.load_state_dict(weights, strict=False)
    (other_head,) = other.classifiers
    other_head.weight.data[1:], other_head.bias.data[1:] = head.weight.data.flip(0), head.bias.data.flip(0)
    other_head.weight.data[0], other_head.bias.data[0] = 0, -1000
    other.save_pretrained(tmp_path / "other")
    measured = evaluate(tmp_path / "other", flowers, tmp_path / "other.json")
    for name in ("accuracy", "accuracy_of_class"):
        assert measured[name] == plain[name], name
    assert measured["loss"] == pytest.approx(plain["loss"])


def test_evaluate_of_a_folder_that_lacks_classes(flowers, saved, tmp_path, monkeypatch):
    """Checked by hand, it has what could be found; a class that the model lacks is refused."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        (flowers / split / "red").rename(flowers / split / "e")
        (flowers / split / "blue").rename(flowers / split / "d")
    measured = evaluate(saved, flowers, tmp_path / "measured.json")
    assert measured["images"] == 8 and set(measured["accuracy_of_class"]) == {"d", "e"}
    for split in ("train", "test"):
        (flowers / split / "e").rename(flowers / split / "z")
    with pytest.raises(
        SystemExit, match="does not know 1 of the dataset's 2 classes: z. Its own 6 are =HYPER.*, @dog"
    ):
        evaluate(saved, flowers, tmp_path / "measured.json")


def test_a_model_in_training_mode_predicts_as_in_evaluation_and_goes_on_training(model, photos):
    """Batch statistics of one image would give other scores, and change the model."""
    paths = sorted(photos.rglob("*.png"))
    expected = [prediction.scores for prediction in predict(model, paths, batch_size=1)]
    trained = TimmCAMForImageClassification.from_timm("test_resnet", id2label=dict(enumerate(NAMES)), image_size=64)
    trained.load_state_dict(model.state_dict())
    frozen = next(module for module in trained.train().modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    modes = [module.training for module in trained.modules()]
    for scores, prediction in zip(expected, predict(trained, paths, batch_size=1, with_cams=True), strict=True):
        np.testing.assert_allclose(prediction.scores, scores, rtol=1e-4)
        assert [module.training for module in trained.modules()] == modes and not frozen.training
    cam_examples(trained, paths[:1])
    trained.check_spatial_evidence()
    assert [module.training for module in trained.modules()] == modes
    for name, value in trained.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_model_that_fails_is_in_its_mode_again(model, photos):
    model.train()
    with pytest.raises(NotAnImageError):
        list(predict(model, [photos / "0.png", photos / "notes.txt"], batch_size=1))
    assert model.training
    model.eval()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_images_of_a_table_without_labels(saved, photos, tmp_path, monkeypatch, suffix):
    """Or with labels that the model does not know, or that are missing: none are read."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    paths = ["0.png", "more/1.png", "2.png"]
    table = photos / f"new{suffix}"
    for extra in ({}, {"label": ["", "unheard of", None]}):
        columns = {"file_name": paths, **extra}
        if suffix == ".parquet":
            pq.write_table(pa.table(columns), table)
        else:
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            lines = [",".join(columns), *(",".join(str(cell or "") for cell in row.values()) for row in rows)]
            table.write_text("\n".join(lines if suffix == ".csv" else map(json.dumps, rows)) + "\n")
        output = tmp_path / "p.jsonl"
        script("predict").main([str(saved), "--dataset", str(table), "--output", str(output)])
        found = [json.loads(line) for line in output.read_text().splitlines()]
        script("predict").main([str(saved), *(str(photos / path) for path in paths), "--output", str(output)])
        direct = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["labels"] for row in found] == [row["labels"] for row in direct]
        assert [row["image"] for row in found] == ["0", "1", "2"]


def test_images_of_a_test_folder_alone(saved, flowers, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (flowers / "train").rename(tmp_path / "elsewhere")
    output = tmp_path / "p.jsonl"
    arguments = [str(saved), "--output", str(output), "--dataset"]
    script("predict").main([*arguments, "imagefolder", "--data_dir", str(flowers)])
    assert len(output.read_text().splitlines()) == 8
    for row, name in enumerate(sorted((flowers / "test" / "blue").iterdir())):
        name.rename(flowers / f"{row}.png")
    shutil.rmtree(flowers / "test")
    script("predict").main([*arguments, str(flowers)])
    assert len(output.read_text().splitlines()) == 4
    with pytest.raises(SystemExit, match="no split `test`; there are `train`: name one by --split"):
        script("predict").main([*arguments, str(flowers), "--split", "test"])
