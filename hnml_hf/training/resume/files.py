"""Checkpoints that are complete or not there, and one run per output folder.

A checkpoint is written in a folder of its own, listed with sizes and hashes in a manifest, flushed to the disk and
only then renamed to `checkpoint-<step>`. Whatever ends the process in between, no folder of that name is incomplete.
"""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
CONFIGURATION = ("fixed_configuration", "changeable_configuration")
UNFINISHED_FOLDER = "_unfinished"  # nothing in it counts as a checkpoint, here or in transformers
LOCK_FILE = "_run.lock"
NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# what a killed run may have left incomplete, below an output folder
LEFT_OVER = (
    *(UNFINISHED_FOLDER, "_saving-*", "last/_saving-*", "_push-*"),
    *(f"*.part-{'?' * 32}*", f"_audit/*.part-{'?' * 32}*"),
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is incomplete. Those written before are as they were.

    Example:

        try:
            trainer.train(resume_from_checkpoint=True)
        except CheckpointError as error:
            print(error)  # which file is missing or damaged, and what to do
    """


# -- writing ----------------------------------------------------------------------------------------------------------


def seal(folder: str | os.PathLike, fixed: Mapping, changeable: Mapping, *, order: int = 0):
    """List all files of a folder in its manifest, and flush all of it to the disk.

    The `fixed` and the `changeable` configuration of the run are for [`require_same_run`]; `order` counts the
    checkpoints that were written to one output folder, whatever their steps.
    """
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    listed = {name: {"bytes": path.stat().st_size, "blake2b": _digest(path)} for name, path in files.items()}
    manifest = folder / MANIFEST
    content = {
        "order": order,
        **dict(zip(CONFIGURATION, (dict(fixed), dict(changeable)), strict=True)),
        "files": listed,
    }
    content = json.loads(json.dumps(content))  # tuples become lists, as they will be read
    signed = {"blake2b": _content_digest(content), "content": content}
    manifest.write_text(json.dumps(signed, indent=1) + "\n", encoding="utf-8")
    for path in (*files.values(), manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(path)


def publish(unfinished: str | os.PathLike, checkpoint: str | os.PathLike):
    """Give a sealed folder its name; a checkpoint that had it, of a run that went another way, is replaced."""
    unfinished, checkpoint = Path(unfinished), Path(checkpoint)
    replaced = unfinished.with_name(f"{checkpoint.name}-replaced")
    if os.path.lexists(checkpoint):
        checkpoint.rename(replaced)
    unfinished.rename(checkpoint)
    _flush(checkpoint.parent)
    remove(replaced)


def remove(path: Path):
    """Delete a folder, a file or a link (not what it leads to), if it is there; a failure is a warning."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning(f"`{path}` is no longer needed but could not be deleted: {error}.")


def _content_digest(content: Mapping) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ----------------------------------------------------------------------------------------------------------


def check(checkpoint: str | os.PathLike) -> dict:
    """Return the fixed configuration of a checkpoint if each of its files is what was written.

    Raises:
        CheckpointError: naming the file that is missing, cut off or changed.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        raise CheckpointError(f"The checkpoint `{checkpoint}` is not there. Was it moved or deleted?")
    manifest = _manifest(checkpoint)
    for name, listed in manifest["files"].items():
        path = checkpoint / name
        size = path.stat().st_size if path.is_file() else None
        if size != listed["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"`{checkpoint}` is an incomplete checkpoint: `{name}` {found}, {listed['bytes']} were written."
            )
        try:
            digest = _digest(path)
        except OSError as error:
            raise CheckpointError(
                f"`{checkpoint}` is an incomplete checkpoint: `{name}` cannot be read: {error}."
            ) from error
        if digest != listed["blake2b"]:
            raise CheckpointError(f"`{checkpoint}` is an incomplete checkpoint: the bytes of `{name}` have changed.")
    return manifest["fixed_configuration"]


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The folders in an output folder that have the name of a checkpoint, complete or not, the last written one first.

    The last written one need not have the highest step: a run may have gone back. Those without a manifest come first.
    """
    folder = Path(output_dir)
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    orders = {path: _order(path) for path in found}
    return sorted(found, key=lambda path: (orders[path], int(path.name.rpartition("-")[2])), reverse=True)


def _order(checkpoint: Path) -> float:
    try:
        return _manifest(checkpoint)["order"]
    except CheckpointError:
        return math.inf


def next_order(output_dir: str | os.PathLike) -> int:
    """For the next checkpoint of an output folder."""
    orders = map(_order, checkpoints(output_dir))
    return 1 + max((int(order) for order in orders if order < math.inf), default=0)


def rotate(output_dir: str | os.PathLike, *, keep: int | None, protected: Collection[str | os.PathLike | None]):
    """Delete checkpoints that are incomplete, then the ones written first, until `keep` are left (None or 0 = all).

    Those in `protected` stay. transformers goes by modification times, and by steps where these are close; after a run
    went back, it would delete what was just written.
    """
    if not keep:
        return
    there = checkpoints(output_dir)
    incomplete = [path for path in there if _order(path) == math.inf]
    stay = {os.path.abspath(path) for path in protected if path}
    disposable = [
        path
        for path in incomplete + [path for path in reversed(there) if path not in incomplete]
        if str(path.absolute()) not in stay
    ]
    for path in disposable[: max(len(there) - keep, 0)]:
        remove(path)


def newest_complete(output_dir: str | os.PathLike) -> Path | None:
    """The newest checkpoint that is complete; each incomplete one above it is named in the log."""
    for checkpoint in checkpoints(output_dir):
        try:
            check(checkpoint)
        except CheckpointError as error:
            logger.warning(f"{error} The one before it is used.")
            continue
        return checkpoint
    return None


# the words of YAML; a folder of such a name is reached as `./no`
SWITCH = {"true": True, "yes": True, "on": True, "false": None, "no": None, "off": None}


def resolve(resume_from_checkpoint: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The checkpoint that a run goes on from.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint; `True` or `"true"` for the newest complete
            one of the output folder, which must exist; `"auto"` for that one if there is one, else a start from
            nothing.
        output_dir (`str` or `os.PathLike`): the folder of the run.

    Raises:
        CheckpointError: if the one that was asked for is not there or incomplete.
    """
    wanted = SWITCH.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
    if wanted is None or wanted is True or wanted == "auto":
        newest = newest_complete(output_dir) if wanted else None
        if wanted is True and newest is None:
            raise CheckpointError(
                f"`{output_dir}` holds no complete checkpoint to resume from. Give the `--output_dir` of the run that "
                "was interrupted, or start from nothing without `--resume_from_checkpoint`."
            )
        if wanted == "auto" and newest is None:
            logger.warning(f"`{output_dir}` holds no complete checkpoint; training starts from nothing.")
        return None if newest is None else str(newest)
    wanted = str(wanted)
    try:
        check(wanted)
    except CheckpointError as error:
        newest = newest_complete(Path(wanted).parent)
        there = f"The newest complete one there is `{newest}`." if newest else "There is no complete one beside it."
        raise CheckpointError(f"{error} {there}") from error
    return str(wanted)


def require_same_run(checkpoint: str | os.PathLike, fixed: Mapping, changeable: Mapping):
    """Compare a run with the one that wrote a checkpoint.

    Args:
        checkpoint (`str` or `os.PathLike`): a complete one.
        fixed (`Mapping`): what the saved state is made of or belongs to, by name; JSON values.
        changeable (`Mapping`): what may be changed; each change is named in one warning.

    Raises:
        ValueError: naming what is not the same of the fixed configuration: the run could not go on exactly.
    """
    changed = _changes(_manifest(checkpoint)["fixed_configuration"], fixed)
    if changed:
        raise ValueError(
            f"`{checkpoint}` cannot be resumed exactly: {changed}. Batches, random draws, what is averaged over them "
            "or the optimizer's state would be others than those of one uninterrupted run. Resume as it was started, "
            f"or start a new run from its weights: `--pretrained {checkpoint}/model.safetensors`."
        )
    changed = _changes(_manifest(checkpoint)["changeable_configuration"], changeable)
    if changed:
        logger.warning(
            f"`{checkpoint}` is resumed with other options: {changed}. The run ends neither as it would have ended "
            "nor as one of the new options alone."
        )


def changeable_configuration(checkpoint: str | os.PathLike) -> dict:
    """The one that a complete checkpoint was written with."""
    return _manifest(checkpoint)["changeable_configuration"]


def _manifest(checkpoint: str | os.PathLike) -> dict:
    """`order`, both configurations and `files`, as they were written. Raises [`CheckpointError`] if they are not."""
    unreadable = f"`{checkpoint}` is an incomplete checkpoint: "
    try:
        if not Path(checkpoint, MANIFEST).is_file():  # a pipe would be waited for
            raise OSError(f"`{MANIFEST}` is no regular file")
        signed = json.loads(Path(checkpoint, MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{unreadable}it has no readable `{MANIFEST}`, which is written last.") from error
    earlier = (
        f" If an earlier version of this package wrote it, resume with that version, or start a new run from its "
        f"weights: `--pretrained {checkpoint}/model.safetensors`."
    )
    if not isinstance(signed, dict) or signed.get("blake2b") != _content_digest(signed.get("content", {})):
        has_none = isinstance(signed, dict) and {"order", "files"} <= signed.keys()
        wrong = (
            f"its `{MANIFEST}` has no digest of itself.{earlier}"
            if has_none
            else f"the bytes of `{MANIFEST}` have changed."
        )
        raise CheckpointError(f"{unreadable}{wrong}")
    if not {*CONFIGURATION} <= signed["content"].keys():
        raise CheckpointError(f"{unreadable}its `{MANIFEST}` has no {CONFIGURATION[0]}.{earlier}")
    return signed["content"]


def _changes(stored: Mapping, wanted: Mapping) -> str:
    wanted = json.loads(json.dumps(wanted))  # as they were stored: tuples become lists
    pairs = {name: (stored.get(name), wanted.get(name)) for name in {**stored, **wanted}}
    return ", ".join(f"`{name}` was {before} and is {now}" for name, (before, now) in pairs.items() if before != now)


# -- the output folder ------------------------------------------------------------------------------------------------


def require_writable(output_dir: str | os.PathLike):
    """Make the output folder. Raises `ValueError` if nothing can be written there."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(output_dir)) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` cannot be written to: {error.strerror}. Give a folder of yours, on a "
            "disk with space."
        ) from error


@contextmanager
def run_lock(output_dir: str | os.PathLike):
    """Keep the output folder for one run. The operating system lets go of it when the process ends, however it ends.

    Who has it already may take it again, as training does within a script. What a killed run left incomplete there
    is deleted.

    Raises:
        CheckpointError: if another run has it, naming that one's host and process.
        ValueError: if nothing can be written there.
    """
    require_writable(output_dir)
    path = Path(output_dir, LOCK_FILE)
    lock = FileLock(path, is_singleton=True)
    outermost = not lock.is_locked
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise CheckpointError(
            f"`{path}` is no regular file, so that `{output_dir}` cannot be kept for one run: delete it, or give "
            "another folder."
        )
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = path.read_text(encoding="utf-8", errors="replace").strip() or "just started"
        raise CheckpointError(
            f"Another run is writing to `{output_dir}` ({holder}). Wait for it, end it, or give another folder."
        ) from error
    try:
        if outermost:
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            for left_over in [found for pattern in LEFT_OVER for found in Path(output_dir).glob(pattern)]:
                remove(left_over)
        yield
    finally:
        lock.release()
