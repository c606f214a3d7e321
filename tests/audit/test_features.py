import itertools
import sys

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, Image
from PIL import Image as Pillow
from safetensors.torch import save_file

from hnml_hf.audit import features as module
from hnml_hf.audit.features import extract_features, load_backbone


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture
def backbone(weights):
    return load_backbone("test_resnet", pretrained=weights, image_size=64)


def images(folder, number: int = 7) -> Dataset:
    generator = np.random.default_rng(0)
    paths = []
    for row in range(number):
        paths.append(str(folder / f"{row}.png"))
        Pillow.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(paths[-1])
    data = Dataset.from_dict({"image": paths, "label": [row % 2 for row in range(number)], "index": range(number)})
    return data.cast_column("image", Image()).cast_column("label", ClassLabel(names=["a", "b"]))


def test_the_last_features_come_first_and_the_means_of_the_stages_after_them(backbone):
    pixels = torch.randn(2, 3, 64, 64)
    found = backbone(pixels)
    last = backbone.timm_model.forward_head(backbone.timm_model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(found[:, : last.shape[1]], last)
    _, stages = backbone.timm_model.forward_intermediates(pixels)
    torch.testing.assert_close(found[:, last.shape[1] :], torch.cat([stage.mean((2, 3)) for stage in stages], dim=1))


def test_one_pass_in_the_order_of_the_rows(tmp_path, backbone):
    data = images(tmp_path)
    found = extract_features(data, backbone, cache_dir=tmp_path / "cache", batch_size=3, num_workers=0)
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in data["image"]]).permute(0, 3, 1, 2) / 255
    config = backbone.config.pretrained_cfg
    mean, deviation = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    expected = backbone((pixels - mean) / deviation)
    np.testing.assert_allclose(found.values, expected.numpy(), rtol=1e-3, atol=1e-4)
    assert found.computed == 7 and found.readable.all() and len(set(found.groups)) == 7


def test_a_batch_that_memory_does_not_hold_is_halved(tmp_path, backbone, monkeypatch, caplog):
    data, sizes = images(tmp_path), []
    whole = extract_features(data, backbone, cache_dir=tmp_path / "whole", batch_size=7, num_workers=0)
    forward = type(backbone).forward

    def holds_two(self, pixels):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, pixels)

    monkeypatch.setattr(type(backbone), "forward", holds_two)
    halves = extract_features(data, backbone, cache_dir=tmp_path / "halves", batch_size=6, num_workers=0)
    assert sizes == [1, 6, 3, 1, 1, 1, 1, 1, 1, 1]  # the first one asks for the width
    assert "on with 1 at a time" in caplog.text
    np.testing.assert_allclose(halves.values, whole.values, rtol=1e-4, atol=1e-5)


def test_another_error_of_the_network_and_a_single_image_that_does_not_fit_are_told(tmp_path, backbone, monkeypatch):
    for message, batch_size in (("CUDA out of memory. Tried", 1), ("CUDA error: device-side assert", 4)):

        def fails(self, pixels, message=message):
            if pixels.any():
                raise RuntimeError(message)
            return pixels.mean((2, 3))

        monkeypatch.setattr(type(backbone), "forward", fails)
        with pytest.raises(RuntimeError, match=message):
            extract_features(
                images(tmp_path), backbone, cache_dir=tmp_path / "c", batch_size=batch_size, num_workers=0
            )


def test_larger_images_come_in_smaller_batches(tmp_path, weights, monkeypatch):
    sizes, run_over = [], module.run_over
    monkeypatch.setattr(
        module, "run_over", lambda *args, **how: sizes.append(how["batch_size"]) or run_over(*args, **how)
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for size in (32, 64, 448):
        backbone = load_backbone("test_resnet", pretrained=weights, image_size=size)
        extract_features(images(tmp_path, 2), backbone, cache_dir=tmp_path / "cache", num_workers=0, device="cpu")
    assert sizes == [256, 196, 4]  # two threads with 8 images of 224 pixels each; 448 has four times as many


def test_no_map_of_several_cells_is_needed(tmp_path, weights):
    backbone = load_backbone("test_resnet", pretrained=weights, image_size=16)  # which has a stride of 32
    assert extract_features(images(tmp_path, 2), backbone, cache_dir=tmp_path / "c", num_workers=0).readable.all()
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match="`test_vit` takes no images of 33x33 pixels.*another `image_size`"):
        load_backbone("test_vit", pretrained=tmp_path / "vit.safetensors", image_size=33)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("levit_128s", {}),  # a batch norm in each of two heads
        ("deit_tiny_distilled_patch16_224", {"depth": 2}),  # two heads on two class tokens
    ],
)
def test_a_backbone_needs_no_single_linear_head(tmp_path, name, small):
    save_file(timm.create_model(name, num_classes=5, **small).state_dict(), tmp_path / "weights.safetensors")
    backbone = load_backbone(name, pretrained=tmp_path / "weights.safetensors", **small)
    features = extract_features(images(tmp_path, 2), backbone, cache_dir=tmp_path / "cache", num_workers=0)
    assert features.computed == 2 and np.isfinite(features.values).all() and features.values.std() > 0
    again = load_backbone(name, pretrained=tmp_path / "weights.safetensors", **small)  # another head is drawn
    assert extract_features(images(tmp_path, 2), again, cache_dir=tmp_path / "cache", num_workers=0).computed == 0


