"""What a training run saw of every sample: one fixed-size record each, found by sample id, in memory or mapped."""

import os
from pathlib import Path
from tokenize import TokenError

import numpy as np
from numpy.lib.recfunctions import rename_fields

from ..common.atomic import atomic_write, mapped_array
from ..common.words import counted


TOP_LABELS = 9  # labels that are followed beside the given one; with up to ten classes that is all of them
DECAY = 0.9  # of the running probabilities, per observation: a memory of about ten epochs
IN_MEMORY = 256 * 2**20  # bytes; a larger table lives in a mapped file
NEVER = -1
AUDIT_FOLDER = "_audit"  # of a run, in its `output_dir`
DYNAMICS_FILE = "training_dynamics.npy"
JUDGE_FILE = "judge_dynamics.npy"  # what the judge that a run started from said of the samples
# names in files of earlier versions
OLD_FILES = {
    DYNAMICS_FILE: ["sample_statistics.npy"],
    JUDGE_FILE: ["probe_dynamics.npy", "probe_statistics.npy"],
}
OLD_FIELDS = {
    "candidates": "top_probabilities",
    "candidate_labels": "top_labels",
    "given_votes": "given_frequency",
    "votes": "top_frequencies",
}


def dynamics_dtype(num_labels: int) -> np.dtype:
    """Fields of a record; `c` labels are followed beside the given one, `c = min(k - 1, 9)`."""
    top_k = (min(num_labels - 1, TOP_LABELS),)
    return np.dtype(
        [
            ("index", "<i8"),  # sample id
            ("label", "<i4"),  # given label
            ("held_out", "?"),  # whether no loss saw the label, so that no prediction has memorized it
            ("times_seen", "<i4"),  # observations, at most one an epoch
            ("last_epoch", "<i4"),  # epoch of the last observation
            ("given", "<f4"),  # running probability of the given label
            ("top_probabilities", "<f4", top_k),  # running probabilities of other labels
            ("top_labels", "<i4", top_k),  # which labels these are, -1 = free
            (
                "given_frequency",
                "<f4",
            ),  # running share of observations in which the student's prediction was the given label
            ("top_frequencies", "<f4", top_k),  # and one of the others
            ("margin", "<f4"),  # mean over all observations of p_given - max p_other
            (
                "foreground_agreement",
                "<f4",
            ),  # running share of observations in which the foreground gets the same class
            ("foreground_seen", "<i4"),  # observations with a foreground prediction
            ("first_learned", "<i4"),  # first and last epoch in which the given label was the predicted one
            ("last_learned", "<i4"),
        ]
    )


