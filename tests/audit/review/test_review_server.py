"""The local server of a review: what it answers, what it refuses, and that nothing is lost."""

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

import numpy as np
import pytest
from commands import ROOT, load_script
from PIL import Image
from reviews import NAMES, ask, audit_again, entry, make_run, serving, start_review

from hnml_hf.audit.report import Evidence, map_values
from hnml_hf.audit.review import read_annotations
from hnml_hf.audit.review.server import MAX_BODY, open_review
from hnml_hf.audit.table import write_audit


@pytest.fixture
def table(tmp_path):
    return make_run(tmp_path)


@pytest.fixture
def server(table, tmp_path):
    with serving(tmp_path / "run", annotator="anna") as server:
        yield server


def post(server, path, body):
    status, _, content = ask(server, f"/{server.token}/{path}", body)
    assert status == 200, content
    return json.loads(content)


def get(server, path):
    status, _, content = ask(server, f"/{server.token}/{path}")
    assert status == 200, content
    return json.loads(content)


def annotate(server, entries, batch="ab" * 6, **more):
    status, _, content = ask(server, f"/{server.token}/annotate", {"entries": entries, "batch": batch, **more})
    return status, json.loads(content)


def test_pages_and_pictures(server, table):
    status, headers, page = ask(server, f"/{server.token}/")
    assert status == 200 and b"Which labels are wrong?" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    rows = get(server, "rows?scope=all&size=5&start=5")
    assert [item["id"] for item in rows["items"]] == table["index"][5:10].tolist()
    assert rows["total"] == 30 and rows["items"][0]["path"].count("/") == 1
    status, headers, content = ask(server, f"/{server.token}/image/{table['index'][0]}?side=320")
    with Image.open(io.BytesIO(content)) as image:
        assert status == 200 and headers["Content-Type"] == "image/png" and image.size == (60, 40)


def test_maps_are_made_on_demand_and_a_model_that_is_gone_is_a_sentence(table, tmp_path):
    asked = []

    def maps(index):
        asked.append(index)
        if len(asked) > 1:
            raise OSError("config.json is gone")
        cells = np.array([[0.0, 1.0], [0.5, 0.25]])
        return Evidence(Image.new("RGB", (8, 8), "red"), cells, cells.T)

    first = int(table["index"][0])
    with serving(tmp_path / "run", maps=maps) as server:
        assert not asked
        found = get(server, f"maps/{first}")
        cells = np.array([[0.0, 1.0], [0.5, 0.25]])
        assert found["maps"] == [map_values(cells), map_values(cells.T)]
        assert found["image"].startswith("data:image/") and asked == [first]
        status, _, content = ask(server, f"/{server.token}/maps/{first}")
        assert status == 404 and json.loads(content)["error"] == "There are no maps: config.json is gone"
    with serving(tmp_path / "run") as server:
        assert get(server, f"maps/{first}") == {"maps": None}


def test_a_picture_that_cannot_be_read_is_a_sentence(server, table):
    os.unlink(table["path"][0])
    status, _, content = ask(server, f"/{server.token}/image/{table['index'][0]}?side=320")
    assert status == 404 and "FileNotFoundError" in json.loads(content)["error"]
    with open(table["path"][1], "wb") as file:
        file.write(b"\xff\xd8 no image")
    assert ask(server, f"/{server.token}/image/{table['index'][1]}?side=320")[0] == 404


def test_annotations_are_on_the_disk_when_they_are_confirmed(server, table, tmp_path):
    status, answer = annotate(server, [entry(table, 0), entry(table, 1, "right")])
    assert status == 200 and answer["count"] == 2
    found = read_annotations(tmp_path / "run" / "_audit" / "annotations.jsonl", table)
    assert found["annotation"].tolist() == ["wrong", "right"] and set(found["annotator"]) == {"anna"}
    assert get(server, "rows")["progress"]["decided"] == 2
    _, headers, content = ask(server, f"/{server.token}/annotations.csv")
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    assert [row["index"] for row in rows] == sorted(str(i) for i in table["index"][:2])
    assert ask(server, f"/{server.token}/undo", {"batch": "ab" * 6})[0] == 200
    assert get(server, "rows")["progress"]["decided"] == 0
    assert ask(server, f"/{server.token}/undo", {"batch": "cd" * 6})[0] == 404


