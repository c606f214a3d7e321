"""Files and folders that are complete or not there, and arrays in files whose place on the disk is theirs."""

import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout


FOLDER_LOCK = "_writing.lock"


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """The name under which to write a file; it replaces `path` once it is written, and not before.

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


def folder_above(path: str | os.PathLike) -> Path:
    """The nearest folder above a path that is there."""
    return next(folder for folder in Path(os.path.realpath(path)).parents if os.path.lexists(folder))


def check_new_folder(path: str | os.PathLike):
    """Raise `OSError` where [`new_folder`] would not write a folder: what a dry run can know beforehand.

    Raises:
        FileExistsError: if `path` is there and not empty, or is in use as the current folder or as a mount.
        OSError: if no folder can be made there.
    """
    place = Path(os.path.realpath(path))
    if os.path.lexists(place):
        if not place.is_dir() or any(place.iterdir()):
            raise FileExistsError(f"{path} is there already: name a new folder.")
        if os.path.ismount(place) or place == Path.cwd():
            raise FileExistsError(f"{path} is in use, as a mount or the current folder: name a new folder in it.")
    try:  # permissions alone do not tell: those of the root of a system, of a read-only one, of /proc
        os.rmdir(tempfile.mkdtemp(dir=folder_above(place)))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """The name under which to write a folder; it becomes `path` once it is complete, and an error leaves nothing.

    One process at a time writes it: the operating system lets go of the lock when that one ends, however it ends, and
    what it left behind is deleted by the next.

    Raises:
        FileExistsError: if another process is writing `path`.
        OSError: as [`check_new_folder`] does.
    """
    check_new_folder(path)
    place = Path(os.path.realpath(path))
    above, unfinished = folder_above(place), place.with_name(f"{place.name}.part")
    if os.path.islink(unfinished):
        unfinished.unlink()
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = FileLock(unfinished / FOLDER_LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"Another process is writing {path}: wait for it, or name another folder.") from None
    try:
        for left_over in unfinished.iterdir():
            if left_over.is_dir() and not left_over.is_symlink():
                shutil.rmtree(left_over)
            elif left_over.name != FOLDER_LOCK:
                left_over.unlink()
        check_new_folder(path)  # nobody has written it meanwhile
        yield unfinished
        (unfinished / FOLDER_LOCK).unlink()
        if place.is_dir():
            place.rmdir()
        unfinished.rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in unfinished.parents:  # made for it, and empty after an error
            if folder == above or any(folder.iterdir()):
                break
            folder.rmdir()
        lock.release()


def mapped_array(shape: tuple[int, ...], dtype, folder: str | os.PathLike | None = None) -> np.ndarray:
    """An array of zeros in a memory-mapped file without a name, which vanishes with the process.

    The disk's space is reserved first: where it runs out under a mapping, the process is killed (SIGBUS).

    Args:
        shape, dtype: of the array.
        folder (`str`, *optional*): of the file; default: the system's place for temporary files.

    Raises:
        OSError: if there is no such space.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile(dir=None if folder is None else os.fspath(folder)) as file:  # the mapping outlives it
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            else:
                for start in range(0, size, 2**20):
                    file.write(bytes(min(2**20, size - start)))
                file.flush()
        except OSError as error:
            place = tempfile.gettempdir() if folder is None else os.fspath(folder)
            raise OSError(
                error.errno,
                f"{size / 2**20:,.1f} MiB for what training keeps of each sample could not be reserved in {place} "
                f"({error.strerror}); make room there, or choose another place",
            ) from error
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
