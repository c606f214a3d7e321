"""The options that train and audit share, and what is made of them: data and a model."""

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType

import datasets
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub.utils import disable_progress_bars
from recipe import JSON_OPTIONS, apply_recipe, expand_home, likely_options, name_place
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hnml_hf import (
    CheckpointError,
    HNMLTrainingArguments,
    NonFiniteError,
    TimmCAMForImageClassification,
    UnreadableImageError,
    load_noisy_dataset,
    split_validation,
)
from hnml_hf.audit.outputs import read_options
from hnml_hf.cli import (
    A_DATASET,
    MEANINGS,
    HelpFormatter,
    answer_help,
    find_recipe,
    missing,
    plain_message,
    quiet_pipes,
    refuse_retired,
)
from hnml_hf.common.allocator import keep_freed_memory
from hnml_hf.common.atomic import atomic_write
from hnml_hf.common.devices import usable_device, why_unusable
from hnml_hf.common.words import counted
from hnml_hf.data.checks import apply_exclusions, load_exclusions
from hnml_hf.data.load import DATASET_NAMES
from hnml_hf.data.noise_file import apply_noise_file, load_noise_file, save_noise_file
from hnml_hf.data.splits import class_balanced
from hnml_hf.data.synthetic import draw_noise
from hnml_hf.hub.onnx_export import ExportError
from hnml_hf.hub.upload import HubError


MISTAKES = (
    *(ValueError, OSError, ImportError),
    *(CheckpointError, ExportError, HubError, NonFiniteError, UnreadableImageError),
)