class TrainingDynamics:
    """Running averages of every training sample, of O(n) size whatever the number of classes.

    Running probabilities are bias-corrected exponential averages: after t observations the weight of the one at s
    is in proportion to 0.9^(t - s). The other labels are followed by a sketch in the manner of Space-Saving
    (Metwally, Agrawal & El Abbadi, ICDT 2005): a label that is most probable among those not followed takes the
    place of the weakest one if it is above it. With up to ten classes nothing is ever left out, and the averages
    are exact.

    Args:
        index (`np.ndarray` of shape `(n,)`): sample ids in any order.
        labels (`np.ndarray` of shape `(n,)`): given labels.
        num_labels (`int`): k, at least 2.
        path (`str` or `Path`, *optional*): where the table will be saved; one of more than `in_memory` bytes is mapped
            from a file beside it until then, which has no name and vanishes with the process.
        in_memory (`int`): that limit.
        held_out (`np.ndarray` of shape `(n,)`, bool, *optional*): which labels no loss sees; default: none.

    Raises:
        ValueError: if two samples have one id, or a label is none of the k classes.

    Example:

        dynamics = TrainingDynamics(np.arange(4), np.array([0, 1, 1, 0]), 2)
        dynamics.update(np.arange(4), np.full((4, 2), 0.5), epoch=0)  # in each epoch of any training loop
        dynamics.records["given"], dynamics.records["times_seen"]
    """

    def __init__(
        self,
        index: np.ndarray,
        labels: np.ndarray,
        num_labels: int,
        *,
        path: str | os.PathLike | None = None,
        in_memory: int = IN_MEMORY,
        held_out: np.ndarray | None = None,
    ):
        index, labels = np.asarray(index, dtype=np.int64), np.asarray(labels, dtype=np.int64)
        order = np.argsort(index, kind="stable")
        twins = np.flatnonzero(np.diff(index[order]) == 0)
        if len(twins):
            raise ValueError(
                f"Sample id {index[order][twins[0]]} occurs more than once ({counted(len(index), 'row', 'have')} "
                f"{counted(len(index) - len(twins), 'id')}). What is learned of a sample is kept by `index`: make "
                "ids unique."
            )
        if len(labels) and not (0 <= labels.min() and labels.max() < num_labels):
            bad = order[(labels[order] < 0) | (labels[order] >= num_labels)][0]
            raise ValueError(
                f"Sample {index[bad]} has label {labels[bad]}, but there are {counted(num_labels, 'class')}."
            )
        self.num_labels = num_labels
        kind = dynamics_dtype(num_labels)
        if path is not None and len(index) * kind.itemsize > in_memory:
            folder = Path(path).parent
            folder.mkdir(parents=True, exist_ok=True)
            self.records = mapped_array((len(index),), kind, folder)
        else:
            self.records = np.zeros(len(index), dtype=kind)
        self.ids = index[order]
        self.records["index"], self.records["label"] = self.ids, labels[order]
        self.records["held_out"] = False if held_out is None else np.asarray(held_out)[order]
        self.records["top_labels"] = -1
        for name in ("last_epoch", "first_learned", "last_learned"):
            self.records[name] = NEVER

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Row of each id, of shape `(b,)`. Raises `KeyError` on an id that the training set does not have."""
        rows = np.searchsorted(self.ids, index).clip(max=len(self.ids) - 1)
        unknown = self.ids[rows] != index
        if unknown.any():
            raise KeyError(f"Sample ids {index[unknown][:5].tolist()} are not in the training set.")
        return rows

    def update(
        self,
        index: np.ndarray,
        probabilities: np.ndarray,
        *,
        epoch: np.ndarray | int,
        student_predictions: np.ndarray | None = None,
        foreground: np.ndarray | None = None,
    ):
        """Take in one observation of each of `b` samples.

        A sample counts once an epoch: the copies that fill up a last uneven batch, on one process or on several, are
        left out, whether they come in one call or in two. Negative ids are padding.

        Args:
            index (`np.ndarray` of shape `(b,)`): sample ids.
            probabilities (`np.ndarray` of shape `(b, k)`): what the teacher said of the whole image.
            epoch (`np.ndarray` of shape `(b,)` or `int`): number of the epoch, from 0; from call to call it does not
                go back.
            student_predictions (`np.ndarray` of shape `(b,)`, *optional*): what the student predicted; default:
                the top class.
            foreground (`np.ndarray` of shape `(b,)`, *optional*): class predicted from the foreground alone, -1 = not
                asked.
        """
        epoch = np.broadcast_to(epoch, len(index))
        student_predictions = probabilities.argmax(-1) if student_predictions is None else student_predictions
        for number in np.unique(epoch):
            there = np.flatnonzero((epoch == number) & (index >= 0))
            _, first = np.unique(index[there], return_index=True)
            there = there[first]
            rows = self.rows(index[there])
            fresh = self.records["last_epoch"][rows] < number
            there, rows = there[fresh], rows[fresh]
            foreground_there = None if foreground is None else foreground[there]
            self._observe(
                rows,
                probabilities[there].astype(np.float32),
                int(number),
                student_predictions[there],
                foreground_there,
            )

    def _observe(self, rows, probabilities, epoch: int, student_predictions, foreground):
        records = self.records[rows]
        everyone, label = np.arange(len(rows)), records["label"]
        predicted = probabilities.argmax(-1)
        given = probabilities[everyone, label]
        records["times_seen"] += 1
        records["last_epoch"] = epoch
        seen = records["times_seen"].astype(np.float32)
        weight = (1 - DECAY) / (1 - DECAY**seen)  # of the new observation, in an average without bias towards 0
        records["given"] += weight * (given - records["given"])

        others = probabilities.copy()
        others[everyone, label] = -1
        records["margin"] += (given - others.max(-1)) / seen - records["margin"] / seen
        self._follow(records, others, weight)
        records["given_frequency"] += weight * ((student_predictions == label) - records["given_frequency"])
        records["top_frequencies"] += weight[:, None] * (
            (records["top_labels"] == student_predictions[:, None]) - records["top_frequencies"]
        )

        learned = predicted == label
        records["first_learned"] = np.where(
            learned & (records["first_learned"] == NEVER), epoch, records["first_learned"]
        )
        records["last_learned"] = np.where(learned, epoch, records["last_learned"])
        if foreground is not None:
            asked = foreground >= 0
            records["foreground_seen"] += asked
            asked_often = records["foreground_seen"].clip(min=1).astype(np.float32)
            weight = asked * (1 - DECAY) / (1 - DECAY**asked_often)
            records["foreground_agreement"] += weight * ((foreground == predicted) - records["foreground_agreement"])
        self.records[rows] = records

    def _follow(self, records: np.ndarray, others: np.ndarray, weight: np.ndarray):
        """Fold the probabilities `(b, k)` of the other labels, the given one at -1, into those that are followed."""
        labels, values = records["top_labels"], records["top_probabilities"]
        free = labels < 0
        now = np.take_along_axis(others, np.where(free, 0, labels), -1)
        values += weight[:, None] * (np.where(free, 0, now) - values)
        left = others
        np.put_along_axis(left, np.where(free, records["label"][:, None], labels), -1, axis=-1)
        everyone = np.arange(len(records))
        for _ in range(labels.shape[1]):  # a label that is not followed yet takes the weakest place
            newcomer, weakest = left.argmax(-1), np.where(labels < 0, -1, values).argmin(-1)
            value = weight * left[everyone, newcomer]
            enters = (left[everyone, newcomer] > 0) & (value > values[everyone, weakest])
            if not enters.any():
                break
            rows = everyone[enters]
            labels[rows, weakest[rows]], values[rows, weakest[rows]] = newcomer[rows], value[rows]
            records["top_frequencies"][rows, weakest[rows]] = 0
            left[rows, newcomer[rows]] = -1
        records["top_labels"], records["top_probabilities"] = labels, values

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike):
        """Write the records to a `.npy` file, by an atomic write."""
        save_dynamics(path, self.records)

    def load(self, path: str | os.PathLike):
        """Go on from saved records. Raises `ValueError` if they belong to other samples or to other labels."""
        stored = read_dynamics(path)
        if stored.dtype != self.records.dtype:
            raise ValueError(
                f"{path}: the training dynamics were kept for another number of classes than {self.num_labels}."
            )
        if not all(np.array_equal(stored[name], self.records[name]) for name in ("index", "label")):
            raise ValueError(
                f"{path}: the training dynamics belong to other sample ids or labels than this training set. Resume "
                "with the data that the run was started on."
            )
        self.records[:] = stored


def score_predictions(
    index: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    *,
    seen: np.ndarray | None = None,
    held_out: bool = False,
) -> np.ndarray:
    """Records from one prediction of each sample, by any classifier.

    Args:
        index, labels (`np.ndarray` of shape `(n,)`): sample ids and given labels.
        probabilities (`np.ndarray` of shape `(n, k)`): what the classifier says.
        seen (boolean `np.ndarray` of shape `(n,)`, *optional*): which images it could see; default: all.
        held_out (`bool`): whether no classifier had learned the label that it is asked about, as in cross-validation.

    Returns:
        structured `np.ndarray` of shape `(n,)`, in the order of `index`.
    """
    dynamics = TrainingDynamics(index, labels, probabilities.shape[-1], held_out=np.full(len(labels), held_out))
    there = slice(None) if seen is None else seen
    dynamics.update(np.asarray(index)[there], probabilities[there], epoch=0)
    return dynamics.records


def save_dynamics(path: str | os.PathLike, records: np.ndarray):
    """Write records to a `.npy` file, by an atomic write; its folder is made."""
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        np.save(file, records, allow_pickle=False)


def read_dynamics(path: str | os.PathLike) -> np.ndarray:
    """The records of a run, mapped, as a structured array of shape `(n,)` ordered by `index`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, TokenError) as error:  # NumPy takes the header for Python
        raise ValueError(f"{path} holds no training dynamics ({error}).") from error
    if isinstance(records, np.ndarray) and "candidate_labels" in (records.dtype.names or ()):
        records = rename_fields(records, OLD_FIELDS)
    if not isinstance(records, np.ndarray) or "top_labels" not in (records.dtype.names or ()):
        raise ValueError(f"{path} holds no training dynamics: it has no field `top_labels`.")
    return records


