"""A dataset by its name or path."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from datasets import Dataset, DatasetDict

from .custom.columns import ColumnOptions
from .custom.load import load_generic
from .files import refuse_archive
from .published.animal10n import Animal10N
from .published.builder import prepare
from .published.cifar_files import HUMAN_LABELS, OFFICIAL
from .published.cifar_n import CIFARN, attach_human_labels, clean_split, find_labels_file
from .published.clothing1m import Clothing1M
from .published.food101n import Food101N
from .published.quickstart import Quickstart
from .published.webvision import WebVision
from .splits import class_balanced, find_splits


# Name -> builder and its config; `None` = the default, or the one given by `config`.
BUILDERS = {
    "quickstart": (Quickstart, None),
    "clothing1m": (Clothing1M, None),
    "webvision": (WebVision, None),
    "mini-webvision": (WebVision, "mini"),
    "animal10n": (Animal10N, None),
    "food101n": (Food101N, None),
    **{name: (CIFARN, name) for name in (*HUMAN_LABELS, *OFFICIAL)},
}
DATASET_NAMES = (*BUILDERS, "cifar10n", "imagefolder")


def load_noisy_dataset(
    name_or_path: str,
    *,
    config: str | None = None,
    data_dir: str | os.PathLike | None = None,
    images: DatasetDict | Dataset | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    clean_label_column: str | None = None,
    index_column: str | None = None,
    test_label_column: str | None = None,
    weight_column: str | None = None,
    split_column: str | None = None,
    label_names: Sequence[str] | None = None,
    splits: Mapping[str, str] | None = None,
    partial: bool = False,
    labels: bool = True,
    on_missing: str = "error",
    builder_options: Mapping[str, object] | None = None,
    class_balanced_samples: int | None = None,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> DatasetDict:
    """Load any dataset with the features `image`, `label` (given, maybe wrong), `clean_label` (-1 = unknown) and
    `index` (a stable id), and the splits `train`, `validation`, `test` as far as it has them.

    Args:
        name_or_path (`str`):
            `quickstart` (comes with the package), `clothing1m`, `webvision`, `mini-webvision`,
            `cifar10n-{aggre,rand1,rand2,rand3,worse}` (or `cifar10n` with `config`), `cifar100n`, `cifar10`,
            `cifar100`, `animal10n`, `food101n`: see the builder of that name. `imagefolder` with `data_dir`. Else a
            local folder, table or saved dataset, else the id of a Hub dataset.
        config (`str`): a config of the builder (`double_labelled` of `clothing1m`) or of the Hub dataset.
        data_dir: the folder that holds the data; for a table or a dataset with image paths, where these start.
        images (`DatasetDict` or `Dataset`):
            CIFAR images from elsewhere, as the Hub's `uoft-cs/cifar10`, for CIFAR-N; `data_dir` then holds the
            official label file. A `Dataset` is the training set.
        image_column, label_column, clean_label_column, index_column, test_label_column, weight_column (`str`):
            for your own data and Hub datasets, see [`~hnml_hf.data.custom.columns.ColumnOptions`].
        split_column (`str`): likewise, with the split of each row.
        label_names (`Sequence[str]`): for your own data: class names in id order. Data that have names are ordered by
            them; ids, and names made of digits, get them as names.
        splits (`dict`): for your own data: our split name (`train`, `validation`, `test`) -> the name, folder or
            table file in the source, or the value of `split_column`.
        partial (`bool`): the folder holds a part of a known dataset: do not compare sizes with the published ones.
        labels (`bool`): whether labels are read; images of your own data without labels are loaded with `False`, and
            `label` is -1 then.
        on_missing (`"error"` or `"skip"`): a listed image that is not there is an error, or left out and counted.
        builder_options (`dict`): further options of a known dataset, as `imagenet_dir` of WebVision.
        class_balanced_samples (`int`): keep that many training rows, the same number of each class.
        seed (`int`): of that draw.
        cache_dir (`str` or `Path`): where the prepared dataset is kept; default: the cache of `datasets`.
        num_proc (`int`): processes that write the cache.

    Returns:
        `datasets.DatasetDict`: the splits.

    Raises:
        ValueError: on options that do not fit the dataset, on archives, and on what is wrong in its lists and
            tables, naming file and line.
        FileNotFoundError: if there is no such file, folder or dataset.

    Example:

        data = load_noisy_dataset("quickstart")
        data["train"].features["label"].names
    """
    for name, path in (("name_or_path", name_or_path), ("data_dir", data_dir)):
        if path == "":  # which would be the current folder
            raise ValueError(f"`{name}` is empty: give a path{' or a name' if path is name_or_path else ''}.")
        if path:
            refuse_archive(path)
    columns = ColumnOptions(
        image_column,
        label_column,
        clean_label_column,
        index_column,
        test_label_column,
        weight_column,
        split_column,
        labels,
    )
    own = {**asdict(columns), "labels": None, "label_names": label_names, "splits": splits}
    if name_or_path == "cifar10n":
        if f"cifar10n-{config}" not in BUILDERS:
            raise ValueError(f"`cifar10n` needs `config`: one of aggre, rand1, rand2, rand3, worse; got {config!r}.")
        name_or_path, config = f"cifar10n-{config}", None
    if name_or_path in BUILDERS:
        given = [name for name, value in own.items() if value is not None]
        if given:
            raise ValueError(f"`{name_or_path}` has fixed columns: `{'`, `'.join(given)}` cannot be set.")
        builder_class, fixed = BUILDERS[name_or_path]
        if config is not None and fixed is not None:
            raise ValueError(f"`{name_or_path}` has no configs; got `config={config!r}`.")
        if images is not None:
            dataset = _load_cifar_n(name_or_path, images, data_dir)
        else:
            builder = builder_class(
                config_name=config or fixed,
                data_dir=None if data_dir is None else os.fspath(data_dir),
                cache_dir=cache_dir,
                partial=partial,
                on_missing=on_missing,
                **(builder_options or {}),
            )
            dataset = prepare(builder, num_proc)
    else:
        for name, value in (("images", images), ("partial", partial or None), ("builder_options", builder_options)):
            if value is not None:
                raise ValueError(f"`{name}` is for known datasets ({', '.join(DATASET_NAMES)}), not {name_or_path!r}.")
        dataset = load_generic(
            name_or_path,
            columns=columns,
            label_names=label_names,
            splits=splits,
            config=config,
            data_dir=data_dir,
            on_missing=on_missing,
            cache_dir=cache_dir,
            num_proc=num_proc,
        )
    if class_balanced_samples is not None:
        dataset["train"] = class_balanced(dataset["train"], class_balanced_samples, seed=seed)
    return dataset


def _load_cifar_n(config: str, images: DatasetDict | Dataset, data_dir: str | os.PathLike | None) -> DatasetDict:
    if config not in HUMAN_LABELS:
        raise ValueError(f"`images` is for CIFAR-N; {config!r} reads its images from `data_dir`.")
    labels_file = find_labels_file(data_dir, config)
    images = DatasetDict({"train": images}) if isinstance(images, Dataset) else images
    found = find_splits(list(images))
    if "train" not in found:
        raise ValueError(f"`images` has no split `train`; it has {', '.join(images)}.")
    dataset = DatasetDict({"train": attach_human_labels(images[found["train"]], labels_file, config)})
    for split in ("validation", "test"):
        if split in found:
            dataset[split] = clean_split(images[found[split]], config)
    return dataset


__all__ = [
    "CIFARN",
    "DATASET_NAMES",
    "Animal10N",
    "Clothing1M",
    "Food101N",
    "Quickstart",
    "WebVision",
    "class_balanced",
    "load_noisy_dataset",
]
