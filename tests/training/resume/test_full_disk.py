"""`scripts/train.py` on a real disk that is too small, and on one that is read-only."""

import re
import shutil
import subprocess
import sys

import disk_worker
import pytest
from checkpoints import steps

from hnml_hf.training.resume.files import check


OPTIONS = (
    '--backbone test_resnet --image_size 32 --model_args {"output_stride":8} --per_device_train_batch_size 12'
    " --max_steps 6 --save_strategy steps --save_steps 2 --audit false --report_to none --disable_tqdm true"
    " --use_cpu true --augmentation none"
).split()
ROOM = 6700  # KiB: for one checkpoint of this network and the half of a second one
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture
def namespace(tmp_path):
    """The command that starts another one where it may mount, if there is such a place on this machine."""
    (tmp_path / "disk").mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("there is no `unshare`, by which a small disk could be mounted")
    trial = [*NAMESPACE, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path / "disk"]
    done = subprocess.run(trial, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk may be mounted here: {done.stderr.strip()}")
    return NAMESPACE


def test_train_on_a_disk_without_room(namespace, tiny_dataset, tmp_path):
    tiny_dataset.save_to_disk(tmp_path / "data")
    command = [*namespace, sys.executable, disk_worker.__file__, tmp_path, str(ROOM), *OPTIONS]
    done = subprocess.run([*command, "--dataset", tmp_path / "data"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = {name: (tmp_path / f"{name}.txt").read_text() for name in ("full", "read-only", "room", "end")}
    assert said["full"].startswith("error: The checkpoint of step 4 could not be written to")
    assert re.search(r", where [01]\.\d MiB are left: .*Those written before are as they were", said["full"])
    assert re.match(r"error: `output_dir=.* cannot be written to: Read-only file system", said["read-only"])
    for name in ("full", "read-only"):
        assert steps(tmp_path / name) == [2] and not (tmp_path / name / "_unfinished").exists()
        check(tmp_path / name / "checkpoint-2")
    assert said["end"].startswith("error: The model could not be written to"), said["end"]
    assert not list((tmp_path / "end").glob("*.safetensors")) and not list((tmp_path / "end").glob("_saving-*"))
    assert said["room"] == "finished" and steps(tmp_path / "room") == [2, 4, 6]
    assert not list((tmp_path / "disk").iterdir())  # the disk is gone with its namespace
