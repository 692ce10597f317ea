"""Builds of several ranks: launched, heard, ended, and never left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from backends.ranked import Ranked
from selfalign.backends.local import LocalBackend
from selfalign.core import preemption
from selfalign.core.errors import GateError, InternalError, LeaseHeldError, PreemptedError, StorageError
from selfalign.core.lease import Owner, lease
from selfalign.core.locations import replace
from selfalign.core.protocols import BuildJob, Committed
from selfalign.core.stage import Context, Resources
from selfalign.core.store import Artifact
from signals import handled

pytestmark = pytest.mark.train

DRIVER = """
import sys
from pathlib import Path
from backends.ranked import Ranked
from backends.test_torchrun import build
build(Ranked(sys.argv[1]), Path(sys.argv[2]), [])
"""


def build(stage: Ranked, folder: Path, logged: list[dict[str, float]]) -> Committed:
    with lease(folder, False, print) as held:
        job = BuildJob(stage, Context("ranked", 0, {}), Artifact(folder, "identity"), held, Resources())
        with preemption.delivered():
            return LocalBackend().build(job, lambda line: logged.append(dict(line)))


def eventually(holds: Callable[[], bool], within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def both_ranks_are_there(folder: Path) -> bool:
    return all((folder / "kept" / f"rank-{n}").exists() for n in (0, 1))


def lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def test_all_ranks_build_and_rank_0_says_what_came_of_it(tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []
    committed = build(Ranked(), tmp_path, logged)
    assert committed.built.metrics == {"rank": 0}
    assert sorted(committed.files) == ["rank-0", "rank-1"]
    assert logged == [{"step": 0.0}]
    assert {p.name: p.read_text() for p in (tmp_path / "files").iterdir()} == {"rank-0": "2", "rank-1": "2"}


def test_what_a_rank_raises_is_raised_and_the_others_end(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="nan at step 3"):
        build(Ranked("gate"), tmp_path, [])
    assert not lives(int((tmp_path / "kept" / "rank-0").read_text()))


def test_a_full_disk_is_told_as_in_one_process(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space left"):
        build(Ranked("full"), tmp_path, [])


def test_ranks_that_lost_the_lease_end_and_say_so(tmp_path: Path) -> None:
    def take_over() -> None:
        eventually(lambda: both_ranks_are_there(tmp_path))
        newer = tmp_path / "lease-000002.json"
        replace(newer, json.dumps(asdict(Owner("quicker", 1, "1", "other"))).encode())

    thread = threading.Thread(target=take_over)
    thread.start()
    with pytest.raises(LeaseHeldError, match="taken over by process 1 on quicker"):
        build(Ranked("wait"), tmp_path, [])
    thread.join()


def test_ranks_that_were_asked_without_their_driver_are_pre_empted_and_no_bug(tmp_path: Path) -> None:
    def ask() -> None:
        eventually(lambda: both_ranks_are_there(tmp_path))
        for n in (0, 1):
            os.kill(int((tmp_path / "kept" / f"rank-{n}").read_text()), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(PreemptedError):
        build(Ranked("save"), tmp_path, [])
    thread.join()


def test_the_last_words_of_a_rank_that_dies_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"ranks\.log has their last words"):
        build(Ranked("crash"), tmp_path, [])
    assert "the last words of rank 1" in (tmp_path / "kept" / "ranks.log").read_text()
    assert not lives(int((tmp_path / "kept" / "rank-0").read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("to", ["the driver", "every process"])
def test_a_request_to_end_reaches_every_rank_which_saves(tmp_path: Path, number: signal.Signals, to: str) -> None:
    def ask() -> None:
        eventually(lambda: both_ranks_are_there(tmp_path))
        ranks = [int((tmp_path / "kept" / f"rank-{n}").read_text()) for n in (0, 1)]
        launchers = {int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) for pid in ranks}
        for pid in [os.getpid()] if to == "the driver" else [*launchers, os.getpid(), *ranks]:
            os.kill(pid, number)

    thread = threading.Thread(target=ask)
    thread.start()
    with handled(), pytest.raises(PreemptedError, match=number.name):
        build(Ranked("save"), tmp_path, [])
    thread.join()
    assert {p.name for p in (tmp_path / "kept").glob("saved-*")} == {"saved-0", "saved-1"}


def test_ranks_do_not_outlive_a_driver_that_was_killed(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, "wait", str(tmp_path)])
    eventually(lambda: both_ranks_are_there(tmp_path))
    ranks = [int((tmp_path / "kept" / f"rank-{n}").read_text()) for n in (0, 1)]
    assert all(map(lives, ranks))
    driver.kill()
    driver.wait()
    eventually(lambda: not any(map(lives, ranks)), within_s=20)
