"""Trains tiny networks under one or several processes and writes what came out; `test_distributed.py` launches it.

    python tests/distributed_worker.py OUTPUT_DIR ACCUMULATION [CASE,CASE,...] [--use_cpu true]

Every case runs in one launch, because starting the processes takes longer than training.
"""

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from unittest.mock import patch

import datasets
import numpy as np
import torch
import transformers
from accelerate.utils import gather
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from safetensors.torch import save_file
from transformers import TrainerCallback

from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    TimmCAMForImageClassification,
    TransformedDataset,
    collate_images,
    create_transforms,
)
from hnml_hf.audit.features import FrozenBackbone, extract_features
from hnml_hf.audit.judge import fit_head
from hnml_hf.audit.start import start_from_judge
from hnml_hf.training.callbacks import RanksAgree
from hnml_hf.training.distributed import RanksDifferError
from hnml_hf.training.flops import CostMeter


STEPS, SHARD, NUM_CLASSES, NUM_IMAGES = 3, 4, 3, 32
LOGGED = ("loss", "base", "consistency", "mask_guided", "label_agreement")

VIT = {"architecture": "test_vit", "image_size": 32, "patch_size": 8}
RESNET = {"architecture": "test_resnet", "image_size": 64}
MOMENTUM = {"objective": "hnml", "extrapolation": 6}
SYNTHETIC = {"objective": "hnml_synthetic"}

CASES = {
    "ce": {"objective": "ce"},
    "weighted": {"objective": "ce"},
    "weighted momentum": MOMENTUM,
    "gce": {"objective": "gce"},
    "elr": {"objective": "elr"},
    "mean_teacher": {"objective": "mean_teacher"},
    "mlnt first": {"objective": "mlnt", "meta_scope": "full", "second_order": False, "num_meta_draws": 2},
    "mlnt second": {"objective": "mlnt", "meta_scope": "full", "second_order": True},
    "head first": {**SYNTHETIC, "meta_scope": "head", "second_order": False, "num_meta_draws": 3},
    "head second": {**SYNTHETIC, "meta_scope": "head", "second_order": True, "num_meta_draws": 3},
    "full first": {**SYNTHETIC, "meta_scope": "full", "second_order": False},
    "full second": {**SYNTHETIC, "meta_scope": "full", "second_order": True},
    "momentum": MOMENTUM,
    "momentum memory": {**MOMENTUM, "teacher_source": "memory"},
    "full memory": {**SYNTHETIC, "meta_scope": "full", "teacher_source": "memory"},
}
CORRECTED = {**MOMENTUM, "symmetric_correction": True, "num_train_epochs": 3, "max_steps": -1}
LONG_CASES = {  # all ranks must hold the same weights afterwards; uneven: 29 images, the last batch is filled up
    "long full": (VIT, CASES["full first"]),
    "long momentum": (VIT, CASES["momentum"]),
    "long batch norm": (RESNET, CASES["momentum"]),
    "long uneven": (
        VIT,
        {**CASES["full first"], "num_train_epochs": 2, "max_steps": -1},
    ),
    "long uneven memory": (VIT, {**CASES["elr"], "num_train_epochs": 2, "max_steps": -1}),
}
ONE_STEP = {
    **SYNTHETIC,
    "meta_scope": "full",
    "second_order": False,
    "num_meta_draws": 3,
    "num_neighbors": 3,
    "optim_args": "momentum=0.0",
    "learning_rate": 1.0,
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "per_device_train_batch_size": 8,
}


def make_dataset() -> Dataset:
    random = np.random.default_rng(0)
    names = datasets.ClassLabel(names=["a", "b", "c"])
    features = Features({"image": Image(), "label": names, "clean_label": names, "index": Value("int64")})
    images = random.integers(0, 256, (NUM_IMAGES, 64, 64, 3), dtype=np.uint8)
    rows = {
        "image": [PILImage.fromarray(image) for image in images],
        "label": [row % NUM_CLASSES for row in range(NUM_IMAGES)],
        "clean_label": [-1] * NUM_IMAGES,
        "index": (100 + random.permutation(NUM_IMAGES)).tolist(),
    }
    return Dataset.from_dict(rows, features=features)


