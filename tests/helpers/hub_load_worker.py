"""Run by test_hub.py: a fresh process that knows the models by their names on the Hub alone."""

import json
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import timm
import torch
from huggingface_hub.constants import ENDPOINT
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from hnml_hf import TimmCAMForImageClassification
from hnml_hf.hub.upload import HubError


OUT, OID = Path(sys.argv[1]), sys.argv[2]


def admin(path: str):
    urllib.request.urlopen(ENDPOINT + path).read()


def said(load, *names: str, **options) -> str:
    try:
        load(*names, **options)
    except (ValueError, OSError, HubError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@torch.no_grad()
def main():
    pixels = torch.load(OUT / "pixels.pt", weights_only=True)
    ours = TimmCAMForImageClassification.from_pretrained
    logits = {
        "pinned": ours("tester/tiny", revision=OID).eval()(pixels).logits,
        "auto": AutoModelForImageClassification.from_pretrained("tester/tiny").eval()(pixels).logits,
        "timm": timm.create_model("hf-hub:tester/tiny", pretrained=True).eval()(pixels),
        "by-model": ours("tester/by-model").eval()(pixels).logits,
        "pretrained": TimmCAMForImageClassification.from_timm(
            "test_resnet.r160_in1k", num_labels=1000, image_size=64, pretrained=True
        )
        .eval()(torch.ones(1, 3, 64, 64))
        .logits,
    }
    torch.save(logits, OUT / "logits.pt")
    classify = pipeline("image-classification", model="tester/tiny")
    heard = {"pipeline": classify(Image.new("RGB", (64, 64), "red"))[0]["label"]}
    time.sleep = lambda seconds: None  # the client waits between its attempts when a Hub answers 500
    heard["revision"], heard["404"] = said(ours, "tester/tiny", revision="v9"), said(ours, "tester/none")
    backbone = partial(TimmCAMForImageClassification.from_timm, num_labels=3, image_size=64, pretrained=True)
    heard["weights-404"] = said(backbone, "test_vit.r160_in1k")
    heard["weights-pickle"] = said(backbone, "test_convnext.r160_in1k")
    for status in (401, 403, 500):
        admin(f"/_fail/{status}/")
        heard[str(status)] = said(ours, "tester/other")
        heard[f"weights-{status}"] = said(backbone, "test_vit.r160_in1k")
        admin("/_mend")
    (OUT / "loaded.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    main()
