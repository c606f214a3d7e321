"""The API reference comes from the docstrings, without a warning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import hnml_hf


ROOT = Path(__file__).parents[1]


def test_the_reference_has_every_public_name(tmp_path):
    recipe = re.search(r"^api:\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    words = recipe.replace("\\\n", " ").replace("build/api", str(tmp_path)).split()
    assert words[:4] == ["python", "-W", "error", "-m"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "arn" not in done.stderr, done.stderr[-3000:]
    page = (tmp_path / "hnml_hf.html").read_text(encoding="utf-8")
    for name in hnml_hf.__all__:
        assert f'id="{name}"' in page, name
    assert (tmp_path / "hnml_hf" / "meta.html").is_file()
