"""Annotations: read, merged, and what follows from them."""

import json
import os

import numpy as np
import pandas as pd
import pytest
from reports import make_table
from reviews import audit_again, make_run

from hnml_hf.audit.review import (
    annotated_labels,
    apply_annotations,
    follow_annotations,
    merge_annotations,
    read_all,
    read_annotations,
    write_annotations,
)
from hnml_hf.audit.review.log import AnnotationLog, LogError, OtherDatasetError
from hnml_hf.audit.review.matching import Scored
from hnml_hf.audit.review.server import open_review


NAMES = ("cat", "dog", "=horse")


@pytest.fixture
def table():
    return make_table(9, NAMES)


def said(table, row, annotation, name="", annotator="anna"):
    facts = table.iloc[row]
    return {
        "index": facts["index"],
        "annotation": annotation,
        "new_label_name": name,
        "label_name": facts["label_name"],
        "annotator": annotator,
    }


def read(path, rows, table):
    return read_annotations(write_annotations(path, rows), table)


def test_annotations_survive_a_file_with_names_that_a_spreadsheet_would_run(table, tmp_path):
    rows = [said(table, 8, "wrong", "=horse"), said(table, 1, "right"), said(table, 2, "unsure")]
    rows.append(said(table, 3, "wrong", 'a, "zebra"'))
    found = read(tmp_path / "a.csv", rows, table)
    assert "'=horse" in (tmp_path / "a.csv").read_text()
    assert found["new_label"].tolist() == [2, table["label"][1], -1, -1]
    assert found["new_label_name"].tolist() == ["=horse", table["label_name"][1], "", 'a, "zebra"']
    assert set(found["annotator"]) == {"anna"}


def test_marks_of_earlier_versions_are_annotations(table, tmp_path):
    path = tmp_path / "marks.csv"
    path.write_text(f"index,mark,new_label\r\n{table['index'][0]},wrong,\r\n{table['index'][1]},wrong,2\r\n")
    found = read_annotations(path, table)
    assert found["new_label"].tolist() == [table["suggested_label"][0], 2]
    assert set(found["annotator"]) == {"marks"}  # of the file's name


def test_ids_as_pandas_writes_them_and_ids_that_contradict_their_names(table, tmp_path):
    path, index = tmp_path / "a.csv", table["index"]
    heading = "index,annotation,new_label,new_label_name\n"
    path.write_text(f"{heading}{index[3]}.0,wrong,2.0,\n{index[1]},wrong,-1.0,zebra\n")
    assert read_annotations(path, table)["new_label"].tolist() == [2, -1]
    path.write_text(f"{heading}{index[3]},wrong,2,{NAMES[2]}\n{index[1]},wrong,2,{NAMES[1]}\n")
    with pytest.raises(ValueError, match=f"a.csv:3: `new_label` 2 is `{NAMES[2]}`, but `new_label_name` says"):
        read_annotations(path, table)
    path.write_text(f"{heading}{index[0]},wrong,1.7,\n")
    with pytest.raises(ValueError, match=r"a.csv:2: `index` and `new_label` must be integers \(new_label: '1.7'\)"):
        read_annotations(path, table)


def test_classes_that_are_numbers_as_pandas_writes_them(tmp_path):
    table, path = make_table(9, ("1", "2", "10")), tmp_path / "a.csv"
    rows = [said(table, row, "wrong", table["suggested_name"][row]) for row in range(3)]
    write_annotations(path, [*rows, said(table, 3, "unsure")])
    frame = pd.read_csv(path)
    frame.assign(label_name=frame["label_name"].astype(float)).to_csv(path, index=False)
    assert ".0," in path.read_text()
    assert read_annotations(path, table)["new_label_name"].tolist() == [*table["suggested_name"][:3], ""]


def test_annotations_of_another_run_are_named_by_line(table, tmp_path):
    row = {**said(table, 0, "right"), "label_name": "zebra"}
    with pytest.raises(ValueError, match=r"a.csv:2: sample \d+ was annotated when its label was `zebra`; here it is"):
        read(tmp_path / "a.csv", [row], table)
    with pytest.raises(ValueError, match=r"a.csv:2: sample id 5 is not among the scored"):
        read(tmp_path / "a.csv", [{**said(table, 0, "right"), "index": 5}], table)
    with pytest.raises(ValueError, match=r"a.csv:3: sample id \d+ is annotated twice by `anna`"):
        read(tmp_path / "a.csv", [said(table, 0, "right"), said(table, 0, "unsure")], table)


def test_files_of_one_name_are_of_two_people(table, tmp_path):
    """A browser saves `annotations.csv` for everybody: the folders tell them apart."""
    for who, word in (("anna", "right"), ("bo", "unsure")):
        (tmp_path / who).mkdir()
        write_annotations(tmp_path / who / "annotations.csv", [{**said(table, 0, word), "annotator": ""}])
    paths = [tmp_path / who / "annotations.csv" for who in ("anna", "bo")]
    merged = merge_annotations(read_all([*paths, paths[0]], table))
    assert list(merged.kappa) == [("anna/annotations", "bo/annotations")]
    assert merged.annotations["annotation"].tolist() == ["right"]
    (found,) = read_all(paths[:1], table)
    assert set(found["annotator"]) == {"annotations"}


def test_names_of_classes_are_read_without_blanks_and_unsure_is_no_class(table, tmp_path):
    rows = [said(table, 1, "wrong", " cat "), said(table, 2, "wrong", "unsure")]
    rows += [{**said(table, 2, "unsure"), "annotator": "bo"}, {**said(table, 1, "wrong", "cat"), "annotator": "bo"}]
    found = read(tmp_path / "a.csv", rows, table)
    assert found["new_label_name"][:2].tolist() == ["cat", "unsure"] and found["new_label"][0] == 0
    kappa, count = merge_annotations([found]).kappa["anna", "bo"]
    assert count == 2 and kappa < 1  # "unsure" as a class and as a doubt are two things
    with pytest.raises(ValueError, match="b.csv:.* control characters"):
        read(tmp_path / "b.csv", [said(table, 1, "wrong", "a\nb")], table)


def test_two_people_are_merged_and_their_agreement_is_reported(table, tmp_path):
    """Anna and Bo on four samples: both right, right and wrong, unsure and right, both the same other class."""
    given = table["label_name"]
    other = [next(name for name in NAMES if name != given[row]) for row in range(9)]
    anna = [
        said(table, 0, "right"),
        said(table, 1, "right"),
        said(table, 2, "unsure"),
        said(table, 3, "wrong", other[3]),
    ]
    bo = [said(table, 0, "right"), said(table, 1, "wrong", other[1]), said(table, 2, "right")]
    bo.append(said(table, 3, "wrong", other[3]))
    bo = [{**row, "annotator": "bo"} for row in bo]
    merged = merge_annotations([read(tmp_path / "a.csv", anna, table), read(tmp_path / "b.csv", bo, table)])
    at = table["index"].tolist()
    assert merged.annotations.loc[at[:4], "annotation"].tolist() == ["right", "unsure", "right", "wrong"]
    assert merged.annotations.loc[at[0], "annotator"] == "anna bo"
    assert merged.disagreements.index.tolist() == [at[1]]
    assert merged.disagreements.loc[at[1]].tolist() == [given[1], other[1]]
    kappa, count = merged.kappa["anna", "bo"]
    named = [[given[0], given[1], "unsure", other[3]], [given[0], other[1], given[2], other[3]]]
    observed = np.mean([a == b for a, b in zip(*named, strict=True)])
    chance = sum(named[0].count(name) * named[1].count(name) for name in {*named[0], *named[1]}) / 16
    assert count == 4 and kappa == pytest.approx((observed - chance) / (1 - chance))


