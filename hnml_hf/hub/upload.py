"""Publishing a trained folder: what may leave the machine is a list, and everything else stays.

The Hub is reached by huggingface_hub alone; its settings (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`) apply.
"""

import fnmatch
import json
import os
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open


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
ANSWER_WITHIN = 30  # seconds until a Hub that says nothing counts as not there
FORBIDDEN = {
    "write": "this token may not write there. Use a token with write access, and a namespace that is yours",
    "read": "this token may not read there. Accept the repository's conditions on its page, or use a token that may",
}
REASONS = {
    401: "the Hub does not know this token. Log in with `hf auth login`, or set `HF_TOKEN`",
    404: "the Hub has no such repository or revision for this token. Check the name, and that the token may see it",
}


class HubError(RuntimeError):
    """The Hub refused, failed or did not answer. Nothing local is touched."""


def check_repo_id(repo_id: str):
    """Raise `ValueError` if the Hub could not accept a name."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(
            f"`{repo_id}` is not a repository name: {error} Give `name` or `user/name`, of letters, digits, `-`, `_` "
            "and `.`, at most 96 characters."
        ) from error


def check_folder(folder: str | os.PathLike) -> Path:
    """Return the folder if it holds a whole model.

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
            f"`{path}` is not a whole safetensors file ({error}). It was cut off, or is something else."
        ) from error


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
        ValueError: before anything is sent: no whole model in the folder, or a name that is not valid.
        HubError: the Hub refused, failed or did not answer. Says how to retry.
    """
    check_repo_id(repo_id)
    folder = check_folder(folder)
    operations = [CommitOperationAdd(name, folder / name) for name in published_files(folder)]
    api = HfApi()
    try:
        if "/" in repo_id:
            _wait_for_answer(api, repo_id, token)
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, token=token, revision=revision, create_pr=create_pr
        )
    except (HTTPError, OSError) as error:
        retry = f"push_to_hub({json.dumps(str(folder))}, {json.dumps(repo_id)})"
        raise HubError(
            f"Pushing to `{repo_id}` failed: {explain(error)}. The model in `{folder}` is whole. To retry: "
            f"`from hnml_hf import push_to_hub; {retry}`."
        ) from error


def create_repo(repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Make sure that a repository is there, private if it is new. Returns its full name.

    Raises:
        ValueError: a name that is not valid.
        HubError: the Hub refused, failed or did not answer.
    """
    check_repo_id(repo_id)
    api = HfApi()
    try:
        if "/" in repo_id:
            _wait_for_answer(api, repo_id, token)
        return api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    except (HTTPError, OSError) as error:
        raise HubError(
            f"No repository `{repo_id}` to push to: {explain(error)}. Nothing was trained yet; correct this, "
            "or train without `--push_to_hub` and push the folder afterwards."
        ) from error


def _wait_for_answer(api: HfApi, repo_id: str, token):
    """Other requests of the client wait for ever; this one does not."""
    try:
        api.repo_info(repo_id, token=token, timeout=ANSWER_WITHIN)
    except RepositoryNotFoundError:
        pass  # new, or hidden from this token: creating it will tell


def download_weights(repo_id: str) -> Path:
    """The safetensors file of a repository, in the Hub's cache.

    Raises:
        HubError: it is not in the cache, and the Hub refused, failed or did not answer; or there is no such file.
    """
    try:
        return Path(hf_hub_download(repo_id, "model.safetensors"))
    except (HTTPError, OSError) as error:
        raise HubError(
            f"Pretrained weights `{repo_id}` are not in the cache and did not come: {explain(error, 'read')}. "
            "Without the Hub, give a safetensors file of this backbone (`--weights FILE`), or start from random "
            "weights (`--pretrained false`)."
        ) from error


def explain(error: Exception, intent: str = "write") -> str:
    """What an error of the Hub's client means to one who wanted to `read` or to `write`, in one clause."""
    if isinstance(error, LocalTokenNotFoundError):
        return REASONS[401]
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # what the Hub answered, before the cache was tried
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reason = (REASONS | {403: FORBIDDEN[intent]}).get(
            status, "the Hub has a problem of its own; try again later" if status >= 500 else str(error)
        )
        said = f" (it says: {error.server_message})" if error.server_message else ""
        return f"{status}, {reason}{said}"
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"no answer from {os.environ.get('HF_ENDPOINT', 'the Hub')} ({type(error).__name__}: {first_line})"
