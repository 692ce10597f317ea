"""One builder at a time, and no dead one for long."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from s3 import S3
from selfalign.core import lease as module
from selfalign.core import locations
from selfalign.core.errors import LeaseHeldError, ServiceError
from selfalign.core.lease import Lease, Owner, anyone_present, lease, presence
from selfalign.core.locations import Location, entries

HOLD = """
import sys, time
from selfalign.core.lease import lease, presence
from selfalign.core.locations import located
with {what}(located(sys.argv[1]), {more}print):
    print("held", flush=True)
    sys.stdin.read()
"""
LEASE, PRESENCE = HOLD.format(what="lease", more="False, "), HOLD.format(what="presence", more="")


@contextmanager
def another_process(code: str, folder: Location) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", code, str(folder)]
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
def folder(place: Location) -> Location:
    return place / "train-0123"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting takes hundredths of a second."""
    sleep = time.sleep
    monkeypatch.setattr("selfalign.core.lease.time.sleep", lambda seconds: sleep(seconds / 100))


Aged = Callable[[Location, float], None]


@pytest.fixture
def aged(request: pytest.FixtureRequest) -> Aged:
    """Makes a file look as if it were written so many seconds ago."""

    def age(path: Location, age_s: float) -> None:
        if isinstance(path, Path):
            os.utime(path, (time.time() - age_s,) * 2)
        else:
            store: S3 = request.getfixturevalue("s3")
            store.age(path, age_s)

    return age


def left_by(path: Location, host: str, pid: int = 1, space: str | None = None) -> None:
    owner = Owner(host, pid, "1", "other", Owner.this_process().space if space is None else space)
    locations.replace(path, json.dumps(asdict(owner)).encode())


def numbered(folder: Location, number: int) -> Location:
    return folder / f"lease-{number:06d}.json"


def leases(folder: Location) -> dict[str, Any]:
    return {path.name: json.loads(locations.read(path)).get("host") for path in entries(folder, "*")}


ME = socket.gethostname()


def test_while_it_is_held_the_file_names_the_holder_and_afterwards_it_is_given_back(
    folder: Location, said: list[str]
) -> None:
    with lease(folder, False, said.append) as me:
        assert json.loads(locations.read(me.path))["token"] == me.owner.token
        assert (me.owner.host, me.owner.pid) == (ME, os.getpid())
        assert leases(folder) == {"lease-000001.json": ME}
    assert leases(folder) == {"lease-000001.json": None}
    with lease(folder, False, said.append):
        assert leases(folder) == {"lease-000002.json": ME}
    assert said == []


def test_a_lease_is_given_back_when_the_work_fails(folder: Location, said: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), lease(folder, False, said.append):
        raise ZeroDivisionError
    assert leases(folder) == {"lease-000001.json": None}


def test_a_second_comer_that_will_not_wait_is_told_who_holds_it(folder: Location, said: list[str]) -> None:
    with another_process(LEASE, folder) as holder:
        who = f"train-0123 is being built by process {holder.pid} on {re.escape(ME)}, last sign of"
        with pytest.raises(LeaseHeldError, match=who) as caught, lease(folder, False, said.append):
            pytest.fail("two held it")
    assert caught.value.exit_code == 4
    assert leases(folder) == {"lease-000001.json": ME}


def test_a_second_comer_waits_says_so_once_and_then_has_it(folder: Location, said: list[str], quick: None) -> None:
    order: list[str] = []
    held, enough = threading.Event(), threading.Event()

    def first() -> None:
        with lease(folder, False, said.append):
            held.set()
            enough.wait(30)
            order.append("first leaves")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait(30)

    def told(text: str) -> None:
        said.append(text)
        # It looks more than once before the first has left.
        threading.Timer(0.2, enough.set).start()

    with lease(folder, True, told):
        order.append("second enters")
    thread.join()
    assert order == ["first leaves", "second enters"]
    assert len(said) == 1
    assert "waiting for it" in said[0]


