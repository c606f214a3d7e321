"""From a folder with wrong labels to a published model, by the commands that a user types."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub


SCRIPT = Path(__file__).parents[2] / "scripts" / "walkthrough.py"


@pytest.mark.slow
def test_the_walkthrough_ends_with_a_better_model_on_the_hub(tmp_path):
    with LoopbackHub() as hub:
        command = [sys.executable, SCRIPT, "--output_dir", "walk", "--hub_model_id", "tester/walk"]
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        published = set(hub.files("tester/walk"))
        assert hub.repositories["tester/walk"]["private"]
    results = json.loads((tmp_path / "walk" / "results.json").read_text())
    assert results["issues_wrong"] > 0.8 * results["issues"]  # 0.4 of all labels are wrong
    assert results["second"] > results["first"]
    assert results["loaded_back"] == results["second"]
    assert {"model.safetensors", "config.json", "README.md"} <= published
    assert not any("_audit" in name or name.endswith(".png") and "cam_" in name for name in published)
    assert (tmp_path / "walk" / "first" / "_audit" / "report.html").is_file()
    for words in ("== Look before you train", "$ python scripts/train.py", "after cleaning"):
        assert words in done.stdout
