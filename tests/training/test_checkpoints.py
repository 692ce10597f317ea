"""A checkpoint counts when every byte is what was written; else the one before counts."""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from s3 import S3
from selfalign.core.errors import LeaseHeldError, MismatchError, ServiceError, StorageError
from selfalign.core.lease import Lease, Owner
from selfalign.core.locations import Location, entries, files_in, read, replace, scratch
from selfalign.training.checkpoints import MARKER, Checkpoints

FILES = {"model.safetensors": 300, "optimizer.pt": 200, "global_step2/zero_pp_rank_0.pt": 50, "empty": 0}


@pytest.fixture
def checkpoints(place: Location) -> Checkpoints:
    me = Owner.this_process()
    path = place / "lease-000001.json"
    replace(path, json.dumps(asdict(me)).encode())
    return Checkpoints(place / "kept", "identity-1", Lease(path, me))


def written(checkpoints: Checkpoints, name: str = "checkpoint", seed: int = 0) -> Path:
    chance = random.Random(seed)
    for file, size in FILES.items():
        path = checkpoints.draft() / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(size))
    return checkpoints.draft() / name


def commit(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.commit(written(checkpoints, seed=step), step)


def newest(checkpoints: Checkpoints) -> int | None:
    """The step of the newest whole checkpoint, whose files are all there."""
    found = checkpoints.newest()
    if found is None:
        return None
    assert {*files_in(found)} == {*FILES, MARKER}
    steps = {read(path / "optimizer.pt"): int(path.name[5:]) for path in entries(checkpoints.folder, "step-*")}
    return steps[(found / "optimizer.pt").read_bytes()]


def ways_to_damage(path: Location) -> Iterator[str]:
    """Damages a file in one way after the other, and mends it."""
    whole = read(path)
    path.unlink()
    yield "deleted"
    if whole:
        path.write_bytes(whole[: len(whole) // 2])
        yield "truncated"
        path.write_bytes(b"")
        yield "emptied"
        for at in {0, len(whole) // 2, len(whole) - 1}:
            for bit in range(8):
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
                yield f"bit {bit} of byte {at} flipped"
    path.write_bytes(whole + b"\0")
    yield "extended"
    path.write_bytes(whole)


def test_the_newest_of_two_checkpoints_is_gone_on_from_and_older_ones_go(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    commit(checkpoints, 8, 9, 10, 100)
    assert [p.name for p in entries(checkpoints.folder, "step-*")] == ["step-00000010", "step-00000100"]
    assert newest(checkpoints) == 100


@pytest.mark.parametrize("name", [*FILES, MARKER])
def test_a_checkpoint_with_any_file_damaged_is_no_checkpoint(
    checkpoints: Checkpoints, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    from selfalign.training import checkpoints as module

    commit(checkpoints, 1)
    path = checkpoints.folder / "step-00000001"
    assert module._fault(path) is None
    for way in ways_to_damage(path / name):
        assert module._fault(path) is not None, way
    assert module._fault(path) is None


def test_a_torn_checkpoint_is_skipped_with_a_warning_for_the_newest_whole_one(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    commit(checkpoints, 1, 2)
    (checkpoints.folder / "step-00000002" / "optimizer.pt").write_bytes(b"torn")
    assert newest(checkpoints) == 1
    assert "step-00000002 is skipped: optimizer.pt is not what was written" in caplog.text
    # The step is trained again, and its checkpoint takes the name.
    commit(checkpoints, 2)
    assert newest(checkpoints) == 2


def test_a_file_that_no_marker_lists_is_never_loaded(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    commit(checkpoints, 1)
    (checkpoints.folder / "step-00000001" / "rng_state.pth").write_bytes(b"a pickle of somebody's")
    assert checkpoints.newest() is None
    assert "holds rng_state.pth, which its complete.json does not list" in caplog.text


@pytest.mark.parametrize("place", ["disk"], indirect=True)
def test_a_link_is_no_file_of_a_checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> None:
    commit(checkpoints, 1)
    os.symlink(tmp_path, checkpoints.folder / "step-00000001" / "elsewhere")
    assert checkpoints.newest() is None


def test_what_a_dead_writer_left_unfinished_is_removed(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 1)
    left = scratch(checkpoints.folder) / "draft-0123456789ab"
    left.mkdir()
    assert newest(checkpoints) == 1
    assert not left.exists()


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_another_machine_finds_the_newest_checkpoint(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(checkpoints, 1, 2)
    here = checkpoints.newest()
    assert here == checkpoints.newest()
    monkeypatch.setenv("SELFALIGN_SCRATCH", str(tmp_path / "another machine's"))
    assert newest(checkpoints) == 2
    assert checkpoints.newest() != here


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_checkpoint_whose_sending_was_broken_off_is_skipped_and_sent_again(
    checkpoints: Checkpoints, s3: S3, caplog: pytest.LogCaptureFixture
) -> None:
    commit(checkpoints, 1)
    # The look at the lease and at the epochs, and some of the files.
    s3.fail("closed", after=6)
    with pytest.raises(ServiceError):
        commit(checkpoints, 2)
    s3.mend()
    assert len(files_in(checkpoints.folder / "step-00000002")) in range(1, 5)
    assert newest(checkpoints) == 1
    assert "step-00000002 is skipped" in caplog.text
    commit(checkpoints, 2)
    assert newest(checkpoints) == 2


def test_a_checkpoint_of_another_training_is_refused_by_name(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 1)
    other = Checkpoints(checkpoints.folder, "identity-2", checkpoints.lease)
    with pytest.raises(MismatchError, match=r"another training \(identity-1, this one is identity-2\).*Delete"):
        other.newest()


def test_nothing_is_committed_once_somebody_else_has_taken_over(checkpoints: Checkpoints) -> None:
    commit(checkpoints, 1)
    newer = checkpoints.lease.path.with_name("lease-000002.json")
    replace(newer, json.dumps(asdict(Owner("other", 1, "1", "token"))).encode())
    with pytest.raises(LeaseHeldError, match="taken over by process 1 on other"):
        commit(checkpoints, 2)
    assert [p.name for p in entries(checkpoints.folder, "step-*")] == ["step-00000001"]


def test_the_models_of_epochs_stay_beside_the_checkpoints_and_are_taken_whole(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoints.commit_epoch(written(checkpoints, "epoch"), 1)
    commit(checkpoints, 1, 2, 3)
    # After a resume from before the epoch's end, it is written once more.
    checkpoints.commit_epoch(written(checkpoints, "epoch"), 1)
    checkpoints.take_epoch(1, tmp_path / "model" / "epoch-1")
    taken = {p.relative_to(tmp_path / "model" / "epoch-1").as_posix() for p in (tmp_path / "model").rglob("*.*")}
    assert taken == {name for name in FILES if "." in name}


def test_the_model_of_an_epoch_that_was_damaged_is_not_taken(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.commit_epoch(written(checkpoints, "epoch"), 1)
    (checkpoints.epoch(1) / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(StorageError, match=r"model\.safetensors is not what was written; run again"):
        checkpoints.take_epoch(1, tmp_path / "epoch-1")


def test_a_damaged_model_of_an_epoch_takes_the_checkpoints_after_it_along(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    commit(checkpoints, 1)
    checkpoints.commit_epoch(written(checkpoints, "epoch"), 1)
    commit(checkpoints, 2)
    (checkpoints.epoch(1) / "optimizer.pt").unlink()
    assert newest(checkpoints) == 1
    assert "epoch-1 is trained again: optimizer.pt is missing" in caplog.text
    assert "step-00000002 is skipped: epoch-1, which it comes after, is not there" in caplog.text


def test_the_model_of_an_epoch_can_be_taken_again_after_a_kill(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.commit_epoch(written(checkpoints, "epoch"), 1)
    commit(checkpoints, 2)
    checkpoints.take_epoch(1, tmp_path / "lost" / "epoch-1")
    assert checkpoints.newest() is not None
    checkpoints.take_epoch(1, tmp_path / "again" / "epoch-1")
