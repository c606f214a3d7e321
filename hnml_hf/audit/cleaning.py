"""Acting on the scores: what people and scores say of each label, and the dataset that follows."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, Value

from ..common.words import counted
from ..data.checks.exclusions import check_same_image, exclusion_rows
from ..data.files import as_name, is_plain
from ..data.schema import column
from ..data.targets import add_targets
from .findings import probably_wrong
from .review.annotations import class_ids, read_annotations, unknown_classes
from .review.lineage import DECIDED, GONE, is_decided
from .table import check_unchanged, likely_classes


logger = logging.getLogger(__name__)


HOW = ("drop", "relabel", "weight", "posterior")
OTHER_LIST = "Was the list made for another dataset, or another version of it?"


def load_annotations(path: str | os.PathLike, table: pd.DataFrame) -> pd.DataFrame:
    """Annotations of one person, as [`~hnml_hf.audit.review.read_annotations`] reads them, by `index`.

    Args:
        path (`str` or `Path`): CSV that was downloaded from the report, or an annotation log.
        table (`pd.DataFrame`): the scores that the report showed.

    Returns:
        `pd.DataFrame`: `annotation` and `new_label`, by `index`; of a label that is right or unsure the given one, of
        one that is wrong without a class -1.

    Raises:
        ValueError: naming file and line, on ids that were not scored, repeated ids, other annotations or unknown
            classes.

    Example:

        annotations = load_annotations("annotations.csv", load_audit("outputs/quickstart"))
    """
    found = read_annotations(path, table)
    twice = found["index"][found["index"].duplicated()]
    if len(twice):
        raise ValueError(f"{path}: sample id {twice.iloc[0]} is annotated by two people; merge them first.")
    strange = found[(found["annotation"] == "wrong") & (found["new_label"] < 0) & (found["new_label_name"] != "")]
    if len(strange):
        raise ValueError(f"{path}: `{strange['new_label_name'].iloc[0]}` is none of the classes.")
    given = table.set_index("index")["label"].reindex(found["index"]).to_numpy()
    label = np.where(found["annotation"] == "wrong", found["new_label"], given)
    return pd.DataFrame({"annotation": found["annotation"].to_numpy(), "new_label": label}, index=found["index"])


def load_excluded(paths: Iterable[str | os.PathLike], table: pd.DataFrame, before: Collection[int] = ()) -> set[int]:
    """Ids of the training rows that exclusion lists name.

    Args:
        paths (`Iterable[str | Path]`): lists of `hnml audit` or `hnml check`.
        table (`pd.DataFrame`): the scores.
        before (`Collection[int]`): ids of rows that were left out before the scores were made.

    Raises:
        ValueError: naming file and line, on rows that were not scored, or with another image.
    """
    known, excluded = dict(zip(table["index"], table["path"], strict=True)), set()
    for path in paths:
        others: Counter[str] = Counter()
        for row in exclusion_rows(path):
            index, image, place = row["index"], row["path"], f"{path}:{row['line']}"
            if row["split"] != "train":
                others[row["split"]] += 1
            elif index not in known and index not in before:
                raise ValueError(f"{place}: sample {index} was not scored. {OTHER_LIST}")
            else:
                check_same_image(place, index, image, known.get(index, ""))
                excluded.add(index)
        for split, count in others.items():
            logger.warning(
                f"{path}: {counted(count, 'row')} of {split!r} stay; cleaning leaves out training rows alone."
            )
    return excluded


def plan_cleaning(
    table: pd.DataFrame,
    *,
    annotations: pd.DataFrame | None = None,
    how: str | None = None,
    threshold: float = 0.5,
    excluded: Collection[int] | None = None,
    add_classes: Sequence[str] = (),
    earlier: Mapping[int, Mapping] | None = None,
) -> pd.DataFrame:
    """What becomes of each label that was scored.

    Annotations go first: `wrong` takes the new class, and drops the row if nobody knows it; `right` and `unsure` keep
    the given one; so do those of earlier rounds. On the others `how` acts where the score reaches the threshold. A
    sample that was not judged is no issue: it stays, `unjudged`, with the weight and the targets of the average. What
    people could not tell, or dispute (`unsure` after a merge), keeps row and label, but nobody vouches for the label:
    its weight and its targets are those of the scores.

    Whether an image is left out is another question than which class it has: a row of `excluded` goes whatever people
    said of its label, which stays in the plan.

    Args:
        table (`pd.DataFrame`): scores, of [`audit_run`] or [`load_audit`].
        annotations (`pd.DataFrame`, *optional*): of [`~hnml_hf.audit.review.merge_annotations`], by `index`.
        how (`str`, *optional*): `drop` the row, `relabel` it with the suggestion, `weight`: change no row and weigh it
            by 1 - score, or `posterior`: change no row and give it the probabilities of its classes as targets.
            Without it only annotations count.
        threshold (`float`): in [0, 1].
        excluded (`Collection[int]`, *optional*): ids of rows to leave out, of [`load_excluded`].
        add_classes (`Sequence[str]`): classes that annotations may name though the dataset has no such class.
        earlier (`Mapping[int, Mapping]`, *optional*): lineage of an earlier round by sample id.

    Returns:
        `pd.DataFrame`: in the order of the table `index`, `path`, `label` (id) and `label_name`, `label_scored` (the
        given one, name), `label_original` (the given one of the first of several rounds), `label_score`,
        `label_action` (kept, unjudged, annotated, relabeled, dropped, excluded), `annotation`, `annotator`, `weight`,
        `suggested_label`; and the likeliest classes, if the table has kept them.
        `attrs["class_names"]` are all classes.

    Raises:
        ValueError: on another `how`, nothing to do, a class that the dataset does not have, or a new one whose name
            differs from another only in upper and lower case.
    """
    if how not in (None, *HOW):
        raise ValueError(f"`how={how!r}` is none of {', '.join(HOW)}.")
    if how is None and annotations is None and excluded is None:
        raise ValueError(
            f"Nothing to do: say `how` to clean ({', '.join(HOW)}), or give annotations or rows to exclude."
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold={threshold}` must be between 0 and 1.")
    names = list(map(str, table.attrs["class_names"]))
    added = list(dict.fromkeys(map(as_name, add_classes)))
    taken = sorted(set(added) & set(map(as_name, names)))
    if taken:
        raise ValueError(f"The dataset has the class {', '.join(taken)} already.")
    odd = [name for name in added if not name or not is_plain(name)]
    if odd:
        raise ValueError(f"{odd[0]!r} is no name of a class: it is empty, or has control characters.")
    lower = {as_name(name).lower(): name for name in names}
    for name in added:
        twin = lower.setdefault(name.lower(), name)
        if twin != name:
            raise ValueError(
                f"The new class `{name}` differs from `{twin}` only in upper and lower case, and many disks have one "
                "folder for both: choose another name, or write the same one in `--add_classes` and the annotations."
            )
    names += added
    plan = pd.DataFrame(
        {
            "index": table["index"].to_numpy(),
            "path": table["path"].to_numpy(),
            "label": table["label"].to_numpy().copy(),
            "label_scored": table["label_name"].astype(object).to_numpy(),
            "label_original": table["label_name"].astype(object).to_numpy(),
            "label_score": table["noise_score"].to_numpy(),
            "label_action": np.full(len(table), "kept", dtype=object),
            "annotation": "",
            "annotator": "",
            "weight": 1 - table["noise_score"].to_numpy(),
            "suggested_label": table["suggested_label"].to_numpy(),
            **{name: table[name].to_numpy() for name in table.columns if name.startswith("likely_")},
        }
    )
    plan = plan.astype({"annotation": object, "annotator": object}).copy()
    issue = probably_wrong(table, threshold)
    before = plan["index"].map(lambda index: (earlier or {}).get(index, {}))
    lineage = before.map(lambda row: row.get("label_original", "")).to_numpy()
    plan.loc[lineage != "", "label_original"] = lineage[lineage != ""]
    settled = np.array(
        [is_decided(row, name) for row, name in zip(before, plan["label_scored"], strict=True)], dtype=bool
    )
    for name in ("annotation", "annotator"):
        plan.loc[settled, name] = before[settled].map(lambda row, name=name: row[name])
    if annotations is not None:
        _annotate(plan, annotations, names)
        settled = settled | plan["index"].isin(annotations.index).to_numpy()
    decided = plan["annotation"].isin(DECIDED)
    plan.loc[decided, "label_action"], plan.loc[decided, "weight"] = "annotated", 1.0
    if annotations is not None:
        plan.loc[plan["index"].isin(annotations.index[_unnamed(annotations)]), "label_action"] = "dropped"
    acts = issue & ~settled
    if how == "relabel":
        plan.loc[acts, "label"] = plan.loc[acts, "suggested_label"]
        plan.loc[acts, "label_action"] = "relabeled"
    elif how == "drop":
        plan.loc[acts, "label_action"] = "dropped"
    unjudged = (table["times_seen"].to_numpy() == 0) & (plan["label_action"] == "kept").to_numpy()
    plan.loc[unjudged, "label_action"] = "unjudged"
    plan.loc[plan["index"].isin(list(excluded or ())), "label_action"] = "excluded"
    plan["label_name"] = np.asarray(names, dtype=object)[plan["label"]]
    plan.attrs = {"class_names": names, "how": how}
    return plan


def plan_targets(plan: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The classes of each row of a plan and their probabilities, both of shape `(n, t)`; the label alone where people
    have decided. Of a table that has not kept the likeliest classes, the given and the suggested one."""
    num_classes, label = len(plan.attrs["class_names"]), plan["label"].to_numpy()
    found = likely_classes(plan)
    if found is None:
        suggested, score = plan["suggested_label"].to_numpy(), plan["label_score"].to_numpy()
        score = np.where(label == suggested, 0, score)
        other = np.where(label == suggested, (label + 1) % num_classes, suggested)
        found = np.stack([label, other], axis=1), np.stack([1 - score, score], axis=1)
    classes, probabilities = (values.copy() for values in found)
    decided = (plan["label_action"] == "annotated").to_numpy()
    classes[decided] = (label[decided, None] + np.arange(classes.shape[1])) % num_classes
    probabilities[decided] = np.eye(classes.shape[1])[0]
    return classes, probabilities


