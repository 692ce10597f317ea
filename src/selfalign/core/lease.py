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

from selfalign.core.errors import LeaseHeldError

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
        return self.host == socket.gethostname() and _start_time(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _start_time(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] == "Z" else fields[19]


@contextmanager
def lease(path: Path, wait: bool, say: Callable[[str], None]) -> Iterator[Owner]:
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
            if holder is None or holder.is_dead() or age_s > STALE_S:
                _evict(path, holder, me.token)
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
            yield me
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
            if path.exists():
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
        if other is None or other.is_dead() or age_s > STALE_S:
            path.unlink(missing_ok=True)
        else:
            say(f"{other} works on this run too, last sign of life {age_s:.0f} s ago; the first commit wins")
    mine = folder / f"{me.host}-{me.pid}.json"
    mine.write_text(json.dumps(asdict(me)))
    try:
        with heartbeat(mine):
            yield
    finally:
        mine.unlink(missing_ok=True)


def anyone_present(folder: Path) -> bool:
    """Whether a living driver has announced itself in `folder`."""
    holders = (_holder(path) for path in folder.glob("*.json"))
    return any(owner is not None and not owner.is_dead() and age_s <= STALE_S for owner, age_s in holders)


def _claim(draft: Path, path: Path) -> bool:
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    os.utime(path)
    return True


def _holder(path: Path) -> tuple[Owner | None, float]:
    try:
        return Owner(**json.loads(path.read_text())), time.time() - path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None, 0.0


def _evict(path: Path, holder: Owner | None, token: str) -> None:
    # Renaming first: of two who evict, one gets the file and the other an error.
    grave = path.with_name(f".{path.name}.evicted.{token}")
    try:
        os.rename(path, grave)
    except FileNotFoundError:
        return
    evicted, _ = _holder(grave)
    if evicted != holder:
        # Somebody claimed it between the look and the rename: give it back, unless a third is there already.
        with suppress(FileExistsError):
            os.link(grave, path)
    grave.unlink()
