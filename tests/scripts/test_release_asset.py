"""The model of a run as one file of a release."""

import hashlib
import json
import zipfile

import pytest
import torch
from commands import load_script

from hnml_hf import TimmCAMForImageClassification


def save_run(folder, dataset):
    torch.manual_seed(0)
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=2, image_size=64).eval()
    model.save_pretrained(folder)
    (folder / "all_results.json").write_text(json.dumps({"dataset": dataset}))
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return model


def test_a_packed_model_is_what_the_hub_would_get(tmp_path, capsys):
    model, pack = save_run(tmp_path / "run", "quickstart"), load_script("release_asset").main
    pack([str(tmp_path / "run"), "--output", str(tmp_path / "model.zip")])
    packed = (tmp_path / "model.zip").read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    assert digest in capsys.readouterr().out
    assert (tmp_path / "model.zip.sha256").read_text() == f"{digest}  model.zip\n"
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert archive.namelist() == [
            f"model/{name}" for name in ("all_results.json", "config.json", "model.safetensors")
        ]
        archive.extractall(tmp_path / "there")
    images = torch.rand(2, 3, 64, 64)
    loaded = TimmCAMForImageClassification.from_pretrained(tmp_path / "there" / "model").eval()
    assert torch.equal(loaded(images).logits, model(images).logits)
    pack([str(tmp_path / "run"), "--output", str(tmp_path / "model.zip")])
    assert (tmp_path / "model.zip").read_bytes() == packed


def test_weights_of_other_data_are_not_packed(tmp_path):
    save_run(tmp_path / "run", "clothing1m")
    with pytest.raises(SystemExit, match="was trained on clothing1m; weights are packed of runs on quickstart"):
        load_script("release_asset").main([str(tmp_path / "run"), "--output", str(tmp_path / "model.zip")])
    assert not (tmp_path / "model.zip").exists()
    with pytest.raises(SystemExit, match="error: "):
        load_script("release_asset").main([str(tmp_path / "none"), "--output", str(tmp_path / "model.zip")])
