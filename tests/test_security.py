"""No pickle is loaded or published, nothing leaves the folder it belongs to, and no secret reaches a file or a log."""

import ast
import json
import logging
import os
import pickle
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from trainers import build_trainer

from hnml_hf import CheckpointError, TimmCAMForImageClassification, load_audit, predict
from hnml_hf.audit.dynamics import read_dynamics
from hnml_hf.data.checks import load_exclusions
from hnml_hf.data.noise_file import load_noise_file
from hnml_hf.hub.upload import PUBLISHED
from hnml_hf.training.resume.configuration import changeable_configuration, fixed_configuration
from hnml_hf.training.resume.files import seal


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "hnml_hf").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])

# name of a call: what it must be given, None = it must not occur
CALLS = {
    "eval": None,
    "exec": None,
    "compile": None,
    "__import__": None,
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "joblib.load": None,
    "dill.load": None,
    "cloudpickle.load": None,
    "pandas.read_pickle": None,
    "pd.read_pickle": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "os.system": None,
    "os.popen": None,
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
}
ANYWHERE = {"extractall": None, "extract": None, "read_pickle": None, "to_pickle": None, "unpack_archive": None}
OPTIONS = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}


def faults(source: str) -> list[str]:
    """Calls that could run what a file says, or write where an archive says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        needed = CALLS.get(name, ANYWHERE.get(name.rpartition(".")[2], {}))
        if needed is None:
            found.append(f"line {node.lineno}: {name}")
        else:
            found += [f"line {node.lineno}: {name} without {k}" for k, v in needed.items() if given.get(k) != str(v)]
        found += [
            f"line {node.lineno}: {option}={given[option]}"
            for option, safe in OPTIONS.items()
            if option in given and given[option] != str(safe)
        ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_run_or_unpickled(path):
    assert not faults(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "pickle.loads(data)",
        "yaml.load(text, Loader=yaml.Loader)",
        "archive.extractall(folder)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert faults(line)
    assert not faults("model.eval(); torch.load(path, weights_only=True); yaml.safe_load(text)")


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


@pytest.fixture
def hostile(tmp_path):
    trace = tmp_path / "it ran"
    content = pickle.dumps(Hostile(trace), protocol=2)  # torch's own; a reader warns of others
    pickle.loads(content)
    assert trace.exists()  # it does work
    trace.rmdir()
    return content, trace


@pytest.mark.parametrize(
    ("name", "opened"),
    [
        ("pytorch_model.bin", lambda path: TimmCAMForImageClassification.from_pretrained(path.parent)),
        ("model.safetensors", lambda path: TimmCAMForImageClassification.from_pretrained(path.parent)),
        ("statistics.npy", read_dynamics),
        ("noise.json", load_noise_file),
        ("excluded.jsonl", load_exclusions),
        ("labels.parquet", load_audit),
        ("photo.png", lambda path: predict(TimmCAMForImageClassification.from_timm("test_resnet"), [path])),
    ],
)
def test_a_hostile_pickle_does_not_run(name, opened, hostile, tmp_path):
    content, trace = hostile
    folder = tmp_path / "given"
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3).save_pretrained(folder)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        opened(folder / name)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_checkpoint_does_not_run(name, hostile, tiny_dataset, tmp_path):
    """Of the files that transformers writes by `torch.save`, each is read with an allow-list, sealed or not."""
    content, trace = hostile
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "objective": "ce"}
    build_trainer(tmp_path / "run", tiny_dataset, **options).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / name).write_bytes(content)
    resumed = build_trainer(tmp_path / "run", tiny_dataset, **options)
    with pytest.raises(CheckpointError, match=f"`{name}` has"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, fixed_configuration(resumed), changeable_configuration(resumed), order=1)
    with pytest.raises(pickle.UnpicklingError):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert not trace.exists()


def test_no_pickle_is_published_and_checkpoints_hold_no_arguments(tiny_dataset, tmp_path):
    """transformers would write `training_args.bin`, a pickle that holds all arguments, tokens too."""
    trainer = build_trainer(
        tmp_path, tiny_dataset, max_steps=2, save_strategy="steps", save_steps=1, hub_token="hf_secret" + "x" * 30
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert not {path.name for path in tmp_path.rglob("*.bin")}
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".pkl", ".npy")) for pattern in PUBLISHED)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


def test_no_token_reaches_the_log(tiny_dataset, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    trainer = build_trainer(tmp_path, tiny_dataset, max_steps=1, hub_token="hf_secret" + "x" * 30, log_level="debug")
    trainer.train()
    repr(trainer.args), str(trainer.args)
    printed = capfd.readouterr()
    assert "hf_secret" not in caplog.text + printed.out + printed.err + str(trainer.args)


@pytest.mark.parametrize("change", [{"dtype": "float3"}, {"num_labels": None, "id2label": None}, {"model_args": 3}])
def test_a_damaged_configuration_is_refused(change, tmp_path):
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    try:
        TimmCAMForImageClassification.from_pretrained(tmp_path)
    except ValueError as error:
        assert str(tmp_path) in str(error)


def test_statistics_hold_no_objects(tmp_path):
    np.save(tmp_path / "s.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds no training dynamics"):
        read_dynamics(tmp_path / "s.npy")


# -- versions --


def test_installed_versions_satisfy_the_floors():
    """Those of the tests' own environment; on the floors and on the newest releases alike this must pass."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [Requirement(text) for text in project["dependencies"]]
    assert {"torch", "timm", "transformers", "filelock"} <= {floor.name for floor in needed}
    for floor in needed:
        assert floor.specifier, f"{floor.name} has no floor"
        assert floor.specifier.contains(version(floor.name).partition("+")[0], prereleases=True), str(floor)


def test_torch_files_are_read_with_an_allow_list(hostile, tmp_path):
    """The rule behind the above holds in the installed version."""
    content, trace = hostile
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert not trace.exists()
