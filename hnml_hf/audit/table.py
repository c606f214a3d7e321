"""The table of noise scores: a row per training sample and a summary; its files, and the dataset that it is of."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..common.atomic import atomic_write
from ..common.finite import NonFiniteError
from ..common.words import counted
from ..data.schema import column, labels_fingerprint
from .dynamics import AUDIT_FOLDER
from .noise_model import FEWEST_HELD_OUT, doubt_of_rate, estimate_noise


TABLE_FILE, SUMMARY_FILE, MATRIX_FILE = "noise_scores.parquet", "summary.json", "transition_matrix.npy"
FORMAT = "hnml_hf noise audit 1"


class SharedMatrix(np.ndarray):
    """A read-only matrix in `attrs`, which pandas copies with every step otherwise: 100 MB with 5,000 classes."""

    def __deepcopy__(self, memo):
        return self


def _shared(matrix: np.ndarray) -> np.ndarray:
    matrix.flags.writeable = False
    return matrix.view(SharedMatrix)


def noise_scores(
    records: np.ndarray,
    class_names: Sequence[str],
    *,
    cross_validated: np.ndarray | None = None,
    seed: int = 0,
    **facts,
) -> pd.DataFrame:
    """Estimate for every sample the probability that its label is wrong, and how noisy the labels are as a whole.

    Two readings of the same run are compared, the teacher's running probabilities and the student's predictions, and a
    transition matrix is fitted to the given labels: formulas and sources are in
    [`~hnml_hf.audit.noise_model.estimate_noise`].

    Args:
        records (structured `np.ndarray` of shape `(n,)`): of [`TrainingDynamics`].
        class_names (`Sequence[str]`): k names in id order.
        cross_validated (structured `np.ndarray` of shape `(m,)`, *optional*): of [`judge_records`], by the
            judge that the run started from: rate and matrix are taken from it, and it has half a say in the scores.
        seed (`int`): of the resampling behind the ranges.
        facts: further entries of the summary, as `source` and `provenance`.

    Returns:
        `pd.DataFrame`: `index, path` (empty until someone fills it in), `label, label_name, suggested_label,
        suggested_name, noise_score` in [0, 1], `rank` (1 = most probably wrong) and the parts `given_probability,
        suggested_probability, margin, foreground_agreement` (nan without a mask level), `times_seen,
        first_epoch_learned, last_epoch_learned` (-1 = never), in the order of `index`. Its `attrs` hold the summary:
        `noise_rate` and `noise_rate_interval` (its range), `caution` (why the rate tells nothing, or `None`),
        `transition_matrix` with `[i, j] = P(given j | true i)` and its range `(low, high)`, `class_names`,
        `dataset_fingerprint` and each of `facts`. With more than 1,000 classes the matrix is a read-only array of
        float32 instead of a list, and its range `None`. A sample that was never seen has the estimated rate as its
        score.

    Raises:
        ValueError: if no sample was seen, ids are not unique, a label is none of the classes, or `cross_validated` is
            of other samples or labels.

    Example:

        table = noise_scores(records, dataset.features["label"].names)
        table[table.noise_score > 0.5][["index", "label_name", "suggested_name"]]
    """
    num_labels, labels = len(class_names), records["label"].astype(np.int64)
    _check_records(records, labels, num_labels)
    if cross_validated is not None:
        _check_same_labels(records, cross_validated)
        cross_validated = cross_validated[cross_validated["times_seen"] > 0]
    seen = records["times_seen"] > 0
    estimate = estimate_noise(records[seen], num_labels, cross_validated=cross_validated, seed=seed)

    suggested, suggested_probability = labels.copy(), np.full(len(records), np.nan)
    suggested[seen], suggested_probability[seen] = estimate.suggested_label, estimate.suggested_probability
    scores, odds = np.full(len(records), estimate.noise_rate), np.full(len(records), -np.inf)
    scores[seen], odds[seen] = estimate.scores, estimate.log_odds
    rank = np.empty(len(records), dtype=np.int64)
    rank[np.lexsort((records["index"], -odds))] = np.arange(1, len(records) + 1)
    names = np.asarray(class_names, dtype=object)
    asked = records["foreground_seen"] > 0
    table = pd.DataFrame(
        {
            "index": records["index"].astype(np.int64),
            "path": [""] * len(records),
            "label": labels,
            "label_name": names[labels],
            "suggested_label": suggested,
            "suggested_name": names[suggested],
            "noise_score": scores,
            "rank": rank,
            "given_probability": np.where(seen, records["given"], np.nan).astype(np.float64),
            "suggested_probability": suggested_probability,
            "margin": np.where(seen, records["margin"], np.nan).astype(np.float64),
            "foreground_agreement": np.where(asked, records["foreground_agreement"], np.nan).astype(np.float64),
            "times_seen": records["times_seen"].astype(np.int64),
            "first_epoch_learned": records["first_learned"].astype(np.int64),
            "last_epoch_learned": records["last_learned"].astype(np.int64),
        }
    )
    matrix, interval = estimate.transition_matrix, estimate.transition_matrix_interval
    table.attrs = {
        "format": FORMAT,
        "class_names": list(map(str, class_names)),
        "num_samples": len(records),
        "noise_rate": estimate.noise_rate,
        "noise_rate_interval": estimate.noise_rate_interval,
        "transition_matrix": _shared(matrix.astype(np.float32)) if interval is None else matrix.tolist(),
        "transition_matrix_interval": None if interval is None else interval.tolist(),
        "inverse_temperature": estimate.inverse_temperature,
        "caution": _caution(records[seen], cross_validated),
        "dataset_fingerprint": labels_fingerprint(records["index"], labels, num_labels),
        **facts,
    }
    return table


def _caution(records: np.ndarray, cross_validated: np.ndarray | None) -> str | None:
    """Whether the noise rate tells anything, by predictions of labels that were not learned, if there are enough."""
    unlearned = records[records["held_out"]] if cross_validated is None else cross_validated
    asked = unlearned if len(unlearned) >= FEWEST_HELD_OUT else records
    return doubt_of_rate(float((asked["margin"] > 0).mean()), asked["label"].astype(np.int64))


def _check_records(records: np.ndarray, labels: np.ndarray, num_labels: int):
    if len(records) == 0 or not (records["times_seen"] > 0).any():
        raise ValueError("The run has scores of no sample: not one was seen in training. Train for at least one step.")
    seen = records[records["times_seen"] > 0]
    bad = [name for name in ("given", "top_probabilities", "margin") if not np.isfinite(seen[name]).all()]
    if bad:
        raise NonFiniteError(f"The records of the run have a `{bad[0]}` that is not finite. Train it again.")
    index = np.sort(records["index"])
    twins = index[1:][index[1:] == index[:-1]]
    if len(twins):
        raise ValueError(f"Sample id {twins[0]} occurs more than once; ids must be unique.")
    bad = (labels < 0) | (labels >= num_labels)
    if bad.any():
        raise ValueError(
            f"Sample {records['index'][bad][0]} has label {labels[bad][0]}, but the model knows "
            f"{counted(num_labels, 'class')}."
        )


def _check_same_labels(records: np.ndarray, cross_validated: np.ndarray):
    rows = np.searchsorted(records["index"], cross_validated["index"]).clip(max=len(records) - 1)
    same = records[["index", "label"]][rows] == cross_validated[["index", "label"]]
    if cross_validated.dtype != records.dtype or not same.all():
        raise ValueError(
            "The cross-validated predictions are of other samples, labels or classes than those that the run saw. "
            "Give those of the judge that it started from, or none."
        )


def likely_columns(classes: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of the table: the likeliest classes of each sample and their probabilities, both of shape `(n, t)`."""
    return {
        f"likely_{name}_{number}": values.astype(kind)
        for number, pair in enumerate(zip(classes.T, probabilities.T, strict=True), start=1)
        for name, kind, values in zip(("class", "probability"), (np.int32, np.float32), pair, strict=True)
    }


