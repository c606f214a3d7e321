"""[`SavedModelMixin`]: checkpoints that timm and transformers open without this package, and refuse when torn."""

import os
import tempfile
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from ..hub.upload import check_folder, push_to_hub
from .finite import require_finite_weights


logger = logging.get_logger(__name__)

PREFIX = "timm_model."  # of transformers' wrapper; in a saved file keys are timm's own
WEIGHTS_FILE = "model.safetensors"


class SavedModelMixin:
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
            check_folder(folder)
        elif folder.is_file():
            raise ValueError(f"`{source}` is a file; give the folder that holds it and `config.json`.")
        if kwargs.pop("use_safetensors", True) is False:
            raise ValueError("`use_safetensors=False`: pickles are not loaded, since they can run code.")
        new_head = bool({"num_labels", "id2label"} & set(kwargs))
        kwargs = {"ignore_mismatched_sizes": new_head, **kwargs}
        try:
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
        head = set(model.scope_parameters("head")) if new_head else set()
        left_over = sorted((set(info["missing_keys"]) | mismatched) - head)
        if left_over:
            raise ValueError(
                f"The weights of `{source}` do not fit `{model.config.architecture}` with {model.config.model_args}: "
                f"{len(left_over)} are missing or have another size, among them {', '.join(left_over[:5])}."
            )
        require_finite_weights(model.state_dict(), of=f"`{source}`", advice="Train it again, or take another.")
        if mismatched:
            logger.warning(f"The head of `{source}` is replaced by a fresh one for {model.config.num_labels} classes.")
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, state_dict=None, push_to_hub: bool = False, **kwargs):
        """Save an ordinary checkpoint of timm and of transformers: keys without the wrapper's prefix.

        The files are written aside and then moved, the weights last: a folder holds a whole model, or the one before.
        """
        if push_to_hub:
            raise ValueError("Save first, then push: `model.push_to_hub(repo_id)`.")
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"`{target}` is a file; give a folder.")
        state_dict = self.state_dict() if state_dict is None else state_dict
        state_dict = {name.removeprefix(PREFIX): value for name, value in state_dict.items()}
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix="_saving-") as aside:
            super().save_pretrained(aside, *args, state_dict=state_dict, **kwargs)
            written = sorted(Path(aside).iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
            for path in written:
                os.replace(path, target / path.name)
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
            return push_to_hub(folder, repo_id, private=private, **kwargs)
