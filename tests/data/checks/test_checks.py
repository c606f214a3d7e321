import io
import json
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from hnml_hf.data import checks, schema


SHARED_DATA = Path(__file__).parents[3] / ".." / "shared" / "data"


def encode(seed, *, size=(24, 16), mode="RGB", image_format="PNG"):
    """A noisy picture: different seeds give different bytes, and cutting the file loses pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(buffer, format=image_format)
    return buffer.getvalue()


def decode_error(cell, **options):
    """The kind of defect and the reason, `None` for a good image."""
    found = checks.check_image(cell, **options)
    return None if found.kind is None else f"{found.kind}: {found.reason}"


def make_split(cells, labels, *, num_classes=3, clean_labels=None, index=None):
    """A split as the builders make it; arrow takes labels that `Dataset.from_dict` would refuse."""
    features = schema.noisy_features([f"class {i}" for i in range(num_classes)])
    columns = {
        "image": pa.array(
            [cell if cell is None or isinstance(cell, dict) else {"bytes": cell, "path": None} for cell in cells],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        ),
        "label": pa.array(labels, pa.int64()),
        "clean_label": pa.array(clean_labels or [-1] * len(cells), pa.int64()),
        "index": pa.array(index or range(10, 10 + len(cells)), pa.int64()),
    }
    return Dataset(pa.table(columns).cast(features.arrow_schema), fingerprint=repr((cells, labels)))


def clean_splits():
    return DatasetDict(
        train=make_split([encode(i) for i in range(9)], [0, 1, 2] * 3),
        test=make_split([encode(100 + i, image_format="JPEG") for i in range(3)], [0, 1, 2]),
    )


def check(dataset, **options):
    report = checks.check_dataset(dataset, num_workers=2, **options)
    json.dumps(report, allow_nan=False)
    assert report["num_defects"] == sum(map(len, report["defects"].values()))
    return report


def found(report):
    return {kind: entries for kind, entries in report["defects"].items() if entries}


# ---- one image ----------------------------------------------------------------------------------------------------


def corrupt_png():
    """A PNG whose pixel data is complete but whose checksum is wrong: plain decoding does not notice."""
    data = bytearray(encode(0))
    at = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    checksum = zlib.crc32(data[at : at + 4 + length])
    assert struct.unpack(">I", data[at + 4 + length : at + 8 + length]) == (checksum,)
    data[at + 4 + length] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (None, "missing_image: the cell is empty"),
        ({"bytes": None, "path": None}, "missing_image: the cell is empty"),
        ({"bytes": None, "path": "no/such.jpg"}, "missing_file: no such file"),
        ({"bytes": None, "path": "a\0b.jpg"}, "unreadable_file: ValueError"),
        ({"bytes": b"", "path": None}, "empty_file: 0 bytes"),
        ({"bytes": b"\xef\xbb\xbf\r\n<!DOCTYPE html><html>404</html>", "path": None}, "html_file: a web page"),
        ({"bytes": b"<html><body>blocked", "path": None}, "html_file: a web page"),
        ({"bytes": b"no image at all", "path": None}, "undecodable: no image format"),
        ({"bytes": encode(0, size=(300, 300), image_format="JPEG")[:5000], "path": None}, "truncated: OSError"),
        ({"bytes": encode(0, size=(300, 300))[:5000], "path": None}, "truncated: OSError"),
        ({"bytes": corrupt_png(), "path": None}, "undecodable: SyntaxError: broken PNG"),
        ({"bytes": encode(0), "path": None}, None),
        ({"bytes": encode(0, mode="L", image_format="JPEG"), "path": "x.jpg"}, None),
        ({"bytes": encode(0, mode="CMYK", image_format="JPEG"), "path": None}, None),
        ({"bytes": encode(0, mode="P"), "path": None}, None),
        ({"bytes": encode(0, image_format="WEBP"), "path": None}, None),
    ],
)
def test_images_are_classified(cell, expected):
    error = decode_error(cell)
    assert error is None if expected is None else error.startswith(expected)


@pytest.mark.parametrize("cut", [0.02, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files_cut_anywhere_are_found(image_format, cut):
    data = encode(1, size=(120, 90), image_format=image_format)
    assert decode_error({"bytes": data, "path": None}) is None
    error = decode_error({"bytes": data[: int(cut * len(data))], "path": None})
    assert error.split(":")[0] in ("truncated", "undecodable")


def test_random_damage_never_raises():
    """A thousand files with random bytes replaced: each is good or classified, and no other exception escapes."""
    rng = np.random.default_rng(0)
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
    sources = [encode(i, size=(40, 30), image_format=name) for i, name in enumerate(formats)]
    kinds = set()
    for trial in range(1000):
        data = bytearray(sources[trial % 6])
        for position in rng.integers(0, len(data), rng.integers(1, 20)):
            data[position] = rng.integers(256)
        kinds.add((decode_error({"bytes": bytes(data), "path": None}) or "good").split(":")[0])
    assert {"good", "undecodable"} <= kinds


def huge_png(width, height):
    """The header of a PNG of this size, without pixels: enough to know its size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + b"\0\0\0\0IDAT"


