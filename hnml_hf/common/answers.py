"""Whether the Hub answers, asked once."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError


SECONDS = 10  # after which a Hub that says nothing counts as not there


@contextmanager
def without_retries(repo_id: str, repo_type: str) -> Iterator[None]:
    """Offline mode inside, if the Hub does not answer a first question: what the cache has is found, and nothing is
    asked for again and again, with a line each.

    Args:
        repo_id (`str`): what is going to be loaded.
        repo_type (`str`): `model` or `dataset`.
    """
    offline, out_of_order = constants.HF_HUB_OFFLINE, None
    try:
        if not offline:
            HfApi().repo_info(repo_id, repo_type=repo_type, timeout=SECONDS)
    except HfHubHTTPError as error:
        # an answer, which the loader gets as well and explains; but a Hub with a fault is asked again and again
        if error.response.status_code >= 500:
            constants.HF_HUB_OFFLINE, out_of_order = True, error
    except (HTTPError, OSError):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    except LocalEntryNotFoundError as error:
        error.__cause__ = out_of_order or error.__cause__
        raise
    finally:
        constants.HF_HUB_OFFLINE = offline
