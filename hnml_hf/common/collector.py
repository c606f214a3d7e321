"""Python's garbage collector and what is imported: millions of objects that stay until the process ends.

To search them for garbage again and again while they grow in number takes a fifth of the time of the imports, and to
take them apart at the end as long again as the imports of a short command.
"""

import atexit
import gc
import os
import sys


def start_of_imports():
    """Call it before heavy imports, and [`end_of_imports`] after them."""
    atexit.register(_end_quietly)  # the first one to be registered is the last one to be called
    gc.disable()


def end_of_imports():
    """From here on the collector works again, on what is new; the rest goes when the process is gone."""
    gc.freeze()
    gc.enable()


def _end_quietly():
    """Extension modules would print that objects of theirs are still there; all that had to be said has been."""
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
