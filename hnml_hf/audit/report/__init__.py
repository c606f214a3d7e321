"""One self-contained HTML page: how noisy the labels are, and the suspects with their evidence."""

import base64
import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from PIL import Image

from ...atomic import whole_file


MATRIX_CLASSES = 20  # a larger heat map is a texture, not a table
LISTED = 8  # classes and pairs that the summary names
SIDE = 160  # pixels of a picture in the gallery
TINY = 64  # a smaller picture keeps its pixels: stored as it is, shown without smoothing
BINS = 40
CURVES = (
    ("eval_accuracy", "accuracy on held-out labels", "one"),  # of a single evaluation dataset
    ("eval_validation_accuracy", "accuracy on held-out labels", "one"),  # of several by name
    ("eval_test_accuracy", "accuracy on the test set", "four"),
    ("fit", "agreement with the given labels", "two"),
    ("memorized", "known wrong labels learned", "three"),
)


@dataclass(frozen=True)
class Evidence:
    """What can be shown of one suspect.

    Args:
        image (`PIL.Image.Image`, *optional*): the picture, as the model sees it.
        given_map, suggested_map (`np.ndarray` of shape `(h, w)`, *optional*): normalised activation maps in [0, 1] of
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
) -> Path:
    """Write the report.

    Everything that comes from the data (names, paths, reasons) is escaped; the page asks nothing of the network, and
    its content policy forbids it to.

    Args:
        table (`pd.DataFrame`): output of [`~hnml_hf.noise_scores`], a row per sample.
        summary (`Mapping`): its `attrs`.
        path (`str` or `Path`): of the HTML file.
        evidence (`Sequence[Evidence]`): of the most suspect samples, in the order of `rank`.
        curves (`Sequence[Mapping]`): a trainer's `log_history`.

    Returns:
        `Path`: the file.

    Raises:
        ValueError: if there is more evidence than there are samples.
    """
    if len(evidence) > len(table):
        raise ValueError(f"{len(evidence)} suspects come with evidence, but the table has {len(table)} rows.")
    table = table.sort_values("rank", kind="stable")
    names, seen = list(map(str, summary["class_names"])), table[table["times_seen"] > 0]  # of others nothing is known
    score = seen["noise_score"].to_numpy()
    source = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    script = Path(__file__).with_name("report.js").read_text(encoding="utf-8")
    low, high = summary["noise_rate_interval"]
    page = (
        Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        .from_string(source)
        .render(
            subtitle=f"Noise audit of {len(table):,} training labels"
            + (f" · {summary['source']}" if summary.get("source") else ""),
            percent=_percent,
            rate=summary["noise_rate"],
            low=low,
            high=high,
            num_samples=len(table),
            num_classes=len(names),
            num_likely=int((score >= 0.5).sum()),
            num_suspects=len(evidence),
            matrix=_matrix(summary, names),
            worst=_worst_classes(seen, names),
            pairs=_pairs(seen, names),
            histogram=_histogram(score),
            curves=_curves(curves),
            provenance=summary.get("provenance", ""),
            payload=_payload(table, summary, names, evidence),
            script=_Trusted(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    with whole_file(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return Path(path)


class _Trusted(str):
    """Text of our own that is not escaped."""

    def __html__(self):
        return str(self)


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.995 else f"{100 * share:.0f} %"


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
            title = f"{names[true]} labelled {names[given]}: {100 * value:.1f} %"
            if bounds is not None:
                low, high = bounds[:, true, given]
                title += f" ({100 * low:.1f} to {100 * high:.1f})"
            cells.append({"text": text, "shade": f"{shade:.3f}", "same": true == given, "title": title})
        rows.append({"name": names[true], "cells": cells})
    found = {"names": [names[i] for i in shown], "cut": len(shown) < len(names), "bounds": bounds is not None}
    return {**found, "rows": rows}


def _worst_classes(table: pd.DataFrame, names: list[str]) -> list[dict]:
    shares = table.groupby("label")["noise_score"].mean().sort_values(ascending=False, kind="stable").head(LISTED)
    shares = shares[shares > 0.001]
    return [
        {"name": names[label], "text": _percent(share), "width": f"{100 * share:.1f}"}
        for label, share in shares.items()
    ]


def _pairs(table: pd.DataFrame, names: list[str]) -> list[dict]:
    counts = table.groupby(["label", "suggested_label"])["noise_score"].sum()
    counts = counts.sort_values(ascending=False, kind="stable").head(LISTED)
    return [
        {"given": names[given], "suggested": names[suggested], "text": f"{count:,.0f}"}
        for (given, suggested), count in counts.items()
        if count >= 0.5
    ]


def _histogram(score: np.ndarray) -> dict:
    counts, edges = np.histogram(score, bins=BINS, range=(0, 1))
    top, width, bars = max(counts.max(initial=0), 1), 600 / BINS, []
    for number, count in enumerate(counts):
        height = 128 * math.sqrt(count / top)
        title = f"{edges[number]:.3f} to {edges[number + 1]:.3f}: {count:,} samples"
        x, y = 30 + width * number + 1, 140 - height
        bars.append({"x": f"{x:.1f}", "y": f"{y:.1f}", "w": f"{width - 2:.1f}", "h": f"{height:.1f}", "title": title})
    below, above = int((score < 0.1).sum()), int((score >= 0.9).sum())
    return {"bars": bars, "text": f"{below:,} samples below 0.1, {above:,} at 0.9 or above"}


def _curves(history: Sequence[Mapping]) -> dict | None:
    last = max((entry["epoch"] for entry in history if "epoch" in entry), default=0)
    lines, texts = [], []
    for key, name, kind in CURVES:
        points = {}
        for entry in history:
            if key in entry and "epoch" in entry:
                points.setdefault(entry["epoch"], entry[key])  # a later one is another split's
        points = sorted(points.items())
        if len(points) < 2:
            continue
        placed = (f"{34 + 416 * epoch / last:.1f},{160 - 150 * min(max(value, 0), 1):.1f}" for epoch, value in points)
        lines.append({"name": name, "kind": kind, "points": " ".join(placed)})
        texts.append(f"{name} ends at {100 * points[-1][1]:.0f} %")
    return {"lines": lines, "text": "; ".join(texts), "last": f"{last:g}"} if lines else None


# -- suspects ---------------------------------------------------------------------------------------------------------


def _payload(table: pd.DataFrame, summary: Mapping, names: list[str], evidence: Sequence[Evidence]) -> dict:
    rows = {
        "index": ("index", "<i8"),
        "label": ("label", "<i4"),
        "suggested": ("suggested_label", "<i4"),
        "score": ("noise_score", "<f4"),
    }
    top = table.head(len(evidence)).to_dict("records")
    return {
        "id": summary["dataset_fingerprint"],
        "classes": names,
        "rows": {key: _base64(table[name].to_numpy().astype(kind)) for key, (name, kind) in rows.items()},
        "suspects": [_suspect(row, shown) for row, shown in zip(top, evidence, strict=True)],
    }


def _suspect(row: dict, shown: Evidence) -> dict:
    facts = [
        ["teacher: given", f"{row['given_probability']:.2f}"],
        ["suggested", f"{row['suggested_probability']:.2f}"],
    ]
    if not math.isnan(row["foreground_agreement"]):
        facts.append(["foreground agrees", f"{100 * row['foreground_agreement']:.0f} %"])
    if row["times_seen"] > 1:
        learned = row["last_epoch_learned"]
        facts.append(["label last predicted in", f"epoch {learned}" if learned >= 0 else "no epoch"])
    item = {"facts": facts, "path": str(row["path"] or ""), "image": None, "reason": shown.reason}
    if shown.image is not None:
        item["image"], item["tiny"] = _data_uri(shown.image), max(shown.image.size) < TINY
        if shown.given_map is not None and shown.suggested_map is not None:
            item["given_map"], item["suggested_map"] = _map(shown.given_map), _map(shown.suggested_map)
    return item


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) < TINY else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 82}))
    return f"data:image/{kind};base64,{_base64(buffer.getvalue())}"


def _map(values: np.ndarray) -> dict:
    quantised = np.rint(255 * np.clip(np.nan_to_num(values), 0, 1)).astype(np.uint8)
    return {"shape": list(quantised.shape), "values": _base64(quantised)}


def _base64(values: np.ndarray | bytes) -> str:
    return base64.b64encode(values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()).decode()
