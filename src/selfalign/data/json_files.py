"""JSON Lines, and JSON arrays of objects.

`json.loads` accepts NaN and duplicate keys, pyarrow's reader invalid UTF-8, and neither bounds depth or size, so rows
are divided and checked here. A record of a .jsonl file is a non-blank line. A .json file is an array, whose elements
are its records, or one object over several lines, or else lines.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from selfalign.core.records import Dropped, SourcePart
from selfalign.data.archives import Opened, codec_of, opened
from selfalign.data.rows import (
    PART_BYTES,
    PART_ROWS,
    ROW_BYTES,
    Extent,
    Left,
    RawRow,
    Unusable,
    changed,
    check_depth,
    file_id,
    file_name,
    row_id,
    too_large,
)

_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_LINE_BYTES = ROW_BYTES + len(b"\r\n")
_PIECE = 1 << 16
# Possessive, so that no input makes them backtrack. The group is empty where the closing quote is yet to come.
_TEXT_END = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+("?)', re.DOTALL)
_TOKEN = re.compile(rb'"' + _TEXT_END.pattern + rb"|[\[\]{},]", re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(slots=True)
class _Record:
    """Where a record begins, where its bytes end, and the bytes; `digest` is known where they were not kept."""

    line: int
    offset: int
    end: int
    data: bytes
    digest: str | None = None
    problem: Unusable | None = None


_Walk = Callable[[Opened, int, int], Iterator[_Record]]
_left: Left[Iterator[_Record]] = Left()


def json_extents(path: Path, arrays: bool) -> tuple[str, list[Extent]]:
    """SHA-256 and parts of a file, in one pass. What is larger than a part is a part of its own."""
    with opened(path, hashed=True) as source:
        found = _cut(_records(source, arrays))
        return source.sha256(), found


def json_rows(part: SourcePart, arrays: bool) -> Iterator[RawRow | Dropped]:
    """The part's records, in order. Raises StorageError where they are not where they were."""
    walk = _left.take(part) or _walk(part, arrays)
    file, name = file_id(part), file_name(part)
    packed = codec_of(Path(part.path))
    found, end = 0, part.offset
    for number, record in enumerate(islice(walk, part.rows), part.first):
        found, end = found + 1, record.end
        digest = record.digest or hashlib.sha256(record.data).hexdigest()
        offset = f"{record.offset} (decompressed)" if packed else str(record.offset)
        where = f"{name}:{record.line}, byte offset {offset}, sha256 {digest}"
        yield _row(row_id(file, number), file, where, record)
    if found != part.rows or end != part.offset + part.size:
        raise changed(part)
    if packed:
        _left.keep(walk, part)


def _row(id: str, file: str, where: str, record: _Record) -> RawRow | Dropped:
    try:
        if record.problem:
            raise record.problem
        return RawRow(id, file, where, parse(record.data))
    except Unusable as error:
        return error.row(id, where)


def _cut(records: Iterable[_Record]) -> list[Extent]:
    parts: list[Extent] = []
    rows = first = offset = size = line = 0
    for record in records:
        if rows == PART_ROWS or (rows and record.end - offset > PART_BYTES):
            parts.append(Extent(rows, first, offset, size, line))
            first, rows = first + rows, 0
        if not rows:
            offset, line = record.offset, record.line
        rows, size = rows + 1, record.end - offset
    return [*parts, Extent(rows, first, offset, size, line)]


def _walk(part: SourcePart, arrays: bool) -> Iterator[_Record]:
    with opened(Path(part.path)) as source:
        yield from _records(source, arrays, part)


def _records(source: Opened, arrays: bool, part: SourcePart | None = None) -> Iterator[_Record]:
    """The records of a file, from where `part` begins on."""
    head = source.stream.peek(1)
    walk, offset, line = _layout(head) if arrays else (_lines, len(_bom(head)), 1)
    if part:
        offset, line = part.offset, part.line
    source.go_to(offset)
    return walk(source, offset, line)


def _bom(head: bytes) -> bytes:
    return _BOM if head.startswith(_BOM) else b""


def _layout(head: bytes) -> tuple[_Walk, int, int]:
    """How the .json file that begins like this is divided, and offset and line where that begins."""
    body = head.removeprefix(_BOM).lstrip(_BLANK)
    offset = len(head) - len(body)
    line = 1 + head.count(b"\n", 0, offset)
    if body.startswith(b"["):
        return _elements, offset + 1, line
    # A line that is cut off ends in the middle of a text; one that an object goes on after does not.
    first, end, _ = body.partition(b"\n")
    depth, closed = 0, True
    for token in _TOKEN.finditer(first):
        depth += (token[0] in (b"[", b"{")) - (token[0] in (b"]", b"}"))
        closed = token.lastindex is None or bool(token[1])
    if body.startswith(b"{") and end and depth > 0 and closed:
        return _whole, offset, line
    return _lines, len(_bom(head)), 1


# Lines


def _lines(source: Opened, offset: int, line: int) -> Iterator[_Record]:
    """The non-blank lines, none of them held beyond ROW_BYTES. Lines are numbered from 1, blank ones counted."""
    readline = source.stream.readline
    while piece := readline(_LINE_BYTES):
        record = _Record(line, offset, offset + len(piece), piece.rstrip(b"\r\n"))
        whole, blank = piece.endswith(b"\n"), not piece.strip(_BLANK)
        if not whole and len(piece) == _LINE_BYTES:
            whole, blank = _pass_over(record, piece, readline)
        if not whole and (torn := source.torn):
            record.problem = torn
            yield record
            return
        if not blank:
            yield record
        line, offset = line + 1, record.end
    if torn := source.torn:
        yield _Record(line, offset, offset, b"", problem=torn)


