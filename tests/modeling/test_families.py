"""Backbones of many families through a training step, maps, saving and loading; see family_table.py."""

import json
from functools import partial
from pathlib import Path

import family_table
import pytest
import timm
import torch
from packaging.version import Version
from safetensors.torch import save_file

from hnml_hf import TimmCAMForImageClassification


ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT.parent / "shared" / "data" / "weights" / "tf_efficientnet_lite0.in1k.safetensors"
IMAGENETTE = ROOT.parent / "shared" / "data" / "imagenette224-noisy-2k" / "validation.parquet"
IMAGENETTE_IDS = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def name(row):
    return "-".join([row[1], *map(str, row[3])])


def check(family, architecture, image_size, model_args):
    record = family_table.examine(architecture, image_size, model_args)
    assert family_table.works(record), family_table.reasons(record)


# the table is of this version; an older one lacks some of its models
tables_timm = pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="the table is of timm 1.0.31")


NEW = ("test_vit_relpos", "test_maxvit", "test_coatnet", "cait_xxs24_224", "xcit_nano_12_p16_224")


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=tables_timm if row[1] in NEW else ()) for row in family_table.TINY], ids=name
)
def test_a_small_backbone_works(row):
    check(*row)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("row", family_table.ARCHITECTURES, ids=name)
def test_a_backbone_works_as_the_table_says(row):
    table = json.loads((ROOT / "docs" / "results" / "families.json").read_text())["rows"]
    expected = {
        family_table.outcome(known["record"])
        for known in table
        if (known["architecture"], known["image_size"], known["model_args"]) == (row[1], row[2], row[3])
    }
    assert expected == {family_table.outcome(family_table.examine(*row[1:]))}


def test_the_page_is_made_from_the_records():
    results = json.loads((ROOT / "docs" / "results" / "families.json").read_text())
    assert family_table.render(results) == (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def test_the_page_says_what_works_and_why_not():
    """By hand: one that works by its gradient, one that is refused, one that works in part."""
    works = dict.fromkeys(("momentum", "head", "full", "full, second order", "cam"), "yes")
    works |= {"built": "yes", "closed form": "by the head's gradient", "model_args": {"global_pool": "avg"}}
    works |= dict.fromkeys(("whole model", *family_table.LOADERS), "bitwise") | {"parameters without gradient": 0}
    records = {
        "a_net": works,
        "b_net": {
            "built": "refused: Backbone `b_net` ends in `X`, not in one linear layer, so it has no maps. Choose."
        },
        "c_net": works | {"head": "failed: RuntimeError: no head"},
    }
    rows = [{"family": n[0], "architecture": n, "model_args": {}, "record": r} for n, r in records.items()]
    page = family_table.render({"versions": {"timm": "1"}, "rows": rows})
    assert "1 of 3 configurations work, and 1 are refused" in page
    assert "| a |  | `a_net` |" in page and "| built with `global_pool=avg` | `a_net` |" in page
    assert "| ends in `X`, not in one linear layer | `b_net` |" in page
    assert "In part: `c_net` (head: failed: RuntimeError: no head)." in page


@tables_timm
def test_the_table_covers_the_families():
    assert len({row[1] for row in family_table.ARCHITECTURES}) >= 60
    assert len({row[0] for row in family_table.ARCHITECTURES}) >= 35
    for family, architecture, *_ in family_table.ARCHITECTURES:
        assert timm.models.is_model_in_modules(architecture, [family]), (family, architecture)


def test_a_broken_map_is_found(monkeypatch):
    """The table must be able to say no."""
    monkeypatch.setattr(
        TimmCAMForImageClassification,
        "class_activation_maps",
        lambda self, output, class_weights: torch.ones(*class_weights.shape[:-1], *output.feature_maps.shape[-2:]),
    )
    record = family_table.examine("test_resnet", 64, {})
    assert record["cam"] == "failed: constant or not finite"
    assert not family_table.works(record)


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("deit_tiny_distilled_patch16_224", {}, "two heads on two class tokens"),
        ("caformer_s18", {}, "not in one linear layer"),
        ("vit_tiny_patch16_224", {"global_pool": "token"}, "classifies by its class token"),
        ("crossvit_tiny_240", {}, "crossvit_tiny_240"),
    ],
)
def test_what_cannot_work_says_why(architecture, options, words):
    with pytest.raises(ValueError, match=words) as error:
        TimmCAMForImageClassification.from_timm(architecture, num_labels=3, **options)
    assert "hoose" in str(error.value) or "Build it" in str(error.value)


def test_two_heads_on_the_same_features_count_as_their_average():
    model = TimmCAMForImageClassification.from_timm("swiftformer_xs", num_labels=3, image_size=64).eval()
    assert len(model.classifiers) == 2
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(pixels, cam_classes="predicted")
        torch.testing.assert_close(output.logits, model.timm_model(pixels))
    mean = output.cams.mean((1, 2)) + model.class_bias[output.logits.argmax(1)]
    torch.testing.assert_close(mean, output.logits.amax(1), rtol=1e-4, atol=1e-5)


# -- pretrained weights --


@pytest.fixture(scope="module")
def lite0():
    if not WEIGHTS.is_file():
        pytest.skip("the ImageNet weights of tf_efficientnet_lite0 are not here")
    return WEIGHTS


def imagenette(count):
    if not IMAGENETTE.is_file():
        pytest.skip("the Imagenette images are not here")
    from datasets import Image, load_dataset

    data = load_dataset("parquet", data_files=str(IMAGENETTE), split="train").cast_column("image", Image(mode="RGB"))
    return data.shuffle(seed=0).select(range(count))


