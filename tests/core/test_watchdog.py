"""Work that hangs ends its process, whatever it does meanwhile; work that goes on is left alone."""

import subprocess
import sys
import time

import pytest

from selfalign.core.watchdog import Watchdog

HANG = """
import re, sys, time
from selfalign.core import watchdog
watchdog.GRACE_S = 1.0
with watchdog.Watchdog(0.5).watching("toy, shard 3, row d7"):
    {what}
"""
SLEEP, HOLD = "time.sleep(600)", "re.match('(a+)+b', 'a' * 60)"


def hang(what: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", HANG.format(what=what)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_what_hangs_is_named_and_ends_its_process_resumably() -> None:
    ended = hang(SLEEP)
    assert ended.returncode == 75
    assert "toy, shard 3, row d7 made no progress for 0.00833 min (resources.stall_minutes)" in ended.stderr


def test_what_holds_the_interpreter_ends_too_and_shows_where_it_was() -> None:
    ended = hang(HOLD)
    assert ended.returncode == 1
    assert "in match" in ended.stderr


def test_work_that_ends_in_time_is_left_alone() -> None:
    watchdog = Watchdog(0.3)
    for _ in range(3):
        with watchdog.watching("quick"):
            time.sleep(0.01)
    # Nothing is left that would end this process.
    time.sleep(0.5)


def test_twice_the_longest_before_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    class Timer:
        def __init__(self, limit_s: float, *_: object) -> None:
            limits.append(limit_s)

        def start(self) -> None: ...

        def cancel(self) -> None: ...

    monkeypatch.setattr("selfalign.core.watchdog.threading.Timer", Timer)
    watchdog = Watchdog(0.1)
    for seconds in (0.2, 0.0, 0.0):
        with watchdog.watching("work"):
            time.sleep(seconds)
    assert limits[0] == 0.1
    assert limits[1] == limits[2] >= 0.4
