"""Five ways to run the frozen backbone on one core of a CPU, by turns: images per processor second.

python docs/results/frozen-pass.py data/weights/tf_efficientnet_lite0.in1k.safetensors > docs/results/frozen-pass.json
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch

from hnml_hf.audit.features import load_backbone


SIZE, BATCH, ROUNDS = 96, 64, 12

torch.set_num_threads(1)
backbone = load_backbone("tf_efficientnet_lite0", pretrained=sys.argv[1], image_size=SIZE)
pixels = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
by_channels = pixels.contiguous(memory_format=torch.channels_last)
with tempfile.TemporaryDirectory() as folder:
    path = str(Path(folder, "backbone.onnx"))
    torch.onnx.export(backbone, (pixels,), path, dynamo=True, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
compiled = torch.compile(backbone, options={"freezing": True})
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    ahead = torch._inductor.aoti_compile_and_package(
        torch.export.export(backbone, (by_channels,)),
        package_path=str(Path(folder, "backbone.pt2")),
        inductor_configs={"freezing": True},
    )
    compiled_ahead = torch._inductor.aoti_load_package(ahead)
ways = {
    "eager": lambda: backbone(pixels),
    "channels_last": lambda: backbone(by_channels),
    "compiled with freezing, channels_last": lambda: compiled(by_channels),
    "AOTInductor with freezing, channels_last": lambda: compiled_ahead(by_channels),
    "onnxruntime": lambda: torch.from_numpy(session.run(None, {name: pixels.numpy()})[0]),
}
with torch.no_grad():
    features = {way: run() for way, run in ways.items()}  # also the compilation
    took = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            started = time.process_time()
            run()
            took[way].append(time.process_time() - started)
expected = features["eager"]
records = [
    {
        "way": way,
        "images_per_processor_second": round(BATCH / float(np.median(seconds)), 1),
        "fastest_and_slowest": [round(BATCH / min(seconds), 1), round(BATCH / max(seconds), 1)],
        "difference_of_the_largest": float((features[way] - expected).abs().max() / expected.abs().max()),
    }
    for way, seconds in took.items()
]
settings = {"backbone": "tf_efficientnet_lite0.in1k", "pixels": SIZE, "batch": BATCH, "rounds": ROUNDS, "threads": 1}
versions = {"torch": torch.__version__, "timm": timm.__version__, "onnxruntime": onnxruntime.__version__}
print(json.dumps({"settings": settings, "versions": versions, "records": records}, indent=1))
