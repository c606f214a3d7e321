import copy
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, pipeline

from hnml_hf.data.transforms import create_image_processor
from hnml_hf.modeling.timm_cam import TimmCAMForImageClassification
from hnml_hf.objectives.batch_view import BatchView
from hnml_hf.objectives.virtual_step import virtual_predictions


# one backbone per layout and kind of head: NCHW, tokens, tokens with registers, norm after the pool, NHWC with an MLP
# head
BACKBONES = {
    "test_resnet": {},
    "test_vit": {"image_size": 64},
    "test_vit_relpos": {"image_size": 64} if timm.is_model("test_vit_relpos") else {},
    "test_convnext": {},
    "test_mambaout": {},
    "test_efficientnet": {},
}
BACKBONES = {name: options for name, options in BACKBONES.items() if timm.is_model(name)}
MEAN_POOL = ("test_resnet", "test_vit", "test_efficientnet")


def build(name: str, **options) -> TimmCAMForImageClassification:
    torch.manual_seed(0)
    return TimmCAMForImageClassification.from_timm(
        name, num_labels=5, **{"image_size": 64, **BACKBONES.get(name, {}), **options}
    )


def images(model, count=3):
    return torch.randn(count, *model.input_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BACKBONES)
def test_fresh_weights_are_timms_own(name):
    model = build(name)
    torch.manual_seed(0)
    wrapped = TimmCAMForImageClassification(copy.deepcopy(model.config)).timm_model
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=5, **model.config.model_args)
    for (key, expected), value in zip(reference.state_dict().items(), wrapped.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("name", BACKBONES)
def test_output(name):
    model = build(name).eval()
    pixel_values = images(model)
    with torch.no_grad():
        output = model(pixel_values, labels=torch.tensor([0, 1, 2]), cam_classes=torch.tensor([4, 0, 2]))
        assert torch.equal(output.logits, model.timm_model(pixel_values))
    assert_close(output.logits, model.classify(output.features), rtol=0, atol=0)
    assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2])))
    height, width = model.check_spatial_evidence()
    assert output.feature_maps.shape[0] == 3 and output.feature_maps.shape[2:] == (height, width) != (1, 1)
    assert output.cams.shape == (3, height, width)
    assert (output.cams.flatten(1).std(1) > 0).all()


