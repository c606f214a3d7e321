"""A trained model as one file that runs without Python: ONNX, and PyTorch's own exported program."""

import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from ..common.atomic import atomic_write
from ..modeling.cam import class_activation_maps
from ..modeling.onnx_program import write_onnx


TOLERANCE = 1e-4  # largest difference in a logit that counts as the same model


class ExportError(RuntimeError):
    """The exported file does not compute what the model does. It was not kept."""


class _Exported(nn.Module):
    """Tensors in, tensors out: `pixel_values` to `logits` and, if asked, the maps of the predicted classes."""

    def __init__(self, model, with_cams: bool):
        super().__init__()
        self.model, self.with_cams = model, with_cams

    def forward(self, pixel_values):
        model = self.model
        native = model.timm_model.forward_features(pixel_values)
        logits = model.classify(model.pool(native))
        if not self.with_cams:
            return (logits,)
        class_weights = model.class_weights[logits.argmax(-1)]
        return logits, class_activation_maps(model.to_feature_maps(native), class_weights)


def _prepare(model, with_cams: bool) -> tuple[nn.Module, torch.Tensor, tuple[torch.Tensor, ...]]:
    """The module to export, an example batch of three images, and what it should give."""
    if model.training:
        raise ValueError("The model is in training mode; call `model.eval()` before exporting it.")
    pixel_values = torch.randn(3, *model.input_size, generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        output = model(pixel_values, cam_classes="predicted" if with_cams else None)
    if with_cams and not model.pools_by_mean:
        raise ValueError(
            f"The head of `{model.config.architecture}` is more than an average and a linear layer, so its maps "
            "need a gradient, which an exported model has not. Export it without maps."
        )
    return _Exported(model, with_cams).eval(), pixel_values, (output.logits, output.cams)[: 1 + with_cams]


def _compare(names: list[str], found, expected):
    for name, given, wanted in zip(names, found, expected, strict=True):
        difference = (torch.as_tensor(given).cpu() - wanted.cpu()).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise ExportError(
                f"`{name}` of the exported model differs from the model's by {difference:.1e}; nothing was kept."
            )


def export_to_onnx(model, path: str | os.PathLike, *, with_cams: bool = False) -> Path:
    """Write a model as ONNX, for any number of images at a time, and check the file with onnxruntime.

    Args:
        model ([`TimmCAMForImageClassification`]): in evaluation mode.
        path (`str` or `os.PathLike`): the file, `.onnx`; it holds the weights as well, up to 1.5 GiB of them. Of a
            larger model they lie beside it, in a file with `.data` at the end of its name; both belong together.
        with_cams (`bool`): whether to give the raw class activation map of the predicted class too, as output `cams`;
            for heads that average their map and apply one linear layer.

    Returns:
        `Path`: the file. Input `pixel_values`, outputs `logits` and, if asked, `cams`.

    Raises:
        ImportError: without the packages of the extra `onnx`.
        ValueError: a model that is training, or maps that this head cannot give.
        ExportError: onnxruntime computes something else; the file is not kept.

    Example:

        export_to_onnx(model.eval(), "model.onnx")
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise ImportError("Exporting to ONNX needs more packages: `pip install 'hnml_hf[onnx]'`.") from error
    module, pixel_values, expected = _prepare(model, with_cams)
    path, names = Path(path), ["logits", "cams"][: 1 + with_cams]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"_{path.name}-") as aside:
        # under its own name from the start: the model names the file of its weights, if these lie beside it
        unfinished = Path(aside, path.name)
        write_onnx(module, unfinished, example=pixel_values, outputs=names)
        session = onnxruntime.InferenceSession(unfinished, providers=["CPUExecutionProvider"])
        for count in (3, 1):
            found = session.run(names, {"pixel_values": pixel_values[:count].cpu().numpy()})
            _compare(names, found, [tensor[:count] for tensor in expected])
        del session
        written = sorted(Path(aside).iterdir(), key=lambda file: file == unfinished)  # the model last
        for file in written:
            os.replace(file, path.with_name(file.name))
    if len(written) == 1:  # of a larger model that had this name
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return path


def export_program(model, path: str | os.PathLike, *, with_cams: bool = False) -> Path:
    """Write a model with `torch.export`, for any number of images at a time, and check the file.

    Args:
        model, path, with_cams: as in [`export_to_onnx`]; the file is usually named `.pt2`.

    Returns:
        `Path`: the file, for `torch.export.load(path).module()`. It gives a tuple of `logits` and, if asked, `cams`.

    Raises:
        ValueError: a model that is training, or maps that this head cannot give.
        ExportError: the loaded program computes something else; the file is not kept.
    """
    module, pixel_values, expected = _prepare(model, with_cams)
    path, names = Path(path), ["logits", "cams"][: 1 + with_cams]
    program = torch.export.export(module, (pixel_values,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with atomic_write(path) as unfinished, torch.no_grad():
        torch.export.save(program, unfinished)
        loaded = torch.export.load(unfinished).module()
        for count in (3, 1):
            _compare(names, loaded(pixel_values[:count]), [tensor[:count] for tensor in expected])
    return path
