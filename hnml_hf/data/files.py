"""List files and folders: readers that check what they read and name file and line of what is wrong."""

import os
import re
import stat
import tarfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL.Image


# formats that Pillow names but does not decode by itself
UNDECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
SHOWN = 5  # how many offending keys an error lists
MOST_WAYS = 10_000  # by which links may lead to one folder


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """Yield `(line number, text)` of a UTF-8 list file, without line end and byte-order mark.

    Lines end at LF or CRLF only: `str.splitlines` would also cut at characters that may be part of a file name. Blank
    lines at the end of the file are dropped, a blank line elsewhere is an error.
    """
    blank = None
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            if not raw.strip():
                blank = blank or number
                continue
            if blank:
                raise ValueError(f"{path}:{blank}: blank line inside the list; remove it.")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason}): {raw[:80]!r}.") from None


def is_plain(text: str) -> bool:
    """Whether a text has no control characters and can be written as UTF-8."""
    return not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text)


def parse_path(text: str, path: str | os.PathLike, number: int) -> str:
    """Check a file name of a list: relative, inside the data folder, without control characters."""
    climbs = ".." in text and ".." in re.split(r"[/\\]", text)
    if not text or text[0] in "/\\" or text[1:2] == ":" or climbs:
        raise ValueError(
            f"{path}:{number}: the path {text[:200]!r} is not a relative path inside the data folder; "
            "absolute paths and `..` are refused."
        )
    if not is_plain(text):
        raise ValueError(f"{path}:{number}: control character in the path {text[:200]!r}.")
    if text.endswith(("/", "\\", "/.")) or text == ".":
        raise ValueError(f"{path}:{number}: the path {text[:200]!r} names no file.")
    return text


def table_path(text: str, root: str, path: str | os.PathLike, number: int, column: Sequence[str | None] = ()) -> str:
    """The path of an image as a table writes it, relative to `root`: below it, with slashes or with backslashes.

    Args:
        text (`str`): as it is in the table.
        root (`str`): where paths start.
        path, number: file and line.
        column (`Sequence[str]`): all paths of the table, to advise a folder above them.

    Raises:
        ValueError: naming file and line, for a path that leads out of `root`, or names no file.
    """
    if re.match(r"\w{2,}://", text):
        raise ValueError(f"{path}:{number}: the path {text[:200]!r} is remote. Download the images first.")
    within = root.rstrip("/") + "/"
    text = text.removeprefix(within).lstrip("/") if text.startswith(within) else text
    if "\\" in text and not os.path.lexists(os.path.join(root, text)):  # a name may have one, except on Windows
        text = text.replace("\\", "/")
    if text.startswith("/") or text[1:2] == ":":
        named = [] if root == os.path.dirname(path) else [f"{root}/"]  # by the user, for the images of other tables
        above = folder_above_all([text, *(other for other in column if other), *named])
        if text[1:2] == ":":
            advice = "Write it relative to that folder."
        elif above is None:
            advice = "Other paths are relative: write all in full, or all relative to one folder (`data_dir`)."
        else:
            advice = f"Name a folder above all images by `data_dir`, as `--data_dir {above[:200]}`."
        raise ValueError(
            f"{path}:{number}: the path {text[:200]!r} is not a relative path inside the data folder {root}: it is "
            f"absolute, and lies elsewhere. {advice}"
        )
    return parse_path(text, path, number)


def folder_above_all(paths: Iterable[str]) -> str | None:
    """The deepest folder above all of these absolute paths; None if one is relative, or none of this system."""
    folders = {os.path.dirname(path) for path in paths}
    return os.path.commonpath(folders) if all(folder.startswith("/") for folder in folders) else None


def as_name(text: str) -> str:
    """A name without blanks around it, accents composed (NFC): how texts are compared that look the same."""
    text = text.strip()
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def as_on_disk(root: str, names: Sequence[str]) -> list[str]:
    """File names relative to `root` as the disk spells them: archives from macOS have accents decomposed (NFD)."""

    @cache
    def listing(folder: str) -> dict[str, str]:
        return {as_name(name): name for name in os.listdir(folder)} if os.path.isdir(folder) else {}

    def spelled(name: str) -> str:
        if name.isascii() or os.path.lexists(f"{root}/{name}"):
            return name
        found = ""
        for part in name.split("/"):
            there = os.path.lexists(f"{root}/{found}{part}")
            found += (part if there else listing(f"{root}/{found}").get(as_name(part), part)) + "/"
        return found[:-1]

    return [spelled(name) for name in names]


