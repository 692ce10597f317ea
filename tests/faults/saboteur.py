"""Strikes a process at one of the points where it changes its run folder, or where it asks an object store."""

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Deed = Literal["none", "kill", "tear", "fill", "lose"]
# What Python itself tells of every call, however it was imported.
TOLD = ("os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime")
# Nobody needs room to make some.
NEED_NO_ROOM = ("os.remove", "os.rmdir", "os.chmod", "os.utime")


@dataclass
class Saboteur:
    """At point `at`, counted from 1 in a process: kill it | tear (half of a write, then kill) | fill (no space left
    from then on) | lose (a request arrives, and its answer does not).

    `points` receives a line for each point: what is done there, and to which file.
    """

    root: str
    deed: Deed = "none"
    at: int = 0
    points: Path | None = None

    def begin(self) -> None:
        """Strike in this process, which never gets rid of it."""
        self._passed = 0
        self._log = os.open(self.points, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if self.points else None
        sys.addaudithook(self._told)
        self._watch_fsync()
        self._watch_writes()
        if "://" in self.root:
            self._watch_requests()

    def _told(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT:
            self._point("open", args[0])
        elif event in TOLD:
            # The new name comes second; a folder's handle, if any, last.
            path, folder = args[1 if event in ("os.link", "os.rename") else 0], args[-1]
            if isinstance(folder, int) and folder >= 0 and event in ("os.remove", "os.rmdir"):
                path = os.path.join(_name(folder), os.fsdecode(path))
            self._point(event, path)

    def _watch_fsync(self) -> None:
        fsync = os.fsync

        def watched(handle: int) -> None:
            self._point("fsync", _name(handle))
            fsync(handle)

        os.fsync = watched

    def _watch_writes(self) -> None:
        opened = io.open

        def watched(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            found = opened(file, mode, *rest, **options)
            return _Written(found, self) if set(mode) & set("wax+") and self._concerns(found.name) else found

        io.open = builtins.open = watched

    def _watch_requests(self) -> None:
        from aiobotocore.httpsession import AIOHTTPSession
        from botocore.exceptions import ConnectionClosedError

        send = AIOHTTPSession.send

        async def watched(session: Any, request: Any) -> Any:
            self._point(f"request {request.method}", request.url, concerns=True)
            answer = await send(session, request)
            if self.deed == "lose" and self._passed == self.at:
                raise ConnectionClosedError(endpoint_url=request.url, request=request)
            return answer

        AIOHTTPSession.send = watched

    def _concerns(self, path: object) -> bool:
        return isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(self.root)

    def _point(self, what: str, path: object, tear: Callable[[], None] = lambda: None, concerns: bool = False) -> None:
        if not (concerns or self._concerns(path)):
            return
        self._passed += 1
        if self._log is not None:
            os.write(self._log, f"{what} {os.fsdecode(path)}\n".encode())
        if self.deed in ("kill", "tear") and self._passed == self.at:
            if self.deed == "tear":
                tear()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.deed == "fill" and self._passed >= self.at and what not in NEED_NO_ROOM:
            tear()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))


class _Written:
    """A file that is written to."""

    def __init__(self, file: Any, saboteur: Saboteur) -> None:
        self._file, self._saboteur = file, saboteur

    def write(self, data: Any) -> Any:
        def tear() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._saboteur._point("write", self._file.name, tear)
        return self._file.write(data)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _name(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")
