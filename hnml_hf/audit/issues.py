"""Which labels of a dataset are probably wrong, without training: features of a frozen backbone, and their judge."""

import copy
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, Dataset, Image, Value

from ..common.devices import usable_device
from ..common.values import require_whole
from ..common.words import counted
from ..data.files import as_name, first_few
from ..data.load import load_noisy_dataset
from ..data.published.builder import not_on_disk
from ..data.schema import column, image_paths, labels_fingerprint
from ..data.targets import top_targets
from ..modeling.timm_cam import TimmCAMForImageClassification
from .features import (
    BACKBONE,
    Features,
    FrozenBackbone,
    describe_unreadable,
    extract_features,
    load_backbone,
)
from .findings import TYPICAL, neighbor_columns
from .judge import Judgement, check_labels, fit_head, identical_rows, judge_labels
from .noise_model import doubt_of_rate
from .review.annotations import annotated_labels, apply_annotations
from .start import set_head
from .table import FORMAT, _shared, likely_columns


logger = logging.getLogger(__name__)

LIKELY = 5  # classes of each sample whose probability the table keeps
ENOUGH = 30  # labels of each class; fewer alone make the range wider by ten points to each side (`rate_margin`)
NARROW = 0.1  # width of a range that says enough
DENSE = 1_000  # classes up to which the summary holds the transition matrix as a list
IMAGE_COLUMNS = ("image", "img", "path", "file", "file_name", "filename", "image_path")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")