@pytest.mark.parametrize("side", [10_000, 20_000])  # 100 megapixels (Pillow warns) and 400 (Pillow refuses)
def test_huge_images_are_not_decoded(side):
    error = decode_error({"bytes": huge_png(side, side), "path": None})
    assert error.startswith("too_many_pixels")
    report = check(make_split([huge_png(side, side)], [0]))
    assert list(found(report)) == ["too_many_pixels"]


def test_the_pixel_limit_is_an_option():
    cell = {"bytes": encode(0, size=(24, 16)), "path": None}
    assert decode_error(cell, max_pixels=384) is None
    assert decode_error(cell, max_pixels=383) == "too_many_pixels: 24 x 16 pixels, the limit is 383"


# ---- datasets -----------------------------------------------------------------------------------------------------


def test_a_clean_dataset_has_no_defects():
    report = check(clean_splits())
    assert report["num_defects"] == 0
    assert found(report) == {}
    assert not any(report["notes"].values())
    assert set(report["defects"]) == set(checks.DEFECTS)
    assert report["splits"]["train"] == {
        "num_rows": 9,
        "num_decoded": 9,
        "class_counts": {"class 0": 3, "class 1": 3, "class 2": 3},
        "known_clean_labels": 0,
        "noise_rate": None,
        "sizes": {"smallest": [24, 16], "median": [24, 16], "largest": [24, 16]},
        "modes": {"RGB": 9},
    }


@pytest.mark.parametrize(
    ("clean_labels", "known", "rate"),
    [([0, 1, -1], 2, None), ([0, 1, 2], 3, 0.0), ([0, 2, -1], 2, 0.5), ([0, 1, None], 2, None)],
)
def test_a_noise_rate_where_the_data_tell_it(clean_labels, known, rate):
    """Where only right labels were verified, as in Food-101N, nothing is known of the share of wrong ones."""
    cells = [encode(i) for i in range(3)]
    summary = check(make_split(cells, [0, 1, 2], clean_labels=clean_labels))["splits"]["train"]
    assert (summary["known_clean_labels"], summary["noise_rate"]) == (known, rate)


