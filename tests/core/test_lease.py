"""One builder at a time, and no dead one for long."""

import fcntl
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import pytest

from selfalign.core import lease as module
from selfalign.core.errors import LeaseHeldError
from selfalign.core.lease import Lease, anyone_present, lease, presence

HOLD = """
import sys, time
from pathlib import Path
from selfalign.core.lease import lease, presence
with {what}(Path(sys.argv[1]), {more}print):
    print("held", flush=True)
    sys.stdin.read()
"""
LEASE, PRESENCE = HOLD.format(what="lease", more="False, "), HOLD.format(what="presence", more="")


@contextmanager
def another_process(code: str, path: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "train-0123").mkdir()
    return tmp_path / "train-0123" / "lease.json"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting takes hundredths of a second."""
    sleep = time.sleep
    monkeypatch.setattr("selfalign.core.lease.time.sleep", lambda seconds: sleep(seconds / 100))


def left_by(path: Path, host: str, age_s: float, pid: int = 1) -> None:
    path.write_text(json.dumps({"host": host, "pid": pid, "started": "1", "token": "other"}))
    os.utime(path, (time.time() - age_s,) * 2)


def test_while_it_is_held_the_file_names_the_holder_and_afterwards_nothing_is_left(path: Path, said: list[str]) -> None:
    with lease(path, False, said.append) as me:
        assert json.loads(path.read_text())["token"] == me.owner.token
        assert me.owner.host == socket.gethostname()
        assert me.owner.pid == os.getpid()
    assert list(path.parent.iterdir()) == []
    assert said == []


def test_a_lease_is_given_back_when_the_work_fails(path: Path, said: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), lease(path, False, said.append):
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []


def test_a_second_comer_that_will_not_wait_is_told_who_holds_it(path: Path, said: list[str]) -> None:
    with another_process(LEASE, path) as holder:
        who = f"train-0123 is being built by process {holder.pid} on {re.escape(socket.gethostname())}, last sign of"
        with pytest.raises(LeaseHeldError, match=who) as caught, lease(path, False, said.append):
            pytest.fail("two held it")
    assert caught.value.exit_code == 4
    assert [p.name for p in path.parent.iterdir()] == ["lease.json"]


def test_a_second_comer_waits_says_so_once_and_then_has_it(path: Path, said: list[str], quick: None) -> None:
    order: list[str] = []
    held, enough = threading.Event(), threading.Event()

    def first() -> None:
        with lease(path, False, said.append):
            held.set()
            enough.wait(10)
            order.append("first leaves")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait(10)
    timer = threading.Timer(0.1, enough.set)
    timer.start()
    with lease(path, True, said.append):
        order.append("second enters")
    thread.join()
    assert order == ["first leaves", "second enters"]
    assert len(said) == 1
    assert "waiting for it" in said[0]


def test_a_killed_process_of_this_host_is_followed_at_once(path: Path, said: list[str]) -> None:
    with another_process(LEASE, path) as holder:
        holder.kill()
        holder.wait()
    with lease(path, False, said.append) as me:
        assert json.loads(path.read_text())["token"] == me.owner.token
    assert said == []


def test_a_killed_process_that_nobody_has_waited_for_is_dead_too(path: Path, said: list[str]) -> None:
    with another_process(LEASE, path) as holder:
        holder.kill()
        # Collected by nobody, it stays behind as a zombie.
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        with lease(path, False, said.append):
            assert said == []


def test_a_process_number_that_was_given_out_again_is_not_the_holder(path: Path, said: list[str]) -> None:
    left_by(path, socket.gethostname(), age_s=0, pid=os.getpid())
    with lease(path, False, said.append):
        assert said == []


@pytest.mark.parametrize("age_s", [0, 50])
def test_a_process_of_another_host_is_believed_alive_for_a_minute(path: Path, said: list[str], age_s: float) -> None:
    left_by(path, "elsewhere", age_s)
    with (
        pytest.raises(LeaseHeldError, match=f"process 1 on elsewhere, last sign of life {age_s} s ago"),
        lease(path, False, said.append),
    ):
        pytest.fail("two held it")
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_process_of_another_host_is_followed_after_a_minute_without_a_heartbeat(path: Path, said: list[str]) -> None:
    left_by(path, "elsewhere", age_s=61)
    with lease(path, False, said.append) as me:
        assert json.loads(path.read_text())["token"] == me.owner.token


def test_whoever_waits_has_it_as_soon_as_the_heartbeat_is_a_minute_old(
    path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(path, "elsewhere", age_s=0)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        left_by(path, "elsewhere", age_s=19 * len(naps))

    monkeypatch.setattr("selfalign.core.lease.time.sleep", nap)
    with lease(path, True, said.append):
        assert len(naps) == 4


def test_a_lease_that_cannot_be_read_is_nobodys(path: Path, said: list[str]) -> None:
    path.write_text('{"host": "else')
    with lease(path, False, said.append) as me:
        assert json.loads(path.read_text())["token"] == me.owner.token


def test_of_many_who_find_a_dead_holder_one_at_a_time_gets_it(path: Path, quick: None) -> None:
    inside, worst, turns = [0], [0], []
    guard, start = threading.Lock(), threading.Barrier(8)

    def comer() -> None:
        start.wait()
        with lease(path, True, lambda text: None) as me:
            with guard:
                inside[0] += 1
                worst[0] = max(worst[0], inside[0])
            time.sleep(0.002)
            turns.append(me.owner.token)
            with guard:
                inside[0] -= 1

    for _ in range(3):
        left_by(path, "elsewhere", age_s=100)
        turns.clear()
        threads = [threading.Thread(target=comer) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert worst[0] == 1
        assert len(set(turns)) == 8
        assert list(path.parent.iterdir()) == []


def test_a_claim_made_between_the_look_and_the_eviction_stands(
    path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(path, "elsewhere", age_s=100)
    evict = module._evict

    def late(stale: Path) -> None:
        stale.unlink()
        left_by(stale, "quicker", age_s=0)
        evict(stale)

    monkeypatch.setattr(module, "_evict", late)
    with pytest.raises(LeaseHeldError, match="on quicker"), lease(path, False, said.append):
        pytest.fail("two held it")
    assert json.loads(path.read_text())["host"] == "quicker"
    assert [p.name for p in path.parent.iterdir()] == ["lease.json"]


def test_a_holder_who_ends_while_others_look_costs_the_next_one_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(path, "holder", age_s=0)
    same, abandoned = os.path.samestat, module._abandoned

    def ends(one: os.stat_result, other: os.stat_result) -> bool:
        found = same(one, other)
        path.unlink()
        return found

    def next_one_comes(*seen: Any) -> bool:
        left_by(path, "next", age_s=0)
        return abandoned(*seen)

    monkeypatch.setattr(module.os.path, "samestat", ends)
    monkeypatch.setattr(module, "_abandoned", next_one_comes)
    module._evict(path)
    assert json.loads(path.read_text())["host"] == "next"


def test_of_two_who_evict_at_once_the_second_leaves_the_new_lease_alone(
    path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(path, "elsewhere", age_s=100)
    flock = fcntl.flock

    def slow(file: IO[bytes], how: int) -> None:
        # While this one waits for the lock, another has evicted and claimed.
        path.unlink()
        left_by(path, "quicker", age_s=0)
        flock(file, how)

    monkeypatch.setattr("selfalign.core.lease.fcntl.flock", slow)
    with pytest.raises(LeaseHeldError, match="on quicker"), lease(path, False, said.append):
        pytest.fail("two held it")
    assert json.loads(path.read_text())["host"] == "quicker"


def test_whoever_evicts_removes_the_lease_it_looked_at_and_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(path, "elsewhere", age_s=100)
    flock = fcntl.flock

    def slow(file: IO[bytes], how: int) -> None:
        path.unlink()
        left_by(path, "also gone", age_s=100)
        flock(file, how)

    monkeypatch.setattr("selfalign.core.lease.fcntl.flock", slow)
    # Another may hold the lock on the new one, and have replaced it, by the time that this one removes it.
    module._evict(path)
    assert json.loads(path.read_text())["host"] == "also gone"


def test_one_who_waited_for_long_is_alive_from_the_moment_it_has_it(
    path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(path, "elsewhere", age_s=0)
    ages: list[float] = []
    link = os.link

    def an_hour(seconds: float) -> None:
        for draft in path.parent.glob(".*"):
            os.utime(draft, (time.time() - 3600,) * 2)
        path.unlink()

    def watched(source: Path, target: Path) -> None:
        link(source, target)
        ages.append(time.time() - target.stat().st_mtime)

    monkeypatch.setattr("selfalign.core.lease.time.sleep", an_hour)
    monkeypatch.setattr("selfalign.core.lease.os.link", watched)
    with lease(path, True, said.append):
        assert max(ages) < 10
    assert len(ages) == 1


def test_the_heartbeat_goes_on_while_the_work_does_even_past_a_moment_without_the_file(
    path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    with lease(path, False, said.append):
        for _ in range(2):
            away = path.rename(path.with_name("away"))
            time.sleep(0.05)
            os.utime(away, (0, 0))
            away.rename(path)
            deadline = time.monotonic() + 5
            while path.stat().st_mtime == 0 and time.monotonic() < deadline:
                time.sleep(0.005)
            assert path.stat().st_mtime > 0


def test_a_holder_that_was_evicted_leaves_its_followers_lease_alone(path: Path, said: list[str]) -> None:
    with lease(path, False, said.append):
        path.unlink()
        left_by(path, "elsewhere", age_s=0)
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_driver_is_told_of_another_living_one(tmp_path: Path, said: list[str]) -> None:
    with another_process(PRESENCE, tmp_path) as other:
        assert anyone_present(tmp_path)
        with presence(tmp_path, said.append):
            (told,) = said
            assert f"process {other.pid} on {socket.gethostname()} works on this run too" in told
        assert anyone_present(tmp_path)


def test_a_killed_driver_is_forgotten(tmp_path: Path, said: list[str]) -> None:
    with another_process(PRESENCE, tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
    assert len(list(tmp_path.iterdir())) == 1
    assert not anyone_present(tmp_path)
    with presence(tmp_path, said.append):
        assert said == []
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_driver_on_another_host_is_there_as_long_as_its_heart_beats(tmp_path: Path, said: list[str]) -> None:
    left_by(tmp_path / "elsewhere-1.json", "elsewhere", age_s=50)
    assert anyone_present(tmp_path)
    left_by(tmp_path / "elsewhere-1.json", "elsewhere", age_s=61)
    assert not anyone_present(tmp_path)
    with presence(tmp_path, said.append):
        assert said == []


def test_nobody_is_present_where_nothing_ever_ran(tmp_path: Path) -> None:
    assert not anyone_present(tmp_path / "drivers")


def test_a_driver_that_arrives_is_never_seen_half_announced(tmp_path: Path) -> None:
    torn: list[str] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            for path in tmp_path.glob("*.json"):
                try:
                    text = path.read_text()
                except FileNotFoundError:
                    continue
                if not text.endswith("}"):
                    torn.append(text)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(150):
        with presence(tmp_path, lambda text: None):
            pass
    stop.set()
    thread.join()
    assert torn == []


def test_a_lease_that_somebody_took_over_says_so_before_anything_is_committed(path: Path) -> None:
    with lease(path, False, lambda text: None) as mine:
        mine.check()
        assert pickle.loads(pickle.dumps(mine)).is_held()
        left_by(path, "quicker", age_s=0)
        assert not mine.is_held()
        with pytest.raises(LeaseHeldError, match=r"taken over by process .* on quicker"):
            mine.check()


def test_a_lease_whose_holder_died_is_held_no_more(path: Path) -> None:
    with lease(path, False, lambda text: None) as mine:
        # It slept, and lives.
        os.utime(path, (0, 0))
        assert mine.is_held()
        gone = replace(mine.owner, started="1")
        path.write_text(json.dumps(asdict(gone)))
        assert not Lease(path, gone).is_held()
        path.unlink()
        assert not mine.is_held()
