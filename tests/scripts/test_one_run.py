"""What a run owes to those beside it and after it: one folder, one set of options, one exit code, finite numbers."""

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import pytest
import torch
from commands import load_script
from PIL import Image
from safetensors.torch import load_file, save_file
from trainers import build_model

from hnml_hf import CheckpointError, NonFiniteError, create_image_processor
from hnml_hf.common.atomic import new_folder
from hnml_hf.training.resume.files import run_lock
from hnml_hf.training.resume.signals import EXIT_CODE, EndAtOnce


TRAIN = (
    '--backbone test_resnet --image_size 32 --model_args {"output_stride":8} --per_device_train_batch_size 12'
    " --max_steps 2 --learning_rate 0.02 --report_to none --disable_tqdm true --use_cpu true --augmentation none"
    " --objective ce"
).split()


@pytest.fixture(scope="module")
def data(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_dataset.save_to_disk(folder / "data")
    return str(folder / "data")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An untrained model, as training saves it, and an image."""
    folder = tmp_path_factory.mktemp("saved")
    model = build_model()
    model.save_pretrained(folder)
    create_image_processor(model.config.pretrained_cfg).save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def is_taken(folder) -> bool:
    """Whether another run, here of another thread, is refused."""

    def enter():
        try:
            with run_lock(folder):
                return False
        except CheckpointError:
            return True

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(enter).result()


def test_training_has_its_folder_from_before_loading_until_the_card_is_written(data, tmp_path, monkeypatch):
    train, taken = load_script("train"), {}

    def watch(place, original):
        def watched(*args, **kwargs):
            taken[place] = is_taken(tmp_path / "run")
            return original(*args, **kwargs)

        monkeypatch.setattr(train, place, watched)

    for place in ("load_data", "write_audit", "publish"):
        watch(place, getattr(train, place))
    train.main([*TRAIN, "--dataset", data, "--output_dir", str(tmp_path / "run")])
    assert taken == {"load_data": True, "write_audit": True, "publish": True} and not is_taken(tmp_path / "run")
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["num_processes"] == 1 and results["commit"]
    assert results["versions"]["torch"] == version("torch")


def test_an_audit_has_its_folder_to_itself(data, saved, tmp_path, monkeypatch):
    module, output = load_script("audit"), str(tmp_path / "out")

    def watched(*args, **kwargs):
        assert is_taken(output)
        raise SystemExit("seen")

    monkeypatch.setattr(module, "load_data", watched)
    with pytest.raises(SystemExit, match="seen"):
        module.main(["--model", str(saved), "--dataset", data, "--output_dir", output])
    assert not is_taken(output)


def test_a_folder_of_maps_belongs_to_one_run(saved, tmp_path, monkeypatch):
    predict = load_script("predict")

    def watched(*args, **kwargs):
        assert is_taken(tmp_path / "cams")
        raise SystemExit("seen")

    monkeypatch.setattr(predict, "predict", watched)
    with pytest.raises(SystemExit, match="seen"):
        predict.main([str(saved), str(saved / "image.png"), "--cams", str(tmp_path / "cams")])
    assert not is_taken(tmp_path / "cams")


def test_two_corrected_datasets_do_not_meet(tmp_path, monkeypatch):
    """The second is refused before it reads anything; the first has its folder to itself."""
    module, output = load_script("clean"), str(tmp_path / "cleaned")
    options = [str(tmp_path / "run"), "--how", "drop", "--output_dir", output]
    monkeypatch.setattr(module, "load_audit", lambda *args: pytest.fail("the data are read"))
    with (
        new_folder(output),
        pytest.raises(SystemExit, match="error: Another process is writing .*cleaned: wait for it"),
    ):
        module.main(options)
    (tmp_path / "cleaned").joinpath("mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="cleaned is there already"):
        module.main(options)


@pytest.mark.parametrize("place", ["load_data", "measure", "publish"])
def test_a_signal_before_or_after_training_promises_to_go_on(place, data, tmp_path, monkeypatch):
    train = load_script("train")
    monkeypatch.setattr(train, place, lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        train.main([*TRAIN, "--dataset", data, "--output_dir", str(tmp_path / "run")])
    assert end.value.code == EXIT_CODE and signal.getsignal(signal.SIGTERM) == before
    if place == "publish":
        monkeypatch.undo()
        again = ["--resume_from_checkpoint", "auto"]
        load_script("train").main([*TRAIN, "--dataset", data, "--output_dir", str(tmp_path / "run"), *again])
        assert (tmp_path / "run" / "README.md").is_file()


def test_the_echo_of_a_signal_does_not_disturb_the_end():
    with pytest.raises(SystemExit) as end, EndAtOnce():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
    assert end.value.code == EXIT_CODE


# -- numbers that are not finite --


@pytest.mark.parametrize("held_out", ["0.3", "0"])
def test_a_learning_rate_that_leaves_nothing_finite(held_out, data, tmp_path):
    """After one step there is no next one that would notice."""
    options = ["--dataset", data, "--output_dir", str(tmp_path / "run"), "--validation_fraction", held_out]
    with pytest.raises(SystemExit, match="not finite.*[Ll]ower `--learning_rate`"):
        load_script("train").main([*TRAIN, *options, "--learning_rate", "1e30", "--max_steps", "1"])
    assert not (tmp_path / "run" / "all_results.json").exists()


def spoil_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"][0, 0] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_mean(folder):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [float("nan")] * 3
    (folder / "config.json").write_text(json.dumps(config))


def spoil_scale(folder):
    """Finite weights whose sums are not."""
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"].fill_(torch.finfo(torch.float32).max)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("script", ["predict", "evaluate", "audit"])
@pytest.mark.parametrize("spoil", [spoil_weights, spoil_mean, spoil_scale])
def test_a_model_that_says_nothing_finite_ends_with_an_error(script, spoil, saved, data, tmp_path):
    model = shutil.copytree(saved, tmp_path / "model")
    spoil(model)
    options = {
        "predict": [str(model), str(saved / "image.png"), "--output", str(tmp_path / "out.csv")],
        "evaluate": [str(model), data, "--split", "train", "--output", str(tmp_path / "out.json")],
        "audit": ["--model", str(model), "--dataset", data, "--output_dir", str(tmp_path / "out")],
    }
    with pytest.raises(SystemExit, match="not finite|must be three finite numbers"):
        load_script(script).main(options[script])
    assert not [path for path in tmp_path.glob("out*") if path.is_file() or (path / "_audit").exists()]


def test_a_run_whose_model_overflows_is_not_audited_again_in_silence(data, tmp_path):
    load_script("train").main([*TRAIN, "--dataset", data, "--output_dir", str(tmp_path / "run")])
    spoil_scale(tmp_path / "run")
    with pytest.raises(SystemExit, match="The outputs of the model are not finite"):
        load_script("audit").main([str(tmp_path / "run")])


def test_weights_that_are_not_finite_start_no_run(saved, tmp_path):
    model = shutil.copytree(saved, tmp_path / "model")
    spoil_weights(model)
    with pytest.raises(NonFiniteError, match="1 tensor is not finite in the weights of .*, first `.*fc.weight`"):
        type(build_model()).from_timm("test_resnet", num_labels=3, image_size=32, output_stride=8, pretrained=model)