def dynamics_file(run: str | os.PathLike, name: str = DYNAMICS_FILE) -> Path:
    """Where a run keeps its training dynamics, or where one of an earlier version did; it need not be there."""
    path = Path(run) / AUDIT_FOLDER / name
    return next((found for found in map(path.with_name, [name, *OLD_FILES[name]]) if found.is_file()), path)


def run_dynamics(run: str | os.PathLike) -> np.ndarray:
    """The records that a training run left in its `output_dir`; see [`read_dynamics`].

    Args:
        run (`str` or `Path`): its `output_dir`.

    Raises:
        FileNotFoundError: if it left none.
        ValueError: if the file holds something else.
    """
    path = dynamics_file(run)
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} holds no scores of samples (no `{AUDIT_FOLDER}/{DYNAMICS_FILE}`). Name the `output_dir` of a "
            "training run that has finished, or give `--model` and `--dataset` to score any dataset with any "
            "classifier."
        )
    return read_dynamics(path)


def judge_dynamics(run: str | os.PathLike) -> np.ndarray | None:
    """What the judge that a run started from said of the samples, or None without one.

    Args:
        run (`str` or `Path`): the `output_dir`.

    Raises:
        ValueError: if the file holds something else.
    """
    path = dynamics_file(run, JUDGE_FILE)
    return read_dynamics(path) if path.is_file() else None


def save_judge_dynamics(run: str | os.PathLike, records: np.ndarray | None):
    """Leave records where [`judge_dynamics`] finds them.

    Args:
        run (`str` or `Path`): the `output_dir`.
        records (structured `np.ndarray` of shape `(m,)`): of [`judge_records`]; None takes away those that an
            earlier run left.
    """
    path = Path(run) / AUDIT_FOLDER / JUDGE_FILE
    if records is None:
        for name in (JUDGE_FILE, *OLD_FILES[JUDGE_FILE]):
            path.with_name(name).unlink(missing_ok=True)
    else:
        save_dynamics(path, records)
