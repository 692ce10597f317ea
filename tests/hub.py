"""The Hub, as a small server here that speaks its protocol: datasets and models of two revisions."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
FILES = {
    OLD: {"train.jsonl": b'{"text": "old"}\n', "README.md": b"# readme"},
    NEW: {
        "data/train.jsonl": b'{"text": "new"}\n{"text": "er"}\n',
        "data/test.jsonl": b'{"text": "t"}\n',
        "README.md": b"# readme",
    },
}
REVISIONS = {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW}


class Hub(ThreadingHTTPServer):
    """`requests` are the paths asked for; `down` is how many of the next requests get a 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.requests: list[str] = []
        self.down = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(path)
        if self.server.down:
            self.server.down -= 1
            return self.say(503, b"")
        if api := re.fullmatch(r"/api/(?:datasets|models)/(\w+/[\w-]+)(?:/revision/(\w+))?", path):
            return self.info(api[1], api[2] or "main")
        if tree := re.fullmatch(r"/api/(?:datasets|models)/\w+/[\w-]+/tree/(\w+)", path):
            return self.say(200, json.dumps(self.tree(REVISIONS[tree[1]])).encode())
        if file := re.fullmatch(r"(?:/datasets)?/(\w+/[\w-]+)/resolve/(\w+)/(.+)", path):
            return self.file(file[1], REVISIONS[file[2]], file[3])
        return self.say(404, b"")

    def info(self, name: str, revision: str) -> None:
        if name == "org/missing":
            return self.say(401, b'{"error":"Invalid username or password."}', "RepoNotFound")
        if name == "org/hidden":
            return self.say(401, b"", "GatedRepo", "Access to this repository is restricted.")
        if revision not in REVISIONS:
            return self.say(404, b"", "RevisionNotFound")
        return self.say(200, json.dumps({"id": name, "sha": REVISIONS[revision]}).encode())

    def tree(self, commit: str) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in FILES[commit].items()
        ]

    def file(self, name: str, commit: str, path: str) -> None:
        if name == "org/gated":
            status = 403 if self.headers.get("authorization") else 401
            return self.say(status, b"", "GatedRepo", "Access to this dataset is restricted.")
        if path not in FILES[commit]:
            return self.say(404, b"", "EntryNotFound")
        data = FILES[commit][path]
        return self.say(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', **{"X-Repo-Commit": commit})

    def say(self, status: int, body: bytes, code: str = "", message: str = "", **headers: str) -> None:
        self.send_response(status)
        errors = {"X-Error-Code": code, "X-Error-Message": message}
        for key, value in {**headers, **{k: v for k, v in errors.items() if v}}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@contextmanager
def serving(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub under its own address, with an empty cache and no token."""
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    # The library first, since it keeps the address that is set when it is first imported.
    patch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setenv("HF_ENDPOINT", server.url)
    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "cache"))
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(cache / "no-token"))
    yield server
    server.shutdown()
    server.server_close()
