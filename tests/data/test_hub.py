"""What a recipe's path means: datasets on the Hub, served here by a small server that speaks its protocol."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from selfalign.core.errors import ServiceError, UsageError
from selfalign.data.sources import resolve

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
        if api := re.fullmatch(r"/api/datasets/(\w+/[\w-]+)(?:/revision/(\w+))?", path):
            return self.info(api[1], api[2] or "main")
        if tree := re.fullmatch(r"/api/datasets/\w+/[\w-]+/tree/(\w+)", path):
            return self.say(200, json.dumps(self.tree(REVISIONS[tree[1]])).encode())
        if file := re.fullmatch(r"/datasets/(\w+/[\w-]+)/resolve/(\w+)/(.+)", path):
            return self.file(file[1], REVISIONS[file[2]], file[3])
        return self.say(404, b"")

    def info(self, name: str, revision: str) -> None:
        if name == "org/missing":
            return self.say(401, b'{"error":"Invalid username or password."}', "RepoNotFound")
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    yield server
    server.shutdown()
    server.server_close()


def contents(path: str, base: Path, **how: object) -> tuple[dict[str, bytes], str | None]:
    resolved = resolve(path, base, patience_s=0, **how)  # type: ignore[arg-type]
    return {file.id: Path(file.path).read_bytes() for file in resolved.files}, resolved.commit


def test_a_dataset_resolves_to_its_commit_of_now_and_its_data_files(hub: Hub, tmp_path: Path) -> None:
    files, commit = contents("org/name", tmp_path)
    assert commit == NEW
    assert files == {"test": FILES[NEW]["data/test.jsonl"], "train": FILES[NEW]["data/train.jsonl"]}
    assert not any(path.endswith("README.md") for path in hub.requests)


def test_a_pinned_dataset_stays_at_its_commit_and_takes_no_call_once_it_is_cached(hub: Hub, tmp_path: Path) -> None:
    pinned = {"org/name": OLD}
    first = contents("org/name", tmp_path, pinned=pinned)
    assert first == ({"train": FILES[OLD]["train.jsonl"]}, OLD)
    hub.requests.clear()
    assert contents("org/name", tmp_path, pinned=pinned) == first
    assert hub.requests == []


def test_a_named_revision_and_a_commit_are_taken_as_they_are(hub: Hub, tmp_path: Path) -> None:
    assert contents("org/name", tmp_path, revision="v1", pinned={"org/name": NEW})[1] == OLD
    hub.requests.clear()
    assert contents("org/name", tmp_path, revision=OLD)[1] == OLD
    assert hub.requests == []


def test_some_files_of_a_dataset_can_be_named(hub: Hub, tmp_path: Path) -> None:
    files, _ = contents("hf://datasets/org/name/data/tr*.jsonl", tmp_path)
    assert files == {"train": FILES[NEW]["data/train.jsonl"]}
    assert not any(path.endswith("test.jsonl") for path in hub.requests)
    with pytest.raises(UsageError, match="holds no such"):
        contents("hf://datasets/org/name/validation.jsonl", tmp_path)


def test_a_folder_here_comes_before_a_dataset_of_its_name(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "here.jsonl").write_bytes(b'{"text": "here"}')
    assert contents("org/name", tmp_path) == ({"here": b'{"text": "here"}'}, None)
    assert hub.requests == []


def test_a_gated_dataset_says_what_it_takes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"org/gated is gated on the Hub: set HF_TOKEN, or point prepare.seed.path"):
        contents("org/gated", tmp_path, setting="prepare.seed.path")
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(UsageError, match="accept its licence on the Hub") as caught:
        contents("org/gated", tmp_path)
    assert "hf_canary" not in str(caught.value)


def test_a_name_that_is_nowhere_and_a_revision_that_is_not_are_told_apart(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="org/missing is neither here nor on the Hub"):
        contents("org/missing", tmp_path)
    with pytest.raises(UsageError, match="org/name has no such revision"):
        contents("org/name", tmp_path, revision="v9")


def test_a_name_that_no_repository_can_have_is_a_usage_error(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"org/na--me cannot be loaded: .*--"):
        contents("org/na--me", tmp_path)


def test_a_hub_that_refuses_connections_is_a_service_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    # huggingface_hub has some patience of its own.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ServiceError, match="the Hub cannot be reached") as caught:
        contents("org/name", tmp_path)
    assert caught.value.exit_code == 69
    with pytest.raises(ServiceError, match="the Hub cannot be reached"):
        contents("org/name", tmp_path, pinned={"org/name": OLD})


def test_an_outage_is_waited_for_and_one_that_outlasts_patience_is_a_service_error(hub: Hub, tmp_path: Path) -> None:
    hub.down = 1
    assert resolve("org/name", tmp_path, patience_s=10).commit == NEW
    hub.down = 100
    with pytest.raises(ServiceError):
        resolve("org/other", tmp_path, patience_s=0)


def test_what_was_seen_last_serves_without_a_connection(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = contents("org/name", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert contents("org/name", tmp_path) == seen
    with pytest.raises(ServiceError, match="HF_HUB_OFFLINE"):
        resolve("org/other", tmp_path)
