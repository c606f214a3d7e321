"""Deciding label issues: annotations of people, the order in which to ask them, and a server for large audits."""

from .annotations import (
    ANNOTATIONS,
    FIELDS,
    Merged,
    annotated_labels,
    apply_annotations,
    follow_annotations,
    merge_annotations,
    read_all,
    read_annotations,
    write_annotations,
)


__all__ = [
    "ANNOTATIONS",
    "FIELDS",
    "Merged",
    "annotated_labels",
    "apply_annotations",
    "follow_annotations",
    "merge_annotations",
    "read_all",
    "read_annotations",
    "write_annotations",
]