def _pass_over(record: _Record, piece: bytes, readline: Callable[[int], bytes]) -> tuple[bool, bool]:
    """Read on to the end of a line that is too long: whether it has one, and whether it is blank."""
    digest, blank = hashlib.sha256(), not piece.strip(_BLANK)
    while not piece.endswith(b"\n") and (more := readline(ROW_BYTES)):
        record.end += len(more)
        blank = blank and not more.strip(_BLANK)
        # A last carriage return waits, since the line feed that makes it a line end may come next.
        kept = len(piece) - piece.endswith(b"\r")
        digest.update(piece[:kept])
        piece = piece[kept:] + more
    digest.update(piece.rstrip(b"\r\n"))
    record.data, record.digest, record.problem = b"", digest.hexdigest(), too_large()
    return piece.endswith(b"\n"), blank


# Arrays


class _Pieces:
    """A record whose bytes come in pieces. White space around them is not its own; what is too large is not held."""

    def __init__(self, line: int, offset: int) -> None:
        self.line = self.next_line = line
        self.offset = self.end = offset
        self.data = b""
        self._digest = hashlib.sha256()
        self._kept = True

    def add(self, piece: bytes) -> None:
        """The next piece."""
        self.next_line += piece.count(b"\n")
        self.end += len(piece)
        if not self.data:
            piece = piece.lstrip(_BLANK)
            self.line = self.next_line - piece.count(b"\n")
            self.offset = self.end - len(piece)
        # Some more than a row may have, because of the white space that may follow it.
        if self._kept and len(self.data) + len(piece) <= 2 * ROW_BYTES:
            self.data += piece
            return
        if self._kept:
            self._kept = False
            self._digest.update(self.data)
        self._digest.update(piece)

    def record(self, problem: Unusable | None = None) -> _Record:
        """The record; `problem` is what is wrong with it beside its size."""
        if self._kept:
            data = self.data.rstrip(_BLANK)
            return _Record(self.line, self.offset, self.offset + len(data), data, None, problem)
        return _Record(self.line, self.offset, self.end, b"", self._digest.hexdigest(), problem or too_large())


def _whole(source: Opened, offset: int, line: int) -> Iterator[_Record]:
    """One record: all that is there."""
    pieces = _Pieces(line, offset)
    while piece := source.stream.read(_PIECE):
        pieces.add(piece)
    yield pieces.record(source.torn)


def _elements(source: Opened, offset: int, line: int) -> Iterator[_Record]:
    """What stands between the commas of an array, from somewhere between two elements on.

    What does not end, and what follows the array, is one broken record: nobody can tell how many were meant.
    """
    pieces = _Pieces(line, offset)
    depth, in_text, held = 1, False, b""
    while piece := source.stream.read(_PIECE):
        chunk, at, start = held + piece, 0, 0
        if in_text and (ended := _TEXT_END.match(chunk)):
            at, in_text = ended.end(), not ended[1]
        for token in _TOKEN.finditer(chunk, at) if not in_text else ():
            at, mark = token.end(), token[0]
            if token.lastindex:
                in_text = not token[1]
            elif mark in (b"[", b"{"):
                depth += 1
            elif mark != b"," and depth > 1:
                depth -= 1
            elif depth == 1 and mark != b"}":
                pieces.add(chunk[start : token.start()])
                start = at
                if pieces.data:
                    yield pieces.record()
                if mark == b"]":
                    yield from _rest(source, _Pieces(pieces.next_line, pieces.end), chunk[token.start() :])
                    return
                pieces = _Pieces(pieces.next_line, pieces.end + 1)
        # A backslash whose character comes with the next piece.
        held = chunk[at:] if in_text else b""
        pieces.add(chunk[start : len(chunk) - len(held)])
    pieces.add(held)
    yield pieces.record(
        source.torn or Unusable("unfinished_array", "no ] ends the array: a bracket or a quote is open from here on")
    )


def _rest(source: Opened, pieces: _Pieces, piece: bytes) -> Iterator[_Record]:
    """What follows an array, with the bracket that ends it: a part that begins here must come upon that as well."""
    pieces.add(piece)
    while piece := source.stream.read(_PIECE):
        pieces.add(piece)
    if source.torn:
        yield pieces.record(source.torn)
    elif pieces.data.rstrip(_BLANK) != b"]":
        yield pieces.record(Unusable("after_the_array", "something stands after the ] that ends the array"))


# Values


def parse(data: bytes) -> dict[str, object]:
    """The JSON object in `data`, strictly read. Raises Unusable."""
    if len(data) > ROW_BYTES:
        raise too_large()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("invalid_utf8", f"{error.reason} at byte {error.start} of the row") from error
    check_depth(data)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except ValueError as error:
        raise Unusable("invalid_json", str(error)) from error
    if not isinstance(value, dict):
        raise Unusable("not_an_object", f"the row is {_kind(value)}, not an object")
    if _SURROGATE_ESCAPE.search(data):
        _check_surrogates(value)
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Unusable("duplicate_key", f"the key {repeated[:40]!a} stands twice in one object")
    return found


def _no_constant(name: str) -> object:
    raise Unusable("not_finite", f"{name} is not JSON")


def _check_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("lone_surrogate", "a \\u escape names half a character") from error


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
