"""Your own data: image folders, CSV / TSV / JSON / JSONL / parquet tables, datasets saved by `save_to_disk`, and any
dataset on the Hub. All come out with the four features of `hnml_hf.data.schema`.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value

from ..files import parse_path
from ..published.builder import ON_MISSING, REMOTE, keep_on_disk, prepare
from ..schema import assemble
from ..splits import SPLITS, find_splits
from .builders import ImageFolder, Table
from .columns import ColumnOptions, RawSplit
from .labels import class_names, encode_labels, encode_weights, warn_about_splits
from .tables import TABLE_SUFFIXES, find_tables


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
        splits (`dict`): our split name (`train`, `validation`, `test`) -> the name, folder or table in the source.
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
        return prepare(ImageFolder(data_dir=data_dir, splits=splits, **options), num_proc)
    path = os.path.abspath(os.path.expanduser(name_or_path))
    if os.path.isfile(path):
        if splits is not None:
            raise ValueError(
                f"{path} is one table, which is all `train`, but `splits` names {', '.join(splits.values())}: pass "
                "the folder of the tables."
            )
        return prepare(_table_builder({"train": [path]}, data_dir or os.path.dirname(path), options), num_proc)
    if os.path.isdir(path):
        if any(os.path.isfile(f"{path}/{name}") for name in ("dataset_dict.json", "state.json")):
            return _canonical(_load_from_disk(path), path, columns, label_names, splits, data_dir, on_missing)
        tables = find_tables(path)
        if splits is not None:
            folders = all(os.path.isdir(f"{path}/{name}") for name in splits.values())
            tables = {} if folders else {split: [f"{path}/{name}"] for split, name in splits.items()}
        if tables:
            return prepare(_table_builder(tables, data_dir or path, options), num_proc)
        return prepare(ImageFolder(data_dir=path, splits=splits, **options), num_proc)
    loaded = _load_from_hub(name_or_path, config, cache_dir)
    return _canonical(loaded, name_or_path, columns, label_names, splits, data_dir, on_missing)


def _table_builder(tables: dict[str, list[str]], data_dir: str | os.PathLike, options: dict) -> Table:
    for paths in tables.values():
        for path in paths:
            if not os.path.isfile(path):
                raise FileNotFoundError(f"The table {path} does not exist.")
            if not path.endswith(TABLE_SUFFIXES):
                raise ValueError(f"{path}: tables end with one of {', '.join(TABLE_SUFFIXES)}.")
    if "train" not in tables:
        raise ValueError(f"No table for `train` among {', '.join(tables)}: name one by `splits`.")
    return Table(data_dir=os.path.abspath(os.path.expanduser(data_dir)), tables=tables, **options)


def _load_from_disk(path: str) -> DatasetDict:
    loaded = datasets.load_from_disk(path)
    return DatasetDict({"train": loaded}) if isinstance(loaded, Dataset) else loaded


def _load_from_hub(name: str, config: str | None, cache_dir) -> DatasetDict:
    tried = f"{name!r} is no dataset name of this package and no local file or folder"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{tried}, and cannot be the id of a Hub dataset (`user/name`).")
    try:
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
) -> DatasetDict:
    """The four features from any dataset with an image and a label column."""
    found = dict(splits) if splits is not None else find_splits(list(loaded))
    if "train" not in found or not set(found.values()) <= set(loaded):
        raise ValueError(
            f"{source}: the splits are {', '.join(loaded)}; pass `splits`, for example "
            "{'train': ..., 'test': ...}, to say which is which."
        )
    raw, images, image_columns = {}, {}, {}
    for split, name in found.items():
        dataset, where = loaded[name], f"{source} ({name})"
        picked = columns.pick(dataset.column_names, split, where)
        image_columns[split] = picked.pop("image")
        feature = dataset.features[image_columns[split]]
        if feature in PATHS:
            images[split] = _with_full_paths(dataset, image_columns[split], data_dir, where)
        elif not isinstance(feature, Image):
            raise ValueError(f"{where}: column `{image_columns[split]}` holds no images but {feature}.")
        elif data_dir is not None:
            raise ValueError(
                f"{where}: column `{image_columns[split]}` holds images, no paths, and `data_dir` says where paths "
                f"start; got {os.fspath(data_dir)!r}. Leave it out, or name a column with paths by `image_column`."
            )
        else:
            images[split] = dataset
        raw[split] = _raw_split(dataset, picked, where)
    names = class_names([raw["train"]], label_names)
    encoded = {split: encode_labels(part, names, split) for split, part in raw.items()}
    result = DatasetDict()
    for split, (labels, clean_labels, index) in encoded.items():
        rows = assemble(images[split], image_columns[split], labels, clean_labels, index, names)
        if raw[split].weight is not None:
            rows = rows.add_column("weight", encode_weights(raw[split]), feature=Value("float64"))
        result[split] = keep_on_disk(rows, f"{source} ({found[split]})", on_missing)
    labels, clean_labels = ({split: arrays[i] for split, arrays in encoded.items()} for i in (0, 1))
    warn_about_splits(labels, clean_labels, names)
    return result


def _with_full_paths(dataset: Dataset, column: str, data_dir: str | os.PathLike | None, where: str) -> Dataset:
    """The image paths, starting at `data_dir`; without one they must be absolute, or remote."""
    root = None if data_dir is None else os.path.abspath(os.path.expanduser(data_dir))
    paths = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    for row, path in enumerate(paths):
        if path is None:
            raise ValueError(f"{where} row {row}: the image is missing.")
        if root is not None:
            paths[row] = f"{root}/{parse_path(path.removeprefix(f'{root}/'), where, row)}"
        elif not os.path.isabs(path) and not REMOTE.match(path):
            raise ValueError(
                f"{where} row {row}: the image path {path!r} is relative; pass `data_dir`, the folder where it starts."
            )
    return Dataset.from_dict({column: paths})


def _raw_split(dataset: Dataset, picked: Mapping[str, str], source: str) -> RawSplit:
    table = dataset.select_columns(list(set(picked.values()))).with_format("arrow")[:]
    values = {role: table[name].to_pylist() for role, name in picked.items()}
    feature = dataset.features[picked["label"]]
    return RawSplit(
        [],
        values["label"],
        lambda row: f"{source} row {row}",
        values.get("clean"),
        values.get("index"),
        values.get("weight"),
        names=feature.names if isinstance(feature, ClassLabel) else None,
        source=source,
    )