@contextmanager
def plain_errors():
    """What a user can mend ends a script with its message alone; `--log_level debug` shows where it happened.

    Bars of the libraries are drawn on a terminal alone, as the package's own are.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()
    try:
        with quiet_pipes():
            yield
    except MISTAKES as error:
        logging.getLogger("hnml_hf.scripts").debug("The error in full:", exc_info=True)
        raise SystemExit(f"error: {plain_message(error)}") from error


RUN_FILES = ("model.safetensors", "config.json")  # what training leaves in its `output_dir`
PRETRAINED = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    backbone: str = field(default=None, metadata={"help": "A timm model name, for example `resnet50`."})
    pretrained: str = field(
        default="false",
        metadata={
            "help": "Start from pretrained weights: `true`, timm's from the Hub, or the path of a safetensors file "
            "with timm's names, or of a folder that has one."
        },
    )
    start_from_judge: bool = field(
        default=False,
        metadata={
            "help": "First judge the labels from the frozen pretrained features, in closed form; then train from the "
            "judge's classifier, on its targets (see `--targets`)."
        },
    )
    judge_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels at which the judge sees the images: the backbone's own size often tells more than "
            "a small one, at the cost of one forward pass. Default: `--image_size`."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the input in pixels; default: the backbone's."}
    )
    model_args: str = field(default="{}", metadata={"help": "Other arguments of `timm.create_model`, as JSON."})
    channels_last: bool | None = field(
        default=None,
        metadata={
            "help": "Keep images as (height, width, channels) in memory: faster convolutions. Default: everywhere but "
            "on a GPU of Apple's."
        },
    )
    freeze_batch_norm: bool = field(
        default=False,
        metadata={
            "help": "Keep the backbone's batch-norm statistics as they came. Those of a small dataset, or of another "
            "image size, may be far from what pretrained weights expect."
        },
    )

    def __post_init__(self):
        self.pretrained = PRETRAINED.get(str(self.pretrained).lower(), self.pretrained)


@dataclass
class SourceArguments:
    """Where a dataset is, and what its columns are."""

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
    class_names: str | None = field(
        default=None,
        metadata={
            "help": 'Class names in the order of their ids, as JSON: \'["cat", "dog"]\'; for labels that are numbers '
            'counted from 1, \'["1", "2"]\'. Names of the data are put in that order, not renamed. Default: those of '
            "the data, or sorted."
        },
    )
    splits: str | None = field(
        default=None,
        metadata={"help": 'Splits under other names, as JSON: \'{"train": "train.csv", "test": "val.csv"}\'.'},
    )
    clean_label_column: str | None = field(
        default=None, metadata={"help": "Column with true labels, if there is one; `none` ignores a `clean_label`."}
    )
    index_column: str | None = field(
        default=None, metadata={"help": "Column with stable sample ids, if there is one; `none` ignores an `index`."}
    )
    test_label_column: str | None = field(
        default=None, metadata={"help": "Label column of the other splits, if it has another name there."}
    )
    split_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the split of each row; `--splits` then names its values. Default: `split`, `subset`, "
            "`partition`, `set`, `dataset`, `phase`, `fold`, `usage`, or a name that ends so (`data_split`), where "
            "its values are names of splits."
        },
    )
    max_pixels: int = field(default=64_000_000, metadata={"help": "Images with more pixels count as unreadable."})
    partial: bool = field(
        default=False, metadata={"help": "The folder holds a part of a known dataset: skip its size checks."}
    )


@dataclass
class DataArguments(SourceArguments):
    """What is made of it for training."""

    _argument_group_name = "data"

    weight_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the confidence in each training label, from 0 to 1. It scales the loss on that "
            "label. Default: the column `weight` of a cleaned dataset, `label_weight` of a cleaned table."
        },
    )
    noise: str | None = field(
        default=None,
        metadata={
            "help": "Corrupt the training labels: symmetric, asymmetric, pairflip, instance, matrix; or a mapping "
            "(JSON) with `kind` and, optionally, `rate`, `seed`, `draw` (`per_sample` or `exact`), "
            "`include_true` (symmetric: a redrawn label may be the true one), `scheme` (asymmetric: which classes are "
            "confused), `matrix` (CSV file: row i holds P(given = j | true = i)), `pixel_scaling` and `image_size` "
            "(instance), `output` (a file to save the drawn labels to); or with `file`, a noise file of such labels, "
            "alone."
        },
    )
    noise_rate: float | None = field(default=None, metadata={"help": "Rate of the corruption, in [0, 1]."})
    noise_seed: int = field(default=0, metadata={"help": "Seed of the corruption and of the held-out labels."})
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of the noisy training data to hold out, if the dataset has no validation."},
    )
    eval_test: bool = field(
        default=False,
        metadata={
            "help": "Also measure at every evaluation, for curves, the test set and how many of 1,000 labels that are "
            "known to be wrong are memorized. No model is chosen by it."
        },
    )
    eval_both: bool = field(
        default=True,
        metadata={
            "help": "Measure student and teacher at every evaluation. False: only the one that is saved, and both at "
            "the end."
        },
    )
    exclude: str | None = field(
        default=None, metadata={"help": "Exclusion list of `hnml check`; its rows are left out."}
    )
    on_missing: str = field(
        default="error", metadata={"help": "What to do if a listed image is missing: `error`, or `skip` and count."}
    )
    class_balanced_samples: int | None = field(
        default=None, metadata={"help": "Number of training images to keep, the same number for each class."}
    )
    audit: bool = field(
        default=True,
        metadata={"help": "Score every training label at the end and write a report to `_audit/`."},
    )
    augmentation: str = field(default="standard", metadata={"help": "none, standard, shift or randaugment."})
    resident: bool | None = field(
        default=None,
        metadata={
            "help": "Keep all images, which must be of one size, on the training device, and prepare whole batches "
            "there. Default: on a GPU, for images of at most 64 pixels."
        },
    )
    strong_view: bool = field(
        default=False,
        metadata={
            "help": "Show the student other colors and an erased part; the teacher sees the image without them."
        },
    )
    cache_images: bool = field(
        default=False, metadata={"help": "Keep decoded images in memory, in each worker; for small images."}
    )
    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mixup, for `ce` and `hnml`; mixed images have no audit. 0: off."}
    )


def saved_data_arguments(run: str) -> DataArguments:
    """The options of the dataset of a run, also of one of an earlier version; see [`read_options`]."""
    options, known = read_options(run), {option.name for option in fields(DataArguments)}
    if options.keys() - known:
        logging.getLogger("hnml_hf.scripts").warning(
            "%s was trained by an earlier version; its options that there are no more are left out: %s. A dataset "
            "that they would have changed is refused.",
            run,
            ", ".join(sorted(options.keys() - known)),
        )
    return DataArguments(**{name: value for name, value in options.items() if name in known})


def save_data_arguments(run: str, data_args: DataArguments):
    """Say in a run what it was audited on, for [`saved_data_arguments`]: a review, and another audit, need it. Paths
    are in full, so that they hold wherever a command is given."""
    options = asdict(data_args)
    local = data_args.dataset not in DATASET_NAMES and os.path.exists(os.path.expanduser(data_args.dataset or ""))
    for name in ("data_dir", "exclude", *(["dataset"] if local else [])):
        options[name] = options[name] and os.path.abspath(os.path.expanduser(options[name]))
    with atomic_write(Path(run, "_audit", "dataset.json")) as unfinished:
        unfinished.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")


def command_words(argv: list[str] | None) -> list[str]:
    """The words of the command line, or the given ones, with `~` as the home folder in `--option=~/file` as well."""
    return list(map(expand_home, sys.argv[1:] if argv is None else argv))


def parse_all(parser: HfArgumentParser, argv: list[str], moved: Mapping[str, str] = MappingProxyType({})) -> list:
    """The dataclasses of a parser; an option that none of them has is an error that names the likeliest ones, or for
    one that the command has lost what `moved` says."""
    *parsed, unknown = parser.parse_args_into_dataclasses(command_words(argv), return_remaining_strings=True)
    if unknown:
        refuse_retired(parser, [word.lstrip("-").partition("=")[0] for word in unknown], moved)
        name = unknown[0].partition("=")[0].removeprefix("--")
        parser.error(f"there is no option {unknown[0]}{likely_options(parser._actions, name)}")
    return parsed


def from_json(option: str, text: str | None):
    """The value of an option that is given as JSON, a list or an object."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"error: --{option} {text!r} is not valid JSON: {error}.") from error
    kind = JSON_OPTIONS[option]
    if not isinstance(value, kind):
        raise SystemExit(f"error: --{option} takes {'a list' if kind is list else 'an object'}, got {text!r}.")
    return value