def parse_integer(text: str, path: str | os.PathLike, number: int, what: str, low: int, high: int) -> int:
    """Parse plain decimal digits; `low <= value < high`, else a `ValueError` with file and line."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise ValueError(f"{path}:{number}: {what} must be an integer, got {text[:80]!r}.")
    value = int(text)
    if not low <= value < high:
        raise ValueError(f"{path}:{number}: {what} {value} is out of range, expected {low}..{high - 1}.")
    return value


def parse_keyed_label(
    line: str, path: str | os.PathLike, number: int, num_classes: int, *, allow_missing: bool = False
) -> tuple[str, int | None]:
    """Parse `<file name> <label>`, split at the last blank (names may hold commas and blanks).

    Returns:
        `tuple`: the checked file name and the label, `None` for a line that ends after the name if `allow_missing`.
    """
    key, blank, label = line.rpartition(" ")
    if not blank or not label:
        if not allow_missing:
            raise ValueError(f"{path}:{number}: no label after the file name in {line[:200]!r}.")
        return parse_path(line.rstrip(" "), path, number), None
    return parse_path(key, path, number), parse_integer(label, path, number, "label", 0, num_classes)


def first_few(items: Iterable[object]) -> str:
    """The first few offenders of an error message."""
    items = list(items)
    return ", ".join(str(item) for item in items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")


def missing_files(root: str, names: Sequence[str]) -> np.ndarray:
    """Which of `names` (relative to `root`, or absolute) are no files, as a boolean array of shape `(len(names),)`.

    Each folder is listed once instead of asking for each file: a million names cost a thousand folder listings.
    """
    by_folder: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        by_folder.setdefault(name.rpartition("/")[0], []).append(row)
    missing = np.zeros(len(names), dtype=bool)
    for folder, rows in by_folder.items():
        present = file_names(os.path.join(root, folder) or ".")
        for row in rows:
            missing[row] = names[row].rpartition("/")[2] not in present
    return missing


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: a name with a dot in front, or what systems put beside data."""
    return name.startswith(".") or name in ("__MACOSX", "lost+found")


def _is_folder(entry: os.DirEntry) -> bool | None:
    """Whether an entry is a folder (true) or a regular file (false), or leads to one; `None` for anything else."""
    try:
        if entry.is_dir():
            return True
        return False if entry.is_file() else None  # a pipe or a device never ends, a broken link leads nowhere
    except OSError:  # a link to itself
        return None


def file_names(folder: str) -> set[str]:
    """Names of the regular files in `folder`; empty if there is no such folder."""
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if _is_folder(entry) is False}


def folder_names(folder: str) -> list[str]:
    """Sorted names of the folders in `folder`, without hidden ones; empty if there is no such folder."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry) and not is_hidden(entry.name))


class Folder(NamedTuple):
    """What [`walk`] finds in one folder, as sorted names.

    Args:
        prefix: the path from the root with a slash behind it; empty for the root.
        files: regular files.
        others: what is neither file nor folder (pipes, devices, sockets, broken links), and links to folders above.
    """

    prefix: str
    files: list[str]
    others: list[str]


def walk(root: str | os.PathLike) -> Iterator[Folder]:
    """`root` and all folders below it, in the order of their names, without hidden ones. Links are followed.

    A link back to a folder above, which would never end, is not followed, whatever name it has: folders are known by
    device and number.

    Raises:
        ValueError: if links lead to one folder in more than ten thousand ways, as a chain of pairs of links does.
        OSError: on a folder that may not be read.
    """
    status = os.stat(root)
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ((status.st_dev, status.st_ino),))]
    ways: Counter = Counter()
    while waiting:
        prefix, above = waiting.pop()
        ways[above[-1]] += 1
        if ways[above[-1]] > MOST_WAYS:
            raise ValueError(
                f"{os.fspath(root)}: links lead to one folder in more than {MOST_WAYS} ways, one is {prefix[:200]}."
            )
        below: list[tuple[str, tuple[tuple[int, int], ...]]] = []
        files, others = [], []
        with os.scandir(os.path.join(root, prefix)) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                is_folder = _is_folder(entry)
                if not is_folder:
                    (others if is_folder is None else files).append(entry.name)
                    continue
                status = entry.stat()
                place = (status.st_dev, status.st_ino)
                if place in above:
                    others.append(entry.name)
                else:
                    below.append((f"{prefix}{entry.name}/", (*above, place)))
        yield Folder(prefix, sorted(files), sorted(others))
        waiting += sorted(below, reverse=True)


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read its bytes. Raises `OSError` if it is a pipe, device or socket, which may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"no regular file: {os.fspath(path)}")
    return open(path, "rb")


@cache
def image_suffixes() -> frozenset[str]:
    """Endings, in small letters, of the files that Pillow decodes: `.jpg`, `.jfif`, `.avif`, ..."""
    formats = PIL.Image.registered_extensions()
    return frozenset(end for end, kind in formats.items() if kind in PIL.Image.OPEN and kind not in UNDECODED)


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def image_names(folder: str) -> list[str]:
    """Sorted names of the image files in `folder`, by suffix and not hidden: a listing has no order of its own."""
    return sorted(name for name in file_names(folder) if is_image(name) and not is_hidden(name))


def refuse_archive(path: str | os.PathLike) -> None:
    """Refuse a tar or zip archive: the package reads folders and unpacks nothing.

    Raises:
        ValueError: saying so, and naming a member that would be written outside the folder if there is one.
    """
    if not os.path.isfile(path):
        return
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            members = archive.getnames()
    else:
        return
    unsafe = [name for name in members if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")]
    if unsafe:
        raise ValueError(
            f"{path} is an archive with members that lead outside of it, such as {unsafe[0]!r}. It is refused: do not "
            "unpack it, and get the data from a source you trust."
        )
    raise ValueError(f"{path} is an archive; unpack it and pass the folder.")
