"""A Hub on this machine, of the standard library, for tests with the real client.

    with LoopbackHub() as hub:
        subprocess.run([...], env=hub.environment(tmp_path))
        hub.files("user/name")

It answers the requests that pushing, listing and loading models take. `GET /_fail/STATUS/PART` makes it refuse
requests whose path contains PART, `GET /_fail/0/` makes it silent for them, `GET /_mend` ends both.
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


USER = "tester"


class LoopbackHub:
    def __init__(self):
        self.repositories: dict[
            str, dict
        ] = {}  # name -> {"private", "branches": {name: oid}, "commits": {oid: files}}
        self.blobs: dict[str, bytes] = {}  # sha256 -> content of large files
        self.requests: list[tuple[str, str]] = []
        self.messages: list[str] = []
        self.failure: tuple[int, str] | None = None
        self.done = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.done.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home) -> dict[str, str]:
        """Variables for a process that is to use this Hub; they must be there before huggingface_hub is imported."""
        dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        return {
            **{name: value for name, value in os.environ.items() if name not in dropped},
            "HF_ENDPOINT": self.address,
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """Content of a repository, by path."""
        repo = self.repositories[repository]
        return repo["commits"][repo["branches"][branch]]

    # -- what the requests do --

    def create(self, name: str, private: bool) -> bool:
        if name in self.repositories:
            return False
        self.repositories[name] = {"private": private, "branches": {}, "commits": {}}
        self.commit(name, "main", {}, "initial commit")
        return True

    def commit(self, name: str, branch: str, files: dict[str, bytes], message: str) -> str:
        repo = self.repositories[name]
        oid = hashlib.sha1(repr((name, branch, message, len(repo["commits"]))).encode()).hexdigest()
        repo["commits"][oid], repo["branches"][branch] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, name: str, revision: str) -> str | None:
        repo = self.repositories[name]
        return repo["branches"].get(revision) or (revision if revision in repo["commits"] else None)


def check_card(content: str) -> list[str]:
    """Errors in a card's metadata, by the rules of the Hub that matter for models."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, re.S)
    if not match:
        return []
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = []
    for key, kind in (
        ("license", str),
        ("library_name", str),
        ("pipeline_tag", str),
        ("tags", list),
        ("datasets", list),
    ):
        if key in data and not isinstance(data[key], kind):
            errors.append(f'"{key}" must be a {kind.__name__}')
    if "license" in data and not re.fullmatch(r"[a-z0-9.-]+", str(data["license"])):
        errors.append('"license" must be an identifier')
    ids = [*(data.get("datasets") or []), *([data["base_model"]] if "base_model" in data else [])]
    errors += [f'"{name}" is no repository id' for name in ids if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))]
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append('"model-index[].name" is required')
        for result in model.get("results", []):
            if not result.get("task", {}).get("type"):
                errors.append('"model-index[].results[].task.type" is required')
            if not {"name", "type"} <= set(result.get("dataset", {})):
                errors.append('"model-index[].results[].dataset" needs name and type')
            for metric in result.get("metrics", []):
                if "type" not in metric or not isinstance(metric.get("value"), (int, float, str)):
                    errors.append('"model-index[].results[].metrics[]" needs type and value')
    return errors


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            try:
                self.wfile.write(content)
            except BrokenPipeError:  # the client did not wait
                self.close_connection = True

    def missing(self, code: str, **headers):
        self.answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)

    def handle_any(self):
        hub, path, body = self.hub, self.path.partition("?")[0], self.body()
        hub.requests.append((self.command, path))
        if path == "/_mend":
            hub.failure = None
            return self.answer(200)
        if match := re.fullmatch(r"/_fail/(\d+)/(.*)", path):
            hub.failure = (int(match[1]), match[2])
            return self.answer(200)
        if hub.failure and hub.failure[1] in path:
            status = hub.failure[0]
            if status == 0:
                hub.done.wait(60)
            return self.answer(status or 503, {"error": "made to fail"})
        if path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": USER, "orgs": []})
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = f"{wish.get('organization') or USER}/{wish['name']}"
            private = wish.get("visibility") == "private" or wish.get("private") is True
            new = hub.create(name, private)
            url = {"url": f"{hub.address}/{name}", "name": name, "id": name}
            return self.answer(200 if new else 409, url if new else {**url, "error": "it is there already"})
        if path == "/api/validate-yaml":
            errors = check_card(json.loads(body)["content"])
            messages = {"errors": [{"message": error} for error in errors], "warnings": []}
            return self.answer(400 if errors else 200, messages)
        if path.startswith("/blobs/"):
            hub.blobs[path.rpartition("/")[2]] = body
            return self.answer(200)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.+))?", path):
            return self.model(match[1], (match[2] or "").split("/"), body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*match.groups())
        return self.answer(404, {"error": "not here"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def batch(self, wish: dict):
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in wish["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self.hub.blobs:
                wanted["actions"] = {"upload": {"href": f"{self.hub.address}/blobs/{wanted['oid']}", "header": {}}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def model(self, name: str, parts: list[str], body: bytes):
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound")
        repo, (action, *rest) = self.hub.repositories[name], parts
        if action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if action == "commit":
            return self.commit(name, rest[0], [json.loads(line) for line in body.splitlines() if line.strip()])
        if action == "branch":
            repo["branches"].setdefault(rest[0], repo["branches"]["main"])
            return self.answer(200, {})
        oid = self.hub.resolve(name, rest[0] if action in ("revision", "tree") else "main")
        if oid is None:
            return self.missing("RevisionNotFound")
        files = repo["commits"][oid]
        if action == "tree":
            listing = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            return self.answer(200, listing)
        if action in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            info = {
                "id": name,
                "modelId": name,
                "sha": oid,
                "private": repo["private"],
                "tags": [],
                "siblings": siblings,
            }
            return self.answer(200, info)
        return self.answer(404, {"error": "not here"})

    def commit(self, name: str, branch: str, lines: list[dict]):
        oid = self.hub.resolve(name, branch)
        if oid is None:
            return self.missing("RevisionNotFound")
        files, message = dict(self.hub.repositories[name]["commits"][oid]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        pull_request = "create_pr=1" in self.path
        oid = self.hub.commit(name, "refs/pr/1" if pull_request else branch, files, message)
        answer = {"success": True, "commitOid": oid, "hookOutput": ""}
        answer["commitUrl"] = f"{self.hub.address}/{name}/commit/{oid}"
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.address}/{name}/discussions/1"
        return self.answer(200, answer)

    def file(self, name: str, revision: str, path: str):
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound")
        oid = self.hub.resolve(name, revision)
        if oid is None:
            return self.missing("RevisionNotFound")
        content = self.hub.repositories[name]["commits"][oid].get(path)
        if content is None:
            return self.missing("EntryNotFound", X_Repo_Commit=oid)
        headers = {"X_Repo_Commit": oid, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept_Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), int(span[2] or len(content) - 1)
            return self.answer(
                206, content[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(content)}", **headers
            )
        return self.answer(200, content, **headers)


def serve():
    """Run until it is stopped: `python tests/loopback_hub.py` prints the variables to set."""
    with LoopbackHub() as hub:
        print(f"export HF_ENDPOINT={hub.address} HF_TOKEN=hf_loopback HF_HUB_DISABLE_XET=1", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    serve()
