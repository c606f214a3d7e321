"""The C library's memory: kept for the next step of a training on a CPU, instead of being given back and asked for."""

import ctypes
import os
import sys


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep what is freed until the process ends.

    glibc gives an array of more than 32 MiB back to the system when it is freed, and the system fills it with zeros,
    page by page, when the next one is asked for. Activations of a batch of photographs are that large. The peak grows
    by up to a quarter (docs/cost.md). For a process that does one thing, as a training does: a long-lived one that
    needs much memory once would hold it.

    Returns:
        `bool`: whether it was done: only glibc is told, and not where its settings were given in the environment.
    """
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or told:
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # another C library
        return False
    return bool(library.mallopt(M_TRIM_THRESHOLD, NEVER)) and bool(library.mallopt(M_MMAP_MAX, 0))
