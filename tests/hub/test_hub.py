"""Pushing and loading with the real client against a Hub on this machine; what leaves it, and what happens on errors.

The processes are real ones, since huggingface_hub reads its settings when it is imported.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from loopback_hub import LoopbackHub, check_card
from safetensors.torch import load_file, save

from hnml_hf import TimmCAMForImageClassification, push_to_hub
from hnml_hf.hub.upload import published_files
from hnml_hf.modeling.hub_client import explain


HELPERS = Path(__file__).parents[1] / "helpers"
REPO = "tester/tiny"

PUSH, LOAD = str(HELPERS / "hub_push_worker.py"), str(HELPERS / "hub_load_worker.py")


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.mark.parametrize(("offline", "why"), [(True, "`HF_HUB_OFFLINE` is set"), (False, "no answer from the Hub")])
def test_a_hub_that_was_not_asked_is_told_from_one_that_does_not_answer(offline, why, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert explain(LocalEntryNotFoundError("a long text"), "read") == why


def run(script: str, *arguments: str, env: dict):
    env = {**env, "PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])}
    finished = subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    """A folder with what a pushing process did; it has the run, and what it heard."""
    out = tmp_path_factory.mktemp("pushed")
    run(PUSH, str(out), env=hub.environment(out / "home"))
    return out


@pytest.fixture(scope="module")
def heard(pushed):
    return json.loads((pushed / "heard.json").read_text())


PUBLISHED = {
    "README.md",
    "all_results.json",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "training_curves.png",
}


def test_a_push_holds_the_listed_files_and_no_others(hub, pushed):
    assert set(hub.files(REPO)) == PUBLISHED
    assert {"photo_list.csv", "training_args.bin", "pytorch_model.bin"} <= {p.name for p in (pushed / "run").iterdir()}
    assert hub.files(REPO)["model.safetensors"] == (pushed / "run" / "model.safetensors").read_bytes()


def test_pushes_while_training_hold_the_model_only(hub):
    commits = hub.repositories[REPO]["commits"].values()
    assert any(set(files) == {"config.json", "model.safetensors", "preprocessor_config.json"} for files in commits)
    assert all(set(files) <= PUBLISHED for files in commits)
    assert any("Training in progress" in message for message in hub.messages)


def test_new_repositories_are_private_unless_asked(hub):
    assert {name: hub.repositories[name]["private"] for name in (REPO, "tester/by-model", "tester/by-function")} == {
        REPO: True,
        "tester/by-model": True,
        "tester/by-function": False,
    }


def test_a_branch_gets_the_commit(hub):
    assert set(hub.files("tester/by-function", "v2")) == PUBLISHED
    assert hub.files("tester/by-function", "main") == {}


def test_a_pull_request_leaves_the_branch_alone(hub, heard):
    assert heard["pull request"] == "refs/pr/1"
    proposed, there = (hub.repositories["tester/by-model"]["branches"][name] for name in ("refs/pr/1", "main"))
    assert proposed != there
    assert set(hub.files("tester/by-model", "refs/pr/1")) == {"config.json", "model.safetensors"}


def test_the_card_is_valid_and_says_what_happened(hub):
    card = hub.files(REPO)["README.md"].decode()
    assert check_card(card) == []
    for text in (
        "license: mit",
        "- user/flowers",
        "a third of the labels",
        "37.5% of the 48 labels",
        'hf-hub:" + path',
    ):
        assert text in card


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("401", "does not know this token"),
        ("403", "may not write there"),
        ("404", "no such repository or revision"),
        ("500", "a problem of its own"),
        ("0", "no answer"),
        ("nobody", "no answer"),
    ],
)
def test_errors_say_what_to_do_and_how_to_retry(heard, status, words):
    message = heard[status]
    assert message.startswith("HubError: Pushing to `tester/") and words in message
    assert "is complete. To retry: `from hnml_hf import push_to_hub; push_to_hub(" in message


def test_a_failed_commit_leaves_nothing_behind(hub, pushed, heard):
    assert "500" in heard["half"]
    assert hub.files("tester/half") == {}
    assert load_file(pushed / "run" / "model.safetensors")


def test_training_goes_on_when_a_push_fails(hub, pushed, heard):
    assert heard["trained"] == 6
    assert heard["final"].startswith("HubError")
    assert hub.files("tester/again") == {}
    assert load_file(pushed / "again" / "model.safetensors")
    assert not list((pushed / "again").glob("_push*"))


def test_a_refusal_comes_before_training(pushed, heard):
    assert heard["early"].startswith("HubError: No repository `tester/early`") and "401" in heard["early"]
    assert not list((pushed / "early").glob("*")) if (pushed / "early").exists() else True


def test_a_fresh_process_loads_it_back(hub, pushed, heard):
    torch.save(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), pushed / "pixels.pt")
    hub.commit(REPO, "main", dict(hub.files(REPO)), "later")
    theirs = timm.create_model("test_resnet").eval()
    hub.create("timm/test_resnet.r160_in1k", private=False)
    hub.commit("timm/test_resnet.r160_in1k", "main", {"model.safetensors": save(theirs.state_dict())}, "weights")
    hub.create("timm/test_convnext.r160_in1k", private=False)
    hub.commit("timm/test_convnext.r160_in1k", "main", {"pytorch_model.bin": b"a pickle"}, "weights")
    run(LOAD, str(pushed), heard["oid"], env=hub.environment(pushed / "other_home"))
    logits = torch.load(pushed / "logits.pt", weights_only=True)
    model = TimmCAMForImageClassification.from_pretrained(pushed / "run").eval()
    with torch.no_grad():
        expected = model(torch.load(pushed / "pixels.pt", weights_only=True)).logits
        torch.testing.assert_close(logits["pretrained"], theirs(torch.ones(1, 3, 64, 64)))
    for name in ("pinned", "auto", "timm"):
        assert torch.equal(logits[name], expected), name
    assert logits["by-model"].shape == expected.shape and not torch.equal(logits["by-model"], expected)  # the student
    assert ("GET", f"/api/models/{REPO}/revision/{heard['oid']}") in hub.requests or any(
        f"/resolve/{heard['oid']}/" in path for _, path in hub.requests
    )
    loaded = json.loads((pushed / "loaded.json").read_text())
    assert loaded.pop("pipeline") in ("left", "right", "bottom")
    backbones = {name: loaded.pop(name) for name in list(loaded) if name.startswith("weights-")}
    assert backbones.keys() == {f"weights-{why}" for why in ("404", "401", "403", "500", "pickle")}
    assert all(
        m.startswith("HubError: Pretrained weights `timm/test_") and "`--pretrained FILE`" in m
        for m in backbones.values()
    )
    assert "may not read there. Accept" in backbones["weights-403"]
    assert "500, the Hub has a problem of its own" in backbones["weights-500"]
    paths = [path for _, path in hub.requests]
    while_out_of_order = paths[len(paths) - paths[::-1].index("/_fail/500/") :]
    assert not [path for path in while_out_of_order if "/resolve/" in path]  # which would be tried again and again
    assert not any(path.endswith("pytorch_model.bin") for _, path in hub.requests)
    assert set(loaded) == {"revision", "404", "401", "403", "500"}
    assert all(message.startswith(("OSError", "ValueError")) for message in loaded.values()), loaded
    assert "v9" in loaded["revision"] and "tester/none" in loaded["404"]


# -- without a Hub --


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["a/b/c", "with space", "user/--x", "user/x.git", "user/" + "x" * 97, "", "../up"])
def test_names_that_are_not_valid(folder, name):
    with pytest.raises(ValueError, match="is not a repository name"):
        push_to_hub(folder, name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="has no model"):
        push_to_hub(tmp_path, "user/name")


def test_only_a_pickle(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="is a pickle"):
        push_to_hub(tmp_path, "user/name")
    with pytest.raises(ValueError, match="is a pickle"):
        TimmCAMForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_weights_that_were_cut_off(folder, tmp_path, keep):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:keep])
    for action in (
        lambda: push_to_hub(tmp_path, "user/name"),
        lambda: TimmCAMForImageClassification.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            action()


def test_the_list_takes_no_folder_no_link_and_no_other_name(tmp_path):
    for name in (
        "config.json",
        "model.safetensors",
        "README.md.bak",
        "xmodel.safetensors",
        "training_args.bin",
        ".env",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / "all_results.json").symlink_to(tmp_path / ".env")
    (tmp_path / "README.md").mkdir()
    (tmp_path / "model-00001-of-00002.safetensors").write_text("")
    assert published_files(tmp_path) == ["config.json", "model-00001-of-00002.safetensors", "model.safetensors"]
