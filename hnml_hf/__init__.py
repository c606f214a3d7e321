"""HNML, hierarchical noise-tolerant meta-learning with noisy labels: timm backbones on the Hugging Face Trainer.

Here is what most users need; all else is imported from its module, as `hnml_hf.audit.start`. The folders: `data`
(datasets), `noise` (synthetic noise), `modeling` (the classifier), `objectives` (losses), `training` (the Trainer),
`audit` (which labels are wrong), `hub` (publishing), `common` (what all of them use).

A name is imported when it is first used (PEP 562): `import hnml_hf` and `hnml --help` wait for none of them. The
backbones of this package are registered with timm as soon as both are imported, in whichever order.
"""

import ast
import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # read by type checkers, and by `_modules_of_names`
    from .audit.cleaning import clean_dataset, load_annotations
    from .audit.dynamics import TrainingDynamics
    from .audit.export import export_audit
    from .audit.issues import find_label_issues
    from .audit.judge import judge_labels
    from .audit.run import audit_run
    from .audit.single_pass import score_model
    from .audit.table import load_audit, noise_scores
    from .common.finite import NonFiniteError
    from .data.checks import check_dataset
    from .data.collate import MixupCollator, collate_images
    from .data.load import load_noisy_dataset
    from .data.splits import split_validation
    from .data.synthetic import add_noise
    from .data.transforms import TransformedDataset, UnreadableImageError, create_image_processor, create_transforms
    from .hub.onnx_export import export_to_onnx
    from .hub.upload import push_to_hub
    from .inference import open_image, overlay, predict
    from .modeling.timm_cam import TimmCAMForImageClassification
    from .training.args import HNMLTrainingArguments
    from .training.metrics import compute_metrics
    from .training.resume.files import CheckpointError
    from .training.resume.signals import TrainingInterrupted
    from .training.trainer import HNMLTrainer


__version__ = "0.1.0"

__all__ = [
    "HNMLTrainer",
    "HNMLTrainingArguments",
    "TimmCAMForImageClassification",
    "load_noisy_dataset",
    "split_validation",
    "add_noise",
    "create_image_processor",
    "create_transforms",
    "TransformedDataset",
    "collate_images",
    "MixupCollator",
    "compute_metrics",
    "find_label_issues",
    "judge_labels",
    "load_audit",
    "audit_run",
    "score_model",
    "noise_scores",
    "TrainingDynamics",
    "load_annotations",
    "clean_dataset",
    "export_audit",
    "check_dataset",
    "predict",
    "open_image",
    "overlay",
    "push_to_hub",
    "export_to_onnx",
    "CheckpointError",
    "TrainingInterrupted",
    "UnreadableImageError",
    "NonFiniteError",
]

_FOLDERS = ("audit", "common", "data", "hub", "modeling", "noise", "objectives", "training")


def _modules_of_names() -> dict[str, str]:
    """Public name -> the module that has it, from the imports above."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {alias.name: node.module for node in imports for alias in node.names if node.module}


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
    return sorted({*__all__, *_FOLDERS, "__version__"})


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
