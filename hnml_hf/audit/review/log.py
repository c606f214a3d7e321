"""The file that keeps annotations: JSON lines that are only ever appended, on the disk before they count as made."""

import json
import logging
import os
import threading
from collections.abc import Container, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from filelock import FileLock

from ...common.atomic import atomic_write
from .annotations import FORMAT, MEND_LINE, LogError, check_entry, check_format, parse_log


LOG_FILE = "annotations.jsonl"
TAIL = 256  # bytes of the end of a log that tell whether it was edited

logger = logging.getLogger(__name__)


class OtherDatasetError(ValueError):
    """An annotation log of another dataset than the one that was scored."""


class AnnotationLog:
    """Annotations of several people in one file that several servers may append to at once.

    A line is an annotator's word on a sample; the latest counts, and `null` takes it back. A batch of lines is written
    by one call and flushed to the disk before [`append`] returns, so that what a browser was told is kept is kept.

    Args:
        path (`str` or `Path`): of the file; made if it is not there.
        fingerprint (`str`): of the dataset that was scored; annotations of another one are refused.
        root (`str`): the folder that the paths of the images are relative to.
        known (`Container[int]`, *optional*): the sample ids of the audit; a line about another one is refused.

    Raises:
        OtherDatasetError: if the file is of another dataset.
        LogError: if it is no annotation log, or has a line that is no annotation of a known sample: naming file and
            line. Nothing of what was appended with it counts before it is corrected, and all of it after.
        OSError: if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: str, root: str = "", known: Container[int] | None = None):
        self.path, self.fingerprint, self.known = Path(path), fingerprint, known
        self.header = _header(fingerprint, root)
        self.entries: dict[tuple[int, str], dict] = {}
        self.version = 0  # lines read or written
        self._batches: dict[str, list[tuple[tuple[int, str], dict]]] = {}  # what they found, by what they changed
        self._last: dict[tuple[int, str], dict] = {}  # also of samples that are undecided again
        self._undone: set[str] = set()
        self._offset, self._lines, self._torn = 0, 0, False
        self._status: os.stat_result | None = None  # of the file, and its end, as they were last seen
        self._tail = b""
        self._thread = threading.RLock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._process = FileLock(f"{self.path}.lock")
        with self._thread, self._process:
            self._read_new()
            if not self._lines:
                self._write([self.header])

    def append(self, entries: Iterable[dict], annotator: str, batch: str | None = None) -> list[dict]:
        """Keep annotations, and return once they are on the disk.

        Args:
            entries (`Iterable[dict]`): with `index` and `annotation` (wrong, right, unsure, or `None` to take back).
            annotator (`str`): who says so.
            batch (`str`, *optional*): a name by which [`undo`] finds them; one that was kept already is not kept
                twice, so that a browser may send again what it got no answer to.

        Returns:
            `list[dict]`: what changed since the last call: the lines of others, and these.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        batch = batch or uuid4().hex
        lines = [{**entry, "annotator": annotator, "time": now, "batch": batch} for entry in entries]
        with self._thread, self._process:
            changed = self._read_new()
            kept = {key for key, _ in self._batches.get(batch, ())}  # not all of it after a crash or on a full disk
            lines = [line for line in lines if _key(line) not in kept]
            if lines:
                self._write(lines)
            return changed + lines

    def undo(self, batch: str) -> list[dict]:
        """Put back what a batch has changed, except for what was said since; returns the lines that changed.

        Raises:
            KeyError: if there is no such batch.
        """
        with self._thread, self._process:
            changed = self._read_new()
            now, lines = datetime.now(timezone.utc).isoformat(timespec="milliseconds"), []
            for key, before in reversed(self._batches[batch]):
                if self._last[key].get("batch") == batch:
                    lines.append({**before, "time": now, "undoes": batch})
            if batch not in self._undone:
                self._write(lines)
                changed += lines
            return changed

    def refresh(self) -> list[dict]:
        """Lines that others have appended since the last call."""
        try:
            same = self._status is not None and _stamp(os.stat(self.path)) == _stamp(self._status)
        except FileNotFoundError:
            same = False
        if same:
            return []
        with self._thread, self._process:
            return self._read_new()

    def rows(self) -> Iterator[dict]:
        """What holds now, by sample and annotator."""
        with self._thread:
            entries = sorted(self.entries.items())
        yield from (entry for _, entry in entries)

    def _read_new(self) -> list[dict]:
        """Take in what was appended by others, or the whole of a file that was edited, or has taken the place of the
        one before. Both locks are held, so that nobody is in the middle of a line. All lines are checked before the
        first is taken."""
        start, lines = self._offset, self._lines
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                anew = self._is_another(file, status)
                if anew:
                    start, lines = 0, 0
                file.seek(start)
                content = file.read()
        except FileNotFoundError:
            self._rescue()
            return []
        if status.st_size < start:
            self._rescue()
            return []
        found = []
        for number, entry in parse_log(content, self.path, start=lines + 1):
            if number == 1:
                self._check_header(entry)
            else:
                self._check(entry, number)
                found.append(entry)
        gone = set()
        if anew:
            gone = self.entries.keys() - {_key(entry) for entry in found}
            self.entries, self._batches, self._last, self._undone = {}, {}, {}, set()
        for entry in found:
            self._take(entry)
        self._status, self._tail = status, ((b"" if anew else self._tail) + content)[-TAIL:]
        self._lines = lines + content.count(b"\n")
        self._offset = start + len(content)
        if content:
            self._torn = not content.endswith(b"\n")
        return [_undecided(key) for key in sorted(gone)] + found

    def _is_another(self, file: BinaryIO, status: os.stat_result) -> bool:
        """Whether a file is not the one that was read so far, whatever was appended to that."""
        known = self._status
        if known is None or not status.st_size:
            return False
        if not os.path.samestat(known, status):
            return True
        if status.st_size < self._offset:
            return False
        file.seek(self._offset - len(self._tail))
        edited = status.st_size == self._offset and status.st_mtime_ns != known.st_mtime_ns
        return edited or file.read(len(self._tail)) != self._tail

    def _check(self, entry: dict, number: int):
        where = f"{self.path}:{number}"
        check_entry(entry, where)
        if self.known is not None and entry["index"] not in self.known:
            raise LogError(
                f"{where}: sample {entry['index']} is not in this audit. {MEND_LINE} A whole log of another audit is "
                "taken in by `hnml review RUN --import FILE`."
            )

    def _check_header(self, header: dict):
        check_format(header, self.path)
        if header.get("dataset_fingerprint") != self.fingerprint:
            raise OtherDatasetError(
                f"{self.path} holds annotations of another dataset ({header.get('dataset_fingerprint')}; scored was "
                f"{self.fingerprint}): the labels have changed since. Move the file away to begin anew; it is not "
                "touched."
            )

    def _rescue(self):
        """Somebody has cut or deleted the file while it was in use: what is known is written again."""
        if self._offset:
            logger.warning("%s was cut or deleted while it was in use; what was kept is written again.", self.path)
        self._offset = self._lines = 0
        self._torn, self._tail = False, b""
        known = list(self.entries.values())
        open(self.path, "wb").close()
        if known:
            self._write([self.header, *known])

    def _write(self, lines: list[dict]):
        content = _content(lines)
        with open(self.path, "ab") as file:
            file.write(b"\n" * self._torn + content)
            file.flush()
            os.fsync(file.fileno())
            self._status = os.fstat(file.fileno())
        self._tail = (self._tail + b"\n" * self._torn + content)[-TAIL:]
        self._offset += self._torn + len(content)
        self._lines += self._torn + len(lines)
        self._torn = False
        for line in lines:
            if line is not self.header:
                self._take(line)

    def _take(self, entry: dict):
        key = _key(entry)
        before = self._last.get(key) or _undecided(key)
        self._last[key] = entry
        if "undoes" in entry:
            self._undone.add(entry["undoes"])
        elif before is not entry:
            self._batches.setdefault(str(entry.get("batch")), []).append((key, before))
        if entry["annotation"] is None:
            self.entries.pop(key, None)
        else:
            self.entries[key] = entry
        self.version += 1


def write_log(path: str | os.PathLike, fingerprint: str, root: str, lines: Iterable[dict]):
    """Write a log that holds some lines already, instead of the one that is there; arguments as of
    [`AnnotationLog`], whose lock the caller has."""
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        file.write(_content([_header(fingerprint, root), *lines]))
        file.flush()
        os.fsync(file.fileno())


def _header(fingerprint: str, root: str) -> dict:
    return {"format": FORMAT, "dataset_fingerprint": fingerprint, "root": root}


def _key(entry: dict) -> tuple[int, str]:
    return entry["index"], entry["annotator"]


def _undecided(key: tuple[int, str]) -> dict:
    return {"index": key[0], "annotator": key[1], "annotation": None}


def _content(lines: Iterable[dict]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes where a file does."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
