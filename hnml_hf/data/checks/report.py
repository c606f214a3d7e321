"""The report: the kinds of defects, and how it is stored and read by people."""

import json
import os

from ...common.atomic import atomic_write
from .images import IMAGE_DEFECTS


LABEL_DEFECTS = {
    "missing_label": "rows without label",
    "label_out_of_range": "labels outside the classes",
    "clean_label_out_of_range": "clean labels outside the classes (-1 = unknown)",
}
DEFECTS = {
    **IMAGE_DEFECTS,
    **LABEL_DEFECTS,
    "duplicate_index": "sample ids given twice",
    "conflicting_duplicates": "equal images with different labels in a split",
    "split_overlap": "images that occur in a training and in an evaluation split",
    "class_sets": "classes that differ between splits",
    "file_without_row": "image files without row",
    "loading": "problems that keep the dataset from being loaded",
}
NOTES = {
    "harmless_duplicates": "equal images with the same label in a split",
    "absent_classes": "classes of the training split that another split has no image of",
    "noisy_evaluation_labels": "evaluation splits whose labels are known to be wrong in places",
}


def empty_report() -> dict:
    """A report without splits and findings."""
    return {
        "format": "hnml_hf audit 1",
        "num_defects": 0,
        "splits": {},
        "defects": {kind: [] for kind in DEFECTS},
        "notes": {kind: [] for kind in NOTES},
    }


def save_report(path: str | os.PathLike, report: dict) -> None:
    """Write the report as JSON. Bytes of a file name that are no UTF-8 are escaped."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def format_report(report: dict) -> str:
    """The report as a table to read, with the first example of each kind of defect."""
    lines = [f"{'split':<16}{'rows':>10}{'decoded':>10}{'classes':>9}{'class sizes':>18}  widths x heights, modes"]
    for name, split in report["splits"].items():
        counts = list(split["class_counts"].values())
        present = [count for count in counts if count]
        sizes = " .. ".join("x".join(map(str, size)) for size in split["sizes"].values() if size)
        modes = ", ".join(f"{mode} {count:,}" for mode, count in split["modes"].items())
        spread = f"{min(present):,} .. {max(present):,}" if present else "-"
        lines.append(
            f"{_printable(name):<16}{split['num_rows']:>10,}{split['num_decoded']:>10,}"
            f"{f'{len(present)}/{len(counts)}':>9}{spread:>18}  {sizes}; {modes}"
        )
    for title, kinds in (("defects", DEFECTS), ("notes", NOTES)):
        found = {kind: entries for kind, entries in report[title].items() if entries}
        lines += ["", f"{title}: {'' if found else 'none'}"]
        for kind, entries in found.items():
            lines.append(f"{len(entries):>10,}  {kind}: {kinds[kind]}; first: {_example(entries[0])}")
    return "\n".join(lines)


def _example(entry: dict) -> str:
    if "rows" in entry:
        return ", ".join(_example(row) for row in entry["rows"][:3])
    if "classes" in entry:
        return _printable(
            f"{' / '.join(entry['splits'])}: {entry['reason']} {', '.join(entry['classes'][:5])}".strip()
        )
    if "known" in entry:
        return f"{_printable(entry['split'])}: {entry['wrong']} of {entry['known']}"
    parts = [f"{entry['split']} index {entry['index']}"] if "index" in entry else []
    parts += [entry[name] for name in ("path", "reason") if entry.get(name)]
    if "label" in entry and "reason" not in entry:
        parts.append(f"label {entry['label']}")
    return _printable(" ".join(parts))


def _printable(text: str) -> str:
    """File and class names are data: control characters must not reach the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