@pytest.mark.parametrize("name", MEAN_POOL)
def test_mean_of_the_map_plus_bias_is_the_logit(name):
    model = build(name).eval()
    classes = torch.tensor([4, 0, 2])
    output = model(images(model), cam_classes=classes)
    bias = model.timm_model.get_classifier().bias[classes]
    assert_close(output.cams.mean((1, 2)) + bias, output.logits[range(3), classes], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout"])
def test_other_heads_linearise(name):
    """The map is the change of the logit when a cell is scaled, against a finite difference in float64."""
    model = build(name).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double())
    classes = torch.tensor([4, 0, 2])
    with torch.no_grad():
        output = model(images(model).double(), cam_classes=classes)
        native, step = output.last_hidden_state, 1e-5
        height, width = output.cams.shape[1:]
        for row, column in ((0, 0), (height - 1, 1)):
            scale = torch.ones(height, width, dtype=torch.double)
            scale[row, column] += step
            scale = scale[..., None] if native.shape[-1] == output.feature_maps.shape[1] else scale
            changed = model.classify(model.pool(native * scale))
            slope = (changed - output.logits)[range(3), classes] / step
            assert_close(output.cams[:, row, column] / (height * width), slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_full_mask_changes_nothing_and_half_a_mask_does(name):
    model = build(name).eval()
    grid = model.check_spatial_evidence()
    left = torch.zeros(1, 3, *grid)
    left[..., : grid[1] // 2] = 1
    with torch.no_grad():
        output = model(images(model), region_masks=torch.cat([torch.ones_like(left), left]))
    assert_close(output.region_logits[0], output.logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(output.region_logits[1], output.logits, atol=1e-4)
    if name in MEAN_POOL:
        average = output.feature_maps[..., : grid[1] // 2].mean((2, 3))
        assert_close(output.region_features[1], average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_one_folder_for_three_loaders(name, tmp_path):
    model = build(name).eval()
    model.save_pretrained(tmp_path)
    create_image_processor(model.config.pretrained_cfg).save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.timm_model.state_dict())
    pixel_values = images(model)
    with torch.no_grad():
        expected = model(pixel_values).logits
        ours = TimmCAMForImageClassification.from_pretrained(tmp_path).eval()
        theirs = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert type(theirs).__name__ == "TimmWrapperForImageClassification"
        assert torch.equal(ours(pixel_values).logits, expected)
        assert torch.equal(theirs(pixel_values).logits, expected)
        native = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(native(pixel_values), expected)
        classify = pipeline("image-classification", model=str(tmp_path))
        assert torch.equal(classify.model(pixel_values).logits, expected)


def test_loading_needs_neither_this_package_nor_remote_code(tmp_path):
    model = build("test_resnet").eval()
    model.save_pretrained(tmp_path)
    code = (
        "import sys\n"
        "sys.modules['hnml_hf'] = None\n"  # any import of it fails
        "from transformers import AutoModelForImageClassification\n"
        "import timm\n"
        f"AutoModelForImageClassification.from_pretrained({str(tmp_path)!r})\n"
        f"timm.create_model('local-dir:{tmp_path}', pretrained=True)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_new_number_of_classes_gets_a_fresh_finite_head(tmp_path):
    build("test_resnet").save_pretrained(tmp_path)
    loaded = TimmCAMForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    weight = loaded.class_weights
    assert weight.shape[0] == 3 and weight.isfinite().all() and 0 < weight.abs().max() < 1


def test_weights_from_a_local_file(tmp_path):
    source = build("test_resnet")
    source.save_pretrained(tmp_path)
    loaded = build("test_resnet", pretrained=tmp_path / "model.safetensors")
    assert torch.equal(loaded.class_weights, source.class_weights)
    with pytest.raises(ValueError, match="pickles are not loaded"):
        build("test_resnet", pretrained=tmp_path / "model.bin")
    with pytest.raises(ValueError, match="`none` is not there; give a safetensors file"):
        build("test_resnet", pretrained="none")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet_of_my_dreams", {}, "not a timm"),
        ("vgg11_bn", {"image_size": 32}, "`vgg11_bn` has a feature map of 1x1"),
        ("deit_tiny_distilled_patch16_224", {"image_size": 32}, "`deit_tiny_distilled_patch16_224` ends in"),
        ("test_resnet", {"num_labels": 1}, "at least two classes"),
        ("test_resnet", {"in_chans": 1}, "`in_chans=1`: images are prepared in RGB here.* Leave `in_chans` out"),
    ],
)
def test_unsuitable_backbones_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        TimmCAMForImageClassification.from_timm(name, **{"num_labels": 5, **options})


def test_class_token_models_pool_their_patches():
    model = build("test_vit")
    assert model.config.model_args["global_pool"] == "avg"
    with pytest.raises(ValueError, match="class token"):
        build("test_vit", global_pool="token")


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet34_cifar", "preact_resnet18_cifar"])
def test_cifar_networks_keep_small_images(name, tmp_path):
    import hnml_hf.modeling.backbones  # noqa: F401

    model = TimmCAMForImageClassification.from_timm(name, num_labels=10).eval()
    parameters = {"resnet18_cifar": 11_173_962, "resnet34_cifar": 21_282_122, "preact_resnet18_cifar": 11_172_170}
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters[name]
    assert model.check_spatial_evidence() == (4, 4)


# -- virtual weights --


def virtual_loss(model, scope, second_order, pixel_values):
    """Loss at two virtual points and its gradients."""
    labels, synthetic = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([[1, 1, 2, 0, 4, 3], [0, 2, 2, 3, 1, 0]])
    masks = torch.rand(1, 6, *model.check_spatial_evidence(), generator=torch.Generator().manual_seed(3)).double()

    def step(model, pixel_values):
        view = BatchView(model, pixel_values)
        requests = {"region_masks": masks, "cam_classes": labels}
        _, virtual, _ = virtual_predictions(
            view, labels, synthetic, requests, scope=scope, lr=0.1, second_order=second_order
        )
        return virtual.logits.square().mean() + virtual.region_logits.square().mean() + virtual.cams.square().mean()

    model.train().zero_grad()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = model(pixel_values, step=step)
        loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_virtual_passes_leave_batch_norm_statistics_alone():
    model, reference = build("test_resnet").double(), build("test_resnet").double()
    pixel_values = images(model, 6).double()
    virtual_loss(model, "full", False, pixel_values)
    reference.train()(pixel_values)
    for (name, buffer), expected in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_head_scope_equals_a_virtual_step_on_the_head(tmp_path):
    """The closed form against `gradient_step` on the head's weight and bias through the whole network."""
    from hnml_hf.objectives.inner_step import gradient_step

    model = build("test_convnext").double()
    pixel_values, labels = images(model, 6).double(), torch.tensor([[1, 1, 2, 0, 4, 3]])
    masks = torch.rand(1, 6, *model.check_spatial_evidence(), generator=torch.Generator().manual_seed(3)).double()
    requests = {"region_masks": masks, "cam_classes": labels[0]}
    outcomes = []

    def closed(model, pixel_values):
        view = BatchView(model, pixel_values)
        _, virtual, _ = virtual_predictions(
            view, labels[0], labels, requests, scope="head", lr=20.0, second_order=True
        )
        return virtual.logits[0], virtual.region_logits[0, 0], virtual.cams[0]

    def explicit(model, pixel_values):
        view, weights = BatchView(model, pixel_values), model.head_parameters()
        output = view()
        lr = 20.0 / (1 + output.features.square().sum(-1)).mean().item()
        fast = view(
            gradient_step(F.cross_entropy(output.logits, labels[0]), weights, lr=lr, second_order=True), **requests
        )
        return fast.logits, fast.region_logits[0], fast.cams

    for step in (closed, explicit):
        model.train().zero_grad()
        parts = model(pixel_values, step=step)
        sum(part.double().square().mean() for part in parts).backward()
        outcomes.append(([part.double() for part in parts], [p.grad.clone() for p in model.parameters()]))
    # the closed form works in float32, whatever the model's precision
    assert_close(outcomes[0], outcomes[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet_of_my_dreams", "test_/etc/passwd"])
def test_a_saved_model_of_an_unknown_architecture_is_named(name, tmp_path):
    TimmCAMForImageClassification.from_timm("test_resnet", num_labels=2, image_size=64).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"architecture": "test_resnet"', f'"architecture": "{name}"', 1))
    said = "is loaded without other files" if "/" in name else "does not load"
    with pytest.raises(ValueError, match=f"`{tmp_path}.*{said}"):
        TimmCAMForImageClassification.from_pretrained(tmp_path)