def settle_dataset(parser: argparse.ArgumentParser, options: argparse.Namespace):
    """Take the dataset that was given as a word for `--dataset`; end with one line if there is none, or two."""
    if options.data is not None:
        if options.dataset not in (None, options.data):
            parser.error(f"{options.data} and --dataset {options.dataset} are two datasets; give one of them")
        options.dataset = options.data
    if options.dataset is None:
        parser.error(A_DATASET)


def implied_recipe(options: argparse.Namespace) -> str | None:
    """What options refine without `--recipe`: without a dataset the quickstart, for DATA of the user `own_folder`.

    A dataset that is given as `--dataset` comes without a recipe.
    """
    if options.data is None and options.dataset is None:
        if options.data_dir:
            raise SystemExit(
                f"error: --data_dir {options.data_dir}: which dataset lies there? For a folder of classes or a table "
                f"give its path alone: `hnml train {options.data_dir}`."
            )
        return "quickstart"
    if options.data is None or options.data in DATASET_NAMES:
        return "quickstart" if options.data == "quickstart" else None
    return "own_folder"


def cores() -> int:
    """The cores that a process of this run may use."""
    all_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, all_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def data_name(dataset: str, data_dir: str | None) -> str:
    """What a folder of outputs is called by: the name of the data, without folders above it or an ending."""
    return Path(data_dir if dataset == "imagefolder" and data_dir else dataset).resolve().stem


def new_run_folder(options: argparse.Namespace) -> str:
    """The `output_dir` of a run for which nobody named one: that of its data and objective.

    Raises:
        ValueError: if it holds a run already, unless this one goes on there.
    """
    name = data_name(options.data or options.dataset, options.data_dir)
    folder = Path("outputs", f"{name}_{options.objective}")
    there = any((folder / file).is_file() for file in RUN_FILES) or any(folder.glob("checkpoint-*"))
    if there and not options.resume_from_checkpoint:
        raise ValueError(
            f"{folder} holds a run already: name another folder by --output_dir, or go on with that run by "
            "--resume_from_checkpoint auto."
        )
    return str(folder)