def test_a_killed_process_of_this_host_is_followed_at_once(folder: Location, said: list[str]) -> None:
    with another_process(LEASE, folder) as holder:
        holder.kill()
        holder.wait()
    with lease(folder, False, said.append) as me:
        assert json.loads(locations.read(me.path))["token"] == me.owner.token
    assert said == []


def test_a_killed_process_that_nobody_has_waited_for_is_dead_too(folder: Location, said: list[str]) -> None:
    with another_process(LEASE, folder) as holder:
        holder.kill()
        # Collected by nobody, it stays behind as a zombie.
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        with lease(folder, False, said.append):
            assert said == []


def test_a_process_number_that_was_given_out_again_is_not_the_holder(folder: Location, said: list[str]) -> None:
    left_by(numbered(folder, 1), ME, pid=os.getpid())
    with lease(folder, False, said.append):
        assert said == []


def test_a_process_of_another_container_with_this_hosts_name_is_believed_alive(
    folder: Location, said: list[str]
) -> None:
    left_by(numbered(folder, 1), ME, space="pid:[1]")
    with pytest.raises(LeaseHeldError, match=f"process 1 on {ME}"), lease(folder, False, said.append):
        pass


@pytest.mark.parametrize("age_s", [0, 50])
def test_a_process_of_another_host_is_believed_alive_for_a_minute(
    folder: Location, said: list[str], aged: Aged, age_s: int
) -> None:
    left_by(numbered(folder, 7), "elsewhere")
    aged(numbered(folder, 7), age_s)
    with (
        pytest.raises(LeaseHeldError, match=r"process 1 on elsewhere, last sign of life \d+ s ago") as caught,
        lease(folder, False, said.append),
    ):
        pytest.fail("two held it")
    told_s = int(str(caught.value).split(" s ago")[0].rpartition(" ")[2])
    assert age_s <= told_s < age_s + 10
    assert leases(folder) == {"lease-000007.json": "elsewhere"}


def test_a_process_of_another_host_is_followed_after_a_minute_without_a_heartbeat(
    folder: Location, said: list[str], aged: Aged
) -> None:
    left_by(numbered(folder, 7), "elsewhere")
    aged(numbered(folder, 7), 61)
    with lease(folder, False, said.append):
        assert leases(folder) == {"lease-000008.json": ME}