def test_pretrained_weights_keep_their_head(lite0, tmp_path, monkeypatch):
    from hnml_hf import create_transforms

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    data = imagenette(150)
    model = TimmCAMForImageClassification.from_timm("tf_efficientnet_lite0", num_labels=1000, pretrained=lite0).eval()
    _, transform = create_transforms(model.config.pretrained_cfg)
    wanted = torch.tensor([IMAGENETTE_IDS[label] for label in data["label"]])
    with torch.no_grad():
        logits = torch.cat(
            [
                model(torch.stack([transform(image) for image in data[start : start + 50]["image"]])).logits
                for start in range(0, len(data), 50)
            ]
        )
    top5 = (logits.topk(5).indices == wanted[:, None]).any(1).float().mean().item()
    assert top5 > 0.9, top5


def test_a_head_of_another_size_is_replaced(lite0, caplog):
    import transformers

    transformers.logging.enable_propagation()
    with caplog.at_level("INFO", logger="hnml_hf"):
        model = TimmCAMForImageClassification.from_timm("tf_efficientnet_lite0", num_labels=7, pretrained=lite0)
    transformers.logging.disable_propagation()
    assert "replaced by a fresh one for 7 classes" in caplog.text
    assert model.class_weights.shape == (7, 1280) and model.class_weights.abs().max() < 1


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    model = TimmCAMForImageClassification.from_timm("test_resnet", id2label={0: "a", 1: "b", 2: "c"}, image_size=64)
    model.save_pretrained(folder)
    return model, folder


def test_an_own_checkpoint_starts_another_training(own):
    model, folder = own
    for start in (folder, folder / "model.safetensors"):
        again = TimmCAMForImageClassification.from_timm("test_resnet", num_labels=5, image_size=64, pretrained=start)
        assert again.class_weights.shape[0] == 5
        torch.testing.assert_close(again.timm_model.conv1[0].weight, model.timm_model.conv1[0].weight, rtol=0, atol=0)


def test_a_network_of_this_package_starts_another_training(tmp_path):
    build = partial(TimmCAMForImageClassification.from_timm, "resnet18_cifar", image_size=32)
    model = build(num_labels=3)
    model.save_pretrained(tmp_path)
    again = build(num_labels=5, pretrained=tmp_path)
    assert torch.equal(again.timm_model.conv1.weight, model.timm_model.conv1.weight)
    with pytest.raises(ValueError, match="no pretrained weights of `resnet18_cifar`"):
        build(num_labels=5, pretrained=True)


def test_another_number_of_classes_gets_a_fresh_head_only_if_asked(own):
    model, folder = own
    fresh = TimmCAMForImageClassification.from_pretrained(folder, num_labels=6)
    assert fresh.class_weights.shape[0] == 6 and fresh.class_weights.isfinite().all()
    assert torch.equal(fresh.timm_model.conv1[0].weight, model.timm_model.conv1[0].weight)


def broken(folder, target, **changes):
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 9, "label_names": [str(i) for i in range(9)]}, "does not load"),
        ({"architecture": "resnet_of_nobody"}, "Check its name"),
        ({"model_args": {"head_conv": 3}}, "does not load|unexpected keyword"),
    ],
)
def test_a_configuration_that_does_not_fit(own, tmp_path, changes, words):
    broken(own[1], tmp_path, **changes)
    with pytest.raises((ValueError, TypeError), match=words):
        TimmCAMForImageClassification.from_pretrained(tmp_path)


def test_weights_of_another_size_are_one_line(own):
    with pytest.raises(ValueError, match="do not fit `resnet10t` with the arguments .*Missing key") as refused:
        TimmCAMForImageClassification.from_timm(
            "resnet10t", num_labels=3, image_size=64, pretrained=own[1], stem_width=16
        )
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_all_there(own, tmp_path):
    from safetensors.torch import load_file

    broken(own[1], tmp_path)
    weights = load_file(own[1] / "model.safetensors")
    weights.pop("conv1.0.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing or have another size, among them timm_model.conv1.0.weight"):
        TimmCAMForImageClassification.from_pretrained(tmp_path)


def test_a_save_that_fails_leaves_the_folder_as_it_was(own, monkeypatch):
    model, folder = own
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_sharded_folder_becomes_a_whole_one(own, tmp_path):
    model, _ = own
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    TimmCAMForImageClassification.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_file_is_no_folder(own, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        own[0].save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        TimmCAMForImageClassification.from_pretrained(own[1] / "model.safetensors")


def test_a_folder_that_timm_wrote(tmp_path):
    theirs = timm.create_model("test_resnet", num_classes=4).eval()
    labels = {"num_classes": 4, "label_names": ["a", "b", "c", "d"]}
    timm.models.save_for_hf(theirs, tmp_path, model_config=labels, safe_serialization=True)
    model = TimmCAMForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, theirs(pixels))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("weights.bin", b"\x80\x04.", "pickles are not loaded"),
        ("weights.safetensors", b"\x10", "not a complete safetensors file"),
        (None, b"", "is not there"),
    ],
)
def test_starting_weights_that_are_none(tmp_path, name, content, words):
    path = tmp_path / (name or "nowhere.safetensors")
    if name:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=64, pretrained=path)


@tables_timm  # timm 1.0.26 cannot name this network's classifier
def test_a_network_that_cannot_average_its_tokens_keeps_its_pooling():
    model = TimmCAMForImageClassification.from_timm("resnet50_clip", num_labels=3, image_size=64)
    assert "global_pool" not in model.config.model_args
    assert model.check_spatial_evidence() == (2, 2)
