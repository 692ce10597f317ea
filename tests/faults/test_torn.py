"""Files cut off at a random byte, as a file system leaves them that keeps no promise about renames and power."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from faults.runs import Run, check_done
from selfalign.core.lease import Lease, Owner
from selfalign.core.locations import commit
from selfalign.training.checkpoints import MARKER, Checkpoints

CUTS = 3
DAMAGED = 74


def cuts(data: bytes, seed: int) -> Iterator[bytes]:
    """The beginning of a file: nothing of it, all but a byte, and some between."""
    chance = random.Random(seed)
    yield from (b"", data[:-1])
    yield from (data[: chance.randrange(1, len(data) - 1)] for _ in range(CUTS - 2))


def copied(run: Run, name: str) -> Run:
    """The same run in another folder."""
    assert isinstance(run.root, Path)
    shutil.copytree(run.root, run.root.with_name(name))
    return Run(run.toy, run.root.with_name(name), run.forks)


def half_done(calm: Run, name: str) -> Run:
    """A run of which the second round is still to be done, but for the first shard of its question step."""
    run = copied(calm, name)
    folders = [run.runner().artifact(step).folder for step in run.toy.steps()]
    for folder in folders[5:]:
        shutil.rmtree(folder)
    (folders[4] / "manifest.json").unlink()
    (folders[4] / "shard-00001.parquet").unlink()
    return run


def obey(run: Run, message: str) -> None:
    """Do as an error says."""
    torn, *named = [Path(each) for each in re.findall(rf"{re.escape(str(run.root))}[\w./-]+", message)]
    if named:
        assert f"delete {named[0]} and run again" in message
        shutil.rmtree(named[0])
    elif "delete its folder and run again" in message or (torn.parent / "manifest.json").exists():
        shutil.rmtree(torn.parent)
    else:
        assert "; delete it " in message
        torn.unlink()


# What each is, in a run that is half done, by the place of its step.
TOLD = {"shard of a map": (4, "shard-00000.parquet"), "shard of a step before": (0, "shard-00001.parquet")}
TOLD |= {"manifest": (0, "manifest.json"), "manifest of a build": (3, "manifest.json")}
TOLD |= {"model": (3, "files/weights.json")}


@pytest.mark.parametrize("what", TOLD)
def test_a_file_that_was_cut_off_is_named_and_the_run_goes_on_when_its_error_is_obeyed(calm: Run, what: str) -> None:
    place, name = TOLD[what]
    whole = half_done(calm, "half")
    data = (whole.runner().artifact(whole.toy.steps()[place]).folder / name).read_bytes()
    for number, beginning in enumerate(cuts(data, place)):
        run = copied(whole, f"torn-{number}")
        path = run.runner().artifact(run.toy.steps()[place]).folder / name
        path.write_bytes(beginning)
        assert run.go() == DAMAGED, run.said
        assert str(path) in run.said
        obey(run, run.said.splitlines()[-1])
        assert run.go() == 0, run.said
        check_done(run, calm)


def test_a_shard_that_was_cut_off_before_its_step_was_complete_is_named_and_made_again(calm: Run) -> None:
    """The step makes all its shards at once."""
    whole = copied(calm, "whole")
    folder = whole.runner().artifact(whole.step("curate.keep@2")).folder
    data = (folder / "shard-00000.parquet").read_bytes()
    (folder / "manifest.json").unlink()
    for number, beginning in enumerate(cuts(data, 1)):
        run = copied(whole, f"torn-{number}")
        (run.runner().artifact(run.step("curate.keep@2")).folder / "shard-00000.parquet").write_bytes(beginning)
        assert run.go() == DAMAGED, run.said
        obey(run, run.said.splitlines()[-1])
        assert run.go() == 0, run.said
        check_done(run, calm)


def test_a_journal_that_was_cut_off_stops_no_run(calm: Run) -> None:
    whole = half_done(calm, "half")
    dead = {"owner": asdict(replace(Owner.this_process(), started="long ago")), "in_flight": "row doc/0008"}
    for number, beginning in enumerate(cuts(json.dumps(dead).encode(), 2)):
        run = copied(whole, f"torn-{number}")
        commit(run.runner().artifact(run.step("augment.ask@2")).folder / "journal-00001" / "dead.json", beginning)
        assert run.go() == 0, run.said
        check_done(run, calm)


@pytest.mark.parametrize("name", ["run.json", "drivers/elsewhere-7.json", "metrics"])
def test_what_only_tells_of_a_run_may_be_cut_off_without_harm(calm: Run, name: str) -> None:
    whole = half_done(calm, "half")
    asked = whole.runner().artifact(whole.step("augment.ask@2")).folder
    path = asked / "metrics.jsonl" if name == "metrics" else whole.location / name
    data = (
        path.read_bytes()
        if path.exists()
        else b'{"host": "elsewhere", "pid": 7, "started": "1", "token": "0123456789ab"}'
    )
    for number, beginning in enumerate(cuts(data, 3)):
        run = copied(whole, f"torn-{number}")
        torn = Path(str(path).replace(str(whole.root), str(run.root)))
        torn.parent.mkdir(exist_ok=True)
        torn.write_bytes(beginning)
        assert run.go() == 0, run.said
        check_done(run, calm)


def test_a_lease_that_was_cut_off_is_nobodys(calm: Run) -> None:
    whole = half_done(calm, "half")
    for number, beginning in enumerate(
        cuts(b'{"host": "elsewhere", "pid": 7, "started": "1", "token": "0123456789ab"}', 4)
    ):
        run = copied(whole, f"torn-{number}")
        folder = run.runner().artifact(run.step("forward.train@2")).folder
        folder.mkdir()
        (folder / "lease-000001.json").write_bytes(beginning)
        assert run.go() == 0, run.said
        check_done(run, calm)


def test_a_checkpoint_whose_marker_was_cut_off_gives_way_to_the_one_before(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lease = Lease(folder / "lease-000001.json", Owner.this_process())
    lease.path.write_text(json.dumps(asdict(lease.owner)))
    checkpoints = Checkpoints(folder / "kept", "0" * 16, lease)
    for step in (1, 2):
        checkpoints.draft().mkdir(parents=True)
        (checkpoints.draft() / "state").write_text(f"after step {step}")
        checkpoints.commit(checkpoints.draft(), step)
    data = (folder / "kept" / "step-00000002" / MARKER).read_bytes()
    for number, beginning in enumerate(cuts(data, 5)):
        shutil.copytree(folder / "kept", folder / f"kept-{number}")
        (folder / f"kept-{number}" / "step-00000002" / MARKER).write_bytes(beginning)
        newest = Checkpoints(folder / f"kept-{number}", "0" * 16, lease).newest()
        assert newest is not None
        assert (newest / "state").read_text() == "after step 1"
        assert f"kept-{number}/step-00000002 is skipped: its {MARKER} is damaged" in caplog.text
