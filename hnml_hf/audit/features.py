"""Features of every image by one forward pass of a frozen backbone: shared by processes, kept so that it goes on."""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset, Image
from torch import nn

from ..common.devices import usable_device
from ..common.values import require_whole
from ..common.words import counted
from ..data.collate import collate_readable
from ..data.decoding import MAX_PIXELS, UNREADABLE, decode, read_stored
from ..data.transforms import create_transforms
from ..modeling.forward import run_over
from ..modeling.onnx_program import write_onnx
from ..modeling.timm_cam import TimmCAMForImageClassification


logger = logging.getLogger(__name__)

BACKBONE = "tf_efficientnet_lite0.in1k"
FEATURES_FOLDER = "_features"  # of a run, where they are kept by default
USUAL_SIZE = 224  # pixels, of the images that the default batch is for
ON_A_CORE = 8  # such images in a batch: their activations stay in the processor's cache
ON_A_GPU = 256
EXPORTED_FROM = 2 * 10**7  # pixels (400 images of 224), below which export takes longer than onnxruntime saves
AT_ONCE = 64  # images, at most, that go into onnxruntime together
TOLERANCE = 1e-4  # of the largest feature, by which ways to compute them may differ
NOT_DONE, DONE, UNREADABLE_IMAGE = 0, 1, 2
FILES = ("values", "content", "done")


@dataclass(frozen=True)
class Features:
    """What a frozen backbone sees of n images, in the order of the rows.

    Args:
        values (`np.ndarray` of shape `(n, d)`): float32, mapped from disk.
        groups (`np.ndarray` of shape `(n,)`): the same number for images of the same content.
        readable (`np.ndarray` of shape `(n,)`, bool): the others have features of 0.
        computed (`int`): images that this process sent through the backbone; the rest were there.
        seconds (`dict[str, float]`): of this process: `waiting` for images, `forward`.
        folder (`Path`): where they are kept.
    """

    values: np.ndarray
    groups: np.ndarray
    readable: np.ndarray
    computed: int
    seconds: dict[str, float]
    folder: Path


def describe_unreadable(dataset: Dataset, features: Features) -> str | None:
    """How many images cannot be read, and which is the first, as a sentence; None if all can."""
    bad = np.flatnonzero(~features.readable)
    if not len(bad):
        return None
    first = _undecoded(dataset)[int(bad[0])]["image"] or {}
    return f"{counted(len(bad), 'image')} cannot be read, the first is {first.get('path') or f'in row {bad[0]}'}."


def _undecoded(dataset: Dataset) -> Dataset:
    return dataset.with_format(None).select_columns(["image"]).cast_column("image", Image(decode=False))


class FrozenBackbone(nn.Module):
    """The input of a classifier's last layer, and the mean of each stage's map beside it.

    Stages that come before the last cost nothing and know what the last has forgotten: on images unlike those of the
    pretraining they find wrong labels better together (Evci et al., ICML 2022; figures in docs/ablations.md).

    Args:
        model: a [`TimmCAMForImageClassification`].
    """

    def __init__(self, model: TimmCAMForImageClassification):
        super().__init__()
        self.timm_model = model.timm_model
        self.config = model.config

    @property
    def heads(self) -> tuple[str, ...]:
        """How the names of the classifier's weights begin."""
        names = self.config.pretrained_cfg["classifier"]
        return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if not hasattr(self.timm_model, "forward_intermediates"):
            native = self.timm_model.forward_features(pixel_values)
            return self.timm_model.forward_head(native, pre_logits=True).flatten(1)
        native, stages = self.timm_model.forward_intermediates(pixel_values, output_fmt="NCHW")
        means = [stage.mean((2, 3)) for stage in stages]
        return torch.cat([self.timm_model.forward_head(native, pre_logits=True).flatten(1), *means], dim=1)


