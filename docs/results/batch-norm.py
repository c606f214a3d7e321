"""Whether batch norm has the right statistics: accuracy on the clean test images with those of training, and with
those that the saved weights have on the training images (`torch.optim.swa_utils.update_bn`).

python docs/results/batch-norm.py OUTPUTS RUN... > docs/results/batch-norm.json

RUN is a name below. Each run of `scripts/train.py --save_strategy epoch --save_total_limit 100` is expected in
OUTPUTS/RUN; its options are in RUNS.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path

import torch
from torch.optim.swa_utils import update_bn


sys.path.append(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))

from provenance import provenance

from hnml_hf import TimmCAMForImageClassification, TransformedDataset, create_transforms, load_noisy_dataset


PROTOCOL = "--recipe cifar10n_10k_cpu --label_column worse_label"  # and seed 0, unless there is another
HNML = (
    f"{PROTOCOL} --objective hnml --mask_weight 0 --monitor_fraction 0.05 --consistency_weight 3 --learning_rate 0.2"
)
RUNS = {
    "cross-entropy": f"{PROTOCOL} --objective ce --eval_teacher true --learning_rate 0.2 --lr_scheduler_type constant",
    "hnml-corrected": f"{HNML} --extrapolation 10 --lr_scheduler_type constant --symmetric_correction true",
    "hnml-cosine": f"{HNML} --extrapolation 40",
    "hnml-large": f"{HNML} --extrapolation 40 --lr_scheduler_type constant",
    "hnml-cosine1": f"{HNML} --extrapolation 40 --seed 1",
    "hnml-cosine2": f"{HNML} --extrapolation 40 --seed 2",
    "quickstart": "--recipe quickstart --audit false",
    "quickstart0": "--recipe quickstart --audit false --seed 0",
    "quickstart-ce": "--recipe quickstart --audit false --seed 0 --objective ce --eval_teacher true "
    "--symmetric_correction false",
}
CIFAR = {"label_column": "worse_label", "clean_label_column": "label", "test_label_column": "label"}
BATCH, FEW, PARTS = 250, 4, 4  # images in a pass, passes of a thousand images, and checkpoints of a run


def batches(rows, transform) -> tuple[list[torch.Tensor], torch.Tensor]:
    dataset = TransformedDataset(rows, transform)
    images = torch.stack([dataset[row]["pixel_values"] for row in range(len(dataset))])
    return list(images.split(BATCH)), torch.from_numpy(dataset.labels)


@torch.no_grad()
def accuracy(model, images: list[torch.Tensor], labels: torch.Tensor) -> float:
    found = torch.cat([model.eval()(pixel_values=part).logits.argmax(1) for part in images])
    return round(float((found == labels).double().mean()), 4)


def records(name: str, folder: Path):
    data = load_noisy_dataset("quickstart") if name.startswith("quickstart") else load_noisy_dataset(DATA, **CIFAR)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    seen = None
    for epoch in range(len(checkpoints) // PARTS, len(checkpoints) + 1, len(checkpoints) // PARTS):
        for network, part in (("student", ""), ("average", "teacher")):
            model = TimmCAMForImageClassification.from_pretrained(checkpoints[epoch - 1] / part)
            if seen is None:
                transform = create_transforms(model.config.pretrained_cfg)[1]
                seen = batches(data["train"], transform)[0], batches(data["test"], transform)
            train, test = seen
            everything, few = deepcopy(model), deepcopy(model)
            update_bn(train, everything)
            update_bn(train[:FEW], few)
            yield {
                "run": name,
                "options": RUNS[name],
                "epoch": epoch,
                "network": network,
                "as_trained": accuracy(model, *test),
                "new_statistics": accuracy(everything, *test),
                "of_1000_images": accuracy(few, *test),
            }


DATA = "data/cifar10n-10k"
torch.set_num_threads(1)
found = []
for name in sys.argv[2:]:
    for record in records(name, Path(sys.argv[1], name)):
        print(record, file=sys.stderr)
        found.append(record)
about = {"what": " ".join(__doc__.split("\n\n")[0].split())} | provenance(threads=1)
print(json.dumps(about | {"records": found}, indent=1))
