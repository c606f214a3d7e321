"""Data at the edges: a sane model, or an error that says what is wrong; never an empty split, never a silent nan."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from trainers import FORMS, build_trainer

from hnml_hf import TimmCAMForImageClassification, noise_scores, split_validation


NAMES = ["a", "b", "c"]
TRAINED = {
    "no wrong label": lambda clean: clean,
    "all labels wrong": lambda clean: (clean + 1) % 3,
    "two classes, 3 to 1": lambda clean: (np.arange(len(clean)) % 4 == 0).astype(int),
    "one image in a class": lambda clean: np.where(np.arange(len(clean)) == 5, 2, clean % 2),
}


def make(labels, clean=None) -> Dataset:
    """Images whose brightness tells the true class."""
    clean = labels if clean is None else clean
    random = np.random.default_rng(0)
    pixels = random.integers(0, 60, (len(labels), 32, 32, 3)) + 80 * np.asarray(clean)[:, None, None, None]
    names = ClassLabel(names=NAMES)
    return Dataset.from_dict(
        {
            "image": [PILImage.fromarray(image.astype(np.uint8)) for image in pixels],
            "label": [int(label) for label in labels],
            "clean_label": [int(label) for label in clean],
            "index": list(range(len(labels))),
        },
        features=Features({"image": Image(), "label": names, "clean_label": names, "index": Value("int64")}),
    )


@pytest.mark.parametrize(
    "form", ["momentum", *(pytest.param(form, marks=pytest.mark.slow) for form in ("ce", "elr", "mlnt", "head"))]
)
@pytest.mark.parametrize("case", TRAINED)
def test_it_trains_and_scores(case, form, tmp_path):
    clean = np.arange(48) % 3
    dataset = make(TRAINED[case](clean), clean)
    trainer = build_trainer(tmp_path, dataset, max_steps=4, **FORMS[form])
    trainer.train()
    metrics = trainer.evaluate()
    assert np.isfinite([value for name, value in metrics.items() if "loss" in name]).all()
    assert all(value.isfinite().all() for value in trainer.evaluated_model().state_dict().values())
    table = noise_scores(trainer.dynamics.records, NAMES)
    assert len(table) == 48 and np.isfinite(table["noise_score"]).all() and table["noise_score"].between(0, 1).all()
    assert 0 <= table.attrs["noise_rate"] <= 1


def test_one_image_a_class(tmp_path):
    """Three images: a batch smaller than asked for, neighbors that are all of another class."""
    trainer = build_trainer(tmp_path, make(np.arange(3)), max_steps=2, **FORMS["momentum"])
    trainer.train()
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_two_classes_in_a_model_of_two(tmp_path):
    model = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=2, image_size=32, output_stride=8)
    dataset = make((np.arange(48) % 4 == 0).astype(int))
    trainer = build_trainer(tmp_path, dataset, model, max_steps=4, **FORMS["momentum"])
    trainer.train()
    table = noise_scores(trainer.dynamics.records, NAMES[:2])
    assert np.isfinite(table["noise_score"]).all()


def test_one_class_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="All 48 training samples have the one label 1; there is nothing to learn"):
        build_trainer(tmp_path, make(np.ones(48, int)))


@pytest.mark.parametrize(("size", "fraction"), [(3, 0.1), (6, 0.5), (48, 0.01), (4, 0.99)])
def test_no_split_is_empty(size, fraction):
    """Both parts have rows, or the error says why that cannot be."""
    dataset = make(np.arange(size) % 3)
    try:
        train, validation = split_validation(dataset, fraction=fraction, seed=0)
    except ValueError as error:
        assert "fraction" in str(error)
        return
    assert len(train) and len(validation) and len(train) + len(validation) == size
    assert not set(train["index"]) & set(validation["index"])