@pytest.mark.skipif("qwen3_vit_88m_enc" not in timm.list_models(), reason="this timm has no such encoder")
def test_an_encoder_without_a_classifier_is_refused():
    with pytest.raises(ValueError, match="`qwen3_vit_88m_enc` is an encoder without a classifier: choose an image"):
        load_backbone("qwen3_vit_88m_enc")


def test_what_is_there_is_not_computed_again_and_what_changed_is(tmp_path, weights, backbone):
    data = images(tmp_path)
    how = {"cache_dir": tmp_path / "cache", "batch_size": 2, "num_workers": 0}
    first = np.array(extract_features(data, backbone, **how).values)
    again = extract_features(data, load_backbone("test_resnet", pretrained=weights, image_size=64), **how)
    assert again.computed == 0
    np.testing.assert_array_equal(again.values, first)

    Pillow.new("RGB", (64, 64), "red").save(tmp_path / "3.png")
    changed = extract_features(data, backbone, **how)
    assert changed.computed == 1 and not np.allclose(changed.values[3], first[3])
    other = load_backbone("test_resnet", pretrained=weights, image_size=96)
    assert extract_features(data, other, **how).computed == 7


def test_features_of_the_same_images_among_other_rows_are_taken_over(tmp_path, backbone):
    data, how = images(tmp_path), {"cache_dir": tmp_path / "cache", "batch_size": 2, "num_workers": 0}
    whole = np.array(extract_features(data, backbone, **how).values)
    Pillow.new("RGB", (64, 64), "red").save(tmp_path / "4.png")
    rows = [6, 0, 4, 3]
    part = extract_features(data.select(rows), backbone, **how)
    assert part.computed == 1 and part.readable.all()  # the one that has changed since
    np.testing.assert_array_equal(part.values[[0, 1, 3]], whole[[6, 0, 3]])
    assert not np.allclose(part.values[2], whole[4])
    assert extract_features(data.select(rows), backbone, **how).computed == 0


def test_files_that_moved_need_no_new_pass(tmp_path, backbone):
    """As after `hnml clean`: the same files in other folders, in another order, audited beside the first."""
    data, how = images(tmp_path), {"batch_size": 2, "num_workers": 0}
    whole = np.array(extract_features(data, backbone, cache_dir=tmp_path / "photos" / "_features", **how).values)
    (tmp_path / "moved").mkdir()
    rows = [5, 2, 0]
    for row in rows:
        (tmp_path / f"{row}.png").rename(tmp_path / "moved" / f"{row}.png")
    moved = Dataset.from_dict({"image": [str(tmp_path / "moved" / f"{row}.png") for row in rows]})
    beside = sorted(tmp_path.glob("*/_features"))
    cleaned = {"cache_dir": tmp_path / "photos_cleaned" / "_features", "also_in": beside, **how}
    found = extract_features(moved.cast_column("image", Image()), backbone, **cleaned)
    assert found.computed == 0 and found.folder.is_relative_to(tmp_path / "photos_cleaned")
    np.testing.assert_array_equal(found.values, whole[rows])


def test_a_pass_that_was_stopped_goes_on(tmp_path, backbone, monkeypatch):
    data, how = images(tmp_path), {"cache_dir": tmp_path / "cache", "batch_size": 2, "num_workers": 0}
    whole, calls = module._Forward, []

    def stops(*args):
        forward = whole(*args)

        def once(pixels):
            if calls:
                raise KeyboardInterrupt
            calls.append(pixels)
            return forward(pixels)

        return once

    monkeypatch.setattr(module, "_Forward", stops)
    with pytest.raises(KeyboardInterrupt):
        extract_features(data, backbone, **how)
    monkeypatch.setattr(module, "_Forward", whole)
    assert extract_features(data, backbone, **how).computed == 5


