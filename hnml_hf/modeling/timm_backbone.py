"""From a timm name to a configuration and weights, and what this package asks of a timm classifier."""

import difflib
import inspect
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from torch import nn
from transformers import TimmWrapperConfig
from transformers.utils import logging

from ..common.words import counted
from .hub_client import download_weights
from .saving import WEIGHTS_FILE, check_safetensors


logger = logging.get_logger(__name__)


def backbone_config(
    architecture: str, *, id2label: dict[int, str], image_size: int | None, needs_cams: bool, model_args: dict
) -> TimmWrapperConfig:
    """The configuration of a timm classifier with these classes; arguments as in
    [`~hnml_hf.TimmCAMForImageClassification.from_timm`].

    Raises:
        ValueError: unknown name, channels other than three, arguments that timm refuses, no classifier, or, where
            activation maps are needed, no linear one.
    """
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        raise ValueError(
            f"`{architecture}` is not a timm {timm.__version__} model. "
            + (f"Did you mean {', '.join(f'`{name}`' for name in close)}? " if close else "")
            + "`timm.list_models()` gives all names."
        )
    model_args = dict(model_args)
    if model_args.get("in_chans", 3) != 3:
        raise ValueError(
            f"`in_chans={model_args['in_chans']}`: images are prepared in RGB here, so a backbone needs 3. Leave "
            "`in_chans` out; a gray image is given three equal channels."
        )
    try:
        with torch.device("meta"):
            probe = timm.create_model(architecture, num_classes=len(id2label), **model_args)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = f"{error}" or "it does not take one of these values"
        raise ValueError(f"timm cannot build `{architecture}` with the arguments {model_args}: {reason}.") from error
    if not hasattr(probe, "get_classifier"):
        raise ValueError(f"`{architecture}` is an encoder without a classifier: choose an image classifier of timm.")
    if needs_cams:
        require_linear_classifier(probe, architecture)
    accepted = inspect.signature(type(probe).__init__).parameters
    if getattr(probe, "global_pool", None) == "token" and "global_pool" not in model_args:
        # a class token hides where the evidence is: average the patch tokens, keep the norm where it was trained
        averaged = {"global_pool": "avg", **({"fc_norm": False} if "fc_norm" in accepted else {})}
        if _builds(architecture, num_classes=len(id2label), **model_args, **averaged):
            model_args.update(averaged)
            logger.info(f"`{architecture}` is built with average pooling of its patch tokens, not the class token.")
    if image_size is not None and "img_size" in accepted and image_size != probe.pretrained_cfg["input_size"][-1]:
        model_args.setdefault("img_size", image_size)

    pretrained_cfg = {k: v for k, v in probe.pretrained_cfg.items() if v is not None}
    for key in ("num_classes", "label_names", "label_descriptions"):
        pretrained_cfg.pop(key, None)
    if image_size is not None:
        pretrained_cfg["input_size"] = (pretrained_cfg["input_size"][0], image_size, image_size)
        pretrained_cfg["crop_pct"] = 1.0 if image_size <= 64 else pretrained_cfg.get("crop_pct", 0.875)
    return TimmWrapperConfig(
        architecture=architecture.split(".")[0],
        model_args=model_args,
        pretrained_cfg=pretrained_cfg,
        id2label=id2label,
        label2id={name: i for i, name in id2label.items()},
    )


def pretrained_state(architecture: str, config: TimmWrapperConfig, weights: bool | str | Path) -> dict:
    """timm's pretrained weights for a configuration, with a fresh head where theirs has another size.

    Args:
        architecture (`str`): the timm name, with its pretrained tag if one is wanted.
        config (`TimmWrapperConfig`): of [`backbone_config`].
        weights (`bool`, `str` or `Path`): `True` for those on the Hub, else a safetensors file or a saved folder.

    Raises:
        ValueError: if the file is not there, no safetensors file, of another architecture, or the architecture has
            no pretrained weights.
        HubError: if the weights are on the Hub and cannot be downloaded.
    """
    original = timm.get_pretrained_cfg(architecture)
    if weights is True:
        if original is None or not original.hf_hub_id:
            raise ValueError(f"timm has no pretrained weights of `{architecture}` on the Hub; give a file of them.")
        path, head_size = download_weights(original.hf_hub_id), original.num_classes
    else:
        path = Path(str(weights))
        path = path / WEIGHTS_FILE if path.is_dir() else path
        head_size = _stored_head_size(path, config.pretrained_cfg["classifier"])
    model_args = dict(config.model_args)
    overlay = {
        **model_args.pop("pretrained_cfg_overlay", {}),  # the user's own
        **{"file": str(path), "num_classes": head_size, "custom_load": False},
    }
    source = timm.create_model(
        architecture,
        pretrained=True,
        num_classes=config.num_labels,
        pretrained_cfg_overlay=overlay,
        **model_args,
    )
    if head_size != config.num_labels:
        logger.info(
            f"The pretrained head of `{architecture}` is replaced by a fresh one for "
            f"{counted(config.num_labels, 'class')}."
        )
    return source.state_dict()


def classifiers(timm_model: nn.Module) -> tuple[nn.Module, ...]:
    classifier = timm_model.get_classifier()
    return classifier if isinstance(classifier, tuple) else (classifier,)


def require_linear_classifier(timm_model: nn.Module, architecture: str):
    layers, ending = classifiers(timm_model), None
    for layer in layers:
        pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
        if not (isinstance(layer, nn.Linear) or pointwise):
            ending = f"`{type(layer).__name__}`"
    if len(layers) > 1 and getattr(timm_model, "global_pool", None) == "token":
        ending = "two heads on two class tokens"
    if ending:
        raise ValueError(
            f"Backbone `{architecture}` ends in {ending}, not in one linear layer, so it has no activation maps. "
            "Choose a backbone whose `get_classifier()` is `nn.Linear`, for example `resnet50`, `convnext_tiny` or "
            "`vit_small_patch16_224`."
        )


def _builds(architecture: str, **arguments) -> bool:
    """Whether timm takes these arguments."""
    try:
        with torch.device("meta"):
            timm.create_model(architecture, **arguments)
    except (AssertionError, TypeError, ValueError):
        return False
    return True


def _stored_head_size(path: Path, classifier: str) -> int:
    """Number of classes of the classifier in a safetensors file."""
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"`{path}`: local weights must be a `.safetensors` file; pickles are not loaded.")
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(f"`{path}`: local weights must be a `.safetensors` file.")
    if not path.is_file():
        raise ValueError(f"`{path}` is not there; give a safetensors file, or a folder with `{WEIGHTS_FILE}`.")
    check_safetensors(path)
    with safe_open(path, framework="pt") as weights:
        name = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
        if name not in weights.keys():
            raise ValueError(
                f"`{path}` has no `{name}`; it does not hold weights of this architecture with timm's names."
            )
        return weights.get_slice(name).get_shape()[0]
