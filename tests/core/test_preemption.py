import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from selfalign.core import preemption
from selfalign.core.errors import GateError, PreemptedError
from signals import handled


@pytest.fixture(autouse=True)
def _handled() -> Iterator[None]:
    with handled():
        yield


def ask(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_ends_work_that_cannot_save_itself_at_once(number: signal.Signals) -> None:
    with pytest.raises(PreemptedError, match=number.name):
        ask(number)


def deferring(*work: Callable[[], object]) -> None:
    with preemption.delivered():
        preemption.defer()
        for each in work:
            each()


def fail() -> None:
    raise GateError("no number")


def test_a_deferred_request_waits_until_the_work_is_done() -> None:
    seen: list[bool] = []
    with pytest.raises(PreemptedError, match="SIGTERM"):
        deferring(lambda: seen.append(preemption.asked()), ask, lambda: seen.append(preemption.asked()))
    assert seen == [False, True]
    with pytest.raises(PreemptedError):
        ask()


def test_the_keyboard_is_waited_for_once(capfd: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []
    interrupt = functools.partial(ask, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        deferring(interrupt, lambda: done.append("saved"))
    assert done == ["saved"]
    assert "interrupt again to end at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        deferring(interrupt, interrupt, lambda: done.append("not reached"))
    assert done == ["saved"]
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_nothing_is_deferred_where_nobody_would_deliver_it() -> None:
    preemption.defer()
    with pytest.raises(PreemptedError):
        ask()


def test_a_request_that_the_work_ended_for_is_told_once() -> None:
    with pytest.raises(PreemptedError):
        deferring(ask, preemption.deliver)
    deferring()


def test_an_error_of_the_work_is_told_and_later_requests_end_at_once() -> None:
    with pytest.raises(GateError):
        deferring(ask, fail)
    with pytest.raises(PreemptedError):
        ask()


def test_a_request_that_nobody_looks_at_ends_the_work_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "PATIENCE_S", 0.05)
    with pytest.raises(PreemptedError, match="last checkpoint"):
        deferring(ask, lambda: time.sleep(5))


def test_what_saves_already_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "PATIENCE_S", 0.05)
    saving = functools.partial(preemption.defer, looks=False)
    for work in ([saving, ask], [ask, saving]):
        with pytest.raises(PreemptedError, match="SIGTERM"):
            deferring(*work, lambda: time.sleep(0.1))


def test_whoever_has_looked_may_take_the_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "PATIENCE_S", 0.05)
    with pytest.raises(PreemptedError, match="SIGTERM"):
        deferring(ask, preemption.asked, lambda: time.sleep(0.1))


def ask_from_a_thread() -> None:
    thread = threading.Thread(target=preemption.ask, args=[signal.SIGTERM])
    thread.start()
    thread.join()


def test_a_request_from_another_thread_waits_like_a_deferred_one() -> None:
    done: list[bool] = []
    with pytest.raises(PreemptedError, match="SIGTERM"):
        deferring(ask_from_a_thread, lambda: done.append(preemption.asked()))
    assert done == [True]
    assert not preemption.asked()


def test_a_request_is_overlooked_until_somebody_looks() -> None:
    seen: list[bool] = []

    def look() -> None:
        seen.append(preemption.overlooked())

    with pytest.raises(PreemptedError):
        deferring(look, ask_from_a_thread, look, preemption.asked, look)
    look()
    assert seen == [False, True, False, False]


def test_a_second_request_is_overlooked_though_the_first_was_not() -> None:
    seen: list[bool] = []
    with pytest.raises(PreemptedError):
        deferring(ask, preemption.asked, ask, lambda: seen.append(preemption.overlooked()))
    assert seen == [True]


def test_what_saves_already_overlooks_nothing() -> None:
    seen: list[bool] = []
    saving = functools.partial(preemption.defer, looks=False)
    with pytest.raises(PreemptedError):
        deferring(saving, ask_from_a_thread, lambda: seen.append(preemption.overlooked()))
    assert seen == [False]


def test_a_build_ended_unsaved_is_told_how_much_it_lost_and_exits_as_preempted() -> None:
    error = preemption.unsaved()
    assert error.exit_code == 75
    assert "within 12 s, so that what came after the last checkpoint is lost" in str(error)