def test_a_label_may_be_wrong_without_a_class(table, tmp_path):
    """An empty `new_label` is the suggestion; -1 without a name, and the given class itself, say that it is wrong."""
    path, index, label = tmp_path / "a.csv", table["index"], table["label"]
    lines = [f"{index[row]},wrong,{new}," for row, new in enumerate(("", -1, label[2], -1.0))]
    path.write_text("\n".join(["index,annotation,new_label,new_label_name", *lines]))
    found = read_annotations(path, table)
    assert found["new_label"].tolist() == [table["suggested_label"][0], -1, -1, -1]
    assert found["new_label_name"].tolist() == [table["suggested_name"][0], "", "", ""]
    merged = merge_annotations([found]).annotations
    assert annotated_labels(merged, index[:4].to_numpy(), NAMES).tolist() == [table["suggested_label"][0], -1, -1, -1]
    assert apply_annotations(table, merged)["noise_score"][:4].tolist() == [1, 1, 1, 1]


def test_wrong_without_a_class_disputes_the_given_class_alone(table, tmp_path):
    """Anna: wrong, of an unknown class. Bo: right, another class, unsure, and the same."""
    anna = [said(table, row, "wrong", table["label_name"][row]) for row in range(4)]
    other = next(name for name in NAMES if name != table["label_name"][1])
    bo = [said(table, 0, "right"), said(table, 1, "wrong", other), said(table, 2, "unsure")]
    bo.append(said(table, 3, "wrong", table["label_name"][3]))
    bo = [{**row, "annotator": "bo"} for row in bo]
    merged = merge_annotations([read(tmp_path / "a.csv", anna, table), read(tmp_path / "b.csv", bo, table)])
    found = merged.annotations.loc[table["index"][:4]]
    assert found["annotation"].tolist() == ["unsure", "wrong", "wrong", "wrong"]
    assert found["new_label_name"].tolist() == ["", other, "", ""]
    assert merged.disagreements.index.tolist() == [table["index"][0]]
    assert merged.disagreements.iloc[0].tolist() == ["(wrong)", table["label_name"][0]]


def test_two_people_of_one_mind_have_kappa_one(table, tmp_path):
    rows = [said(table, 0, "unsure"), said(table, 1, "unsure")]
    frames = [read(tmp_path / "a.csv", rows, table)]
    frames.append(read(tmp_path / "b.csv", [{**row, "annotator": "bo"} for row in rows], table))
    assert merge_annotations(frames).kappa["anna", "bo"] == (1.0, 2)


def test_the_judge_gets_labels_and_the_table_gets_scores(table, tmp_path):
    rows = [said(table, 8, "wrong", "=horse"), said(table, 0, "right"), said(table, 1, "wrong", "zebra")]
    rows.append(said(table, 2, "unsure"))
    merged = merge_annotations([read(tmp_path / "a.csv", rows, table)]).annotations
    labels = annotated_labels(merged, table["index"].to_numpy(), NAMES)
    assert labels.tolist() == [table["label"][0], -1, -1, -1, -1, -1, -1, -1, 2]
    scored = apply_annotations(table, merged)
    assert scored["noise_score"][[8, 0, 1]].tolist() == [1, 0, 1]
    assert scored["suggested_name"][8] == "=horse" and scored["rank"][0] == 9
    assert sorted(scored["rank"]) == list(range(1, 10)) and set(scored["rank"][[1, 8]]) == {1, 2}
    assert scored.attrs["noise_rate"] == pytest.approx(scored["noise_score"].mean())
    assert table["noise_score"][0] != 0  # the table that was given stays


# -- the log ----------------------------------------------------------------------------------------------------------


def line(index, annotation="wrong", name="dog"):
    return {"index": index, "annotation": annotation, "new_label": 1, "new_label_name": name}


def test_what_was_kept_is_there_after_a_kill(tmp_path):
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    log.append([line(1), line(2)], "anna")
    log.append([line(2, None)], "anna")
    with open(log.path, "ab") as file:
        file.write(b'{"index": 3, "annot')  # a machine that lost its power in the middle of a line
    again = AnnotationLog(log.path, "f")
    assert [row["index"] for row in again.rows()] == [1]
    again.append([line(4)], "anna")
    assert [row["index"] for row in AnnotationLog(log.path, "f").rows()] == [1, 4]