def load_backbone(
    backbone: str = BACKBONE,
    *,
    pretrained: bool | str | os.PathLike = True,
    image_size: int | None = None,
    **model_args,
) -> FrozenBackbone:
    """A frozen timm backbone in evaluation mode; it is shown whole images.

    Args:
        backbone (`str`): timm name.
        pretrained (`bool`, `str` or `Path`): `True` for timm's weights from the Hub, or a safetensors file or folder.
        image_size (`int`, *optional*): side in pixels; default: the backbone's own.
        model_args: any other JSON-able argument of `timm.create_model`.

    Raises:
        ValueError: for a name or size that cannot be; without weights, since random features tell nothing, and as
            `from_timm`.
    """
    if not pretrained:
        raise ValueError("An audit needs pretrained features: give `pretrained` true or a file of weights.")
    if not isinstance(backbone, str) or not backbone:
        raise ValueError(f"`backbone={backbone!r}` is no name of a timm model; give one, as `{BACKBONE}`.")
    if image_size is not None:
        image_size = require_whole("image_size", image_size, least=1)
    model = TimmCAMForImageClassification.from_timm(
        backbone,
        num_labels=2,
        pretrained=pretrained if isinstance(pretrained, bool) else os.fspath(pretrained),
        image_size=image_size,
        needs_cams=False,
        **model_args,
    )
    model.config.pretrained_cfg["crop_pct"] = 1.0
    return FrozenBackbone(model).eval().requires_grad_(False)


