"""Label issues for annotation tools, and what people have decided there: Label Studio, CVAT, FiftyOne.

Writers get the rows to look at, most probably wrong first, and where their images are; readers yield rows as
[`~hnml_hf.audit.review.read_annotations`] takes them. A sample is found again by its id where the tool keeps it, else
by the path of its image.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.parsers import expat

from PIL import Image, UnidentifiedImageError

from ..common.atomic import atomic_write
from ..common.words import counted
from ..data.files import is_plain


if TYPE_CHECKING:  # a review starts without pandas
    import pandas as pd


CONTROL = "label"  # the name of the question in Label Studio


class Samples:
    """The samples of an audit as other tools name them.

    Args:
        table (`pd.DataFrame`): of [`load_audit`].
    """

    def __init__(self, table: pd.DataFrame):
        names = table.attrs["class_names"]
        self.given = {index: str(names[label]) for index, label in zip(table["index"], table["label"], strict=True)}
        self._near: dict[str, list[tuple[str, int]]] = {}
        for index, path in zip(table["index"].tolist(), table["path"], strict=True):
            full = f"/{path or index}".replace("\\", "/")  # an image of the dataset was written as `<index>.png`
            for key in {_file(full), _file(os.path.splitext(full)[0])}:
                self._near.setdefault(key, []).append((full, index))

    def find(self, path: str, where: str) -> int:
        """The id of the sample whose image a tool calls by the end of its path, with or without its suffix."""
        end = "/" + path.replace("\\", "/").strip("/")
        stem = os.path.splitext(end)[0]
        near = self._near.get(_file(end)) or self._near.get(_file(stem), [])
        found = [index for full, index in near if full.endswith(end)]
        found = found or [i for full, i in near if os.path.splitext(full)[0].endswith(end) or stem.endswith(full)]
        if len(found) != 1:
            several = " Export with the folders of the images." if found else ""
            raise ValueError(
                f"{where}: {len(found) or 'none'} of the scored images is `{path}`; whose is it?{several}"
            )
        return found[0]

    def id(self, index: Any, path: str, where: str) -> int:
        """The id that a tool has kept of a sample, or the one that its path leads to."""
        if index is None:
            return self.find(path, where)
        try:
            return int(index)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: `index` is {index!r}, no sample id.") from None

    def row(self, index: int, name: str | None, *, sure: bool, **more) -> dict | None:
        """The annotation that follows from a class that a tool has for a sample; none for one that nobody looked at.

        Args:
            name: of the class; `None` if the person could not tell.
            sure: whether somebody has confirmed it, so that the given class counts as right.
        """
        if name is None:
            return {"index": index, "annotation": "unsure", **more}
        if name == self.given.get(index):
            return {"index": index, "annotation": "right", **more} if sure else None
        return {"index": index, "annotation": "wrong", "new_label_name": name, **more}


def _file(path: str) -> str:
    return path.rpartition("/")[2]


def common_folder(images: Mapping[int, str]) -> str:
    """The folder above all images. Raises `ValueError` if there are none."""
    if not images:
        raise ValueError("None of the images is there, so that there is nothing to look at.")
    return os.path.commonpath([os.path.dirname(path) for path in images.values()])


def _plain(text: str) -> str:
    if not is_plain(text):
        raise ValueError(f"{text[:200]!r} has control characters or is no UTF-8: neither XML nor a shell takes it.")
    return text


# -- Label Studio -----------------------------------------------------------------------------------------------------


def write_label_studio(table: pd.DataFrame, images: Mapping[int, str], folder: str | os.PathLike) -> Path:
    """Tasks of Label Studio with the suggested class as a prediction, and the labeling interface that they need.

    Its server shows an image only if the project has a storage of local files with the folder, and that folder lies
    below `LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT` and is not that itself. So the storage is [`common_folder`] of all
    images, and the root, which the addresses of the tasks are relative to, the folder above it.

    Args:
        table (`pd.DataFrame`): the rows to look at, in their order.
        images (`Mapping[int, str]`): absolute paths by sample id.
        folder (`str` or `Path`): gets `tasks.json`, `interface.xml` and, for a shell, `server.env`.

    Returns:
        `Path`: the folder.
    """
    folder, storage = Path(folder), common_folder(images)
    root = os.path.dirname(storage)
    tasks = []
    for row in table.to_dict("records"):
        choice = {
            **{"from_name": CONTROL, "to_name": "image", "type": "choices"},
            "value": {"choices": [str(row["suggested_name"])]},
        }
        tasks.append(
            {
                "data": {
                    "image": f"/data/local-files/?d={quote(os.path.relpath(images[row['index']], root))}",
                    **{name: row[name] for name in ("index", "noise_score")},
                    **{"given_label": row["label_name"], "suggested_label": row["suggested_name"]},
                },
                "predictions": [
                    {"model_version": "hnml audit", "score": float(row["noise_score"]), "result": [choice]}
                ],
            }
        )
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    ElementTree.SubElement(view, "Header", value="Given: $given_label")
    choices = ElementTree.SubElement(view, "Choices", name=CONTROL, toName="image", choice="single")
    for name in table.attrs["class_names"]:
        ElementTree.SubElement(choices, "Choice", value=_plain(str(name)))
    _write(folder / "tasks.json", json.dumps(tasks))
    _write(folder / "interface.xml", ElementTree.tostring(view, encoding="unicode"))
    settings = [
        f"# In the project, Settings, Cloud Storage, add a source of local files: {_plain(storage)}",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true",
        f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={shlex.quote(root)}",
    ]
    _write(folder / "server.env", "\n".join(settings))
    return folder


def read_label_studio(path: Path, tasks: Sequence, samples: Samples) -> Iterator[tuple[str, dict]]:
    """Rows of a JSON export: a row for each person's annotation. One that was skipped, or is empty, is `unsure`."""
    for number, task in enumerate(tasks, start=1):
        where = f"{path} task {number}"
        if not isinstance(task, dict) or not isinstance(task.get("annotations"), list):
            raise ValueError(f"{where}: no `annotations`; export from Label Studio as `JSON`.")
        data = task.get("data") or {}
        index = samples.id(data.get("index"), _local_file(str(data.get("image"))), where)
        for annotation in task["annotations"]:
            names = _choices(annotation, where)
            skipped = annotation.get("was_cancelled") or not names
            who = annotation.get("completed_by")
            who = who.get("email") or who.get("id") if isinstance(who, dict) else who
            name = None if skipped else names[0]
            row = samples.row(
                index, name, sure=True, annotator="" if who is None else str(who), label_name=data.get("given_label")
            )
            assert row is not None  # `sure`: there is one
            yield where, row


