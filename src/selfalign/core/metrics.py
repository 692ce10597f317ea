"""What a step measures while it runs, kept beside its artifact as JSON lines (metrics.jsonl)."""

import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfalign.core.errors import StoreAwayError
from selfalign.core.locations import Location, commit, entries, explained, read

FLUSH_S = 30.0
"""How long lines wait for company where each write is an object of its own."""


class Measurements:
    """What one attempt at a step measures. In an object store, which cannot append, it is a file every few seconds."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self._waiting: list[str] = []
        self._flushed = time.monotonic()

    def __enter__(self) -> "Measurements":
        if isinstance(self._folder, Path):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / "metrics.jsonl"
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                # What is measured next must not be lost with the last, torn word of a process that was killed.
                with path.open("a") as file:
                    file.write("\n")
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        # A store that is away would be waited for once more.
        if not isinstance(error, StoreAwayError):
            self._flush()

    def add(self, line: Mapping[str, float]) -> None:
        """One measurement, with the time (seconds since 1970)."""
        self._waiting.append(json.dumps({**line, "time": round(time.time(), 3)}))
        if isinstance(self._folder, Path) or time.monotonic() - self._flushed > FLUSH_S:
            self._flush()

    def lines(self) -> list[dict[str, Any]]:
        """All that was measured of this step, in earlier attempts too."""
        self._flush()
        return read_measurements(self._folder)

    def _flush(self) -> None:
        text, self._waiting, self._flushed = "".join(f"{line}\n" for line in self._waiting), [], time.monotonic()
        if not text:
            return
        if isinstance(self._folder, Path):
            with explained(self._folder), (self._folder / "metrics.jsonl").open("a") as file:
                file.write(text)
        else:
            commit(self._folder / f"metrics-{time.time():.3f}-{uuid.uuid4().hex[:8]}.jsonl", text.encode())


def read_measurements(folder: Location) -> list[dict[str, Any]]:
    """All lines beside an artifact, in order. None where nothing was measured."""
    lines = []
    for path in entries(folder, "metrics*.jsonl"):
        for line in read(path).decode().splitlines():
            # A torn line is the last word of a process that was killed while measuring.
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines
