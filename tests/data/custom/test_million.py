"""A million rows become a dataset in minutes and in well under a gigabyte; few files stand behind them."""

import json
import os
import subprocess
import sys

import pytest


ROWS = int(os.environ.get("HNML_TEST_ROWS", "1000000"))
PROGRAM = """
import json, resource, sys, time
from hnml_hf import load_noisy_dataset
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
name, options = json.loads(sys.argv[1])
times = []
for _ in range(2):
    start = time.perf_counter()
    dataset = load_noisy_dataset(name, **options)
    times.append(time.perf_counter() - start)
size = dataset["train"][len(dataset["train"]) - 1]["image"].size
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"rows": len(dataset["train"]), "first_s": times[0], "second_s": times[1],
                  "beyond_interpreter_mib": (peak - idle) / 1024, "peak_mib": peak / 1024, "size": size}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory, pictures):
    """A Clothing1M tree of 1,000 folders, all of them links to one folder with links to one image."""
    root = tmp_path_factory.mktemp("million")
    pool = root / "pool"
    pool.mkdir()
    pictures.images[0].convert("RGB").save(pool / "0.jpg")
    names = [f"{1278541879 + i},{867148000 + 1000 * i}.jpg" for i in range(ROWS // 1000)]
    for name in names:
        os.link(pool / "0.jpg", pool / name)
    (pool / "0.jpg").unlink()
    keys = []
    for number in range(1000):
        folder = root / "tree" / "images" / str(number // 100) / f"{number % 100:02d}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(pool)
        keys += [f"images/{number // 100}/{number % 100:02d}/{name}" for name in names]
    lists = {"noisy_train": keys, "clean_val": keys[:14], "clean_test": keys[14:28]}
    for part, part_keys in lists.items():
        (root / "tree" / f"{part}_key_list.txt").write_text("".join(f"{key}\n" for key in part_keys))
    labels = "".join(f"{key} {i % 14}\n" for i, key in enumerate(reversed(keys)))
    for kind in ("noisy", "clean"):
        (root / "tree" / f"{kind}_label_kv.txt").write_text(labels)
    with open(root / "train.csv", "w") as file:
        file.write("image,label\n")
        file.writelines(f'"{key}",class {i % 14}\n' for i, key in enumerate(keys))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("form", ["clothing1m", "imagefolder", "table"])
def test_a_million_rows(tree, tmp_path, form):
    name, options = {
        "clothing1m": ("clothing1m", {"data_dir": str(tree / "tree"), "partial": True}),
        "imagefolder": ("imagefolder", {"data_dir": str(tree / "tree" / "images")}),
        "table": (str(tree / "train.csv"), {"data_dir": str(tree / "tree")}),
    }[form]
    options["cache_dir"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([name, options])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(form, result)
    assert result["rows"] == ROWS
    assert result["first_s"] < 600 and result["second_s"] < 60
    assert result["beyond_interpreter_mib"] < 1024
