"""What gc removes from a run folder, and what it leaves alone."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest

from s3 import S3
from selfalign.cli import main
from selfalign.core.errors import LeaseHeldError, StorageError, UsageError
from selfalign.core.identity import file_digest
from selfalign.core.lease import Owner, presence
from selfalign.core.locations import Location, commit, fetched, files_in, scratch
from selfalign.pipelines.gc import collect

NAMED, STALE, BUILD = "curate.rate-" + "a" * 16, "curate.rate-" + "b" * 16, "train-" + "c" * 16
KEPT = ("recipe.json", "pinned.json", "digests.json")
HEX = "0123456789ab"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run of two steps, one of them complete, one of them killed, and an artifact of an earlier setting."""
    root = tmp_path / "run"
    steps = [{"name": "curate.rate@1", "artifact": NAMED}, {"name": "forward.train@1", "artifact": BUILD}]
    fill(
        root, {"run.json": json.dumps({"steps": steps}), "recipe.json": "{}", "pinned.json": "{}", "digests.json": "{}"}
    )
    for name in (NAMED, STALE):
        shard = {"shard-00000.parquet": "shard", "journal-00000/0123456789ab.json": "journal"}
        fill(root / "artifacts" / name, {**shard, "metrics.jsonl": "{}", "manifest.json": "{}"})
    return root


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or path.is_file()}


def test_artifacts_that_no_step_names_go_and_those_it_names_stay(root: Path) -> None:
    before = tree(root)
    removed = list(collect(root))
    stale = {name for name in before if STALE in name}
    assert before - tree(root) == stale | {f"artifacts/{NAMED}/journal-00000/0123456789ab.json"}
    assert {garbage.path.name for garbage in removed} == {STALE, "journal-00000"}
    assert next(g for g in removed if g.path.name == STALE).size == len("shard" + "journal" + "{}" + "{}")
    assert list(collect(root)) == []


def test_a_dry_run_tells_the_same_and_removes_nothing(root: Path) -> None:
    before = tree(root)
    told = list(collect(root, dry_run=True))
    assert tree(root) == before
    assert told == list(collect(root))


def test_what_dead_writers_left_goes(root: Path) -> None:
    left = {
        f".run.json.{HEX}": "",
        f".report.html.{HEX}": "",
        f"drivers/.node-7.json.{HEX}": "",
        "drivers/node-7.json": "torn",
        f"artifacts/{NAMED}/.shard-00001.parquet.{HEX}": "",
        f"artifacts/{NAMED}/.manifest.json.{HEX}": "",
        f"artifacts/{BUILD}/lease-000001.json": "torn",
        f"artifacts/{BUILD}/.lease-000001.json.{HEX}": "",
        f"artifacts/{BUILD}/draft-{HEX}/model.safetensors": "half",
        f"artifacts/{BUILD}/files/model.safetensors": "whole, but its manifest was never written",
    }
    fill(root, left)
    list(collect(root))
    assert not tree(root) & set(left)


def test_shards_and_journals_of_an_unfinished_map_stay(root: Path) -> None:
    (root / "artifacts" / NAMED / "manifest.json").unlink()
    fill(root / "artifacts" / NAMED, {"journal-00001/0123456789ab.json": "in flight"})
    list(collect(root))
    stays = ("shard-00000.parquet", "journal-00001/0123456789ab.json", "metrics.jsonl")
    assert {name for name in tree(root) if NAMED in name} == {f"artifacts/{NAMED}/{name}" for name in stays}


def test_checkpoints_of_an_unfinished_build_stay(root: Path) -> None:
    fill(root / "artifacts" / BUILD, {"kept/step-00000100/optimizer.pt": "state"})
    list(collect(root))
    assert f"artifacts/{BUILD}/kept/step-00000100/optimizer.pt" in tree(root)


def test_a_finished_build_keeps_its_files_and_not_its_checkpoints(root: Path) -> None:
    files = {"files/model.safetensors": "whole", "manifest.json": "{}", "kept/step-00000100/optimizer.pt": "state"}
    fill(root / "artifacts" / BUILD, files)
    list(collect(root))
    kept = {f"artifacts/{BUILD}/files/model.safetensors", f"artifacts/{BUILD}/manifest.json"}
    assert {name for name in tree(root) if BUILD in name} >= kept
    assert not any("kept" in name for name in tree(root))