def likely_classes(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray] | None:
    """What [`likely_columns`] has written; `None` for a table without it, as of what training saw."""
    classes = [name for name in table.columns if name.startswith("likely_class_")]
    if not classes:
        return None
    probabilities = [name.replace("class", "probability") for name in classes]
    return table[classes].to_numpy(np.int64), table[probabilities].to_numpy(np.float32)


# -- files ------------------------------------------------------------------------------------------------------------


def write_audit(folder: str | os.PathLike, table: pd.DataFrame) -> Path:
    """Write `noise_scores.parquet`, with the summary in its metadata, and `summary.json` into a folder; returns it.

    A transition matrix that is an array, since it has more than 1,000 classes, becomes `transition_matrix.npy` beside
    them: Arrow takes no metadata of that size.
    """
    folder, facts = Path(folder), table.attrs
    if isinstance(facts["transition_matrix"], np.ndarray):
        with atomic_write(folder / MATRIX_FILE) as unfinished:
            np.save(unfinished, facts["transition_matrix"], allow_pickle=False)
        facts = {**facts, "transition_matrix": MATRIX_FILE}
    summary = json.dumps(facts)
    plain = table.copy(deep=False)
    plain.attrs = {}
    content = pa.Table.from_pandas(plain, preserve_index=False)
    content = content.replace_schema_metadata({**(content.schema.metadata or {}), b"noise_audit": summary.encode()})
    with atomic_write(folder / TABLE_FILE) as unfinished:
        pq.write_table(content, unfinished)
    with atomic_write(folder / SUMMARY_FILE) as unfinished:
        unfinished.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return folder


