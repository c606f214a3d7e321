"""A network as ONNX, for onnxruntime."""

import warnings
from pathlib import Path

import torch
from torch import nn


OPSET = 18  # version of ONNX's operators, the one that torch's exporter writes without converting
ONE_FILE = 3 * 2**29  # bytes of weights; a file of the format cannot have more than 2 GiB


def write_onnx(network: nn.Module, path: Path, *, example: torch.Tensor, outputs: list[str], any_number: bool = True):
    """Write a network in evaluation mode as ONNX.

    Args:
        network (`nn.Module`): from `pixel_values` to a tensor, or a tuple of them.
        path (`Path`): the file. Above 1.5 GiB of weights these lie beside it, in a file with `.data` at the end of its
            name; both belong together.
        example (`torch.Tensor` of shape `(b, channels, height, width)`): images; their size stays fixed.
        outputs (`list[str]`): what the tensors are called.
        any_number (`bool`): the network takes any number of images, otherwise as many as the example has. For any
            number this must have at least 2, and the export takes half as long again.

    Raises:
        torch.onnx.OnnxExporterError: a network that cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own code
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["pixel_values"],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) if any_number else None,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # it is where `dynamo` is given
    size = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    program.save(path, external_data=size > ONE_FILE)
