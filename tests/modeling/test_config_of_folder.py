"""What a `config.json` of a local folder may say: no other files, and a name for each class."""

import json

import pytest

from hnml_hf.modeling.timm_cam import TimmCAMForImageClassification


@pytest.fixture
def saved(tmp_path):
    model = TimmCAMForImageClassification.from_timm("test_resnet", id2label={0: "cat", 1: "dog"}, image_size=64)
    model.save_pretrained(tmp_path)
    return tmp_path


def change(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


MAPS = {"label_names": None, "id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_names": ["cat", "cat"]}, "several classes are called cat"),
        ({"label_names": ["cat"]}, "it has 1 label name for 2 classes"),
        ({"label_names": ["cat", "dog", "cow"]}, "it has 3 label names for 2 classes"),
        ({"label_names": ["cat", ["dog"]]}, "a name is no text"),
        ({"label_names": "cats"}, "`label_names` must be a list"),
        ({"label_names": ["dog", "cat"], "id2label": MAPS["id2label"]}, "`label_names` and `id2label` differ"),
        ({**MAPS, "label2id": {"cat": 1, "dog": 0}}, "`label2id` is not the inverse of `id2label`"),
        ({**MAPS, "id2label": {"0": "cat", "2": "dog"}}, "the ids of `id2label` are not 0 to 1"),
        ({**MAPS, "id2label": {"0": "cat", "1": "cat"}, "label2id": None}, "several classes are called cat"),
        ({**MAPS, "id2label": ["cat", "dog"]}, "`id2label` and `label2id` objects"),
    ],
)
def test_classes_that_are_not_named_once_each_are_refused(saved, changes, words):
    with pytest.raises(ValueError, match=f"does not name the classes: .*{words}"):
        TimmCAMForImageClassification.from_pretrained(change(saved, **changes))


def test_a_fresh_classifier_needs_no_names_of_the_old_one(saved):
    model = TimmCAMForImageClassification.from_pretrained(change(saved, label_names=["cat"]), num_labels=3)
    assert model.config.num_labels == 3


def test_maps_that_match_are_read(saved):
    model = TimmCAMForImageClassification.from_pretrained(change(saved, **MAPS))
    assert model.config.id2label == {0: "cat", 1: "dog"}


@pytest.mark.parametrize("architecture", ["hf-hub:timm/resnet18.a1_in1k", "hf_hub:x/y", "local-dir:/tmp", "/tmp/x"])
def test_an_architecture_that_lies_elsewhere_is_refused(saved, architecture):
    with pytest.raises(ValueError, match="`architecture` is .* loaded without other files or a network"):
        TimmCAMForImageClassification.from_pretrained(change(saved, architecture=architecture))


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained", "pretrained_cfg_overlay"])
def test_arguments_that_would_load_other_weights_are_refused(saved, name):
    with pytest.raises(ValueError, match=f"`model_args` has `{name}`"):
        TimmCAMForImageClassification.from_pretrained(change(saved, model_args={name: "x.pth"}))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_file_that_is_no_configuration_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json` is not readable"):
        TimmCAMForImageClassification.from_pretrained(saved)
