"""The run folder: one commit a name, whole or not at all, and known by its bytes."""

import errno
import json
import multiprocessing
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace as changed
from pathlib import Path

import pytest

from selfalign.core.errors import InternalError, MismatchError, StorageError
from selfalign.core.identity import file_digest
from selfalign.core.ledger import Ledger
from selfalign.core.locations import Location, commit, commit_folder, replace
from selfalign.core.records import Document
from selfalign.core.stage import KeptRows
from selfalign.core.store import Artifact, Manifest, Store, balanced, check_inputs, content_digest
from selfalign.core.tables import to_parquet

LEDGER = Ledger(sources=1, in_=3, kept=1)
LEDGER.rejected["empty"] = 2


def manifest_of(artifact: Artifact, *names: str) -> Manifest:
    files = {name: file_digest(artifact.folder / name) for name in names}
    return Manifest("toy", artifact.identity, "content", {"rows": "abc"}, files, LEDGER.to_json())


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """A complete artifact of one shard and two files."""
    found = Store(tmp_path / "run").artifact("toy", "0123")
    commit(found.shard(0), to_parquet([Document(id=f"d{n}", source="s", text="text " * n) for n in range(9)], Document))
    for name in ("weights", "deep/er"):
        (found.files / name).parent.mkdir(parents=True, exist_ok=True)
        (found.files / name).write_bytes(name.encode())
    found.finish(manifest_of(found, "shard-00000.parquet", "files/weights", "files/deep/er"))
    return found


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds 64 KiB: a file system of its own where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        fsync = os.fsync

        def full(handle: int) -> None:
            if os.fstat(handle).st_size > 1 << 16:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        monkeypatch.setattr("os.fsync", full)
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_first_commit_of_a_name_wins_and_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "shard"
    assert commit(path, b"first") is True
    assert commit(path, b"second, and longer") is False
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def _commit(path: Path, filler: int, rounds: int) -> list[bool]:
    return [commit(path.with_name(f"{path.name}-{n}"), bytes([filler]) * 50_000) for n in range(rounds)]