def launched() -> PartialState:
    """This process among those of its launcher; without a GPU they talk by gloo, which accelerate must be told."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(cpu=True) if several and not torch.cuda.is_available() else PartialState()


def features_beside(output_dir: str | os.PathLike) -> list[Path]:
    """Where runs and audits in the same folder keep their features, and this one too: for `also_in`."""
    return [*Path(output_dir).absolute().parent.glob(f"*/{FEATURES_FOLDER}")]


def extract_features(
    dataset: Dataset,
    backbone: FrozenBackbone,
    *,
    cache_dir: str | os.PathLike,
    also_in: Iterable[str | os.PathLike] = (),
    batch_size: int | None = None,
    num_workers: int | None = None,
    device: torch.device | str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Features:
    """Send every image once through a frozen backbone; each of several processes takes its share.

    Features are written to a file in `cache_dir` as they come, with a hash of the image: a pass that was stopped goes
    on, and images that have not changed are not computed again. Weights, size and number of images make the file's
    name. All processes must see `cache_dir`.

    Args:
        dataset (`datasets.Dataset`): with a column `image`.
        backbone ([`FrozenBackbone`]): of [`load_backbone`].
        cache_dir (`str` or `Path`): for 4 n d bytes.
        also_in (`Iterable[str | Path]`): `cache_dir` of other audits, whose features of images with the same content
            are taken as well.
        batch_size (`int`, *optional*): images in a forward pass. Default: 8 for each thread of a CPU and 256 on a
            GPU, of images above 224 pixels as many fewer as they are larger, and of smaller ones as many more, up to
            256. It is halved, for the rest of the pass, where memory runs out.
        num_workers (`int`, *optional*): processes that read images. Default: the cores, less one, at most 8.
        device (`torch.device` or `str`, *optional*): default: a GPU if there is one.
        max_pixels (`int`): a larger image counts as unreadable.

    Returns:
        [`Features`]

    Raises:
        OSError: if the disk has no room for them, or is read-only and lacks some.
        ValueError: if an option has a value that cannot be, or not one image can be read.
    """
    state = launched()
    for number, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value is not None:
            require_whole(number, value, least=least)
    there = next(place for place in (Path(cache_dir), *Path(cache_dir).absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"`cache_dir={os.fspath(cache_dir)!r}`: {there} is a file; give a folder.")
    place = usable_device(device)
    if place.type == "cuda" and place.index is None and state.num_processes > 1:
        place = torch.device("cuda", state.local_process_index)
    if num_workers is None:
        num_workers = max(0, min(8, (os.cpu_count() or 1) // state.num_processes - 1))
    _, transform = create_transforms(backbone.config.pretrained_cfg, augmentation="none")
    size = backbone.config.pretrained_cfg["input_size"][-1]
    if batch_size is None:  # of larger images fewer, since each reader keeps two batches of them as well
        usual = ON_A_GPU if place.type == "cuda" else ON_A_CORE * torch.get_num_threads()
        batch_size = min(ON_A_GPU, max(1, usual * USUAL_SIZE**2 // size**2))
    backbone = backbone.to(place, memory_format=torch.channels_last)
    width = backbone(torch.zeros(1, 3, size, size, device=place)).shape[1]
    name = _key(backbone, size)
    folder = Path(cache_dir, f"{name}-{len(dataset)}")
    with state.main_process_first():
        _create_files(folder, len(dataset), width)
    files = [folder / f"{name}.npy" for name in FILES]
    writable = all(os.access(file, os.W_OK) for file in files)  # to read complete features no write is needed
    values, content, done = (np.load(file, mmap_mode="r+" if writable else "c", allow_pickle=False) for file in files)
    if not writable:
        _refuse_read_only(folder, int((done == NOT_DONE).sum()))

    share = np.array_split(np.arange(len(dataset)), state.num_processes)[state.process_index]
    places = dict.fromkeys(os.path.realpath(place) for place in (cache_dir, *also_in))
    others = [other for place in places for other in sorted(Path(place).glob(f"{name}-*"))]
    others = [other for other in others if not other.samefile(folder)]
    kept = _KeptFeatures(others if (done == NOT_DONE).any() else [])
    images = _Images(dataset, transform, share, folder, max_pixels, kept.digests)
    took: list[float] = []
    missing = int((done[share] == NOT_DONE).sum())
    forward = _timed(_Forward(backbone, place, batch_size, missing * size**2), took)
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    computed, started = 0, time.perf_counter()
    for batch, found in run_over(forward, images, collate_readable, desc="features", **loading):
        rows, digests, states = batch["row"], batch["digest"], batch["state"]
        changed = rows[(content[rows] != digests).any(1)]
        done[changed] = NOT_DONE  # before what is there is overwritten
        content[rows] = digests
        fresh, elsewhere = rows[states == DONE], rows[(states == NOT_DONE) & (done[rows] != DONE)]
        if not writable:
            _refuse_read_only(folder, len({*changed, *fresh, *elsewhere}))
        if found is not None:
            values[fresh] = found
            computed += len(fresh)
        if len(elsewhere):
            values[elsewhere] = kept.take(content[elsewhere])
            done[elsewhere] = DONE
        bad = rows[states == UNREADABLE_IMAGE]
        values[bad] = 0
        done[fresh], done[bad] = DONE, UNREADABLE_IMAGE
    seconds = {"forward": sum(took), "waiting": time.perf_counter() - started - sum(took)}
    for array in (values, content, done):
        array.flush()
    state.wait_for_everyone()
    readable = np.array(done == DONE)
    if not readable.any():
        raise ValueError(
            f"None of the {counted(len(dataset), 'image')} can be read. `hnml check` says why, file by file."
        )
    groups = np.unique(_as_keys(content), return_inverse=True)[1]
    return Features(
        np.load(folder / "values.npy", mmap_mode="r", allow_pickle=False),
        groups.reshape(-1),
        readable,
        computed,
        seconds,
        folder,
    )


class _KeptFeatures:
    """Features of the same backbone in other folders, by the content of the image: of the dataset with other rows."""

    def __init__(self, folders: list[Path]):
        self.values, digests, places = [], [np.zeros(0, "V16")], [np.zeros((0, 2), np.int64)]
        for folder in folders:
            try:
                values, content, done = (
                    np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES
                )
            except (OSError, ValueError):
                continue  # another process is making it
            rows = np.flatnonzero(done == DONE)
            digests.append(_as_keys(content[rows]))
            places.append(np.stack([np.full(len(rows), len(self.values)), rows], axis=1))
            self.values.append(values)
        self.digests, first = np.unique(np.concatenate(digests), return_index=True)
        self.places = np.concatenate(places)[first]

    def take(self, content: np.ndarray) -> np.ndarray:
        """Features `(m, d)` of the images with these digests `(m, 2)`; each must be among the kept ones."""
        places = self.places[np.searchsorted(self.digests, _as_keys(content))]
        return np.stack([self.values[folder][row] for folder, row in places])


def _as_keys(content: np.ndarray) -> np.ndarray:
    """Digests of shape `(n, 2)` as n values that can be sorted."""
    return np.ascontiguousarray(content).view("V16")[:, 0]


class _Images(torch.utils.data.Dataset):
    """Images of some rows, hashed, and prepared unless their features are there."""

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable,
        rows: np.ndarray,
        folder: Path,
        max_pixels: int,
        kept: np.ndarray,
    ):
        self.kept = kept  # digests, sorted, of images whose features lie elsewhere
        self.stored = _undecoded(dataset)
        self.transform, self.rows, self.folder, self.max_pixels = transform, rows, folder, max_pixels
        self.content: Any = None
        self.done: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        if self.content is None:  # here, so that each worker maps the files itself
            self.content, self.done = (
                np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("content", "done")
            )
        rows = self.rows[places]
        return [
            self._sample(row, stored) for row, stored in zip(rows, self.stored[rows.tolist()]["image"], strict=True)
        ]

    def _sample(self, row: int, stored: dict | None) -> dict[str, Any]:
        try:
            encoded = read_stored(stored, max_pixels=self.max_pixels)
            digest = np.frombuffer(hashlib.blake2b(encoded, digest_size=16).digest(), dtype=np.uint64)
            if (self.done[row] == DONE and (self.content[row] == digest).all()) or self._is_kept(digest):
                return {"row": row, "digest": digest, "state": NOT_DONE, "pixel_values": None}
            image = self.transform(decode(BytesIO(encoded), max_pixels=self.max_pixels))
            return {"row": row, "digest": digest, "state": DONE, "pixel_values": image}
        except UNREADABLE:
            digest = np.array([row, 0], dtype=np.uint64)
            return {"row": row, "digest": digest, "state": UNREADABLE_IMAGE, "pixel_values": None}

    def _is_kept(self, digest: np.ndarray) -> bool:
        key = _as_keys(digest[None])
        at = np.searchsorted(self.kept, key).item()
        return bool(at < len(self.kept) and self.kept[at] == key[0])


def _timed(forward: Callable[[torch.Tensor], np.ndarray], took: list[float]) -> Callable[[torch.Tensor], np.ndarray]:
    """The function, which notes in `took` how many seconds each call took."""

    def timed(pixels: torch.Tensor) -> np.ndarray:
        since = time.perf_counter()
        found = forward(pixels)
        took.append(time.perf_counter() - since)
        return found

    return timed


def _key(backbone: FrozenBackbone, size: int) -> str:
    """Of what features depend on besides the images: not the classifier, which is drawn anew."""
    heads = tuple(f"timm_model.{name}" for name in backbone.heads)
    digest = hashlib.blake2b(f"{backbone.config.architecture} {size}".encode(), digest_size=8)
    for name, tensor in sorted(backbone.state_dict().items()):
        if name.startswith(heads):
            continue
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return f"{backbone.config.architecture}-{size}-{digest.hexdigest()}"


def _create_files(folder: Path, number: int, width: int):
    if (folder / "done.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = 4 * number * width, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} needs {needed / 1e9:.1f} GB for features, and {free / 1e9:.1f} are free: give another."
        )
    kinds = {"values": ((number, width), "f4"), "content": ((number, 2), "u8"), "done": ((number,), "u1")}
    for name, (shape, kind) in kinds.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape).flush()


def _refuse_read_only(folder: Path, missing: int):
    if missing:
        raise OSError(
            f"{folder} cannot be written, and lacks features of {counted(missing, 'image')} as they are now: give "
            "another `cache_dir`."
        )


class _Forward:
    """From images to features; on a CPU by onnxruntime where that saves time in all.

    Where the memory does not hold a batch, this and all that follow are sent in halves, by PyTorch.
    """

    def __init__(self, backbone: FrozenBackbone, device: torch.device, batch_size: int, pixels_in_all: int):
        self.backbone, self.device, self.batch_size = backbone, device, batch_size
        self.exported = device.type == "cpu" and pixels_in_all >= EXPORTED_FROM
        self.way: Callable[[torch.Tensor], np.ndarray] | None = None

    def __call__(self, pixels: torch.Tensor) -> np.ndarray:
        if self.way is None:  # for the first batch: often all features are there already
            number = min(AT_ONCE, self.batch_size)
            self.way = (_by_onnxruntime(self.backbone, number, self.send) if self.exported else None) or self.send
        while True:
            try:
                return np.concatenate([self.way(part) for part in pixels.split(self.batch_size)])
            except Exception as error:  # onnxruntime has no class for what it raises
                if not _lacks_memory(error) or (self.batch_size == 1 and self.way == self.send):
                    raise
            held = self.batch_size if self.way == self.send else min(AT_ONCE, self.batch_size)
            self.batch_size, self.way = max(1, held // 2), self.send
            clear_device_cache(garbage_collection=True)
            logger.warning("The memory does not hold a batch of images: on with %d at a time.", self.batch_size)

    def send(self, pixels: torch.Tensor) -> np.ndarray:
        return self.backbone(pixels.to(self.device, memory_format=torch.channels_last)).float().cpu().numpy()


def _lacks_memory(error: Exception) -> bool:
    return should_reduce_batch_size(error) or "Failed to allocate memory" in str(error)  # the latter of onnxruntime


def _by_onnxruntime(
    backbone: FrozenBackbone, number: int, send: Callable[[torch.Tensor], np.ndarray]
) -> Callable[[torch.Tensor], np.ndarray] | None:
    """From images to features by onnxruntime, so many at a time; those that lack are filled up with zeros.

    The number is fixed, since a network of any number takes half as long again to export. Where less than a third is
    there, PyTorch (`send`) takes no longer. None where PyTorch is faster, as for transformers, and, with a warning,
    where onnxruntime is missing or cannot run this network.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError:
        logger.warning("With `pip install 'hnml_hf[onnx]'` this pass may take a third of the time on a CPU.")
        return None
    size = backbone.config.pretrained_cfg["input_size"]
    images = torch.randn(number, *size, generator=torch.Generator().manual_seed(0))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # readers need the cores

    def fill(pixels: torch.Tensor) -> np.ndarray:
        lacking = number - len(pixels)
        filled = nn.functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, lacking)) if lacking else pixels
        return session.run(None, {"pixel_values": filled.numpy()})[0][: len(pixels)]

    def run(pixels: torch.Tensor) -> np.ndarray:
        return np.concatenate([fill(part) if 3 * len(part) >= number else send(part) for part in pixels.split(number)])

    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "backbone.onnx")
            write_onnx(backbone, file, example=images, outputs=["features"], any_number=False)
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        found, seconds = _timed_twice(lambda: run(images))
    except Exception as error:  # whatever the exporter and onnxruntime cannot do; PyTorch can
        cause = error.__cause__ or error  # the exporter's own words are advice to its developers
        logger.warning(
            "onnxruntime is not used for %s, so the pass may take longer (%s).",
            backbone.config.architecture,
            f"{type(cause).__name__}: {cause}".splitlines()[0],
        )
        return None
    expected, seconds_of_pytorch = _timed_twice(lambda: send(images))
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        logger.warning(
            "onnxruntime is not used for %s, so the pass may take longer: its features differ from PyTorch's by %.1e "
            "of the largest.",
            backbone.config.architecture,
            difference,
        )
        return None
    return run if seconds < seconds_of_pytorch else None


@torch.no_grad()
def _timed_twice(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """What a function returns, and the seconds of the faster of two calls."""
    took: list[float] = []
    for _ in range(2):
        started = time.perf_counter()
        found = run()
        took.append(time.perf_counter() - started)
    return found, min(took)
