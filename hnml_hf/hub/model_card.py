"""The model card: what happened in a run, from its log, its results and its options; nothing that did not happen."""

import html
import json
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..common.atomic import atomic_write
from ..common.words import counted
from ..data.schema import UNKNOWN, noise_rate
from .curves import epochs_of, training_curves


TEMPLATE = Path(__file__).with_name("model_card_template.md")
CURVES_FILE, CAMS_FILE, RESULTS_FILE = "training_curves.png", "cam_examples.png", "all_results.json"
HUB_DATASETS = {  # where the Hub has the images of a dataset that this package knows by name
    "quickstart": "zalando-datasets/fashion_mnist",
    **dict.fromkeys(("cifar10", "cifar10n"), "uoft-cs/cifar10"),
    **dict.fromkeys(("cifar100", "cifar100n"), "uoft-cs/cifar100"),
}
HYPERPARAMETERS = (  # of transformers; those of the method are the annotations of its own dataclass
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "max_grad_norm"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "optim_args", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "neftune_noise_alpha"),
    *("bf16", "fp16", "tf32", "torch_compile", "train_sampling_strategy"),
)
SAID_ELSEWHERE = ("objective", "do_train", "remove_unused_columns", "ddp_find_unused_parameters")  # or not to be told
METRICS = {"accuracy": "accuracy", "top5_accuracy": "top-5 accuracy", "loss": "cross-entropy"}
CLASSES_NAMED = 20


def plain(text: object, limit: int = 80) -> str:
    """Text of the user's as Markdown that shows it and does nothing else."""
    text = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in str(text))).strip()
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return re.sub(r"([\\`*_{}\[\]()!|~:@])", r"\\\1", html.escape(text, quote=False))


def shown(value: object) -> str:
    """A figure as a reader wants it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def changed_options(args) -> list[tuple[str, str]]:
    """Hyperparameters whose value is not the default, in order; no path, no token, nothing of the machine."""
    told = {*HYPERPARAMETERS, *type(args).__annotations__} - {*SAID_ELSEWHERE}
    changed = []
    for option in fields(args):
        value = getattr(args, option.name)
        if option.name not in told or value == option.default or value is None:
            continue
        if isinstance(value, (bool, int, float, str)) and os.sep not in str(value):
            changed.append((option.name, plain(getattr(value, "value", value))))
    return changed


def _strings(value) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _strings(part)


def _lies_here(word: str) -> bool:
    """Whether a word of a command, which may be JSON, names a file of this machine."""
    try:
        parts = list(_strings(json.loads(word))) if word[:1] in ("{", "[") else [word]
    except ValueError:
        parts = [word]
    shared = ("scripts/", "outputs/")  # folders of the sources, which others have too
    return any(os.path.isabs(p) or (not p.startswith(shared) and os.path.exists(p)) for p in parts if p)


def command_line(script: str, argv: list[str]) -> str:
    """A command as others may read it: no token, and `...` for what lies on this machine.

    Args:
        script (`str`): path of the script, from the root of the sources.
        argv (`list[str]`): the words that follow it.

    Returns:
        `str`: one line for a shell.
    """
    words, secret = [], False
    for word in argv:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if secret or "token" in option or _lies_here(value):
            value = "..." if value else value
        words.append(f"{option}{equals}{value}")
        secret = "token" in option and not equals
    return " ".join(["python", script, *(word if word == "..." else shlex.quote(word) for word in words)])


def is_hub_id(name: str | None) -> bool:
    """Whether something is `user/name` and not a folder here."""
    return name is not None and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not os.path.exists(name)


def dataset_name(dataset: str | None) -> tuple[str, str | None]:
    """How a card calls a dataset, and its id on the Hub if it has one. A local path is not told to anybody."""
    if not dataset:
        return "not stated", None
    if is_hub_id(dataset):
        return dataset, dataset
    if os.sep in dataset or os.path.exists(dataset):
        return "a local dataset", None
    return dataset, HUB_DATASETS.get(dataset.partition("-")[0])


def noise_statement(noise: str | None, labels, clean_labels, estimate: str | None = None) -> str:
    """What is known of the wrong labels: how they were made, their measured share, and an estimate of it."""
    parts = [plain(noise, 200)] if noise else []
    rate = noise_rate(labels, clean_labels)
    if rate is not None:
        known = int((clean_labels != UNKNOWN).sum())
        parts.append(f"{rate:.1%} of the {counted(known, 'label')} with a known true label are wrong")
    parts += [plain(estimate, 200)] if estimate else []
    return "; ".join(parts) or "not known: the data do not say which labels are wrong"


def hardware(device: str) -> str:
    """What it ran on, without the machine's name."""
    import torch

    cpu = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{torch.cuda.get_device_name()}, {cpu}" if device.startswith("cuda") else cpu


