"""The API reference comes from the docstrings, without a warning."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainingArguments

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


def test_the_reference_has_every_public_name(tmp_path):
    recipe = re.search(r"^api:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    words = recipe.replace("\\\n", " ").replace("build/api", str(tmp_path)).split()
    assert words[:5] == ["EAGER_IMPORT=1", "python", "-W", "error", "-m"]
    environment = {
        **os.environ,
        "EAGER_IMPORT": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    done = subprocess.run([sys.executable, *words[2:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "arn" not in done.stderr, done.stderr[-3000:]
    page = (tmp_path / "hnml_hf.html").read_text(encoding="utf-8")
    for name in hnml_hf.__all__:
        assert f'id="{name}"' in page, name
    assert (tmp_path / "hnml_hf" / "objectives" / "inner_step.html").is_file()
