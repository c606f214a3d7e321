"""Files that are whole or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """The name under which to write a file; it takes the place of `path` once it is written, and not before.

    So nobody finds half a file, and a failure or a kill in between leaves the one that was there. The name is no other
    writer's, so that of two who write one file at a time the last one wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # some writers choose the format by the ending
    unfinished = path.with_name(f"{path.stem}.part-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # half a file must not fill the disk