def test_whoever_waits_has_it_as_soon_as_the_heartbeat_is_a_minute_old(
    folder: Location, said: list[str], aged: Aged, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(numbered(folder, 1), "elsewhere")
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        aged(numbered(folder, 1), 19 * len(naps))

    monkeypatch.setattr("selfalign.core.lease.time.sleep", nap)
    with lease(folder, True, said.append):
        assert len(naps) == 4


def test_a_lease_that_cannot_be_read_is_nobodys(folder: Location, said: list[str]) -> None:
    locations.replace(numbered(folder, 1), b'{"host": "else')
    with lease(folder, False, said.append):
        assert leases(folder) == {"lease-000002.json": ME}


def test_of_many_who_find_a_dead_holder_one_at_a_time_gets_it(folder: Location, aged: Aged, quick: None) -> None:
    inside, worst, turns = [0], [0], []
    guard, start = threading.Lock(), threading.Barrier(8)

    def comer() -> None:
        start.wait()
        with lease(folder, True, lambda text: None) as me:
            with guard:
                inside[0] += 1
                worst[0] = max(worst[0], inside[0])
            time.sleep(0.002)
            turns.append(me.path.name)
            with guard:
                inside[0] -= 1

    left_by(numbered(folder, 1), "elsewhere")
    aged(numbered(folder, 1), 100)
    threads = [threading.Thread(target=comer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert worst[0] == 1
    assert turns == [f"lease-{number:06d}.json" for number in range(2, 10)]
    assert leases(folder) == {"lease-000009.json": None}


def before_the_claim(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    claim = module._claim

    def late(path: Location, me: Owner) -> bool:
        monkeypatch.setattr(module, "_claim", claim)
        happens()
        return claim(path, me)

    monkeypatch.setattr(module, "_claim", late)


def test_a_claim_made_between_the_look_and_ones_own_stands(
    folder: Location, said: list[str], aged: Aged, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(numbered(folder, 1), "elsewhere")
    aged(numbered(folder, 1), 100)
    before_the_claim(monkeypatch, lambda: left_by(numbered(folder, 2), "quicker"))
    with pytest.raises(LeaseHeldError, match="on quicker"), lease(folder, False, said.append):
        pytest.fail("two held it")
    assert leases(folder)["lease-000002.json"] == "quicker"


@pytest.mark.parametrize("found", [0, 1], ids=["nobody", "a dead one"])
def test_whoever_looked_before_another_came_and_went_looks_again(
    folder: Location, said: list[str], aged: Aged, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if found:
        left_by(numbered(folder, 1), "elsewhere")
        aged(numbered(folder, 1), 100)

    def comes_and_goes() -> None:
        with lease(folder, False, said.append):
            pass

    before_the_claim(monkeypatch, comes_and_goes)
    with lease(folder, False, said.append):
        assert leases(folder) == {f"lease-{found + 2:06d}.json": ME}


def test_one_who_waited_for_long_is_alive_from_the_moment_it_has_it(
    folder: Location, said: list[str], aged: Aged, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(numbered(folder, 1), "elsewhere")
    monkeypatch.setattr("selfalign.core.lease.time.sleep", lambda seconds: aged(numbered(folder, 1), 3600))
    with lease(folder, True, said.append) as mine:
        assert time.time() - mine.path.stat().st_mtime < 30


def test_the_heartbeat_goes_on_while_the_work_does_even_past_a_moment_without_the_file(
    folder: Location, said: list[str], aged: Aged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    with lease(folder, False, said.append) as mine:
        for _ in range(2):
            data = locations.read(mine.path)
            mine.path.unlink()
            time.sleep(0.05)
            locations.replace(mine.path, data)
            aged(mine.path, 3600)
            deadline = time.monotonic() + 20
            while time.time() - mine.path.stat().st_mtime > 1800:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            assert json.loads(locations.read(mine.path))["token"] == mine.owner.token


def test_a_late_heartbeat_never_brings_a_lease_back_that_was_given_back(
    folder: Location, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    beating, touch = threading.Event(), locations.touch

    def slow(path: Location) -> None:
        data = locations.read(path)
        beating.set()
        time.sleep(0.3)
        # As in an object store, where a sign of life is the same content once more.
        locations.replace(path, data)

    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(module, "touch", slow)
    with lease(folder, False, said.append) as mine:
        assert beating.wait(30)
    assert leases(folder) == {mine.path.name: None}
    monkeypatch.setattr(module, "touch", touch)
    with lease(folder, False, said.append):
        pass


def taken_over(mine: Lease, aged: Aged) -> Iterator[None]:
    """While somebody else holds it, who found the holder silent, and afterwards."""
    aged(mine.path, 100)
    with lease(mine.path.parent, False, print):
        yield
    yield


def test_whoever_was_passed_over_sees_it_even_after_the_follower_has_ended(folder: Location, aged: Aged) -> None:
    with lease(folder, False, print) as mine:
        mine.check()
        assert pickle.loads(pickle.dumps(mine)).is_held()
        told = []
        for _ in taken_over(mine, aged):
            assert not mine.is_held()
            with pytest.raises(LeaseHeldError, match="train-0123 was taken over by") as caught:
                mine.check()
            told.append(str(caught.value))
    assert f"by process {os.getpid()} on {ME} while" in told[0]
    assert "by somebody while" in told[1]


def test_a_last_beat_of_whoever_was_passed_over_changes_nothing(folder: Location, aged: Aged) -> None:
    with lease(folder, False, print) as mine:
        for _ in taken_over(mine, aged):
            with suppress(FileNotFoundError):
                locations.touch(mine.path)
        assert leases(folder) == {"lease-000002.json": None}
        # What it read before the follower came, it may write afterwards.
        locations.replace(mine.path, json.dumps(asdict(mine.owner)).encode())
        with lease(folder, False, print):
            assert leases(folder) == {"lease-000003.json": ME}


def test_whoever_was_passed_over_leaves_its_followers_lease_alone(folder: Location, said: list[str]) -> None:
    with lease(folder, False, said.append) as mine:
        mine.path.unlink()
        left_by(numbered(folder, 2), "elsewhere")
    assert leases(folder)["lease-000002.json"] == "elsewhere"
    with pytest.raises(LeaseHeldError, match="on elsewhere"), lease(folder, False, said.append):
        pytest.fail("two held it")


def test_a_lease_whose_holder_died_is_held_no_more(folder: Location, aged: Aged) -> None:
    with lease(folder, False, lambda text: None) as mine:
        # It slept, and lives.
        aged(mine.path, 3600)
        assert mine.is_held()
        gone = replace(mine.owner, started="1")
        locations.replace(mine.path, json.dumps(asdict(gone)).encode())
        assert not Lease(mine.path, gone).is_held()
        mine.path.unlink()
        assert not mine.is_held()


def test_a_claim_whose_answer_was_lost_is_ones_own(s3: S3, said: list[str]) -> None:
    folder = s3.folder()
    assert entries(folder, "*") == []
    # The look, and then the claim.
    s3.fail("broken", after=1, lasts=1)
    with lease(folder, False, said.append):
        assert leases(folder) == {"lease-000001.json": ME}


@pytest.mark.parametrize("requests", [0, 1, 2])
def test_a_store_that_is_away_says_nothing_about_the_holder(
    s3: S3, said: list[str], impatient: None, requests: int
) -> None:
    folder = s3.folder()
    left_by(numbered(folder, 1), "elsewhere")
    held = Lease(numbered(folder, 1), Owner("elsewhere", 1, "1", "other", Owner.this_process().space))
    s3.fail("unavailable", after=requests)
    with pytest.raises(ServiceError, match="object store"), lease(folder, True, said.append):
        pytest.fail("two held it")
    s3.fail("unavailable", after=requests)
    with pytest.raises(ServiceError, match="object store"):
        held.is_held()
    s3.mend()
    assert held.is_held()
    assert leases(folder) == {"lease-000001.json": "elsewhere"}


def test_a_driver_is_told_of_another_living_one(place: Location, said: list[str]) -> None:
    with another_process(PRESENCE, place) as other:
        assert anyone_present(place)
        with presence(place, said.append):
            (told,) = said
            assert f"process {other.pid} on {socket.gethostname()} works on this run too" in told
        assert anyone_present(place)


def test_a_killed_driver_is_forgotten(place: Location, said: list[str]) -> None:
    with another_process(PRESENCE, place):
        assert len(entries(place, "*")) == 1
    assert len(entries(place, "*")) == 1
    assert not anyone_present(place)
    with presence(place, said.append):
        assert said == []
        assert len(entries(place, "*")) == 1
    assert entries(place, "*") == []


def test_a_driver_on_another_host_is_there_as_long_as_its_heart_beats(
    place: Location, said: list[str], aged: Aged
) -> None:
    path = place / "elsewhere-1.json"
    left_by(path, "elsewhere")
    aged(path, 50)
    assert anyone_present(place)
    aged(path, 61)
    assert not anyone_present(place)
    with presence(place, said.append):
        assert said == []


def test_nobody_is_present_where_nothing_ever_ran(place: Location) -> None:
    assert not anyone_present(place / "drivers")


def test_a_driver_that_arrives_is_never_seen_half_announced(place: Location) -> None:
    torn: list[bytes] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            for path in entries(place, "*.json"):
                try:
                    text = locations.read(path)
                except FileNotFoundError:
                    continue
                if not text.endswith(b"}"):
                    torn.append(text)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(150 if isinstance(place, Path) else 20):
        with presence(place, lambda text: None):
            pass
    stop.set()
    thread.join()
    assert torn == []


def test_a_driver_that_was_taken_for_dead_is_announced_again(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    with presence(tmp_path, said.append) as mine:
        assert isinstance(mine, Path)
        mine.unlink()
        deadline = time.monotonic() + 10
        while not anyone_present(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert anyone_present(tmp_path)
