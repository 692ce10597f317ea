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
from backends.ray_ranked import Alone
from selfalign.backends.local import LocalBackend
from selfalign.core import preemption
from selfalign.core.errors import GateError, InternalError, LeaseHeldError, PreemptedError, StorageError
from selfalign.core.lease import Owner, lease
from selfalign.core.locations import Location, files_in, read, replace, scratch
from selfalign.core.protocols import BuildJob, Committed
from selfalign.core.stage import BuildStage, Context, Resources
from selfalign.core.store import Artifact
from signals import handled
from training.resumable import Case

pytestmark = pytest.mark.train

RANKED = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}

DRIVER = """
import sys
from pathlib import Path
from backends.ranked import Ranked
from backends.test_torchrun import build
build(Ranked(sys.argv[1]), Path(sys.argv[2]), [])
"""


def build(stage: BuildStage, folder: Location, logged: list[dict[str, float]]) -> Committed:
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


def test_all_ranks_build_and_rank_0_says_what_came_of_it(place: Location) -> None:
    logged: list[dict[str, float]] = []
    committed = build(Ranked(), place, logged)
    assert committed.built.metrics == {"rank": 0}
    assert list(committed.files) == files_in(place / "files") == ["rank-0"]
    assert logged == [{"step": 0.0}]
    assert read(place / "files/rank-0") == b"2"
    assert list(scratch(place).glob("draft-*")) == []


def test_a_driver_with_the_environment_of_a_rank_launches_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**RANKED, "PET_NNODES": "2", "PET_NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert build(Ranked(), tmp_path, []).built.metrics == {"rank": 0}


def test_a_training_in_a_driver_with_the_environment_of_a_rank_waits_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in RANKED.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "pids").mkdir()
    case = Case({"lora_r": 8, "max_steps": 2})
    committed = build(Alone(case, str(tmp_path / "pids")), tmp_path / "step", [])
    assert "adapter_model.safetensors" in committed.files


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


WATCH = """
import sys, threading, time
from pathlib import Path
from selfalign.backends.torchrun import _end_without
from selfalign.core.lease import Lease, lease
with lease(Path(sys.argv[1]), False, print) as held:
    threading.Thread(target=_end_without, args=(held,), daemon=True).start()
    time.sleep(60)
"""


def test_a_rank_that_could_not_look_at_its_lease_looks_again(tmp_path: Path) -> None:
    newer = tmp_path / "lease-000002.json"
    with subprocess.Popen([sys.executable, "-c", WATCH, str(tmp_path)]) as rank:
        eventually((tmp_path / "lease-000001.json").exists)
        # What cannot be read, as where a file system or a store refuses for a while.
        newer.mkdir()
        time.sleep(3)
        assert rank.poll() is None
        newer.rmdir()
        replace(newer, json.dumps(asdict(Owner("quicker", 1, "1", "other"))).encode())
        assert rank.wait(20) == LeaseHeldError.exit_code
