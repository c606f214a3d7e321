"""Measure a trained model on a dataset with trusted labels.

    python scripts/evaluate.py outputs/quickstart quickstart
    python scripts/evaluate.py user/name photos --output measured.json

Classes are compared by name: the data may lack some of the model's, or have them in another order. Needs no network
where the model and the data are here.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from options import (
    add_source_options,
    chosen_split,
    command_words,
    inference_device,
    load_model,
    plain_errors,
    read_dataset,
    settle_dataset,
)
from torch.nn import functional as F
from transformers import EvalPrediction

from hnml_hf import (
    TransformedDataset,
    collate_images,
    compute_metrics,
    create_transforms,
)
from hnml_hf.cli import HelpFormatter
from hnml_hf.common.atomic import atomic_write
from hnml_hf.data.classes import align_classes
from hnml_hf.modeling.forward import ask, run_over


def outputs_of(model, names: list[str], labels: np.ndarray) -> np.ndarray:
    """The model's output for each class of a dataset, of shape `(k,)`, by name; -1 for classes without a row."""
    known = [model.config.id2label[output] for output in range(model.config.num_labels)]
    present = np.arange(len(names)) if len(known) == len(names) else np.unique(labels)
    outputs = np.full(len(names), -1)
    outputs[present] = align_classes(known, [names[label] for label in present])
    return outputs


@plain_errors()
def main(argv: list[str] | None = None):
    usage = "%(prog)s MODEL DATA [options]"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False, usage=usage
    )
    parser.add_argument("model", help="A folder that training wrote, or a repository on the Hub.")
    parser.add_argument("data", nargs="?", help="A folder of images, a table, a known dataset or a Hub id.")
    parser.add_argument("--revision", default="main", help="Commit or branch of the repository.")
    add_source_options(parser)
    parser.add_argument("--split", help="Which split to measure; default: `test`, or the only one.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images in a forward pass.")
    parser.add_argument("--num_workers", type=int, default=0, help="Processes that load images.")
    parser.add_argument("--device", help="Default: a GPU if there is one.")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    options = parser.parse_intermixed_args(command_words(argv))
    settle_dataset(parser, options)
    device = inference_device(options.device)
    transformers.utils.logging.disable_progress_bar()
    model = load_model(options)
    data = read_dataset(options)
    options.split = chosen_split(data, options.split)
    names = data[options.split].features["label"].names
    transform = create_transforms(model.config.pretrained_cfg)[1]
    rows = TransformedDataset(data[options.split], transform, max_pixels=options.max_pixels)
    outputs = outputs_of(model, names, rows.labels)
    loading = {"batch_size": options.batch_size, "num_workers": options.num_workers}
    passes = run_over(partial(ask, model.to(device)), rows, collate_images, **loading)
    logits = torch.cat([output.logits.float().cpu() for _, output in passes]).numpy()
    labels = outputs[rows.labels]

    right = logits.argmax(-1) == labels
    metrics = {
        "model": options.model,
        "dataset": options.dataset,
        "split": options.split,
        "images": len(labels),
        **compute_metrics(EvalPrediction(logits, labels)),
        "loss": F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item(),
        "accuracy_of_class": {
            name: float(right[labels == output].mean())
            for output, name in zip(outputs, names, strict=True)
            if (labels == output).any()
        },
    }
    text = json.dumps(metrics, indent=2, ensure_ascii=False)
    print(text)
    if options.output:
        with atomic_write(options.output) as unfinished:
            unfinished.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
