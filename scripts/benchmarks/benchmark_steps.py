"""What `benchmark.py cost` and `profile` share: the cases, a trainer for each on made-up images, and its steps."""

import json
import shlex
import statistics
import sys
import tempfile
import time
from itertools import chain, islice, repeat

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, set_seed
from provenance import provenance
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hnml_hf import HNMLTrainer, HNMLTrainingArguments, TimmCAMForImageClassification


MOMENTUM = {"objective": "hnml", "mask_weight": 1.0}
SYNTHETIC = {"objective": "hnml_synthetic", "mask_weight": 1.0}
HEAD = {**SYNTHETIC, "meta_scope": "head"}
MEMORY = {"teacher_source": "memory"}
FULL = {**SYNTHETIC, "meta_scope": "full"}

BARE, PLAIN = "bare loop", "plain trainer"
CASES = {  # a loop of plain PyTorch, transformers' Trainer and `ce` come first: what the others are compared with
    BARE: None,
    PLAIN: None,
    "ce": {"objective": "ce"},
    "gce": {"objective": "gce"},
    "elr": {"objective": "elr"},
    "mean teacher": {"objective": "mean_teacher"},
    "momentum, no mask": {"objective": "hnml"},  # the default
    "momentum, no mask, memory": {"objective": "hnml", **MEMORY},
    "momentum": MOMENTUM,
    "momentum, memory": {**MOMENTUM, **MEMORY},
    "head, 1 set": {**HEAD, "num_meta_draws": 1},
    "head, 10 sets": {**HEAD, "num_meta_draws": 10},
    "head, 10 sets, memory": {**HEAD, "num_meta_draws": 10, **MEMORY},
    "full, 1 set, first order": {**FULL, "second_order": False},
    "full, 1 set, second order": {**FULL, "second_order": True},
    "mlnt, 1 set, first order": {"objective": "mlnt", "meta_scope": "full", "second_order": False},
    "full, 10 sets, first order": {**FULL, "second_order": False, "num_meta_draws": 10},
    "full, 10 sets, second order": {**FULL, "second_order": True, "num_meta_draws": 10},
}


class RandomImages(Dataset):
    """Noise with labels, ready in memory, so that loading costs nothing."""

    def __init__(self, size: int, shape: tuple[int, int, int], num_labels: int):
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.randn(size, *shape, generator=generator)
        self.labels = torch.arange(size).numpy() % num_labels
        self.clean_labels = self.labels * 0 - 1
        self.weights = self.targets = self.held_out = None
        self.views: dict = {}
        self.index = torch.arange(size).numpy()

    def hold_out(self, fraction: float, *, seed: int):
        """Every label is trained on."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict:
        return {"pixel_values": self.pixel_values[row], "labels": self.labels[row], "index": self.index[row]}


class Collator:
    """Batches of [`RandomImages`]; the plain Trainer's model takes pixels and labels only."""

    def __init__(self, *, plain: bool):
        self.plain = plain

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
        batch["labels"] = torch.tensor([int(sample["labels"]) for sample in samples])
        if not self.plain:
            batch["index"] = torch.tensor([int(sample["index"]) for sample in samples])
            batch["clean_labels"] = torch.full_like(batch["labels"], -1)
        return batch


class StepClock(TrainerCallback):
    """Times of the steps of the last training, from the end of one to the end of the next: loop and loader too."""

    def __init__(self, device: torch.device):
        self.device = device

    def on_train_begin(self, args, state, control, **kwargs):
        self.marks, self.processor = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        self.processor.append(time.process_time())

    def seconds(self, warmup: int) -> tuple[float, float]:
        """Median wall and processor time of a step after `warmup` steps."""
        marks, processor = self.marks[warmup - 1 :], self.processor[warmup - 1 :]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            wall = [a.elapsed_time(b) / 1000 for a, b in zip(marks, marks[1:], strict=False)]
        else:
            wall = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        used = [b - a for a, b in zip(processor, processor[1:], strict=False)]
        return statistics.median(wall), statistics.median(used)