def find_label_issues(
    data: str | os.PathLike | pd.DataFrame | Dataset | tuple,
    *,
    backbone: str = BACKBONE,
    pretrained: bool | str | os.PathLike = True,
    image_size: int | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    device: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Find the labels that are probably wrong: one forward pass of a frozen backbone, then [`judge_labels`].

    No clean labels, no held-out part and no training are needed; every row has a score.

    Args:
        data (`str`, `Path`, `pd.DataFrame`, `datasets.Dataset` or `tuple`): whatever [`load_noisy_dataset`] loads, of
            which the training split is judged; a table with a column of images or paths, and one of labels; or
            features `(n, d)` and labels `(n,)`, numbers or names, without any image; then `seed` and `device` are the
            only options. Each number among labels is a class, -1 too.
        backbone (`str`): timm name.
        pretrained (`bool`, `str` or `Path`): `True` for timm's weights from the Hub, or a safetensors file or folder.
        image_size (`int`, *optional*): side in pixels; default: the backbone's own.
        batch_size, num_workers, device: see [`~hnml_hf.audit.features.extract_features`].
        cache_dir (`str` or `Path`, *optional*): where features are kept for the next time; default: nowhere.
        image_column, label_column (`str`, *optional*): default: by their usual names.
        seed (`int`): of the folds.

    Returns:
        `pd.DataFrame`: a row per sample, the most probably wrong first; columns and `attrs` as of [`load_audit`].

    Raises:
        ValueError: if an option has a value that cannot be or is without effect, the data have no such columns, an
            image file is missing, or fewer than two classes have a readable image.

    Example:

        issues = find_label_issues("photos")
        issues[issues.noise_score > 0.5][["path", "label_name", "suggested_name"]]
    """
    usable_device(device)
    require_whole("seed", seed, least=0)
    if isinstance(data, tuple):
        _refuse_image_options(
            backbone=backbone,
            pretrained=pretrained,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            cache_dir=cache_dir,
            image_column=image_column,
            label_column=label_column,
        )
        table = _judge_arrays(data, seed=seed, device=device)
    else:
        dataset = as_dataset(data, image_column=image_column, label_column=label_column)
        frozen = load_backbone(backbone, pretrained=pretrained, image_size=image_size)
        with tempfile.TemporaryDirectory() as temporary:
            extracted = extract_features(
                dataset,
                frozen,
                cache_dir=cache_dir or temporary,
                batch_size=batch_size,
                num_workers=num_workers,
                device=device,
            )
            if said := describe_unreadable(dataset, extracted):
                logger.warning("%s Such rows have no score of their own: `times_seen` is 0.", said)
            table = judge_dataset(dataset, extracted, seed=seed, device=device)
    if table.attrs["caution"]:
        logger.warning(table.attrs["caution"])
    return table.sort_values("rank")


def _refuse_image_options(**given):
    """Refuse options that have no effect on features and labels.

    Raises:
        ValueError: naming each option whose value is not its default.
    """
    usual = find_label_issues.__kwdefaults__
    changed = [f"`{name}={value!r}`" for name, value in given.items() if value != usual[name]]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: without an effect on features and labels, which have no images or columns. Leave "
            "such options out, or give the images."
        )


def _judge_arrays(data: tuple, *, seed: int, device: str | None) -> pd.DataFrame:
    features, labels, names = _from_arrays(data)
    judgement = judge_labels(features, labels, num_labels=len(names), seed=seed, device=device)
    return issue_table(judgement, np.arange(len(labels)), labels, names, groups=identical_rows(features))


def judge_dataset(
    dataset: Dataset,
    features: Features,
    *,
    annotations: pd.DataFrame | None = None,
    seed: int = 0,
    device: str | None = None,
    **facts,
) -> pd.DataFrame:
    """The table of a dataset with the features of its images, in the order of `index`.

    Args:
        dataset (`datasets.Dataset`): columns `image`, `label`, `index`.
        features ([`Features`]): of its rows.
        annotations (`pd.DataFrame`, *optional*): of [`~hnml_hf.audit.review.merge_annotations`], by `index`. The judge
            learns from what people have decided, and their rows have the score that follows from it.
        seed (`int`): of the folds.
        device (`str`, *optional*): where to judge.
        facts: further entries of the summary, as `source` and `provenance`.
    """
    judgement = judge_features(dataset, features, annotations=annotations, seed=seed, device=device)
    return dataset_table(dataset, features, judgement, annotations=annotations, **facts)


def judge_features(
    dataset: Dataset,
    features: Features,
    *,
    annotations: pd.DataFrame | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Judgement:
    """The judgement of the labels of those images that can be read; arguments as in [`judge_dataset`].

    Raises:
        ValueError: if fewer than two classes have a readable image, and as [`judge_labels`].
    """
    names, labels = dataset.features["label"].names, column(dataset, "label").astype(np.int64)
    rows = np.flatnonzero(features.readable)
    values = features.values if len(rows) == len(labels) else features.values[rows]
    index = column(dataset, "index")
    options: dict[str, Any] = {"seed": seed, "device": device, "weights": _weights(annotations, index[rows])}
    classes = labels[rows]
    if annotations is not None:
        options["known"] = known = annotated_labels(annotations, index[rows], names)
        classes = np.where(known >= 0, known, classes)
    _check_classes([names[label] for label in np.unique(classes)], " with a readable image")
    return judge_labels(values, labels[rows], num_labels=len(names), groups=features.groups[rows], **options)


def _weights(annotations: pd.DataFrame | None, index: np.ndarray) -> np.ndarray | None:
    """The weight of each image, of shape `(n,)`: 0 where people found that none of the classes fits, otherwise 1.

    None without annotations.
    """
    if annotations is None:
        return None
    elsewhere = annotations.index[(annotations["annotation"] == "wrong") & (annotations["new_label"] < 0)]
    return (~np.isin(index, elsewhere)).astype(np.float32)


def judge_classifier(
    dataset: Dataset,
    features: Features,
    judgement: Judgement,
    backbone: FrozenBackbone,
    *,
    annotations: pd.DataFrame | None = None,
    device: str | None = None,
) -> TimmCAMForImageClassification:
    """The backbone with a last layer that was fitted to the posteriors of a judgement by [`judge_features`].

    Its features are those that the last layer sees. The judge has the means of the stages as well, which no timm model
    has room for.

    Returns:
        [`TimmCAMForImageClassification`] for the classes of the dataset, on the CPU.

    Raises:
        ValueError: for a backbone without a linear classifier or without a map at this size.
    """
    rows, index = np.flatnonzero(features.readable), column(dataset, "index")
    config, names = copy.deepcopy(backbone.config), dataset.features["label"].names
    config.id2label, config.label2id = dict(enumerate(names)), {name: number for number, name in enumerate(names)}
    model = TimmCAMForImageClassification(config).eval()
    weights = {
        name: tensor
        for name, tensor in backbone.timm_model.state_dict().items()
        if not name.startswith(backbone.heads)
    }
    model.timm_model.load_state_dict(weights, strict=False)
    model.check_spatial_evidence()
    values = features.values[:, : model.class_weights.shape[1]]
    head = fit_head(
        values if len(rows) == len(index) else values[rows],
        judgement,
        num_labels=len(names),
        weights=_weights(annotations, index[rows]),
        device=device,
    )
    set_head(model.classifiers, head)
    return model


def dataset_table(
    dataset: Dataset,
    features: Features,
    judgement: Judgement,
    *,
    annotations: pd.DataFrame | None = None,
    **facts,
) -> pd.DataFrame:
    """The table of a judgement by [`judge_features`]; other arguments as in [`judge_dataset`]."""
    names, labels = dataset.features["label"].names, column(dataset, "label").astype(np.int64)
    index, rows = column(dataset, "index"), np.flatnonzero(features.readable)
    table = issue_table(judgement, index, labels, names, rows=rows, groups=features.groups, **facts)
    table = table.sort_values("index", ignore_index=True)
    table["path"] = image_paths(dataset)
    return table if annotations is None else apply_annotations(table, annotations)


def issue_table(
    judgement: Judgement,
    index: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    rows: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    **facts,
) -> pd.DataFrame:
    """A judgement as a table of noise scores, in the order of the rows.

    Args:
        judgement ([`Judgement`]): of m samples.
        index, labels (`np.ndarray` of shape `(n,)`): sample ids and given labels.
        names (`Sequence[str]`): k class names in id order.
        rows (`np.ndarray` of shape `(m,)`, *optional*): which samples were judged; of the others, as of those whose
            class no other sample has, nothing is known but the noise rate. Default: all.
        groups (`np.ndarray` of shape `(n,)`, *optional*): the same number for images of the same content.
        facts: further entries of the summary.

    Returns:
        `pd.DataFrame`: with the columns and `attrs` of [`noise_scores`]. Probabilities are those of the class given
        image and label; `margin` is their difference; `likely_class_1` and `likely_probability_1` are the likeliest
        class and its probability, up to five of them. Where neighbors were sought, also those of
        [`~hnml_hf.audit.findings.neighbor_columns`].
    """
    n, rate = len(labels), judgement.noise_rate
    rows = np.arange(n) if rows is None else rows
    given = judgement.top_labels == labels[rows][:, None]
    best = np.where(given, -1.0, judgement.posterior).argmax(1)[:, None]
    scores, odds, seen = np.full(n, rate), np.full(n, -np.inf), np.zeros(n, dtype=bool)
    scores[rows], seen[rows] = judgement.noise_scores, judgement.judged
    odds[rows] = np.where(judgement.judged, judgement.log_odds, -np.inf)
    suggested, suggested_probability, given_probability = labels.copy(), np.full(n, np.nan), np.full(n, np.nan)
    suggested[rows] = np.take_along_axis(judgement.top_labels, best, 1)[:, 0]
    suggested_probability[rows] = np.take_along_axis(judgement.posterior, best, 1)[:, 0]
    given_probability[rows] = 1 - judgement.noise_scores
    rank = np.empty(n, dtype=np.int64)
    rank[np.lexsort((index, -odds))] = np.arange(1, n + 1)
    learned = np.where(seen & (given_probability > suggested_probability), 0, -1)
    classes = np.asarray(names, dtype=object)
    table = pd.DataFrame(
        {
            "index": index.astype(np.int64),
            "path": [""] * n,
            "label": labels,
            "label_name": classes[labels],
            "suggested_label": suggested,
            "suggested_name": classes[suggested],
            "noise_score": scores,
            "rank": rank,
            "given_probability": given_probability,
            "suggested_probability": suggested_probability,
            "margin": given_probability - suggested_probability,
            "foreground_agreement": np.full(n, np.nan),
            "times_seen": seen.astype(np.int64),
            "first_epoch_learned": learned,
            "last_epoch_learned": learned,
        }
    )
    likely = (labels[:, None] + np.arange(min(LIKELY, len(names)))) % len(names)
    share = np.zeros(likely.shape, np.float32)
    share[:, 0] = 1  # of a sample that was not judged nothing is known but its label
    top = top_targets(judgement.posterior, judgement.top_labels, top_k=likely.shape[1])
    likely[rows[judgement.judged]], share[rows[judgement.judged]] = (part[judgement.judged] for part in top)
    table = table.assign(**likely_columns(likely, share))
    if judgement.nearest is not None and judgement.similarities is not None:
        near, cosines = judgement.nearest[:, :TYPICAL], judgement.similarities[:, :TYPICAL]
        nearest, similarities = np.full((n, near.shape[1]), -1), np.full((n, near.shape[1]), -1.0)
        nearest[rows], similarities[rows] = np.where(near >= 0, rows[near], -1), cosines
        same = np.arange(n) if groups is None else groups
        table = table.assign(**neighbor_columns(index, nearest, similarities, same))
    matrix = judgement.transition_matrix
    cautions = (
        _lost_classes(labels, rows, names),
        doubt_of_rate(judgement.agreement, labels[rows], judgement.confidence)
        or _too_few_labels(judgement.noise_rate_range, labels[rows]),
    )
    table.attrs = {
        "format": FORMAT,
        "class_names": list(map(str, names)),
        "num_samples": n,
        "noise_rate": rate,
        "noise_rate_interval": list(judgement.noise_rate_range),
        "transition_matrix": _shared(matrix) if len(names) > DENSE else matrix.tolist(),
        "transition_matrix_interval": None,
        "inverse_temperature": judgement.inverse_temperature,
        "caution": " ".join(filter(None, cautions)) or None,
        "dataset_fingerprint": labels_fingerprint(index, labels, len(names)),
        **facts,
    }
    return table


def _lost_classes(labels: np.ndarray, rows: np.ndarray, names: Sequence[str]) -> str | None:
    """A sentence that names the classes whose images are all unreadable; None if there are none."""
    lost = np.setdiff1d(labels, labels[rows])
    if not len(lost):
        return None
    return (
        f"No image of {counted(len(lost), 'class')} can be read ({first_few(names[label] for label in lost)}): the "
        "noise rate is that of the others."
    )


def _too_few_labels(noise_rate_range: tuple[float, float], labels: np.ndarray) -> str | None:
    """Why only the range of a noise rate counts; None where labels are enough, or people have decided most of them."""
    each, (low, high) = len(labels) / len(np.unique(labels)), noise_rate_range
    if each >= ENOUGH or high - low < NARROW:
        return None
    return (
        f"The noise rate is no estimate to use: with {counted(int(each), 'label')} of each class, on average, it is "
        f"often far off. Below {ENOUGH} only its range counts, {low:.0%} to {high:.0%}."
    )


def worst_pairs(table: pd.DataFrame, count: int = 10) -> list[tuple[str, str, float]]:
    """Given class, class it probably is, and how many labels, of the pairs with the most."""
    sums = table.groupby(["label_name", "suggested_name"])["noise_score"].sum().nlargest(count)
    return [(given, suggested, float(number)) for (given, suggested), number in sums.items() if number >= 0.5]


def as_dataset(data, *, image_column: str | None = None, label_column: str | None = None) -> Dataset:
    """A dataset with `image`, `label` and `index` from whatever [`find_label_issues`] takes."""
    if isinstance(data, str | os.PathLike):
        loaded = load_noisy_dataset(os.fspath(data), image_column=image_column, label_column=label_column)["train"]
        _check_classes(loaded.features["label"].names)
        check_labels(column(loaded, "label"), column=label_column)
        return loaded
    if not isinstance(data, pd.DataFrame | Dataset):
        raise ValueError(
            f"`data` is a {type(data).__name__}; give a path, a DataFrame, a `datasets.Dataset`, or a tuple of "
            "features and labels."
        )
    columns = list(data.columns) if isinstance(data, pd.DataFrame) else data.column_names
    image_column = _column("image", image_column, IMAGE_COLUMNS, columns)
    label_column = _column("label", label_column, LABEL_COLUMNS, columns)
    if isinstance(data, pd.DataFrame):
        images = data[image_column].astype(object).where(data[image_column].notna(), None)
        dataset = _with_images(Dataset.from_dict({"image": [*_encode_images(images, image_column)]}))
        labels, names = _encode(data[label_column], label_column)
    else:
        dataset = data.select_columns([image_column])
        if image_column != "image":
            dataset = dataset.rename_column(image_column, "image")
        dataset = _with_images(dataset)
        kind = data.features[label_column]
        given = data.select_columns([label_column]).with_format(None)[:][label_column]
        if isinstance(kind, ClassLabel):
            labels, names = np.asarray(given), kind.names
            without = pd.isna(labels) | (labels == -1)
            if without.any():
                raise ValueError(f"Row {int(np.argmax(without))} has no label.")
        else:
            labels, names = _encode(given, label_column)
    _check_classes(names if len(data) else [])
    check_labels(labels, column=label_column)
    dataset = dataset.add_column("label", labels.tolist()).cast_column("label", ClassLabel(names=names))
    dataset = dataset.add_column("index", _sample_ids(data))
    if missing := not_on_disk(dataset):
        raise ValueError(
            f"Row {next(iter(missing))}, column `{image_column}`: no such image: {len(missing):,} of "
            f"{counted(len(data), 'row')}, first: {first_few(missing.values())}. Restore them, or leave them out."
        )
    return dataset


def _encode_images(images: Iterable[Any], column: str) -> Iterator[dict | None]:
    """Each image as `datasets` stores it: in a column of paths and bytes it would take the paths for bytes."""
    for row, image in enumerate(images):
        try:
            yield None if image is None else Image().encode_example(image)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"Row {row}, column `{column}`: a value of the type {type(image).__name__} is no image; give images, "
                "paths or bytes."
            ) from error


def _with_images(dataset: Dataset) -> Dataset:
    kind = dataset.features["image"]
    if isinstance(kind, Value) and kind.dtype.removeprefix("large_") not in ("string", "binary", "null"):
        raise ValueError(f"The column of images is of the type {kind.dtype}; give images, paths or bytes.")
    return dataset.cast_column("image", Image())


def _check_classes(names: Sequence[str], which: str = ""):
    if len(names) < 2:
        found = f"one class{which}, `{names[0]}`" if names else "no rows"
        raise ValueError(f"The data have {found}; which labels are wrong takes at least two classes.")


def _from_arrays(data: tuple) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if len(data) != 2:
        raise ValueError(f"`data` is a tuple of {len(data)}; give features and labels.")
    features, labels = data
    if isinstance(features, torch.Tensor):
        features = features.detach().float().cpu()
    features = np.asarray(features)  # one on disk stays there
    if features.dtype.kind not in "fiub":
        raise ValueError(f"The features are of the type {features.dtype}; give numbers.")
    labels, names = _encode(labels.cpu().numpy() if isinstance(labels, torch.Tensor) else labels)
    _check_classes(names)
    return features, labels, names


def _encode(values: Sequence[Any] | np.ndarray | pd.Series, column: str | None = None) -> tuple[np.ndarray, list[str]]:
    """Labels in [0, k) and their names: sorted, and of whole numbers in their order; `column` names theirs."""
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"The labels must have the shape (n,), one class each; given {np.shape(values)}.")
    classes = [_as_class(value, row, column) for row, value in enumerate(pd.Series(values, dtype=object))]
    if len(set(map(type, classes))) > 1:
        classes = list(map(str, classes))  # numbers and names have no order
    found, labels = np.unique(np.array(classes), return_inverse=True)
    return labels.astype(np.int64), [str(value) for value in found]


def _as_class(value: Any, row: int, column: str | None) -> int | str:
    """A label as class name, or as the number that it is; as tables of files are read."""
    value = as_name(value) if isinstance(value, str) else value
    if (isinstance(value, str) and not value) or (pd.api.types.is_scalar(value) and pd.isna(value)):
        raise ValueError(f"Row {row} has no label.")
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int | np.integer | np.bool_) or (
        isinstance(value, float | np.floating) and float(value).is_integer()
    ):
        return int(value)
    raise ValueError(
        f"Row {row}{f', column `{column}`' if column else ''}: the label {str(value)[:80]!r} is not a class; give one "
        "name or whole number for each image."
    )


def _sample_ids(data: pd.DataFrame | Dataset) -> np.ndarray:
    """The column `index` if there is one, otherwise the numbers of the rows."""
    if "index" not in (data.columns if isinstance(data, pd.DataFrame) else data.column_names):
        return np.arange(len(data))
    ids = data["index"].to_numpy() if isinstance(data, pd.DataFrame) else column(data, "index")
    if ids.dtype.kind not in "iu" or len(np.unique(ids)) < len(ids):
        raise ValueError("The column `index` must hold a whole number for each row, another for each; rename it.")
    return ids


def _column(what: str, given: str | None, usual: Sequence[str], columns: Sequence[str]) -> str:
    if given is not None and given not in columns:
        raise ValueError(f"`{what}_column={given!r}` is none of the columns {columns}.")
    found = given or next((name for name in usual if name in columns), None)
    if found is None:
        raise ValueError(f"None of the columns {columns} looks like the {what}: name it by `{what}_column`.")
    return found