def test_of_threads_that_commit_at_once_one_wins_with_its_whole_content(tmp_path: Path) -> None:
    won: list[list[bool]] = []
    threads = [threading.Thread(target=lambda n=n: won.append(_commit(tmp_path / "shard", n, 20))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(each) for each in zip(*won, strict=True)] == [1] * 20
    _whole(tmp_path, 20)


def test_of_processes_that_commit_at_once_one_wins_with_its_whole_content(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        won = pool.starmap(_commit, [(tmp_path / "shard", n, 30) for n in range(3)], chunksize=1)
        # Left to itself it ends them by SIGTERM, which a process that is just being forked may not obey: whoever
        # handles it here raises an exception, and those of hooks that run at a fork are dropped.
        pool.close()
        pool.join()
    assert [sum(each) for each in zip(*won, strict=True)] == [1] * 30
    _whole(tmp_path, 30)


def _whole(folder: Path, names: int) -> None:
    paths = list(folder.iterdir())
    assert len(paths) == names
    for path in paths:
        data = path.read_bytes()
        assert len(data) == 50_000
        assert len(set(data)) == 1


def test_the_first_folder_of_a_name_wins_and_the_other_leaves_nothing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_text(name)
    assert commit_folder(tmp_path / "one", tmp_path / "final") is True
    assert commit_folder(tmp_path / "two", tmp_path / "final") is False
    assert (tmp_path / "final" / "deep" / "file").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_of_folders_that_are_committed_at_once_one_wins(tmp_path: Path) -> None:
    for turn in range(10):
        won: list[bool] = []
        start = threading.Barrier(4)

        def bring(n: int, turn: int = turn, won: list[bool] = won, start: threading.Barrier = start) -> None:
            draft = tmp_path / f"draft-{turn}-{n}"
            draft.mkdir()
            for name in ("a", "b"):
                (draft / name).write_text(str(n))
            start.wait()
            won.append(commit_folder(draft, tmp_path / f"final-{turn}"))

        threads = [threading.Thread(target=bring, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False, False, False, True]
        assert len({p.read_text() for p in (tmp_path / f"final-{turn}").iterdir()}) == 1
    assert not list(tmp_path.glob("draft-*"))


def test_a_full_disk_is_a_storage_error_and_leaves_no_part_of_a_file(full_disk: Path) -> None:
    assert commit(full_disk / "small", b"fits") is True
    with pytest.raises(StorageError, match=r"cannot write .*/big: No space left on device") as caught:
        commit(full_disk / "big", b"x" * 200_000)
    assert caught.value.exit_code == 74
    assert [p.name for p in full_disk.iterdir()] == ["small"]
    assert commit(full_disk / "big", b"now it fits") is True


def test_a_folder_that_cannot_be_made_durable_does_not_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "file").write_text("x")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        commit_folder(tmp_path / "draft", tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_a_file_that_may_change_keeps_its_old_content_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(tmp_path / "run.json", b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"run\.json"):
        replace(tmp_path / "run.json", b"new content")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == b"old"
    replace(tmp_path / "run.json", b"new")
    assert (tmp_path / "run.json").read_bytes() == b"new"


@pytest.mark.parametrize("write", [commit, replace])
def test_a_folder_that_cannot_be_made_is_a_storage_error(
    tmp_path: Path, write: Callable[[Path, bytes], object]
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="cannot write"):
        write(tmp_path / "file" / "inside", b"x")


def test_an_artifact_is_complete_when_its_manifest_is_there(artifact: Artifact, tmp_path: Path) -> None:
    other = Store(tmp_path / "run").artifact("toy", "4567")
    commit(other.shard(3), b"a shard")
    assert other.manifest() is None
    assert other.shards() == [other.shard(3)]
    manifest = artifact.manifest()
    assert manifest is not None
    assert manifest.inputs == {"rows": "abc"}
    assert balanced(manifest) == LEDGER


def test_of_two_manifests_the_first_counts_for_both_writers(artifact: Artifact) -> None:
    first = artifact.manifest()
    assert first is not None
    assert artifact.finish(changed(first, sha256="another")) == first
    assert artifact.manifest() == first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "toy"}', '{"stage": "toy", "unknown": 1}', "\xff"])
def test_a_damaged_manifest_is_told_with_its_path(artifact: Artifact, text: str) -> None:
    (artifact.folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(StorageError, match=r"toy-0123/manifest\.json is damaged .*; delete its folder"):
        artifact.manifest()


def read_all(artifact: Artifact) -> list[Document]:
    """All that was committed, compared as a step compares its inputs."""
    artifact.verify_files()
    return [*KeptRows(artifact, Document)]


def test_an_undisturbed_artifact_is_what_was_committed(artifact: Artifact) -> None:
    assert [row.id for row in read_all(artifact)] == [f"d{n}" for n in range(9)]


@pytest.mark.parametrize("name", ["shard-00000.parquet", "files/weights", "files/deep/er"])
def test_the_file_that_changed_or_is_missing_is_named(artifact: Artifact, name: str) -> None:
    path = artifact.folder / name
    data = path.read_bytes()
    for damaged in (data[:-1], data + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=f"{name} is not what toy-0123 committed"):
            read_all(artifact)
    path.unlink()
    with pytest.raises(StorageError, match=f"{name} is not what toy-0123 committed"):
        read_all(artifact)
    path.write_bytes(data)
    read_all(artifact)


def test_every_flipped_bit_of_a_shard_is_detected(artifact: Artifact) -> None:
    path = artifact.shard(0)
    data = path.read_bytes()
    for bit in random.Random(0).sample(range(len(data) * 8), 300):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(StorageError, match=r"shard-00000\.parquet"):
            read_all(artifact)


def test_content_is_the_named_files_bytes_in_any_order(artifact: Artifact) -> None:
    names = ["files/weights", "files/deep/er"]
    files = manifest_of(artifact, "shard-00000.parquet", *names).files
    before = content_digest(files, names)
    assert content_digest(files, names[::-1]) == before
    assert content_digest(files, names[:1]) != before
    assert content_digest({**files, "files/log": "not named"}, names) == before
    (artifact.files / "weights").write_text("other")
    assert content_digest(manifest_of(artifact, *names).files, names) != before


@pytest.mark.parametrize("now", [{"rows": "abd"}, {}])
def test_an_artifact_made_from_other_data_is_refused(artifact: Artifact, now: dict[str, str]) -> None:
    manifest = artifact.manifest()
    assert manifest is not None
    check_inputs(manifest, {"rows": "abc", "new": "x"})
    with pytest.raises(MismatchError, match="toy-0123 was made from other data than its input 'rows' holds now"):
        check_inputs(manifest, now)


def test_a_manifest_says_the_same_after_it_was_written(artifact: Artifact) -> None:
    manifest = artifact.manifest()
    assert manifest is not None
    other = Artifact(artifact.folder.with_name("toy-89"), "89")
    other.finish(changed(manifest, stop="no better", metrics={"auc": None, "é": [1.5]}, versions={"torch": "2"}))
    assert other.manifest() == changed(
        manifest, stop="no better", metrics={"auc": None, "é": [1.5]}, versions={"torch": "2"}
    )
    assert json.loads((other.folder / "manifest.json").read_text())["ledger"] == LEDGER.to_json()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_files_of_a_build_may_be_read_by_whom_the_umask_lets(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        draft = tmp_path / "draft"
        draft.mkdir()
        (draft / "model.safetensors").touch(0o600)
        (draft / "config.json").touch()
        assert commit_folder(draft, tmp_path / "files")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "files").iterdir()} == {mode}


def test_kept_rows_come_in_the_order_of_their_shards_and_damage_is_told_when_it_is_come_to(place: Location) -> None:
    found = Store(place).artifact("toy", "0123")
    rows = [Document(id=f"d{n:02d}", source="s", text=f"text {n}") for n in range(33)]
    for n in range(11):
        commit(found.shard(n), to_parquet(rows[3 * n : 3 * n + 3], Document))
    with pytest.raises(InternalError, match="read before it is complete"):
        next(iter(KeptRows(found, Document)))
    found.finish(manifest_of(found, *(path.name for path in found.shards())))
    for _ in range(2):
        assert [*KeptRows(found, Document)] == rows
    assert next(iter(KeptRows(found, Document))) == rows[0]
    replace(found.shard(9), to_parquet(rows[:3], Document))
    seen: list[Document] = []
    with pytest.raises(StorageError, match=r"shard-00009\.parquet is not what toy-0123 committed"):
        seen.extend(KeptRows(found, Document))
    assert seen == rows[:27]
