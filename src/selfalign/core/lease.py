"""Who is at work on an artifact: a lease with a heartbeat, kept as a file beside it."""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from selfalign.core.errors import LeaseHeldError, SelfalignError, StoreAwayError
from selfalign.core.locations import Location, commit, entries, reachable, read, replace, touch

HEARTBEAT_S = 5.0
STALE_S = 60.0


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with the same number by its start time.

    `space` is that of its number, which means another process in another container.
    """

    host: str
    pid: int
    started: str
    token: str
    space: str = ""

    @staticmethod
    def this_process() -> "Owner":
        """This process, with a fresh token."""
        pid = os.getpid()
        return Owner(socket.gethostname(), pid, _start_time(pid) or "", uuid.uuid4().hex[:12], _space())

    def is_dead(self) -> bool:
        """Whether the process is known to have ended; False where it cannot be known (another host or container)."""
        # Where the system tells no start times, only the heartbeat can say.
        known = self.started and (self.host, self.space) == (socket.gethostname(), _space())
        return bool(known) and _start_time(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _space() -> str:
    """Who sees the same process numbers: containers of one host may share its name, and number on their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else fields[19]


@dataclass(frozen=True)
class Lease:
    """The right to build one artifact, as `owner` took it. Travels by pickle to the processes that build for it."""

    path: Location
    owner: Owner

    def is_held(self) -> bool:
        """Whether it is still the owner's, and the owner not known to be dead. It may have slept for a while."""
        return self._holder() == self.owner and not self.owner.is_dead()

    def check(self) -> None:
        """Raise LeaseHeldError where somebody else has taken over: nothing may be committed any more."""
        holder = self._holder()
        if holder != self.owner:
            raise LeaseHeldError(
                f"{self.path.parent.name} was taken over by {holder or 'somebody'} while this process gave no sign of "
                "life; run again to use what they build"
            )

    def _holder(self) -> Owner | None:
        newest = _newest(self.path.parent)
        return None if newest is None else _holder(newest)[0]


@contextmanager
def lease(folder: Location, wait: bool, say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lease of `folder` while the block runs.

    Where somebody else holds it, says who, then waits (or raises LeaseHeldError when `wait` is false). Takes
    over at once from a dead process of this host, after 60 s without a heartbeat from any other.

    Each holder has a file with a number of its own, created once and written by nobody else; whose number is the
    highest holds the lease. So nothing is taken away from under anybody, and whoever was passed over sees it.
    """
    me = Owner.this_process()
    while not _claim(mine := _free(folder, wait, say), me):
        pass
    # The last number stays, given back: it must not be taken by one who looked before. After the last beat, which would
    # bring it to life again.
    with _then(lambda: replace(mine, b"{}")), heartbeat(lambda: touch(mine), HEARTBEAT_S):
        yield Lease(mine, me)


def _free(folder: Location, wait: bool, say: Callable[[str], None]) -> Location:
    """The next number's path, as soon as nobody living has the one before."""
    told = False
    while (newest := _newest(folder)) is not None:
        holder, age_s = _holder(newest)
        if is_abandoned(holder, age_s):
            return folder / f"lease-{_number(newest) + 1:06d}.json"
        message = f"{folder.name} is being built by {holder}, last sign of life {age_s:.0f} s ago"
        if not wait:
            raise LeaseHeldError(message)
        if not told:
            say(message + "; waiting for it")
            told = True
        time.sleep(1)
    return folder / f"lease-{1:06d}.json"


def _claim(path: Location, me: Owner) -> bool:
    if not commit(path, json.dumps(asdict(me)).encode()):
        return False
    for older in entries(path.parent, "lease-*.json"):
        if _number(older) < _number(path):
            older.unlink(missing_ok=True)
    return True


def _newest(folder: Location) -> Location | None:
    return max(entries(folder, "lease-*.json"), key=_number, default=None)


def _number(path: Location) -> int:
    return int(path.name.removeprefix("lease-").removesuffix(".json"))


@contextmanager
def heartbeat(beat: Callable[[], None], every_s: float) -> Iterator[None]:
    """Give a sign of life every so many seconds while the block runs."""
    done = threading.Event()

    def beats() -> None:
        while not done.wait(every_s):
            # A beat may fail, on a network file system say; the next one counts.
            with suppress(OSError, SelfalignError):
                beat()

    thread = threading.Thread(target=beats, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _then(tidy: Callable[[], object]) -> Iterator[None]:
    """Tidy up when the block ends, but in a store that is away: it would be waited for once more."""
    try:
        yield
    except StoreAwayError:
        raise
    except BaseException:
        tidy()
        raise
    tidy()


@contextmanager
def presence(folder: Location, say: Callable[[str], None]) -> Iterator[Location]:
    """Announce this driver by a file in `folder` while the block runs, and say which other living ones are there."""
    me = Owner.this_process()
    for path in entries(folder, "*.json"):
        other, age_s = _holder(path)
        if is_abandoned(other, age_s):
            path.unlink(missing_ok=True)
        else:
            say(f"{other} works on this run too, last sign of life {age_s:.0f} s ago; the first commit wins")
    mine = folder / f"{me.host}-{me.pid}-{me.token}.json"

    def announce() -> None:
        # Whole at once: what cannot be read counts as dead. Written anew each time, since somebody may have found it
        # too old, after a night's sleep say, and removed it.
        replace(mine, json.dumps(asdict(me)).encode())

    announce()
    with _then(lambda: mine.unlink(missing_ok=True)), heartbeat(announce, HEARTBEAT_S):
        yield mine


def anyone_present(folder: Location) -> bool:
    """Whether a living driver has announced itself in `folder`."""
    return not all(is_abandoned(*_holder(path)) for path in entries(folder, "*.json"))


@reachable()
def _holder(path: Location) -> tuple[Owner | None, float]:
    try:
        return _owner(read(path)), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None, 0.0


def _owner(data: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        return None


def is_abandoned(holder: Owner | None, age_s: float) -> bool:
    """Whether nobody living is meant: whoever cannot be asked is taken for dead after 60 s without a sign of life."""
    return holder is None or holder.is_dead() or age_s > STALE_S
