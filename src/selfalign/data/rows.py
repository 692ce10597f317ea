"""What readers give: a row, or why there is none; and the limits that rows and parts keep to."""

import atexit
import json
import os
import re
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Generic, TypeVar

from selfalign.core.errors import StorageError
from selfalign.core.records import Dropped, SourcePart, quarantined

ROW_BYTES = 1 << 20
DEPTH = 64
# Of a part, and of the parts that are read together: what a worker holds at once.
PART_ROWS = 4096
PART_BYTES = 16 << 20

# Possessive, and with an optional closing quote, so that no input makes it backtrack or start over.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
T = TypeVar("T")


class Unusable(Exception):
    """A row that is not what its file or format promises; it becomes a quarantined row with `reason`."""

    def __init__(self, reason: str, note: str) -> None:
        super().__init__(reason, note)
        self.reason = reason
        self.note = note

    def row(self, id: str, where: str) -> Dropped:
        """The quarantined row that stands for it."""
        return quarantined(id, self.reason, f"{where}: {self.note}")


@dataclass(frozen=True, slots=True)
class RawRow:
    """A well-formed row of a file. `where` says where it stands: file, line, byte offset, SHA-256 of its bytes."""

    id: str
    source: str
    where: str
    values: dict[str, object]


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a file, as its kind finds it: the fields of SourcePart that say where its records are."""

    rows: int
    first: int = 0
    offset: int = 0
    size: int = 0
    line: int = 0


def spelt(name: str) -> str:
    """The name of a file as UTF-8 can say it, and no other name: bytes that are no text as `\\xe9`, `\\` doubled."""
    return os.fsencode(name.replace("\\", "\\\\")).decode("utf-8", "backslashreplace")


def file_name(part: SourcePart) -> str:
    """The name of the part's file, for people."""
    return spelt(PurePath(part.path).name)


def file_id(part: SourcePart) -> str:
    """The id of the part's file. A part's own is that of its first record."""
    return part.id.rpartition("/")[0]


def row_id(file: str, number: int) -> str:
    """The id of a record of a file; records are numbered from 0."""
    return f"{file}/{number:07d}"


def too_large() -> Unusable:
    """What a row beyond ROW_BYTES is."""
    return Unusable("too_large", f"the row exceeds {ROW_BYTES} bytes")


def check_depth(data: bytes) -> None:
    """Raises Unusable where the JSON in `data` nests more than DEPTH levels deep."""
    if data.count(b"{") + data.count(b"[") <= DEPTH:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        depth += {b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(match[0], 0)
        if depth > DEPTH:
            raise Unusable("too_deep", f"the row nests more than {DEPTH} levels deep")


def as_json(values: dict[str, object]) -> bytes:
    """A row's values as JSON, whatever their types: what is measured and digested of a row that has no bytes."""
    return json.dumps(values, ensure_ascii=False, default=repr).encode("utf-8")


def changed(part: SourcePart) -> StorageError:
    """The error where a file does not hold what it held when it was listed."""
    return StorageError(f"{spelt(part.path)} has changed since it was listed; run again to list it anew")


class Left(Generic[T]):
    """What a reader left in the middle of a file, for whoever goes on from there.

    Parts are mostly read in order: what has no way into its middle is then read once, not once for each part. One
    thing is kept, since a worker reads one file at a time; and for this process only, since a forked one would move
    the same file's position.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, T] = {}
        # While the modules are still there that a walk needs to end.
        atexit.register(self._kept.clear)

    def take(self, part: SourcePart, *how: Hashable) -> T | None:
        """What stopped where `part` begins, if anything did."""
        return self._kept.pop((os.getpid(), part.path, part.sha256, part.first, how), None)

    def keep(self, walk: T, part: SourcePart, *how: Hashable) -> None:
        """Keep what stopped where `part` ends."""
        self._kept.clear()
        self._kept[os.getpid(), part.path, part.sha256, part.first + part.rows, how] = walk
