r"""Train a timm backbone on noisy labels.

    accelerate launch scripts/train.py                        # the quickstart, on data that comes with the package
    accelerate launch scripts/train.py --objective ce --output_dir outputs/ce     # the same with another objective
    accelerate launch scripts/train.py photos                 # a folder of classes, with the recipe `own_folder`
    accelerate launch scripts/train.py photos.csv --backbone convnext_tiny --output_dir outputs/photos
    accelerate launch scripts/train.py --dataset photos --backbone resnet18 --learning_rate 0.1   # without a recipe

Options come from a recipe first (a YAML file of the options below, or the name of one in scripts/recipes), then from
the command line. Without a dataset the recipe is `quickstart`, for your own DATA `own_folder`; with `--dataset` none.
What is wrong with options or data is said in one line; `--log_level debug` shows where.

SIGTERM or SIGINT (Ctrl-C) finishes the step, saves a checkpoint and ends with code 75; a second one ends at once.
After that, or any other end, the same command with `--resume_from_checkpoint auto` goes on as if it had not happened.
"""

from hnml_hf.common.collector import end_of_imports, start_of_imports


start_of_imports()

import logging
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from options import (
    DataArguments,
    ModelArguments,
    build_model,
    cores,
    from_json,
    load_data,
    noise_options,
    parse_arguments,
    plain_errors,
    save_data_arguments,
)
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import Subset
from torchvision.transforms.functional import to_tensor

from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    MixupCollator,
    NonFiniteError,
    TrainingInterrupted,
    TransformedDataset,
    audit_run,
    collate_images,
    compute_metrics,
    create_image_processor,
    create_transforms,
)
from hnml_hf.audit.dynamics import save_judge_dynamics
from hnml_hf.audit.features import FEATURES_FOLDER, features_beside, load_backbone
from hnml_hf.audit.start import judge_by_model, judge_records, start_from_judge
from hnml_hf.common.allocator import keep_freed_memory
from hnml_hf.common.words import counted
from hnml_hf.data.resident import BATCHED, ResidentDataset, create_batch_transforms, stack_images
from hnml_hf.data.schema import column
from hnml_hf.data.splits import held_out_labels
from hnml_hf.data.targets import add_targets, targets_of
from hnml_hf.data.transforms import SMALL_IMAGE, create_strong_transform
from hnml_hf.hub.model_card import command_line
from hnml_hf.inference import cam_examples
from hnml_hf.training.args import TEACHER_OBJECTIVES
from hnml_hf.training.data_checks import chosen_targets
from hnml_hf.training.distributed import on_first_process, require_same_on_all_processes
from hnml_hf.training.memorization import create_monitor
from hnml_hf.training.metrics import estimate_accuracy, noise_auroc
from hnml_hf.training.provenance import commit, versions
from hnml_hf.training.resume.files import run_lock
from hnml_hf.training.resume.signals import EXIT_CODE, EndAtOnce
from hnml_hf.training.resume.trainer import OF_EACH_PROCESS


end_of_imports()

WATCHED = 1_000  # known wrong labels that are looked up at each evaluation: a standard error of 1.6 points at most
RESIDENT_BYTES = 4 * 2**30  # of images that are kept on the device without being asked for


