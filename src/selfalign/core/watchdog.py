"""End a process whose work makes no progress: what hangs cannot be told to stop from inside."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from selfalign.core.errors import PreemptedError

# Code that holds the interpreter (a regular expression that never ends) keeps every thread of Python waiting, too. Then
# the process ends so much later, with 1, and its trace says where it was.
GRACE_S = 30.0


class Watchdog:
    """Watches pieces of work that should take about equally long.

    None may take more than twice as long as the longest so far, and less than `stall_s` is always allowed.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s, self._longest_s = stall_s, 0.0

    @contextmanager
    def watching(self, work: str) -> Iterator[None]:
        """End this process with exit code 75 when the block takes too long; `work` is said to have hung."""
        limit_s, started = max(self._stall_s, 2 * self._longest_s), time.monotonic()
        timer = threading.Timer(limit_s, _end, (work, limit_s))
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True, file=sys.__stderr__ or 2)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            timer.cancel()
            self._longest_s = max(self._longest_s, time.monotonic() - started)


def _end(work: str, limit_s: float) -> None:
    told = (
        f"selfalign: {work} made no progress for {limit_s / 60:.3g} min (resources.stall_minutes), so that its process "
        "ends; it is tried again, and what hangs a third time is set aside\n"
    )
    # Through nothing that could be locked by what hangs.
    os.write(2, told.encode())
    os._exit(PreemptedError.exit_code)
