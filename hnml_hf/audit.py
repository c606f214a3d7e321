"""Which rows are wrong: a calibrated score for each training sample, an estimate of the noise, exports, the report."""

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Image, Value
from PIL import Image as Pillow

from .cam import normalize_cams
from .files import whole_file
from .report import Evidence, render_report
from .sample_statistics import SampleStatistics, read_records


logger = logging.getLogger(__name__)

FOLDER = "_audit"
TABLE_FILE, SUMMARY_FILE, REPORT_FILE = "noise_scores.parquet", "summary.json", "report.html"
STATISTICS_FILE = "sample_statistics.npy"
FORMAT = "hnml_hf noise audit 1"
MAX_SUSPECTS = 2_000
FEWEST_SUSPECTS = 48
SHARPEST = 20.0  # exponent at which a prediction is a vote
FIT_ON = 50_000  # samples that the channel is estimated on; all are scored
FEWEST_HELD_OUT = 100  # labels that no loss saw, for the rate to be estimated on them alone
REPLICATES = 20
MARKS = ("wrong", "right", "unsure")
FORMATS = ("csv", "cleanlab", "fiftyone", "datumaro")
READING_ERRORS = (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError)


# -- the score --------------------------------------------------------------------------------------------------------


def noise_scores(
    records: np.ndarray,
    class_names: Sequence[str],
    *,
    paths: Sequence[str] | None = None,
    seed: int = 0,
    **facts,
) -> pd.DataFrame:
    """Estimate for every sample the probability that its label is wrong, and how noisy the labels are as a whole.

    The true class c of a sample is hidden. The teacher gives pi_c = q_c^b exp(a_c) / sum, its running probabilities
    sharpened by b, and the given label y comes out of a channel T: P(c, y) = pi_c T[c, y]. T and the class offsets a
    are estimated by expectation maximisation on the given labels alone (the noise-adaptation layer of Goldberger &
    Ben-Reuven, ICLR 2017, fitted after training); the score is P(c != y | y) = 1 - pi_y T[y, y] / sum_c pi_c T[c, y].

    A network trained on noisy labels is less sure than it is right, so b must not come from the given labels. It comes
    from the student's votes: b is such that the mean of max_c pi_c equals the mean share of the most frequent vote of
    a sample. That votes of one run are as often of one opinion as they are right is the observation of Jiang et al.
    (ICLR 2022, "Assessing generalization via disagreement"); that it serves here is ours. Where the run kept labels
    from every loss, at least 100 of them, b, T and the rate are estimated on these alone, which no prediction knows by
    heart, and the log odds of all samples are shifted by one number so that their mean is that rate. Without votes (a
    single visit) b is the value of highest likelihood, which errs towards fewer wrong labels.

    Args:
        records (structured `np.ndarray` of shape `(n,)`): of [`SampleStatistics`].
        class_names (`Sequence[str]`): k names in id order.
        paths (`Sequence[str]`, *optional*): where each record's image lies.
        seed (`int`): of the resampling behind the intervals.
        facts: further entries of the summary, as `source` and `provenance`.

    Returns:
        `pd.DataFrame`: `index, path, label, label_name, suggested_label, suggested_name, noise_score` in [0, 1],
        `rank` (1 = most suspect) and the parts `given_probability, suggested_probability, margin,
        foreground_agreement` (nan without a mask level), `times_seen, first_epoch_learned, last_epoch_learned` (-1 =
        never), in the order of `index`. Its `attrs` hold the summary: `noise_rate` and `noise_rate_interval` (95 %),
        `transition_matrix` with `[i, j] = P(given j | true i)` and its interval `(low, high)`, `class_names`,
        `dataset_fingerprint`, `facts`. A sample that was never seen has the estimated rate as its score.

    Raises:
        ValueError: if no sample was seen, ids are not unique, or a label is none of the classes.
    """
    num_labels, labels = len(class_names), records["label"].astype(np.int64)
    _check_records(records, labels, num_labels)
    seen = records["times_seen"] > 0
    opinions = _Opinions(records[seen], num_labels)
    generator = np.random.default_rng(seed)
    fit_on = opinions
    if len(opinions) > FIT_ON:
        fit_on = opinions.take(generator.choice(len(opinions), FIT_ON, replace=False))
    sharpness, other_sharpness = _sharpness(fit_on)
    channel, offsets = fit_on.fit_channel(sharpness)
    log_odds, slot = opinions.log_odds(sharpness, channel, offsets)
    unknown = np.flatnonzero(records["held_out"][seen])
    if len(unknown) < FEWEST_HELD_OUT:
        rate = float(_probability(log_odds).mean())
        rates, channels = _replicates(fit_on, channel, offsets, sharpness, other_sharpness, generator)
        rates += rate - fit_on.rate(sharpness, channel, offsets)  # of the subsample
    else:
        judged = opinions.take(unknown)
        own_sharpness, other_sharpness = _sharpness(judged)
        channel, offsets = judged.fit_channel(own_sharpness)
        rate = judged.rate(own_sharpness, channel, offsets)
        rates, channels = _replicates(judged, channel, offsets, own_sharpness, other_sharpness, generator)
        log_odds = log_odds + _shift_to(rate, log_odds)
    score = _probability(log_odds)
    interval = np.quantile(rates, [0.025, 0.975])
    interval = [float(min(interval[0], rate)), float(max(interval[1], rate))]
    bounds = np.quantile(channels, [0.025, 0.975], axis=0)
    bounds = np.stack([np.minimum(bounds[0], channel), np.maximum(bounds[1], channel)])

    everyone = np.arange(len(opinions))
    suggested, suggested_probability = labels.copy(), np.full(len(records), np.nan)
    suggested[seen] = opinions.classes[everyone, slot]
    suggested_probability[seen] = opinions.probabilities[everyone, slot]
    scores, odds = np.full(len(records), rate), np.full(len(records), -np.inf)
    scores[seen], odds[seen] = score, log_odds
    rank = np.empty(len(records), dtype=np.int64)
    rank[np.lexsort((records["index"], -odds))] = np.arange(1, len(records) + 1)
    names = np.asarray(class_names, dtype=object)
    asked = records["foreground_seen"] > 0
    table = pd.DataFrame(
        {
            "index": records["index"].astype(np.int64),
            "path": [""] * len(records) if paths is None else list(paths),
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
    table.attrs = {
        "format": FORMAT,
        "class_names": list(map(str, class_names)),
        "num_samples": len(records),
        "noise_rate": rate,
        "noise_rate_interval": interval,
        "transition_matrix": channel.tolist(),
        "transition_matrix_interval": bounds.tolist(),
        "sharpness": sharpness,
        "dataset_fingerprint": labels_fingerprint(records["index"], labels, num_labels),
        **facts,
    }
    return table


def _probability(log_odds: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))


def _shift_to(rate: float, log_odds: np.ndarray) -> float:
    """What to add to all log odds so that the mean probability is `rate`."""
    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(log_odds + middle).mean() < rate else (low, middle)
    return middle


def labels_fingerprint(index: np.ndarray, labels: np.ndarray, num_labels: int) -> str:
    """A hash of ids, given labels and number of classes, whatever the order of the rows."""
    order = np.argsort(index, kind="stable")
    digest = hashlib.sha256(str(num_labels).encode())
    for values in (index, labels):
        digest.update(np.asarray(values)[order].astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def _check_records(records: np.ndarray, labels: np.ndarray, num_labels: int):
    if len(records) == 0 or not (records["times_seen"] > 0).any():
        raise ValueError("The run has scores of no sample: not one was seen in training. Train for at least one step.")
    index = np.sort(records["index"])
    twins = index[1:][index[1:] == index[:-1]]
    if len(twins):
        raise ValueError(f"Sample id {twins[0]} occurs more than once; ids must be unique.")
    bad = (labels < 0) | (labels >= num_labels)
    if bad.any():
        raise ValueError(
            f"Sample {records['index'][bad][0]} has label {labels[bad][0]}, but the model knows {num_labels} classes."
        )


class _Opinions:
    """What the run thinks of n samples, on the c + 1 labels that it followed: the given one first."""

    def __init__(self, records: np.ndarray, num_labels: int):
        self.num_labels, self.labels = num_labels, records["label"].astype(np.int64)
        classes = np.concatenate([self.labels[:, None], records["candidate_labels"]], axis=1)
        self.free = classes < 0
        self.classes = np.where(self.free, 0, classes).astype(np.int64)
        self.probabilities = np.concatenate([records["given"][:, None], records["candidates"]], axis=1).astype(float)
        self.votes = np.concatenate([records["given_votes"][:, None], records["votes"]], axis=1).astype(float)
        self.voted = bool((records["times_seen"] > 1).any())
        self.log_p = np.where(self.free, -np.inf, np.log(self.probabilities + 1e-6))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "_Opinions":
        part = object.__new__(_Opinions)
        part.num_labels, part.voted = self.num_labels, self.voted
        for name in ("labels", "classes", "free", "probabilities", "votes", "log_p"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def prior(self, sharpness: float, offsets: np.ndarray | None = None) -> np.ndarray:
        """pi of shape `(n, c + 1)`."""
        scaled = sharpness * self.log_p + (0 if offsets is None else offsets[self.classes])
        scaled = np.exp(scaled - scaled.max(-1, keepdims=True))
        return scaled / scaled.sum(-1, keepdims=True)

    def joint(self, sharpness, channel, offsets) -> tuple[np.ndarray, np.ndarray]:
        """pi_c T[c, y] of shape `(n, c + 1)`, and pi."""
        prior = self.prior(sharpness, offsets)
        return prior * channel[self.classes, self.labels[:, None]], prior

    def log_odds(self, sharpness, channel, offsets) -> tuple[np.ndarray, np.ndarray]:
        """Log odds of "wrong", and the slot of the best other label, both of shape `(n,)`."""
        joint, _ = self.joint(sharpness, channel, offsets)
        others = np.where(self.free, -1.0, joint)[:, 1:]
        with np.errstate(divide="ignore"):
            odds = np.log(joint[:, 1:].sum(-1)) - np.log(joint[:, 0])
        return np.nan_to_num(odds, neginf=-745.0, posinf=745.0), 1 + others.argmax(-1)

    def rate(self, sharpness, channel, offsets) -> float:
        joint, _ = self.joint(sharpness, channel, offsets)
        return float(1 - (joint[:, 0] / joint.sum(-1)).mean())

    def likelihood(self, sharpness, channel, offsets) -> float:
        return float(np.log(self.joint(sharpness, channel, offsets)[0].sum(-1)).mean())

    def fit_channel(
        self,
        sharpness: float,
        *,
        start: tuple[np.ndarray, np.ndarray] | None = None,
        weights: np.ndarray | None = None,
        iterations: int = 200,
    ) -> tuple[np.ndarray, np.ndarray]:
        """T of shape `(k, k)` and a of shape `(k,)` by expectation maximisation; each class has one sure sample."""
        k, label = self.num_labels, self.labels[:, None]
        if start is None:
            channel = np.full((k, k), 0.3 / (k - 1))
            np.fill_diagonal(channel, 0.7)
            offsets = np.zeros(k)
        else:
            channel, offsets = start
        weights = np.ones(len(self)) if weights is None else weights
        for _ in range(iterations):
            joint, prior = self.joint(sharpness, channel, offsets)
            resolved = weights[:, None] * joint / joint.sum(-1, keepdims=True)
            counts = np.bincount((self.classes * k + label).ravel(), weights=resolved.ravel(), minlength=k * k)
            counts = counts.reshape(k, k) + np.eye(k)
            updated = counts / counts.sum(-1, keepdims=True)
            found = np.bincount(self.classes.ravel(), weights=resolved.ravel(), minlength=k)
            expected = np.bincount(self.classes.ravel(), weights=(weights[:, None] * prior).ravel(), minlength=k)
            offsets = offsets + 0.5 * (np.log(found + 1) - np.log(expected + 1))
            done = np.abs(updated - channel).max() < 1e-5
            channel = updated
            if done:
                break
        return channel, offsets


def _sharpness(opinions: _Opinions) -> tuple[float, float]:
    """b, and a second reading of it that says how far the first may be trusted."""
    if not opinions.voted:
        grid = np.geomspace(0.5, SHARPEST, 12)
        fits = [opinions.likelihood(b, *opinions.fit_channel(b, iterations=40)) for b in grid]
        best = float(grid[int(np.argmax(fits))])
        return best, 2 * best
    most, agree = opinions.votes.max(-1).mean(), (opinions.votes**2).sum(-1).mean()
    return _match(opinions, most), _match(opinions, agree)


def _match(opinions: _Opinions, target: float) -> float:
    low, high = 0.1, SHARPEST
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if opinions.prior(middle).max(-1).mean() < target else (low, middle)
    return float((low * high) ** 0.5)


def _replicates(opinions, channel, offsets, sharpness, other_sharpness, generator):
    """Rates `(r,)` and channels `(r, k, k)` over resampled samples and over the doubt about b."""
    spread = abs(np.log(other_sharpness / sharpness))
    rates, channels = [], []
    for doubt in np.linspace(-2, 2, REPLICATES):  # the readings differ by 1
        b = float(np.clip(sharpness * np.exp(doubt * spread), 0.1, SHARPEST))
        part = opinions.take(generator.integers(0, len(opinions), min(len(opinions), 5_000)))
        fitted = part.fit_channel(b, start=(channel, offsets), iterations=15)
        rates.append(part.rate(b, *fitted))
        channels.append(fitted[0])
    return np.array(rates), np.array(channels)


def score_predictions(
    index: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, *, seen: np.ndarray | None = None
) -> np.ndarray:
    """Records for [`noise_scores`] from one pass of any classifier.

    Args:
        index, labels (`np.ndarray` of shape `(n,)`): sample ids and given labels.
        probabilities (`np.ndarray` of shape `(n, k)`): what the classifier says.
        seen (boolean `np.ndarray` of shape `(n,)`, *optional*): which images it could see; default: all.

    Returns:
        structured `np.ndarray` of shape `(n,)`, in the order of `index`.
    """
    statistics = SampleStatistics(index, labels, probabilities.shape[-1])
    there = slice(None) if seen is None else seen
    statistics.update(np.asarray(index)[there], probabilities[there], epoch=0)
    return statistics.records


# -- files ------------------------------------------------------------------------------------------------------------


def write_audit(folder: str | os.PathLike, table: pd.DataFrame) -> Path:
    """Write `noise_scores.parquet`, with the summary in its metadata, and `summary.json` into a folder; returns it."""
    folder = Path(folder)
    summary = json.dumps(table.attrs)
    plain = table.copy(deep=False)
    plain.attrs = {}
    content = pa.Table.from_pandas(plain, preserve_index=False)
    content = content.replace_schema_metadata({**(content.schema.metadata or {}), b"noise_audit": summary.encode()})
    with whole_file(folder / TABLE_FILE) as unfinished:
        pq.write_table(content, unfinished)
    with whole_file(folder / SUMMARY_FILE) as unfinished:
        unfinished.write_text(json.dumps(table.attrs, indent=1) + "\n", encoding="utf-8")
    return folder


def load_audit(path: str | os.PathLike) -> pd.DataFrame:
    """The scores of a run.

    Args:
        path (`str` or `Path`): a run's `output_dir`, its `_audit` folder, or the parquet file.

    Returns:
        `pd.DataFrame`: as [`noise_scores`] made it; the summary is in `attrs`.

    Raises:
        FileNotFoundError: if there are no scores.
        ValueError: if the file holds something else.
    """
    path = Path(path)
    for file in (path, path / TABLE_FILE, path / FOLDER / TABLE_FILE):
        if file.is_file():
            break
    else:
        raise FileNotFoundError(
            f"{path} has no `{FOLDER}/{TABLE_FILE}`. Training writes it at its end; for a run that has only "
            "statistics or for another model run `python scripts/audit.py`."
        )
    try:
        content = pq.read_table(file)
        summary = json.loads(content.schema.metadata[b"noise_audit"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a table of noise scores ({type(error).__name__}: {error}).") from error
    table = content.to_pandas()
    table.attrs = summary
    return table


def run_records(run: str | os.PathLike) -> np.ndarray:
    """Records that a run left behind. Raises `FileNotFoundError` if it left none."""
    path = Path(run) / FOLDER / STATISTICS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} holds no scores of samples (no `{FOLDER}/{STATISTICS_FILE}`). Name the `output_dir` of a training "
            "run that has finished, or give `--model` and `--dataset` to score any dataset with any classifier."
        )
    return read_records(path)


def check_dataset(table: pd.DataFrame, dataset: Dataset):
    """Raise `ValueError` if ids, given labels or classes of a dataset are not those that were scored."""
    columns = dataset.select_columns(["index", "label"]).with_format("numpy")[:]
    index, labels = np.asarray(columns["index"]), np.asarray(columns["label"])
    names, known = dataset.features["label"].names, table.attrs["class_names"]
    if labels_fingerprint(index, labels, len(names)) == table.attrs["dataset_fingerprint"] and names == known:
        return
    if names != known:
        what = f"its classes are {names[:5]}, scored were {known[:5]}"
    else:
        scored = table.set_index("index")["label"]
        lost = len(scored.index.difference(index))
        there = pd.Series(labels, index=index)
        there = there[there.index.isin(scored.index)]
        changed = int((there != scored.reindex(there.index)).sum())
        what = f"{lost} scored rows are gone, {len(index) - len(there)} are new, {changed} have another label"
    raise ValueError(
        f"The dataset has changed since it was scored: {what}. Load it as the run did (columns, noise, seed, split), "
        "or score it anew."
    )


def image_paths(dataset: Dataset) -> list[str]:
    """Where each image lies, by `index`; empty for images that are part of the dataset."""
    order = np.argsort(dataset.with_format("numpy")["index"][:], kind="stable")
    paths: list[str] = []
    images = dataset.select_columns(["image"]).cast_column("image", Image(decode=False)).with_format("arrow")
    for batch in images.iter(10_000):
        paths += pc.struct_field(batch.column("image").combine_chunks(), "path").to_pylist()
    return [paths[row] or "" for row in order]


# -- evidence ---------------------------------------------------------------------------------------------------------


def num_suspects(table: pd.DataFrame, most: int = MAX_SUSPECTS) -> int:
    """How many samples to show: all that are probably wrong, at least 48 and at most `most`."""
    likely = int((table["noise_score"] >= 0.5).sum())
    return min(len(table), most, max(likely, FEWEST_SUSPECTS))


def decode_images(dataset: Dataset, rows: Sequence[int]) -> list[Pillow.Image | str]:
    """RGB images of some rows; instead of one that cannot be read, why."""
    undecoded = dataset.select_columns(["image"]).cast_column("image", Image(decode=False))
    found = []
    for stored in undecoded[list(map(int, rows))]["image"]:
        try:
            if stored is None:
                raise ValueError("the row has no image")
            source = io.BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"]
            with Pillow.open(source) as image:
                found.append(image.convert("RGB"))
        except READING_ERRORS as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


@torch.no_grad()
def collect_evidence(
    dataset: Dataset,
    suspects: pd.DataFrame,
    *,
    transform: Callable,
    model=None,
    crop_pct: float = 1.0,
    batch_size: int = 64,
) -> list[Evidence]:
    """Pictures of the suspects and, with a model that has class activation maps, where it sees either class.

    Args:
        dataset (`datasets.Dataset`): that was scored, rows in any order.
        suspects (`pd.DataFrame`): rows of [`noise_scores`]' table.
        transform (`Callable`): of evaluation, from an RGB image to a tensor.
        model ([`TimmCAMForImageClassification`], *optional*): without it there are only pictures.
        crop_pct (`float`): share of the shorter side that the transform keeps, so that maps lie on the right spot.

    Returns:
        `list[Evidence]`: in the order of `suspects`. An image that cannot be read is a reason, never an error.
    """
    ids = dataset.with_format("numpy")["index"][:]
    order = np.argsort(ids, kind="stable")
    rows = order[np.searchsorted(ids[order], suspects["index"].to_numpy())]
    was_training = model is not None and model.training
    if model is not None:
        model.eval()
    evidence = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        images = decode_images(dataset, rows[part])
        readable = [number for number, image in enumerate(images) if not isinstance(image, str)]
        maps = {}
        if model is not None and readable:
            pixels = torch.stack([transform(images[number]) for number in readable]).to(model.device)
            output = model(pixel_values=pixels)
            for name in ("label", "suggested_label"):
                classes = torch.as_tensor(suspects[name].to_numpy()[part][readable], device=model.device)
                cams = model.class_activation_maps(output, model.class_weights[classes])
                maps[name] = dict(zip(readable, normalize_cams(cams).cpu().numpy(), strict=True))
        for number, image in enumerate(images):
            if isinstance(image, str):
                evidence.append(Evidence(reason=image))
            else:
                both = [maps[name][number] if maps else None for name in ("label", "suggested_label")]
                evidence.append(Evidence(_square(image, crop_pct), *both))
    if was_training:
        model.train()
    return evidence


def _square(image: Pillow.Image, share: float) -> Pillow.Image:
    """The central square that an evaluation transform looks at."""
    side = min(image.size) * share
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.crop((round(left), round(top), round(left + side), round(top + side)))


@torch.no_grad()
def predict_probabilities(
    dataset: Dataset, model: Callable, transform: Callable, num_labels: int, *, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """One pass over a dataset.

    Args:
        model (`Callable`): from a batch of `transform`ed images, stacked, to logits of shape `(b, num_labels)`.

    Returns:
        Probabilities of shape `(n, num_labels)`, and which images could be read, of shape `(n,)`.
    """
    probabilities, seen = (
        np.full((len(dataset), num_labels), 1 / num_labels, dtype=np.float32),
        np.zeros(len(dataset), bool),
    )
    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, min(start + batch_size, len(dataset)))
        images = decode_images(dataset, rows)
        readable = [number for number, image in enumerate(images) if not isinstance(image, str)]
        if readable:
            logits = model(torch.stack([transform(images[number]) for number in readable]))
            probabilities[rows[readable]] = logits.float().softmax(-1).cpu().numpy()
            seen[rows[readable]] = True
    if not seen.all():
        logger.warning("%d of %d images could not be read; they have no score of their own.", (~seen).sum(), len(seen))
    return probabilities, seen


def align_classes(model_names: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Which output of a model is which class of a dataset, by name; by position if the model's names say nothing.

    Returns:
        `np.ndarray` of shape `(k,)`: the model's output for each class of the dataset.

    Raises:
        ValueError: if the model does not know a class.
    """
    model_names, names = list(map(str, model_names)), list(map(str, names))
    nameless = model_names in (
        [str(i) for i in range(len(model_names))],
        [f"LABEL_{i}" for i in range(len(model_names))],
    )
    if nameless and len(model_names) == len(names):
        return np.arange(len(names))
    at = {name: i for i, name in enumerate(model_names)}
    unknown = [name for name in names if name not in at]
    if unknown:
        raise ValueError(
            f"The model does not know {len(unknown)} of the dataset's {len(names)} classes: {unknown[:5]}. Its own "
            f"are {model_names[:5]} ... ({len(model_names)}). Rename the classes, or take a model trained on them."
        )
    return np.array([at[name] for name in names])


def score_model(
    dataset: Dataset, model: Callable, transform: Callable, model_names: Sequence[str], *, batch_size: int = 64
) -> np.ndarray:
    """Records for [`noise_scores`] by one pass of any classifier over any dataset.

    Args:
        dataset (`datasets.Dataset`): columns `image`, `label`, `index`.
        model (`Callable`): from a batch of `transform`ed images, stacked, to logits of shape `(b, len(model_names))`.
        transform (`Callable`): from an RGB image to a tensor.
        model_names (`Sequence[str]`): the model's classes, in the order of its outputs; it may have more.

    Raises:
        ValueError: if the model does not know a class of the dataset, or ids are not unique.
    """
    columns = align_classes(model_names, dataset.features["label"].names)
    probabilities, seen = predict_probabilities(dataset, model, transform, len(model_names), batch_size=batch_size)
    probabilities = probabilities[:, columns]
    probabilities = probabilities / probabilities.sum(-1, keepdims=True).clip(1e-12)
    given = dataset.select_columns(["index", "label"]).with_format("numpy")[:]
    return score_predictions(given["index"], given["label"], probabilities, seen=seen)


def audit_run(
    output_dir: str | os.PathLike,
    records: np.ndarray,
    dataset: Dataset,
    *,
    transform: Callable,
    model=None,
    crop_pct: float = 1.0,
    curves: Sequence[Mapping] = (),
    max_suspects: int = MAX_SUSPECTS,
    **facts,
) -> pd.DataFrame:
    """Score, then write table, summary and report into `<output_dir>/_audit`; arguments as in the parts.

    Raises:
        ValueError: if the dataset is not the one that the records are of.
    """
    table = noise_scores(records, dataset.features["label"].names, **facts)
    check_dataset(table, dataset)
    table["path"] = image_paths(dataset)
    folder = write_audit(Path(output_dir) / FOLDER, table)
    suspects = table.nsmallest(num_suspects(table, max_suspects), "rank")
    evidence = collect_evidence(dataset, suspects, transform=transform, model=model, crop_pct=crop_pct)
    render_report(table, table.attrs, folder / REPORT_FILE, evidence=evidence, curves=curves)
    return table


# -- exports ----------------------------------------------------------------------------------------------------------


def escape_formula(value: object) -> object:
    """Text that a spreadsheet would run, behind an apostrophe."""
    risky = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if risky else value


def export_audit(
    table: pd.DataFrame, dataset: Dataset, folder: str | os.PathLike, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write the scores for other tools into a folder; returns the files.

    Args:
        formats (`Sequence[str]`): of `csv` (for a spreadsheet), `cleanlab` (columns of its `Datalab`), `fiftyone` and
            `datumaro` (also CVAT); these two also write images that are part of the dataset.

    Raises:
        ValueError: on another format, or a dataset that has changed.
    """
    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise ValueError(f"Formats {sorted(unknown)} are none of {', '.join(FORMATS)}.")
    check_dataset(table, dataset)
    folder, files = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    if "csv" in formats:
        files.append(export_csv(table, folder / "noise_scores.csv"))
    if "cleanlab" in formats:
        files.append(folder / "cleanlab_issues.csv")
        cleanlab_issues(table).to_csv(files[-1])
    if {"fiftyone", "datumaro"} & set(formats):
        images = export_images(dataset, table, folder / "images")
        if "fiftyone" in formats:
            files.append(export_fiftyone(table, images, folder / "fiftyone"))
        if "datumaro" in formats:
            files.append(export_datumaro(table, images, folder / "datumaro" / "annotations" / "default.json"))
    return files


def export_csv(table: pd.DataFrame, path: str | os.PathLike) -> Path:
    """The table, most suspect first, for a spreadsheet."""
    safe = table.sort_values("rank").copy()
    for name in ("path", "label_name", "suggested_name"):
        safe[name] = safe[name].map(escape_formula)
    safe.to_csv(path, index=False)
    return Path(path)


def cleanlab_issues(table: pd.DataFrame, threshold: float = 0.5) -> pd.DataFrame:
    """The columns of cleanlab's `Datalab.get_issues("label")`, by `index`; in them a low score means a wrong label."""
    issues = pd.DataFrame(
        {
            "is_label_issue": (table["noise_score"] >= threshold).to_numpy(),
            "label_score": 1 - table["noise_score"].to_numpy(),
            "given_label": table["label"].to_numpy(),
            "predicted_label": np.where(table["noise_score"] >= 0.5, table["suggested_label"], table["label"]),
        },
        index=pd.Index(table["index"], name="index"),
    )
    return issues


def export_images(dataset: Dataset, table: pd.DataFrame, folder: str | os.PathLike) -> dict[int, str]:
    """Absolute path of each sample's image; those that are part of the dataset are written into `folder`."""
    folder, paths = Path(folder), {}
    at = dict(zip(table["index"].tolist(), table["path"], strict=True))
    undecoded = dataset.select_columns(["image", "index"]).cast_column("image", Image(decode=False))
    for row in undecoded:
        index, path = int(row["index"]), at[int(row["index"])]
        if not path or not os.path.isfile(path):
            content = row["image"]["bytes"] if row["image"] else None
            if content is None:
                continue  # a missing file: nothing to show
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{index}{'.jpg' if content[:2] == bytes([255, 216]) else '.png'}"
            path.write_bytes(content)
        paths[index] = os.path.abspath(path)
    return paths


def export_fiftyone(table: pd.DataFrame, images: Mapping[int, str], folder: str | os.PathLike) -> Path:
    """A folder for `fiftyone.Dataset.from_dir(dataset_type=fiftyone.types.FiftyOneImageClassificationDataset)`.

    `labels.json` holds the given label of each sample, with 1 - score as confidence and the other columns as
    attributes; `data.json` says where the images are (`data_path="data.json"`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for row in table.to_dict("records"):
        if row["index"] in images:
            kept = {name: row[name] for name in ("index", "suggested_name", "noise_score", "rank")}
            labels[str(row["index"])] = {
                "label": row["label"],
                "confidence": 1 - row["noise_score"],
                "attributes": kept,
            }
    _write_json(folder / "labels.json", {"classes": table.attrs["class_names"], "labels": labels})
    _write_json(folder / "data.json", {str(index): path for index, path in images.items()})
    return folder


def export_datumaro(table: pd.DataFrame, images: Mapping[int, str], path: str | os.PathLike) -> Path:
    """A file of Datumaro's own format (`annotations/<subset>.json`), for Datumaro and CVAT: the given label of each
    sample with score, rank and suggestion as attributes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    items = [
        {
            "id": str(row["index"]),
            "annotations": [
                {
                    "id": 0,
                    "type": "label",
                    "group": 0,
                    "label_id": row["label"],
                    "attributes": {name: row[name] for name in ("suggested_name", "noise_score", "rank")},
                }
            ],
            "image": {"path": images[row["index"]]},
        }
        for row in table.to_dict("records")
        if row["index"] in images
    ]
    names = [{"name": name, "parent": "", "attributes": []} for name in table.attrs["class_names"]]
    categories = {"label": {"labels": names, "attributes": []}}
    _write_json(
        path,
        {"dm_format_version": "1.0", "media_type": 2, "info": {}, "categories": categories, "items": items},
    )
    return path


def _write_json(path: Path, content: object):
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


# -- marks, and the cleaned dataset -----------------------------------------------------------------------------------


def read_marks(path: str | os.PathLike, table: pd.DataFrame) -> pd.DataFrame:
    """Marks that were downloaded from the report.

    Args:
        path (`str` or `Path`): CSV with the columns `index`, `mark` (wrong, right or unsure) and `new_label` (class
            id).
        table (`pd.DataFrame`): the scores that the report showed.

    Returns:
        `pd.DataFrame`: `mark` and `new_label`, by `index`.

    Raises:
        ValueError: naming file and line, on ids that were not scored, repeated ids, other marks or unknown classes.
    """
    known, num_labels, marks = set(table["index"].tolist()), len(table.attrs["class_names"]), {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            columns, rows = reader.fieldnames or (), [(reader.line_num, row) for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: no CSV in UTF-8 ({error}).") from error
        missing = {"index", "mark", "new_label"} - set(columns)
        if missing:
            raise ValueError(
                f"{path}:1: no column {', '.join(sorted(missing))}; a file of marks comes from the report."
            )
        for line, row in rows:
            where = f"{path}:{line}"
            try:
                index, label = int(row["index"]), int(row["new_label"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: `index` and `new_label` must be integers ({error}).") from error
            if index not in known:
                raise ValueError(f"{where}: sample id {index} is not among the scored samples; whose marks are these?")
            if index in marks:
                raise ValueError(f"{where}: sample id {index} is marked twice.")
            if row["mark"] not in MARKS:
                raise ValueError(f"{where}: the mark {row['mark']!r} is none of {', '.join(MARKS)}.")
            if not 0 <= label < num_labels:
                raise ValueError(f"{where}: `new_label` {label} is none of the {num_labels} classes.")
            marks[index] = (row["mark"], label)
    frame = pd.DataFrame.from_dict(marks, orient="index", columns=["mark", "new_label"])
    frame.index.name = "index"
    return frame


def clean_dataset(
    dataset: Dataset,
    table: pd.DataFrame,
    *,
    how: str | None = None,
    threshold: float = 0.5,
    marks: pd.DataFrame | None = None,
) -> Dataset:
    """A dataset without the labels that are probably wrong.

    Marks of a person go first: `wrong` takes the new label, `right` and `unsure` keep the given one. On the others
    `how` acts where the score reaches the threshold.

    Args:
        dataset (`datasets.Dataset`): that was scored.
        how (`str`, *optional*): `drop` the row, `relabel` it with the suggestion, or `weight`: change no row and put 1
            - score into a column `weight`; without it only marks count.
        threshold (`float`): in [0, 1].
        marks (`pd.DataFrame`, *optional*): of [`read_marks`].

    Returns:
        `datasets.Dataset`: the four features and the lineage: `original_label`, `noise_score` and `audit_action`
        (kept, marked, relabelled). `index` stays what it was. `clean_label` stays what was known.

    Raises:
        ValueError: on another `how`, neither `how` nor marks, or a dataset that has changed.
    """
    if how not in (None, "drop", "relabel", "weight"):
        raise ValueError(f"`how={how!r}` is none of drop, relabel, weight.")
    if how is None and marks is None:
        raise ValueError("Nothing to do: say `how` to clean (drop, relabel, weight), or give marks.")
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold={threshold}` must be between 0 and 1.")
    check_dataset(table, dataset)
    index = dataset.with_format("numpy")["index"][:]
    facts = table.set_index("index").loc[index]
    labels, score = facts["label"].to_numpy().copy(), facts["noise_score"].to_numpy()
    action = np.full(len(index), "kept", dtype=object)
    suspect = score >= threshold
    weight = 1 - score
    if marks is not None:
        marked = np.isin(index, marks.index)
        mark = marks.loc[index[marked]]
        wrong = np.flatnonzero(marked)[(mark["mark"] == "wrong").to_numpy()]
        labels[wrong] = marks.loc[index[wrong], "new_label"]
        action[marked], weight[marked], suspect = "marked", 1.0, suspect & ~marked
    if how == "relabel":
        labels[suspect] = facts["suggested_label"].to_numpy()[suspect]
        action[suspect] = "relabelled"
    feature = dataset.features["label"]
    cleaned = dataset.select_columns(["image", "label", "clean_label", "index"]).flatten_indices()
    original = cleaned.with_format("numpy")["label"][:]
    cleaned = cleaned.remove_columns("label")
    for name, values, kind in (
        ("label", labels, ClassLabel(names=feature.names)),
        ("original_label", original, ClassLabel(names=feature.names)),
        ("noise_score", score, Value("float64")),
        ("audit_action", action.tolist(), Value("string")),
        *([("weight", weight, Value("float64"))] if how == "weight" else []),
    ):
        cleaned = cleaned.add_column(name, values, feature=kind)
    return cleaned.select(np.flatnonzero(~suspect)) if how == "drop" else cleaned
