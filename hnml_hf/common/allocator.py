"""Memory of the C library, kept for the next step of a training on a CPU instead of being given back."""

import ctypes
import os
import sys


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
KEPT = 2**31 - 1  # bytes at the end of the heap: more than a step of most trainings frees, and no more than that


def keep_freed_memory() -> bool:
    """Keep up to 2 GiB of what is freed at the end of the heap, and all that is freed before it.

    glibc gives an array of more than 32 MiB back to the system when it is freed, and the system fills it with zeros,
    page by page, when the next one is asked for. Activations of a batch of photographs are that large. The peak grows
    by up to a third (docs/cost.md). For a process that does one thing, as a training does: a long-lived one that
    needs much memory once would hold it.

    Returns:
        `bool`: false if the C library is not glibc, or if the environment already sets its memory options.
    """
    told = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or told:
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # another C library
        return False
    return bool(library.mallopt(M_TRIM_THRESHOLD, KEPT)) and bool(library.mallopt(M_MMAP_MAX, 0))