def measure(trainer: HNMLTrainer, train_set: TransformedDataset, held_out: dict[str, TransformedDataset]) -> dict:
    """Accuracy of what was saved on the test set, how well its doubt finds the wrong training labels, and the share of
    these that it repeats.

    Without a test set the validation set is measured, whose labels may be wrong; `eval_split` says which it was.
    """
    metrics = {}
    final = "test" if "test" in held_out else "validation"
    trainer.measure_both = True
    if final in held_out:
        metrics.update(trainer.evaluate(held_out[final]))
        metrics |= {"eval_split": final, "eval_accuracy_last": metrics["eval_accuracy"]}
    for split in held_out.keys() - {"validation", "test"}:  # for example WebVision's classes in ImageNet
        metrics.update(trainer.predict(held_out[split], metric_key_prefix=split).metrics)
    known = train_set.clean_labels >= 0
    if (train_set.labels != train_set.clean_labels)[known].any():  # else a pass over all images would find nothing
        logits = trainer.predict(train_set, metric_key_prefix="train").predictions
        metrics["train_noise_auroc"] = noise_auroc(logits, train_set.labels, train_set.clean_labels)
        wrong = known & (train_set.labels != train_set.clean_labels)
        metrics["train_memorized"] = float((logits.argmax(-1) == train_set.labels)[wrong].mean())
    if trainer.args.load_best_model_at_end and final in held_out:
        with trainer.last_weights():
            last = trainer.predict(held_out[final], metric_key_prefix="last").metrics
        metrics["eval_accuracy_last"] = last["last_accuracy"]
    return metrics


# rows of the table at the end, in order; labels that may be wrong measure agreement, not accuracy
REPORTED = {
    "objective": "objective",
    "eval_split": "measured on the split",
    "eval_accuracy": "{measured}, as saved",
    "eval_accuracy_last": "{measured}, last epoch",
    "eval_student_accuracy": "{measured}, student",
    "eval_teacher_accuracy": "{measured}, teacher",
    "accuracy_estimate": "accuracy, estimated",
    "train_noise_auroc": "finding wrong labels (AUROC)",
    "train_samples_per_second": "images per second",
    "train_runtime": "seconds of training",
}


def print_table(title: str, metrics: dict):
    measured = "accuracy" if metrics.get("eval_split") == "test" else "agreement with held-out labels"
    rows = {
        text.format(measured=measured): metrics[name]
        for name, text in REPORTED.items()
        if metrics.get(name) is not None
    }
    width = max(map(len, rows))
    lines = [
        f"  {text:<{width}}  {value:.4g}" if isinstance(value, float) else f"  {text:<{width}}  {value}"
        for text, value in rows.items()
    ]
    print("\n".join(["", title, *lines, ""]))


def loss_in_words(args: HNMLTrainingArguments, targets: str) -> str:
    """The objective, and what else its loss allows for."""
    more = ["loss corrected for symmetric noise"] if args.symmetric_correction else []
    more += {"posterior": ["targets of the judge"], "refreshed": ["targets judged again each epoch"]}.get(targets, [])
    return ", ".join([args.objective, *more])


def accuracy_estimate(
    metrics: dict, data_args: DataArguments, held_out: int, table, num_labels: int
) -> dict[str, str]:
    """The accuracy behind the agreement with held-out labels, if these are as noisy as the training labels.

    They are where they were split off the training data; those of a split of its own may be cleaner.
    """
    if metrics.get("eval_split") != "validation" or not data_args.validation_fraction:
        return {}
    rates = table.attrs["noise_rate"], table.attrs["noise_rate_interval"]
    estimate, low, high = estimate_accuracy(metrics["eval_accuracy"], held_out, *rates, num_labels)
    return {"accuracy_estimate": f"{estimate:.2g} ({low:.2g} to {high:.2g})"}


def write_audit(model, data_args: DataArguments, dataset, transform, records, *, output_dir: str, **facts):
    """Say of every training label how likely it is wrong, from what was seen of it, and show the worst.

    Returns:
        `pandas.DataFrame`: the table of [`audit_run`], with `attrs["estimate"]`, the estimated noise rate in words.
    """
    save_data_arguments(output_dir, data_args)  # first: an audit may be repeated by it
    data = model.config.pretrained_cfg
    table = audit_run(
        output_dir,
        records,
        dataset,
        transform=transform,
        model=model,
        crop_pct=data.get("crop_pct", 0.875),
        crop_mode=data.get("crop_mode", "center"),
        source=data_args.dataset,
        max_pixels=data_args.max_pixels,
        **facts,
    )
    folder = Path(output_dir, "_audit")
    low, high = table.attrs["noise_rate_interval"]
    estimate = f"{table.attrs['noise_rate']:.1%} ({low:.1%} to {high:.1%})"
    print(f"Wrong labels, by the audit: {estimate}, see {folder / 'report.html'}")
    if table.attrs["caution"]:
        print(f"Warning: {table.attrs['caution']}")
    table.attrs["estimate"] = estimate
    return table


