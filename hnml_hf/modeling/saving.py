"""[`SavedModelMixin`]: checkpoints that timm and transformers open without this package, and refuse if incomplete."""

import json
import os
import re
import shutil
import stat
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..common.answers import without_retries
from ..common.finite import require_finite_weights
from ..common.words import counted
from .hub_client import upload_files


logger = logging.get_logger(__name__)

PREFIX = "timm_model."  # of transformers' wrapper; in a saved file keys are timm's own
WEIGHTS_FILE = "model.safetensors"
IMAGENET_CLASSES = 1000


def check_config(folder: Path, *, new_head: bool = False):
    """Raise `ValueError` if the `config.json` of a folder would send for files elsewhere, or does not name each class
    once.

    Args:
        new_head (`bool`): the classes are given by the caller and not by the file.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is not readable: {error}. Restore it, or save the model again.") from error
    architecture, model_args = config.get("architecture"), config.get("model_args")
    model_args = model_args if isinstance(model_args, dict) else {}
    elsewhere = sorted({"checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"} & set(model_args))
    if isinstance(architecture, str) and not re.fullmatch(r"[\w.-]+", architecture):
        raise ValueError(
            f"`{path}`: `architecture` is {architecture!r}, but a local folder is loaded without other files or a "
            "network. Give the name of a timm model, as `resnet50`; its weights are those in the folder."
        )
    if elsewhere:
        raise ValueError(
            f"`{path}`: `model_args` has `{elsewhere[0]}`, but a local folder is loaded without other files or a "
            "network. Take it out; the weights are those in the folder."
        )
    if not new_head:
        _check_labels(config, path)


def _check_labels(config: dict, path: Path):
    problem = _label_problem(config)
    if problem is not None:
        raise ValueError(
            f"`{path}` does not name the classes: {problem}. Write the names of the training data in the order of "
            "their ids to `label_names`, each once, or give `num_labels` to put a fresh classifier on the backbone."
        )


def _label_problem(config: dict) -> str | None:
    names, id2label, label2id = (config.get(key) for key in ("label_names", "id2label", "label2id"))
    if not isinstance(names, list | None) or not all(isinstance(m, dict | None) for m in (id2label, label2id)):
        return "`label_names` must be a list, `id2label` and `label2id` objects"
    if id2label:
        if sorted(id2label) != sorted(map(str, range(len(id2label)))):
            return f"the ids of `id2label` are not 0 to {len(id2label) - 1}"
        by_id = [id2label[str(label)] for label in range(len(id2label))]
        if names not in (None, by_id):
            return "`label_names` and `id2label` differ"
        if label2id and label2id != {str(name): label for label, name in enumerate(by_id)}:
            return "`label2id` is not the inverse of `id2label`"
        names = by_id
    if not all(isinstance(name, str | int) for name in names or ()):
        return "a name is no text"
    count = config.get("num_classes", config.get("num_labels"))
    if names is not None and count not in (None, len(names)):
        return f"it has {counted(len(names), 'label name')} for {counted(count, 'class')}"
    if names and len(names) < IMAGENET_CLASSES:  # ImageNet's own names repeat
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        return f"several classes are called {', '.join(twice[:5])}" if twice else None
    return None


if TYPE_CHECKING:
    from transformers import PreTrainedModel as Wrapped
else:
    Wrapped = object


class SavedModelMixin(Wrapped):
    """Loading and saving for a `PreTrainedModel` that wraps a timm model."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """Load a saved folder or a Hub id: as in transformers, but no weight is left at random unasked.

        With `num_labels` or `id2label` of another size than the checkpoint's, the classifier is replaced by a fresh
        one.

        Raises:
            NonFiniteError: weights that are not finite.
            ValueError: no model there, weights that are cut off or a pickle, an unknown architecture, or weights that
                do not fit the configuration.
            OSError: the Hub has no such model, or did not answer.
        """
        source = str(pretrained_model_name_or_path)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_config(check_folder(folder), new_head=bool({"num_labels", "id2label"} & set(kwargs)))
        elif folder.is_file():
            raise ValueError(f"`{source}` is a file; give the folder that holds it and `config.json`.")
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("`use_safetensors=False`: pickles are not loaded, since they can run code.")
        new_head = bool({"num_labels", "id2label"} & set(kwargs))
        kwargs = {"ignore_mismatched_sizes": new_head, **kwargs}
        asked = nullcontext() if folder.is_dir() else without_retries(source, "model")
        try:
            with asked:
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *args, output_loading_info=True, use_safetensors=True, **kwargs
                )
        except SafetensorError as error:
            raise ValueError(f"The weights of `{source}` are cut off, or no safetensors file: {error}.") from error
        except (ImportError, RuntimeError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:500]
            unknown = "not supported in your version" in reason or "Unknown model" in reason
            advice = (
                "Check its name, or import the package that registers it."
                if unknown
                else ("Correct `config.json`, or give `num_labels` to put a fresh classifier on the backbone.")
            )
            raise ValueError(f"`{source}` does not load: {reason} {advice}") from error
        mismatched = {name for name, *_ in info["mismatched_keys"]}
        head = set(model.head_parameters()) if new_head else set()
        left_over = sorted((set(info["missing_keys"]) | mismatched) - head)
        if left_over:
            raise ValueError(
                f"The weights of `{source}` do not fit `{model.config.architecture}` with {model.config.model_args}: "
                f"{len(left_over)} are missing or have another size, among them {', '.join(left_over[:5])}."
            )
        require_finite_weights(model.state_dict(), of=f"`{source}`", advice="Train it again, or take another.")
        if mismatched:
            logger.warning(
                f"The head of `{source}` is replaced by a fresh one for {counted(model.config.num_labels, 'class')}."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, state_dict=None, push_to_hub: bool = False, **kwargs):
        """Save an ordinary checkpoint of timm and of transformers: keys without the wrapper's prefix.

        The files are written aside and then moved, the weights last: a folder holds this model or the one before,
        complete.
        """
        if push_to_hub:
            raise ValueError("Save first, then push: `model.push_to_hub(repo_id)`.")
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`{target}` is a file; give a folder.")
        state_dict = self.state_dict() if state_dict is None else state_dict
        state_dict = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
        target.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(dir=target, prefix="_saving-") as aside:
                super().save_pretrained(aside, *args, state_dict=state_dict, **kwargs)
                written = sorted(Path(aside).iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
                mode = stat.S_IMODE(Path(aside, "config.json").stat().st_mode)  # that of any new file of the user
                for path in written:
                    path.chmod(mode)  # safetensors writes for the owner alone
                    os.replace(path, target / path.name)
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            room = shutil.disk_usage(target).free / 2**20
            raise OSError(
                f"The model could not be written to `{target}`, where {room:.1f} MiB are left: {error}. What was "
                "there before is as it was. Make room there, or give another folder."
            ) from error
        if WEIGHTS_FILE in {path.name for path in written}:  # shards of an earlier save would be loaded as well
            for stale in (target / f"{WEIGHTS_FILE}.index.json", *target.glob("model-?????-of-?????.safetensors")):
                stale.unlink(missing_ok=True)

    def push_to_hub(self, repo_id: str, *, private: bool = True, **kwargs):
        """Upload weights and configuration to the Hub; a new repository is private.

        The configuration also tells timm and transformers how to prepare images. For a trained folder with its card
        use [`~hnml_hf.push_to_hub`], which takes the same arguments: `token`, `revision`, `create_pr`,
        `commit_message`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_files(folder, sorted(os.listdir(folder)), repo_id, private=private, **kwargs)


def check_folder(folder: str | os.PathLike) -> Path:
    """Return the folder if it holds a complete model.

    Raises:
        ValueError: if there is no configuration, there are no safetensors weights, or they are cut off.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("model*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        pickles = [name for name in ("pytorch_model.bin", "model.pth", "model.pt") if (folder / name).exists()]
        raise ValueError(
            f"`{folder}` has no model: `config.json` and `model.safetensors` are needed. "
            + (
                f"`{pickles[0]}` is a pickle, which can run code when it is opened; it is not used. "
                if pickles
                else ""
            )
            + "Give the `--output_dir` of a finished training, or one of its `checkpoint-*` folders."
        )
    for path in weights:
        check_safetensors(path)
    return folder


def check_safetensors(path: str | os.PathLike):
    """Raise `ValueError` if a safetensors file is cut off or is none."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"`{path}` is not a complete safetensors file ({error}). It was cut off, or is something else."
        ) from error
