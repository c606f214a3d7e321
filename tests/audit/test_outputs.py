"""What comes out of an audit: the corrected dataset in the form in which it came, and every row accounted for."""

import csv
import errno
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from reviews import make_run

from hnml_hf import TrainingDynamics, audit_run, load_audit, load_noisy_dataset
from hnml_hf.audit.cleaning import load_excluded, plan_cleaning, plan_targets
from hnml_hf.audit.outputs import (
    FORMATS,
    Source,
    _place,
    describe_plan,
    read_source,
    write_csv,
    write_dataset,
    write_folder,
)
from hnml_hf.audit.review import apply_annotations, merge_annotations, read_annotations, write_annotations
from hnml_hf.audit.review.lineage import decided_samples, lineage_beside, lineage_of_rows, write_lineage
from hnml_hf.audit.review.log import AnnotationLog
from hnml_hf.audit.table import likely_columns, write_audit
from hnml_hf.common.atomic import new_folder
from hnml_hf.data.schema import labels_fingerprint
from hnml_hf.data.targets import targets_of


NAMES = ("cat", "dog", "horse")


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def annotate(folder, table, said):
    """Annotations by row of a table: "right", "unsure", or the name of the true class."""
    rows = [
        {
            "index": table["index"][row],
            "annotation": word if word in ("right", "unsure") else "wrong",
            "new_label_name": "" if word in ("right", "unsure") else word,
            "label_name": table["label_name"][row],
        }
        for row, word in said.items()
    ]
    path = write_annotations(folder / "anna.csv", rows)
    return path, merge_annotations([read_annotations(path, table)]).annotations


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def table(tmp_path):
    """30 photographs in folders; beside them a test image, one held out, one excluded, a broken one and a text."""
    table = make_run(tmp_path)
    photos = tmp_path / "photos"
    (photos / "test" / "cat").mkdir(parents=True)
    image = Image.new("RGB", (8, 8))
    image.save(photos / "test" / "cat" / "t.png")
    image.save(photos / "train" / "cat" / "held.png")
    (photos / "train" / "cat" / "broken.png").write_bytes(b"no image")
    (photos / "train" / "dog" / "notes.txt").write_text("hello")
    line = {"split": "train", "index": 5, "reason": "broken", "path": str(photos / "train" / "cat" / "broken.png")}
    (tmp_path / "exclude.jsonl").write_text(json.dumps(line) + "\n")
    saved = tmp_path / "run" / "_audit" / "dataset.json"
    more = {"exclude": str(tmp_path / "exclude.jsonl"), "validation_fraction": 0.1}
    saved.write_text(json.dumps({**json.loads(saved.read_text()), **more}))
    return table


def held_nothing_out(run):
    saved = run / "_audit" / "dataset.json"
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "validation_fraction": 0.0}))


def other_class(table, row):
    return next(name for name in NAMES if name != table["label_name"][row])


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_annotations_go_before_scores(table, tmp_path):
    new = other_class(table, 29)
    _, said = annotate(tmp_path, table, {0: "right", 1: "unsure", 29: new})
    plan = plan_cleaning(table, annotations=said, how="drop", threshold=0.5)
    assert plan["label_action"][[0, 1, 29]].tolist() == ["annotated", "kept", "annotated"]
    assert plan["label_name"][29] == new
    dropped = (table["noise_score"] >= 0.5) & ~table.index.isin([0, 1, 29])
    assert (plan["label_action"] == "dropped").tolist() == dropped.tolist()
    relabelled = plan_cleaning(table, annotations=said, how="relabel", threshold=0.5)
    assert relabelled["label_name"][dropped].tolist() == table["suggested_name"][dropped].tolist()
    assert plan_cleaning(table, how="weight")["weight"].tolist() == (1 - table["noise_score"]).tolist()


def test_a_class_that_does_not_exist_is_offered(table, tmp_path):
    _, said = annotate(tmp_path, table, {0: "zebra", 1: "zebra", 2: "yak"})
    with pytest.raises(ValueError, match=r"does not have: `zebra` \(2\), `yak` \(1\). Add them by `--add_classes`"):
        plan_cleaning(table, annotations=said)
    plan = plan_cleaning(table, annotations=said, add_classes=["zebra", "yak"])
    assert plan["label"][[0, 1, 2]].tolist() == [3, 3, 4] and plan.attrs["class_names"] == [*NAMES, "zebra", "yak"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("3", r"`3` \(1, the class is called `03`, and its zeros count\)\."),
        ("3.0", r"`3.0` \(1, the class is called `03`, and its zeros count\)\."),
        ("0", r"`0` \(1, the class is called `00`, and its zeros count\)\."),
        ("7", r"`7` \(1\)\."),
        ("10", r"`10` \(1\)\."),
    ],
)
def test_a_class_whose_zeros_are_lost_is_named(name, said, table, tmp_path):
    """As in a table whose column was read as numbers."""
    table.attrs["class_names"] = ["00", "03", "100"]
    table = table.assign(label_name=[table.attrs["class_names"][label] for label in table["label"]])
    _, annotations = annotate(tmp_path, table, {0: name})
    with pytest.raises(ValueError, match="classes that the dataset does not have: " + said):
        plan_cleaning(table, annotations=annotations)


@pytest.mark.parametrize(
    ("added", "message"), [(["Dog"], "`Dog` differs from `dog`"), (["zebra", "ZEBRA"], "`ZEBRA` differs from `zebra`")]
)
def test_new_classes_that_some_disks_would_put_into_one_folder_are_refused(added, message, table, tmp_path, capsys):
    annotate(tmp_path, table, {0: added[-1]})
    options = [tmp_path / "run", "--annotations", tmp_path / "anna.csv", "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match=f"The new class {message} only in upper and lower case.*choose another"):
        run_clean(*options, "--add_classes", *added)
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [None, "drop", "relabel", "weight", "posterior"])
def test_a_label_that_is_wrong_without_a_class_is_left_out(how, table, tmp_path):
    """The last two rows have low scores, which would keep them."""
    _, said = annotate(tmp_path, table, {28: table["label_name"][28], 29: "right"})
    plan = plan_cleaning(table, annotations=said, how=how)
    assert plan["label_action"][28:].tolist() == ["dropped", "annotated"] and plan["annotation"][28] == "wrong"


def test_a_dry_run_says_what_would_change(table, tmp_path):
    _, said = annotate(tmp_path, table, {0: "zebra", 1: "right"})
    lines = "\n".join(describe_plan(plan_cleaning(table, annotations=said, add_classes=["zebra"])))
    assert "30 rows were scored: 28 kept, 2 annotated" in lines and "1 wrong" in lines
    assert f"1  {table['label_name'][0]} -> zebra" in lines and table["path"][0] in lines


# -- a folder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", ["copy", "hardlink", "symlink"])
def test_a_folder_comes_out_as_it_was(files, table, tmp_path):
    new = other_class(table, 0)
    before = {path: (tmp_path / "photos" / path).read_bytes() for path in files_below(tmp_path / "photos")}
    _, said = annotate(tmp_path, table, {0: new, 1: "right"})
    plan = plan_cleaning(table, annotations=said, how="drop", threshold=0.7)
    actions = write_folder(plan, read_source(tmp_path / "run"), tmp_path / "out", files=files)
    dropped = plan["path"][plan["label_action"] == "dropped"]
    gone = {os.path.relpath(path, tmp_path / "photos") for path in dropped} | {"train/cat/broken.png"}
    moved = os.path.relpath(table["path"][0], tmp_path / "photos")
    expected = {path: content for path, content in before.items() if path not in gone and path != moved}
    expected[f"train/{new}/0000.png"] = before[moved]
    found = files_below(tmp_path / "out")
    assert found == sorted([*expected, "lineage.csv"])
    assert all((tmp_path / "out" / path).read_bytes() == content for path, content in expected.items())
    assert (tmp_path / "out" / f"train/{new}/0000.png").is_symlink() == (files == "symlink")
    assert files_below(tmp_path / "photos") == sorted(before)  # the source is as it was
    assert actions == {
        **{"kept": 28 - len(dropped), "annotated": 2, "dropped": len(dropped)},
        **{"excluded": 1, "held_out": 1, "other_split": 1, "other_file": 1},
    }
    lineage = read_csv(tmp_path / "out" / "lineage.csv")
    assert len(lineage) == 34
    first = next(row for row in lineage if row["index"] == str(table["index"][0]))
    assert (first["path"], first["label"], first["label_original"]) == (
        f"train/{new}/0000.png",
        new,
        table["label_name"][0],
    )
    assert (first["annotation"], first["annotator"], first["label_action"]) == ("wrong", "anna", "annotated")


@pytest.mark.parametrize("name", ["photos", "./photos", "photos/"])
def test_a_folder_is_one_however_it_is_named(name, tmp_path, monkeypatch):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "0.png").touch()
    monkeypatch.chdir(tmp_path)
    assert Source(name).format == "folder"
    (tmp_path / "quickstart" / "cat").mkdir(parents=True)
    assert Source("quickstart").format == "arrow"  # a known dataset goes before a folder of its name


def test_two_files_of_one_name_both_arrive(table, tmp_path):
    new = other_class(table, 0)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "train" / new / "0000.png")
    _, said = annotate(tmp_path, table, {0: new})
    write_folder(plan_cleaning(table, annotations=said), read_source(tmp_path / "run"), tmp_path / "out")
    assert {"0000.png", "0000-2.png"} <= {path.name for path in (tmp_path / "out" / "train" / new).iterdir()}


@pytest.mark.parametrize("letter", ["x", "ü"])
def test_two_files_of_one_name_that_fills_its_room_both_arrive(letter, table, tmp_path):
    new, long = other_class(table, 0), letter * (250 // len(letter.encode())) + ".png"
    for folder in (table["label_name"][0], new):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "train" / folder / long)
    table.loc[0, "path"] = str(tmp_path / "photos" / "train" / table["label_name"][0] / long)
    _, said = annotate(tmp_path, table, {0: new})
    write_folder(plan_cleaning(table, annotations=said), read_source(tmp_path / "run"), tmp_path / "out")
    arrived = [path.name for path in (tmp_path / "out" / "train" / new).iterdir() if path.name.startswith(letter)]
    assert len(arrived) == 2 and long in arrived and all(len(os.fsencode(name)) in (253, 254, 255) for name in arrived)


def test_a_folder_that_cannot_be_written_leaves_nothing(table, tmp_path, monkeypatch):
    plan, source = plan_cleaning(table, how="relabel"), read_source(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already: name a new folder"), new_folder(tmp_path / "out"):
        pytest.fail("this is never reached")
    with pytest.raises(ValueError, match="A folder cannot hold what `weight` gives"):
        write_folder(plan_cleaning(table, how="weight"), source, tmp_path / "new")
    _, said = annotate(tmp_path, table, {0: "../x"})
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        write_folder(plan_cleaning(table, annotations=said, add_classes=["../x"]), source, tmp_path / "new")

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.copy2", refuse)
    with pytest.raises(PermissionError), new_folder(tmp_path / "new") as folder:
        write_folder(plan, source, folder)
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.part").exists()


def test_a_folder_with_a_pipe_and_links_in_a_circle(table, tmp_path):
    """Neither is copied, and neither is waited for."""
    os.mkfifo(tmp_path / "photos" / "train" / "cat" / "pipe")
    (tmp_path / "photos" / "train" / "cat" / "up").symlink_to("../..")
    plan = plan_cleaning(table, how="relabel", threshold=1)
    write_folder(plan, read_source(tmp_path / "run"), tmp_path / "out")
    assert len(files_below(tmp_path / "out")) == 34 and not (tmp_path / "out" / "train" / "cat" / "pipe").exists()


def test_a_folder_is_not_written_into_its_source(table, tmp_path):
    plan, source = plan_cleaning(table, how="relabel"), read_source(tmp_path / "run")
    with pytest.raises(ValueError, match="lies in the dataset .*photos, and would become a part of it"):
        write_folder(plan, source, tmp_path / "photos" / "cleaned.part")


@pytest.fixture
def three(table):
    """Three rows: of two more than two classes are known, the second was decided by somebody."""
    table = table.head(3).assign(label=[0, 1, 2], suggested_label=[1, 0, 2], noise_score=[0.7, 0.9, 0.2])
    return table.assign(label_name=[NAMES[0], NAMES[1], NAMES[2]])


def said_right(table, row):
    columns = {"annotation": ["right"], "new_label": [0], "new_label_name": [table["label_name"][row]]}
    return pd.DataFrame(columns, index=[table["index"][row]])


def test_targets_are_the_classes_that_the_table_has_kept(three):
    kept = three.assign(
        **likely_columns(np.array([[1, 0, 2], [0, 1, 2], [2, 0, 1]]), np.tile([0.6, 0.3, 0.1], (3, 1)))
    )
    kept.attrs = three.attrs
    plan = plan_cleaning(kept, how="posterior", annotations=said_right(three, 1))
    classes, probabilities = plan_targets(plan)
    assert classes.tolist() == [[1, 0, 2], [1, 2, 0], [2, 0, 1]]
    assert probabilities == pytest.approx(np.array([[0.6, 0.3, 0.1], [1, 0, 0], [0.6, 0.3, 0.1]]))


def test_targets_of_a_table_that_has_kept_none_are_two_classes(three):
    plan = plan_cleaning(three, how="posterior", annotations=said_right(three, 1))
    classes, probabilities = plan_targets(plan)
    assert classes.tolist() == [[0, 1], [1, 2], [2, 0]]
    assert probabilities == pytest.approx(np.array([[0.3, 0.7], [1, 0], [1, 0]]))


def test_a_label_that_nobody_vouches_for_weighs_what_the_judge_says(three, tmp_path):
    """Anna and Bo on three labels with the scores 0.7, 0.9 and 0.2: they dispute the first, the second they decide,
    of the third both are unsure. Row and label of all three stay."""
    frames = []
    for name, words in (("anna", ("right", "right", "unsure")), ("bo", ("wrong", "right", "unsure"))):
        rows = [
            {"index": index, "annotation": word, "new_label_name": "horse" if word == "wrong" else ""}
            for index, word in zip(three["index"], words, strict=True)
        ]
        frames.append(read_annotations(write_annotations(tmp_path / f"{name}.csv", rows), three))
    said = merge_annotations(frames).annotations
    for how in ("drop", "relabel"):
        plan = plan_cleaning(three, annotations=said, how=how)
        assert plan["label_action"].tolist() == ["kept", "annotated", "kept"] and plan["label"].tolist() == [0, 1, 2]
    assert plan_cleaning(three, annotations=said, how="weight")["weight"].tolist() == pytest.approx([0.3, 1, 0.8])
    classes, probabilities = plan_targets(plan_cleaning(three, annotations=said, how="posterior"))
    assert classes.tolist() == [[0, 1], [1, 2], [2, 0]]
    assert probabilities == pytest.approx(np.array([[0.3, 0.7], [1, 0], [1, 0]]))


# -- lists of rows to leave out ---------------------------------------------------------------------------------------


def write_list(tmp_path, table, rows, name="list.jsonl", **more):
    lines = [{"split": "train", "index": int(table["index"][row]), "path": table["path"][row], **more} for row in rows]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / name


def test_a_list_goes_before_scores_and_marks_and_all_rows_stay_in_sight(table, tmp_path, capsys):
    marks, _ = annotate(tmp_path, table, {0: "right", 1: other_class(table, 1), 2: "right"})
    scored = [row for row in range(30) if table["noise_score"][row] >= 0.7 and row > 3]
    first = write_list(tmp_path, table, [0, 1], "a.jsonl")
    second = write_list(tmp_path, table, [1, 3, scored[0]], "b.jsonl", reason="a stranger")
    options = ["--annotations", marks, "--how", "relabel", "--threshold", "0.7", "--exclude", first, second]
    options += ["--output_dir", tmp_path / "out", "--removed_dir", tmp_path / "away" / "removed"]
    run_clean(tmp_path / "run", *options, "--dry_run")
    dry = capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not (tmp_path / "away").exists()
    run_clean(tmp_path / "run", *options)
    said = capsys.readouterr().out
    assert dry.splitlines()[:-1] == said.splitlines()[:-1] and "4 excluded" in dry and "5 excluded" in said
    assert f"people have decided the label: 2 rows: {table['path'][0]}, {table['path'][1]}\n" in said
    assert f"{table['path'][0]}: {table['label_name'][0]} -> (excluded)\n" in said
    gone = {os.path.relpath(table["path"][row], tmp_path / "photos") for row in (0, 1, 3, scored[0])}
    gone |= {"train/cat/broken.png"}  # which the audit had left out
    assert set(files_below(tmp_path / "away" / "removed")) == gone
    kept = files_below(tmp_path / "out")
    assert len(kept) + len(gone) == len(files_below(tmp_path / "photos")) + 1  # the lineage
    assert not {os.path.basename(name) for name in kept} & {os.path.basename(name) for name in gone}
    lineage = {row["path_original"]: row for row in read_csv(tmp_path / "out" / "lineage.csv")}
    assert len(lineage) == 34
    row = lineage[table["path"][1]]
    assert (row["label_action"], row["path"], row["label"]) == ("excluded", "", "")
    assert (row["annotation"], row["annotator"]) == ("wrong", "anna")
    assert lineage[table["path"][2]]["label_action"] == "annotated"


def test_rows_that_a_list_left_out_are_still_in_the_lineage_of_the_second_round(tiny_dataset, tmp_path):
    for row, (image, label, true) in enumerate(
        zip(tiny_dataset["image"], tiny_dataset["label"], tiny_dataset["clean_label"], strict=True)
    ):
        folder = tmp_path / "photos" / tiny_dataset.features["label"].names[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{true}_{row:02}.png")
    table = audit_folder(tmp_path / "photos", tmp_path / "first")
    listed = write_list(tmp_path, table, [0, 7])
    run_clean(tmp_path / "first", "--exclude", listed, "--output_dir", tmp_path / "second_folder")
    again = audit_folder(tmp_path / "second_folder", tmp_path / "second")
    assert len(again) == 46
    with pytest.raises(
        SystemExit, match=r"list.jsonl:\d: sample \d+ is .*, and .* in the dataset.*Make the list again"
    ):
        run_clean(tmp_path / "second", "--exclude", listed, "--output_dir", tmp_path / "third_folder")
    listed = write_list(tmp_path, again, [5])
    run_clean(tmp_path / "second", "--exclude", listed, "--how", "drop", "--output_dir", tmp_path / "third_folder")
    lineage = {row["path_original"]: row["label_action"] for row in read_csv(tmp_path / "third_folder/lineage.csv")}
    assert len(lineage) == 48
    assert {path for path, action in lineage.items() if action == "excluded"} == {
        *(table["path"][row] for row in (0, 7)),
        again["path"][5],
    }


def test_what_was_not_judged_is_named_and_stays(table, tmp_path):
    table = table.copy()
    table.loc[[2, 5, 7], "times_seen"] = 0
    _, said = annotate(tmp_path, table, {5: "right"})
    plan = plan_cleaning(table, annotations=said, how="drop", threshold=0.0, excluded={int(table["index"][7])})
    assert plan["label_action"][[2, 5, 7]].tolist() == ["unjudged", "annotated", "excluded"]
    assert plan["label_action"].value_counts()["dropped"] == len(table) - 3
    said = "\n".join(describe_plan(plan))
    assert "1 row was not judged: the image cannot be read, is the only one of its class, or was never" in said
    assert f"Row and label stay: {table['path'][2]}." in said


@pytest.mark.parametrize("form", ["csv", "arrow", "parquet"])
def test_lists_hold_in_every_format(form, tmp_path):
    """Row 3 was left out by the audit already."""
    table = make_table_run(tmp_path)
    listed = write_list(tmp_path, table, [0, 4])
    listed.write_text(listed.read_text() + '{"split": "train", "index": 3}\n\n')
    plan = plan_cleaning(table, excluded=load_excluded([listed], table, read_source(tmp_path / "run").excluded))
    assert plan["label_action"].value_counts().to_dict() == {"kept": 28, "excluded": 2}
    if form == "csv":
        actions = write_csv(plan, read_source(tmp_path / "run"), tmp_path / "out")
        assert actions == {"kept": 28, "excluded": 3, "held_out": 1}
        left = {row["photographer"] for row in read_csv(tmp_path / "out" / "train.csv")}
        assert left == {f"p{n}" for n in range(32)} - {"p0", "p3", f"p{table['index'][4]}"}
        return
    index, label = table["index"].tolist(), table["label"].tolist()
    columns = {"image": [{"path": None, "bytes": b"x"}] * 30, "label": label, "clean_label": [-1] * 30, "index": index}
    classes = ClassLabel(names=list(NAMES))
    features = Features(image=decode_off(), label=classes, clean_label=classes, index=Value("int64"))
    data = DatasetDict(train=Dataset.from_dict(columns, features=features))
    table.attrs["dataset_fingerprint"] = labels_fingerprint(np.array(index), np.array(label), 3)
    actions = write_dataset(plan, data, table, tmp_path / "out", parquet=form == "parquet")
    assert actions == {"kept": 28, "excluded": 2}
    loaded = load_noisy_dataset(str(tmp_path / "out"))["train"]
    assert set(loaded["index"]) == set(index) - {index[0], index[4]}
    assert len(read_csv(tmp_path / "out" / "lineage.csv")) == 30


def test_an_empty_list_leaves_nothing_out(table, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    run_clean(tmp_path / "run", "--exclude", tmp_path / "none.jsonl", "--output_dir", tmp_path / "out")
    assert len(files_below(tmp_path / "out")) == 34


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_lists_and_places_that_do_not_fit_are_refused(dry_run, table, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    good = write_list(tmp_path, table, [0])
    wrong = write_list(tmp_path, table, [1], "wrong.jsonl", path="elsewhere/cat/9.png")
    unknown = write_list(tmp_path, table, [1], "unknown.jsonl", index=10**6)
    (tmp_path / "odd.jsonl").write_text('["train", 1]\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    new, out = tmp_path / "new", tmp_path / "out"
    for options, message in (
        (["--exclude", unknown], "unknown.jsonl:1: sample 1000000 was not scored. Was the list made for another"),
        (
            ["--exclude", good, wrong],
            r"wrong.jsonl:1: sample \d+ is elsewhere/cat/9.png there, and /.*Make the list again",
        ),
        (["--exclude", tmp_path / "odd.jsonl"], "odd.jsonl:1: .*An exclusion list has lines like"),
        (["--exclude", tmp_path / "no.jsonl"], "no.jsonl"),
        (["--exclude", good, "--removed_dir", out], "must not lie in .*out, nor around it"),
        (["--exclude", good, "--removed_dir", out / "a"], "must not lie in .*out, nor around it"),
        (["--exclude", good, "--output_dir", out / "a", "--removed_dir", out], "must not lie in .*out/a, nor around"),
        (["--exclude", good, "--removed_dir", tmp_path / "photos" / "new"], "lies in the dataset .*photos"),
        (["--exclude", good, "--removed_dir", tmp_path / "there"], "there is there already"),
        (["--exclude", good, "--removed_dir", new, "--output_format", "csv"], "--removed_dir .*new is of --output_f"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_clean(tmp_path / "run", *["--output_dir", out, *options, *dry_run])
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert capsys.readouterr().out == ""


def test_rows_of_other_splits_stay_and_are_counted(table, tmp_path, caplog):
    listed = write_list(tmp_path, table, [0, 1], split="test")
    run_clean(tmp_path / "run", "--exclude", listed, "--output_dir", tmp_path / "out")
    assert "2 rows of 'test' stay; cleaning leaves out training rows alone" in caplog.text
    assert len(files_below(tmp_path / "out")) == 34


def test_room_is_needed_for_what_is_left_out_as_well(table, tmp_path, monkeypatch):
    sizes = [path.stat().st_size for path in (tmp_path / "photos").rglob("*") if path.is_file()]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=sum(sizes) - 1))
    options = ["--exclude", write_list(tmp_path, table, range(15)), "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit, match="would take .* MB"):
        run_clean(tmp_path / "run", *options, "--removed_dir", tmp_path / "removed")
    run_clean(tmp_path / "run", *options)


# -- a table ----------------------------------------------------------------------------------------------------------


def make_table_run(tmp_path, names=NAMES, text=str):
    """A run on `train.csv` with columns of its own; row 3 of its 32 is excluded, row 5 is held out."""
    table = make_run(tmp_path, names=names)
    ids = [n for n in range(32) if n not in (3, 5)]
    table["index"] = ids
    rows = dict(zip(ids, table.to_dict("records"), strict=True))
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["photographer", "image", "class", "note"])
        for n in range(32):
            row = rows.get(n, {"path": f"{tmp_path}/photos/x{n}.png", "label": 0, "label_name": names[0]})
            name = text(row["label"]) if text is not str else row["label_name"]
            writer.writerow([f"p{n}", os.path.relpath(row["path"], tmp_path), name, 'a "quoted", note'])
    (tmp_path / "exclude.jsonl").write_text('{"split": "train", "index": 3, "reason": "broken"}\n')
    options = {"dataset": str(tmp_path / "train.csv"), "label_column": "class"}
    options |= {"exclude": str(tmp_path / "exclude.jsonl"), "validation_fraction": 0.1}
    from hnml_hf.audit.table import write_audit

    write_audit(tmp_path / "run" / "_audit", table)
    (tmp_path / "run" / "_audit" / "dataset.json").write_text(json.dumps(options))
    return table


@pytest.mark.parametrize("text", [str, lambda label: str(label + 1)], ids=["names", "numbers"])
def test_a_table_keeps_its_columns(text, tmp_path):
    table = make_table_run(tmp_path, text=text)
    write = (lambda name: str(NAMES.index(name) + 1)) if text is not str else str
    new = other_class(table, 0)
    _, said = annotate(tmp_path, table, {0: new, 1: "right"})
    plan = plan_cleaning(table, annotations=said, how="drop", threshold=0.7)
    source = read_source(tmp_path / "run")
    assert source.format == "csv"
    actions = write_csv(plan, source, tmp_path / "out")
    rows = read_csv(tmp_path / "out" / "train.csv")
    assert list(rows[0]) == ["photographer", "image", "class", "note", "label_original", "label_score", "label_action"]
    assert rows[0]["note"] == 'a "quoted", note' and rows[0]["class"] == write(new)
    assert rows[0]["label_original"] == write(table["label_name"][0]) and rows[0]["label_action"] == "annotated"
    dropped = int((plan["label_action"] == "dropped").sum())
    assert len(rows) == 31 - dropped and actions["excluded"] == actions["held_out"] == 1
    held = next(row for row in rows if row["photographer"] == "p5")
    assert held["label_action"] == "held_out" and held["label_original"] == held["class"]
    assert all(row["photographer"] != "p3" for row in rows)
    assert len(read_csv(tmp_path / "out" / "lineage.csv")) == 32


def test_a_table_that_was_edited_since_is_refused(tmp_path):
    table = make_table_run(tmp_path)
    lines = (tmp_path / "train.csv").read_text().splitlines(keepends=True)
    (tmp_path / "train.csv").write_text("".join([lines[0], *lines[2:]]))
    plan, source = plan_cleaning(table, how="relabel"), read_source(tmp_path / "run")
    message = "has changed since it was audited: sample 0 is"
    with pytest.raises(ValueError, match=message), new_folder(tmp_path / "out") as folder:
        write_csv(plan, source, folder)
    assert not (tmp_path / "out").exists()


def test_the_weights_of_a_table_are_found(tmp_path):
    """Also beside a column `weight` of its own, which holds something else; row 5 was not scored."""
    table = make_table_run(tmp_path)
    own = (tmp_path / "train.csv").read_text().replace("note", "weight", 1).replace('"a ""quoted"", note"', "7.5")
    (tmp_path / "train.csv").write_text(own)
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "x5.png")
    run_clean(tmp_path / "run", "--how", "weight", "--output_dir", tmp_path / "out")
    assert {row["weight"] for row in read_csv(tmp_path / "out" / "train.csv")} == {"7.5"}
    loaded = load_noisy_dataset(str(tmp_path / "out"), data_dir=str(tmp_path), label_column="class")["train"]
    weights = 1 - table["noise_score"].to_numpy()
    expected = [*weights[:3], weights[3], weights.mean(), *weights[4:]]  # row 3 is excluded
    assert loaded["weight"][:] == pytest.approx(expected, abs=1e-5)


def test_a_table_keeps_no_weights_of_an_earlier_round(tmp_path):
    make_table_run(tmp_path)
    first = (tmp_path / "train.csv").read_text().splitlines()
    columns = ["label_weight,label_posterior,label_action", *['0.5,"{""cat"": 1}",kept'] * 32]
    (tmp_path / "train.csv").write_text("".join(f"{a},{b}\n" for a, b in zip(first, columns, strict=True)))
    run_clean(tmp_path / "run", "--how", "drop", "--output_dir", tmp_path / "out")
    written = list(read_csv(tmp_path / "out" / "train.csv")[0])
    assert written[3:] == ["note", "label_original", "label_score", "label_action"]


def test_a_column_that_would_be_taken_for_the_weights_is_refused(tmp_path):
    make_table_run(tmp_path)
    own = (tmp_path / "train.csv").read_text().replace("note", "label_weight", 1)
    (tmp_path / "train.csv").write_text(own)
    with pytest.raises(SystemExit, match="train.csv has a column `label_weight` of its own.*: rename it, or choose"):
        run_clean(tmp_path / "run", "--how", "drop", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_as_a_table(table, tmp_path):
    plan = plan_cleaning(table, how="relabel")
    write_csv(plan, read_source(tmp_path / "run"), tmp_path / "out")
    rows = read_csv(tmp_path / "out" / "train.csv")
    assert len(rows) == 30 and rows[0]["label"] == plan["label_name"][0]
    root = read_source(tmp_path / "run").images_root(plan)
    assert root == str(tmp_path / "photos" / "train")
    loaded = load_noisy_dataset(str(tmp_path / "out" / "train.csv"), data_dir=root)
    assert loaded["train"]["index"][:] == table["index"].tolist()


def test_tables_show_six_digits_of_a_score_and_no_trace_of_one(table, tmp_path):
    """As after a second round, where what people have decided is beyond doubt."""
    scores = [1e-300, 9.9e-13, 0.123456789, 1 - 1e-300, 2e-12, 0.0]
    table.loc[range(6), "noise_score"] = scores
    plan = plan_cleaning(table, how="weight")
    write_csv(plan, read_source(tmp_path / "run"), tmp_path / "out")
    expected = ["0", "0", "0.123457", "1", "2e-12", "0"]
    for name in ("lineage.csv", "train.csv"):
        rows = {int(row["index"]): row for row in read_csv(tmp_path / "out" / name)}
        assert [rows[index]["label_score"] for index in table["index"][:6]] == expected
    assert [rows[index]["label_weight"] for index in table["index"][:6]] == ["1", "1", "0.876543", "0", "1", "1"]


def test_a_path_that_a_spreadsheet_would_compute_is_found_again(table, tmp_path):
    (tmp_path / "photos" / "train" / "cat").rename(tmp_path / "photos" / "train" / "=cat")
    table["path"] = [path.replace("/train/cat/", "/train/=cat/") for path in table["path"]]
    plan, source = plan_cleaning(table, how="weight"), read_source(tmp_path / "run")
    write_csv(plan, source, tmp_path / "out")
    names = [row["file_name"] for row in read_csv(tmp_path / "out" / "train.csv")]
    assert sum(name.startswith("./=cat/") for name in names) == sum("/=cat/" in path for path in table["path"]) > 5
    assert not any(name[0] in "=+-@'" for name in names)
    root = source.images_root(plan)
    assert len(load_noisy_dataset(str(tmp_path / "out" / "train.csv"), data_dir=root)["train"]) == 30


# -- Arrow and parquet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parquet", [False, True])
def test_datasets_keep_their_splits(parquet, tiny_dataset, scored, tmp_path):
    from datasets import DatasetDict

    table = audit_run(tmp_path / "run", scored, tiny_dataset, transform=lambda image: image)
    first = int(table.nsmallest(1, "rank").index[0])
    _, said = annotate(tmp_path, table, {first: "zebra"})
    plan = plan_cleaning(table, annotations=said, how="drop", add_classes=["zebra"])
    data = DatasetDict({"train": tiny_dataset, "test": tiny_dataset.select(range(5))})
    actions = write_dataset(plan, data, table, tmp_path / "out", parquet=parquet)
    loaded = load_noisy_dataset(str(tmp_path / "out"))
    assert loaded["train"].features["label"].names == ["left", "right", "bottom", "zebra"]
    assert len(loaded["test"]) == 5 and len(loaded["train"]) == 48 - actions["dropped"]
    row = loaded["train"]["index"][:].index(int(table["index"][first]))
    assert loaded["train"]["label"][row] == 3
    image = tiny_dataset["image"][tiny_dataset["index"][:].index(int(table["index"][first]))]
    assert np.array_equal(np.asarray(loaded["train"][row]["image"]), np.asarray(image))
    lineage = read_csv(tmp_path / "out" / "lineage.csv")
    assert len(lineage) == 48 and sum(row["label_action"] == "dropped" for row in lineage) == actions["dropped"] > 0


def test_posteriors_become_soft_targets(tiny_dataset, scored, tmp_path):
    from datasets import DatasetDict

    table = audit_run(tmp_path / "run", scored, tiny_dataset, transform=lambda image: image)
    worst = table.sort_values("rank").index
    _, said = annotate(tmp_path, table, {worst[0]: "unsure", worst[1]: "right"})
    plan = plan_cleaning(table, annotations=said, how="posterior")
    write_dataset(plan, DatasetDict(train=tiny_dataset), table, tmp_path / "out")
    from datasets import load_from_disk

    rows = load_from_disk(tmp_path / "out")["train"].select_columns(
        ["index", "target_classes", "target_probabilities"]
    )
    rows = {row["index"]: row for row in rows}
    for place, expected in ((0, table["noise_score"][worst[0]]), (1, 0), (2, table["noise_score"][worst[2]])):
        fact = table.loc[worst[place]]
        row = rows[fact["index"]]
        score = dict(zip(row["target_classes"], row["target_probabilities"], strict=True))
        assert score.get(fact["suggested_label"], 0) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("label_names", [None, ["bottom", "left", "right"]])
def test_a_training_finds_the_soft_targets(tiny_dataset, scored, tmp_path, label_names, caplog):
    from datasets import DatasetDict

    table = audit_run(tmp_path / "run", scored, tiny_dataset, transform=lambda image: image)
    plan = plan_cleaning(table, how="posterior")
    write_dataset(plan, DatasetDict(train=tiny_dataset), table, tmp_path / "out")
    rows = load_noisy_dataset(str(tmp_path / "out"), label_names=label_names)["train"]
    assert "the targets are the probabilities in the column `target_probabilities`" in caplog.text
    classes, probabilities = targets_of(rows)
    own, expected = tiny_dataset.features["label"].names, plan.set_index("index")
    for index, ids, shares in zip(rows["index"], classes, probabilities, strict=True):
        share = dict(zip([rows.features["label"].names[label] for label in ids], shares, strict=True))
        fact = expected.loc[index]
        for label in {fact["label"], fact["suggested_label"]}:
            score = fact["label_score"] if label != fact["label"] else 1 - fact["label_score"]
            if fact["label"] != fact["suggested_label"]:
                assert share[own[label]] == pytest.approx(score, abs=1e-4)


def test_soft_targets_of_parquet_are_not_lost_in_silence(tiny_dataset, scored, tmp_path, caplog):
    from datasets import DatasetDict

    table = audit_run(tmp_path / "run", scored, tiny_dataset, transform=lambda image: image)
    plan = plan_cleaning(table, how="posterior")
    write_dataset(plan, DatasetDict(train=tiny_dataset), table, tmp_path / "out", parquet=True)
    assert targets_of(load_noisy_dataset(str(tmp_path / "out"))["train"]) is None
    assert "clean with `--output_format arrow`" in caplog.text


# -- rounds -----------------------------------------------------------------------------------------------------------


QUARTERS = ("left", "right", "bottom")


def audit_folder(photos, run):
    return audit_data({"dataset": "imagefolder", "data_dir": str(photos)}, run)


def audit_data(options, run):
    """An audit of data in which every third label of the true classes, bright quarters, is wrong."""
    data = load_noisy_dataset(options["dataset"], data_dir=options.get("data_dir"))["train"]
    names = data.features["label"].names
    pixels = [np.asarray(image.convert("L")) for image in data["image"]]
    quarters = [(image[:16, :16].mean(), image[:16, 16:].mean(), image[16:, :16].mean()) for image in pixels]
    true = [names.index(QUARTERS[int(np.argmax(means))]) for means in quarters]
    statistics = TrainingDynamics(np.array(data["index"]), np.array(data["label"]), len(names))
    probabilities = np.full((len(true), len(names)), 0.1)
    probabilities[np.arange(len(true)), true] = 0.8
    for epoch in range(3):
        statistics.update(np.array(data["index"]), probabilities, epoch=epoch)
    (run / "_audit").mkdir(parents=True)
    (run / "_audit" / "dataset.json").write_text(json.dumps(options))
    return audit_run(run, statistics.records, data, transform=lambda image: image)


def decode_off():
    from datasets import Image as Feature

    return Feature(decode=False)


def issues_of(run):
    page = (run / "_audit" / "report.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    return {item["path"] for item in data["items"] if item["issue"]}, {i["path"] for i in data["items"] if i["before"]}


def write_messy_folder(dataset, folder):
    """Images by their given class, called by the number of the true one."""
    names = dataset.features["label"].names
    rows = zip(dataset["image"], dataset["label"], dataset["clean_label"], strict=True)
    for row, (image, label, true) in enumerate(rows):
        place = folder / "messy" / "train" / names[label] / "roll"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{true}_{row:02}.png")


def test_a_messy_folder_comes_out_corrected_and_the_second_round_asks_nothing_twice(tiny_dataset, tmp_path):
    """The whole way: audit, review with a server's log, clean, audit again."""
    import clean

    from hnml_hf.audit.review.queue import Query
    from hnml_hf.audit.review.server import open_review

    write_messy_folder(tiny_dataset, tmp_path)
    table = audit_folder(tmp_path / "messy", tmp_path / "first")
    review = open_review(tmp_path / "first", annotator="anna")
    issues = review.queue.view(Query())
    assert len(issues) == 18
    names, truth = review.queue.class_names, {}
    entries = []
    for row in issues[:12].tolist():
        true = ["left", "right", "bottom"][int(os.path.basename(review.queue.path(row))[0])]
        truth[os.path.basename(review.queue.path(row))] = true
        entries.append({"index": int(review.queue.index[row]), "annotation": "wrong", "new_label_name": true})
    review.annotate(entries, "anna", "ab" * 6)
    assert set(names) == {"left", "right", "bottom"}

    options = [str(tmp_path / "first"), "--output_dir", str(tmp_path / "second_folder")]
    clean.main([*options, "--dry_run"])
    assert not (tmp_path / "second_folder").exists()
    clean.main(options)
    for name, true in truth.items():
        assert (tmp_path / "second_folder" / "train" / true / "roll" / name).is_file()
    assert len(files_below(tmp_path / "second_folder")) == 49

    again = audit_folder(tmp_path / "second_folder", tmp_path / "second")
    asked, decided = issues_of(tmp_path / "second")
    assert {os.path.basename(path) for path in decided} == set(truth) and not asked & decided
    queue = open_review(tmp_path / "second").queue
    shown = {os.path.basename(queue.path(row)) for row in queue.view(Query(scope="all")).tolist()}
    assert len(shown) == 36 and not shown & set(truth)
    assert len(queue.view(Query())) == 6 and len(queue.view(Query(status="before"))) == 12

    clean.main([str(tmp_path / "second"), "--how", "drop", "--output_dir", str(tmp_path / "third_folder")])
    lineage = {os.path.basename(row["path_original"]): row for row in read_csv(tmp_path / "third_folder/lineage.csv")}
    assert len(lineage) == 48 and sum(row["label_action"] == "dropped" for row in lineage.values()) == 6
    given = dict(zip(map(os.path.basename, table["path"]), table["label_name"], strict=True))
    for name, true in truth.items():
        row = lineage[name]
        assert (row["label"], row["label_original"], row["annotation"]) == (true, given[name], "wrong")
    assert isinstance(again, pd.DataFrame) and len(load_audit(tmp_path / "second")) == 48


@pytest.mark.parametrize("form", FORMATS)
def test_decisions_hold_in_a_second_round_of_every_format(form, tiny_dataset, tmp_path):
    """Arrow and parquet files hold the images: the folder that they came from is gone by then."""
    from hnml_hf.audit.review.queue import Query
    from hnml_hf.audit.review.server import open_review

    write_messy_folder(tiny_dataset, tmp_path)
    audit_folder(tmp_path / "messy", tmp_path / "first")
    review, out = open_review(tmp_path / "first"), tmp_path / "out"
    first = [int(review.queue.index[row]) for row in review.queue.view(Query())[:12]]
    true = [review.queue.class_names[label] for label in review.queue.suggested[review.queue.find(np.array(first))]]
    said = zip(first, true, strict=True)
    review.annotate(
        [{"index": i, "annotation": "wrong", "new_label_name": name} for i, name in said], "anna", "ab" * 6
    )
    run_clean(tmp_path / "first", "--output_dir", out, "--output_format", form)
    options = {"dataset": "imagefolder", "data_dir": str(out)} if form == "folder" else {"dataset": str(out)}
    if form == "csv":
        options["data_dir"] = str(tmp_path / "messy" / "train")
    else:
        shutil.rmtree(tmp_path / "messy")
    again = audit_data(options, tmp_path / "second")
    assert len(again) == 48 and all(os.path.isabs(path) for path in again["path"] if path)
    assert (again["path"] == "").all() == (form in ("arrow", "parquet"))
    queue = open_review(tmp_path / "second").queue
    decided, shown = queue.view(Query(status="before")), queue.view(Query(scope="all"))
    assert len(decided) == 12 and len(shown) == 36 and len(queue.view(Query())) == 6
    if form != "folder":  # where ids are places in a sorted listing
        assert {int(queue.index[row]) for row in decided} == set(first)
    run_clean(tmp_path / "second", "--how", "drop", "--output_dir", tmp_path / "third")
    lineage = read_csv(tmp_path / "third" / "lineage.csv")
    assert len(lineage) == 48 and sum(row["label_action"] == "dropped" for row in lineage) == 6
    corrected = [row for row in lineage if row["annotation"] == "wrong"]
    assert len(corrected) == 12 and all(row["label"] != row["label_original"] for row in corrected)


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_annotations_of_the_first_round_are_not_those_of_the_second(form, tiny_dataset, tmp_path):
    """Said with both data by name, and how decisions go on."""
    from hnml_hf.audit.review.server import open_review

    write_messy_folder(tiny_dataset, tmp_path)
    table = audit_folder(tmp_path / "messy", tmp_path / "first")
    review = open_review(tmp_path / "first")
    review.annotate([{"index": int(table["index"][0]), "annotation": "right"}], "anna", "ab" * 6)
    run_clean(tmp_path / "first", "--output_dir", tmp_path / "out", "--output_format", form, "--how", "drop")
    options = {"dataset": "imagefolder", "data_dir": str(tmp_path / "out")}
    audit_data(options if form == "folder" else {"dataset": str(tmp_path / "out")}, tmp_path / "second")
    where = f"31 images below {tmp_path}/out/train" if form == "folder" else "31 images that are part of the dataset"
    message = (
        f"{review.log.path}:2: these annotations are of another dataset: no image that was annotated, first "
        f"`{table['path'][0]}`, is one of the {where} of this audit with the same label. Give annotations of this "
        "audit. Those of another one are put into its data by `hnml clean RUN --annotations FILE --output_dir NEW`, "
        "with the RUN that they were made for; an audit of NEW knows them without the file."
    )
    before = review.log.path.read_bytes()
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_clean(tmp_path / "second", "--annotations", review.log.path, "--output_dir", tmp_path / "third")
    with pytest.raises(ValueError, match=re.escape(f"{message} Or move {review.log.path} away to begin anew")):
        open_review(tmp_path / "second", annotations=review.log.path)
    assert review.log.path.read_bytes() == before and not (tmp_path / "third").exists()


def test_parquet_files_hold_the_images_and_can_be_moved(tiny_dataset, tmp_path, monkeypatch):
    """Written a few images at a time, read by `datasets` and by this package."""
    from datasets import load_dataset

    write_messy_folder(tiny_dataset, tmp_path)
    table = audit_folder(tmp_path / "messy", tmp_path / "run")
    content = {path: Path(path).read_bytes() for path in table["path"]}
    monkeypatch.setattr("hnml_hf.audit.outputs.PARQUET_ROWS", 10)
    options = ["--how", "drop", "--output_format", "parquet", "--output_dir", tmp_path / "out"]
    run_clean(tmp_path / "run", *options)
    shutil.rmtree(tmp_path / "messy")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    with pq.ParquetFile(tmp_path / "moved" / "train.parquet") as file:
        groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert groups == [10, 10, 10]
    kept = table[table["noise_score"] < 0.5].set_index("index")
    plain = load_dataset("parquet", data_files=str(tmp_path / "moved" / "train.parquet"), split="train")
    assert plain.features["label"].names == table.attrs["class_names"] and sorted(plain["index"]) == sorted(kept.index)
    for row in plain.cast_column("image", decode_off()):
        path = kept.loc[row["index"], "path"]
        assert row["image"] == {"bytes": content[path], "path": os.path.basename(path)}
    for place in (tmp_path / "moved", tmp_path / "moved" / "train.parquet"):
        ours = load_noisy_dataset(str(place))["train"]
        assert ours["label"] == plain["label"] and ours[0]["image"].size == (32, 32)


def test_what_the_judge_has_learned_from_people_is_not_asked_again(table, tmp_path):
    from hnml_hf.audit.review.queue import Query
    from hnml_hf.audit.review.server import open_review

    _, said = annotate(tmp_path, table, {0: "right", 1: NAMES[table["suggested_label"][1]], 2: "unsure"})
    issues = open_review(tmp_path / "run").queue.progress()["issues"]
    learned = apply_annotations(table, said)
    write_audit(tmp_path / "run" / "_audit", learned)
    queue = open_review(tmp_path / "run").queue
    ids = set(queue.index[queue.view(Query())].tolist())
    assert queue.progress() == {**queue.progress(), "issues": issues - 2, "decided": 0} and len(ids) == issues - 2
    assert ids.isdisjoint(table["index"][:2]) and table["index"][2] in ids


def test_two_people_are_merged_by_the_command(table, tmp_path, capsys):
    import clean

    log = AnnotationLog(tmp_path / "run" / "_audit" / "annotations.jsonl", table.attrs["dataset_fingerprint"])
    for who, said in (("anna", ["right", "wrong"]), ("bo", ["right", "right"])):
        for row, word in enumerate(said):
            name = table["suggested_name"][row] if word == "wrong" else table["label_name"][row]
            log.append([{"index": int(table["index"][row]), "annotation": word, "new_label_name": name}], who)
    clean.main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    disputed = table["suggested_name"][1] != table["label_name"][1]
    assert "Agreement of anna and bo: Cohen's kappa" in said and ("disagree on 1" in said) == disputed
    assert (tmp_path / "out" / "disagreements.csv").is_file() == disputed
    if disputed:
        written = pd.read_csv(tmp_path / "out" / "disagreements.csv")
        assert written["path"].tolist() == [table["path"][1]] and set(written) >= {"index", "anna", "bo"}
    with pytest.raises(SystemExit, match="is there already"):
        clean.main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="has no `_audit/noise_scores.parquet`"):
        clean.main([str(tmp_path), "--output_dir", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="Nothing to do"):
        (tmp_path / "run" / "_audit" / "annotations.jsonl").unlink()
        clean.main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "new")])


def test_disagreements_of_people_and_classes_with_any_name(table, tmp_path):
    """One annotator is called as a column is, one as a formula begins, as does the class that one names."""
    import clean

    log = AnnotationLog(tmp_path / "run" / "_audit" / "annotations.jsonl", table.attrs["dataset_fingerprint"])
    for who, name in (("path", "=1+1"), ("@bo", table["suggested_name"][0])):
        log.append([{"index": int(table["index"][0]), "annotation": "wrong", "new_label_name": name}], who)
    clean.main([str(tmp_path / "run"), "--add_classes", "=1+1", "--output_dir", str(tmp_path / "out")])
    with open(tmp_path / "out" / "disagreements.csv", newline="", encoding="utf-8") as file:
        header, row = csv.reader(file)
    assert header == ["index", "'@bo", "path", "path"]
    assert row == [str(table["index"][0]), table["suggested_name"][0], "'=1+1", table["path"][0]]


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
@pytest.mark.parametrize(
    ("options", "dataset", "message"),
    [
        (["--output_format", "folder"], "quickstart", "is no image folder: choose csv, parquet or arrow"),
        (["--output_format", "csv"], "quickstart", "no table can name them: choose parquet or arrow"),
        (["--how", "weight"], None, "A folder cannot hold what `weight` gives: choose csv, parquet or arrow by"),
        (["--how", "posterior"], None, "A folder cannot hold what `posterior` gives: choose parquet or arrow by"),
        (["--how", "posterior", "--output_format", "csv"], None, "A table cannot hold .*: choose parquet or arrow by"),
        *((["--output_format", form], None, "has changed since it was scored") for form in ("parquet", "arrow")),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_printed(
    options, dataset, message, dry_run, table, tmp_path, capsys
):
    import clean

    if dataset is not None:  # whose images are part of the dataset
        (tmp_path / "run" / "_audit" / "dataset.json").write_text(json.dumps({"dataset": dataset}))
        write_audit(tmp_path / "run" / "_audit", table.assign(path=""))
    if "parquet" in options or "arrow" in options:  # of these the list is applied to the images that there are now
        (tmp_path / "exclude.jsonl").write_text('{"split": "train", "index": 5}\n')
    how = [] if "--how" in options else ["--how", "drop"]
    with pytest.raises(SystemExit, match=message):
        clean.main([str(tmp_path / "run"), *how, *options, *dry_run, "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().out == "" and not (tmp_path / "out").exists()


def test_a_table_that_was_edited_is_refused_before_anything_is_printed(tmp_path, capsys):
    import clean

    make_table_run(tmp_path)
    lines = (tmp_path / "train.csv").read_text().splitlines(keepends=True)
    (tmp_path / "train.csv").write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(SystemExit, match="has changed since it was audited: sample 0 is"):
        clean.main([str(tmp_path / "run"), "--how", "drop", "--dry_run", "--output_dir", str(tmp_path / "out")])
    assert capsys.readouterr().out == ""


# -- what could go wrong ----------------------------------------------------------------------------------------------


def run_clean(run, *options):
    import clean

    clean.main([str(run), *map(str, options)])


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_a_dry_run_refuses_what_the_real_one_does(dry_run, table, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("a")
    run, how = tmp_path / "run", ["--how", "drop", *dry_run]
    new = tmp_path / "new"
    for options, message in (
        (["--output_dir", tmp_path / "out"], "out is there already"),
        (["--output_dir", tmp_path / "file" / "new"], "a part of this path is a file"),
        (["--output_dir", new, "--files", "hardlink", "--output_format", "csv"], "--files hardlink is of"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_clean(run, *how, *options)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(SystemExit, match="would take .* MB, and 0.0 MB are free there"):
        run_clean(run, *how, "--output_dir", new)
    assert capsys.readouterr().out == "" and not new.exists()
    with pytest.raises(SystemExit):
        run_clean(run, "--how", "weight", "--threshold", "0.9", "--output_dir", new)
    assert "--threshold is of --how drop and --how relabel" in capsys.readouterr().err


def test_hard_links_to_another_disk_are_refused_before_anything_is_written(table, tmp_path, capsys):
    other = tempfile.mkdtemp(dir="/dev/shm") if os.path.isdir("/dev/shm") else str(tmp_path)
    try:
        if os.stat(other).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("there is no second file system")
        for dry_run in ([], ["--dry_run"]):
            options = ["--how", "drop", "--files", "hardlink", "--output_dir", f"{other}/a/new", *dry_run]
            with pytest.raises(SystemExit, match="lies on another disk than .*new.*: choose --files copy or symlink"):
                run_clean(tmp_path / "run", *options)
        assert capsys.readouterr().out == "" and not os.listdir(other)
    finally:
        if other != str(tmp_path):
            shutil.rmtree(other)


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
@pytest.mark.parametrize(("files", "call"), [("hardlink", "os.link"), ("symlink", "pathlib.Path.symlink_to")])
def test_a_disk_without_links_is_known_before_anything_is_written(
    files, call, dry_run, table, tmp_path, monkeypatch, capsys
):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(call, refuse)
    options = ["--how", "drop", "--files", files, "--output_dir", tmp_path / "new", *dry_run]
    with pytest.raises(SystemExit, match=rf"no {files} of .*png \(Operation not permitted\): choose --files copy"):
        run_clean(tmp_path / "run", *options)
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exclude.jsonl", "photos", "run"]


def test_a_disk_that_does_not_tell_two_names_apart_loses_no_file(tmp_path):
    """As one that does not distinguish upper and lower case: the second file would take the place of the first."""
    (tmp_path / "a.png").write_text("a")
    _place(str(tmp_path / "a.png"), tmp_path / "out" / "a.png", "copy")
    with pytest.raises(FileExistsError, match="does not tell it from .*A.png: name a folder on another disk"):
        _place(str(tmp_path / "A.png"), tmp_path / "out" / "a.png", "copy")


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_images_that_were_added_since_are_named_and_taken_along(dry_run, table, tmp_path, capsys):
    held_nothing_out(tmp_path / "run")
    run_clean(tmp_path / "run", "--how", "drop", "--output_dir", tmp_path / "out", *dry_run)
    said, new = capsys.readouterr().out, tmp_path / "photos" / "train" / "cat" / "held.png"
    assert f"1 image was added since the audit, and nothing changes there: {new}. Audit again" in said
    assert "held_out" not in said
    if not dry_run:
        assert "1 added" in said and (tmp_path / "out" / "train" / "cat" / "held.png").is_file()
        rows = [row for row in read_csv(tmp_path / "out" / "lineage.csv") if row["path_original"] == str(new)]
        assert [row["label_action"] for row in rows] == ["added"]


def test_rows_that_were_added_to_a_table_since_are_named(tmp_path, capsys):
    make_table_run(tmp_path)
    held_nothing_out(tmp_path / "run")
    run_clean(tmp_path / "run", "--how", "relabel", "--output_dir", tmp_path / "out")
    assert "1 image was added since the audit, and nothing changes there: photos/x5.png." in capsys.readouterr().out
    row = next(row for row in read_csv(tmp_path / "out" / "train.csv") if row["photographer"] == "p5")
    assert (row["label_action"], row["label_original"]) == ("added", row["class"])


def test_hard_links_of_links_lead_to_their_files(table, tmp_path):
    path = table["path"][0]
    os.rename(path, tmp_path / "stored.png")
    os.symlink("../../../stored.png", path)
    plan = plan_cleaning(table, how="drop", threshold=1)
    write_folder(plan, read_source(tmp_path / "run"), tmp_path / "far" / "away" / "out", files="hardlink")
    out = tmp_path / "far" / "away" / "out" / os.path.relpath(path, tmp_path / "photos")
    assert not out.is_symlink() and out.samefile(tmp_path / "stored.png")


def test_a_disk_that_fills_up_is_named_and_nothing_is_left(table, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", source)

    monkeypatch.setattr("shutil.copy2", full)
    with pytest.raises(SystemExit, match=r"error: .*/new: the disk is full"):
        run_clean(tmp_path / "run", "--how", "drop", "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.part").exists()


@pytest.mark.parametrize("form", ["folder", "csv"])
def test_images_that_were_deleted_since_are_accounted_for(form, table, tmp_path, capsys):
    gone = table["path"][29]
    os.remove(gone)
    run_clean(tmp_path / "run", "--how", "drop", "--output_format", form, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert f"1 image is not there any more, and left out: {gone}" in said and "1 missing" in said
    lineage = {row["path_original"]: row for row in read_csv(tmp_path / "out" / "lineage.csv")}
    assert (lineage[gone]["label_action"], lineage[gone]["path"], lineage[gone]["label"]) == ("missing", "", "")
    if form == "csv":
        assert not any("0029.png" in row["file_name"] for row in read_csv(tmp_path / "out" / "train.csv"))


def test_rows_of_a_table_whose_images_were_deleted_since_are_left_out(tmp_path, capsys):
    table = make_table_run(tmp_path)
    gone = table["path"][0]
    os.remove(gone)
    run_clean(tmp_path / "run", "--how", "weight", "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert f"1 image is not there any more, and left out: {gone}" in said and "1 missing" in said
    assert all(row["photographer"] != "p0" for row in read_csv(tmp_path / "out" / "train.csv"))
    lineage = {row["path_original"]: row for row in read_csv(tmp_path / "out" / "lineage.csv")}
    assert (lineage[gone]["label_action"], lineage[gone]["path"]) == ("missing", "")
    for path in table["path"][1:]:
        os.remove(path)
    with pytest.raises(SystemExit, match=r"error: None of the 30 images is there any more.*connect their disk"):
        run_clean(tmp_path / "run", "--how", "weight", "--output_dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "cannot be the name of a folder") for name in ("../up", "a/b", "a\\b", ".hidden", "..", "__MACOSX")),
        ("\u00e4" * 128, "has more than 255 bytes, too many for the name of a folder"),
    ],
)
def test_a_class_that_no_folder_can_be_called(name, message, table, tmp_path):
    _, said = annotate(tmp_path, table, {0: name})
    plan = plan_cleaning(table, annotations=said, add_classes=[name])
    with pytest.raises(ValueError, match=message):
        write_folder(plan, read_source(tmp_path / "run"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anna.csv", "exclude.jsonl", "photos", "run"]


def test_a_new_class_that_would_be_taken_for_a_split_is_refused(table, tmp_path):
    """Of class folders alone a folder `test` is a split; below a folder `train` it is a class."""
    _, said = annotate(tmp_path, table, {0: "test"})
    write_folder(
        plan_cleaning(table, annotations=said, add_classes=["test"]), read_source(tmp_path / "run"), tmp_path / "out"
    )
    assert (tmp_path / "out" / "train" / "test" / "0000.png").is_file()
    flat = table.assign(path=[path.replace("/photos/train/", "/flat/") for path in table["path"]])
    flat.attrs = table.attrs
    os.rename(tmp_path / "photos" / "train", tmp_path / "flat")
    plan = plan_cleaning(flat, annotations=said, add_classes=["test"])
    with pytest.raises(ValueError, match="A folder `test` would be taken for a split"):
        write_folder(plan, Source(str(tmp_path / "flat")), tmp_path / "second")


def test_folders_with_blanks_and_decomposed_accents_keep_their_names(tmp_path):
    """Names of classes have neither: `dog ` is the class `dog`, and the accent of macOS is composed."""
    names = ("k\u00e4fer", "dog")
    table = make_run(tmp_path, names=names)
    train, disk = tmp_path / "photos" / "train", {"k\u00e4fer": "ka\u0308fer", "dog": "dog "}
    for name in names:
        (train / name).rename(train / disk[name])
    table["path"] = [
        path.replace(f"/{name}/", f"/{disk[name]}/")
        for path, name in zip(table["path"], table["label_name"], strict=True)
    ]
    new = next(name for name in names if name != table["label_name"][0])
    _, said = annotate(tmp_path, table, {0: f" {disk[new]}"})
    write_folder(plan_cleaning(table, annotations=said), read_source(tmp_path / "run"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out" / "train")) == sorted(disk.values())
    assert (tmp_path / "out" / "train" / disk[new] / "0000.png").is_file()


def test_names_that_look_the_same_are_one_class_and_odd_ones_are_none(table, tmp_path):
    with pytest.raises(ValueError, match="has the class cat already"):
        plan_cleaning(table, how="drop", add_classes=[" cat"])
    for name in ("", "a\nb", "a\x1bb"):
        with pytest.raises(ValueError, match="is no name of a class"):
            plan_cleaning(table, how="drop", add_classes=[name])


@pytest.mark.parametrize("name", ["none", "n/a", "1e5"])
def test_a_new_class_that_a_table_would_read_as_something_else_is_refused(name, tmp_path):
    table = make_table_run(tmp_path)
    _, said = annotate(tmp_path, table, {0: name})
    plan = plan_cleaning(table, annotations=said, add_classes=[name])
    with pytest.raises(ValueError, match="A table could not be read again .*Choose parquet or arrow"):
        write_csv(plan, read_source(tmp_path / "run"), tmp_path / "out")


def test_a_word_among_numbers_is_refused(tmp_path):
    table = make_table_run(tmp_path, text=lambda label: str(label))
    _, said = annotate(tmp_path, table, {0: "zebra"})
    plan = plan_cleaning(table, annotations=said, add_classes=["zebra"])
    with pytest.raises(ValueError, match="could not be read again .*`zebra`"):
        write_csv(plan, read_source(tmp_path / "run"), tmp_path / "out")


def test_a_table_beside_the_images_that_says_their_labels_is_not_copied_with_stale_paths(table, tmp_path):
    (tmp_path / "photos" / "train" / "metadata.csv").write_text("file_name,label\ncat/0000.png,cat\n")
    with pytest.raises(ValueError, match=r"metadata.csv says what the labels are, not the folders"):
        write_folder(plan_cleaning(table, how="drop"), read_source(tmp_path / "run"), tmp_path / "out")


def test_the_lineage_of_a_table_goes_before_that_of_its_images(tmp_path, monkeypatch):
    for folder in ("images", "tables"):
        (tmp_path / folder).mkdir()
        write_lineage(tmp_path / folder, [])
    (tmp_path / "tables" / "train.csv").write_text("")
    options = {"dataset": str(tmp_path / "tables" / "train.csv"), "data_dir": str(tmp_path / "images")}
    assert lineage_beside(options) == tmp_path / "tables" / "lineage.csv"
    monkeypatch.chdir(tmp_path / "tables")  # a name of a dataset is no place
    assert lineage_beside({"dataset": "imagefolder", "data_dir": str(tmp_path / "images")}).parent.name == "images"


def test_a_file_of_ones_own_that_is_called_as_a_lineage_is(table, tmp_path):
    """Beside the dataset or in it, it is no lineage; one that was damaged is not passed over."""
    run, photos = tmp_path / "run", tmp_path / "photos"
    for folder in (tmp_path, photos):
        (folder / "lineage.csv").write_text("species,parent\nlynx,cat\n")
        assert lineage_beside({"dataset": "imagefolder", "data_dir": str(photos)}) is None
    assert lineage_of_rows(run, table["index"], table["path"]) == {}
    with pytest.raises(ValueError, match="photos/lineage.csv was not written by `hnml clean`.*: rename it"):
        write_folder(plan_cleaning(table, how="drop"), read_source(run), tmp_path / "out")
    (photos / "lineage.csv").write_text("index,path,label_action\n")
    with pytest.raises(ValueError, match="is no lineage of a cleaned dataset: no column annotation, .*Restore what"):
        lineage_of_rows(run, table["index"], table["path"])


def test_a_label_that_was_changed_since_it_was_decided_is_asked_again(table, tmp_path):
    rows = [
        {"index": table["index"][row], "path": table["path"][row], "label": label, "label_original": "horse"}
        | {"label_action": "annotated", "annotation": "right", "annotator": "anna"}
        for row, label in ((0, table["label_name"][0]), (1, other_class(table, 1)))
    ]
    write_lineage(tmp_path / "photos", rows)
    assert decided_samples(tmp_path / "run", table, NAMES) == [table["index"][0]]
    earlier = lineage_of_rows(tmp_path / "run", table["index"].tolist(), table["path"].tolist())
    plan = plan_cleaning(table, how="drop", earlier=earlier)
    assert plan["label_action"][:2].tolist() == ["annotated", "dropped"]
    assert plan["label_original"][:2].tolist() == ["horse", "horse"]


def test_annotations_that_the_audit_has_learned_from_cannot_be_forgotten(table, tmp_path):
    path, said = annotate(tmp_path, table, {0: "right", 1: "unsure"})
    write_audit(tmp_path / "run" / "_audit", apply_annotations(table, said))
    with pytest.raises(SystemExit, match="has learned from annotations of 1 label that are not given here"):
        run_clean(tmp_path / "run", "--how", "drop", "--output_dir", tmp_path / "out")
    run_clean(tmp_path / "run", "--how", "drop", "--output_dir", tmp_path / "out", "--annotations", path)
    assert (tmp_path / "out" / "lineage.csv").is_file()
