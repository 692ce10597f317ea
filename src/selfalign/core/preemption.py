"""A request to end, a cluster's (SIGTERM, SIGUSR1) or the keyboard's: at once, or as soon as the work is saved."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from selfalign.core.errors import PreemptedError

PATIENCE_S = 12.0
"""How long a request waits for somebody to look. A cluster gives half a minute or so, and saving takes its part."""

_asked: int | None = None
_delivers = False
_deferred = False
_looks = True


def handle() -> None:
    """Turn the signals into PreemptedError in this process's main thread, where the caller must be.

    The keyboard's stays KeyboardInterrupt, and raises it at once when it comes a second time.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _received)
    signal.signal(signal.SIGALRM, _nobody_looked)


def defer(looks: bool = True) -> None:
    """From now on a request waits: whoever calls this looks at `asked` every few seconds, saves, and ends.

    `looks` is false for what saves already: it ends by itself, and may take its time. Outside of `delivered` nothing
    waits, since nobody would deliver it.
    """
    global _deferred, _looks
    _deferred, _looks = _delivers, looks
    if not looks or _asked is not None:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S if looks else 0)


def asked() -> bool:
    """Whether a request waits. Whoever is told so has all the time that the cluster gives."""
    if _asked is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _asked is not None


def deliver() -> None:
    """Raise PreemptedError for a request that waits. From now on none waits any more."""
    global _deferred
    # First: what comes after it is raised where it comes.
    _deferred = False
    number = _asked
    _forget()
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
        _forget()
        raise
    finally:
        _delivers = False
    deliver()


def _forget() -> None:
    global _asked, _deferred
    _deferred = False
    if _asked is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _asked = None


def _received(number: int, _: FrameType | None) -> None:
    global _asked
    again = number == signal.SIGINT and _asked is not None
    if again or not _deferred:
        raise _error(number)
    if number == signal.SIGINT:
        os.write(2, b"\nselfalign: saving; interrupt again to end at once\n")
    elif _asked is None and _looks:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
    _asked = number


def _nobody_looked(_: int, __: FrameType | None) -> None:
    raise PreemptedError(
        f"stopped; the step under way did not end within {PATIENCE_S:.0f} s, so that what came after the last "
        "checkpoint is lost (save_steps); the same command goes on from there"
    )


def _error(number: int) -> PreemptedError | KeyboardInterrupt:
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    return PreemptedError(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
