"""Publishing a trained folder: what may leave the machine is a list, and everything else stays."""

import fnmatch
import os
from pathlib import Path

from huggingface_hub import CommitInfo

from ..modeling.hub_client import HubError, check_repo_id, create_repo, upload_files
from ..modeling.saving import check_folder


PUBLISHED = (  # names in the top folder; nothing below it, no pickle, no record of single samples
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    "README.md",
    "all_results.json",
    "training_curves.png",
    "cam_examples.png",
)


def published_files(folder: str | os.PathLike) -> list[str]:
    """Names of the files in a folder that a push uploads, in order."""
    names = sorted(entry.name for entry in Path(folder).iterdir() if entry.is_file() and not entry.is_symlink())
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in PUBLISHED)]


def push_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Upload a trained folder: the files that `PUBLISHED` names, in one commit.

    Args:
        folder (`str` or `os.PathLike`): what `save_model` or `save_pretrained` wrote.
        repo_id (`str`): `name` or `user/name`; it is created if it is not there.
        private (`bool`): whether a new repository is private. One that is there stays as it is.
        token (`str` or `bool`, *optional*): default: the stored one.
        revision (`str`, *optional*): branch to commit to; created if it is not there.
        create_pr (`bool`): whether to open a pull request instead.
        commit_message (`str`): title of the commit.

    Returns:
        `CommitInfo`: huggingface_hub's, with `oid` and `commit_url`. All files arrive in one commit, or none.

    Raises:
        ValueError: before anything is sent: no complete model in the folder, or a name that is not valid.
        HubError: the Hub refused, failed or did not answer. Says how to retry.

    Example:

        push_to_hub("outputs/quickstart", "me/quickstart")
    """
    check_repo_id(repo_id)
    folder = check_folder(folder)
    return upload_files(
        folder,
        published_files(folder),
        repo_id,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )


__all__ = ["PUBLISHED", "HubError", "create_repo", "published_files", "push_to_hub"]
