"""Python's garbage collector and what is imported: millions of objects that stay, among which it finds nothing."""

import atexit
import gc


def end_of_imports():
    """Let the collector, which `gc.disable()` has stopped before the imports, work again, on what comes from here on.

    To search what is imported, again and again while it grows, takes a fifth of the time of the imports.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # at the end all is let go of, or extension modules complain about what is left
    gc.enable()
