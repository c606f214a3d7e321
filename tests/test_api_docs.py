"""The API reference comes from the docstrings, without a warning."""

import ast
import builtins
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trainers import arguments, build_model, build_trainer
from transformers import EvalPrediction, TrainingArguments

import hnml_hf
import hnml_hf.noise


ROOT = Path(__file__).parents[1]


def is_documented_elsewhere(part) -> bool:
    """Constants; errors, whose arguments are a message; options, whose help is their documentation."""
    return not callable(part) or (isinstance(part, type) and issubclass(part, (Exception, TrainingArguments)))


@pytest.mark.parametrize("module", [hnml_hf, hnml_hf.noise], ids=lambda module: module.__name__)
def test_every_parameter_is_documented(module):
    """Under `Args:`, by name; of a class whose parent has the `__init__`, also there."""
    missing = []
    for name in module.__all__:
        part = getattr(module, name)
        if is_documented_elsewhere(part):
            continue
        texts = [inspect.cleandoc(owner.__doc__ or "") for owner in getattr(part, "__mro__", [part])]
        documented = "\n".join(re.findall(r"^Args:\n((?: .*\n|\n)+)", "\n\n".join([*texts, ""]), re.M))
        named = re.findall(r"^ {4}(?! )(.*)", documented, re.M)
        for parameter in inspect.signature(part).parameters.values():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if not variadic and not any(re.search(rf"\b{parameter.name}\b[ ,:]", line) for line in named):
                missing.append(f"{name}({parameter.name})")
    assert not missing


def example_of(name: str) -> str:
    doc = inspect.getdoc(getattr(hnml_hf, name))
    return inspect.cleandoc(doc.partition("\nExample:\n")[2])


# what the examples are given beside the public names; those of `NEEDS_MORE` need files, the Hub, or other packages
GIVEN = {"np": np, "torch": torch, "EvalPrediction": EvalPrediction}
OBJECTS = ("dataset", "model", "features", "labels", "records", "table")
NEEDS_MORE = ("find_label_issues", "load_annotations", "load_audit", "open_image", "push_to_hub", "export_to_onnx")


@pytest.mark.parametrize("name", hnml_hf.__all__)
def test_every_public_name_has_an_example_of_names_that_exist(name):
    tree = ast.parse(example_of(name))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    made = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    made |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert name in used
    assert used - made - set(dir(builtins)) <= {*GIVEN, *OBJECTS, "trainer", *hnml_hf.__all__}


@pytest.fixture(scope="module")
def given(tiny_dataset):
    """What stands for the objects of the examples: three classes, 48 images, a tiny network."""
    model = build_model()
    labels = np.array(tiny_dataset["label"])
    records = hnml_hf.TrainingDynamics(np.array(tiny_dataset["index"]), labels, 3)
    records.update(np.array(tiny_dataset["index"]), np.eye(3, dtype=np.float32)[labels] * 0.7 + 0.1, epoch=0)
    table = hnml_hf.noise_scores(records.records, tiny_dataset.features["label"].names)
    features = np.random.default_rng(0).normal(size=(48, 4)) + 3 * np.eye(3, 4)[labels]
    values = (tiny_dataset, model, features, labels, records.records, table)
    return GIVEN | dict(zip(OBJECTS, values, strict=True))


@pytest.mark.parametrize("name", sorted(set(hnml_hf.__all__) - set(NEEDS_MORE)))
def test_the_examples_run(name, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {other: getattr(hnml_hf, other) for other in hnml_hf.__all__} | given
    if name != "HNMLTrainingArguments":  # quiet, and of one step, whatever the example asks for
        names["HNMLTrainingArguments"] = lambda output_dir, **options: arguments(output_dir)
    if "trainer" in example_of(name):
        names["trainer"] = build_trainer(tmp_path / "run", given["dataset"], max_steps=1)
    exec(compile(example_of(name), name, "exec"), names)


def reference() -> dict[str, str]:
    """Each object of docs/api.md by its name."""
    paths = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    return {path.rpartition(".")[2]: path for path in paths}


@pytest.mark.parametrize("module", [hnml_hf, hnml_hf.noise], ids=lambda module: module.__name__)
def test_the_reference_has_every_public_name(module):
    """Where it is defined, since names are imported on demand."""
    listed = reference()
    for name in filter(lambda name: callable(getattr(module, name)), module.__all__):
        part = getattr(module, name)
        assert listed.get(name) == f"{part.__module__}.{name}", name


def test_the_site_builds_without_a_warning(tmp_path):
    """Links, anchors and references included (`strict` in mkdocs.yml); nothing is fetched from elsewhere."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed, which takes Python 3.11")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for path in reference().values():
        assert f'id="{path}"' in page, path
    for page in (tmp_path / "site").glob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://', page.read_text(encoding="utf-8")), (
            page
        )