def test_one_key_for_all_of_a_pair(server, table):
    given, suggested = table[["label", "suggested_label"]].iloc[0].tolist()
    pair = {"scope": "all", "given": given, "suggested": suggested, "least": 0.4}
    body = {"query": pair, "annotation": "wrong", "batch": "ab" * 6}
    status, _, content = ask(server, f"/{server.token}/bulk", body)
    same = (table["label"] == given) & (table["suggested_label"] == suggested)
    chosen = table[same & (table["noise_score"] >= 0.4)]
    assert status == 200 and json.loads(content)["count"] == len(chosen) > 0
    assert get(server, "rows?scope=all&status=wrong")["total"] == len(chosen)


def test_two_people_at_once_lose_nothing(server, table, tmp_path):
    """Each decides every row, in two threads and through two servers; all 60 words are on the disk."""
    with serving(tmp_path / "run", annotator="bo") as other:
        failed = []

        def work(server, name, annotation):
            for row in range(30):
                status, _ = annotate(server, [entry(table, row, annotation)], f"{row:012x}{len(name):02x}")
                failed.extend([] if status == 200 else [status])

        threads = [
            threading.Thread(target=work, args=args) for args in ((server, "anna", "wrong"), (other, "bo", "right"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert (
            get(server, "rows?scope=all&status=split")["total"] == get(other, "rows?scope=all&status=split")["total"]
        )
    found = read_annotations(tmp_path / "run" / "_audit" / "annotations.jsonl", table)
    assert found.groupby("annotator").size().to_dict() == {"anna": 30, "bo": 30}


def test_a_class_that_does_not_exist_is_kept_by_its_name(server, table, tmp_path):
    assert annotate(server, [entry(table, 0, "wrong", "zebra")])[0] == 200
    found = read_annotations(tmp_path / "run" / "_audit" / "annotations.jsonl", table)
    assert found.loc[0, ["new_label", "new_label_name"]].tolist() == [-1, "zebra"]


def test_annotations_of_another_run_change_nothing(server, table):
    wrong = [
        ([{**entry(table, 0), "label_name": "zebra"}], 409, "annotated when its label was `zebra`"),
        ([entry(table, 0), {**entry(table, 1), "index": 5}], 404, "Sample 5 is not in this audit"),
        ([{**entry(table, 0), "annotation": "maybe"}], 400, "'maybe' is none of wrong, right, unsure"),
        ([{**entry(table, 0), "new_label_name": 5}], 400, "must be the name of a class"),
        ([{**entry(table, 0), "path": "x/0001.png"}], 409, "was `x/0001.png` when it was annotated, and here it is `"),
        ([{**entry(table, 0), "index": True}], 400, "must be a sample id"),
        ([{**entry(table, 0), "index": 2**70}], 400, "must be a sample id"),
        ("x", 400, "must be a list"),
        ([1], 400, "must be a list"),
    ]
    for entries, status, message in wrong:
        found, answer = annotate(server, entries)
        assert found == status and message in answer["error"], answer
    assert get(server, "rows")["progress"]["decided"] == 0


def test_a_page_is_told_that_the_audit_was_written_anew(server, tmp_path):
    assert get(server, "state")["stale"] is False
    os.utime(tmp_path / "run" / "_audit" / "noise_scores.parquet", (1, 1))
    assert get(server, "state") == {"version": 0, "stale": True, "gone": ""}


def test_a_run_that_is_deleted_under_a_server_loses_no_annotation(server, table, tmp_path):
    log = tmp_path / "run" / "_audit" / "annotations.jsonl"
    annotate(server, [entry(table, 0)])
    (tmp_path / "run").rename(tmp_path / "moved")
    assert get(server, "state")["gone"] == str(log)
    status, answer = annotate(server, [entry(table, 1)], "cd" * 6)
    assert status == 200 and answer["gone"] == str(log)
    assert len(read_annotations(log, table)) == 2


def test_names_of_classes_are_kept_as_tables_read_them(server, table):
    """Without blanks around them; what no table could hold is refused."""
    batch = {"batch": "ab" * 6}
    answer = post(server, "annotate", {**batch, "entries": [{**entry(table, 0), "new_label_name": " zebra "}]})
    assert answer["count"] == 1
    other = next(name for name in NAMES if name != table["label_name"][1])
    post(server, "annotate", {"batch": "cd" * 6, "entries": [{**entry(table, 1), "new_label_name": f" {other}"}]})
    rows = {row["index"]: row for row in server.review.log.rows()}
    assert rows[int(table["index"][0])]["new_label_name"] == "zebra"
    assert rows[int(table["index"][1])] == {
        **rows[int(table["index"][1])],
        "new_label": NAMES.index(other),
        "new_label_name": other,
    }
    for name in ("a\nb", "a\x1b"):
        body = {"batch": "ef" * 6, "entries": [{**entry(table, 2), "new_label_name": name}]}
        assert ask(server, f"/{server.token}/annotate", body)[0] == 400


def test_a_class_with_a_long_name_can_be_the_true_one(tmp_path):
    """A new one has at most 200 characters; a folder may have more."""
    table = make_run(tmp_path, names=("cat", "x" * 250))
    row = table["label_name"].tolist().index("cat")
    with serving(tmp_path / "run") as server:
        assert annotate(server, [entry(table, row)])[0] == 200
        assert annotate(server, [entry(table, row, "wrong", "y" * 201)], "cd" * 6)[0] == 400


def test_a_label_that_is_wrong_may_have_no_class(server, table):
    """The given class is none, no name is the suggested one, and an empty name none at all."""
    for number, name in enumerate((table["label_name"][0], None, "")):
        body = {"entries": [{**entry(table, number), "new_label_name": name}], "batch": f"{number:08x}"}
        post(server, "annotate", body)
    rows = {row["index"]: row for row in server.review.log.rows()}
    found = [rows[int(index)] for index in table["index"][:3]]
    assert [row["annotation"] for row in found] == ["wrong"] * 3
    names = ["", table["suggested_name"][1], ""]
    assert [row["new_label_name"] for row in found] == names
    assert [row["new_label"] for row in found] == [-1, table["suggested_label"][1], -1]
    other = {"entries": [entry(table, 0)], "batch": "ab" * 6, "annotator": "bo"}
    post(server, "annotate", other)
    assert get(server, "rows?status=split&scope=all")["total"] == 0
    post(server, "annotate", {"entries": [entry(table, 2, "right")], "batch": "cd" * 6, "annotator": "bo"})
    assert get(server, "rows?status=split&scope=all")["total"] == 1


def test_annotations_of_a_class_that_got_another_name_are_refused_at_the_start(table, tmp_path):
    review = open_review(tmp_path / "run")
    review.annotate([entry(table, 0, "right")], "anna", "ab" * 6)
    given = table["label_name"][0]
    names = ["kitten" if name == given else name for name in NAMES]
    table["label_name"] = [names[label] for label in table["label"]]
    table.attrs["class_names"] = names
    write_audit(tmp_path / "run" / "_audit", table)
    with pytest.raises(ValueError, match=f"was annotated when its label was `{given}`; here it is `kitten`"):
        open_review(tmp_path / "run")


def test_a_review_goes_on_where_images_came_and_went(table, tmp_path, caplog):
    """Annotations keep who made them and when, the file as it was stays, and the next start has nothing to do."""
    review = open_review(tmp_path / "run")
    review.annotate([entry(table, 0), entry(table, 1), entry(table, 2, "right")], "anna", "ab" * 6)
    review.annotate([entry(table, 0, "right")], "bo", "cd" * 6)
    log = tmp_path / "run" / "_audit" / "annotations.jsonl"
    content, before = log.read_bytes(), {(row["index"], row["annotator"]): row for row in review.log.rows()}
    again = audit_again(tmp_path, table, lost=[1])
    review = open_review(tmp_path / "run")
    assert "3 annotations were taken over by the paths of their images, and the file as it was is" in caplog.text
    assert "1 annotation is left out, since the image is gone" in caplog.text
    assert log.with_name("annotations-ffffffff.jsonl").read_bytes() == content
    ids = again.set_index("path")["index"]
    rows = {(row["index"], row["annotator"]): row for row in review.log.rows()}
    for row, who in ((0, "anna"), (2, "anna"), (0, "bo")):
        now, then = rows[ids[table["path"][row]], who], before[table["index"][row], who]
        assert now == {**then, "index": now["index"]}
    assert len(rows) == 3 and review.queue.progress()["split"] == 1
    caplog.clear()
    assert len(list(open_review(tmp_path / "run").log.rows())) == 3 and not caplog.text
    assert len(read_annotations(log, again)) == 3


def test_a_review_of_another_dataset_is_refused_and_an_empty_one_begins_anew(table, tmp_path):
    log = tmp_path / "run" / "_audit" / "annotations.jsonl"
    open_review(tmp_path / "run")
    again = audit_again(tmp_path, table)
    open_review(tmp_path / "run").annotate([entry(again, 0)], "anna", "ab" * 6)
    assert sorted(path.name for path in log.parent.glob("annotations*.jsonl")) == ["annotations.jsonl"]
    other = again.assign(path=[path.replace("/photos/", "/others/") for path in again["path"]])
    other.attrs = {**again.attrs, "dataset_fingerprint": "d" * 32}
    write_audit(tmp_path / "run" / "_audit", other)
    content = log.read_bytes()
    with pytest.raises(
        ValueError, match="of another dataset: .* Or move .*annotations.jsonl away to begin anew; it is"
    ):
        open_review(tmp_path / "run")
    assert log.read_bytes() == content


def test_a_log_that_changes_under_a_server_is_told_and_not_written_over(server, table, tmp_path):
    log = tmp_path / "run" / "_audit" / "annotations.jsonl"
    assert annotate(server, [entry(table, 0)])[0] == 200
    whole = log.read_bytes()
    with open(log, "ab") as file:
        file.write(b'{"index": }\n')
    status, answer = annotate(server, [entry(table, 1)], "cd" * 6)
    assert status == 503 and "annotations.jsonl:3: no line of an annotation log" in answer["error"]
    log.write_bytes(whole)
    assert annotate(server, [entry(table, 1)], "cd" * 6)[0] == 200
    audit_again(tmp_path, table)
    open_review(tmp_path / "run")  # of another process, which has taken the annotations over
    content = log.read_bytes()
    status, answer = annotate(server, [entry(table, 2)], "ef" * 6)
    assert status == 409 and "Start `hnml review` again" in answer["error"] and log.read_bytes() == content


def test_a_stranger_in_the_log_is_named_until_it_is_gone_and_takes_nothing_along(server, table, tmp_path):
    log = tmp_path / "run" / "_audit" / "annotations.jsonl"
    annotate(server, [entry(table, 0)])
    whole = log.read_bytes()
    lines = [{**entry(table, 1), "annotator": "bo"}, {**entry(table, 1), "index": 5, "annotator": "bo"}]
    with open(log, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in (*lines, {**entry(table, 2), "annotator": "bo"})))
    for _ in range(2):
        status, _, content = ask(server, f"/{server.token}/rows")
        assert status == 503 and "annotations.jsonl:4: sample 5 is not in this audit" in json.loads(content)["error"]
    log.write_bytes(whole + json.dumps(lines[0]).encode() + b"\n")
    assert get(server, "rows")["progress"]["wrong"] == 2
    log.unlink()
    assert get(server, "rows")["progress"]["wrong"] == 2
    assert len(read_annotations(log, table)) == 2


def test_a_log_with_a_stranger_is_named_at_the_start(table, tmp_path):
    open_review(tmp_path / "run")
    log = tmp_path / "run" / "_audit" / "annotations.jsonl"
    with open(log, "a") as file:
        file.write('{"index": 5, "annotation": "right", "annotator": "anna"}\n')
    with pytest.raises(ValueError, match="annotations.jsonl:2: sample 5 is not in this audit"):
        open_review(tmp_path / "run")


def test_a_class_that_is_called_given_is_another_one(server, table):
    body = {"entries": [{**entry(table, 0), "new_label_name": "given"}]}
    post(server, "annotate", {**body, "batch": "ab" * 6, "annotator": "anna"})
    body = {"entries": [entry(table, 0, "right")]}
    post(server, "annotate", {**body, "batch": "cd" * 6, "annotator": "bo"})
    assert get(server, "rows?status=split&scope=all")["total"] == 1


def test_a_start_without_a_name_of_the_user_or_with_one_that_cannot_be_taken(monkeypatch, capsys):
    module = load_script("review")

    def nobody():
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert module.parse_arguments(["run"]).annotator == "reviewer"
    monkeypatch.setattr("getpass.getuser", lambda: "FIRM\\anna")
    assert module.parse_arguments(["run"]).annotator == "FIRM_anna"
    for options, message in (
        (["--annotator", "a/b"], "An annotator's name has"),
        (["--port", "99999"], "--port must be"),
    ):
        with pytest.raises(SystemExit):
            module.parse_arguments(["run", *options])
        assert message in capsys.readouterr().err


def test_a_run_that_cannot_be_written_says_what_to_do(table, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hnml_hf.audit.review.server.AnnotationLog", refuse)
    with pytest.raises(PermissionError, match="name a file elsewhere by --annotations"):
        open_review(tmp_path / "run")

    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system", "a.jsonl.lock")

    monkeypatch.setattr("hnml_hf.audit.review.server.AnnotationLog", read_only)
    with pytest.raises(OSError, match=r"annotations.jsonl cannot be written \(Read-only file system\): name a file"):
        open_review(tmp_path / "run")
    monkeypatch.undo()
    assert open_review(tmp_path / "run", annotations=tmp_path / "elsewhere" / "a.jsonl").log.path.exists()
    with pytest.raises(FileNotFoundError, match="has no `_audit/noise_scores.parquet`"):
        open_review(tmp_path)


def test_a_disk_that_is_full_is_no_confirmation(server, table, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, answer = annotate(server, [entry(table, 0)])
    assert status == 507 and "No space left on device" in answer["error"]
    assert "could not be written: No space left on device" in caplog.text and "Traceback" not in caplog.text


# -- who and what is refused ------------------------------------------------------------------------------------------


def test_only_this_machine_is_listened_to(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/TOKE", "/x", "//", "/TOKENx/", "/x/TOKEN/rows", "/..%2fTOKEN/", "/TOKEN%2f", "/%00/", "*"),
        *("/TOKEN/../x", "/TOKEN/image/../../etc/passwd", "/TOKEN/image/%2e%2e%2fetc%2fpasswd"),
        *("/TOKEN/image//etc/passwd", "/TOKEN/image/1e3", "/TOKEN/image/-", "/TOKEN/image/%D9%A3"),
        *("/TOKEN/image/99999999999999999999", "/TOKEN/image/5", "/TOKEN/image/"),
        *("/TOKEN/image/FIRST/x", "/TOKEN/maps/5", "/TOKEN/noise_scores.parquet", "/TOKEN/_audit/annotations.jsonl"),
        *("/TOKEN/image/FIRST?side=100000", "/TOKEN/image/FIRST?side=-1", "/TOKEN/image/FIRST?side=320&side=640"),
        *("/TOKEN/rows?size=100000", "/TOKEN/rows?start=-1", "/TOKEN/rows?start=1e9", "/TOKEN/rows?x=1"),
        *("/TOKEN/rows?order=__class__", "/TOKEN/rows?given=x", "/TOKEN/rows?least=nan", "/TOKEN/rows?least=x"),
        *("/TOKEN/rows?annotator=%3Cb%3E", "/TOKEN/rows?" + "&".join(f"a{i}=1" for i in range(50))),
        *("/TOKEN/rows?text=" + "x" * 2000, "/TOKEN/rows?scope", "http://evil.example/TOKEN/"),
    ],
)  # fmt: skip
def test_paths_that_are_refused(path, server, table):
    path = (
        path.replace("TOKEN", server.token).replace("TOKE", server.token[:-1]).replace("FIRST", str(table["index"][0]))
    )
    status, headers, content = ask(server, path)
    assert 400 <= status < 500 and "error" in json.loads(content)
    assert b"root:" not in content and server.token.encode() not in content
    assert get(server, "state")["version"] == 0  # and it lives


def test_an_address_without_end_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n")
        assert b" 414 " in raw.recv(100)
    assert get(server, "state")["version"] == 0


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:PORT", "127.0.0.1", "127.0.0.1:1", "[::1]:PORT", "", None]
)
def test_another_name_for_this_machine_is_refused(host, server):
    """DNS rebinding: a page of evil.example whose name now leads to 127.0.0.1 is of our origin to the browser."""
    host = host and host.replace("PORT", str(server.port))
    assert ask(server, f"/{server.token}/", headers={"Host": host})[0] == 421
    assert ask(server, f"/{server.token}/", headers={"Host": f"localhost:{server.port}"})[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:PORT", "http://127.0.0.1", None, ""]
)
def test_changes_of_other_sites_are_refused(origin, server, table):
    origin = origin and origin.replace("PORT", str(server.port))
    body = {"entries": [entry(table, 0)], "batch": "ab" * 6}
    assert ask(server, f"/{server.token}/annotate", body, headers={"Origin": origin})[0] == 403
    assert ask(server, f"/{server.token}/annotate", body, headers={"Sec-Fetch-Site": "cross-site"})[0] == 403
    if origin:
        assert ask(server, f"/{server.token}/rows", headers={"Origin": origin})[0] == 403
    assert ask(server, f"/{server.token}/rows", headers={"Sec-Fetch-Site": "same-site"})[0] == 403
    assert get(server, "rows")["progress"]["decided"] == 0


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_methods_that_are_refused(method, server):
    assert ask(server, f"/{server.token}/rows", method=method)[0] in (405, 501)


def test_bodies_that_are_refused(server, table):
    where = f"/{server.token}/annotate"
    good = json.dumps({"entries": [entry(table, 0)], "batch": "ab" * 6}).encode()
    for headers, status in (
        ({"Content-Type": "text/plain"}, 415),  # what a form of another site may send
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Length": str(MAX_BODY + 1)}, 413),
        ({"Content-Length": "-1"}, 411),
        ({"Content-Length": "x"}, 411),
        ({"Content-Length": "9" * 30}, 411),
        ({"Transfer-Encoding": "chunked"}, 411),
    ):
        assert ask(server, where, raw=good, headers=headers)[0] == status, headers
    for raw in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'"x"', b"{}"):
        assert ask(server, where, raw=raw)[0] == 400, raw[:10]
    for batch in ("", "x", "AB" * 6, "ab" * 100, 5, None, "../../x"):
        assert annotate(server, [entry(table, 0)], batch)[0] == 400
    for annotator in ("", " ", "x" * 41, "a/b", "<b>", "a\nb", 5, None):
        assert annotate(server, [entry(table, 0)], annotator=annotator)[0] == 400
    assert annotate(server, [entry(table, 0, "wrong", "x" * 201)])[0] == 400
    assert annotate(server, [entry(table, 0, "wrong", "half a letter: \ud800")])[0] == 400
    for query in (
        *({"text": 5}, {"folder": ["x"]}, {"least": "x"}, {"least": []}, {"given": "x"}),
        *({"text": "half a letter: \ud800"}, {"folder": "a\0b"}),
    ):
        body = {"query": query, "annotation": "wrong", "batch": "ab" * 6}
        assert ask(server, f"/{server.token}/bulk", body)[0] == 400, query
    for body in ({"query": [], "annotation": "wrong"}, {"query": {}, "annotation": None}, {"annotation": "wrong"}):
        assert ask(server, f"/{server.token}/bulk", {**body, "batch": "ab" * 6})[0] == 400
    assert ask(server, f"/{server.token}/rows", {})[0] == 404 and ask(server, f"{where}?x=1", {})[0] == 404
    assert get(server, "rows")["progress"]["decided"] == 0


def test_an_address_of_an_earlier_server_is_told_from_what_is_not_there(server):
    """The page keeps its changes at 403, which judges the address and not the change."""
    body = {"entries": [], "batch": "ab" * 6}
    assert ask(server, "/token-of-another/annotate", body)[0] == 403
    assert ask(server, f"/{server.token}/x", body)[0] == 404


def test_a_connection_that_says_nothing_holds_up_nobody(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    idle[0].sendall(b"POST /x HTTP/1.1\r\n")
    assert get(server, "state")["version"] == 0
    for one in idle:
        one.close()


def test_an_image_is_read_only_from_the_paths_of_the_run(server, table, tmp_path):
    (tmp_path / "photos" / "secret.png").write_bytes((table["path"][0]).encode())
    for path in ("image/secret.png", "image/../secret.png", f"image/{tmp_path}/photos/secret.png"):
        assert ask(server, f"/{server.token}/{path}")[0] == 404


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_kill_of_the_server_loses_nothing_that_was_confirmed(table, tmp_path):
    process, url, lines = start_review(tmp_path / "run", "--port", "0", "--annotator", "anna")
    assert "0 of" in lines[0] and url.startswith("http://127.0.0.1:")
    port, token = url.split(":")[2].split("/")[:2]

    class Server:
        pass

    server = Server()
    server.port, server.token = int(port), token
    for row in range(10):
        assert annotate(server, [entry(table, row)], f"{row:08x}")[0] == 200
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(read_annotations(tmp_path / "run" / "_audit" / "annotations.jsonl", table)) == 10
    process, url, lines = start_review(tmp_path / "run", "--port", "0")
    assert "10 of" in lines[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    process.stdout.close()


def test_a_port_that_is_taken_and_a_folder_that_is_no_run(server, tmp_path, table):
    import review

    with pytest.raises(SystemExit, match="give --port"):
        review.main([str(tmp_path / "run"), "--port", str(server.port)])
    with pytest.raises(SystemExit, match="error: .* has no `_audit/noise_scores.parquet`"):
        review.main([str(tmp_path)])


def test_the_dataset_is_asked_for_images_that_are_part_of_it(tmp_path):
    table = make_run(tmp_path, images=False)
    table["path"] = ""
    from hnml_hf.audit.table import write_audit

    write_audit(tmp_path / "run" / "_audit", table)
    asked = []

    def picture(index):
        asked.append(index)
        return Image.new("RGB", (10, 10))

    with serving(tmp_path / "run", pictures=picture) as server:
        assert ask(server, f"/{server.token}/image/{table['index'][3]}?side=320")[0] == 200
    with serving(tmp_path / "run") as server:
        status, _, content = ask(server, f"/{server.token}/image/{table['index'][3]}?side=320")
        assert status == 404 and b"part of the dataset" in content
    assert asked == [table["index"][3]] and NAMES


def test_a_connection_is_used_again(server):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    start = time.perf_counter()
    for _ in range(20):
        connection.request("GET", f"/{server.token}/rows")
        assert connection.getresponse().read()
    assert time.perf_counter() - start < 2
    connection.close()


def test_a_review_starts_without_what_takes_seconds_to_import(tmp_path):
    make_run(tmp_path, images=False)
    code = (
        "import sys\n"
        "from hnml_hf.audit.review.server import open_review\n"
        f"review = open_review({str(tmp_path / 'run')!r})\n"
        "assert '<main' in review.page and review.rows({'group': 'folder', 'text': '00'})['items']\n"
        "print({'pandas', 'scipy', 'sklearn', 'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