def publish(trainer: HNMLTrainer, model_args: ModelArguments, data_args: DataArguments, data, argv: list[str]):
    """Write the card, and push if that was asked for. Only images that come with the package become part of a card."""
    noise = noise_options(data_args)
    if noise is not None:
        noise = ", ".join(f"{key} {value}" for key, value in noise.items() if key not in ("matrix", "output"))
        noise = "from a noise file" if noise.startswith("file") else noise.removeprefix("kind ")
    facts = {
        "dataset": data_args.dataset,
        "noise": noise,
        "finetuned_from": "a local file" if isinstance(model_args.pretrained, str) else None,
        "command": command_line("scripts/train.py", argv),
        "split": "test" if "test" in data else "validation",
    }
    if model_args.pretrained is True:
        facts["finetuned_from"] = trainer.model.config.pretrained_cfg.get("hf_hub_id")
    if data_args.dataset == "quickstart" and trainer.is_world_process_zero():
        images = [data["test"][row]["image"] for row in range(12)]
        cam_examples(trainer.evaluated_model().eval(), images).save(Path(trainer.args.output_dir, "cam_examples.png"))
    trainer.push_to_hub(**facts) if trainer.args.push_to_hub else trainer.create_model_card(**facts)


def resident_pixels(data, data_args: DataArguments, args) -> dict[str, torch.Tensor]:
    """The images of each split as one tensor on the training device; nothing if they are prepared one by one."""
    batched = data_args.augmentation in BATCHED and not data_args.strong_view
    rows = sum(len(split) for split in data.values())
    if data_args.resident is None:
        largest = SMALL_IMAGE
        wanted = batched and args.device.type == "cuda" and rows * 3 * largest**2 <= RESIDENT_BYTES
    else:
        largest, wanted = None, data_args.resident
    if not wanted:
        return {}
    if not batched:
        raise ValueError(
            f"`resident` prepares whole batches, for which there are the augmentations {', '.join(BATCHED)} and no "
            "strong view. Set it to false."
        )
    pixels = {}
    for name, split in data.items():
        pixels[name] = stack_images(
            TransformedDataset(split, to_tensor, max_pixels=data_args.max_pixels), largest=largest
        )
        if pixels[name] is None and data_args.resident:
            raise ValueError(f"`resident` needs images of one size, but those of `{name}` differ. Set it to false.")
        if pixels[name] is None:
            return {}
    return {name: stacked.to(args.device) for name, stacked in pixels.items()}


def prepare(rows, pixels, *, training: bool, data_args: DataArguments, pretrained_cfg: dict, seed: int):
    """Rows of a split as samples of training or of evaluation."""
    if pixels is not None:
        views = create_batch_transforms(pretrained_cfg, pixels.shape[2:], augmentation=data_args.augmentation)
        return ResidentDataset(rows, pixels, views[0 if training else 1], seed=seed)
    weak, evaluation = create_transforms(pretrained_cfg, augmentation=data_args.augmentation)
    kept = "tensors" if data_args.cache_images else None  # nothing is drawn in evaluation
    if not training:
        return TransformedDataset(rows, evaluation, cache=kept, max_pixels=data_args.max_pixels)
    strong = create_strong_transform(weak) if data_args.strong_view else None
    if kept and (strong or weak is not evaluation):
        kept = "images"
    return TransformedDataset(
        rows, weak, seed=seed, strong_transform=strong, cache=kept, max_pixels=data_args.max_pixels
    )