def generate_model_card(
    folder: str | os.PathLike,
    *,
    args,
    config: Mapping,
    log_history: list[dict],
    labels,
    clean_labels,
    evaluated: str,
    parameters: int,
    model_name: str | None = None,
    repo_id: str | None = None,
    dataset: str | None = None,
    dataset_license: str | None = None,
    noise: str | None = None,
    noise_estimate: str | None = None,
    accuracy_estimate: str | None = None,
    start: str | None = None,
    license: str | None = None,
    command: str | None = None,
    split: str = "test",
    tags: list[str] | None = None,
    max_steps: int | None = None,
) -> ModelCard:
    """Write `README.md` and the picture of the training curves into a trained folder.

    Args:
        folder (`str` or `os.PathLike`): where the model is; results are read from its `all_results.json`.
        args: the options of training, a dataclass.
        config (`Mapping`): the saved `config.json`.
        log_history (`list[dict]`): the Trainer's.
        labels, clean_labels (`np.ndarray` of shape `(n,)`): of the training data; -1 is an unknown true label.
        evaluated (`str`): `teacher` or `student`, the one that is published.
        parameters (`int`): size of the model.
        model_name (`str`, *optional*): title of the card.
        repo_id (`str`, *optional*): where it will be on the Hub.
        dataset (`str`, *optional*): its name, or its id on the Hub. A path is not written.
        dataset_license (`str`, *optional*): license of the data.
        noise (`str`, *optional*): how labels were corrupted, if they were.
        noise_estimate (`str`, *optional*): what an audit says of their share.
        accuracy_estimate (`str`, *optional*): the accuracy behind an agreement with noisy labels, with its range.
        start (`str`, *optional*): the weights that training started from, an id on the Hub or words; `None` is random.
        license (`str`, *optional*): license of the weights, an identifier of the Hub.
        command (`str`, *optional*): what was run.
        split (`str`): what the results were measured on.
        tags (`list[str]`, *optional*): more tags.
        max_steps (`int`, *optional*): optimizer steps taken.

    Returns:
        `ModelCard`: huggingface_hub's, as written.
    """
    folder = Path(folder)
    results_path = folder / RESULTS_FILE
    results = json.loads(results_path.read_text()) if results_path.is_file() else {}
    other = {"teacher": "student", "student": "teacher"}[evaluated]
    has_other = any(f"eval_{other}_{name}" in entry for name in METRICS for entry in (results, *log_history))
    name, hub_id = dataset_name(dataset)
    title = model_name or f"{config['architecture']}-{name.rpartition('/')[2]}".replace(" ", "-")
    dirty = split != "test"
    rows = [
        {
            "name": "agreement with the given labels" if dirty and key == "accuracy" else text,
            "published": shown(results[f"eval_{key}"]),
            "last": shown(
                results.get(f"eval_{key}_last", results[f"eval_{key}"] if not args.load_best_model_at_end else "–")
            ),
            "other": shown(results.get(f"eval_{other}_{key}", "–")),
        }
        for key, text in METRICS.items()
        if f"eval_{key}" in results
    ]
    evaluations = epochs_of(log_history)
    best = max(evaluations, key=lambda entry: entry["eval_accuracy"], default=None)
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "noisy-labels", "hnml_hf", *(tags or [])],
        license=license or "unknown",
        datasets=[hub_id] if hub_id else None,
        base_model=start if is_hub_id(start) else None,
        metrics=["accuracy"] if rows and not dirty else None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=hub_id or re.sub(r"[^\w.-]+", "-", name),
                dataset_name=name,
                dataset_split=split,
                metric_type={"accuracy": "accuracy", "top5_accuracy": "top_5_accuracy"}[key],
                metric_name={"accuracy": "Accuracy", "top5_accuracy": "Top-5 accuracy"}[key],
                metric_value=round(results[f"eval_{key}"], 6),
            )
            for key in ("accuracy", "top5_accuracy")
            if f"eval_{key}" in results and not dirty  # agreement with noisy labels is no accuracy
        ]
        or None,
    )
    cost = {
        # without a speed no step was trained, as in a run that was resumed at its end
        "seconds of training": results.get("train_runtime") if "train_samples_per_second" in results else None,
        "images per second": results.get("train_samples_per_second"),
        "parameters": f"{parameters:,}",
        "peak memory in MiB": results.get("peak_memory_mib"),
    }
    names = [str(label) for label in config.get("label_names") or ()]
    channels, height, width = config["pretrained_cfg"]["input_size"]
    drawn = training_curves(log_history, folder / CURVES_FILE, evaluated=evaluated, other=other if has_other else None)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=plain(title),
        architecture=f"`{config['architecture']}`",
        num_classes=config["num_classes"],
        objective=args.objective,
        curves=CURVES_FILE if drawn else None,
        cams=CAMS_FILE if (folder / CAMS_FILE).is_file() else None,
        results=rows,
        split=plain(split),
        accuracy_estimate=accuracy_estimate and plain(accuracy_estimate),
        evaluated=evaluated,
        other=other if has_other else None,
        best=best
        and {
            "value": shown(best["eval_accuracy"]),
            "epoch": shown(best["epoch"]),
            "last": shown(evaluations[-1]["eval_accuracy"]),
        },
        auroc=shown(results["train_noise_auroc"]) if results.get("train_noise_auroc") is not None else None,
        seed=args.seed,
        steps=max_steps if max_steps is not None else "not stated",
        repo_id=repo_id,
        registers=config["architecture"].endswith("_cifar"),
        channels=channels,
        height=height,
        width=width,
        dataset=f"[{plain(name)}](https://huggingface.co/datasets/{hub_id})" if hub_id else plain(name),
        num_images=len(labels),
        noise=noise_statement(noise, labels, clean_labels, noise_estimate),
        dataset_license=plain(dataset_license, 200) if dataset_license else "not stated",
        classes=", ".join(plain(label) for label in names[:CLASSES_NAMED])
        + (f" and {len(names) - CLASSES_NAMED} more" if len(names) > CLASSES_NAMED else ""),
        start=f"[{plain(start)}](https://huggingface.co/{start})" if is_hub_id(start) else plain(start or "random"),
        options=changed_options(args),
        command=command.replace("`", "'") if command else None,
        cost=[(label, shown(value)) for label, value in cost.items() if value is not None],
        hardware=hardware(str(args.device)),
        versions={
            "hnml_hf": __version__,
            **{package: version(package) for package in ("timm", "transformers", "torch", "datasets", "accelerate")},
        },
        license=plain(license) if license else "not stated",
    )
    with atomic_write(folder / "README.md") as unfinished:
        unfinished.write_text(str(card), encoding="utf-8")
    return card