def test_bad_images_are_listed_with_their_ids(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<!doctype html><title>404</title>")
    (tmp_path / "good, with comma.jpg").write_bytes(encode(0))
    cells = [
        {"bytes": None, "path": str(tmp_path / name)}
        for name in ("empty.jpg", "page.jpg", "good, with comma.jpg", "absent.jpg")
    ]
    cells += [None, encode(1, size=(300, 300))[:5000], b"garbage", encode(2)]
    report = check(make_split(cells, [0, 1, 2, 0, 1, 2, 0, 1]))
    assert {kind: [entry["index"] for entry in entries] for kind, entries in found(report).items()} == {
        "empty_file": [10],
        "html_file": [11],
        "missing_file": [13],
        "missing_image": [14],
        "truncated": [15],
        "undecodable": [16],
    }
    assert report["defects"]["missing_file"][0] == {
        "split": "train",
        "index": 13,
        "path": str(tmp_path / "absent.jpg"),
        "label": 0,
        "reason": "no such file",
    }
    assert report["splits"]["train"]["num_decoded"] == 2


def test_bad_labels():
    cells = [encode(i) for i in range(6)]
    split = make_split(cells, [0, None, 3, -1, 1, 2], clean_labels=[0, 1, 2, -1, 7, None])
    report = check(split)
    assert {kind: [(e["index"], e["label"]) for e in entries] for kind, entries in found(report).items()} == {
        "missing_label": [(11, None)],
        "label_out_of_range": [(12, 3), (13, -1)],
        "clean_label_out_of_range": [(14, 1)],
    }
    assert "label 3, classes are 0..2" in report["defects"]["label_out_of_range"][0]["reason"]


def test_duplicates_with_and_without_conflict():
    twin, triplet = encode(0), encode(1)
    report = check(make_split([twin, triplet, encode(2), twin, triplet, triplet], [0, 1, 2, 0, 1, 2]))
    assert list(found(report)) == ["conflicting_duplicates"]
    (conflict,) = report["defects"]["conflicting_duplicates"]
    assert [(row["index"], row["label"]) for row in conflict["rows"]] == [(11, 1), (14, 1), (15, 2)]
    (harmless,) = report["notes"]["harmless_duplicates"]
    assert [row["index"] for row in harmless["rows"]] == [10, 13]


def test_bad_files_are_no_duplicates_of_each_other():
    report = check(make_split([b"", b"", None, None], [0, 1, 0, 1]))
    assert set(found(report)) == {"empty_file", "missing_image"}


def test_repeated_ids():
    report = check(make_split([encode(i) for i in range(4)], [0, 1, 2, 0], index=[5, 6, 5, 7]))
    assert list(found(report)) == ["duplicate_index"]
    assert [row["label"] for row in report["defects"]["duplicate_index"][0]["rows"]] == [0, 2]


def test_overlap_between_stages_only():
    shared = [encode(i) for i in range(3)]
    own = [encode(10 + i) for i in range(9)]
    splits = DatasetDict(
        test=make_split([shared[0], shared[1], own[0]], [0, 1, 2]),
        train=make_split([own[1], shared[0], shared[2]], [0, 1, 2]),
        clean_train=make_split([shared[2], own[2], own[3]], [0, 1, 2]),  # same stage as train: no overlap
        validation=make_split([shared[1], own[4], own[5]], [0, 1, 2]),
    )
    report = check(splits)
    assert list(found(report)) == ["split_overlap"]
    overlaps = {
        tuple(entry["splits"]): [(row["split"], row["index"]) for row in entry["rows"]]
        for entry in report["defects"]["split_overlap"]
    }
    assert overlaps == {
        ("train", "test"): [("train", 11), ("test", 10)],
        ("validation", "test"): [("validation", 10), ("test", 11)],
    }


def test_class_sets():
    splits = clean_splits()
    splits["test"] = make_split([encode(50), encode(51)], [0, 0])
    report = check(splits)
    absent = {"splits": ["train", "test"], "reason": "classes with images in train only"}
    assert report["notes"]["absent_classes"] == [{**absent, "classes": ["class 1", "class 2"]}]
    assert report["num_defects"] == 0 and "absent_classes: classes of the training split" in checks.format_report(
        report
    )
    splits["train"], splits["test"] = splits["test"], splits["train"]
    report = check(splits)  # a class that training has never seen
    assert not report["notes"]["absent_classes"] and report["num_defects"] == 1
    assert report["defects"]["class_sets"][0]["reason"] == "classes with images in test only"
    splits = clean_splits()
    splits["test"] = make_split([encode(50 + i) for i in range(3)], [0, 1, 2], num_classes=4)
    assert "class names" in check(splits)["defects"]["class_sets"][0]["reason"]


def test_noisy_evaluation_labels_are_a_note():
    splits = clean_splits()
    splits["test"] = make_split([encode(50 + i) for i in range(3)], [0, 1, 2], clean_labels=[0, 2, -1])
    report = check(splits)
    assert report["num_defects"] == 0
    assert report["notes"]["noisy_evaluation_labels"] == [{"split": "test", "wrong": 1, "known": 2}]
    assert report["splits"]["test"]["noise_rate"] == 0.5


def test_files_without_row(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/0.jpg", "a/1.JPG", "a/extra.png", "notes.txt"):
        (tmp_path / name).write_bytes(encode(len(name) + ord(name[2])))
    for name in ("a/._0.jpg", ".thumbnails/0.jpg", "__MACOSX/0.jpg"):  # which the loader skips too
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    cells = [{"bytes": None, "path": str(tmp_path / "a" / ".." / "a" / name)} for name in ("0.jpg", "1.JPG")]
    report = check(make_split(cells, [0, 1]), image_dir=tmp_path)
    assert list(found(report)) == ["file_without_row"]
    assert [entry["path"] for entry in report["defects"]["file_without_row"]] == [str(tmp_path / "a" / "extra.png")]
    with pytest.raises(ValueError, match="`image_dir` must be a folder"):
        check(make_split(cells, [0, 1]), image_dir=tmp_path / "absent")


def test_views_report_their_own_rows():
    """Rows 3, 1, 4 of a split, of which 1 is bad: the report names its id."""
    split = make_split([encode(0), b"garbage", encode(2), encode(3), encode(4)], [0, 1, 2, 0, 3])
    report = check(split.select([3, 1, 4]))
    assert [entry["index"] for entry in report["defects"]["undecodable"]] == [11]
    assert [entry["index"] for entry in report["defects"]["label_out_of_range"]] == [14]
    assert report["splits"]["train"]["num_rows"] == 3


def test_a_report_of_nothing():
    report = check(make_split([], []))
    assert report["splits"]["train"]["num_rows"] == 0
    checks.format_report(report)


def test_order_does_not_depend_on_the_threads():
    cells = [b"garbage" if i % 3 else encode(i) for i in range(300)]
    split = make_split(cells, [0] * 300)
    reports = [checks.check_dataset(split, num_workers=n) for n in (1, 5)]
    assert reports[0] == reports[1]
    assert [e["index"] for e in reports[0]["defects"]["undecodable"]] == [10 + i for i in range(300) if i % 3]


def test_refusals():
    with pytest.raises(ValueError, match="lacks index"):
        check(clean_splits()["train"].remove_columns("index"))
    with pytest.raises(ValueError, match="at least one split"):
        check(DatasetDict())
    with pytest.raises(ValueError, match="at least 1"):
        checks.check_dataset(clean_splits(), num_workers=0)
    floats = clean_splits()["train"].remove_columns("clean_label").add_column("clean_label", [0.5] * 9)
    with pytest.raises(ValueError, match="`clean_label` must hold integers"):
        check(floats)


def test_real_images_are_clean(tmp_path):
    source = SHARED_DATA / "cifar10n-tiny" / "test.parquet"
    if not source.exists():
        pytest.skip("needs the CIFAR-10N subset beside the repository")
    test = Dataset.from_parquet(str(source), cache_dir=str(tmp_path)).select_columns(["image", "label", "index"])
    test = test.add_column("clean_label", test["label"][:], feature=test.features["label"])
    report = check(test)
    assert report["num_defects"] == 0
    assert report["splits"]["train"]["num_decoded"] == 500
    assert report["splits"]["train"]["modes"] == {"RGB": 500}


# ---- the report ---------------------------------------------------------------------------------------------------


def test_the_table_shows_counts_and_first_examples(tmp_path):
    report = check(make_split([encode(0), b"garbage", encode(0)], [0, 1, 2]))
    text = checks.format_report(report)
    assert "train" in text and "24x16" in text and "RGB 2" in text
    assert "1  undecodable: images that cannot be decoded; first: train index 11 no image format" in text
    assert "1  conflicting_duplicates" in text and "train index 10 label 0, train index 12 label 2" in text
    assert "notes: none" in text
    checks.save_report(tmp_path / "audit.json", report)
    assert json.loads((tmp_path / "audit.json").read_text()) == report


def test_names_cannot_write_to_the_terminal():
    report = check(make_split([{"bytes": None, "path": "\x1b[2J/\nevil.jpg"}], [0]))
    assert "\x1b" not in checks.format_report(report)
    assert r"\x1b[2J/\nevil.jpg" in checks.format_report(report)


# ---- exclusions ---------------------------------------------------------------------------------------------------


def test_exclusions_round_trip(tmp_path, caplog):
    """Train ids 10..16: 10 garbage, 11, 12 equal with other labels, 13 also in test, 14 bad label, 15, 16 good."""
    shared, twin = encode(1), encode(2)
    splits = DatasetDict(
        train=make_split([b"garbage", twin, twin, shared, encode(3), encode(4), encode(5)], [0, 0, 1, 2, 9, 1, 2]),
        test=make_split([encode(50), encode(51), shared, b""], [0, 1, 2, 0]),
    )
    path = tmp_path / "excluded.jsonl"
    assert checks.save_exclusions(path, check(splits)) == 6
    exclusions = checks.load_exclusions(path)
    assert {split: sorted(rows) for split, rows in exclusions.items()} == {"train": [10, 11, 12, 13, 14], "test": [13]}
    assert exclusions["train"][13] == "split_overlap: also in test"

    with caplog.at_level(logging.WARNING):
        kept = checks.apply_exclusions(splits, exclusions)
    assert kept["train"]["index"][:] == [15, 16]
    assert kept["test"]["index"][:] == [10, 11, 12]
    assert len(splits["train"]) == 7
    assert "5 of 7 rows of 'train' left out" in caplog.text
    assert list(found(check(kept))) == ["class_sets"]  # class 0 has no row left in train


def test_exclusions_of_another_dataset_are_refused():
    splits = clean_splits()
    message = (
        "Of 2 rows that the exclusion list names, the split 'train' lacks 1; the first missing id is 99. Was the list"
    )
    with pytest.raises(ValueError, match=message):
        checks.apply_exclusions(splits, {"train": {10: "", 99: ""}})
    with pytest.raises(ValueError, match="names the splits dev; the dataset has train, test"):
        checks.apply_exclusions(splits, {"dev": {10: ""}})
    with pytest.raises(ValueError, match="leaves no row of the split 'test'"):
        checks.apply_exclusions(splits, {"test": {10: "", 11: "", 12: ""}})


def test_a_list_that_files_have_come_or_gone_since_is_refused(tmp_path):
    """Its ids are those of other images now, and the wrong ones would be left out."""
    now = [{"bytes": None, "path": f"/data/pets/{name}"} for name in ("cat/0a.png", "cat/0.png", "dog/copy.png")]
    splits = DatasetDict(train=make_split([*now, encode(0)], [0, 0, 1, 2]))

    def kept(*rows):
        path = tmp_path / "excluded.jsonl"
        lines = ({"split": "train", "index": index, "path": name} for index, name in rows)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return checks.apply_exclusions(splits, checks.load_exclusions(path))["train"]["index"][:]

    message = (
        r"excluded.jsonl:2: sample 11 is pets/dog/copy.png there, and /data/pets/cat/0.png in .* Make the list again"
    )
    with pytest.raises(ValueError, match=message):
        kept((12, "pets/dog/copy.png"), (11, "pets/dog/copy.png"))
    with pytest.raises(
        ValueError, match="excluded.jsonl:1: sample 10 is nope.png there, and /data/pets/cat/0a.png in"
    ):
        kept((10, "nope.png"))
    moved, bare, without, embedded = (12, "/elsewhere/dog/copy.png"), (11, "0.png"), (10, None), (13, "any.png")
    assert kept(embedded, moved, bare) == [10]
    assert kept(moved, without) == [11, 13]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("train 17", "the line is not JSON in UTF-8"),
        ("[" * 10**5, "the line is not JSON in UTF-8"),
        ("[]", "the line is no JSON object"),
        ("3", "the line is no JSON object"),
        ("{}", "the line has no `split` and no `index`"),
        ('{"split": "train"}', "the line has no `index`"),
        ('{"split": 1, "index": 17}', "`split` must be the name of a split, in quotes"),
        ('{"split": "train", "index": "17"}', "`index` must be a sample id: an integer from 0 .*, without quotes"),
        ('{"split": "train", "index": 10000000000000000000000}', "`index` must be a sample id"),
    ],
)
def test_broken_exclusion_lists_name_the_line(tmp_path, line, reason):
    path = tmp_path / "excluded.jsonl"
    path.write_text('{"split": "train", "index": 17}\n\n' + line)
    with pytest.raises(ValueError, match=f"excluded.jsonl:3: {reason}.*An exclusion list has lines like"):
        checks.load_exclusions(path)


def test_an_empty_exclusion_list_changes_nothing(tmp_path):
    path = tmp_path / "excluded.jsonl"
    assert checks.save_exclusions(path, check(clean_splits())) == 0
    assert checks.apply_exclusions(clean_splits(), checks.load_exclusions(path))["train"].num_rows == 9