class BareLoop:
    """The steps of `ce` with nothing around them: a model, a loader, an optimizer, and a loop.

    Args:
        model ([`TimmCAMForImageClassification`]): the network.
        images ([`RandomImages`]): the data.
        args: the options of the benchmark.
    """

    def __init__(self, model: TimmCAMForImageClassification, images: RandomImages, args):
        self.model, self.options = model.to(args.device), args
        self.loader = DataLoader(
            images, batch_size=args.batch_size, shuffle=True, drop_last=True, collate_fn=Collator(plain=True)
        )
        self.clock = StepClock(torch.device(args.device))

    def train(self):
        args, model = self.options, self.model.train()
        network = torch.compile(model.timm_model) if args.compile else model.timm_model
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
        batches = chain.from_iterable(repeat(self.loader))  # shuffled anew each time
        self.clock.on_train_begin(None, None, None)
        for batch in islice(batches, args.warmup + args.steps):
            pixels, labels = batch["pixel_values"].to(args.device), batch["labels"].to(args.device)
            if args.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                loss = F.cross_entropy(network(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.clock.on_step_end(None, None, None)


def origin(args) -> dict:
    """What a reader needs to judge a figure and to measure it again."""
    names = ("batch_size", "memory_batch_size", "steps", "warmup", "rounds", "bf16", "channels_last", "compile")
    return {
        "command": f"python scripts/benchmarks/benchmark.py {shlex.join(sys.argv[1:])}",
        **provenance(args.device, threads=torch.get_num_threads()),
        "processes": PartialState().num_processes,
        "settings": {name: getattr(args, name) for name in names},
    }


def build_trainer(name: str, pristine: TimmCAMForImageClassification, args) -> Trainer | BareLoop:
    """A trainer for one case; transformers' own Trainer has a model that computes the cross-entropy itself."""
    model = TimmCAMForImageClassification(pristine.config)
    model.load_state_dict(pristine.state_dict())
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    shared = {
        "output_dir": broadcast_object_list([tempfile.mkdtemp()])[0],  # one folder for all processes
        "per_device_train_batch_size": args.batch_size,
        "max_steps": args.warmup + args.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": args.device == "cuda",
        "use_cpu": args.device == "cpu",
        "bf16": args.bf16,
        "torch_compile": args.compile,
    }
    size = max(4 * args.batch_size, args.memory_batch_size or 0)
    images = RandomImages(size, model.input_size, model.config.num_labels)
    if name == BARE:
        return BareLoop(model, images, args)
    if name == PLAIN:
        trainer = Trainer(model, TrainingArguments(**shared), train_dataset=images, data_collator=Collator(plain=True))
    else:
        # full weight of the meta terms
        options = {"num_neighbors": min(10, args.batch_size - 1), "monitor_fraction": 0, **CASES[name]}
        trainer = HNMLTrainer(
            model,
            HNMLTrainingArguments(**shared, **options),
            train_dataset=images,
            data_collator=Collator(plain=False),
        )
    trainer.clock = StepClock(torch.device(args.device))
    trainer.add_callback(trainer.clock)
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_trainers(args, names) -> dict[str, Trainer]:
    set_seed(0)  # the same weights on every process
    pristine = TimmCAMForImageClassification.from_timm(
        args.backbone, num_labels=args.num_labels, image_size=args.image_size, **json.loads(args.model_args)
    )
    return {name: build_trainer(name, pristine, args) for name in names}


def one_step(trainer: Trainer, batch_size: int):
    """A whole training step, outside the loop: forward, backward, optimizer, teacher."""
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(batch_size)])

    def step():
        trainer.training_step(trainer.model_wrapped, inputs)
        trainer.callback_handler.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.step()
        trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.zero_grad()

    trainer.is_in_train, trainer.state.global_step = True, 0
    return step


def add_step_options(parser):
    parser.add_argument("--backbone", default="resnet18_cifar")
    parser.add_argument("--image_size", type=int, default=None, help="Default: the backbone's own.")
    parser.add_argument("--model_args", default="{}", help="Other arguments of `timm.create_model`, as JSON.")
    parser.add_argument("--num_labels", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--memory_batch_size", type=int, help="Batch for the memory figures; default: the same.")
    parser.add_argument("--steps", type=int, default=4, help="Timed steps per case and round.")
    parser.add_argument("--warmup", type=int, default=2, help="Steps before them, at least 1.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="Threads on a CPU.")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--compile", action="store_true")