def known_wrong(train_set, plain, *, seed: int) -> Subset | None:
    """Some of the training images whose labels are known to be wrong, as evaluation sees them; None if there are none.

    Args:
        train_set ([`TransformedDataset`]): with `labels` and `clean_labels`.
        plain ([`TransformedDataset`]): the same rows without augmentation.
        seed (`int`): of the draw.
    """
    wrong = np.flatnonzero((train_set.clean_labels >= 0) & (train_set.labels != train_set.clean_labels))
    drawn = np.random.default_rng(seed).permutation(wrong)[:WATCHED]
    return Subset(plain, drawn.tolist()) if len(drawn) else None


def judged(judge: Callable, rows, args):
    """Judge the training labels that losses may see.

    Args:
        judge (`Callable`): from the positions `(m,)` of these rows to their [`Judgement`].
        rows (`datasets.Dataset`): all training rows.
        args ([`HNMLTrainingArguments`]): of the run.

    Returns:
        [`Judgement`] of them, the records of what it says of each, and all rows with their targets; a label that no
        loss sees stays its own target.
    """
    monitor, seen = create_monitor(args, len(rows)), np.arange(len(rows))
    index, labels = column(rows, "index"), column(rows, "label")
    if monitor is not None:
        seen = np.flatnonzero(~held_out_labels(index, monitor.fraction, seed=args.seed))
    judgement = judge(seen)
    num_labels, top_labels = len(judgement.transition_matrix), judgement.top_labels
    posterior = np.zeros((len(rows), top_labels.shape[1]), np.float32)
    classes = (labels[:, None] + np.arange(top_labels.shape[1])) % num_labels
    posterior[:, 0] = 1
    posterior[seen], classes[seen] = judgement.posterior, top_labels
    records = judge_records(index[seen], labels[seen], judgement)
    return judgement, records, add_targets(rows, posterior, classes)


def judges(
    model, model_args: ModelArguments, rows, samples: TransformedDataset, args, *, mixes: bool
) -> tuple[Callable, Callable]:
    """For [`judged`]: the judge that training starts from, and one that asks the network as it has become.

    Both are functions of positions; the second one of the network first.

    Raises:
        ValueError: if `args` asks for targets that this run, whose images are mixed if `mixes`, cannot have.
    """
    others = from_json("model_args", model_args.model_args)
    load = partial(load_backbone, model_args.backbone, pretrained=model_args.pretrained, **others)
    weights, resident = samples.weights, isinstance(samples, ResidentDataset)
    targets = chosen_targets(args, there=True, weighted=weights is not None, mixes=mixes, can_judge=True)
    reading = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.dataloader_num_workers}
    other_size = model_args.judge_image_size not in (None, model.input_size[-1])

    def start(seen: np.ndarray):
        return start_from_judge(
            model,
            rows.select(seen),
            load(image_size=model_args.image_size),
            judging=load(image_size=model_args.judge_image_size) if other_size else None,
            cache_dir=Path(args.output_dir, FEATURES_FOLDER),
            also_in=features_beside(args.output_dir),
            given=targets == "given",
            weights=None if weights is None else weights[seen],
            seed=args.seed,
            **reading,
        )

    def again(network, seen: np.ndarray):
        return judge_by_model(
            network,
            Subset(samples, seen.tolist()),
            weights=None if weights is None else weights[seen],
            seed=args.seed,
            **reading | ({"num_workers": 0} if resident else {}),
        )

    return start, again


