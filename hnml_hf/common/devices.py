"""Where to compute, checked before anything that takes long."""

import textwrap

import torch


def why_unusable(device: torch.device | str) -> str | None:
    """Why nothing can be computed on the device of this name, in one line; None if it can."""
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        return textwrap.shorten(str(error).splitlines()[0], 200)
    return None


def usable_device(device: torch.device | str | None = None) -> torch.device:
    """The device of this name; by default a GPU if there is one.

    Raises:
        ValueError: if nothing can be computed on it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := why_unusable(device):
        raise ValueError(f"`device={str(device)!r}` cannot be used here: {reason}")
    return torch.device(device)