def load_audit(path: str | os.PathLike) -> pd.DataFrame:
    """The scores of a run.

    Args:
        path (`str` or `Path`): a run's `output_dir`, its `_audit` folder, or the parquet file.

    Returns:
        `pd.DataFrame`: as [`noise_scores`] made it; the summary is in `attrs`.

    Raises:
        FileNotFoundError: if there are no scores, or the matrix that belongs to them is not beside them.
        ValueError: if a file holds something else.

    Example:

        table = load_audit("outputs/quickstart")
        table.attrs["noise_rate"], table.nsmallest(20, "rank")["path"]
    """
    path = Path(path)
    for file in (path, path / TABLE_FILE, path / AUDIT_FOLDER / TABLE_FILE):
        if file.is_file():
            break
    else:
        raise FileNotFoundError(
            f"{path} has no `{AUDIT_FOLDER}/{TABLE_FILE}`. `hnml audit DATA` writes it, and a training at its end; "
            "for a run that has only training dynamics `hnml audit RUN`."
        )
    try:
        content = pq.read_table(file)
        table = content.to_pandas()
        table.attrs = json.loads(content.schema.metadata[b"noise_audit"])
        if "sharpness" in table.attrs:  # of an earlier version
            table.attrs["inverse_temperature"] = table.attrs.pop("sharpness")
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a table of noise scores ({type(error).__name__}: {error}).") from error
    if table.attrs.get("transition_matrix") == MATRIX_FILE:
        matrix = file.with_name(MATRIX_FILE)
        if not matrix.is_file():
            raise FileNotFoundError(f"{matrix} belongs to {file} and is not there; keep them in one folder.")
        try:
            table.attrs["transition_matrix"] = _shared(np.load(matrix, allow_pickle=False))
        except (ValueError, EOFError, TokenError) as error:  # NumPy takes the header for Python
            raise ValueError(f"{matrix} is not a transition matrix ({error}).") from error
    return table


# -- the dataset ------------------------------------------------------------------------------------------------------


def check_unchanged(table: pd.DataFrame, dataset: Dataset):
    """Raise `ValueError` if ids, given labels or classes of a dataset are not those that were scored."""
    index, labels = column(dataset, "index"), column(dataset, "label")
    names, known = dataset.features["label"].names, table.attrs["class_names"]
    if labels_fingerprint(index, labels, len(names)) == table.attrs["dataset_fingerprint"] and names == known:
        return
    if names != known:
        what = f"its classes are {names[:5]}, scored were {known[:5]}"
    else:
        what = changed_rows(table["index"], table["label"], dataset)
    raise ValueError(
        f"The dataset has changed since it was scored: {what}. Load it as the run did (columns, noise, seed, split), "
        "or score it anew."
    )


def changed_rows(index: np.ndarray | pd.Series, labels: np.ndarray | pd.Series, dataset: Dataset) -> str:
    """How the rows of a dataset differ from those that were scored; empty if ids and given labels are the same.

    Args:
        index, labels (`np.ndarray` or `pd.Series` of shape `(n,)`): sample ids and given labels that were scored.
        dataset (`datasets.Dataset`): with the columns `index` and `label`.
    """
    scored = pd.Series(np.asarray(labels), index=np.asarray(index))
    there = pd.Series(column(dataset, "label"), index=column(dataset, "index"))
    known = there[there.index.isin(scored.index)]
    lost, new = len(scored.index.difference(there.index)), len(there) - len(known)
    changed = int((known != scored.reindex(known.index)).sum())
    return (
        f"scored rows that are gone: {lost}, new ones: {new}, other labels: {changed}" if lost + new + changed else ""
    )