def _choices(annotation: Any, where: str) -> list[str]:
    try:
        names = [name for item in annotation["result"] for name in item["value"].get("choices", ())]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: no annotation of Label Studio ({type(error).__name__}: {error}).") from error
    if len(names) > 1:
        raise ValueError(f"{where}: {counted(len(names), 'class')} of one image: {', '.join(map(str, names[:5]))}.")
    return [str(name) for name in names]


def _local_file(url: str) -> str:
    """The path in an address of Label Studio's local files, or of any other one."""
    parts = urlsplit(url)
    return parse_qs(parts.query).get("d", [unquote(parts.path)])[0]


# -- CVAT -------------------------------------------------------------------------------------------------------------


def write_cvat(table: pd.DataFrame, images: Mapping[int, str], folder: str | os.PathLike) -> Path:
    """`annotations.xml` (CVAT for images 1.1) with the given class as the tag of each image, the suggestion and the
    score as its attributes; and `labels.json` for the `Raw` editor of a task's labels.

    The images of the task are those below [`common_folder`], with their folders. Arguments as of
    [`write_label_studio`].

    Returns:
        `Path`: the folder.
    """
    folder, root = Path(folder), common_folder(images)
    attributes = ("suggested", "noise_score")
    names = [_plain(str(name)) for name in table.attrs["class_names"]]
    top = ElementTree.Element("annotations")
    ElementTree.SubElement(top, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(top, "meta"), "task")
    ElementTree.SubElement(task, "size").text = str(len(table))
    labels = ElementTree.SubElement(task, "labels")
    for name in names:
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "type").text = "tag"
        inner = ElementTree.SubElement(label, "attributes")
        for attribute in attributes:
            spec = ElementTree.SubElement(inner, "attribute")
            for key, value in {"name": attribute, "mutable": "False", "input_type": "text"}.items():
                ElementTree.SubElement(spec, key).text = value
    for number, row in enumerate(table.to_dict("records")):
        path = images[row["index"]]
        facts = {"id": str(number), "name": _plain(os.path.relpath(path, root)), **_size(path)}
        image = ElementTree.SubElement(top, "image", facts)
        tag = ElementTree.SubElement(image, "tag", label=str(row["label_name"]), source="file")
        for attribute, value in zip(attributes, (row["suggested_name"], f"{row['noise_score']:.4f}"), strict=True):
            ElementTree.SubElement(tag, "attribute", name=attribute).text = str(value)
    ElementTree.indent(top)
    specs = [
        {"name": attribute, "mutable": False, "input_type": "text", "default_value": "", "values": [""]}
        for attribute in attributes
    ]
    _write(folder / "annotations.xml", ElementTree.tostring(top, encoding="unicode", xml_declaration=True))
    _write(
        folder / "labels.json",
        json.dumps([{"name": name, "type": "tag", "attributes": specs} for name in names], indent=1),
    )
    return folder