def test_two_servers_append_to_one_file_without_loss(tmp_path):
    first, second = (AnnotationLog(tmp_path / "a.jsonl", "f") for _ in range(2))
    for number in range(20):
        first.append([line(number)], "anna")
        changed = second.append([line(number, "right")], "bo")
        assert [(row["index"], row["annotator"]) for row in changed] == [(number, "anna"), (number, "bo")]
    assert len(list(second.rows())) == len(list(AnnotationLog(tmp_path / "a.jsonl", "f").rows())) == 40
    assert [row["annotator"] for row in first.refresh()] == ["bo"]  # its last line; others came with each append


def test_a_batch_that_is_sent_twice_is_kept_once(tmp_path):
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    log.append([line(1)], "anna", "ab12")
    size = log.path.stat().st_size
    assert log.append([line(1)], "anna", "ab12") == [] and log.path.stat().st_size == size
    assert AnnotationLog(log.path, "f").append([line(1)], "anna", "ab12") == []


def test_of_a_batch_that_was_cut_off_the_rest_is_kept(tmp_path):
    """By a crash, or a full disk, in the middle of its lines: the browser sends it again."""
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    log.append([line(1), line(2), line(3)], "anna", "ab12")
    whole = log.path.read_bytes().split(b"\n")
    log.path.write_bytes(b"\n".join([*whole[:2], whole[2][:20]]))
    again = AnnotationLog(log.path, "f")
    assert [row["index"] for row in again.rows()] == [1]
    assert [row["index"] for row in again.append([line(1), line(2), line(3)], "anna", "ab12")] == [2, 3]
    assert [row["index"] for row in AnnotationLog(log.path, "f").rows()] == [1, 2, 3]


@pytest.mark.parametrize(
    "odd, message",
    [
        ({"index": 5}, r"sample 5 is not in this audit. Correct or delete this line; those around it are kept."),
        ({"index": "1"}, "`index` must be a sample id; here it is '1'. Correct or delete"),
        ({"index": True}, "`index` must be a sample id; here it is 'True'"),
        ({"index": 2**70}, "`index` must be a sample id"),
        ({"annotation": "maybe"}, "the annotation 'maybe' is none of wrong, right, unsure or null"),
        ({"annotator": ["anna"]}, r"`annotator` must be a text; here it is \"\['anna'\]\""),
        ({"new_label_name": 3}, "`new_label_name` must be a text; here it is '3'"),
        ({"annotation": ...}, "an annotation has `annotation`, and this line has none"),
        ({"index": ...}, "an annotation has `index`, and this line has none"),
    ],
)
def test_a_strange_line_takes_no_line_beside_it_along(odd, message, tmp_path):
    """Written by hand while the log is in use: named as often as it is read, not written again, and once it is
    corrected all that was appended with it counts."""
    log = AnnotationLog(tmp_path / "a.jsonl", "f", known=range(1, 5))
    log.append([line(1)], "anna")
    whole = log.path.read_bytes()
    good = [{**line(index), "annotator": "bo"} for index in (2, 3)]
    strange = {name: value for name, value in {**good[0], **odd}.items() if value is not ...}
    text = [json.dumps(one) + "\n" for one in (good[0], strange, good[1])]
    log.path.write_bytes(whole + "".join(text).encode())
    for _ in range(2):
        with pytest.raises(LogError, match=f"a.jsonl:4: {message}"):
            log.refresh()
        with pytest.raises(LogError, match="a.jsonl:4"):
            log.append([line(4)], "anna")
    with pytest.raises(LogError, match=f"a.jsonl:4: {message}"):
        AnnotationLog(log.path, "f", known=range(1, 5))
    assert [row["index"] for row in log.rows()] == [1]
    log.path.write_bytes(whole + (text[0] + text[2]).encode())
    assert [row["index"] for row in log.refresh()] == [2, 3]
    log.path.unlink()
    log.refresh()
    assert [row["index"] for row in AnnotationLog(log.path, "f", known=range(1, 5)).rows()] == [1, 2, 3]


