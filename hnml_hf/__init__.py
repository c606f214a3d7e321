"""HNML: hierarchical noise-tolerant meta-learning with noisy labels, for timm backbones on the Hugging Face Trainer."""

from importlib.metadata import version

from . import backbones as _register_backbones  # noqa: F401 (registers with timm)
from .data import load_noisy_dataset
from .data.collate import collate_images
from .data.transforms import TransformedDataset, create_image_processor, create_transforms
from .metrics import compute_metrics, noise_auroc
from .modeling import TimmCAMForImageClassification
from .trainer import HNMLTrainer, NonFiniteError
from .training_args import HNMLTrainingArguments


__version__ = version("hnml_hf")

__all__ = [
    "HNMLTrainer",
    "HNMLTrainingArguments",
    "NonFiniteError",
    "TimmCAMForImageClassification",
    "TransformedDataset",
    "collate_images",
    "compute_metrics",
    "create_image_processor",
    "create_transforms",
    "load_noisy_dataset",
    "noise_auroc",
]
