"""The frozen pass of several networks on a core of a CPU by PyTorch and by onnxruntime: images per processor second.

python docs/results/frozen-pass-networks.py NAME ... > docs/results/frozen-pass-networks.json
"""

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import timm
import torch

from hnml_hf import TimmCAMForImageClassification
from hnml_hf.audit.features import FrozenBackbone
from hnml_hf.modeling.onnx_program import write_onnx


BATCH, ROUNDS = 8, 3

torch.set_num_threads(1)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
records = []
for name in sys.argv[1:]:  # the weights are random: they do not change the time
    model = TimmCAMForImageClassification.from_timm(name, num_labels=2, needs_cams=False)
    backbone = FrozenBackbone(model).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    pixels = torch.randn(BATCH, *model.input_size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        started, path = time.process_time(), Path(folder, "backbone.onnx")
        write_onnx(backbone, path, example=pixels[:2], outputs=["features"])
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        export = time.process_time() - started
    inputs, by_channels = {"pixel_values": pixels.numpy()}, pixels.contiguous(memory_format=torch.channels_last)
    ways = {"channels_last": partial(backbone, by_channels), "onnxruntime": partial(session.run, None, inputs)}
    record = {"network": name, "pixels": model.input_size[-1], "export_seconds": round(export, 1)}
    with torch.no_grad():
        features, took = {way: run() for way, run in ways.items()}, {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, run in ways.items():
                started = time.process_time()
                run()
                took[way].append(time.process_time() - started)
    record |= {way: round(BATCH / float(np.median(seconds)), 1) for way, seconds in took.items()}
    expected, (found,) = features["channels_last"].numpy(), features["onnxruntime"]
    record["difference_of_the_largest"] = float(np.abs(found - expected).max() / np.abs(expected).max())
    records.append(record)
settings = {"batch": BATCH, "rounds": ROUNDS, "threads": 1}
versions = {"torch": torch.__version__, "timm": timm.__version__, "onnxruntime": onnxruntime.__version__}
print(json.dumps({"settings": settings, "versions": versions, "records": records}, indent=1))