def train(model_args: ModelArguments, data_args: DataArguments, args: HNMLTrainingArguments, argv: list[str]):
    """Read data and model, train, and write model, results, audit and card."""
    transformers.set_seed(args.seed)
    with args.main_process_first(local=True, desc="reading the dataset"):
        data = load_data(data_args)
    chooses = [
        option
        for option, given in (
            ("load_best_model_at_end", args.load_best_model_at_end),
            ("save_strategy=best", args.save_strategy == "best"),
            ("lr_scheduler_type=reduce_lr_on_plateau", args.lr_scheduler_type == "reduce_lr_on_plateau"),
        )
        if given
    ]
    if chooses and "validation" not in data:
        raise ValueError(
            f"`{chooses[0]}` needs held-out labels to choose by; the test set chooses nothing. Give a split "
            "`validation`, or `--validation_fraction 0.1`."
        )
    if args.metric_for_best_model and data_args.eval_test:  # then every metric says of which split it is
        metric = args.metric_for_best_model.removeprefix("eval_").removeprefix("validation_")
        args.metric_for_best_model = f"eval_validation_{metric}"
    names = data["train"].features["label"].names
    model = build_model(model_args, dict(enumerate(names)))
    views = create_transforms(model.config.pretrained_cfg, augmentation=data_args.augmentation)
    pixels = resident_pixels(data, data_args, args)
    prepared = partial(prepare, data_args=data_args, pretrained_cfg=model.config.pretrained_cfg, seed=args.seed)

    judgement = crossed = judge_again = None
    if model_args.start_from_judge and not model_args.pretrained:
        raise ValueError(
            "`start_from_judge` needs pretrained features: give `--pretrained true` or `--pretrained FILE`."
        )
    if model_args.judge_image_size is not None and not model_args.start_from_judge:
        raise ValueError("`judge_image_size` is of the judge: give `--start_from_judge true`, or leave it out.")
    if model_args.judge_image_size is not None and model_args.judge_image_size < 1:
        raise ValueError(f"`judge_image_size={model_args.judge_image_size}` must be at least 1 pixel.")
    plain = prepared(data["train"], pixels.get("train"), training=False)
    if model_args.start_from_judge:
        start, again = judges(
            model.to(args.device), model_args, data["train"], plain, args, mixes=bool(data_args.mixup_alpha)
        )
        judgement, crossed, with_targets = judged(start, data["train"], args)
        unjudged, data["train"] = data["train"], with_targets

        def judge_again(network):
            return targets_of(judged(partial(again, network), unjudged, args)[2])

        if args.process_index == 0:
            print(
                f"Judged {len(data['train']):,} labels from pretrained features: about {judgement.noise_rate:.1%} are "
                "wrong. Training starts from this classifier."
            )
    train_set = prepared(data["train"], pixels.get("train"), training=True)
    held_out = {
        split: prepared(rows, pixels.get(split), training=False) for split, rows in data.items() if split != "train"
    }

    mixup = data_args.mixup_alpha
    trainer = HNMLTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        cross_validated=crossed,
        judge_again=judge_again,
        wrongly_labeled=known_wrong(train_set, plain, seed=args.seed) if data_args.eval_test else None,
        eval_dataset=held_out if data_args.eval_test else held_out.get("validation", held_out.get("test")),
        data_collator=MixupCollator(len(names), seed=args.seed, mixup_alpha=mixup) if mixup else collate_images,
        compute_metrics=compute_metrics,
        processing_class=create_image_processor(model.config.pretrained_cfg),
        measure_both=data_args.eval_both,
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
        "symmetric_correction": args.symmetric_correction,
        "seed": args.seed,
        "num_processes": args.world_size,
        "commit": commit(),
        "versions": versions(),
        "evaluated": "teacher" if args.eval_teacher else "student",
        "targets": trainer.targets,
        "rows_train": len(data["train"]),
        "rows_test": len(data.get("test", ())),
        "pretrained": bool(model_args.pretrained),
        "image_size": model.config.pretrained_cfg["input_size"][-1],
        **result.metrics,
    }
    metrics.update(measure(trainer, plain, held_out))
    if "eval_split" not in metrics:  # nothing else would show that what the model says is not finite
        trainer.predict(Subset(plain, range(min(len(plain), args.per_device_eval_batch_size))))
    bad = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise NonFiniteError(f"`{bad[0]}` is not finite. Lower `--learning_rate`.")
    loss = loss_in_words(args, trainer.targets)
    if trainer.is_world_process_zero():
        save_judge_dynamics(args.output_dir, crossed)
        trainer.save_metrics("all", metrics, combined=False)
        trainer.save_state()
        if data_args.audit and trainer.dynamics is None:
            print("No audit: mixed images say nothing about one label. `scripts/audit.py --model` scores the dataset.")
        elif data_args.audit:
            epochs = trainer.state.epoch or 0
            table = write_audit(
                trainer.evaluated_model(),
                data_args,
                data["train"],
                views[1],
                trainer.dynamics.records,
                output_dir=args.output_dir,
                cross_validated=crossed,
                curves=trainer.state.log_history,
                provenance=f"{model.config.architecture}, objective {loss}, {epochs:.3g} epochs, seed "
                f"{args.seed}. The model was trained on the labels it judges"
                + (
                    "."
                    if crossed is None
                    else "; the judge that it started from has not seen the labels that it judged, gives the noise "
                    "rate and has half a say."
                ),
            )
            if judgement is not None:
                low, high = judgement.noise_rate_range
                said = f"{judgement.noise_rate:.1%} ({low:.1%} to {high:.1%})"
                trainer.card_facts["noise_estimate"] = f"the judge of the pretrained features estimates {said}"
            elif trainer.monitor is not None:  # without held-out labels a network that repeats labels finds none wrong
                said = table.attrs["estimate"]
                trainer.card_facts["noise_estimate"] = f"an audit by the model itself estimates {said}"
            metrics |= accuracy_estimate(metrics, data_args, len(held_out.get("validation", ())), table, len(names))
            trainer.card_facts |= {name: metrics[name] for name in ("accuracy_estimate",) if name in metrics}
        print_table(f"Saved to {args.output_dir}", metrics | {"objective": loss})
    publish(trainer, model_args, data_args, data, argv)