def parse_arguments(argv: list[str], command: str = "train"):
    """Options of the recipe, overridden by those of the command line."""
    answer_help(command, argv)
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, HNMLTrainingArguments),
        formatter_class=HelpFormatter,
        usage="%(prog)s [DATA] [--recipe FILE_OR_NAME] [options]",
        allow_abbrev=False,
    )
    parser.add_argument("data", nargs="?", help="A folder of images, a table, a known dataset or a Hub id.")
    parser.add_argument("--recipe", help="YAML file of options, or its name in scripts/recipes; others override it.")
    for action in parser._actions:
        action.help = MEANINGS.get(action.dest, action.help)
    given, _ = parser.parse_known_args(command_words(argv))
    recipe = given.recipe or implied_recipe(given)
    places = {}
    if recipe is not None:
        places = apply_recipe(parser, find_recipe(recipe))
        if given.recipe is None and os.environ.get("RANK", "0") == "0":
            print(f"Recipe: {recipe} (`--recipe` takes another)", file=sys.stderr)
        if "dataloader_num_workers" in places:  # of the recipe, for a machine with as many cores
            parser.set_defaults(dataloader_num_workers=min(parser.get_default("dataloader_num_workers"), cores()))
    with_recipe, _ = parser.parse_known_args(command_words(argv))
    if with_recipe.output_dir is None and (with_recipe.data or with_recipe.dataset):
        parser.set_defaults(output_dir=new_run_folder(with_recipe))
    try:
        model_args, data_args, args, _ = parse_all(parser, argv)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ValueError(name_place(plain_message(error), places, argv)) from error
    if given.data is not None:
        settle_dataset(parser, given)
        data_args.dataset = given.data
    try:
        noise_options(data_args)
    except ValueError as error:
        raise ValueError(name_place(str(error), places, argv)) from error
    if data_args.dataset is None:
        parser.error(f"recipe {recipe} names no dataset: give one, as in `hnml {command} DATA --recipe {recipe}`")
    if model_args.backbone is None:
        parser.error("--backbone is needed, or a recipe that has one, for example `--recipe own_folder`")
    return model_args, data_args, args


COLUMNS = [option.name for option in fields(SourceArguments) if option.name.endswith("_column")]


def add_source_options(parser: argparse.ArgumentParser):
    """The options that say where a dataset is and what its columns are, for scripts that only read it."""
    for option in fields(SourceArguments):
        facts = {"default": option.default, "help": option.metadata["help"]}
        if option.type is bool:
            facts |= {"type": string_to_bool, "nargs": "?", "const": True}
        elif option.type is int:
            facts |= {"type": int}
        parser.add_argument(f"--{option.name}", **facts)


def read_dataset(options: argparse.Namespace | DataArguments, **more) -> DatasetDict:
    """The dataset that some options name, as it lies there."""
    return load_noisy_dataset(
        options.dataset,
        config=options.dataset_config,
        data_dir=options.data_dir,
        label_names=from_json("class_names", options.class_names),  # transformers has its own `--label_names`
        splits=from_json("splits", options.splits),
        builder_options=from_json("dataset_options", options.dataset_options) or None,
        partial=options.partial,
        **{name: getattr(options, name) for name in COLUMNS},
        **more,
    )


def chosen_split(data: DatasetDict, asked: str | None) -> str:
    """The split of `--split`; without it `test`, or the only one."""
    split = asked or ("test" if len(data) > 1 else next(iter(data)))
    if split not in data:
        there = ", ".join(f"`{name}`" for name in data)
        raise SystemExit(f"error: no split `{split}`; there are {there}: name one by --split")
    return split


def unusable(device: str | None) -> str | None:
    """Why nothing can be computed on the device of this name; None if it can, or none was named."""
    reason = None if device is None else why_unusable(device)
    return f"--device {device} cannot be used here: {reason}" if reason else None


def inference_device(name: str | None) -> torch.device:
    """The device of this name; by default a GPU if there is one. On a CPU the process keeps freed memory."""
    if problem := unusable(name):
        raise SystemExit(f"error: {problem}")
    device = usable_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def load_model(options: argparse.Namespace) -> TimmCAMForImageClassification:
    """The model of `options.model`, a folder or a repository on the Hub, whose names have a slash."""
    if problem := missing("model", options.model):
        raise SystemExit(f"error: {options.model}: {problem}")
    try:
        return TimmCAMForImageClassification.from_pretrained(options.model, revision=options.revision)
    except OSError as error:
        if os.path.exists(os.path.expanduser(options.model)):
            raise
        first_line = str(error).partition("\n")[0]
        raise SystemExit(
            f"error: {options.model}: there is no such folder, and the Hub gave none: {first_line}"
        ) from error


NOISE_KEYS = {  # key of the mapping `noise`: argument of `draw_noise`
    **{name: name for name in ("kind", "rate", "seed", "draw", "include_true", "pixel_scaling", "image_size")},
    "scheme": "asymmetric_scheme",
    "matrix": "transition_matrix",
}


