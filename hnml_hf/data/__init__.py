"""Datasets with noisy labels, all with the features `image`, `label`, `clean_label` and `index`.

A name is imported when it is first used: what only decodes images does not wait for datasets and torch.
"""

import importlib


MODULES = {
    "BUILDERS": "load",
    "DATASET_NAMES": "load",
    "load_noisy_dataset": "load",
    "Animal10N": "published.animal10n",
    "CIFARN": "published.cifar_n",
    "Clothing1M": "published.clothing1m",
    "Food101N": "published.food101n",
    "Quickstart": "published.quickstart",
    "WebVision": "published.webvision",
    "class_balanced": "splits",
}

__all__ = sorted(MODULES)


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
