"""Your own data: image folders, CSV / TSV / JSON / JSONL / parquet tables, datasets saved by `save_to_disk`, and any
dataset on the Hub. All come out with the four features of `hnml_hf.data.schema`.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import datasets
import huggingface_hub
import numpy as np
from datasets import Dataset, DatasetDict, Image, Value, concatenate_datasets

from ...common.answers import without_retries
from ..files import as_on_disk, folder_above_all, table_path
from ..published.builder import ON_MISSING, REMOTE, keep_on_disk, outside_paths, prepare
from ..schema import assemble
from ..splits import SPLITS, find_splits
from ..targets import PROBABILITIES, add_targets, targets_of
from .builders import ImageFolder, Table
from .columns import ColumnOptions, RawSplit, divide, named, split_of
from .labels import Classes, encode_labels, encode_weights, find_classes, warn_about_splits
from .tables import TABLE_SUFFIXES, column_names, find_tables, table_suffix


logger = logging.getLogger(__name__)

HUB_PATH = re.compile(r"(https?|hf)://")  # how paths begin that a dataset of the Hub may name
PATHS = (Value("string"), Value("large_string"), Value("string_view"))  # columns of image paths


def load_generic(
    name_or_path: str,
    *,
    columns: ColumnOptions,
    label_names: Sequence[str] | None = None,
    splits: Mapping[str, str] | None = None,
    config: str | None = None,
    data_dir: str | os.PathLike | None = None,
    on_missing: str = "error",
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> DatasetDict:
    """Load a folder, a table, a saved dataset or a Hub dataset; see `hnml_hf.data.load_noisy_dataset`.

    Args:
        name_or_path (`str`): `imagefolder` (with `data_dir`), a local file or folder, or the id of a Hub dataset.
        columns ([`ColumnOptions`]): which columns hold what.
        label_names (`Sequence[str]`): class names in id order, where the data do not say.
        splits (`dict`): our split name (`train`, `validation`, `test`) -> the name, folder or table in the source, or
            the value of `columns.split_column`.
        data_dir: where image paths start (default: the folder of the table; none for saved and Hub datasets).
    """
    if on_missing not in ON_MISSING:
        raise ValueError(f"`on_missing` must be 'error' or 'skip', got {on_missing!r}.")
    if splits is not None and not set(splits) <= set(SPLITS):
        raise ValueError(f"`splits` maps {', '.join(SPLITS)} to names of the source; got {', '.join(splits)}.")
    if label_names is not None:
        if isinstance(label_names, str | Mapping) or not isinstance(label_names, Iterable):
            raise ValueError(f"`label_names` must be a list of class names in id order, got {label_names!r}.")
        label_names = list(label_names)
    options = {"on_missing": on_missing, "label_names": label_names, "cache_dir": cache_dir, **asdict(columns)}
    if name_or_path == "imagefolder":
        if data_dir is None:
            raise ValueError("`imagefolder` needs `data_dir`, the folder with the images.")
        return prepare(ImageFolder(data_dir=os.fspath(data_dir), splits=splits, **options), num_proc)
    path = os.path.abspath(os.path.expanduser(name_or_path))
    by_column = splits if columns.splits_by_column else None
    if os.path.isfile(path):
        if splits is not None and splits != by_column:
            raise ValueError(
                f"{path} is one table, which is all `train`, but `splits` names {', '.join(splits.values())}: pass "
                "the folder of the tables, or the column of these values by `split_column`."
            )
        tables = {"train": [path]}
        return prepare(_table_builder(tables, data_dir or os.path.dirname(path), by_column, options), num_proc)
    if os.path.isdir(path):
        if any(os.path.isfile(f"{path}/{name}") for name in ("dataset_dict.json", "state.json")):
            return _canonical(_load_from_disk(path), path, columns, label_names, splits, data_dir, on_missing)
        tables = find_tables(path)
        if splits is not None and splits != by_column:
            folders = all(os.path.isdir(f"{path}/{name}") for name in splits.values())
            tables = {} if folders else {split: [f"{path}/{name}"] for split, name in splits.items()}
        if tables:
            return prepare(_table_builder(tables, data_dir or path, by_column, options), num_proc)
        return prepare(ImageFolder(data_dir=path, splits=splits, **options), num_proc)
    if os.path.lexists(path):
        raise ValueError(f"{path} is neither a file nor a folder: a broken link, a pipe or a device cannot be read.")
    loaded = _load_from_hub(name_or_path, config, cache_dir)
    caches = [
        os.path.realpath(folder)
        for folder in (
            cache_dir or datasets.config.HF_DATASETS_CACHE,
            datasets.config.DOWNLOADED_DATASETS_PATH,
            huggingface_hub.constants.HF_HUB_CACHE,
        )
    ]
    return _canonical(loaded, name_or_path, columns, label_names, splits, data_dir, on_missing, caches)


def _table_builder(
    tables: dict[str, list[str]], data_dir: str | os.PathLike, splits: Mapping[str, str] | None, options: dict
) -> Table:
    for paths in tables.values():
        for path in paths:
            if not os.path.isfile(path):
                raise FileNotFoundError(f"The table {path} does not exist.")
            if table_suffix(path) not in TABLE_SUFFIXES:
                raise ValueError(f"{path}: tables end with one of {', '.join(TABLE_SUFFIXES)}.")
            if table_suffix(path) == ".parquet" and {"audit_action", PROBABILITIES} <= set(column_names(path)):
                logger.warning(
                    "%s: the targets in the column `%s` are not used, since they are read from Arrow alone: clean "
                    "with `--output_format arrow` to train on them.",
                    path,
                    PROBABILITIES,
                )
    if "train" not in tables and options["labels"] and not splits:
        (path, *_) = next(iter(tables.values()))
        raise ValueError(
            f"No table for `train` among {', '.join(tables)}: name one by `splits`. To evaluate a model on one alone: "
            f"`--dataset {path} --split train`."
        )
    return Table(data_dir=os.path.abspath(os.path.expanduser(data_dir)), tables=tables, splits=splits, **options)


def _load_from_disk(path: str) -> DatasetDict:
    loaded = datasets.load_from_disk(path)
    return DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded


def _load_from_hub(name: str, config: str | None, cache_dir) -> DatasetDict:
    tried = f"{name!r} is no dataset name of this package and no local file or folder"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{tried}, and cannot be the id of a Hub dataset (`user/name`).")
    try:
        with without_retries(name, "dataset"):
            loaded = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except ConnectionError as error:
        raise ConnectionError(f"{tried}, and the Hub could not be reached: {error}") from error
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(f"{tried}, and the Hub has no such dataset that you may read: {error}") from error
    return DatasetDict(loaded)


def _canonical(
    loaded: DatasetDict,
    source: str,
    columns: ColumnOptions,
    label_names: Sequence[str] | None,
    splits: Mapping[str, str] | None,
    data_dir: str | os.PathLike | None,
    on_missing: str,
    caches: Sequence[str] | None = None,
) -> DatasetDict:
    """The four features from any dataset with an image and a label column."""
    by_column = splits if columns.splits_by_column else None
    found = dict(splits) if splits is not None and splits != by_column else find_splits(list(loaded))
    if ("train" not in found and columns.labels) or not found or not set(found.values()) <= set(loaded):
        raise ValueError(
            f"{source}: the splits are {', '.join(loaded)}; pass `splits`, for example "
            "{'train': ..., 'test': ...}, to say which is which."
        )
    raw: dict[str, list[RawSplit]] = {}
    images: dict[str, list[Dataset]] = {}
    audited: dict[str, list[Dataset]] = {}
    for split, name in found.items():
        dataset, where = loaded[name], f"{source} ({name})"
        for ours, part in _raw_splits(dataset, split, where, columns, by_column, alone=len(found) == 1).items():
            image = columns.pick(dataset.column_names, ours, where)["image"]
            rows = _images(dataset, image, data_dir, where, saved=source, caches=caches)
            images.setdefault(ours, []).append(rows if len(part) == len(rows) else rows.select(part.images))
            audited.setdefault(ours, []).append(dataset if len(part) == len(rows) else dataset.select(part.images))
            raw.setdefault(ours, []).append(part)
    if columns.labels and "train" not in raw:
        raise ValueError(f"{source}: no row is of the split train, only of {', '.join(raw)}.")
    classes = find_classes(raw, label_names)
    result, labels, clean_labels = DatasetDict(), {}, {}
    for split, parts in raw.items():
        encoded = [encode_labels(part, classes, split) for part in parts]
        starts = np.cumsum([0, *(0 if part.index is not None else len(part) for part in parts)])
        labels[split], clean_labels[split] = (np.concatenate([arrays[i] for arrays in encoded]) for i in (0, 1))
        index = np.concatenate([arrays[2] + start for arrays, start in zip(encoded, starts, strict=False)])
        rows = assemble(
            concatenate_datasets(images[split]), "image", labels[split], clean_labels[split], index, classes.names
        )
        if any(part.weight is not None for part in parts):
            weights = np.concatenate(list(map(encode_weights, parts)))
            rows = rows.add_column("weight", weights, feature=Value("float64"))
        if split == "train" and len(parts) == 1 and "weight" not in rows.column_names:
            rows = _with_targets(rows, audited[split][0], parts[0], classes)
        result[split] = keep_on_disk(rows, parts[0].source, on_missing)
    if columns.labels:
        warn_about_splits(labels, clean_labels, classes.names)
    return result


def _with_targets(rows: Dataset, audited: Dataset, part: RawSplit, classes: Classes) -> Dataset:
    """The rows with the soft targets that an audit has put into a dataset, if it has any and its classes have names.

    Raises:
        ValueError: if a class of the targets is none of `classes`.
    """
    names = part.names.get("label")
    found = targets_of(audited) if names is not None and "audit_action" in audited.column_names else None
    if names is None or found is None:
        return rows
    logger.warning("%s: the targets are the probabilities in the column `%s`.", part.source, PROBABILITIES)
    unknown = [name for name in names if name not in classes.ids]
    if unknown:
        raise ValueError(f"{part.source}: its targets are of the class `{unknown[0]}` too; name it in `label_names`.")
    ids = np.array([classes.ids[name] for name in names])
    return add_targets(rows, found[1], ids[found[0]])


def _images(
    dataset: Dataset,
    column: str,
    data_dir: str | os.PathLike | None,
    where: str,
    *,
    saved: str,
    caches: Sequence[str] | None,
) -> Dataset:
    """The images of a dataset, or their paths, as its only column `image`.

    Paths start at `data_dir`; without one they are absolute, below `saved` or a folder of `caches`; see
    [`_check_place`].
    """
    feature = dataset.features[column]
    if feature in PATHS:
        paths = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        for row, path in enumerate(paths):
            if path is None:
                raise ValueError(f"{where} row {row}: the image is missing.")
            if data_dir is None:
                _check_place(path, f"{where} row {row}", saved, caches, paths)
        return Dataset.from_dict({"image": paths if data_dir is None else _below(data_dir, paths, where)})
    if not isinstance(feature, Image):
        raise ValueError(f"{where}: column `{column}` holds no images but {feature}.")
    images = dataset.select_columns([column])
    paths = outside_paths(images, column)
    if data_dir is not None:
        known = [path for path in paths if path]
        if len(known) < len(paths):
            raise ValueError(
                f"{where}: column `{column}` holds images, no paths, and `data_dir` says where paths start; got "
                f"{os.fspath(data_dir)!r}. Leave it out, or name a column with paths by `--image_column`."
            )
        return Dataset.from_dict({"image": _below(data_dir, known, where)})
    for row, path in enumerate(paths):
        if path:
            _check_place(path, f"{where} row {row}", saved, caches, paths)
    return images if column == "image" else images.rename_column(column, "image")


def _check_place(path: str, where: str, saved: str, caches: Sequence[str] | None, paths: Iterable[str | None]):
    """Raise `ValueError` on an image of another place than its dataset may name.

    Args:
        path: of an image, where no folder is given in which all paths start.
        where: names the row in the message.
        saved: the folder of a dataset of this machine; its images lie below it.
        caches: of a Hub dataset, the folders of what was downloaded; `None` for a dataset of this machine.
        paths: of all images, to advise a folder above them.
    """
    shown = f"{where}: the image path {path[:200]!r}"
    if REMOTE.match(path):
        if caches is None:
            raise ValueError(f"{shown} is remote; only datasets of the Hub may name such. Download the images first.")
        if not HUB_PATH.match(path) or "::" in path:
            raise ValueError(f"{shown} is none of https://, http:// and hf://, which a Hub dataset may name.")
    elif not os.path.isabs(path):
        raise ValueError(f"{shown} is relative; pass `data_dir`, the folder where it starts.")
    elif not _lies_below(path, [os.path.realpath(saved)] if caches is None else caches):
        above = folder_above_all(filter(None, paths))
        raise ValueError(
            f"{shown} is a file of this machine that does not come with the dataset; if it is yours, pass `data_dir`, "
            "a folder above all images" + (f", as `--data_dir {above[:200]}`." if above else ".")
        )


def _lies_below(path: str, folders: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, folder]) == folder for folder in folders)


def _below(data_dir: str | os.PathLike, paths: Sequence[str], where: str) -> list[str]:
    """The paths of images below `data_dir`, in full."""
    root = os.path.abspath(os.path.expanduser(data_dir))
    return [
        f"{root}/{path}"
        for path in as_on_disk(root, [table_path(text, root, where, row, paths) for row, text in enumerate(paths)])
    ]


def _raw_splits(
    dataset: Dataset, split: str, source: str, columns: ColumnOptions, names: Mapping[str, str] | None, *, alone: bool
) -> dict[str, RawSplit]:
    """The rows of a split of the source, by the splits that they belong to; `images` are their positions."""

    def distinct(name: str) -> list:
        text = getattr(dataset.features[name], "dtype", None) in ("string", "large_string")
        if not text or not len(dataset) or split_of(dataset.select([0])[name][0]) is None:
            return []
        return dataset.unique(name)

    def read(ours: str) -> RawSplit:
        picked = columns.pick(dataset.column_names, ours, source)
        columns.warn_of_splits(dataset.column_names, picked, distinct, source)
        del picked["image"]
        table = dataset.select_columns(list(set(picked.values()))).with_format("arrow")[:]
        values = {role: table[name].to_pylist() for role, name in picked.items()}
        return RawSplit(
            list(range(len(dataset))),
            where=lambda row: f"{source} row {row}",
            index=values.get("index"),
            weight=values.get("weight"),
            source=source,
            **named(values, dataset.features, picked),
        )

    raw = read(split)
    if raw.split is None:
        return {split: raw}
    rows = divide(raw, split, columns, names, alone=alone)
    return {ours: (raw if ours == split else read(ours)).select(which) for ours, which in rows.items()}
