"""Annotations of a dataset that has gained or lost images since: found again by the paths of their images."""

import os
from collections.abc import Iterable, Mapping

from ...common.words import counted
from ...data.files import as_name, first_few


TAKE_ALONG = (
    "Give annotations of this audit. Those of another one are put into its data by `hnml clean RUN --annotations FILE "
    "--output_dir NEW`, with the RUN that they were made for; an audit of NEW knows them without the file."
)


def is_at(known: str | None, path: str | None) -> bool:
    """Whether the image of a sample (`None`: there is none; empty: part of the dataset) may lie where a path ends."""
    return not path or known == "" or (known is not None and f"/{known}".endswith(f"/{path.lstrip('/')}"))


class Scored:
    """The samples of an audit by the paths of their images.

    Args:
        index, paths, label_names (`Iterable`): of each sample its id, path (empty: part of the dataset) and given
            class.
    """

    def __init__(self, index: Iterable[int], paths: Iterable[str], label_names: Iterable[str]):
        self._label: dict[int, str] = {}
        self._path: dict[int, str] = {}
        self._named: dict[str, list[int]] = {}
        for sample, path, label in zip(index, paths, label_names, strict=True):
            self._label[sample], self._path[sample] = as_name(label), os.path.abspath(path) if path else ""
            self._named.setdefault(os.path.basename(path), []).append(sample)

    def __str__(self):
        paths = [path for path in self._path.values() if path]
        lie = (
            f"below {os.path.commonpath([*map(os.path.dirname, paths)])}" if paths else "that are part of the dataset"
        )
        return f"{counted(len(self._path), 'image')} {lie}"

    def find(self, row: Mapping, root: str | None) -> list[int]:
        """Ids of the samples whose image is the one that was annotated; `root` as in [`match_annotations`]."""
        path, near = row["path"], self._named.get(os.path.basename(row["path"]), [])
        if root is None:
            return [sample for sample in near if is_at(self._path[sample], path)]
        full = os.path.abspath(os.path.join(root, path))
        return [sample for sample in near if self._path[sample] == full]

    def match(self, row: Mapping, where: str, root: str | None) -> int | None:
        """The id of the sample that was annotated; `None` if its image is gone, or has another label by now.

        Raises:
            ValueError: if it is not known which image was annotated.
        """
        if not row.get("path"):
            raise ValueError(
                f"{where}: the dataset has changed since, and without the path of its image nobody knows which sample "
                f"was annotated. {TAKE_ALONG}"
            )
        found = self.find(row, root)
        if len(found) > 1:
            raise ValueError(
                f"{where}: the dataset has changed since, and {counted(len(found), 'image')} could be the "
                f"`{row['path']}` that was annotated. {TAKE_ALONG}"
            )
        label = as_name(row.get("label_name") or "")
        same = [sample for sample in found if label in ("", self._label[sample])]
        return same[0] if same else None


def match_annotations(
    rows: Iterable[tuple[str, dict]], scored: Scored, *, root: str | None = None
) -> tuple[list[tuple[str, dict]], list[str]]:
    """Give annotations the ids that their samples have now.

    Args:
        rows (`Iterable[tuple[str, dict]]`): where each annotation stands, and itself, with `path` and `label_name`,
            the class that was given then.
        scored ([`Scored`]): the samples as they are now.
        root (`str`, *optional*): the folder that the paths are relative to. Without it an image is the one whose path
            ends like the annotated one's.

    Returns:
        `tuple`: the annotations of images that are still there with the same label, with their new `index`, and with
        the name of a class alone, whose id may be another one by now; and the paths of the others.

    Raises:
        ValueError: as [`Scored.match`], or if no image is there any more.
    """
    found, lost = [], []
    for where, row in rows:
        sample = scored.match(row, where, root)
        if sample is None:
            lost.append((where, row["path"]))
        else:
            by_name = {"new_label": ""} if row.get("new_label_name") else {}
            found.append((where, {**row, "index": sample, **by_name}))
    if lost and not found:
        where, path = lost[0][0], os.path.join(root or "", lost[0][1])
        raise ValueError(
            f"{where}: these annotations are of another dataset: no image that was annotated, first `{path}`, is one "
            f"of the {scored} of this audit with the same label. {TAKE_ALONG}"
        )
    return found, [path for _, path in lost]


def describe_lost(path: str | os.PathLike, lost: list[str]) -> str:
    """The warning about annotations whose images are gone or have another label."""
    return (
        f"{path}: {counted(len(lost), 'annotation', 'are')} left out, since the image is gone or has another label by "
        f"now: {first_few(lost)}"
    )