METRICS = ("loss", "accuracy", "top5_accuracy")


def check_metric(args: HNMLTrainingArguments, *, eval_test: bool, eval_both: bool):
    """Raise `ValueError` before data are read if a metric that the run is to go by is none that is measured."""
    asked = args.metric_for_best_model
    if asked is None:
        return
    name = asked.removeprefix("eval_")
    if name.startswith("test_"):
        raise ValueError(
            f"`metric_for_best_model={asked}` is of the test set, which chooses nothing. Give the name alone, as "
            "`accuracy`; it is measured on the held-out labels."
        )
    if eval_test:
        name = name.removeprefix("validation_")
    measured = list(METRICS)
    if eval_both and (args.eval_teacher or (args.objective in TEACHER_OBJECTIVES and args.teacher_source == "ema")):
        other = "student" if args.eval_teacher else "teacher"
        measured += [f"{other}_{metric}" for metric in METRICS]
    if name not in measured:
        raise ValueError(f"`metric_for_best_model={asked}` is not measured. There are {', '.join(measured)}.")


def started_with(model_args: ModelArguments, data_args: DataArguments, args: HNMLTrainingArguments) -> dict:
    """What all processes must have in common."""
    options = {**asdict(model_args), **asdict(data_args), **args.to_dict(), **versions(), "commit": commit()}
    return {name: value for name, value in options.items() if name not in OF_EACH_PROCESS}


@record  # so that a launcher of several processes shows the error of the one that failed first
def run(argv: list[str]):
    model_args, data_args, args = parse_arguments(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("hnml_hf").setLevel(args.get_process_log_level())
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # of each loader; once is enough
    if args.dataloader_num_workers > cores():
        logging.getLogger("hnml_hf.scripts").warning(
            f"{counted(args.dataloader_num_workers, 'worker', 'share')} {counted(cores(), 'core')}; as many as cores "
            "are faster."
        )
    if args.device.type == "cpu":
        keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()  # of single files; training keeps its own
    check_metric(args, eval_test=data_args.eval_test, eval_both=data_args.eval_both)
    with ExitStack() as held:
        if args.save_strategy != "no":
            held.enter_context(EndAtOnce())  # before and after the steps of training, which have their own
        require_same_on_all_processes(started_with(model_args, data_args, args))
        on_first_process(held.enter_context, run_lock(args.output_dir))  # until the card is written
        train(model_args, data_args, args, argv)


@plain_errors()
def main(argv: list[str] | None = None):
    run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