def test_a_line_by_hand_without_its_end_counts(tmp_path):
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    with open(log.path, "a") as file:
        file.write(json.dumps({**line(1), "annotator": "bo"}))
    assert [row["index"] for row in log.refresh()] == [1]
    log.append([line(2)], "anna")
    assert [row["index"] for row in AnnotationLog(log.path, "f").rows()] == [1, 2]


def test_undo_puts_back_what_was_there_also_after_a_restart(tmp_path):
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    log.append([line(1, "right")], "anna", "aa")
    log.append([line(1, "wrong"), line(2, "wrong")], "anna", "bb")
    log = AnnotationLog(log.path, "f")
    log.undo("bb")
    assert [(row["index"], row["annotation"]) for row in log.rows()] == [(1, "right")]
    log.undo("aa")
    assert list(log.rows()) == [] and list(AnnotationLog(log.path, "f").rows()) == []
    with pytest.raises(KeyError):
        log.undo("cc")


def test_undo_keeps_what_was_said_since(tmp_path):
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    log.append([line(1), line(2)], "anna", "aa")
    log.append([line(1, "right")], "anna", "bb")
    log.undo("aa")
    assert [(row["index"], row["annotation"]) for row in log.rows()] == [(1, "right")]


def test_undo_does_not_put_back_what_was_taken_back_since(tmp_path):
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    for batch, word in (("aa", "wrong"), ("bb", "right"), ("cc", None), ("dd", "unsure")):
        log.append([line(1, word)], "anna", batch)
    log.undo("dd")
    assert list(log.rows()) == []
    log.undo("bb")  # of another tab
    assert list(log.rows()) == [] and list(AnnotationLog(log.path, "f").rows()) == []
    log.undo("cc")
    assert [row["annotation"] for row in log.rows()] == ["right"]


@pytest.mark.parametrize("edit", ["in place", "a new file"])
def test_a_log_that_is_edited_while_it_is_used_holds_what_it_says(edit, tmp_path):
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    log.append([line(1), line(2, "right"), line(3, "right")], "anna", "aa")
    first, *lines = log.path.read_text().splitlines(keepends=True)
    one, two, three = lines
    four = json.dumps({**line(4), "annotator": "bo", "batch": "b" * 200}) + "\n"
    for changed, said in (
        ([one, two.replace("right", "wrong"), three], ["wrong", "wrong", "right"]),  # of the same size
        ([one.replace("wrong", "unsure"), two, three], ["unsure", "right", "right"]),
        ([one, three, four], ["wrong", "right", "wrong"]),
    ):
        place = log.path if edit == "in place" else tmp_path / "new"
        place.write_text(first + "".join(changed))
        os.utime(place, ns=(0, len(said) + log.version))
        place.replace(log.path)
        found = log.refresh()
        assert [row["annotation"] for row in log.rows()] == said
    assert [row["index"] for row in log.rows()] == [1, 3, 4]
    assert {"index": 2, "annotator": "anna", "annotation": None} in found
    log.append([line(5)], "anna")
    assert [row["index"] for row in AnnotationLog(log.path, "f").rows()] == [1, 3, 4, 5]


def test_a_log_that_is_cut_while_it_is_used_is_written_again(tmp_path, caplog):
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    log.append([line(1), line(2)], "anna")
    log.path.write_bytes(b"")
    log.append([line(3)], "anna")
    assert "was cut or deleted" in caplog.text
    assert [row["index"] for row in AnnotationLog(log.path, "f").rows()] == [1, 2, 3]
    log.path.unlink()
    log.refresh()
    assert len(list(AnnotationLog(log.path, "f").rows())) == 3


