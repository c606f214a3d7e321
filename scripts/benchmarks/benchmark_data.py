"""Images per second of our training loader beside timm's, on the same files with the same transforms and workers.

    python scripts/benchmarks/benchmark_data.py --parquet imagenette/train.parquet --image_size 224
    python scripts/benchmarks/benchmark_data.py --parquet cifar10n-10k/train.parquet --image_size 32 --output data.json

The images of a parquet file (columns `image`, `label`) are written out as an image folder; both loaders read that.
Runs are interleaved and repeated; what counts is the ratio, ours / timm's, of the runs of one pair.
"""

import argparse
import io
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import PIL.Image
import timm
import timm.data
import torch
from datasets import Image, load_dataset

from hnml_hf import TransformedDataset, collate_images, create_transforms, load_noisy_dataset


def write_folder(parquet: str, folder: Path, limit: int):
    """`train/<label>/<row>.jpg` or `.png`: the encoded bytes as they are; formats that timm does not list, as PNG."""
    rows = load_dataset("parquet", data_files=parquet, split=f"train[:{limit}]", cache_dir=str(folder / "cache"))
    for number, row in enumerate(rows.cast_column("image", Image(decode=False))):
        data = row["image"]["bytes"]
        suffix = {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(data[:2])
        if suffix is None:
            encoded, suffix = io.BytesIO(), "png"
            PIL.Image.open(io.BytesIO(data)).save(encoded, "PNG")
            data = encoded.getvalue()
        path = folder / "images" / "train" / f"class{row['label']}" / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def our_loader(folder: Path, transform, batch_size: int, workers: int):
    data = load_noisy_dataset("imagefolder", data_dir=str(folder / "images"), cache_dir=str(folder / "cache"))["train"]
    return torch.utils.data.DataLoader(
        TransformedDataset(data, transform),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate_images,
        persistent_workers=workers > 0,
    )


def timm_loader(folder: Path, transform, size: int, batch_size: int, workers: int):
    data = timm.data.create_dataset("", root=str(folder / "images" / "train"))
    loader = timm.data.create_loader(
        data,
        input_size=(3, size, size),
        batch_size=batch_size,
        is_training=True,
        num_workers=workers,
        use_prefetcher=False,
        device=torch.device("cpu"),
        pin_memory=False,
        persistent_workers=workers > 0,
    )
    data.transform = transform  # create_loader put its own there
    return loader


def images_per_second(loader, count) -> float:
    start, seen = time.perf_counter(), 0
    for batch in loader:
        seen += count(batch)
    return seen / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", required=True, help="File with the columns `image` and `label`.")
    parser.add_argument("--image_size", type=int, required=True, help="Side of the input in pixels.")
    parser.add_argument("--limit", type=int, default=2000, help="Images to use (default: %(default)s).")
    parser.add_argument("--workers", type=int, default=0, help="Loader processes (default: %(default)s).")
    parser.add_argument("--batch_size", type=int, default=64, help="Images in a batch (default: %(default)s).")
    parser.add_argument("--repeats", type=int, default=5, help="Interleaved pairs of runs (default: %(default)s).")
    parser.add_argument("--output", type=Path, help="Append the result to this JSON file.")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    size = arguments.image_size
    config = {"input_size": (3, size, size), "crop_pct": 1.0 if size <= 64 else 0.875}
    transform, _ = create_transforms(config, augmentation="standard")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_folder(arguments.parquet, folder, arguments.limit)
        ours = our_loader(folder, transform, arguments.batch_size, arguments.workers)
        theirs = timm_loader(folder, transform, size, arguments.batch_size, arguments.workers)
        ratios = []
        for repeat in range(arguments.repeats + 1):
            speeds = [
                images_per_second(ours, lambda batch: len(batch["index"])),
                images_per_second(theirs, lambda batch: len(batch[1])),
            ]
            if repeat:  # the first pair warms the file cache up
                ratios.append(speeds[0] / speeds[1])
                print(f"pair {repeat}: ours / timm = {ratios[-1]:.3f}", flush=True)
    result = {
        "data": Path(arguments.parquet).parent.name,
        "image_size": size,
        "workers": arguments.workers,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "pairs": len(ratios),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.machine()}, one thread for each process",
    }
    print(json.dumps(result))
    if arguments.output:
        kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps([*kept, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