def _unnamed(annotations: pd.DataFrame) -> pd.Series:
    """Whether a label is wrong and its true class unknown."""
    return (annotations["annotation"] == "wrong") & (annotations["new_label_name"] == "")


def _annotate(plan: pd.DataFrame, annotations: pd.DataFrame, names: list[str]):
    """Put annotations into a plan."""
    ids = class_ids(names)
    wrong = annotations[(annotations["annotation"] == "wrong") & ~_unnamed(annotations)]
    wrong = wrong.assign(new_label_name=wrong["new_label_name"].map(as_name))
    if unknown := unknown_classes(wrong["new_label_name"], names):
        raise ValueError(
            f"Annotations name classes that the dataset does not have: {unknown}. Add them by `--add_classes`, or "
            f"mend the annotations. It has {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}."
        )
    at = pd.Series(np.arange(len(plan)), index=plan["index"])
    rows = at.reindex(annotations.index).to_numpy()
    if np.isnan(rows).any():
        raise ValueError(f"Sample id {annotations.index[np.isnan(rows)][0]} is not among the scored samples.")
    rows = rows.astype(np.int64)
    plan.loc[rows, "annotation"] = annotations["annotation"].to_numpy()
    plan.loc[rows, "annotator"] = annotations["annotator"].to_numpy() if "annotator" in annotations else ""
    plan.loc[at[wrong.index].to_numpy(), "label"] = wrong["new_label_name"].map(ids).to_numpy()


