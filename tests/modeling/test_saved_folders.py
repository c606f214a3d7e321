"""Who may read a saved folder, and what becomes of it on a full disk."""

import os
import shutil
import stat

import pytest
from safetensors import SafetensorError
from transformers import PreTrainedModel

from hnml_hf import TimmCAMForImageClassification


NAMES = {0: "cat", 1: "dog", 2: "cow"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    TimmCAMForImageClassification.from_timm("test_resnet", id2label=NAMES, image_size=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_all_files_have_the_mode_of_new_files(saved, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        TimmCAMForImageClassification.from_pretrained(saved).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "config.json": mode,
        "model.safetensors": mode,
    }


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_full_disk_is_one_error_and_the_old_model_stays(saved, tmp_path, monkeypatch, error):
    folder = shutil.copytree(saved, tmp_path / "model")
    model = TimmCAMForImageClassification.from_pretrained(folder)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(
        OSError, match=r"could not be written to `.*model`, where [\d.]+ MiB are left: .*No space left"
    ):
        model.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    TimmCAMForImageClassification.from_pretrained(folder)
