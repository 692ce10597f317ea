"""What a recipe's path means: datasets on the Hub, served here by a small server that speaks its protocol."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import FILES, NEW, OLD, Hub, serving
from selfalign.core.errors import ServiceError, UsageError
from selfalign.data.sources import resolve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path, monkeypatch) as server:
        yield server


def contents(path: str, base: Path, **how: object) -> tuple[dict[str, bytes], str | None]:
    resolved = resolve(path, base, patience_s=0, **how)  # type: ignore[arg-type]
    return {part.id.split("/")[0]: Path(part.path).read_bytes() for part in resolved.parts}, resolved.commit


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


def test_every_kind_of_file_of_a_dataset_is_fetched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, page, table = b'[{"text": "a"}]', b"<h1>a</h1>", b"a,b"
    packed = {"rows.json.gz": gzip.compress(rows), "page.html.gz": gzip.compress(page), "text.md": b"a"}
    pages = {"Contents.HTML": page, "readme.html": page}
    monkeypatch.setitem(FILES, NEW, {**packed, **pages, "README.md": b"# readme", "table.csv": table})
    files, _ = contents("org/name", tmp_path)
    assert files == {
        "rows": packed["rows.json.gz"],
        "page": packed["page.html.gz"],
        "text": b"a",
        "Contents": page,
        "readme": page,
    }
    assert not any(path.endswith(("README.md", "table.csv")) for path in hub.requests)
    assert contents("hf://datasets/org/name/README.md", tmp_path)[0] == {"README": b"# readme"}


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
