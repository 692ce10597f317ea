"""Signals in a test's own process."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from selfalign.core import preemption


@contextmanager
def handled() -> Iterator[None]:
    """Requests to end are handled as the command line handles them, and afterwards as before."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    preemption.handle()
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
