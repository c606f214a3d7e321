"""Whether the Hub answers, asked once."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError


SECONDS = 10  # after which a Hub that says nothing counts as not there


@contextmanager
def without_retries(repo_id: str, repo_type: str) -> Iterator[None]:
    """Offline mode inside, if the Hub does not answer a first question: what the cache has is found, and nothing is
    asked for again and again, with a line each.

    Args:
        repo_id (`str`): what is going to be loaded.
        repo_type (`str`): `model` or `dataset`.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        if not offline:
            HfApi().repo_info(repo_id, repo_type=repo_type, timeout=SECONDS)
    except HfHubHTTPError:
        pass  # an answer; the loader gets it as well, and says what it means
    except (HTTPError, OSError):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