def test_copies_are_of_one_group_and_an_unreadable_image_is_said(tmp_path, backbone):
    data = images(tmp_path)
    (tmp_path / "5.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "6.png").write_bytes(b"no image")
    found = extract_features(data, backbone, cache_dir=tmp_path / "cache", num_workers=0)
    assert found.groups[5] == found.groups[1] and len(set(found.groups)) == 6
    assert found.readable.tolist() == [True] * 6 + [False] and (found.values[6] == 0).all()


def test_complete_features_are_read_where_nothing_can_be_written(tmp_path, backbone, monkeypatch):
    data, how = images(tmp_path), {"cache_dir": tmp_path / "cache", "num_workers": 0, "batch_size": 3}
    (tmp_path / "6.png").write_bytes(b"no image")
    found = extract_features(data, backbone, **how)
    before = {path: path.read_bytes() for path in found.folder.iterdir()}
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    again = extract_features(data, backbone, **how)
    assert again.computed == 0 and again.readable.tolist() == [True] * 6 + [False]
    assert np.array_equal(again.values, found.values) and np.array_equal(again.groups, found.groups)
    Pillow.new("RGB", (64, 64)).save(tmp_path / "4.png")
    with pytest.raises(OSError, match="cannot be written, and lacks features of 1 image as they are now: give anoth"):
        extract_features(data, backbone, **how)
    (tmp_path / "4.png").unlink()
    with pytest.raises(OSError, match="lacks features of 1 image"):
        extract_features(data, backbone, **how)
    assert before == {path: path.read_bytes() for path in found.folder.iterdir()}
    done = np.load(found.folder / "done.npy", mmap_mode="r+")
    done[:2] = 0
    done.flush()
    monkeypatch.setattr(module, "run_over", lambda *words, **more: pytest.fail("a pass was begun"))
    with pytest.raises(OSError, match="lacks features of 2 images"):
        extract_features(data, backbone, **how)


def test_bad_input_is_named_before_the_pass(tmp_path, weights, monkeypatch):
    with pytest.raises(ValueError, match="needs pretrained features"):
        load_backbone("test_resnet", pretrained=False)
    data, backbone = images(tmp_path), load_backbone("test_resnet", pretrained=weights, image_size=64)
    for row in range(7):
        (tmp_path / f"{row}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="None of the 7 images can be read"):
        extract_features(data, backbone, cache_dir=tmp_path / "cache", num_workers=0)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match="GB for features"):
        extract_features(data, backbone, cache_dir=tmp_path / "full", num_workers=0)


def without_onnx(monkeypatch, name="onnxscript"):
    monkeypatch.setitem(sys.modules, name, None)  # an import of it fails


@pytest.fixture
def onnx_is(monkeypatch):
    """Tells which of the two ways is said to be the faster one; onnxruntime is tried first."""

    def tell(faster: bool):
        seconds = itertools.cycle([0.0, 1.0] if faster else [1.0, 0.0])
        monkeypatch.setattr(module, "_timed_twice", lambda run: (torch.no_grad()(run)(), next(seconds)))

    return tell


def test_onnxruntime_computes_the_same_features_from_any_number_of_images(tmp_path, backbone, monkeypatch, onnx_is):
    onnx_is(faster=True)
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    data, how = images(tmp_path), {"batch_size": 3, "num_workers": 0, "device": "cpu"}
    plain = extract_features(data, backbone, cache_dir=tmp_path / "plain", **how)
    sessions = []

    class Watched(onnxruntime.InferenceSession):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            sessions.append([])

        def run(self, names, given):
            sessions[-1].append(len(given["pixel_values"]))
            return super().run(names, given)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)
    monkeypatch.setattr(module, "EXPORTED_FROM", 7 * 64**2 + 1)
    extract_features(data, backbone, cache_dir=tmp_path / "few", **how)
    assert not sessions
    monkeypatch.setattr(module, "EXPORTED_FROM", 7 * 64**2)
    found = extract_features(data, backbone, cache_dir=tmp_path / "many", **how)
    assert sessions == [[3, 3, 3, 3]]  # the first is compared with PyTorch, the last has two blank images
    np.testing.assert_allclose(found.values, plain.values, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(found.values, plain.values)
    onnx_is(faster=False)
    slower = extract_features(data, backbone, cache_dir=tmp_path / "slower", **how)
    assert sessions[1:] == [[3]] and np.array_equal(slower.values, plain.values)


@pytest.mark.parametrize(("batch_size", "at_once", "sent"), [(7, 2, [2, 2, 2, 2, 2]), (6, 6, [6, 6])])
def test_parts_go_into_onnxruntime_and_a_few_images_do_not(
    tmp_path, backbone, monkeypatch, onnx_is, batch_size, at_once, sent
):
    """Seven images: in parts of two; or six, and then one by PyTorch, since filled up it would take as long as six."""
    onnx_is(faster=True)
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    data, run, seen = images(tmp_path), onnxruntime.InferenceSession.run, []
    how = {"batch_size": batch_size, "num_workers": 0, "device": "cpu"}
    plain = extract_features(data, backbone, cache_dir=tmp_path / "plain", **how)
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda *given: seen.append(len(given[2]["pixel_values"])) or run(*given)
    )
    monkeypatch.setattr(module, "EXPORTED_FROM", 0)
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    found = extract_features(data, backbone, cache_dir=tmp_path / "many", **how)
    assert seen == sent  # the first of them is compared with PyTorch
    np.testing.assert_allclose(found.values, plain.values, rtol=1e-4, atol=1e-5)


