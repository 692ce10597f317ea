"""A request to end, a cluster's (SIGTERM, SIGUSR1) or the keyboard's: at once, or as soon as the work is saved."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from selfalign.core.errors import PreemptedError

PATIENCE_S = 12.0
"""How long a request waits for somebody to look. A cluster gives half a minute or so, and saving takes its part."""
SAVE_S = 300
"""How long a build in other processes that was asked to end may save. A cluster may have less patience."""
LOOK_S = 0.2
"""How often a driver looks whether it was asked, while others work."""

_asked: int | None = None
_delivers = False
_deferred = False
_looks = True
_looked = False
_ending = False


def handle() -> None:
    """Turn the signals into PreemptedError in this process's main thread, where the caller must be.

    The keyboard's stays KeyboardInterrupt, and raises it at once when it comes a second time.
    """
    global _ending
    _ending = False
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _received)
    signal.signal(signal.SIGALRM, _nobody_looked)


def ask(number: int) -> None:
    """Ask this process in the name of the signal `number`, from any thread, where signals are not ours to handle.

    The request waits until somebody looks, or until the work is done: nothing can be raised in another thread.
    """
    global _asked, _looked
    _asked, _looked = number, False


def overlooked() -> bool:
    """Whether a request waits that nobody has looked at, and nothing is being saved."""
    return _asked is not None and _looks and not _looked


def defer(looks: bool = True) -> None:
    """From now on a request waits: whoever calls this looks at `asked` every few seconds, saves, and ends.

    `looks` is false for what saves already: it ends by itself, and may take its time. Outside of `delivered` nothing
    waits, since nobody would deliver it.
    """
    global _deferred, _looks
    _deferred, _looks = _delivers, looks
    if not looks or _asked is not None:
        _alarm(PATIENCE_S if looks else 0)


def asked() -> bool:
    """Whether a request waits. Whoever is told so has all the time that the cluster gives."""
    global _looked
    if _asked is not None:
        _looked = True
        _alarm(0)
    return _asked is not None


def deliver() -> None:
    """Raise PreemptedError for a request that waits. From now on none waits any more."""
    global _deferred
    # First: what comes after it is raised where it comes.
    _deferred = False
    number = _asked
    forget()
    if number is not None:
        raise _error(number)


@contextmanager
def delivered() -> Iterator[None]:
    """Around work that may defer requests: one that still waits when it is done is delivered then."""
    global _delivers
    _delivers = True
    try:
        yield
    except BaseException:
        forget()
        raise
    finally:
        _delivers = False
    deliver()


def is_ending() -> bool:
    """Whether this process obeys a request to end, so that it must not wait for long any more."""
    return _ending


def forget() -> None:
    """Drop a request that waits: somebody else obeys it."""
    global _asked, _deferred
    _deferred = False
    if _asked is not None:
        _alarm(0)
    _asked = None


def _alarm(seconds: float) -> None:
    # Where it is not ours to handle, it would end the process.
    if signal.getsignal(signal.SIGALRM) is _nobody_looked:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _received(number: int, _: FrameType | None) -> None:
    again = number == signal.SIGINT and _asked is not None
    if again or not _deferred:
        raise _error(number)
    if number == signal.SIGINT:
        os.write(2, b"\nselfalign: saving; interrupt again to end at once\n")
    elif _asked is None and _looks:
        _alarm(PATIENCE_S)
    ask(number)


def unsaved() -> PreemptedError:
    """What ends a process that is asked and does not look."""
    return PreemptedError(
        f"stopped; the step under way did not end within {PATIENCE_S:.0f} s, so that what came after the last "
        "checkpoint is lost (save_steps); the same command goes on from there"
    )


def _nobody_looked(_: int, __: FrameType | None) -> None:
    global _ending
    _ending = True
    raise unsaved()


def _error(number: int) -> PreemptedError | KeyboardInterrupt:
    global _ending
    _ending = True
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    return PreemptedError(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