def test_files_of_the_users_own_stay_wherever_they_lie(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = {
        "notes.txt",
        ".hidden",
        ".notes.json.swp",
        "report.html",
        "artifacts/notes.txt",
        "artifacts/my-model/weights.bin",
        f"artifacts/{NAMED}/notes.txt",
        "artifacts/curate.rate-" + "d" * 16 + "/notes.txt",
        "drivers/notes.txt",
        "tmp/x",
    }
    fill(root, dict.fromkeys(mine, "mine"))
    with caplog.at_level(logging.WARNING):
        list(collect(root))
    assert mine <= tree(root)
    assert "notes.txt in it is not ours" in caplog.text


def test_no_link_is_followed(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    fill(outside, {"shard-00000.parquet": "theirs", f".run.json.{HEX}": "theirs", "a.json": "torn"})
    links = [root / "artifacts" / ("train-" + "e" * 16), root / "drivers", root / "artifacts" / STALE / "files"]
    for link in links:
        link.symlink_to(outside)
    (root / "artifacts" / NAMED / "tmp").symlink_to(outside)
    (root / f".recipe.json.{HEX}").symlink_to(outside / "a.json")
    list(collect(root))
    assert tree(outside) == {"shard-00000.parquet", f".run.json.{HEX}", "a.json"}
    assert links[0].is_symlink()
    assert not (root / "artifacts" / STALE).exists()


def test_a_run_folder_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert list(collect(tmp_path / "link"))
    assert not (root / "artifacts" / STALE).exists()


@pytest.fixture
def stored(s3: S3) -> Location:
    """A run in an object store, of whose model this machine has a copy and a draft."""
    root = s3.folder()
    commit(root / "run.json", json.dumps({"steps": [{"name": "forward.train@1", "artifact": BUILD}]}).encode())
    files = root / "artifacts" / BUILD / "files"
    commit(files / "weights", b"whole")
    fetched(files, {"weights": file_digest(files / "weights")})
    fill(scratch(root / "artifacts" / BUILD), {f"draft-{HEX}/weights": "half"})
    fill(scratch(root / "artifacts" / STALE), {f"draft-{HEX}/weights": "half"})
    fill(scratch(root), {"notes.txt": "mine", "artifacts/my-model/weights": "mine"})
    return root


def test_of_a_run_in_an_object_store_what_this_machine_has_of_it_goes(
    stored: Location, caplog: pytest.LogCaptureFixture
) -> None:
    objects, here = files_in(stored), tree(scratch(stored))
    told = list(collect(stored, dry_run=True))
    assert tree(scratch(stored)) == here
    assert list(collect(stored)) == told
    assert sorted(garbage.path.name for garbage in told) == sorted([BUILD, STALE])
    assert sum(garbage.size for garbage in told) == len("whole" + "half" + "half")
    assert tree(scratch(stored)) == {"notes.txt", "artifacts/my-model/weights"}
    assert files_in(stored) == objects
    assert "its objects stay" in caplog.text
    assert "A lifecycle rule by age would take what runs need" in caplog.text


def test_nothing_of_a_run_in_an_object_store_goes_while_a_driver_is_alive(stored: Location) -> None:
    here = tree(scratch(stored))
    with presence(stored / "drivers", print), pytest.raises(LeaseHeldError, match="somebody works on s3://"):
        list(collect(stored))
    assert tree(scratch(stored)) == here


def test_copies_stay_while_somebody_builds_with_them(stored: Location) -> None:
    holder = Owner("another-host", 1, "0", HEX)
    commit(stored / "artifacts" / BUILD / "lease-000001.json", json.dumps(asdict(holder)).encode())
    assert [garbage.path.name for garbage in collect(stored)] == [STALE]


def test_a_bucket_is_no_run_of_which_anything_could_go(s3: S3, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", str(s3.folder().parent)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_artifacts_on_another_disk_are_refused(root: Path, tmp_path: Path) -> None:
    shutil.move(root / "artifacts", tmp_path / "disk")
    (root / "artifacts").symlink_to(tmp_path / "disk")
    with pytest.raises(UsageError, match="is a link"):
        list(collect(root))


def test_nothing_goes_while_a_driver_is_alive(root: Path) -> None:
    before = tree(root)
    with presence(root / "drivers", print), pytest.raises(LeaseHeldError, match="somebody works on"):
        list(collect(root))
    assert tree(root) == before


def test_a_driver_that_begins_meanwhile_stops_it(root: Path) -> None:
    fill(root / "artifacts" / ("curate.rate-" + "d" * 16), {"manifest.json": "{}"})
    removing: Iterator[object] = collect(root)
    next(removing)
    with presence(root / "drivers", print), pytest.raises(LeaseHeldError):
        list(removing)
    assert list(collect(root))


def test_what_a_run_that_began_and_ended_meanwhile_names_stays(root: Path) -> None:
    later = "curate.rate-" + "d" * 16
    fill(root / "artifacts" / later, {"manifest.json": "{}"})
    removing = collect(root)
    assert next(removing).path.name == "journal-00000"
    assert next(removing).path.name == STALE
    with presence(root / "drivers", print):
        fill(root, {"run.json": json.dumps({"steps": [{"artifact": later}]})})
        fill(root / "artifacts" / BUILD, {"files/model.safetensors": "whole", "manifest.json": "{}"})
    assert later not in {garbage.path.name for garbage in removing}
    assert (root / "artifacts" / later / "manifest.json").exists()


def test_the_files_of_a_build_that_a_run_completed_meanwhile_stay(root: Path) -> None:
    fill(root / "artifacts" / BUILD, {"draft-0/a": "half", "files/a": "whole"})
    removing = collect(root)
    assert any(garbage.path.name == "draft-0" for garbage in removing)
    fill(root / "artifacts" / BUILD, {"manifest.json": "{}"})
    list(removing)
    assert (root / "artifacts" / BUILD / "files" / "a").exists()


def test_a_driver_that_begins_during_a_removal_finds_the_artifact_whole_or_not_at_all(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {path.name for path in (root / "artifacts" / STALE).iterdir()}
    remove = shutil.rmtree

    def slowly(path: Path) -> None:
        assert STALE not in path.name or not (root / "artifacts" / STALE).exists()
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", slowly)
    rename = Path.rename
    with ExitStack() as driver:

        def begun(path: Path, to: Path) -> Path:
            if path.name == STALE:
                driver.enter_context(presence(root / "drivers", print))
            return rename(path, to)

        monkeypatch.setattr(Path, "rename", begun)
        with pytest.raises(LeaseHeldError):
            list(collect(root))
        assert {path.name for path in (root / "artifacts" / STALE).iterdir()} == whole
    monkeypatch.setattr(Path, "rename", rename)
    list(collect(root))
    assert not (root / "artifacts" / STALE).exists()


def test_an_artifact_whose_builder_lives_elsewhere_stays(root: Path) -> None:
    holder = Owner("another-host", 1, "0", HEX)
    fill(root / "artifacts" / STALE, {"lease-000001.json": json.dumps(asdict(holder))})
    list(collect(root))
    assert (root / "artifacts" / STALE / "manifest.json").exists()
    os.utime(root / "artifacts" / STALE / "lease-000001.json", (0, 0))
    list(collect(root))
    assert not (root / "artifacts" / STALE).exists()


def test_stopped_in_the_middle_it_goes_on_and_no_half_of_an_artifact_passes_for_the_whole(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def killed(path: Path) -> None:
        if STALE not in path.name:
            remove(path)
            return
        (path / "shard-00000.parquet").unlink()
        raise OSError(5, "killed")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(StorageError, match="killed"):
            list(collect(root))
    assert not (root / "artifacts" / STALE).exists()
    half = [path for path in (root / "artifacts").iterdir() if path.name not in (NAMED, BUILD)]
    assert half
    assert [garbage.path for garbage in collect(root)] == half
    assert not half[0].exists()


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"steps": []}', '{"steps": [{}]}', '{"steps": 3}'])
def test_a_folder_that_names_no_steps_is_left_alone(root: Path, text: str | None) -> None:
    (root / "run.json").unlink()
    if text is not None:
        (root / "run.json").write_text(text)
    before = tree(root)
    with pytest.raises(UsageError):
        list(collect(root))
    assert tree(root) == before