def apply_plan(dataset: Dataset, plan: pd.DataFrame) -> Dataset:
    """The dataset that follows from a plan.

    Args:
        dataset (`datasets.Dataset`): that was scored.
        plan (`pd.DataFrame`): of [`plan_cleaning`].

    Returns:
        `datasets.Dataset`: the four features and the lineage: `original_label`, `noise_score` and `audit_action`
        (kept, unjudged, annotated, relabeled); after `weight` also `weight`, after `posterior` soft targets. `index`
        stays what it was, and `clean_label` what was known.
    """
    names, how = plan.attrs["class_names"], plan.attrs["how"]
    facts = plan.set_index("index").loc[column(dataset, "index")]
    classes = ClassLabel(names=names)
    cleaned = dataset.select_columns(["image", "label", "clean_label", "index"]).flatten_indices()
    original = column(cleaned, "label")
    cleaned = cleaned.remove_columns("label").cast_column("clean_label", classes)
    for name, values, kind in (
        ("label", facts["label"].to_numpy(), classes),
        ("original_label", original, classes),
        ("noise_score", facts["label_score"].to_numpy(), Value("float64")),
        ("audit_action", facts["label_action"].tolist(), Value("string")),
        *([("weight", facts["weight"].to_numpy(), Value("float64"))] if how == "weight" else []),
    ):
        cleaned = cleaned.add_column(name, values, feature=kind)
    if how == "posterior":
        facts.attrs = plan.attrs
        classes, probabilities = plan_targets(facts)
        cleaned = add_targets(cleaned, probabilities, classes)
    gone = facts["label_action"].isin(GONE).to_numpy()
    return cleaned.select(np.flatnonzero(~gone)) if gone.any() else cleaned


def clean_dataset(
    dataset: Dataset,
    table: pd.DataFrame,
    *,
    how: str | None = None,
    threshold: float = 0.5,
    annotations: pd.DataFrame | None = None,
) -> Dataset:
    """A dataset without the labels that are probably wrong.

    Args:
        dataset (`datasets.Dataset`): that was scored.
        table (`pd.DataFrame`): its scores, of [`audit_run`] or [`load_audit`].
        how, threshold: see [`~hnml_hf.audit.cleaning.plan_cleaning`].
        annotations (`pd.DataFrame`, *optional*): of [`load_annotations`].

    Returns:
        `datasets.Dataset`: see [`~hnml_hf.audit.cleaning.apply_plan`].

    Raises:
        ValueError: on another `how`, neither `how` nor annotations, or a dataset that has changed.

    Example:

        kept = clean_dataset(dataset, table, how="drop", threshold=0.9)
    """
    names = np.asarray(table.attrs["class_names"], dtype=object)
    if annotations is not None:
        label = annotations["new_label"].to_numpy()
        annotations = annotations.assign(new_label_name=np.where(label >= 0, names[label], ""))
    plan = plan_cleaning(table, annotations=annotations, how=how, threshold=threshold)
    check_unchanged(table, dataset)
    return apply_plan(dataset, plan)