def make_model(backbone: dict) -> TimmCAMForImageClassification:
    transformers.set_seed(0)
    return TimmCAMForImageClassification.from_timm(num_labels=NUM_CLASSES, **backbone)


FOLDERS = count()


def output_folder() -> str:
    """A new folder, the same for the processes of one launch, which make the same trainers."""
    launch = os.environ.get("MASTER_PORT", "alone")
    folder = Path(tempfile.gettempdir(), f"hnml-{os.getppid()}-{launch}-{next(FOLDERS)}")
    folder.mkdir(exist_ok=True)
    return str(folder)


def make_trainer(
    backbone: dict, options: dict, trainer_class=HNMLTrainer, num_images: int = NUM_IMAGES, weighted: bool = False
) -> HNMLTrainer:
    model, dataset = make_model(backbone), make_dataset().select(range(num_images))
    if weighted:
        dataset = dataset.add_column("weight", np.linspace(0, 1, num_images))
    transform, _ = create_transforms(model.config.pretrained_cfg)
    defaults = {
        "output_dir": output_folder(),
        "use_cpu": True,
        "per_device_train_batch_size": SHARD,
        "num_neighbors": 2,
        "monitor_fraction": 0,
        "mask_weight": 1,
        "consistency_weight": 1,
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return trainer_class(
        model=model,
        args=HNMLTrainingArguments(**{**defaults, **options}),
        train_dataset=TransformedDataset(dataset, transform),
        data_collator=collate_images,
    )


def weights_of(trainer: HNMLTrainer) -> dict[str, torch.Tensor]:
    """All weights and statistics of the student and of the teacher."""
    weights = {f"student.{name}": value for name, value in trainer.model.state_dict().items()}
    if trainer.teacher is not None:
        weights |= {f"teacher.{name}": value for name, value in trainer.teacher.network.state_dict().items()}
    if trainer.memory is not None:
        weights |= {f"memory.{name}": value for name, value in trainer.memory.store.state_dict().items()}
    return {name: value.detach().clone().contiguous() for name, value in weights.items()}


def same_on_all_ranks(trainer: HNMLTrainer) -> bool:
    for value in weights_of(trainer).values():
        copies = gather(value.float()[None].contiguous())
        if not torch.equal(copies, copies[:1].expand_as(copies)):
            return False
    return True


def record_draws(drawn: list, seeds: list):
    """Make the objective write down the batch's labels, the synthetic ones that it draws and the seed of the draw."""
    module = sys.modules["hnml_hf.objectives.hnml"]
    original = module.neighbor_labels

    def recording(features, labels, **options):
        synthetic = original(features, labels, **options)
        drawn.append(torch.cat([labels[None], synthetic]))
        seeds.append(options["generator"].initial_seed())
        return synthetic

    module.neighbor_labels = recording
    return lambda: setattr(module, "neighbor_labels", original)


class RecordingTrainer(HNMLTrainer):
    """Writes down which samples each step got."""

    def compute_loss(self, model, inputs, **options):
        self.seen = [*getattr(self, "seen", []), inputs["index"]]
        return super().compute_loss(model, inputs, **options)


class Drift(TrainerCallback):
    """Rank 1 changes a weight behind everybody's back after step 2."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            model.class_weights.data[0, 0] += 1e-3


def judge_heads() -> dict[str, list]:
    """The head of the judge, the one that each rank then has, and how many images each has sent through."""
    model, backbone, passes = make_model(VIT), FrozenBackbone(make_model(VIT)).eval(), []

    def counted(*given, **options):
        passes.append(extract_features(*given, **options))
        return passes[-1]

    with patch("hnml_hf.audit.start.extract_features", counted):
        judgement = start_from_judge(model, make_dataset(), backbone, cache_dir=output_folder(), num_workers=0)
    (head,), (found,) = model.classifiers, passes
    width = model.class_weights.shape[1]
    expected = fit_head(found.values[:, :width], judgement, num_labels=NUM_CLASSES)
    facts = {"judged": expected.bias, "head": head.bias, "computed": torch.tensor(found.computed)}
    return {name: gather(value.detach()[None]).tolist() for name, value in facts.items()}


@patch.object(CostMeter, "step", lambda *args: nullcontext())  # whose cost nobody asks for
def run_cases(output: Path, accumulation: int, names) -> dict:
    """Train each case, save its weights, and say how many processes took part."""
    for name in names:
        few = name == "few images"  # fewer than processes
        options = CASES["full first" if few else name]
        trainer = make_trainer(
            VIT,
            {**options, "gradient_accumulation_steps": accumulation},
            num_images=2 if few else NUM_IMAGES,
            weighted=name.startswith("weighted"),
        )
        trainer.add_callback(RanksAgree(trainer))
        trainer.train()
        if trainer.is_world_process_zero():
            save_file(weights_of(trainer), output / f"{name}.safetensors")
    return {"num_processes": trainer.accelerator.num_processes}


def main(output: Path, accumulation: int):
    facts = {**run_cases(output, accumulation, CASES), "rank_equality": {}}
    drawn, seeds = [], []
    restore = record_draws(drawn, seeds)
    trainer = make_trainer(VIT, {**ONE_STEP, "gradient_accumulation_steps": accumulation}, RecordingTrainer)
    trainer.train()
    restore()
    if trainer.is_world_process_zero():
        save_file(weights_of(trainer), output / "one step.safetensors")
    facts["draws"] = gather(torch.stack(drawn)).tolist()  # (ranks * accumulation, 1 + draws, shard)
    facts["draw_seeds"] = gather(torch.tensor(seeds)).tolist()
    facts["indices"] = gather(torch.stack(trainer.seen)).tolist()

    shared = {**CASES["momentum"], "gradient_accumulation_steps": accumulation}
    trainer = make_trainer(VIT, {**shared, "monitor_fraction": 0.3})
    trainer.train()
    facts["monitor_counts"] = gather(torch.from_numpy(trainer.monitor.pending)[None]).tolist()
    trainer = make_trainer(VIT, {**shared, "logging_strategy": "steps", "logging_steps": 1})
    trainer.train()
    facts["logged"] = [{name: entry.get(name) for name in LOGGED} for entry in trainer.state.log_history[:STEPS]]

    trainer = make_trainer(VIT, {**CORRECTED, "gradient_accumulation_steps": accumulation})
    trainer.train()
    facts["noise_rates"] = gather(torch.tensor([trainer.noise_rate])).tolist()
    facts["rank_equality"]["corrected"] = same_on_all_ranks(trainer)

    if trainer.accelerator.num_processes > 1:
        for name, (backbone, options) in LONG_CASES.items():
            trainer = make_trainer(
                backbone, {"max_steps": 12, **options}, num_images=29 if "uneven" in name else NUM_IMAGES
            )
            trainer.train()
            facts["rank_equality"][name] = same_on_all_ranks(trainer)
        trainer = make_trainer(RESNET, CASES["ce"])
        trainer.train()
        trainer.evaluate(trainer.train_dataset)
        facts["rank_equality"]["batch norm without a teacher, when evaluated"] = same_on_all_ranks(trainer)
        facts["judges"] = judge_heads()
        trainer = make_trainer(VIT, {**CASES["momentum"], "max_steps": 8})
        trainer.add_callback(Drift())
        trainer.add_callback(RanksAgree(trainer, every=2))
        try:
            trainer.train()
        except RanksDifferError as error:
            facts["divergence"] = str(error)
    if trainer.is_world_process_zero():
        (output / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    if len(sys.argv) > 3 and not sys.argv[3].startswith("--"):
        (folder / "facts.json").write_text(json.dumps(run_cases(folder, steps, sys.argv[3].split(","))))
    else:
        main(folder, steps)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the threads of a process group may abort an interpreter that ends in order
