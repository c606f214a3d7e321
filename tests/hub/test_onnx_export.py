"""ONNX and torch.export: the same logits and maps, any number of images."""

import numpy as np
import pytest
import torch

from hnml_hf import TimmCAMForImageClassification, export_to_onnx
from hnml_hf.hub import onnx_export as export
from hnml_hf.hub.onnx_export import ExportError, export_program
from hnml_hf.modeling import onnx_program


def build(name):
    torch.manual_seed(0)
    return TimmCAMForImageClassification.from_timm(name, num_labels=5, image_size=64).eval()


def expected(model, count):
    pixels = torch.randn(count, *model.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(pixels, cam_classes="predicted")
    return pixels, output.logits, output.cams


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_onnx_computes_the_same(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build(name)
    path = export_to_onnx(model, tmp_path / "model.onnx", with_cams=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "cams"]
    for count in (1, 5):
        pixels, *wanted = expected(model, count)
        for found, known in zip(session.run(None, {"pixel_values": pixels.numpy()}), wanted, strict=True):
            np.testing.assert_allclose(found, known.numpy(), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.10, of its own reading
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_the_exported_program_computes_the_same(name, tmp_path):
    model, with_cams = build(name), name != "test_convnext"
    path = export_program(model, tmp_path / "model.pt2", with_cams=with_cams)
    program = torch.export.load(path).module()
    for count in (1, 5):
        pixels, *wanted = expected(model, count)
        with torch.no_grad():
            for found, known in zip(program(pixels), wanted[: 1 + with_cams], strict=True):
                torch.testing.assert_close(found, known, atol=1e-4, rtol=0)


def test_maps_that_need_a_gradient_are_refused(tmp_path):
    with pytest.raises(ValueError, match="its maps need a gradient"):
        export_program(build("test_convnext"), tmp_path / "x.pt2", with_cams=True)
    assert not list(tmp_path.iterdir())


def test_a_training_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="call `model.eval"):
        export_program(build("test_resnet").train(), tmp_path / "x.pt2")


def test_a_wrong_file_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export._Exported, "forward", lambda self, x: (self.model(x).logits + 0.01,))
    (tmp_path / "x.pt2").write_text("the one before")
    with pytest.raises(ExportError, match="differs from the model's by 1.0e-02"):
        export_program(build("test_resnet"), tmp_path / "x.pt2")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.pt2", "the one before")]


def test_weights_in_a_file_of_their_own_move_with_the_model(tmp_path, monkeypatch):
    """As of a model above 2 GiB: the model names the file of its weights as it is called in the end."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build("test_resnet")
    with monkeypatch.context() as small:
        small.setattr(onnx_program, "ONE_FILE", 0)
        export_to_onnx(model, tmp_path / "new" / "model.onnx")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["model.onnx", "model.onnx.data"]
    tensors = onnx.load(tmp_path / "new" / "model.onnx", load_external_data=False).graph.initializer
    named = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    assert named == {"model.onnx.data"}
    (tmp_path / "new").rename(tmp_path / "moved")
    session = onnxruntime.InferenceSession(tmp_path / "moved" / "model.onnx", providers=["CPUExecutionProvider"])
    pixels, wanted, _ = expected(model, 2)
    np.testing.assert_allclose(session.run(None, {"pixel_values": pixels.numpy()})[0], wanted.numpy(), atol=1e-4)
    export_to_onnx(model, tmp_path / "moved" / "model.onnx")  # small again: nothing is left of the large one
    assert [file.name for file in (tmp_path / "moved").iterdir()] == ["model.onnx"]


def test_a_model_with_its_weights_beside_it_that_differs_leaves_the_one_before(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx_program, "ONE_FILE", 0)
    monkeypatch.setattr(export._Exported, "forward", lambda self, x: (self.model(x).logits + 0.01,))
    (tmp_path / "x.onnx").write_text("the one before")
    with pytest.raises(ExportError, match="differs from the model's by 1.0e-02"):
        export_to_onnx(build("test_resnet"), tmp_path / "x.onnx")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.onnx", "the one before")]
