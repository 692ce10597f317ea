"""Who is at work on an artifact: a lease with a heartbeat, kept as a file beside it."""

import fcntl
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

from selfalign.core.errors import LeaseHeldError
from selfalign.core.store import replace

HEARTBEAT_S = 5.0
STALE_S = 60.0


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with the same number by its start time."""

    host: str
    pid: int
    started: str
    token: str

    @staticmethod
    def this_process() -> "Owner":
        """This process, with a fresh token."""
        return Owner(socket.gethostname(), os.getpid(), _start_time(os.getpid()) or "", uuid.uuid4().hex[:12])

    def is_dead(self) -> bool:
        """Whether the process is known to have ended; False where it cannot be known (another host)."""
        # Where the system tells no start times, only the heartbeat can say.
        known = self.started and self.host == socket.gethostname()
        return bool(known) and _start_time(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


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

    path: Path
    owner: Owner

    def is_held(self) -> bool:
        """Whether it is still the owner's, and the owner not known to be dead. It may have slept for a while."""
        holder, _ = _holder(self.path)
        return holder == self.owner and not self.owner.is_dead()

    def check(self) -> None:
        """Raise LeaseHeldError where somebody else has taken over: nothing may be committed any more."""
        holder, _ = _holder(self.path)
        if holder != self.owner:
            raise LeaseHeldError(
                f"{self.path.parent.name} was taken over by {holder or 'somebody'} while this process gave no sign of "
                "life; run again to use what they build"
            )


@contextmanager
def lease(path: Path, wait: bool, say: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lease at `path` while the block runs.

    Where somebody else holds it, says who, then waits (or raises LeaseHeldError when `wait` is false). Takes
    over at once from a dead process of this host, after 60 s without a heartbeat from any other.
    """
    me = Owner.this_process()
    draft = path.with_name(f".{path.name}.{me.token}")
    draft.write_text(json.dumps(asdict(me)))
    told = False
    try:
        while not _claim(draft, path):
            holder, age_s = _holder(path)
            if _abandoned(holder, age_s):
                _evict(path)
                continue
            message = f"{path.parent.name} is being built by {holder}, last sign of life {age_s:.0f} s ago"
            if not wait:
                raise LeaseHeldError(message)
            if not told:
                say(message + "; waiting for it")
                told = True
            time.sleep(1)
    finally:
        draft.unlink(missing_ok=True)
    with heartbeat(path):
        try:
            yield Lease(path, me)
        finally:
            holder, _ = _holder(path)
            if holder == me:
                path.unlink(missing_ok=True)


@contextmanager
def heartbeat(path: Path) -> Iterator[None]:
    """Touch `path` every few seconds while the block runs."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            # A beat may fail, on a network file system say; the next one counts.
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def presence(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Announce this driver in `folder` while the block runs, and say which other living ones are there."""
    folder.mkdir(parents=True, exist_ok=True)
    me = Owner.this_process()
    for path in sorted(folder.glob("*.json")):
        other, age_s = _holder(path)
        if _abandoned(other, age_s):
            path.unlink(missing_ok=True)
        else:
            say(f"{other} works on this run too, last sign of life {age_s:.0f} s ago; the first commit wins")
    mine = folder / f"{me.host}-{me.pid}.json"
    # Whole at once: what cannot be read counts as dead.
    replace(mine, json.dumps(asdict(me)).encode())
    try:
        with heartbeat(mine):
            yield
    finally:
        mine.unlink(missing_ok=True)


def anyone_present(folder: Path) -> bool:
    """Whether a living driver has announced itself in `folder`."""
    return not all(_abandoned(*_holder(path)) for path in folder.glob("*.json"))


def _claim(draft: Path, path: Path) -> bool:
    # Before the link: however long this one has waited, whoever looks next must see a sign of life.
    os.utime(draft)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    return True


def _holder(path: Path) -> tuple[Owner | None, float]:
    try:
        return _owner(path.read_bytes()), time.time() - path.stat().st_mtime
    except OSError:
        return None, 0.0


def _owner(data: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(data))
    except (ValueError, TypeError):
        return None


def _abandoned(holder: Owner | None, age_s: float) -> bool:
    return holder is None or holder.is_dead() or age_s > STALE_S


def _evict(path: Path) -> None:
    """Remove an abandoned lease; leave alone what somebody has claimed since the caller looked."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        # Of several who evict, one at a time looks again and removes, and the others find another file or none.
        # A file system without locks leaves a moment in which two could.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        # What is looked at is the open file, which nobody but whoever has the lock removes when it is abandoned: by its
        # name it could be gone by now, and the name be somebody else's.
        seen = os.fstat(file.fileno())
        if os.path.samestat(seen, path.stat()) and _abandoned(_owner(file.read()), time.time() - seen.st_mtime):
            path.unlink()
