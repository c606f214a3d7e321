"""Review the label issues of a run in a browser; every decision is saved at once.

    python scripts/review.py outputs/quickstart
    python scripts/review.py outputs/quickstart --annotator anna
    python scripts/review.py outputs/quickstart --import label_studio.json

Open the address that it prints; it holds a token, and answers on this machine alone. Annotations go to
`_audit/annotations.jsonl` of the run, for `hnml clean`. Several people may review at once.
"""

import argparse
import getpass
import importlib
import json
import re
import sys
import threading
from pathlib import Path

from hnml_hf.audit.review.server import MAX_ENTRIES, PORT, Refused, ReviewServer, check_annotator, open_review
from hnml_hf.cli import plain_message, quiet_pipes
from hnml_hf.common.words import counted


CLASSIFIER_FOLDER = "_judge"  # of an audit's `output_dir`: the judge as a model


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="`output_dir` of a run that was audited.")
    parser.add_argument("--annotator", help="Who annotates; default: the name of the user.")
    parser.add_argument("--annotations", help="File for the annotations; default: `_audit/annotations.jsonl`.")
    parser.add_argument(
        "--import",
        dest="imports",
        nargs="+",
        default=[],
        help="Annotations to import first: CSV of the report, or exports of Label Studio, CVAT or FiftyOne.",
    )
    parser.add_argument("--port", type=int, default=PORT, help="Port on this machine; 0 takes a free one.")
    options = parser.parse_args(argv)
    if not 0 <= options.port < 2**16:
        parser.error(f"--port must be between 0 and {2**16 - 1}; given {options.port}")
    try:
        options.annotator = check_annotator(user_name() if options.annotator is None else options.annotator)
    except Refused as error:
        parser.error(f"--annotator {options.annotator!r}: {error}")
    return options


class RunImages:
    """Images and maps that need the dataset or the model of a run, which are loaded when they are first asked for."""

    def __init__(self, run: str):
        self.run = run
        models = Path(run), Path(run, CLASSIFIER_FOLDER)  # of a training, or of an audit without one
        self.model = next((folder for folder in models if names_classes_of(folder, run)), None)
        self._lock = threading.Lock()
        self._dataset = self._model = None

    def dataset(self):
        import numpy as np
        from options import load_data, saved_data_arguments

        from hnml_hf.data.schema import column

        with self._lock:
            if self._dataset is None:
                data = load_data(saved_data_arguments(self.run))["train"]
                ids = column(data, "index")
                self._dataset = data, dict(zip(ids.tolist(), np.arange(len(ids)).tolist(), strict=True))
            return self._dataset

    def picture(self, index: int):
        """The image of a sample that is part of the dataset."""
        from datasets import Image

        from hnml_hf.data.decoding import decode

        data, rows = self.dataset()
        stored = data.select_columns(["image"]).cast_column("image", Image(decode=False))[rows[index]]["image"]
        return decode(stored)

    def maps(self, index: int):
        """The picture of a sample as the model sees it, with its activation maps."""
        import torch
        from audit import load_classifier

        from hnml_hf.audit.gallery import collect_evidence
        from hnml_hf.audit.table import load_audit

        data, _ = self.dataset()
        with self._lock:
            if self._model is None:
                self._model = (
                    *load_classifier(str(self.model), torch.device("cpu")),
                    load_audit(self.run).set_index("index"),
                )
            model, transform, crop, has_maps, table = self._model
            row = table.loc[[index]].reset_index()
            (shown,) = collect_evidence(data, row, transform=transform, model=model if has_maps else None, **crop)
            return shown


def names_classes_of(model: Path, run: str) -> bool:
    """Whether a folder holds a model for the classes of an audit."""
    config, summary = model / "config.json", Path(run, "_audit", "summary.json")
    if not (config.is_file() and summary.is_file()):
        return False
    names, classes = (json.loads(file.read_text(encoding="utf-8")) for file in (config, summary))
    return names.get("label_names") == classes["class_names"]


def read_imports(run: str, paths: list[str]) -> list:
    """The annotations of some files, each a table."""
    if not paths:
        return []
    from hnml_hf.audit.review import read_all
    from hnml_hf.audit.table import load_audit

    return read_all(paths, load_audit(run))


def take_in(review, found):
    """Keep the annotations of a table in the log of a review, each once however often it is taken in."""
    from hashlib import blake2b

    for annotator, rows in found.groupby("annotator"):
        entries = rows[["index", "annotation", "new_label_name"]].to_dict("records")
        for start in range(0, len(entries), MAX_ENTRIES):
            part = entries[start : start + MAX_ENTRIES]
            batch = blake2b(json.dumps([annotator, part]).encode(), digest_size=16).hexdigest()
            review.annotate(part, annotator, batch)


def user_name() -> str:
    """The name of the user as far as it can be an annotator's; in a container there may be none."""
    try:
        name = re.sub(r"[^\w .@-]", "_", getpass.getuser())[:40]
    except (OSError, KeyError, ImportError):
        name = ""
    return name.strip() or "reviewer"


def prepare(review):
    """What is needed later: for the first picture, and to group by folder."""
    importlib.import_module("hnml_hf.data.decoding")
    len(review.queue.folders)


@quiet_pipes()
def main(argv: list[str] | None = None):
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    has_data = Path(options.run, "_audit", "dataset.json").is_file()
    try:
        images = RunImages(options.run)
        review = open_review(
            options.run,
            annotations=options.annotations,
            annotator=options.annotator,
            pictures=images.picture if has_data else None,
            maps=images.maps if has_data and images.model else None,
        )
        files = list(dict.fromkeys(options.imports))
        for path, found in zip(files, read_imports(options.run, files), strict=True):
            take_in(review, found)
            print(f"{path}: {counted(len(found), 'annotation')}")
        server = ReviewServer(review, port=options.port)
    except (ValueError, OSError, Refused) as error:
        used = " Another review may use this port: give --port." if "in use" in str(error) else ""
        raise SystemExit(f"error: {plain_message(error)}{used}") from error
    progress = review.queue.progress()
    print(f"{progress['decided']:,} of {counted(progress['issues'], 'label issue')} decided.")
    print(f"Annotations: {review.log.path}")
    threading.Thread(target=prepare, args=[review]).start()  # a daemon that imports as Python ends aborts it
    try:
        print(f"Review: {server.url}\nCtrl-C ends it; nothing is lost.", flush=True)
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
