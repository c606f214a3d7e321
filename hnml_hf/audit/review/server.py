"""The report of a large audit from a local server: pages and images on demand, annotations on the disk at every key.

Only this machine can reach it (127.0.0.1), only who knows the token in its address is answered, and no page of another
origin may ask: the `Host`, `Origin` and `Sec-Fetch-Site` headers are checked. A request names an image by its sample
id, never by a path.
"""

import json
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from filelock import FileLock
from PIL import Image

from ...common.words import counted
from ...data.files import as_name, is_plain
from ..dynamics import AUDIT_FOLDER
from ..report import Evidence, encode_picture, map_values, picture_uri, render_page, script_hash
from .annotations import ANNOTATIONS, NEW_CLASS, LogError, annotations_csv, class_ids, latest_entries
from .lineage import decided_samples
from .log import LOG_FILE, AnnotationLog, OtherDatasetError, write_log
from .matching import Scored, describe_lost, is_at, match_annotations
from .queue import Query, ReviewQueue, common_folder, read_rows, summary_columns


TABLE_FILE = "noise_scores.parquet"  # as in `hnml_hf.audit.table`, which imports datasets
HOST = "127.0.0.1"
PORT = 8642
SIDES = (320, 480, 640, 1280)
MAX_BODY = 8 * 2**20  # bytes of a request: 30,000 annotations
MAX_ENTRIES = 100_000
PAGE_ROWS = 200  # of a request, at most
CACHED_PICTURES = 256
ANNOTATOR = re.compile(r"[\w .@-]{1,40}")
POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; script-src "
    "'sha256-{}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

logger = logging.getLogger(__name__)

Pictures = Callable[[int], Image.Image]
Maps = Callable[[int], Evidence]


