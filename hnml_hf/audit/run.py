"""A finished run scored: its table, its summary and the report."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from ..data.decoding import MAX_PIXELS
from ..data.schema import image_paths
from .dynamics import AUDIT_FOLDER
from .findings import findings, write_findings
from .gallery import MAX_ISSUES, collect_evidence, num_issues
from .report import render_report
from .review.lineage import decided_samples
from .table import check_unchanged, noise_scores, write_audit


REPORT_FILE = "report.html"


def audit_run(
    output_dir: str | os.PathLike,
    records: np.ndarray,
    dataset: Dataset,
    *,
    transform: Callable,
    model=None,
    cross_validated: np.ndarray | None = None,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    curves: Sequence[Mapping] = (),
    max_issues: int = MAX_ISSUES,
    batch_size: int = 64,
    max_pixels: int = MAX_PIXELS,
    **facts,
) -> pd.DataFrame:
    """Score, then write table, summary and report into `<output_dir>/_audit`.

    Args:
        output_dir (`str` or `Path`): of the run.
        records (structured `np.ndarray` of shape `(n,)`): of [`run_dynamics`] or [`score_model`].
        dataset (`datasets.Dataset`): that the records are of, rows in any order.
        transform, model, crop_pct, crop_mode: see [`~hnml_hf.audit.gallery.collect_evidence`].
        cross_validated (structured `np.ndarray`, *optional*): see [`noise_scores`].
        curves (`Sequence[Mapping]`): the trainer's `log_history`, for the report.
        max_issues (`int`): how many the report shows at most.
        batch_size (`int`): images in a forward pass for their maps.
        max_pixels (`int`): a larger image is not decoded.
        facts: further entries of the summary, as `source` and `provenance`.

    Returns:
        `pd.DataFrame`: of [`noise_scores`], with `path` filled in.

    Raises:
        ValueError: if the dataset is not the one that the records are of.

    Example:

        _, evaluation = create_transforms(model.config.pretrained_cfg)
        table = audit_run("outputs/run", records, dataset, transform=evaluation, model=model)
    """
    table = noise_scores(records, dataset.features["label"].names, cross_validated=cross_validated, **facts)
    check_unchanged(table, dataset)
    table["path"] = image_paths(dataset)
    how = {"transform": transform, "model": model, "crop_pct": crop_pct, "crop_mode": crop_mode}
    how |= {"batch_size": batch_size, "max_pixels": max_pixels}
    write_report(output_dir, table, dataset, curves=curves, max_issues=max_issues, **how)
    return table


def write_report(
    output_dir: str | os.PathLike,
    table: pd.DataFrame,
    dataset: Dataset,
    *,
    transform: Callable | None = None,
    model=None,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    curves: Sequence[Mapping] = (),
    max_issues: int = MAX_ISSUES,
    batch_size: int = 64,
    max_pixels: int = MAX_PIXELS,
    found: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Write a table of noise scores, its summary, the lists of what else was found and the report with pictures into
    `<output_dir>/_audit`.

    Arguments as in [`audit_run`]; `transform` is for maps, and without a model none is needed. `found` are the lists;
    default: those of [`~hnml_hf.audit.findings.findings`].
    """
    folder = write_audit(Path(output_dir) / AUDIT_FOLDER, table)
    decided = decided_samples(output_dir, table, table.attrs["class_names"])
    undecided = table[~table["index"].isin(decided)]
    issues = undecided.nsmallest(num_issues(undecided, max_issues), "rank")
    evidence = collect_evidence(
        dataset,
        issues,
        transform=transform,
        model=model,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        batch_size=batch_size,
        max_pixels=max_pixels,
    )
    found = findings(table) if found is None else found
    write_findings(folder, found)
    render_report(
        table,
        table.attrs,
        folder / REPORT_FILE,
        evidence=evidence,
        curves=curves,
        decided=decided,
        found=found,
        run=output_dir,
    )
    return folder