def test_annotations_of_another_dataset_are_refused_and_not_touched(tmp_path):
    AnnotationLog(tmp_path / "a.jsonl", "f").append([line(1)], "anna")
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds annotations of another dataset"):
        AnnotationLog(tmp_path / "a.jsonl", "g")
    assert (tmp_path / "a.jsonl").read_bytes() == before
    (tmp_path / "b.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="b.jsonl:1: no line of an annotation log"):
        AnnotationLog(tmp_path / "b.jsonl", "f")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_may_have_gone_through_any_spreadsheet(separator, end, table, tmp_path):
    """Where numbers have a decimal comma, it separates by semicolons; a comma in a name stays one."""
    rows = [["index", "annotation", "new_label", "new_label_name"], [table["index"][0], "wrong", "", '"cat, wild"']]
    rows.append([table["index"][1], "right", "", ""])
    text = "".join(separator.join(map(str, row)) + end for row in rows)
    (tmp_path / "anna.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = read_annotations(tmp_path / "anna.csv", table)
    assert found["index"].tolist() == table["index"][:2].tolist()
    assert found["new_label_name"].tolist() == ["cat, wild", table["label_name"][1]]


@pytest.mark.parametrize("fingerprint", ["same", "another"])
def test_a_log_of_another_version_is_refused_and_not_touched(fingerprint, tmp_path):
    """Also where the dataset has changed since, so that a log of this version would be written anew."""
    table = make_run(tmp_path)
    scored = table.attrs["dataset_fingerprint"] if fingerprint == "same" else "e" * 32
    header = {"format": "hnml_hf annotations 2", "dataset_fingerprint": scored, "root": f"{tmp_path}/photos/train/"}
    path = tmp_path / "run" / "_audit" / "annotations.jsonl"
    said = {**entries_of(table, [0], header["root"])[0], "annotator": "anna", "confidence": 3}
    path.write_text(json.dumps(header) + "\n" + json.dumps(said) + "\n")
    before = path.read_bytes()
    for read in (lambda: read_annotations(path, table), lambda: open_review(tmp_path / "run")):
        with pytest.raises(LogError, match=r"was written by another version .*\(hnml_hf annotations 2; this one"):
            read()
    assert path.read_bytes() == before


def test_a_log_is_read_like_a_csv(table, tmp_path):
    log = AnnotationLog(tmp_path / "a.jsonl", table.attrs["dataset_fingerprint"])
    index = [int(value) for value in table["index"]]
    log.append([{**line(index[1], name="cat"), "new_label": 0}, line(index[0])], "anna")
    log.append([line(index[0], None)], "anna")
    found = read_annotations(log.path, table)
    assert found["index"].tolist() == [index[1]] and found["new_label_name"].tolist() == ["cat"]
    assert json.loads(log.path.read_bytes().split(b"\n")[0])["dataset_fingerprint"] == "f" * 32
    table.attrs["dataset_fingerprint"] = "e" * 32
    with pytest.raises(
        ValueError, match=r"a.jsonl:2: the dataset has changed since, and without the path of its image"
    ):
        read_annotations(log.path, table)


# -- a dataset that has changed since ---------------------------------------------------------------------------------


def entries_of(table, rows, root=""):
    """Lines of a log: the suggested class of each row is true."""
    return [
        {"index": int(row["index"]), "annotation": "wrong", "new_label": 7, "new_label_name": row["suggested_name"]}
        | {"label_name": row["label_name"], "path": row["path"].removeprefix(root)}
        for row in table.iloc[list(rows)].to_dict("records")
    ]


@pytest.mark.parametrize("kind", ["log", "log of an earlier version", "csv", "csv of a spreadsheet"])
def test_annotations_follow_their_images(kind, tmp_path, caplog):
    """Images were added and lost, every id is that of another sample by now, and so are those of the classes."""
    table = make_run(tmp_path)
    root = f"{tmp_path}/photos/train/"
    lines, path = entries_of(table, range(5), root), tmp_path / ("a.jsonl" if "log" in kind else "a.csv")
    if kind == "log":
        AnnotationLog(path, table.attrs["dataset_fingerprint"], root).append(lines, "anna")
    elif "log" in kind:
        header = {"format": "hnml_hf annotations 1", "dataset_fingerprint": table.attrs["dataset_fingerprint"]}
        path.write_text(
            "".join(json.dumps(line) + "\n" for line in (header, *({"annotator": "anna", **a} for a in lines)))
        )
    else:
        write_annotations(path, [{**line, "new_label": ""} for line in lines])
        if "spreadsheet" in kind:
            frame = pd.read_csv(path)
            frame.assign(index=frame["index"].astype(float)).to_csv(path, index=False)
    again = audit_again(tmp_path, table, lost=[1])
    again.attrs["class_names"] = ["horse", "cat", "dog"]
    for name in ("label", "suggested_label"):
        again[name] = (again[name] + 1) % 3
    found = read_annotations(path, again).merge(again, on="index")
    assert found["path"].tolist() == [table["path"][row] for row in (0, 2, 3, 4)]
    assert found["new_label_name"].tolist() == [table["suggested_name"][row] for row in (0, 2, 3, 4)]
    assert found["new_label"].tolist() == found["suggested_label"].tolist()
    assert (
        f"1 annotation is left out, since the image is gone or has another label by now: {lines[1]['path']}"
        in caplog.text
    )


def test_annotations_that_cannot_be_matched_are_refused(tmp_path):
    table = make_run(tmp_path)
    root, path = f"{tmp_path}/photos/train/", tmp_path / "a.jsonl"
    AnnotationLog(path, table.attrs["dataset_fingerprint"], root).append(entries_of(table, [0, 1], root), "anna")
    again = audit_again(tmp_path, table)
    elsewhere = again.assign(path=again["path"].str.replace("/photos/", "/others/"))  # with files of the same names
    for other in (elsewhere, again.assign(label_name="zebra")):
        other.attrs = again.attrs
        with pytest.raises(
            ValueError, match=r"a.jsonl:2: these annotations are of another dataset: no image that was"
        ):
            read_annotations(path, other)
    plain = again.assign(path="")  # images that are part of the dataset
    plain.attrs = again.attrs
    with pytest.raises(ValueError, match=r"a.jsonl:2: these annotations are of another dataset"):
        read_annotations(path, plain)
    csv = write_annotations(tmp_path / "a.csv", [{**entries_of(table, [0])[0], "path": "0000.png", "new_label": ""}])
    again.loc[5, "path"] = f"{root}bird/0000.png"
    with pytest.raises(ValueError, match=r"a.csv:2: .* 2 images could be the `0000.png`"):
        read_annotations(csv, again)


def test_decisions_follow_to_the_samples_of_now(tmp_path):
    table = make_run(tmp_path)
    rows = [{**row, "new_label": ""} for row in entries_of(table, range(3))]
    said = merge_annotations([read(tmp_path / "a.csv", rows, table)]).annotations
    again = audit_again(tmp_path, table, lost=[0])
    found, lost = follow_annotations(said, table, Scored(again["index"], again["path"], again["label_name"]))
    assert lost == [table["path"][0]]
    paths = again.set_index("index").loc[found.index, "path"]
    assert sorted(paths) == sorted(table["path"][[1, 2]]) and set(found["annotation"]) == {"wrong"}
    names = table.set_index("path").loc[paths, "suggested_name"]
    assert found["new_label_name"].tolist() == names.tolist()


def test_a_file_that_has_taken_the_place_of_a_log_is_read_and_never_written_over(tmp_path):
    """As after a restore from a backup, or after a new audit: shorter, longer, and of another dataset."""
    log = AnnotationLog(tmp_path / "a.jsonl", "f")
    log.append([line(1), line(2)], "anna", "aa")
    AnnotationLog(tmp_path / "b.jsonl", "f").append([line(3)], "bo", "bb")
    (tmp_path / "b.jsonl").replace(log.path)
    assert [(row["index"], row["annotation"]) for row in log.refresh()][-1] == (3, "wrong")
    assert [row["index"] for row in log.rows()] == [3]
    log.append([line(4)], "anna")
    assert [row["index"] for row in AnnotationLog(log.path, "f").rows()] == [3, 4]
    AnnotationLog(tmp_path / "c.jsonl", "g").append([line(5)], "bo", "cc")
    (tmp_path / "c.jsonl").replace(log.path)
    before = log.path.read_bytes()
    for _ in range(2):
        with pytest.raises(OtherDatasetError, match="holds annotations of another dataset"):
            log.append([line(6)], "anna")
    assert log.path.read_bytes() == before
