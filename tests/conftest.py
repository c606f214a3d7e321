import gc
import logging
import os
import warnings


os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import hypothesis  # noqa: F401 (it asks the garbage collector for referrers, before `gc.freeze`)
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image


torch.set_num_threads(1)
datasets.disable_progress_bars()

NUM_CLASSES = 3


def pytest_collection_finish():
    """All modules are imported and stay: the garbage collector, which every training calls, may pass them over."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def own_process_state():
    """Precision and compilation reach accelerate by environment variables and a state that outlive a trainer."""
    before, logger = dict(os.environ), logging.getLogger("hnml_hf")
    level = logger.level
    yield
    logger.setLevel(level)
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    with warnings.catch_warnings():  # with a GPU this imports modules of torch that use what torch deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        torch._dynamo.reset()
    assert not torch.is_autocast_enabled("cpu"), "autocast was left on"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_dataset():
    """48 images of 32 pixels in three classes told apart by the bright quarter; a third of the labels is wrong.

    Sample ids start at 100 and come in no order, so that nobody can use them as row numbers.
    """
    random = np.random.default_rng(0)
    clean = np.arange(48) % NUM_CLASSES
    labels = np.where(np.arange(48) % 9 < 3, (clean + 1) % NUM_CLASSES, clean)
    pixels = random.integers(0, 120, (48, 32, 32, 3), dtype=np.uint8)
    for row, label in enumerate(clean):
        top, left = divmod(int(label), 2)
        pixels[row, 16 * top : 16 * top + 16, 16 * left : 16 * left + 16] += 120
    names = datasets.ClassLabel(names=["left", "right", "bottom"])
    features = datasets.Features(
        {"image": datasets.Image(), "label": names, "clean_label": names, "index": datasets.Value("int64")}
    )
    return datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(image) for image in pixels],
            "label": labels.tolist(),
            "clean_label": clean.tolist(),
            "index": (100 + random.permutation(48)).tolist(),
        },
        features=features,
    )


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A few steps of the quickstart, in a folder of its own: the folder, and the process that ended."""
    from commands import ROOT, launch

    folder = tmp_path_factory.mktemp("quickstart")
    recipe = ("--recipe", ROOT / "scripts" / "recipes" / "quickstart.yaml")
    done = launch(*recipe, "--max_steps", "8", "--output_dir", "outputs/quickstart", cwd=folder)
    return folder, done
