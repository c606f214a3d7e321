"""Label issues go to Label Studio, CVAT and FiftyOne, and what people decided there comes back."""

import json
import os
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest
from commands import load_script
from PIL import Image
from reviews import make_run

from hnml_hf import export_audit, load_noisy_dataset
from hnml_hf.audit.exchange import write_label_studio
from hnml_hf.audit.findings import probably_wrong
from hnml_hf.audit.review import read_annotations
from hnml_hf.audit.review.server import open_review
from hnml_hf.audit.table import write_audit
from hnml_hf.data.schema import column, labels_fingerprint


@pytest.fixture
def audited(tmp_path):
    """30 photographs in folders; their table and dataset."""
    table = make_run(tmp_path)
    dataset = load_noisy_dataset("imagefolder", data_dir=tmp_path / "photos", cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    at = {cell["path"]: row for row, cell in enumerate(dataset.data.column("image").to_pylist())}
    table["index"] = [int(dataset["index"][at[path]]) for path in table["path"]]
    print_of_labels = labels_fingerprint(column(dataset, "index"), column(dataset, "label"), 3)
    table.attrs["dataset_fingerprint"] = print_of_labels
    return table, dataset


def decisions(found):
    return {
        row["index"]: (row["annotation"], row["new_label_name"], row["annotator"]) for row in found.to_dict("records")
    }


def other(table, row):
    return next(name for name in table.attrs["class_names"] if name != table["label_name"][row])


# -- Label Studio -----------------------------------------------------------------------------------------------------


def local_file(task):
    """The file of a task below the root, as the server reads its address."""
    address = urlsplit(task["data"]["image"])
    assert address.path == "/data/local-files/" and not address.fragment
    (path,) = parse_qs(address.query, strict_parsing=True)["d"]
    return path


def test_tasks_of_label_studio(audited, tmp_path):
    table, dataset = audited
    (folder,) = export_audit(table, dataset, tmp_path / "exports", ["label_studio"])
    tasks = json.loads((folder / "tasks.json").read_text())
    issues = table[probably_wrong(table)]
    assert [task["data"]["index"] for task in tasks] == issues["index"].tolist()
    first, row = tasks[0], issues.iloc[0]
    assert first["data"]["given_label"] == row["label_name"]
    # the server shows what lies in a storage strictly below its root, by an address in quotes
    comment, serving, root = (folder / "server.env").read_text().splitlines()
    assert comment.endswith(f": {tmp_path}/photos/train") and serving.endswith("_LOCAL_FILES_SERVING_ENABLED=true")
    assert root == f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={tmp_path}/photos"
    assert (tmp_path / "photos" / local_file(first)).samefile(row["path"])
    (prediction,) = first["predictions"]
    assert prediction["result"][0]["value"] == {"choices": [row["suggested_name"]]}
    assert prediction["score"] == pytest.approx(row["noise_score"])
    view = ElementTree.parse(folder / "interface.xml").getroot()
    (choices,) = view.findall("Choices")
    assert [choice.get("value") for choice in choices] == table.attrs["class_names"]
    (image,) = view.findall("Image")
    assert prediction["result"][0]["from_name"] == choices.get("name")
    assert prediction["result"][0]["to_name"] == choices.get("toName") == image.get("name")


def test_names_that_an_address_would_cut_are_shown_and_found(audited, tmp_path):
    table, dataset = audited
    odd = tmp_path / "c&d=1 #2 + %20 \u00e4?.png"
    os.rename(table["path"][0], odd)
    table.loc[0, "path"] = str(odd)
    write_label_studio(table.head(1), {table["index"][0]: str(odd)}, tmp_path / "exports")
    (task,) = json.loads((tmp_path / "exports" / "tasks.json").read_text())
    assert local_file(task) == f"{tmp_path.name}/{odd.name}"
    del task["data"]["index"]
    task["annotations"] = [annotated(task, other(table, 0), 1)]
    (tmp_path / "export.json").write_text(json.dumps([task]))
    assert list(decisions(read_annotations(tmp_path / "export.json", table))) == [table["index"][0]]
    bad = tmp_path / "a\nrm" / "x.png"
    with pytest.raises(ValueError, match="has control characters"):
        write_label_studio(table.head(1), {table["index"][0]: str(bad)}, tmp_path / "exports")


def test_what_label_studio_returns(audited, tmp_path):
    """The fields of an export of version 1.23.2 over its API, all tasks: confirmed, corrected, skipped, untouched."""
    table, _ = audited
    tasks = []
    for row in range(4):
        data = {"image": "/data/local-files/?d=x.png", "index": int(table["index"][row]), "noise_score": 0.9}
        data |= {"given_label": table["label_name"][row], "suggested_label": table["suggested_name"][row]}
        tasks.append({"id": row, "annotations": [], "drafts": [], "predictions": [row], "data": data, "meta": {}})
    for row, name in ((0, table["label_name"][0]), (1, other(table, 1)), (2, None)):
        choice = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": [name]}}
        done = {"id": row, "completed_by": 1, "result": [choice] if name else [], "was_cancelled": name is None}
        tasks[row]["annotations"] = [done | {"ground_truth": False, "prediction": {"result": [choice]}, "task": row}]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    index = table["index"].tolist()
    assert decisions(read_annotations(tmp_path / "export.json", table)) == {
        index[0]: ("right", table["label_name"][0], "1"),
        index[1]: ("wrong", other(table, 1), "1"),
        index[2]: ("unsure", "", "1"),
    }


def annotated(task, name, who, **more):
    result = [] if name is None else [{**task["predictions"][0]["result"][0], "value": {"choices": [name]}}]
    return {"id": 1, "completed_by": who, "result": result, "was_cancelled": False, **more}


def test_what_was_decided_in_label_studio(audited, tmp_path):
    table, dataset = audited
    (folder,) = export_audit(table, dataset, tmp_path / "exports", ["label_studio"])
    tasks = json.loads((folder / "tasks.json").read_text())
    given = [task["data"]["given_label"] for task in tasks]
    said = [
        [annotated(tasks[0], other(table, 0), {"id": 7, "email": "anna@example.org"})],
        [annotated(tasks[1], given[1], 3), annotated(tasks[1], "zebra", 4)],
        [annotated(tasks[2], None, 3)],
        [annotated(tasks[3], given[3], 3, was_cancelled=True)],
        [],
    ]
    for number, (task, annotations) in enumerate(zip(tasks, said, strict=False)):
        task |= {"id": number, "annotations": annotations}
    tasks[1]["data"]["index"] = str(tasks[1]["data"]["index"])  # of a project that was made from a CSV
    del tasks[0]["data"]["index"]  # of a project that was made without it: by the path
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks[: len(said)]))
    found = read_annotations(path, table)
    index = table["index"].tolist()
    rows = [(row["index"], row["annotation"], row["annotator"]) for row in found.to_dict("records")]
    assert rows == [
        (index[0], "wrong", "anna@example.org"),
        (index[1], "right", "3"),
        (index[1], "wrong", "4"),
        (index[2], "unsure", "3"),
        (index[3], "unsure", "3"),
    ]
    assert found["new_label_name"].tolist() == [other(table, 0), given[1], "zebra", "", ""]