def test_the_faster_of_two_calls_counts(monkeypatch):
    clock = iter([0.0, 5.0, 6.0, 9.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert module._timed_twice(lambda: "found") == ("found", 3.0)


@pytest.mark.parametrize("missing", ["onnxruntime", "onnxscript"])
def test_missing_packages_are_said_where_they_would_save_time(tmp_path, backbone, monkeypatch, caplog, missing):
    without_onnx(monkeypatch, missing)
    extract_features(images(tmp_path), backbone, cache_dir=tmp_path / "few", num_workers=0, device="cpu")
    assert "pip install" not in caplog.text
    monkeypatch.setattr(module, "EXPORTED_FROM", 7 * 64**2)
    found = extract_features(images(tmp_path), backbone, cache_dir=tmp_path / "many", num_workers=0, device="cpu")
    assert "pip install 'hnml_hf[onnx]'" in caplog.text and found.computed == 7


@pytest.mark.parametrize("fault", ["cannot", "no folder", "differs"])
def test_pytorch_computes_what_onnxruntime_does_not(tmp_path, backbone, monkeypatch, caplog, fault):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    data, how = images(tmp_path), {"num_workers": 0, "device": "cpu"}
    plain = extract_features(data, backbone, cache_dir=tmp_path / "plain", **how)
    if fault == "cannot":
        backbone.register_forward_pre_hook(lambda network, given: None if given[0].sum() > 0 else None)
        said = "is not used for test_resnet, so the pass may take longer (GuardOnDataDependentSymNode: "
    elif fault == "no folder":
        monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "none"))
        said = "is not used for test_resnet, so the pass may take longer (FileNotFoundError: "
    else:
        run = onnxruntime.InferenceSession.run

        def false(session, names, given):
            (found,) = run(session, names, given)
            return [1.01 * found]

        monkeypatch.setattr(onnxruntime.InferenceSession, "run", false)
        said = "its features differ from PyTorch's by 1.0e-02 of the largest"
    monkeypatch.setattr(module, "EXPORTED_FROM", 0)
    found = extract_features(data, backbone, cache_dir=tmp_path / "many", **how)
    assert said in caplog.text
    np.testing.assert_array_equal(found.values, plain.values)


def test_pytorch_goes_on_in_halves_where_onnxruntime_lacks_memory(tmp_path, backbone, monkeypatch, caplog, onnx_is):
    onnx_is(faster=True)
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    data, run, sent = images(tmp_path), onnxruntime.InferenceSession.run, []

    def small(session, names, given):
        sent.append(len(given["pixel_values"]))
        if len(sent) > 2:
            raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException("Failed to allocate memory for buffer")
        return run(session, names, given)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", small)
    monkeypatch.setattr(module, "EXPORTED_FROM", 0)
    how = {"num_workers": 0, "device": "cpu", "batch_size": 4}
    found = extract_features(data, backbone, cache_dir=tmp_path / "halves", **how)
    assert sent == [4, 4, 4] and "on with 2 at a time" in caplog.text and found.computed == 7
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    whole = extract_features(data, backbone, cache_dir=tmp_path / "whole", **how)
    np.testing.assert_allclose(found.values, whole.values, rtol=1e-5, atol=1e-6)
