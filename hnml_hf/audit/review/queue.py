"""The rows of an audit in the order in which people should see them, and what their answers say of the noise rate."""

import math
import os
import threading
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..report import row_reasons, score_text


STATUS = ("", "wrong", "right", "unsure")  # codes of a row's state; "" = open
ORDERS = ("likely", "informative", "rate", "index")
GROUPS = ("", "pair", "given", "folder")
STRATA = 6
LEAST_DEVIATION = 0.1  # of a stratum: scores near 0 and 1 are not certain
NEEDED = ("index", "path", "label", "suggested_label", "noise_score", "rank")
REASONS = (
    *("given_probability", "suggested_probability", "foreground_agreement"),
    *("times_seen", "last_epoch_learned", "log_odds", "annotation"),
)


def read_rows(path: str | os.PathLike) -> tuple[pa.Table, dict]:
    """The columns of a table of scores that a review shows, most probably wrong first, and its summary.

    Text stays in Arrow: a million paths as Python strings would take a second and 100 MB.
    """
    import json

    with pq.ParquetFile(path) as file:  # `read_table` would import pandas
        content = file.schema_arrow
        table = file.read(columns=[name for name in (*NEEDED, *REASONS) if name in content.names])
    rank = numbers(table["rank"])
    if not (rank[1:] > rank[:-1]).all():
        table = table.take(np.argsort(rank, kind="stable"))
    return table.combine_chunks(), json.loads(content.metadata[b"noise_audit"])


def numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of numbers, none of them missing; `to_numpy` would import pandas, which takes longer than the rest."""
    return np.from_dlpack(column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)


@dataclass(frozen=True)
class Query:
    """What a page shows.

    Args:
        scope (`str`): `issues` (probably wrong) or `all`.
        status (`str`): `open` (decided by nobody), `mine` (not decided by this annotator), `any`, one of the
            annotations, `split` (two annotators name different classes) or `before` (decided before this
            audit).
        given, suggested (`int`, *optional*): class ids.
        folder, text (`str`): the folder of a file, and a part of its path in any case.
        least (`float`): smallest score.
        order (`str`): `likely` (highest score first), `informative` (likely errors and uncertain labels by turns),
            `rate` (the sample that measures the noise rate) or `index`.
        group (`str`): rows of one `pair` of given and suggested class, `given` class or `folder` beside each other.
    """

    scope: str = "issues"
    status: str = "open"
    given: int | None = None
    suggested: int | None = None
    folder: str = ""
    text: str = ""
    least: float = 0.0
    order: str = "likely"
    group: str = ""

    def __post_init__(self):
        for name, known in (
            ("scope", ("issues", "all")),
            ("status", ("open", "mine", "any", "split", "before", *STATUS[1:])),
            ("order", ORDERS),
            ("group", GROUPS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` {getattr(self, name)!r} is none of {', '.join(known)}.")
        if not 0 <= self.least <= 1:
            raise ValueError(f"`least` {self.least} must be between 0 and 1.")


class ReviewQueue:
    """Rows of an audit with what was said of them; every method may be called from several threads.

    Args:
        rows (`pa.Table`): of [`read_rows`], n rows, most probably wrong first.
        class_names (`list[str]`): in id order.
        issue_score (`float`): from which a label is an issue.
        decided (`Iterable[int]`): ids that were decided before this audit; they are no issues any more.
        root (`str`): paths are shown, and grouped by folder, relative to it.
    """

    def __init__(
        self,
        rows: pa.Table,
        class_names: list[str],
        *,
        issue_score: float = 0.5,
        decided: Iterable[int] = (),
        root: str = "",
    ):
        self.rows, self.class_names = rows, class_names
        self.index, self.label, self.suggested, self.score = (
            numbers(rows[name]) for name in ("index", "label", "suggested_label", "noise_score")
        )
        known = "times_seen" in rows.column_names
        self.seen = numbers(rows["times_seen"]) > 0 if known else np.ones(len(self.index), bool)
        self.root = root.rstrip("/") + "/" if root else ""
        self._by_index = order_of_ids(self.index)
        self.before = np.zeros(len(self.index), bool)
        self.before[self.find(np.fromiter(decided, np.int64))] = True
        self.issue = (self.score >= issue_score) & self.seen & ~self.before
        self.state = np.zeros(len(self.index), np.int8)
        self.split: set[int] = set()
        self.annotations: dict[int, dict[str, dict]] = {}
        self._mine: dict[str, np.ndarray] = {}
        self._lock = threading.RLock()
        self._orders: dict[tuple[str, str], np.ndarray] = {}
        self._views: dict[Query, np.ndarray] = {}
        self.strata = rate_strata(self.score, self.seen)

    def __len__(self):
        return len(self.index)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Row numbers of sample ids; raises `KeyError` on one that is not there."""
        at = np.searchsorted(self.index, ids, sorter=self._by_index).clip(max=max(len(self.index) - 1, 0))
        rows = self._by_index[at] if len(self.index) else at
        unknown = ids[self.index[rows] != ids] if len(self.index) else ids
        if len(unknown):
            raise KeyError(int(unknown[0]))
        return rows

    def __contains__(self, sample: object) -> bool:
        """Whether a sample id is one of this audit."""
        return isinstance(sample, int) and self.path_of(sample) is not None

    def path(self, row: int) -> str:
        """Where the image of a row lies; empty if it is part of the dataset."""
        return self.rows["path"][int(row)].as_py() or ""

    def path_of(self, sample: int) -> str | None:
        """Where the image of a sample lies; `None` if there is no such sample."""
        try:
            return self.path(int(self.find(np.array([sample], np.int64))[0]))
        except KeyError:
            return None

    # -- answers --------------------------------------------------------------------------------------------------

    def take(self, entries: Iterable[Mapping]):
        """Take in lines of an annotation log, in their order."""
        with self._lock:
            for entry in entries:
                row = int(self.find(np.array([entry["index"]], np.int64))[0])
                by_annotator = self.annotations.setdefault(row, {})
                mine = self._mine.setdefault(entry["annotator"], np.zeros(len(self), bool))
                if entry["annotation"] is None:
                    by_annotator.pop(entry["annotator"], None)
                else:
                    by_annotator[entry["annotator"]] = dict(entry)
                mine[row] = entry["annotation"] is not None
                firm = [one for one in by_annotator.values() if one["annotation"] != "unsure"]
                (self.split.add if disputed(firm) else self.split.discard)(row)
                last = (firm or list(by_annotator.values()) or [{"annotation": ""}])[-1]
                self.state[row] = STATUS.index(last["annotation"])
                if not by_annotator:
                    del self.annotations[row]

    # -- views ----------------------------------------------------------------------------------------------------

    def view(self, query: Query, annotator: str = "") -> np.ndarray:
        """Row numbers that a query selects, in its order."""
        with self._lock:
            base = self._base(query)
            if query.status == "open":
                keep = self.state[base] == 0
            elif query.status == "mine":
                mine = self._mine.get(annotator)
                keep = slice(None) if mine is None else ~mine[base]
            elif query.status in STATUS:
                keep = self.state[base] == STATUS.index(query.status)
            elif query.status == "split":
                keep = np.isin(base, list(self.split))
            else:
                keep = slice(None)
            return base[keep]

    def _base(self, query: Query) -> np.ndarray:
        """What a query selects whatever was annotated: kept, since only annotations change between two pages."""
        key = Query(**{**vars(query), "status": "before" if query.status == "before" else "any"})
        if key in self._views:
            return self._views[key]
        keep = np.ones(len(self), bool)
        if query.scope == "issues" and query.status != "before" and query.order != "rate":
            keep &= self.issue
        if query.status == "before":
            keep &= self.before
        elif query.status in ("open", "mine"):
            keep &= ~self.before
        if query.least:
            keep &= self.score >= query.least
        if query.given is not None:
            keep &= self.label == query.given
        if query.suggested is not None:
            keep &= self.suggested == query.suggested
        if query.text:
            text, named = unicodedata.normalize("NFD", query.text), np.zeros(len(self), bool)
            paths = self.rows["path"] if text.isascii() else self._decomposed_paths
            named[numbers(pc.indices_nonzero(pc.match_substring(paths, text, ignore_case=True)))] = True
            keep &= named
        if query.folder:
            codes, names = self.folders
            keep &= codes == (names.index(query.folder) if query.folder in names else -1)
        order = self._order(query.order, query.group)
        found = order[keep[order]]
        if len(self._views) >= 32:
            self._views.pop(next(iter(self._views)))
        self._views[key] = found
        return found

    def _order(self, name: str, group: str) -> np.ndarray:
        if (name, group) not in self._orders:
            if name == "informative":
                order = informative_order(self.score)
            elif name == "rate":
                order = self.strata.sample
            elif name == "index":
                order = self._by_index
            else:
                order = np.arange(len(self))
            if group:
                codes = self.group_codes(group)[0]
                issues = np.bincount(codes, weights=np.where(self.issue, self.score, 0), minlength=codes.max() + 1)
                place = np.empty(len(issues), np.int64)
                place[np.argsort(-issues, kind="stable")] = np.arange(len(issues))
                place = place.astype(np.int16 if len(issues) < 2**15 else np.int64)
                order = order[np.argsort(place[codes[order]], kind="stable")]
            self._orders[name, group] = order
        return self._orders[name, group]

    @cached_property
    def _decomposed_paths(self) -> pa.ChunkedArray:
        """Paths with accents apart from their letters, as names from macOS have them. Up to pyarrow 21 the composed
        form, as people type it, comes out decomposed as well."""
        return pc.utf8_normalize(self.rows["path"], form="NFD")

    @cached_property
    def folders(self) -> tuple[np.ndarray, list[str]]:
        """Code of each row's folder, and their names relative to the root."""
        folders = pc.replace_substring_regex(self.rows["path"], r"/?[^/]*$", "")
        encoded = folders.combine_chunks().dictionary_encode(null_encoding="encode")
        encoded = encoded if isinstance(encoded, pa.DictionaryArray) else encoded.chunk(0)
        names = [self.relative(f"{name or ''}/").rstrip("/") for name in encoded.dictionary.to_pylist()]
        return numbers(encoded.indices), names

    def relative(self, path: str) -> str:
        return path.removeprefix(self.root)

    def group_codes(self, group: str) -> tuple[np.ndarray, object]:
        """A code of the group of each row."""
        if group == "folder":
            return self.folders
        if group == "given":
            return self.label, None
        return self.label.astype(np.int64) * len(self.class_names) + self.suggested, None

    # -- answers to the page --------------------------------------------------------------------------------------

    def page(self, query: Query, *, start: int = 0, size: int = 24, annotator: str = "") -> dict:
        """Rows `start` to `start + size` of a view, the number of all of them, groups and progress."""
        with self._lock:  # so that no annotation comes in between
            view = self.view(query, annotator)
            if start >= len(view):
                start = max(0, (len(view) - 1) // size * size)
            rows = view[start : start + size]
            groups = {}
            if query.group and len(rows):
                codes, names = self.group_codes(query.group)
                for code in np.unique(codes[rows]).tolist():
                    here = view[codes[view] == code]
                    groups[str(code)] = {"count": len(here), "wrong": round(float(self.score[here].sum()), 1)}
            items = self.items(rows)
            if groups:
                for item, code in zip(items, codes[rows].tolist(), strict=True):
                    item["group"] = str(code)
            return {
                "items": items,
                "start": start,
                "total": len(view),
                "groups": groups,
                "progress": self.progress(),
                "rate": self.rate(),
            }

    def items(self, rows: np.ndarray) -> list[dict]:
        """What a card shows."""
        parts = [self.rows.slice(row, 1) for row in rows.tolist()]  # `take` would import pandas
        part = pa.concat_tables(parts).to_pylist() if parts else []
        return [self._item(int(row), facts) for row, facts in zip(rows, part, strict=True)]

    def _item(self, row: int, facts: dict) -> dict:
        given, suggested = (self.class_names[facts[name]] for name in ("label", "suggested_label"))
        path = self.relative(facts["path"] or "")
        return {
            "id": facts["index"],
            "given": facts["label"],
            "suggested": facts["suggested_label"],
            "score": float(facts["noise_score"]),
            "certainty": score_text(facts["noise_score"], facts.get("log_odds")),
            "why": row_reasons(facts, given, suggested),
            "path": path,
            "folder": os.path.dirname(path),
            "before": bool(self.before[row]),
            "annotations": [short_entry(entry) for entry in self.annotations.get(row, {}).values()],
        }

    def progress(self) -> dict:
        """How far the issues are decided, and which share of the others is expected to be wrong."""
        decided = (self.state != 0) & self.issue
        left = self.issue & ~decided
        tally = {name: int((self.state == code).sum()) for code, name in enumerate(STATUS) if name}
        return {
            "issues": int(self.issue.sum()),
            "decided": int(decided.sum()),
            "expected": float(self.score[left].mean()) if left.any() else 0.0,
            "split": len(self.split),
            **tally,
        }

    def rate(self) -> dict:
        """The noise rate as far as annotations measure it; see [`estimate_rate`]."""
        return estimate_rate(self.strata, self.state)


def named_class(entry: Mapping) -> tuple[str, str]:
    """What an annotator says of a label, without the name of the given class: that may be in the log or not."""
    return entry["annotation"], (entry.get("new_label_name") or "") if entry["annotation"] == "wrong" else ""


def disputed(entries: Iterable[Mapping]) -> bool:
    """Whether annotators name different classes; `wrong` without a class agrees with any other one than the given."""
    said = {named_class(one) for one in entries}
    if any(annotation == "wrong" and name for annotation, name in said):
        said.discard(("wrong", ""))
    return len(said) > 1


def short_entry(entry: Mapping) -> dict:
    return {
        "annotation": entry["annotation"],
        "label": entry.get("new_label", -1),
        "name": entry.get("new_label_name", ""),
        "by": entry["annotator"],
    }


def order_of_ids(ids: np.ndarray) -> np.ndarray:
    """What sorts different integers; without a sort where they are numbers of rows, or nearly."""
    if len(ids) and 0 <= ids.min() and ids.max() < 4 * len(ids):
        place = np.full(ids.max() + 1, -1)
        place[ids] = np.arange(len(ids))
        return place[place >= 0]
    return np.argsort(ids, kind="stable")


# -- orders -----------------------------------------------------------------------------------------------------------


def informative_order(score: np.ndarray) -> np.ndarray:
    """Row numbers of scores in falling order, those that are likely wrong and those that are uncertain by turns.

    Args:
        score (`np.ndarray` of shape `(n,)`): in falling order.
    """
    n = len(score)
    uncertain = np.empty(n, np.int64)
    uncertain[np.argsort(np.abs(score - 0.5), kind="stable")] = np.arange(n)
    return np.argsort(np.minimum(2 * np.arange(n), 2 * uncertain + 1), kind="stable")


@dataclass(frozen=True)
class Strata:
    """A stratified sample that measures the noise rate.

    Args:
        of (`np.ndarray` of shape `(n,)`): stratum of each row, -1 for rows that no model saw.
        draw (`list[np.ndarray]`): per stratum its row numbers in random order; a sample is the beginning.
        sizes (`list[int]`): how many of each to annotate.
        sample (`np.ndarray`): all rows, first those to annotate, in an order that keeps the strata in proportion.
    """

    of: np.ndarray
    draw: list[np.ndarray]
    sizes: list[int]
    sample: np.ndarray


def rate_strata(score: np.ndarray, seen: np.ndarray, *, within: float = 0.03, seed: int = 0) -> Strata:
    """Strata by score and how many rows of each tell the noise rate within some points, at 95 %.

    The sample of stratum h is n_h ~ W_h s_h (Neyman, 1934), with its share W_h of the rows and the expected standard
    deviation s_h of "wrong": sqrt(p (1 - p)) at the mean score, and at least 0.1, since a score is not certain.
    Together n = (1.96 sum_h W_h s_h / within)^2.

    Args:
        score (`np.ndarray` of shape `(n,)`), seen (`np.ndarray` of shape `(n,)` of bool): rows that no model saw are
            in no stratum.
        within (`float`): half of the interval.
        seed (`int`): of the draw.
    """
    edges = np.array([0.02, 0.1, 0.5, 0.9, 0.98])
    of = np.where(seen, np.searchsorted(edges, score, side="right"), -1).astype(np.int8)
    random = np.random.default_rng(seed).permutation(len(score))
    of_random = of[random]
    draw = [random[of_random == stratum] for stratum in range(STRATA)]
    counts = np.array([len(rows) for rows in draw])
    means = np.bincount(of[seen], weights=score[seen], minlength=STRATA) / np.maximum(counts, 1)
    deviation = np.maximum(np.sqrt(means * (1 - means)), LEAST_DEVIATION)
    weights = counts / max(counts.sum(), 1)
    needed = (1.96 * (weights * deviation).sum() / within) ** 2
    share = weights * deviation / max((weights * deviation).sum(), 1e-12)
    sizes = np.minimum(counts, np.maximum(np.ceil(needed * share), np.where(counts > 0, 5, 0))).astype(int)
    first = [(place + 0.5) / size for size in sizes for place in range(size)]
    rows = np.concatenate([part[:size] for part, size in zip(draw, sizes, strict=True)]) if len(score) else random
    sample = rows[np.argsort(first, kind="stable")]
    rest = np.ones(len(score), bool)
    rest[sample] = False
    return Strata(of, draw, sizes.tolist(), np.concatenate([sample, random[rest[random]]]))


def estimate_rate(strata: Strata, state: np.ndarray) -> dict:
    """The noise rate from annotations of the sample.

    In each stratum the annotated beginning of its random order is a random sample, whoever has annotated it and why:
    p_h = (wrong + 1/2) / (n_h + 1) there, unsure rows left out; rate = sum_h W_h p_h, and its standard error
    sqrt(sum_h W_h^2 p_h (1 - p_h) / (n_h + 1) (1 - n_h / N_h)).

    Returns:
        `dict`: `needed` (rows of the sample), `annotated` (of them), and `rate` and `margin` (95 %, half of the
        interval), `None` while a stratum has no annotated row.
    """
    needed = sum(strata.sizes)
    annotated = sum(int((state[rows[:size]] != 0).sum()) for rows, size in zip(strata.draw, strata.sizes, strict=True))
    total = sum(len(rows) for rows in strata.draw)
    rate = variance = 0.0
    for rows in strata.draw:
        if not len(rows):
            continue
        open_rows = state[rows[: 16 * needed + 64]] == 0
        length = int(open_rows.argmax()) if open_rows.any() else len(open_rows)
        answers = state[rows[:length]]
        wrong, right = int((answers == 1).sum()), int((answers == 2).sum())
        if wrong + right == 0:
            return {"needed": needed, "annotated": annotated, "rate": None, "margin": None}
        n, weight = wrong + right, len(rows) / total
        share = (wrong + 0.5) / (n + 1) if n < len(rows) else wrong / n
        rate += weight * share
        variance += weight**2 * share * (1 - share) / (n + 1) * (1 - n / len(rows))
    return {"needed": needed, "annotated": annotated, "rate": rate, "margin": 1.96 * math.sqrt(variance)}


# -- what is shown before the first page ------------------------------------------------------------------------------


def summary_columns(rows: pa.Table) -> dict[str, np.ndarray]:
    """What the charts of the report are drawn from."""
    wanted = ("label", "suggested_label", "noise_score", "times_seen")
    return {name: numbers(rows[name]) for name in wanted if name in rows.column_names}


def common_folder(rows: pa.Table) -> str:
    """The folder that all images of a table lie in; empty for images that are part of the dataset."""
    bounds = pc.min_max(rows["path"]).as_py()
    return os.path.commonprefix([bounds["min"] or "", bounds["max"] or ""]).rpartition("/")[0]