def _size(path: str) -> dict[str, str]:
    try:
        with Image.open(path) as image:
            return {"width": str(image.width), "height": str(image.height)}
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return {}


def read_cvat(path: Path, samples: Samples) -> Iterator[tuple[str, dict]]:
    """Rows of `annotations.xml`: the tag of each image. One that a person has set counts, and one that is another
    class than the given one; an image without a tag any more is `unsure`.

    Raises:
        ValueError: naming file and line, on what is no such file, several tags of an image, or a document type.
    """
    parser, images = expat.ParserCreate(), []

    def start(name: str, attributes: dict):
        where = f"{path}:{parser.CurrentLineNumber}"
        if name == "image":
            images.append((where, attributes.get("name", ""), []))
        elif name == "tag" and images:
            images[-1][2].append((attributes.get("label", ""), attributes.get("source", "")))  # Datumaro writes none

    def refuse(*_):
        raise ValueError(f"{path}:{parser.CurrentLineNumber}: a document type has no place in a CVAT file.")

    parser.StartElementHandler, parser.StartDoctypeDeclHandler = start, refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise ValueError(f"{path}:{error.lineno}: no XML ({expat.ErrorString(error.code)}).") from error
    if not images:
        raise ValueError(f"{path}: no images; export from CVAT as `CVAT for images 1.1`.")
    for where, name, tags in images:
        if len({label for label, _ in tags}) > 1:
            raise ValueError(f"{where}: several tags of one image: {', '.join(label for label, _ in tags)}.")
        label, source = tags[0] if tags else (None, "manual")
        row = samples.row(samples.find(name, where), label, sure=source == "manual")
        if row is not None:
            yield where, row


# -- FiftyOne ---------------------------------------------------------------------------------------------------------


def read_fiftyone(path: Path, content: Mapping, samples: Samples) -> Iterator[tuple[str, dict]]:
    """Rows of the `labels.json` of a `FiftyOneImageClassificationDataset`: the samples whose class was changed."""
    classes, labels = content.get("classes"), content.get("labels")
    if not isinstance(labels, dict) or not isinstance(classes, list | None):
        raise ValueError(f"{path}: neither tasks of Label Studio (a list) nor `classes` and `labels` of FiftyOne.")
    for key, label in labels.items():
        where = f"{path} label {key!r}"
        label = label if isinstance(label, dict) else {"label": label}
        index = samples.id((label.get("attributes") or {}).get("index"), key, where)
        name = label.get("label")
        if isinstance(name, int):
            if classes is None or not 0 <= name < len(classes):
                raise ValueError(f"{where}: class {name} is none of `classes`.")
            name = classes[name]
        row = samples.row(index, None if name is None else str(name), sure=False)
        if row is not None:
            yield where, row


def read_fiftyone_csv(path: Path, rows: Sequence[tuple[int, dict]], samples: Samples) -> Iterator[tuple[str, dict]]:
    """Rows of a `CSVDataset`: `filepath` and the one column that ends with `label`."""
    names = [name for name in (rows[0][1] if rows else ()) if name and (name == "label" or name.endswith(".label"))]
    if rows and len(names) != 1:
        raise ValueError(f"{path}:1: one column `label`, or one that ends so, is needed; got {', '.join(names) or 0}.")
    for line, row in rows:
        where = f"{path}:{line}"
        found = samples.row(samples.find(row["filepath"], where), row[names[0]] or None, sure=False)
        if found is not None:
            yield where, found


def read_json(path: Path, samples: Samples) -> Iterator[tuple[str, dict]]:
    """Rows of an export of Label Studio or FiftyOne."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}).") from error
    if isinstance(content, list):
        return read_label_studio(path, content, samples)
    return read_fiftyone(path, content if isinstance(content, dict) else {}, samples)


def _write(path: Path, text: str):
    with atomic_write(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