def test_an_export_of_another_run_is_refused(audited, tmp_path):
    table, dataset = audited
    (folder,) = export_audit(table, dataset, tmp_path / "exports", ["label_studio"])
    task = json.loads((folder / "tasks.json").read_text())[0]
    task["annotations"] = [annotated(task, "cat", 1)]
    task["data"]["given_label"] = "zebra"
    (tmp_path / "export.json").write_text(json.dumps([task]))
    with pytest.raises(ValueError, match="task 1: sample .* when its label was `zebra`; .* of another run"):
        read_annotations(tmp_path / "export.json", table)
    for path in table["path"]:
        os.unlink(path)
    with pytest.raises(ValueError, match="None of the images is there"):
        export_audit(table, dataset, tmp_path / "again", ["cvat"])


# -- CVAT -------------------------------------------------------------------------------------------------------------


def test_tags_of_cvat_and_what_became_of_them(audited, tmp_path):
    table, dataset = audited
    (folder,) = export_audit(table, dataset, tmp_path / "exports", ["cvat"])
    path = folder / "annotations.xml"
    assert not len(read_annotations(path, table))  # nobody has looked at it
    tree = ElementTree.parse(path)
    images = tree.getroot().findall("image")
    issues = table[probably_wrong(table)]
    assert len(images) == len(issues)
    for image, row in zip(images, issues.to_dict("records"), strict=True):
        assert (tmp_path / "photos" / "train" / image.get("name")).samefile(row["path"])
        assert (image.get("width"), image.get("height")) == ("60", "40")
        (tag,) = image.findall("tag")
        assert tag.get("label") == row["label_name"]
        assert {a.get("name"): a.text for a in tag} == {
            "suggested": row["suggested_name"],
            "noise_score": f"{row['noise_score']:.4f}",
        }
    names = [label.findtext("name") for label in tree.getroot().find("meta/task/labels")]
    assert names == table.attrs["class_names"]
    assert [label["name"] for label in json.loads((folder / "labels.json").read_text())] == names

    images[0].find("tag").set("label", other(table, 0))
    images[1].find("tag").set("source", "manual")
    images[2].remove(images[2].find("tag"))
    tree.write(path, encoding="utf-8")
    index = table["index"].tolist()
    assert decisions(read_annotations(path, table)) == {
        index[0]: ("wrong", other(table, 0), "annotations"),
        index[1]: ("right", table["label_name"][1], "annotations"),
        index[2]: ("unsure", "", "annotations"),
    }


