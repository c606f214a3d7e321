"""huggingface_hub's client, with errors that say what to do; its settings (`HF_ENDPOINT`, `HF_TOKEN`,
`HF_HUB_OFFLINE`) apply. The Hub is reached from here alone."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..common.answers import without_retries


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


def upload_files(
    folder: str | os.PathLike,
    names: Sequence[str],
    repo_id: str,
    *,
    private: bool = True,
    token: str | bool | None = None,
    **commit,
) -> CommitInfo:
    """Upload some files of a folder in one commit; other arguments, result and errors as of [`~hnml_hf.push_to_hub`].

    Args:
        names (`Sequence[str]`): of the files.
        commit: `revision`, `create_pr` and `commit_message`.
    """
    check_repo_id(repo_id)
    commit = {"revision": None, "create_pr": False, "commit_message": "Upload model", **commit}
    operations = [CommitOperationAdd(name, Path(folder, name)) for name in names]
    api = HfApi()
    try:
        if "/" in repo_id:
            _wait_for_answer(api, repo_id, token)
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if commit["revision"] and not commit["create_pr"]:
            api.create_branch(repo_id, branch=commit["revision"], token=token, exist_ok=True)
        return api.create_commit(repo_id, operations, token=token, **commit)
    except (HTTPError, OSError) as error:
        retry = f"push_to_hub({json.dumps(str(folder))}, {json.dumps(repo_id)})"
        raise HubError(
            f"Pushing to `{repo_id}` failed: {explain(error)}. The model in `{folder}` is complete. To retry: "
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
        with without_retries(repo_id, "model"):
            return Path(hf_hub_download(repo_id, "model.safetensors"))
    except (HTTPError, OSError) as error:
        raise HubError(
            f"Pretrained weights `{repo_id}` are not in the cache and cannot be downloaded: {explain(error, 'read')}. "
            "Without the Hub, give a safetensors file of this backbone: `--pretrained FILE`."
        ) from error


def explain(error: Exception, intent: str = "write") -> str:
    """What an error of the Hub's client means to one who wanted to `read` or to `write`, in one clause."""
    hub = os.environ.get("HF_ENDPOINT", "the Hub")
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
    if isinstance(error, LocalEntryNotFoundError):  # whose own text is long and says no more
        return "`HF_HUB_OFFLINE` is set" if constants.HF_HUB_OFFLINE else f"no answer from {hub}"
    first_line = (str(error).strip().splitlines() or [""])[0]
    return f"no answer from {hub} ({type(error).__name__}: {first_line})"
