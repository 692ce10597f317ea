"""For benchmarks of whole runs: a backend, and what it takes with all of its processes."""

import os
from contextlib import suppress
from pathlib import Path

from selfalign.core.protocols import Backend

_TICKS = os.sysconf("SC_CLK_TCK")


def backend(name: str) -> Backend:
    """The backend called `name`. Ray's starts a cluster of this machine, which ends when it is closed."""
    if name == "local":
        from selfalign.backends.local import LocalBackend

        return LocalBackend()
    os.environ.pop("RAY_ADDRESS", None)
    # Workers find the benchmarks' own stages beside this file.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    from selfalign.backends.ray import RayBackend

    return RayBackend()


class Spending:
    """CPU-seconds, the system's included, of this process and of all that came of it since this was made.

    What a process took between the last `look` at it and its end is missed: a cluster's workers are killed unseen.
    """

    def __init__(self) -> None:
        self._used: dict[int, float] = {}
        self._before = 0.0
        self._before = self.look()

    def look(self) -> float:
        """The sum now."""
        for pid in _family():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                self._used[pid] = (int(fields[11]) + int(fields[12])) / _TICKS
        return sum(self._used.values()) - self._before


def _family() -> list[int]:
    """This process, its children, theirs, and so on."""
    found = [os.getpid()]
    for pid in found:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, path.read_text().split())
    return found
