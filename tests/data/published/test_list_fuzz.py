"""Whatever bytes a list or label file holds: rows, or one `ValueError` that names the file and the line."""

import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hnml_hf.data.checks import load_exclusions
from hnml_hf.data.custom.builders import Table
from hnml_hf.data.published.animal10n import Animal10N
from hnml_hf.data.published.clothing1m import Clothing1M
from hnml_hf.data.published.food101n import Food101N
from hnml_hf.data.published.webvision import WebVision


INSERTED = (
    *(b"", b" ", b"\t", b",", b'"', b"\r", b"\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"../x", b"/x"),
    *(b" 1", b" -1", b" 99", b"x", b"5", b".5", b"-", b" 1 1", b"n00000001 x", b'{"image": 1}', b"[", b"1" * 5000),
    *(b"\x1a", b"\\", b"\xed\xa0\x80", b"\\ud800", b"1e9"),
)


def damaged(content: bytes, seed: int) -> bytes:
    """One to three places of a file changed; often near the end of a line, where the labels are."""
    random = np.random.default_rng(seed)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(0, len(content) + 1))
        if random.random() < 0.6:
            at = max(content.find(b"\n", at) - int(random.integers(0, 3)), 0)
        insert = random.bytes(5) if random.random() < 0.1 else INSERTED[random.integers(len(INSERTED))]
        cut = int(random.choice([0, 0, 1, 2, 30]))
        content = content[:at] + insert + content[at + cut :]
    return content


def check(builder_class, root, file, seed, **options):
    """Builds the dataset from a copy with one damaged file, up to the writing of rows."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        copy.mkdir()
        for child in root.iterdir():  # images stay where they are
            if child.is_dir() and child.name not in ("info", "meta"):
                (copy / child.name).symlink_to(child)
            elif child.is_dir():
                shutil.copytree(child, copy / child.name)
            else:
                shutil.copy(child, copy)
        path = copy / file
        path.write_bytes(damaged(path.read_bytes(), seed))
        if "tables" in options:
            options["tables"] = {"train": [str(path)]}
        try:
            builder = builder_class(data_dir=str(copy), cache_dir=folder, partial=True, **options)
            splits = builder.read_splits(str(copy))
            builder._split_generators(None)
            assert splits["train"][0].index.size
        except ValueError as error:
            assert type(error) is ValueError
            assert re.search(r"[^/]+\.(txt|tsv|csv|json|jsonl|bin):(\d+|1): |label_names|record", str(error)), error


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SEED = st.integers(0, 2**32)


@pytest.mark.parametrize("file", ["noisy_train_key_list.txt", "noisy_label_kv.txt", "clean_val_key_list.txt"])
def test_clothing1m(clothing1m, file):
    @FUZZ
    @given(SEED)
    def run(seed):
        check(Clothing1M, clothing1m.root, file, seed)

    run()


@pytest.mark.parametrize(
    "file", ["synsets.txt", "queries_synsets_map.txt", "train_filelist_google.txt", "val_filelist.txt"]
)
def test_webvision(webvision, file):
    @FUZZ
    @given(SEED)
    def run(seed):
        check(WebVision, webvision.root, f"info/{file}", seed, config_name="google")

    run()


@pytest.mark.parametrize("file", ["classes.txt", "imagelist.tsv", "verified_train.tsv"])
def test_food101n(food101n, file):
    @FUZZ
    @given(SEED)
    def run(seed):
        check(Food101N, food101n.root, f"meta/{file}", seed, food101_dir=str(food101n.parent / "food-101"))

    run()


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_tables(clothing1m, tmp_path, suffix):
    keys = clothing1m.keys["clean_val"]
    text = {
        ".csv": "image,label,clean_label,index\n" + "".join(f'"{key}",{i % 3},,{i}\n' for i, key in enumerate(keys)),
        ".json": str([{"image": key, "label": i % 3} for i, key in enumerate(keys)]).replace("'", '"'),
        ".jsonl": "".join(f'{{"image": "{key}", "label": "c{i % 3}"}}\n' for i, key in enumerate(keys)),
    }[suffix]
    (tmp_path / f"train{suffix}").write_text(text)
    (tmp_path / "images").symlink_to(clothing1m.root / "images")

    @FUZZ
    @given(SEED)
    def run(seed):
        check(Table, tmp_path, f"train{suffix}", seed, tables={})

    run()


def test_animal10n(animal10n):
    @settings(FUZZ, max_examples=20)
    @given(SEED)
    def run(seed):
        check(Animal10N, animal10n.root / "binary", "test_batch.bin", seed)

    run()


def test_exclusion_lists(tmp_path):
    content = b"".join(b'{"split": "train", "index": %d, "reason": "x"}\n' % number for number in range(4))

    @FUZZ
    @given(SEED)
    def run(seed):
        path = tmp_path / "excluded.jsonl"
        path.write_bytes(damaged(content, seed))
        try:
            load_exclusions(path)
        except ValueError as error:
            assert type(error) is ValueError and re.search(r"excluded.jsonl:\d+: ", str(error))

    run()