def test_a_tag_without_a_source_confirms_nothing(audited, tmp_path):
    """As Datumaro writes them: only a class that was changed says that somebody has looked."""
    table, _ = audited
    tags = [(row, table["label_name"][row]) for row in range(3)] + [(3, other(table, 3))]
    images = [f'<image id="{n}" name="{n:04}.png"><tag label="{name}"></tag></image>' for n, name in tags]
    (tmp_path / "a.xml").write_text(f"<annotations><version>1.1</version>{''.join(images)}</annotations>")
    expected = {table["index"][3]: ("wrong", other(table, 3), "a")}
    assert decisions(read_annotations(tmp_path / "a.xml", table)) == expected


# -- FiftyOne ---------------------------------------------------------------------------------------------------------


def test_what_fiftyone_returns(audited, tmp_path):
    """The forms that version 1.22.1 writes: no classes, with attributes, with folders, a table with whole paths."""
    table, _ = audited
    (tmp_path / "new").mkdir()
    os.rename(table["path"][1], tmp_path / "new" / "0000.png")  # the name of another one
    table.loc[1, "path"] = str(tmp_path / "new" / "0000.png")
    named = dict(enumerate(table["label_name"])) | {0: other(table, 0)}
    expected = {table["index"][0]: ("wrong", other(table, 0), "labels")}
    folders = {row: os.path.splitext(os.path.relpath(path, tmp_path))[0] for row, path in enumerate(table["path"])}
    facts = {row: {"attributes": {"index": int(table["index"][row]), "rank": 1}, "confidence": 0.5} for row in named}
    for labels in (
        {folders[row]: name for row, name in named.items()},
        {f"{row}-2": {"label": name, **facts[row]} for row, name in named.items()},
    ):
        (tmp_path / "labels.json").write_text(json.dumps({"classes": None, "labels": labels}))
        assert decisions(read_annotations(tmp_path / "labels.json", table)) == expected
    rows = [f"{table['path'][row]},{name}" for row, name in named.items()]
    (tmp_path / "labels.csv").write_text("\n".join(["filepath,ground_truth.label", *rows]) + "\n")
    assert decisions(read_annotations(tmp_path / "labels.csv", table)) == expected
    (tmp_path / "labels.csv").write_text(f"filepath,label\n0000.png,{named[0]}\n")
    with pytest.raises(ValueError, match="labels.csv:2: 2 of the scored images is `0000.png`; whose is it"):
        read_annotations(tmp_path / "labels.csv", table)


def test_what_was_changed_in_fiftyone(audited, tmp_path):
    table, dataset = audited
    (folder,) = export_audit(table, dataset, tmp_path / "exports", ["fiftyone"])
    path = folder / "labels.json"
    assert not len(read_annotations(path, table))
    content = json.loads(path.read_text())
    names, index = content["classes"], table["index"].tolist()
    content["labels"][str(index[0])]["label"] = names.index(other(table, 0))
    path.write_text(json.dumps(content))
    expected = {index[0]: ("wrong", other(table, 0), "labels")}
    assert decisions(read_annotations(path, table)) == expected
    plain = {f"{row:04}": names[label] for row, label in enumerate(table["label"])}  # as FiftyOne writes it anew
    plain["0000"] = other(table, 0)
    path.write_text(json.dumps({"classes": names, "labels": {key: names.index(name) for key, name in plain.items()}}))
    assert decisions(read_annotations(path, table)) == expected
    rows = [f"{path},{plain[f'{row:04}']}" for row, path in enumerate(table["path"])]
    (tmp_path / "labels.csv").write_text("\n".join(["filepath,ground_truth.label", *rows]) + "\n")
    assert decisions(read_annotations(tmp_path / "labels.csv", table)) == expected


