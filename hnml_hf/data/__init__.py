"""Data sets with noisy labels, all with the features `image`, `label`, `clean_label`, `index`."""

import os

from datasets import DatasetDict

from hnml_hf.data.quickstart import Quickstart


def load_noisy_dataset(
    name_or_path: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> DatasetDict:
    """Loads a data set by name or path."""
    if name_or_path != "quickstart":
        raise ValueError(f"Unknown data set {name_or_path!r}.")
    builder = Quickstart(cache_dir=cache_dir)
    builder.download_and_prepare(num_proc=num_proc)
    return DatasetDict(builder.as_dataset())
