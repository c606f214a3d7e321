"""Ways to run the frozen backbone on a GPU, by turns: images per second, and how far the features are off.

python docs/results/frozen-pass-cuda.py FILE_OF_WEIGHTS > docs/results/frozen-pass-cuda.json

With `cpu` as a second word it only tries itself out, on a few small images.
"""

import json
import sys
import time
from contextlib import nullcontext

import numpy as np
import timm
import torch

from hnml_hf.audit.features import load_backbone


DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cuda"
SIZE, BATCH, ROUNDS = (224, 256, 10) if DEVICE == "cuda" else (64, 2, 1)


def bfloat16():
    return torch.autocast(DEVICE, torch.bfloat16)


def wait():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


backbone = load_backbone("tf_efficientnet_lite0", pretrained=sys.argv[1], image_size=SIZE).to(DEVICE)
half = load_backbone("tf_efficientnet_lite0", pretrained=sys.argv[1], image_size=SIZE)
half = half.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
last = load_backbone("tf_efficientnet_lite0", pretrained=sys.argv[1], image_size=SIZE)
last = last.to(DEVICE, memory_format=torch.channels_last)
compiled = torch.compile(last, backend="inductor" if DEVICE == "cuda" else "eager")
pixels = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(DEVICE)
by_channels = pixels.contiguous(memory_format=torch.channels_last)
half_pixels = by_channels.bfloat16()
ways = {
    "eager": (lambda: backbone(pixels), nullcontext),
    "channels_last": (lambda: last(by_channels), nullcontext),
    "channels_last, autocast to bfloat16": (lambda: last(by_channels), bfloat16),
    "channels_last, weights in bfloat16": (lambda: half(half_pixels), nullcontext),
    "channels_last, compiled": (lambda: compiled(by_channels), nullcontext),
    "channels_last, autocast to bfloat16, compiled": (lambda: compiled(by_channels), bfloat16),
}
features, ready, took = {}, {}, {way: [] for way in ways}
with torch.no_grad():
    torch.backends.cudnn.allow_tf32 = False
    exact = backbone(pixels).double()
    torch.backends.cudnn.allow_tf32 = True
    for way, (run, context) in ways.items():
        started = time.perf_counter()
        with context():
            features[way] = run()
        wait()
        ready[way] = time.perf_counter() - started  # also the compilation
    for _ in range(ROUNDS):
        for way, (run, context) in ways.items():
            started = time.perf_counter()
            with context():
                run()
            wait()
            took[way].append(time.perf_counter() - started)
records = [
    {
        "way": way,
        "images_per_second": round(BATCH / float(np.median(seconds))),
        "fastest_and_slowest": [round(BATCH / min(seconds)), round(BATCH / max(seconds))],
        "seconds_until_ready": round(ready[way], 1),
        "difference_of_the_largest": float((features[way].double() - exact).abs().max() / exact.abs().max()),
    }
    for way, seconds in took.items()
]
settings = {"backbone": "tf_efficientnet_lite0.in1k", "pixels": SIZE, "batch": BATCH, "rounds": ROUNDS}
versions = {"torch": torch.__version__, "timm": timm.__version__}
hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
facts = {"hardware": hardware, "settings": settings, "versions": versions}
print(json.dumps(facts | {"records": records}, indent=1))