def test_a_review_takes_an_export_in_once(audited, tmp_path):
    table, dataset = audited
    write_audit(tmp_path / "run" / "_audit", table)
    (folder,) = export_audit(table, dataset, tmp_path / "exports", ["label_studio"])
    tasks = json.loads((folder / "tasks.json").read_text())[:2]
    tasks[0]["annotations"] = [annotated(tasks[0], "zebra", 5)]
    tasks[1]["annotations"] = [annotated(tasks[1], tasks[1]["data"]["given_label"], 6)]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    review = open_review(tmp_path / "run")
    script = load_script("review")
    for _ in range(2):
        (found,) = script.read_imports(tmp_path / "run", [tmp_path / "export.json"])
        script.take_in(review, found)
    kept = (tmp_path / "run" / "_audit" / "annotations.jsonl").read_text().splitlines()
    assert len(kept) == 3  # and the first line
    assert decisions(read_annotations(tmp_path / "run" / "_audit" / "annotations.jsonl", table)) == {
        table["index"][0]: ("wrong", "zebra", "5"),
        table["index"][1]: ("right", table["label_name"][1], "6"),
    }
    assert review.queue.progress()["decided"] == 2


# -- all of them ------------------------------------------------------------------------------------------------------


def test_images_of_the_dataset_come_back_by_their_number(tiny_dataset, table, tmp_path):
    table = table.assign(path="")
    folder, cvat = export_audit(table, tiny_dataset, tmp_path, ["label_studio", "cvat"])
    task = json.loads((folder / "tasks.json").read_text())[0]
    name = table.sort_values("rank")["suggested_name"].iloc[0]
    index = task["data"].pop("index")
    with Image.open(tmp_path / local_file(task)) as image:
        assert image.size == (32, 32)
    (tmp_path / "x.json").write_text(json.dumps([{**task, "annotations": [annotated(task, name, 1)]}]))
    assert decisions(read_annotations(tmp_path / "x.json", table)) == {index: ("wrong", name, "1")}
    assert not len(read_annotations(cvat / "annotations.xml", table))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "a.json: no JSON"),
        ("a.json", "[" * 100_000, "a.json: no JSON"),
        ("a.json", "{}", "a.json: neither tasks of Label Studio .* nor `classes` and `labels` of FiftyOne"),
        ("a.json", "[1]", "a.json task 1: no `annotations`; export from Label Studio as `JSON`"),
        ("a.json", '[{"data": {"index": 5}, "annotations": [{"result": [3]}]}]', "task 1: no annotation of Label"),
        (
            "a.json",
            '[{"data": {"image": "x.png"}, "annotations": []}]',
            "task 1: none of the scored images is `x.png`",
        ),
        ("a.json", '{"classes": ["a"], "labels": {"0000": 7}}', "label '0000': class 7 is none of `classes`"),
        ("a.xml", "<a", "a.xml:1: no XML"),
        ("a.xml", "<annotations/>", "a.xml: no images; export from CVAT as `CVAT for images 1.1`"),
        ("a.xml", '<a>\n<image name="no.png"/></a>', "a.xml:2: none of the scored images is `no.png`"),
        (
            "a.xml",
            '<a><image name="0000.png"><tag label="a"/><tag label="b"/></image></a>',
            "a.xml:1: several tags of one image: a, b",
        ),
        (
            "a.xml",
            '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>\n<a>&x;</a>',
            "a.xml:1: a document type has no place",
        ),
        ("a.csv", "annotation_id,index,label\n1,0,cat\n", "no column .*; export from Label Studio as `JSON`"),
        ("a.csv", "filepath,tags\n0000.png,x\n", "a.csv:1: one column `label`, or one that ends so, is needed"),
    ],
)
def test_what_is_no_export_is_named(audited, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path / name, audited[0])
