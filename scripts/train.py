r"""Train a timm backbone on noisy labels.

    accelerate launch scripts/train.py                   # the quickstart, on data that comes with the package
    accelerate launch scripts/train.py --recipe quickstart --objective ce --output_dir outputs/ce
    accelerate launch scripts/train.py --dataset imagefolder --data_dir photos --backbone resnet50 --pretrained true \
        --learning_rate 0.005 --output_dir outputs/photos

Options come from the recipe first (a YAML file of the options below, or the name of one in scripts/recipes), then from
the command line.

SIGTERM or SIGINT (Ctrl-C) finishes the step, saves a checkpoint and ends with code 75; a second one ends at once.
After that, or any other end, the same command with `--resume_from_checkpoint auto` goes on as if it had not happened.
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
import yaml
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import HfArgumentParser

from hnml_hf import (
    EXIT_CODE,
    HNMLTrainer,
    HNMLTrainingArguments,
    HubError,
    MixupCollator,
    TimmCAMForImageClassification,
    TrainingInterrupted,
    TransformedDataset,
    apply_manifest,
    apply_quarantine,
    audit_run,
    cam_examples,
    collate_images,
    command_line,
    compute_metrics,
    create_image_processor,
    create_strong_transform,
    create_transforms,
    draw_noise,
    load_manifest,
    load_noisy_dataset,
    load_quarantine,
    noise_auroc,
    save_manifest,
    split_validation,
)


RECIPES = Path(__file__).parent / "recipes"


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they are written, and the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    backbone: str = field(default=None, metadata={"help": "A timm model name, for example `resnet50`."})
    pretrained: bool = field(default=False, metadata={"help": "Start from timm's pretrained weights (from the Hub)."})
    weights: str | None = field(
        default=None, metadata={"help": "Start from this local safetensors file with timm's names."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the input in pixels; default: the backbone's."}
    )
    model_args: str = field(default="{}", metadata={"help": "Other arguments of `timm.create_model`, as JSON."})
    channels_last: bool = field(
        default=False, metadata={"help": "Keep images as (height, width, channels) in memory: faster convolutions."}
    )


@dataclass
class DataArguments:
    _argument_group_name = "data"

    dataset: str = field(
        default=None, metadata={"help": "`quickstart`, `imagefolder`, a known dataset, a table, a folder or a Hub id."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, if it has several."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Where the dataset lies, if it is not downloaded."})
    dataset_options: str = field(
        default="{}", metadata={"help": "Further options of a known dataset, as JSON: `imagenet_dir` of WebVision."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column with images or paths."})
    label_column: str | None = field(default=None, metadata={"help": "Column with the given, maybe wrong, labels."})
    splits: str | None = field(
        default=None,
        metadata={"help": 'Splits under other names, as JSON: \'{"train": "train.csv", "test": "val.csv"}\'.'},
    )
    clean_label_column: str | None = field(
        default=None, metadata={"help": "Column with true labels, if there is one."}
    )
    index_column: str | None = field(
        default=None, metadata={"help": "Column with stable sample ids, if there is one."}
    )
    test_label_column: str | None = field(
        default=None, metadata={"help": "Label column of the other splits, if it has another name there."}
    )
    weight_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that says how far each training label is believed, from 0 to 1; it scales the loss on the "
            "given label. Default: `weight` of a dataset that `scripts/audit.py` has cleaned."
        },
    )
    noise: str | None = field(
        default=None,
        metadata={"help": "Corrupt the training labels: symmetric, asymmetric, pairflip, instance, matrix."},
    )
    noise_rate: float | None = field(default=None, metadata={"help": "Rate of the corruption, in [0, 1]."})
    noise_draw: str = field(default="per_sample", metadata={"help": "`per_sample`, or `exact` for an exact count."})
    noise_seed: int = field(default=0, metadata={"help": "Seed of the corruption."})
    noise_include_true: bool = field(
        default=False, metadata={"help": "Symmetric: a redrawn label may be the true one."}
    )
    noise_scheme: str | None = field(default=None, metadata={"help": "Asymmetric: which classes are confused."})
    noise_matrix: str | None = field(default=None, metadata={"help": "CSV file: row i holds P(given = j | true = i)."})
    noise_pixel_scaling: str = field(default="raw", metadata={"help": "Instance: raw, unit or standardized pixels."})
    noise_image_size: int | None = field(
        default=None, metadata={"help": "Instance: side to which images are resized."}
    )
    noise_output: str | None = field(default=None, metadata={"help": "Save the drawn labels to this file (JSON)."})
    noise_manifest: str | None = field(default=None, metadata={"help": "Apply the labels saved in this file instead."})
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the noisy training data to hold out, if the dataset has no validation."},
    )
    eval_test: bool = field(
        default=False,
        metadata={"help": "Measure the test set at every evaluation too, for curves; it chooses nothing."},
    )
    quarantine: str | None = field(
        default=None, metadata={"help": "List of bad rows from `scripts/audit_data.py`; they are left out."}
    )
    partial: bool = field(
        default=False, metadata={"help": "The folder holds a part of a known dataset: skip its size checks."}
    )
    on_missing: str = field(
        default="error", metadata={"help": "A listed image that is not there: `error`, or `skip` and count."}
    )
    class_balanced_samples: int | None = field(
        default=None, metadata={"help": "Keep so many training images, the same number of each class."}
    )
    audit: bool = field(
        default=True,
        metadata={"help": "At the end score every training label and write a report, to `_audit/`."},
    )
    augmentation: str = field(default="standard", metadata={"help": "none, standard or randaugment."})
    strong_view: bool = field(
        default=False,
        metadata={"help": "Change colours and erase a part of what the student sees; the teacher sees it without."},
    )
    cache_images: bool = field(
        default=False, metadata={"help": "Keep what was read in memory, in each worker; for small images."}
    )
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mixup, for `ce` and `hnml`; mixed images leave no audit. 0 is off."}
    )
    cutmix_alpha: float = field(default=0.0, metadata={"help": "CutMix, for objective `ce`; 0 is off."})


def find_recipe(name: str) -> Path:
    """A recipe by its path, or by its name among those that come with the scripts."""
    candidates = [Path(name), RECIPES / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise SystemExit(f"--recipe {name}: there is no such file, nor a recipe of that name. Known: {known}.")


def parse_arguments(argv: list[str], doc: str = __doc__):
    """Options of the recipe, overridden by those of the command line; none at all mean the quickstart."""
    recipes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipes.add_argument("--recipe", type=find_recipe, default=None if argv else find_recipe("quickstart"))
    recipe, argv = recipes.parse_known_args(argv)
    options = []
    for name, value in (yaml.safe_load(recipe.recipe.read_text("utf-8")) if recipe.recipe else {}).items():
        options += [f"--{name}", json.dumps(value) if isinstance(value, (dict, bool)) else str(value)]
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, HNMLTrainingArguments),
        description=doc,
        formatter_class=HelpFormatter,
        usage="%(prog)s [--recipe FILE_OR_NAME] [options]",
    )
    parser.add_argument("--recipe", help="YAML file of options, or its name in scripts/recipes; others override it.")
    model_args, data_args, args, _ = parser.parse_args_into_dataclasses(options + argv)
    for name, value in (("--backbone", model_args.backbone), ("--dataset", data_args.dataset)):
        if value is None:
            parser.error(
                f"{name} is needed, from the command line or from a --recipe; without any option the quickstart runs"
            )
    return model_args, data_args, args


def load_data(data_args: DataArguments):
    """The dataset with its splits; noise, if asked for, is drawn on the whole training set before the split."""
    columns = [f"{name}_column" for name in ("image", "label", "clean_label", "index", "test_label", "weight")]
    data = load_noisy_dataset(
        data_args.dataset,
        config=data_args.dataset_config,
        data_dir=data_args.data_dir,
        splits=None if data_args.splits is None else json.loads(data_args.splits),
        builder_options=json.loads(data_args.dataset_options) or None,
        partial=data_args.partial,
        on_missing=data_args.on_missing,
        class_balanced_samples=data_args.class_balanced_samples,
        **{name: getattr(data_args, name) for name in columns},
    )
    if data_args.noise_manifest:
        data["train"] = apply_manifest(data["train"], load_manifest(data_args.noise_manifest))
    elif data_args.noise:
        manifest = draw_noise(
            data["train"],
            kind=data_args.noise,
            rate=data_args.noise_rate,
            seed=data_args.noise_seed,
            draw=data_args.noise_draw,
            include_true=data_args.noise_include_true,
            asymmetric_scheme=data_args.noise_scheme,
            transition_matrix=data_args.noise_matrix,
            pixel_scaling=data_args.noise_pixel_scaling,
            image_size=data_args.noise_image_size,
        )
        data["train"] = apply_manifest(data["train"], manifest)
        if data_args.noise_output:
            save_manifest(data_args.noise_output, manifest)
    if data_args.quarantine:
        data = apply_quarantine(data, load_quarantine(data_args.quarantine))
    if data_args.validation_fraction and "validation" not in data:
        data["train"], data["validation"] = split_validation(
            data["train"], fraction=data_args.validation_fraction, seed=data_args.noise_seed
        )
    return data


def build_model(model_args: ModelArguments, id2label: dict[int, str]) -> TimmCAMForImageClassification:
    model = TimmCAMForImageClassification.from_timm(
        model_args.backbone,
        id2label=id2label,
        pretrained=model_args.weights or model_args.pretrained,
        image_size=model_args.image_size,
        **json.loads(model_args.model_args),
    )
    return model.to(memory_format=torch.channels_last) if model_args.channels_last else model


def measure(trainer: HNMLTrainer, train_set: TransformedDataset, held_out: dict[str, TransformedDataset]) -> dict:
    """Accuracy of what was saved on the test set, and how well its doubt finds the wrong training labels.

    Without a test set the validation set is measured, whose labels may be wrong; `eval_split` says which it was.
    """
    metrics = {}
    final = "test" if "test" in held_out else "validation"
    if final in held_out:
        metrics.update(trainer.evaluate(held_out[final]))
        metrics |= {"eval_split": final, "eval_accuracy_last": metrics["eval_accuracy"]}
    for split in held_out.keys() - {"validation", "test"}:  # for example WebVision's classes in ImageNet
        metrics.update(trainer.predict(held_out[split], metric_key_prefix=split).metrics)
    if (train_set.clean_labels >= 0).any():
        logits = trainer.predict(train_set, metric_key_prefix="train").predictions
        metrics["train_noise_auroc"] = noise_auroc(logits, train_set.labels, train_set.clean_labels)
    if trainer.args.load_best_model_at_end and final in held_out:
        trainer.load_last_weights()
        metrics["eval_accuracy_last"] = trainer.predict(held_out[final], metric_key_prefix="last").metrics[
            "last_accuracy"
        ]
    return metrics


# rows of the table at the end, in order
REPORTED = {
    "objective": "objective",
    "eval_split": "measured on the split",
    "eval_accuracy": "accuracy, as saved",
    "eval_accuracy_last": "accuracy, last epoch",
    "eval_student_accuracy": "accuracy of the student",
    "eval_teacher_accuracy": "accuracy of the teacher",
    "train_noise_auroc": "finding wrong labels (AUROC)",
    "train_samples_per_second": "images per second",
    "train_runtime": "seconds of training",
}


def print_table(title: str, metrics: dict):
    rows = {text: metrics[name] for name, text in REPORTED.items() if metrics.get(name) is not None}
    width = max(map(len, rows))
    lines = [
        f"  {text:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {text:<{width}}  {value}"
        for text, value in rows.items()
    ]
    print("\n".join(["", title, *lines, ""]))


def write_audit(trainer: HNMLTrainer, data_args: DataArguments, dataset, transform):
    """Say of every training label how likely it is wrong, from what training saw of it, and show the worst."""
    args, config = trainer.args, trainer.model.config
    epochs = trainer.state.epoch or 0
    table = audit_run(
        args.output_dir,
        trainer.statistics.records,
        dataset,
        transform=transform,
        model=trainer.evaluated_model(),
        crop_pct=config.pretrained_cfg.get("crop_pct", 0.875),
        curves=trainer.state.log_history,
        source=data_args.dataset,
        provenance=f"{config.architecture}, objective {args.objective}, {epochs:.3g} epochs, seed {args.seed}. The "
        "model was trained on the labels it judges.",
    )
    folder = Path(args.output_dir, "_audit")
    (folder / "dataset.json").write_text(json.dumps(asdict(data_args), indent=1) + "\n", encoding="utf-8")
    low, high = table.attrs["noise_rate_interval"]
    estimate = f"{table.attrs['noise_rate']:.1%} ({low:.1%} to {high:.1%})"
    trainer.card_facts["noise_estimate"] = f"an audit by the model itself estimates {estimate}"
    print(f"Wrong labels: {estimate}, see {folder / 'report.html'}")


def publish(trainer: HNMLTrainer, model_args: ModelArguments, data_args: DataArguments, data, argv: list[str]):
    """Write the card, and push if that was asked for. Only images that come with the package become part of a card."""
    noise = None
    if data_args.noise_manifest:
        noise = "from a saved manifest"
    elif data_args.noise:
        noise = f"{data_args.noise}, rate {data_args.noise_rate}, {data_args.noise_draw}, seed {data_args.noise_seed}"
    facts = {
        "dataset": data_args.dataset,
        "noise": noise,
        "finetuned_from": "a local file" if model_args.weights else None,
        "command": command_line("scripts/train.py", argv),
        "split": "test" if "test" in data else "validation",
    }
    if model_args.pretrained and not model_args.weights:
        facts["finetuned_from"] = trainer.model.config.pretrained_cfg.get("hf_hub_id")
    if data_args.dataset == "quickstart" and trainer.is_world_process_zero():
        images = [data["test"][row]["image"] for row in range(12)]
        cam_examples(trainer.evaluated_model().eval(), images).save(Path(trainer.args.output_dir, "cam_examples.png"))
    try:
        trainer.push_to_hub(**facts) if trainer.args.push_to_hub else trainer.create_model_card(**facts)
    except HubError as error:
        raise SystemExit(str(error)) from error


@record  # so that a launcher of several processes shows the error of the one that failed first
def main(argv: list[str] | None = None):
    model_args, data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("hnml_hf").setLevel(args.get_process_log_level())
    transformers.utils.logging.disable_progress_bar()  # of single files; training keeps its own
    transformers.set_seed(args.seed)

    with args.main_process_first(local=True, desc="reading the dataset"):
        data = load_data(data_args)
    names = data["train"].features["label"].names
    model = build_model(model_args, dict(enumerate(names)))
    train_transform, eval_transform = create_transforms(
        model.config.pretrained_cfg, augmentation=data_args.augmentation
    )
    strong = create_strong_transform(train_transform) if data_args.strong_view else None
    kept = "tensors" if data_args.cache_images else None  # nothing is drawn in evaluation
    kept_for_training = "images" if kept and (strong or train_transform is not eval_transform) else kept
    train_set = TransformedDataset(
        data["train"], train_transform, seed=args.seed, strong_transform=strong, cache=kept_for_training
    )
    held_out = {
        split: TransformedDataset(rows, eval_transform, cache=kept) for split, rows in data.items() if split != "train"
    }

    mix = {"mixup_alpha": data_args.mixup_alpha, "cutmix_alpha": data_args.cutmix_alpha}
    trainer = HNMLTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=held_out if data_args.eval_test else held_out.get("validation", held_out.get("test")),
        data_collator=MixupCollator(len(names), seed=args.seed, **mix) if any(mix.values()) else collate_images,
        compute_metrics=compute_metrics,
        processing_class=create_image_processor(model.config.pretrained_cfg),
    )
    try:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except TrainingInterrupted as interrupted:
        print(interrupted, file=sys.stderr)
        raise SystemExit(EXIT_CODE) from interrupted
    trainer.save_model(_internal_call=True)  # without a push; that comes last, with results and card
    metrics = {
        "dataset": Path(data_args.dataset).name,
        "objective": args.objective,
        "seed": args.seed,
        "evaluated": "teacher" if args.eval_teacher else "student",
        **result.metrics,
    }
    metrics.update(measure(trainer, TransformedDataset(data["train"], eval_transform), held_out))
    if trainer.is_world_process_zero():
        trainer.save_metrics("all", metrics, combined=False)
        trainer.save_state()
        print_table(f"Saved to {args.output_dir}", metrics)
        if data_args.audit and trainer.statistics is None:
            print("No audit: mixed images tell nothing of one label. `scripts/audit.py --model` scores the dataset.")
        elif data_args.audit:
            write_audit(trainer, data_args, data["train"], eval_transform)
    publish(trainer, model_args, data_args, data, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