class Refused(Exception):
    """A request that gets no answer but its status and one sentence."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Review:
    """What the server serves.

    Args:
        queue ([`ReviewQueue`]): rows and their states.
        log ([`AnnotationLog`]): where annotations go; it knows the ids of the queue.
        summary (`Mapping`): `attrs` of the table.
        annotator (`str`): who annotates, unless the page says otherwise.
        pictures (`Callable`, *optional*): from a sample id to the image of a row that is part of the dataset.
        maps (`Callable`, *optional*): from a sample id to its [`Evidence`], the picture as the model sees it and the
            activation maps of given and suggested class.
        scored (`Path`, *optional*): the table's file; a page is told when it changes.
        curves, run: see [`~hnml_hf.render_report`].
    """

    def __init__(
        self,
        queue: ReviewQueue,
        log: AnnotationLog,
        summary: Mapping,
        *,
        annotator: str = "reviewer",
        pictures: Pictures | None = None,
        maps: Maps | None = None,
        scored: Path | None = None,
        curves: Iterable[Mapping] = (),
        run: str | os.PathLike | None = None,
    ):
        self.queue, self.log, self.summary = queue, log, summary
        self.annotator, self._pictures, self._maps, self._scored = annotator, pictures, maps, scored
        self._written = self._stamp()
        self._classes = class_ids(queue.class_names)
        self._lock = threading.Lock()
        self._busy = threading.Semaphore(4)  # images decoded at once
        self.picture = lru_cache(CACHED_PICTURES)(self._picture)
        _check_given_labels(queue, log)
        queue.take(log.rows())
        self.page = self._page(list(curves), run)

    def _stamp(self) -> int | None:
        try:
            return self._scored.stat().st_mtime_ns if self._scored else None
        except OSError:
            return 0

    def _page(self, curves: list[Mapping], run: str | os.PathLike | None) -> str:
        """The HTML page, which holds no annotation: the same for every reader."""
        counts = np.bincount(self.queue.suggested[self.queue.issue], minlength=len(self.queue.class_names))
        payload = {
            "served": True,
            "id": self.summary["dataset_fingerprint"],
            "classes": self.queue.class_names,
            "annotator": self.annotator,
            "frequent": np.argsort(-counts, kind="stable")[:10].tolist(),
            "maps": self._maps is not None,
        }
        columns = summary_columns(self.queue.rows)
        return render_page(columns, self.summary, payload, curves=curves, run=run)

    def refresh(self):
        """Take in what other processes have appended to the log."""
        with self._lock:
            self.queue.take(self.log.refresh())

    def state(self) -> dict:
        self.refresh()
        stamp = self._stamp()
        gone = "" if stamp != 0 or self._written == 0 else str(self.log.path)
        return {"version": self.log.version, "stale": stamp != self._written, "gone": gone}

    def rows(self, words: Mapping[str, str]) -> dict:
        """A page of a view."""
        words = dict(words)
        start, size = _integer(words.pop("start", "0"), "start"), _integer(words.pop("size", "24"), "size")
        annotator = check_annotator(words.pop("annotator", self.annotator))
        if not 0 <= start <= len(self.queue) or not 1 <= size <= PAGE_ROWS:
            raise Refused(400, f"`start` must be between 0 and {len(self.queue)}, `size` between 1 and {PAGE_ROWS}.")
        query = parse_query(words)
        return {**self.state(), **self.queue.page(query, start=start, size=size, annotator=annotator)}

    def annotate(self, entries: Any, annotator: str, batch: str) -> dict:
        lines = self._checked(entries)
        with self._lock:
            self.queue.take(self.log.append(lines, annotator, batch))
        return {**self.state(), "count": len(lines)}

    def bulk(self, query: Query, annotation: str, annotator: str, batch: str) -> dict:
        """One annotation for all rows of a view."""
        rows = self.queue.view(query, annotator)
        if len(rows) > MAX_ENTRIES:
            raise Refused(
                400, f"{counted(len(rows), 'row')} at once are more than {MAX_ENTRIES:,}: filter them first."
            )
        queue, names = self.queue, self.queue.class_names
        label = queue.suggested if annotation == "wrong" else queue.label
        known = annotation != "unsure"
        entries = [
            {
                "index": int(queue.index[row]),
                "annotation": annotation,
                "new_label_name": names[label[row]] if known else "",
            }
            for row in rows.tolist()
        ]
        return self.annotate(entries, annotator, batch)

    def undo(self, batch: str) -> dict:
        try:
            with self._lock:
                self.queue.take(self.log.undo(batch))
        except KeyError:
            raise Refused(404, "There is no such change to undo.") from None
        return self.state()

    def _checked(self, entries: list) -> list[dict]:
        """Entries of a request as lines of the log; raises `Refused` on the first that makes no sense."""
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise Refused(400, "`entries` must be a list of objects.")
        if len(entries) > MAX_ENTRIES:
            raise Refused(413, f"{counted(len(entries), 'annotation')} at once are more than {MAX_ENTRIES:,}.")
        ids = [entry.get("index") for entry in entries]
        if not all(type(index) is int and abs(index) < 2**62 for index in ids):
            raise Refused(400, "`index` must be a sample id.")
        try:
            rows = self.queue.find(np.array(ids, np.int64))
        except KeyError as error:
            raise Refused(404, f"Sample {error.args[0]} is not in this audit; whose annotations are these?") from None
        return [self._line(entry, int(row)) for entry, row in zip(entries, rows, strict=True)]

    def _line(self, entry: dict, row: int) -> dict:
        queue, verdict = self.queue, entry.get("annotation")
        given = queue.class_names[queue.label[row]]
        if verdict is not None and verdict not in ANNOTATIONS:
            raise Refused(400, f"The annotation {verdict!r} is none of {', '.join(ANNOTATIONS)}.")
        if entry.get("label_name") not in (None, "", given):
            raise Refused(
                409,
                f"Sample {entry['index']} was annotated when its label was `{entry['label_name']}`; here it is "
                f"`{given}`. These annotations are of another run.",
            )
        if not is_at(queue.path(row), entry["path"] if isinstance(entry.get("path"), str) else ""):
            raise Refused(
                409,
                f"Sample {entry['index']} was `{entry['path']}` when it was annotated, and here it is "
                f"`{queue.relative(queue.path(row))}`: the dataset has changed since. Import the file by `hnml review "
                "RUN --import FILE`, which looks for the images.",
            )
        label, name = NEW_CLASS, ""
        if verdict == "right":
            label, name = int(queue.label[row]), given
        elif verdict == "wrong":
            label, name = self._true_class(entry.get("new_label_name"), row)
        return {
            "index": entry["index"],
            "annotation": verdict,
            "new_label": label,
            "new_label_name": name,
            "label_name": given,
            "path": queue.relative(queue.path(row)),
        }

    def _true_class(self, name: Any, row: int) -> tuple[int, str]:
        """Id and name of the true class of a wrong label, as somebody has written it: -1 for a new class, and with an
        empty name for an unknown one. `None` is the suggested class."""
        given, suggested = (self.queue.class_names[labels[row]] for labels in (self.queue.label, self.queue.suggested))
        name = suggested if name is None else name
        if not isinstance(name, str):
            raise Refused(400, "`new_label_name` must be the name of a class.")
        name = as_name(name)
        if name in ("", as_name(given)):  # it is wrong, and no more is known
            return NEW_CLASS, ""
        if name not in self._classes and len(name) > 200:
            raise Refused(400, "The name of a new class has at most 200 characters.")
        if not is_plain(name):  # no table and no folder could hold it
            raise Refused(400, "The name of the class has control characters, or is no text.")
        label = self._classes.get(name, NEW_CLASS)
        return (label, self.queue.class_names[label]) if label >= 0 else (NEW_CLASS, name)

    def csv(self) -> str:
        self.refresh()
        return annotations_csv(self.log.rows())

    def _picture(self, index: int, side: int) -> tuple[bytes, str]:
        from ...data.decoding import UNREADABLE, open_image_file, to_rgb  # not before the first page is asked for
        from ...data.files import open_regular

        row = self._row(index)
        path = self.queue.path(row)
        with self._busy:
            try:
                if path:
                    with open_regular(path) as file, open_image_file(file) as image:
                        image.draft("RGB", (2 * side, 2 * side))  # JPEG: decode no more pixels than are shown
                        image = to_rgb(image)
                elif self._pictures is None:
                    raise Refused(404, "The image is part of the dataset, which was not loaded.")
                else:
                    image = self._pictures(index)
            except UNREADABLE as error:
                raise Refused(404, f"The image cannot be read ({type(error).__name__}).") from None
            return encode_picture(image, side)

    def maps(self, index: int) -> dict:
        self._row(index)
        if self._maps is None:
            return {"maps": None}
        with self._busy:
            try:
                shown = self._maps(index)
            except (ValueError, OSError, LookupError, ArithmeticError, RuntimeError) as error:
                raise Refused(404, f"There are no maps: {error}") from error  # data or model are gone
        if shown.image is None or shown.given_map is None or shown.suggested_map is None:
            return {"maps": None}
        both = [map_values(shown.given_map), map_values(shown.suggested_map)]
        return {"maps": both, "image": picture_uri(shown.image, SIDES[-1])}

    def _row(self, index: int) -> int:
        try:
            return int(self.queue.find(np.array([index], np.int64))[0])
        except KeyError:
            raise Refused(404, "There is no such sample in this audit.") from None


def _check_given_labels(queue: ReviewQueue, log: AnnotationLog):
    """Raise `ValueError` if what was annotated had other labels than now, as after a class got another name."""
    entries = [entry for entry in log.rows() if entry.get("label_name")]
    given = queue.label[queue.find(np.array([entry["index"] for entry in entries], np.int64))]
    for entry, label in zip(entries, given.tolist(), strict=True):
        if as_name(entry["label_name"]) != as_name(queue.class_names[label]):
            raise ValueError(
                f"{log.path}: sample {entry['index']} was annotated when its label was `{entry['label_name']}`; here "
                f"it is `{queue.class_names[label]}`. These annotations are of other classes: move the file away to "
                "begin anew; it is not touched."
            )


def take_over(path: Path, queue: ReviewQueue, fingerprint: str):
    """Write a log anew whose dataset has changed since, with the ids that its samples have now; the file as it was
    stays beside it. A warning says what was taken over, and which images are gone.

    Raises:
        ValueError: if it is not known which images were annotated; see [`match_annotations`].
    """
    with FileLock(f"{path}.lock"):
        header, entries = latest_entries(path) if path.is_file() else ({}, [])
        before = header.get("dataset_fingerprint", fingerprint)
        if before == fingerprint and all(
            is_at(queue.path_of(entry["index"]), entry.get("path")) for _, entry in entries
        ):
            return
        if not entries:
            return write_log(path, fingerprint, queue.root, [])
        names = [queue.class_names[label] for label in queue.label.tolist()]
        scored = Scored(queue.index.tolist(), queue.rows["path"].to_pylist(), names)
        try:
            found, lost = match_annotations(entries, scored, root=header.get("root"))
        except ValueError as error:
            raise ValueError(f"{error} Or move {path} away to begin anew; it is not touched.") from error
        ids = class_ids(queue.class_names)
        lines = []
        for _, entry in found:
            label = ids.get(as_name(entry.get("new_label_name") or ""), NEW_CLASS)
            place = queue.relative(queue.path_of(entry["index"]) or "")
            lines.append({**entry, "new_label": label, "path": place})
        kept, number = path.with_name(f"{path.stem}-{before[:8]}{path.suffix}"), 1
        while kept.exists():
            number += 1
            kept = path.with_name(f"{path.stem}-{before[:8]}-{number}{path.suffix}")
        shutil.copy2(path, kept)
        write_log(path, fingerprint, queue.root, lines)
    logger.warning(
        f"The dataset has changed since {path} was begun: {counted(len(lines), 'annotation', 'were')} taken over by "
        f"the paths of their images, and the file as it was is {kept}."
    )
    if lost:
        logger.warning(describe_lost(path, lost))


def parse_query(words: Any) -> Query:
    """A [`Query`] from the words of a request; raises `Refused` on what is none."""
    if not isinstance(words, Mapping):
        raise Refused(400, "`query` must be an object.")
    values: dict[str, Any] = {name: value for name, value in words.items() if value not in (None, "")}
    unknown = set(values) - set(Query.__dataclass_fields__)
    if unknown:
        raise Refused(400, f"There is no {', '.join(sorted(unknown))} in a query.")
    try:
        for name in ("given", "suggested"):
            if name in values:
                values[name] = _integer(values[name], name)
        if "least" in values:
            values["least"] = _number(values["least"], "least")
        for name in ("folder", "text"):
            text = values.setdefault(name, "")
            if not isinstance(text, str) or len(text) > 1000 or not is_plain(text):
                raise Refused(400, f"`{name}` must be a text of at most 1,000 characters, none of them for control.")
        return Query(**values)
    except (TypeError, ValueError) as error:
        raise Refused(400, str(error)) from None


def _integer(value: object, name: str) -> int:
    if isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"\d{1,18}", value, re.ASCII)):
        return int(value)
    raise Refused(400, f"`{name}` must be a number.")


def _number(value: object, name: str) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # what is none raises
    except (TypeError, ValueError):
        raise Refused(400, f"`{name}` must be a number.") from None


def check_annotator(name: object) -> str:
    """The name of an annotator; raises `Refused` on what cannot be one."""
    if not isinstance(name, str) or not ANNOTATOR.fullmatch(name) or not name.strip():
        raise Refused(400, "An annotator's name has 1 to 40 letters, digits, spaces and `.@_-`, not spaces alone.")
    return name


def open_review(
    run: str | os.PathLike,
    *,
    annotations: str | os.PathLike | None = None,
    annotator: str = "reviewer",
    pictures: Pictures | None = None,
    maps: Maps | None = None,
) -> Review:
    """The review of a run that was audited.

    Args:
        run (`str` or `Path`): its `output_dir`.
        annotations (`str` or `Path`, *optional*): the log; default: `_audit/annotations.jsonl` of the run.
        annotator, pictures, maps: see [`Review`].

    Raises:
        FileNotFoundError: if the run has no audit.
        ValueError: if the annotations are of other labels than those that were scored; of a dataset that images were
            added to, or taken from, since, those of the others are taken over.
        OSError: if the annotations cannot be written.
    """
    folder = Path(run) / AUDIT_FOLDER
    scored = folder / TABLE_FILE
    if not scored.is_file():
        raise FileNotFoundError(f"{run} has no `{AUDIT_FOLDER}/{TABLE_FILE}`. `hnml audit` writes it.")
    rows, summary = read_rows(scored)
    names = list(map(str, summary["class_names"]))
    queue = ReviewQueue(rows, names, decided=decided_samples(run, rows, names), root=common_folder(rows))
    path = Path(annotations or folder / LOG_FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        take_over(path, queue, summary["dataset_fingerprint"])
        log = AnnotationLog(path, summary["dataset_fingerprint"], queue.root, known=queue)
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written ({error.strerror or error}): name a file elsewhere by --annotations."
        ) from error
    matrix = summary["transition_matrix"]
    if isinstance(matrix, str):  # of many classes, in a file beside the table
        summary["transition_matrix"] = np.load(folder / matrix, allow_pickle=False, mmap_mode="r")
    state = Path(run, "trainer_state.json")
    curves = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.is_file() else []
    return Review(
        queue,
        log,
        summary,
        annotator=annotator,
        pictures=pictures,
        maps=maps,
        scored=scored,
        curves=curves,
        run=run,
    )


class ReviewServer(ThreadingHTTPServer):
    """Serve a [`Review`] on 127.0.0.1.

    Args:
        review ([`Review`]): what to serve.
        port (`int`): 0 takes a free one.
        token (`str`, *optional*): without it a new one is drawn.
    """

    daemon_threads = True
    request_queue_size = 64
    allow_reuse_address = True

    def __init__(self, review: Review, *, port: int = PORT, token: str | None = None):
        self.review, self.token = review, token or secrets.token_urlsafe(24)
        super().__init__((HOST, port), _Handler)
        self.port = self.server_address[1]
        self.hosts = {f"{name}:{self.port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/{self.token}/"

    def handle_error(self, request, client_address):
        logger.debug("A connection ended in an error.", exc_info=True)  # a browser that went away


class _Handler(BaseHTTPRequestHandler):
    server: "ReviewServer"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "hnml", ""
    timeout = 30  # seconds that a connection may idle, also in the middle of a request
    disable_nagle_algorithm = True
    wbufsize = 2**16

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._post)

    def _not_allowed(self):
        self.close_connection = True
        self._send(405, {"error": "Only GET and POST."}, {"Allow": "GET, POST"})

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _not_allowed

    def _answer(self, handler: Callable):
        try:
            self._check_origin()
            path, words = self._target()
            handler(path, words)
        except Refused as error:
            self.close_connection = True  # what is left of the request is not read
            self._send(error.status, {"error": str(error)})
        except OtherDatasetError as error:
            self.close_connection = True
            self._send(409, {"error": f"{error} Start `hnml review` again."})
        except LogError as error:  # somebody edits it: a browser keeps its changes until it can be read
            self.close_connection = True
            self._send(503, {"error": str(error)})
        except OSError as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            self.close_connection = True
            what = "written" if self.command == "POST" else "read"
            said = f"The annotations could not be {what}: {error.strerror or error}."
            logger.error("%s", said, exc_info=logger.isEnabledFor(logging.DEBUG))
            self._send(507, {"error": said})

    def _check_origin(self):
        """No other site, and no name that was bent to 127.0.0.1, may ask."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise Refused(421, "This server answers to its own address alone.")
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower() != f"http://{hosts[0].lower()}":
            raise Refused(403, "Requests of other sites are refused.")
        if origin is None and self.command == "POST":
            raise Refused(403, "A change must say its origin.")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise Refused(403, "Requests of other sites are refused.")

    def _target(self) -> tuple[str, dict[str, str]]:
        try:
            if not self.path.startswith("/"):
                raise ValueError("an address of another server")
            parts = urlsplit(self.path)
            words = parse_qs(parts.query, keep_blank_values=True, max_num_fields=20, strict_parsing=bool(parts.query))
        except ValueError:
            raise Refused(400, "This is no address.") from None
        head, _, path = parts.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(head.encode(), self.server.token.encode()):
            raise Refused(403, "There is nothing here: open the address that `hnml review` has printed.")
        if any(len(values) > 1 for values in words.values()):
            raise Refused(400, "A word of the address is there twice.")
        return path, {name: values[0] for name, values in words.items()}

    def _get(self, path: str, words: dict[str, str]):
        review = self.server.review
        picture = re.fullmatch(r"image/(-?\d{1,18})", path, re.ASCII)
        maps = re.fullmatch(r"maps/(-?\d{1,18})", path, re.ASCII)
        if path == "":
            self._send(
                200, review.page.encode(), {"Content-Security-Policy": POLICY.format(script_hash())}, "text/html"
            )
        elif path == "rows":
            self._send(200, review.rows(words))
        elif path == "state":
            self._send(200, review.state())
        elif path == "annotations.csv":
            self._send(
                200,
                review.csv().encode(),
                {"Content-Disposition": 'attachment; filename="annotations.csv"'},
                "text/csv",
            )
        elif picture:
            side = _integer(words.get("side", "320"), "side")
            if side not in SIDES:
                raise Refused(400, f"`side` must be one of {', '.join(map(str, SIDES))}.")
            content, kind = review.picture(int(picture[1]), side)
            self._send(200, content, {"Cache-Control": "private, max-age=600"}, kind)
        elif maps:
            self._send(200, review.maps(int(maps[1])))
        else:
            raise Refused(404, "There is no such page.")

    def _post(self, path: str, words: dict[str, str]):
        if path not in ("annotate", "bulk", "undo") or words:
            raise Refused(404, "There is no such page.")
        body, review = self._body(), self.server.review
        batch = body.get("batch")
        if not isinstance(batch, str) or not re.fullmatch(r"[0-9a-f]{8,64}", batch):
            raise Refused(400, "`batch` must be 8 to 64 hexadecimal digits.")
        if path == "undo":
            return self._send(200, review.undo(batch))
        annotator = check_annotator(body.get("annotator", review.annotator))
        if path == "annotate":
            return self._send(200, review.annotate(body.get("entries"), annotator, batch))
        if body.get("annotation") not in ANNOTATIONS:
            raise Refused(400, f"`annotation` must be one of {', '.join(ANNOTATIONS)}.")
        self._send(200, review.bulk(parse_query(body.get("query")), body["annotation"], annotator, batch))

    def _body(self) -> dict:
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "A change must be JSON.")
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "A change must say its length.")
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch(r"\d{1,12}", lengths[0], re.ASCII):
            raise Refused(411, "A change must say its length.")
        if int(lengths[0]) > MAX_BODY:
            raise Refused(413, f"A change has at most {MAX_BODY:,} bytes.")
        try:
            body = json.loads(self.rfile.read(int(lengths[0])))
        except (ValueError, RecursionError):
            raise Refused(400, "This is no JSON.") from None
        if not isinstance(body, dict):
            raise Refused(400, "A change must be an object.")
        return body

    def _send(
        self, status: int, content: dict | bytes, headers: Mapping | None = None, kind: str = "application/json"
    ):
        if isinstance(content, dict):
            content = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
        self.send_response(status)
        everywhere = {
            "Content-Type": f"{kind}; charset=utf-8" if kind.startswith("text/") else kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        for name, value in {**everywhere, **(headers or {})}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format, *arguments):
        logger.debug(format, *arguments)  # addresses hold the token: not on the terminal
