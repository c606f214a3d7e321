"""The tutorial notebook runs from start to end, on data that come with the package."""

import re

import pytest
from commands import ROOT


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=540, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    found = float(re.search(r"highest scores, ([\d.]+)% are wrong", printed)[1])
    before, _, after = (float(share) for share in re.findall(r"([\d.]+)% of 1,000 clean test images", printed))
    assert found > 80 and after > before
