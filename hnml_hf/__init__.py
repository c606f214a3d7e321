"""HNML, hierarchical noise-tolerant meta-learning with noisy labels: timm backbones on the Hugging Face Trainer.

A name is imported when it is first used (PEP 562): `import hnml_hf` and `hnml --help` wait for none of them. The
backbones of this package are registered with timm as soon as both are imported, in whichever order.
"""

import ast
import importlib
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # read by type checkers, and by `_modules_of_names`
    from .audit import (
        audit_run,
        clean_dataset,
        escape_formula,
        export_audit,
        find_label_issues,
        judge_labels,
        load_annotations,
        load_audit,
        noise_scores,
        score_model,
    )
    from .audit.probe import (
        LinearProbe,
        cross_validate_probe,
        fit_linear_probe,
        pooled_features,
        set_head,
        start_from_probe,
    )
    from .audit.report import render_report
    from .data import CIFARN, Animal10N, Clothing1M, Food101N, WebVision, class_balanced, load_noisy_dataset
    from .data.checks import apply_exclusions, check_dataset, load_exclusions
    from .data.collate import MixupCollator, collate_images
    from .data.noise_file import apply_noise_file, load_noise_file, save_noise_file
    from .data.splits import split_validation
    from .data.synthetic import add_noise, draw_noise
    from .data.transforms import (
        TransformedDataset,
        UnreadableImageError,
        create_image_processor,
        create_strong_transform,
        create_transforms,
    )
    from .hub.model_card import command_line
    from .hub.onnx_export import ExportError, export_program, export_to_onnx
    from .hub.upload import HubError, push_to_hub
    from .inference import NotAnImageError, Prediction, cam_examples, open_image, overlay, predict
    from .modeling.finite import NonFiniteError
    from .modeling.timm_cam import TimmCAMForImageClassification
    from .training.args import HNMLTrainingArguments
    from .training.dynamics import (
        TrainingDynamics,
        probe_dynamics,
        run_dynamics,
        save_probe_dynamics,
        save_run_dynamics,
    )
    from .training.flops import counting_flops, peak_tensor_bytes, tensor_bytes
    from .training.memorization import create_monitor
    from .training.metrics import compute_metrics, noise_auroc
    from .training.resume.files import CheckpointError
    from .training.resume.signals import EXIT_CODE, TrainingInterrupted
    from .training.trainer import HNMLTrainer


__version__ = "0.1.0"

__all__ = [
    "CIFARN",
    "EXIT_CODE",
    "Animal10N",
    "CheckpointError",
    "Clothing1M",
    "ExportError",
    "Food101N",
    "HNMLTrainer",
    "HNMLTrainingArguments",
    "HubError",
    "LinearProbe",
    "MixupCollator",
    "NonFiniteError",
    "NotAnImageError",
    "Prediction",
    "TrainingDynamics",
    "TimmCAMForImageClassification",
    "TrainingInterrupted",
    "TransformedDataset",
    "UnreadableImageError",
    "WebVision",
    "add_noise",
    "apply_noise_file",
    "apply_exclusions",
    "audit_run",
    "cam_examples",
    "check_dataset",
    "class_balanced",
    "clean_dataset",
    "collate_images",
    "command_line",
    "compute_metrics",
    "counting_flops",
    "create_monitor",
    "create_image_processor",
    "create_strong_transform",
    "create_transforms",
    "cross_validate_probe",
    "draw_noise",
    "escape_formula",
    "export_audit",
    "export_program",
    "export_to_onnx",
    "find_label_issues",
    "fit_linear_probe",
    "judge_labels",
    "load_audit",
    "load_noise_file",
    "load_noisy_dataset",
    "load_exclusions",
    "noise_auroc",
    "noise_scores",
    "open_image",
    "overlay",
    "peak_tensor_bytes",
    "pooled_features",
    "predict",
    "probe_dynamics",
    "push_to_hub",
    "load_annotations",
    "render_report",
    "run_dynamics",
    "save_noise_file",
    "save_probe_dynamics",
    "save_run_dynamics",
    "score_model",
    "set_head",
    "start_from_probe",
    "split_validation",
    "tensor_bytes",
]

_FOLDERS = ("audit", "data", "hub", "modeling", "noise", "objectives", "training")


def _modules_of_names() -> dict[str, str]:
    """Public name -> the module that has it, from the imports above."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {alias.name: node.module for node in imports for alias in node.names}


_MODULES = _modules_of_names()


def __getattr__(name: str):
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    elif name in _FOLDERS:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisterBackbones(MetaPathFinder):
    """Registers our backbones at the end of the first `import timm`, which is too slow to be done here."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "timm":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                sys.meta_path.remove(self)
                importlib.import_module(".modeling.backbones", __name__)

            spec.loader.exec_module = execute_and_register
        return spec


if "timm" in sys.modules:
    importlib.import_module(".modeling.backbones", __name__)
else:
    sys.meta_path.insert(0, _RegisterBackbones())

if os.environ.get("EAGER_IMPORT"):  # for what looks at a module as it is, such as pdoc
    for _name in __all__:
        __getattr__(_name)