def noise_options(data_args: DataArguments) -> dict | None:
    """What `noise`, `noise_rate` and `noise_seed` ask for, as one mapping; None for no noise.

    Raises:
        ValueError: on an unknown key, or options of a noise that nobody names.
    """
    noise = data_args.noise
    if isinstance(noise, str):
        noise = from_json("noise", noise) if noise.lstrip().startswith("{") else {"kind": noise}
    if noise is None:
        if data_args.noise_rate is not None:
            raise ValueError(
                f"--noise_rate {data_args.noise_rate}: nothing says which noise. Give its kind, as `--noise "
                "symmetric`; without it the labels stay as they are, and a noise rate means nothing."
            )
        return None
    if "manifest" in noise:
        raise ValueError(
            "`noise` has no key `manifest` any more: it is `file` now, as in `noise: {file: labels.json}`."
        )
    unknown = set(noise) - {*NOISE_KEYS, "output", "file"}
    if unknown or ("file" in noise) == ("kind" in noise) or ("file" in noise and len(noise) > 1):
        raise ValueError(
            f"`noise` is {json.dumps(noise)}; it takes `kind` and, optionally, "
            f"{', '.join(f'`{name}`' for name in [*NOISE_KEYS][1:])} and `output`; or `file` alone."
            + "".join(
                f" Did you mean `{close[0]}` by `{name}`?"
                for name in sorted(unknown)
                if (close := difflib.get_close_matches(name, NOISE_KEYS, n=1))
            )
        )
    given = {} if data_args.noise_rate is None else {"rate": data_args.noise_rate}
    return {"seed": data_args.noise_seed, **noise, **given} if "kind" in noise else noise


def add_noise_options(train: Dataset, noise: dict | None, *, max_pixels: int = DataArguments.max_pixels) -> Dataset:
    """The training set with the noise of [`noise_options`]."""
    if noise is None:
        return train
    if "file" in noise:
        return apply_noise_file(train, load_noise_file(noise["file"]))
    options = {argument: noise[key] for key, argument in NOISE_KEYS.items() if key in noise}
    drawn = draw_noise(train, **options, max_pixels=max_pixels)
    if "output" in noise:
        save_noise_file(noise["output"], drawn)
    return apply_noise_file(train, drawn)


def load_data(data_args: DataArguments) -> DatasetDict:
    """The dataset with its splits.

    Noise, if asked for, is drawn on the whole training set, and the exclusion list names rows of the whole; a balanced
    part is taken of what is left, and held-out labels of that.
    """
    noise = noise_options(data_args)
    data = read_dataset(
        data_args,
        on_missing=data_args.on_missing,
        weight_column=data_args.weight_column,
    )
    names = data["train"].features["label"].names
    if len(names) < 2:
        raise ValueError(
            f"The training data have one class, `{names[0]}`; a classifier needs at least two. In an image folder "
            "each class is a folder (`train/<class>/*.jpg`); in a table `--label_column` names the column of the "
            "classes."
        )
    if data_args.validation_fraction and "validation" in data:
        raise ValueError(
            f"`--validation_fraction {data_args.validation_fraction}` would hold out a part of the training data, but "
            f"there is a split `validation` of {counted(len(data['validation']), 'row')} already. Give "
            "`--validation_fraction 0` to use that, or leave it out by `--splits`, as in "
            '\'{"train": "train", "test": "test"}\'.'
        )
    data["train"] = add_noise_options(data["train"], noise, max_pixels=data_args.max_pixels)
    if data_args.exclude:
        data = apply_exclusions(data, load_exclusions(data_args.exclude))
    if data_args.class_balanced_samples is not None:
        data["train"] = class_balanced(data["train"], data_args.class_balanced_samples)
    if data_args.validation_fraction:
        data["train"], data["validation"] = split_validation(
            data["train"], fraction=data_args.validation_fraction, seed=data_args.noise_seed
        )
    return data


def build_model(model_args: ModelArguments, id2label: dict[int, str]) -> TimmCAMForImageClassification:
    model = TimmCAMForImageClassification.from_timm(
        model_args.backbone,
        id2label=id2label,
        pretrained=model_args.pretrained,
        image_size=model_args.image_size,
        **from_json("model_args", model_args.model_args),
    )
    model.batch_norm_frozen = model_args.freeze_batch_norm
    channels_last = model_args.channels_last
    if channels_last is None:
        channels_last = not torch.backends.mps.is_available()
    return model.to(memory_format=torch.channels_last) if channels_last else model
