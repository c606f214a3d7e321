"""Runs with an audit to review, and a server for them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.client import HTTPConnection

import numpy as np
import pandas as pd
from commands import ROOT
from PIL import Image
from reports import make_table

from hnml_hf.audit.review.server import ReviewServer, open_review
from hnml_hf.audit.table import FORMAT, write_audit


NAMES = ("cat", "dog", "horse")


def make_run(folder, n=30, names=NAMES, *, images=True):
    """A run with an audit of n images in class folders; its table, most probably wrong first."""
    table = make_table(n, names)
    generator = np.random.default_rng(1)
    for row in range(n):
        path = folder / "photos" / "train" / table["label_name"][row] / f"{row:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if images:
            Image.fromarray(generator.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
        table.loc[row, "path"] = str(path)
    table.attrs["format"], table.attrs["source"], table.attrs["provenance"] = FORMAT, "photos", "test"
    write_audit(folder / "run" / "_audit", table)
    options = {"dataset": "imagefolder", "data_dir": str(folder / "photos")}
    (folder / "run" / "_audit" / "dataset.json").write_text(json.dumps(options))
    return table


def audit_again(folder, table, *, lost=()):
    """The audit of such a run after an image was added and some were lost: every id is that of another sample."""
    again = pd.concat([table.drop(index=list(lost)), table.head(1)], ignore_index=True)
    again.loc[len(again) - 1, "path"] = table["path"][0].replace(".png", "-new.png")
    again["index"] = sorted([*again["index"][:-1], table["index"].max() + 1])
    again["rank"] = np.arange(1, len(again) + 1)
    again.attrs = {**table.attrs, "dataset_fingerprint": "e" * 32}
    for row in lost:
        os.remove(table["path"][row])
    shutil.copy(again["path"][0], again["path"].iloc[-1])
    write_audit(folder / "run" / "_audit", again)
    return again


@contextmanager
def serving(run, **options):
    """A server for a run, in a thread."""
    server = ReviewServer(open_review(run, **options), port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def start_review(run, *options):
    """`scripts/review.py` in a process of its own; the process, its address, and what it has printed."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, ROOT / "scripts" / "review.py", run, *options]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Review: "):
            return process, line.split()[1], lines
    raise RuntimeError("".join(lines))


def ask(server, path, body=None, *, method=None, headers=None, raw=None):
    """Status, headers and content of an answer; `raw` takes the place of a JSON body."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    method = method or ("GET" if body is None and raw is None else "POST")
    base = {"Host": f"127.0.0.1:{server.port}"}
    if method == "POST":
        base |= {"Origin": f"http://127.0.0.1:{server.port}", "Content-Type": "application/json"}
    content = raw if raw is not None else json.dumps(body).encode() if body is not None else None
    wanted = {name: value for name, value in {**base, **(headers or {})}.items() if value is not None}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    if content is not None and "Content-Length" not in wanted:
        wanted["Content-Length"] = str(len(content))
    for name, value in wanted.items():
        connection.putheader(name, value)
    connection.endheaders()
    try:
        if content:
            connection.send(content)
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before it was read
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def entry(table, row, annotation="wrong", name=None):
    """An annotation of a row of a table, as the page sends it."""
    facts = table.iloc[row]
    name = name or {"wrong": facts["suggested_name"], "right": facts["label_name"]}.get(annotation, "")
    return {"index": int(facts["index"]), "annotation": annotation, "new_label_name": name}
