"""One self-contained HTML page: the label issues with their evidence, and how noisy the labels are."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from PIL import Image

from ...common.atomic import atomic_write
from ...common.words import counted
from ..findings import FINDINGS, probably_wrong


if TYPE_CHECKING:  # a review starts without pandas
    import pandas as pd


MATRIX_CLASSES = 20  # a larger heat map is a texture, not a table
LISTED = 8  # classes and pairs that the summary names
SIDES = (640, 480, 320)  # pixels of a stored picture: the largest of them that keeps all within the budget
BYTES_PER_PIXEL = 0.14  # of photographs as WebP, quality 80, about
MAX_BYTES = 20_000_000  # of pictures in a file; more of them want `hnml review`
MAX_ROWS = 10_000  # rows in a file that have no picture
TINY = 64  # a smaller picture keeps its pixels: stored as it is, shown without smoothing
BINS = 40
CURVES = (
    ("eval_accuracy", "accuracy on held-out labels", "one"),  # of a single evaluation dataset
    ("eval_validation_accuracy", "accuracy on held-out labels", "one"),  # of several by name
    ("eval_test_accuracy", "accuracy on the test set", "four"),
    ("label_agreement", "agreement with the given labels", "two"),
    ("memorized", "known wrong labels learned", "three"),
)


@dataclass(frozen=True)
class Evidence:
    """What can be shown of one label issue.

    Args:
        image (`PIL.Image.Image`, *optional*): the picture, as the model sees it.
        given_map, suggested_map (`np.ndarray` of shape `(h, w)`, *optional*): normalized activation maps in [0, 1] of
            the given and of the suggested class.
        reason (`str`): why there is no picture.
    """

    image: Image.Image | None = None
    given_map: np.ndarray | None = None
    suggested_map: np.ndarray | None = None
    reason: str = ""


def render_report(
    table: pd.DataFrame,
    summary: Mapping,
    path: str | os.PathLike,
    *,
    evidence: Sequence[Evidence] = (),
    curves: Sequence[Mapping] = (),
    decided: Collection[int] = (),
    found: Mapping[str, pd.DataFrame] | None = None,
    run: str | os.PathLike | None = None,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write the report.

    Everything that comes from the data (names, paths, reasons) is escaped; the page asks nothing of the network, and
    its content policy forbids it to. Pictures are stored with 640, 480 or 320 pixels, as many as fit.

    Args:
        table (`pd.DataFrame`): output of [`~hnml_hf.noise_scores`], a row per sample.
        summary (`Mapping`): its `attrs`.
        path (`str` or `Path`): of the HTML file.
        evidence (`Sequence[Evidence]`): of the label issues, in the order of `rank`, without those decided.
        curves (`Sequence[Mapping]`): a trainer's `log_history`.
        decided (`Collection[int]`): ids of samples that people have decided in an earlier round; they are no issues.
        found (`Mapping[str, pd.DataFrame]`, *optional*): of [`~hnml_hf.audit.findings.findings`].
        run (`str` or `Path`, *optional*): named in the commands that the page shows.
        max_bytes (`int`): of all pictures; those beyond are left to `hnml review`.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if there is more evidence than there are samples.
    """
    if len(evidence) > len(table):
        raise ValueError(
            f"{counted(len(evidence), 'label issue', 'come')} with evidence, but the table has "
            f"{counted(len(table), 'row')}."
        )
    table = table.sort_values("rank", kind="stable")
    payload = _payload(table, summary, evidence, set(decided), max_bytes)
    expected = sum(item["score"] for item in payload["items"] if item["issue"])
    page = render_page(table, summary, payload, curves=curves, found=found, expected=expected, run=run)
    with atomic_write(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return Path(path)


def render_page(
    table: pd.DataFrame | Mapping[str, np.ndarray],
    summary: Mapping,
    payload: Mapping,
    *,
    curves: Sequence[Mapping] = (),
    found: Mapping[str, pd.DataFrame] | None = None,
    expected: float | None = None,
    run: str | os.PathLike | None = None,
) -> str:
    """The page of [`render_report`] or, with `served` in the payload, of a local server that answers its questions.

    Args:
        table (`pd.DataFrame` or `Mapping`): columns `label, suggested_label, noise_score` and, if it has it,
            `times_seen`.
        payload (`Mapping`): what the script starts from.
        expected (`float`, *optional*): how many of the label issues in the payload are expected to be wrong.
    """
    names = list(map(str, summary["class_names"]))
    num_samples, likely = len(table["noise_score"]), probably_wrong(table)
    given, suggested, score = (np.asarray(table[name]) for name in ("label", "suggested_label", "noise_score"))
    seen = np.asarray(table["times_seen"]) > 0 if "times_seen" in table else np.ones(num_samples, bool)
    if not seen.all():  # of the others nothing is known
        given, suggested, score = given[seen], suggested[seen], score[seen]
    template, style, script = page_parts()
    low, high = summary["noise_rate_interval"]
    return template.render(
        source=summary.get("source") or "",
        percent=_percent,
        rate=summary["noise_rate"],
        caution=summary.get("caution"),  # audits of earlier versions have none
        low=low,
        high=high,
        num_samples=num_samples,
        num_classes=len(names),
        num_likely=int(likely.sum()),
        expected_likely=float(np.asarray(table["noise_score"])[likely].sum()),
        expected=expected,
        found=_found(found or {}),
        defects=summary.get("check") or {},
        matrix=_matrix(summary, names),
        worst=_worst_classes(given, score, names),
        pairs=_pairs(given, suggested, score, names),
        histogram=_histogram(score),
        curves=_curves(curves),
        provenance=summary.get("provenance", ""),
        run=str(run) if run is not None else "RUN",
        served=bool(payload.get("served")),
        payload=payload,
        style=_Trusted(style),
        script=_Trusted(script),
        script_hash=script_hash(),
    )


@cache
def page_parts() -> tuple[Template, str, str]:
    """The template of the page, its style sheet and its script."""
    template, style, script = (
        Path(__file__).with_name(name).read_text("utf-8") for name in ("report.html.jinja", "report.css", "report.js")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template), style, script


def script_hash() -> str:
    """Base64 of the SHA-256 of the page's script, for its content policy."""
    return base64.b64encode(hashlib.sha256(page_parts()[2].encode()).digest()).decode()


class _Trusted(str):
    """Text of our own that is not escaped."""

    def __html__(self):
        return str(self)


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.995 else f"{100 * share:.0f} %"


def score_text(score: float, log_odds: float | None = None) -> str:
    """A probability in per cent with as many digits as tell it from certainty: "97 %", "99.97 %".

    Args:
        score (`float`): in [0, 1].
        log_odds (`float`, *optional*): log(score / (1 - score)), which has digits left where the score is 1.
    """
    doubt = 1 - score
    if log_odds is not None and math.isfinite(log_odds):
        doubt = 1 / (1 + math.exp(min(log_odds, 700)))
    if doubt < 1e-6:
        return "> 99.9999 %"
    if doubt < 0.01:
        digits = max(1, math.ceil(-math.log10(doubt)) - 2)
        return f"{100 * (1 - doubt):.{digits}f} %"
    if score < 1e-4:
        return "< 0.01 %"
    return f"{100 * score:.2g} %" if score < 0.1 else f"{100 * score:.0f} %"


def row_reasons(row: Mapping, given: str, suggested: str) -> list[str]:
    """Why a label is an issue, in words.

    Args:
        row (`Mapping`): of the table; columns that it does not have, or that are nan, give no reason.
        given, suggested (`str`): names of the two classes.
    """
    reasons = []
    own, other = _number(row.get("given_probability")), _number(row.get("suggested_probability"))
    if own is not None and other is not None:
        verb = "looks like" if other >= own else "might be"
        reasons.append(f"{verb} {suggested} ({_probability(other)}); {_probability(own)} for {given}")
    agreement = _number(row.get("foreground_agreement"))
    if agreement is not None:
        reasons.append(f"its foreground alone is seen as the same class {100 * agreement:.0f} % of the time")
    if (row.get("times_seen") or 0) > 1 and row.get("last_epoch_learned") is not None:
        learned = int(row["last_epoch_learned"])
        last = f"predicted last in epoch {learned}" if learned >= 0 else "never predicted in training"
        reasons.append(f"its label was {last}")
    return reasons


def _probability(value: float) -> str:
    """With two digits, and never as if it were certain."""
    return "> 0.99" if value > 0.995 else "< 0.01" if value < 0.005 else f"{value:.2f}"


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


# -- summary ----------------------------------------------------------------------------------------------------------


def _matrix(summary: Mapping, names: list[str]) -> dict:
    matrix, interval = np.asarray(summary["transition_matrix"]), summary["transition_matrix_interval"]
    bounds = None if interval is None else np.asarray(interval)
    wrong = np.array(matrix)
    np.fill_diagonal(wrong, 0)
    shown = np.arange(len(names))
    if len(names) > MATRIX_CLASSES:
        shown = np.sort(np.argsort(-wrong.sum(1) - wrong.sum(0), kind="stable")[:MATRIX_CLASSES])
    top = max(wrong[np.ix_(shown, shown)].max(initial=0), 0.05)
    rows = []
    for true in shown:
        cells = []
        for given in shown:
            value = matrix[true, given]
            text = "·" if value < 0.005 else f"{100 * value:.0f}"
            shade = 0 if true == given else value / top
            title = f"{names[true]} labeled {names[given]}: {100 * value:.1f} %"
            if bounds is not None:
                low, high = bounds[:, true, given]
                title += f" ({100 * low:.1f} to {100 * high:.1f})"
            link = true != given and value >= 0.005
            where = {"given": int(given), "suggested": int(true), "link": link}
            cells.append({"text": text, "shade": f"{shade:.3f}", "same": true == given, "title": title, **where})
        rows.append({"name": names[true], "cells": cells})
    found = {"names": [names[i] for i in shown], "cut": len(shown) < len(names), "bounds": bounds is not None}
    return {**found, "rows": rows}


def _worst_classes(given: np.ndarray, score: np.ndarray, names: list[str]) -> list[dict]:
    shares = np.bincount(given, weights=score, minlength=len(names)) / np.maximum(
        np.bincount(given, minlength=len(names)), 1
    )
    listed = np.argsort(-shares, kind="stable")[:LISTED].tolist()
    return [
        {"name": names[label], "given": label, "text": _percent(shares[label]), "width": f"{100 * shares[label]:.1f}"}
        for label in listed
        if shares[label] > 0.001
    ]


def _pairs(given: np.ndarray, suggested: np.ndarray, score: np.ndarray, names: list[str]) -> list[dict]:
    codes, k = given.astype(np.int64) * len(names) + suggested, len(names)
    pairs = np.arange(k * k)
    if k * k > 10 * MAX_ROWS:  # more than occur
        pairs, codes = np.unique(codes, return_inverse=True)
    counts = np.bincount(codes, weights=score, minlength=len(pairs))
    listed = np.argsort(-counts, kind="stable")[:LISTED]
    return [
        {
            "ids": (int(pair // k), int(pair % k)),
            "given": names[pair // k],
            "suggested": names[pair % k],
            "text": f"{count:,.0f}",
        }
        for pair, count in zip(pairs[listed], counts[listed], strict=True)
        if count >= 0.5
    ]


def _found(found: Mapping[str, pd.DataFrame]) -> list[dict]:
    """Each kind of finding: what it is, how many, the first of them, and the file that lists all."""
    return [
        {
            "what": FINDINGS[kind],
            "count": len(rows),
            "file": f"{kind}.jsonl",
            "first": [path or f"sample {index}" for index, path in zip(rows["index"], rows["path"], strict=True)][:5],
        }
        for kind, rows in found.items()
    ]


def _histogram(score: np.ndarray) -> dict:
    counts, edges = np.histogram(score, bins=BINS, range=(0, 1))
    top, width, bars = max(counts.max(initial=0), 1), 600 / BINS, []
    for number, count in enumerate(counts):
        height = 128 * math.sqrt(count / top)
        title = f"{edges[number]:.3f} to {edges[number + 1]:.3f}: {counted(count, 'sample')}"
        x, y = 30 + width * number + 1, 140 - height
        bars.append({"x": f"{x:.1f}", "y": f"{y:.1f}", "w": f"{width - 2:.1f}", "h": f"{height:.1f}", "title": title})
    below, above = int((score < 0.1).sum()), int((score >= 0.9).sum())
    return {"bars": bars, "text": f"{counted(below, 'sample')} below 0.1, {above:,} at 0.9 or above"}


def _curves(history: Sequence[Mapping]) -> dict | None:
    last = max((entry["epoch"] for entry in history if "epoch" in entry), default=0)
    lines, texts = [], []
    for key, name, kind in CURVES:
        by_epoch: dict[float, float] = {}
        for entry in history:
            if key in entry and "epoch" in entry:
                by_epoch.setdefault(entry["epoch"], entry[key])  # a later one is another split's
        points = sorted(by_epoch.items())
        if len(points) < 2:
            continue
        placed = (f"{34 + 416 * epoch / last:.1f},{160 - 150 * min(max(value, 0), 1):.1f}" for epoch, value in points)
        lines.append({"name": name, "kind": kind, "points": " ".join(placed)})
        texts.append(f"{name} ends at {100 * points[-1][1]:.0f} %")
    return {"lines": lines, "text": "; ".join(texts), "last": f"{last:g}"} if lines else None


# -- rows of the file -------------------------------------------------------------------------------------------------


def _payload(
    table: pd.DataFrame, summary: Mapping, evidence: Sequence[Evidence], decided: set[int], max_bytes: int
) -> dict:
    names = list(map(str, summary["class_names"]))
    before = table["index"].isin(decided).to_numpy()
    issue = probably_wrong(table) & ~before
    order = np.concatenate([np.flatnonzero(~before), np.flatnonzero(before)])
    shown = table.iloc[order[: max(MAX_ROWS, len(evidence))]].to_dict("records")
    root = _common_folder(row["path"] for row in shown)
    side = picture_side(len(evidence), max_bytes)
    items, left = [], max_bytes
    for number, row in enumerate(shown):
        item = _row(row, names, root, row["index"] in decided)
        if number < len(evidence):  # what can be decided here
            item["issue"] = bool(issue[order[number]])
            left -= _add_evidence(item, evidence[number], side, left)
        items.append(item)
    elsewhere = order[len(evidence) :][issue[order[len(evidence) :]]]
    return {
        "served": False,
        "id": _storage_id(table, summary),
        "classes": names,
        "total": len(table),
        "elsewhere": {"issues": len(elsewhere), "expected": float(table["noise_score"].iloc[elsewhere].sum())},
        "items": items,
        "maps": any("maps" in item for item in items),
    }


def _storage_id(table: pd.DataFrame, summary: Mapping) -> str:
    """What a browser keeps annotations under. Ids and labels do not tell one image from another that came when it was
    deleted, so names of files are a part of it; their folders may move."""
    paths = table["path"].to_numpy()[np.argsort(table["index"].to_numpy())]
    names = "/".join([path.rpartition("/")[2] for path in paths])
    return f"{summary['dataset_fingerprint']}-{hashlib.sha256(names.encode()).hexdigest()[:16]}"


def picture_side(count: int, max_bytes: int = MAX_BYTES) -> int:
    """The side in pixels with which so many pictures stay within a budget, 320 at least."""
    return next((side for side in SIDES if count * BYTES_PER_PIXEL * side**2 <= max_bytes), SIDES[-1])


def _common_folder(paths) -> str:
    paths = [str(path) for path in paths if path]
    return os.path.commonprefix([min(paths), max(paths)]).rpartition("/")[0] + "/" if paths else ""


def _row(row: Mapping, names: list[str], root: str, before: bool) -> dict:
    path = str(row["path"] or "").removeprefix(root)
    return {
        "id": int(row["index"]),
        "given": int(row["label"]),
        "suggested": int(row["suggested_label"]),
        "score": round(float(row["noise_score"]), 6),
        "certainty": score_text(row["noise_score"], row.get("log_odds")),
        "why": row_reasons(row, names[row["label"]], names[row["suggested_label"]]),
        "path": path,
        "folder": os.path.dirname(path),
        "before": before,
        "issue": False,
        "image": None,
        "reason": "not stored in this file",
    }


def _add_evidence(item: dict, shown: Evidence, side: int, left: int) -> int:
    """Put a picture and maps into a row; returns their bytes."""
    item["reason"] = shown.reason or item["reason"]
    if shown.image is None:
        return 0
    image = picture_uri(shown.image, side)
    if len(image) > left:
        return left  # nor any after it: the budget is spent
    item.update(image=image, tiny=max(shown.image.size) < TINY, reason="")
    if shown.given_map is not None and shown.suggested_map is not None:
        item["maps"] = [map_values(shown.given_map), map_values(shown.suggested_map)]
    return len(image)


def encode_picture(image: Image.Image, side: int) -> tuple[bytes, str]:
    """A picture within a square of so many pixels, and its media type: WebP, or PNG where pixels are to be seen."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind, options = ("png", {"optimize": True}) if max(image.size) < TINY else ("webp", {"quality": 80, "method": 3})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue(), f"image/{kind}"


def picture_uri(image: Image.Image, side: int) -> str:
    content, kind = encode_picture(image, side)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def map_values(values: np.ndarray) -> dict:
    """An activation map with 8 bits a cell, `shape` and base64 `values`."""
    quantised = np.rint(255 * np.clip(np.nan_to_num(values), 0, 1)).astype(np.uint8)
    return {"shape": list(quantised.shape), "values": base64.b64encode(quantised.tobytes()).decode()}
