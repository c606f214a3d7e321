"""Open a trained folder where this package is not installed: with timm alone, then with transformers and timm.

    python scripts/maintenance/check_loaders.py --model outputs/quickstart

Makes a fresh virtual environment in a temporary folder (about 6 GB, some minutes of downloading), compares the logits
there with those of this package, and removes it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from hnml_hf import TimmCAMForImageClassification


WITH_TIMM = """
import importlib.util, json, sys
import timm, torch
from safetensors.torch import load_file, save_file
model, pixels, output = sys.argv[1:]
absent = [name for name in ("hnml_hf", "transformers") if importlib.util.find_spec(name) is None]
network = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
with torch.no_grad():
    save_file({"logits": network(load_file(pixels)["pixels"])}, output)
print(json.dumps({"absent": absent, "timm": timm.__version__, "torch": torch.__version__}))
"""

WITH_TRANSFORMERS = """
import importlib.util, json, sys
import torch, transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline
model, pixels, output = sys.argv[1:]
absent = [name for name in ("hnml_hf",) if importlib.util.find_spec(name) is None]
network = AutoModelForImageClassification.from_pretrained(model).eval()
with torch.no_grad():
    save_file({"logits": network(load_file(pixels)["pixels"]).logits}, output)
best = pipeline("image-classification", model=model)(Image.new("RGB", (64, 64), "gray"))[0]
print(json.dumps({"absent": absent, "transformers": transformers.__version__, "class of gray": best["label"]}))
"""


def try_there(python: Path, code: str, model: Path, work: Path, expected: torch.Tensor) -> dict:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [python, "-c", code, model, work / "pixels.safetensors", work / "logits.safetensors"]
    done = subprocess.run(list(map(str, command)), env=environment, cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"It does not open there:\n{done.stderr}")
    found = load_file(work / "logits.safetensors")["logits"]
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    return {**facts, "largest difference of a logit": (found - expected).abs().max().item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="A folder that training wrote.")
    options = parser.parse_args()
    folder = options.model.resolve()
    model = TimmCAMForImageClassification.from_pretrained(folder).eval()
    pixels = torch.randn(4, *model.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixels).logits
    versions = {"timm": timm.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        save_file({"pixels": pixels}, work / "pixels.safetensors")
        subprocess.run([sys.executable, "-m", "venv", work / "fresh"], check=True)
        python = work / "fresh" / "bin" / "python"
        steps = (
            ([f"timm=={versions['timm']}"], "timm alone", WITH_TIMM),
            ([f"transformers=={versions['transformers']}"], "transformers and timm", WITH_TRANSFORMERS),
        )
        outcomes = {}
        for packages, title, code in steps:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
            outcomes[title] = try_there(python, code, folder, work, expected)
    print(json.dumps(outcomes, indent=2))
    equal = all(outcome["largest difference of a logit"] == 0 for outcome in outcomes.values())
    fresh = all("hnml_hf" in outcome["absent"] for outcome in outcomes.values())
    if not (equal and fresh):
        raise SystemExit("The logits differ, or the environment was not a fresh one.")


if __name__ == "__main__":
    main()
