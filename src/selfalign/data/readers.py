"""Read rows out of JSONL and Parquet files, so that whatever bytes they hold, every record is accounted for.

pyarrow's JSON reader accepts invalid UTF-8, `json.loads` accepts NaN and duplicate keys, and neither bounds depth
or size, so rows are validated here. A record is a non-blank line, or a Parquet row; a broken one is quarantined
with its place and hash, and its neighbours are read.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from selfalign.core.errors import StorageError
from selfalign.core.records import Dropped, SourceFile, quarantined

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

SUFFIXES = (".jsonl", ".parquet")
ROW_BYTES = 1 << 20
DEPTH = 64

_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_BATCH_ROWS = 256
# Possessive, and with an optional closing quote, so that no input makes it backtrack or start over.
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


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


def read_rows(file: SourceFile, fields: Collection[str] | None = None) -> Iterator[RawRow | Dropped]:
    """Every record of `file`, in order: `file.rows` units in all.

    `fields` limits what is decoded of a Parquet file, so that damage to other columns does no harm. Raises
    StorageError where the file cannot be opened, or has another number of records than when it was listed.
    """
    units = 0
    with _opened(Path(file.path)) as stream:
        for item in _parquet_rows(file, stream, fields) if _is_parquet(file.path) else _jsonl_rows(file, stream):
            units += item.units if isinstance(item, Dropped) else 1
            yield item
    if units != file.rows:
        raise StorageError(
            f"{file.path} held {file.rows} records when it was listed and holds {units} now; run again to list it anew"
        )


def count_rows_and_digest(path: Path) -> tuple[int, str]:
    """Number of records and SHA-256 of a file. A Parquet file that cannot be read is one record."""
    with _opened(path) as stream:
        if not _is_parquet(path):
            return _count_lines(stream)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        try:
            return _open_parquet(stream).metadata.num_rows, digest
        except Unusable:
            return 1, digest


def _is_parquet(path: str | Path) -> bool:
    return Path(path).suffix == ".parquet"


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error


def _row_id(file: SourceFile, number: int) -> str:
    return f"{file.id}/{number:07d}"


# JSONL


@dataclass(slots=True)
class _Line:
    """A non-blank line without its end; `digest` is known where it was too long to be kept."""

    number: int
    offset: int
    data: bytes
    digest: str | None = None


def _jsonl_rows(file: SourceFile, stream: BufferedReader) -> Iterator[RawRow | Dropped]:
    name = Path(file.path).name
    for n, line in enumerate(_lines(stream.readline)):
        digest = line.digest or hashlib.sha256(line.data).hexdigest()
        where = f"{name}:{line.number}, byte offset {line.offset}, sha256 {digest}"
        try:
            if line.digest:
                raise _too_large()
            values = parse(line.data)
        except Unusable as error:
            yield error.row(_row_id(file, n), where)
        else:
            yield RawRow(_row_id(file, n), file.id, where, values)


def _count_lines(stream: BufferedReader) -> tuple[int, str]:
    digest = hashlib.sha256()

    def readline(size: int) -> bytes:
        piece = stream.readline(size)
        digest.update(piece)
        return piece

    return sum(1 for _ in _lines(readline)), digest.hexdigest()


def _lines(readline: Callable[[int], bytes]) -> Iterator[_Line]:
    """The non-blank lines, none of them held beyond ROW_BYTES. Lines are numbered from 1, blank ones counted."""
    number = offset = 0
    while piece := readline(ROW_BYTES + len(b"\r\n")):
        number += 1
        start, offset = offset, offset + len(piece)
        whole = piece.endswith(b"\n") or len(piece) < ROW_BYTES + len(b"\r\n")
        if number == 1 and piece.startswith(_BOM):
            start, piece = start + len(_BOM), piece[len(_BOM) :]
        if not whole:
            size, blank, digest = _pass_over(piece, readline)
            offset += size - len(piece)
            if not blank:
                yield _Line(number, start, b"", digest)
        elif piece.strip(_BLANK):
            yield _Line(number, start, piece.rstrip(b"\r\n"))


def _pass_over(piece: bytes, readline: Callable[[int], bytes]) -> tuple[int, bool, str]:
    """Read on to the end of a line that is too long: its size in bytes, whether it is blank, its SHA-256."""
    digest, size, blank = hashlib.sha256(), len(piece), not piece.strip(_BLANK)
    while not piece.endswith(b"\n") and (more := readline(ROW_BYTES)):
        size, blank = size + len(more), blank and not more.strip(_BLANK)
        # A last carriage return waits, since the line feed that makes it a line end may come next.
        kept = len(piece) - piece.endswith(b"\r")
        digest.update(piece[:kept])
        piece = piece[kept:] + more
    digest.update(piece.rstrip(b"\r\n"))
    return size, blank, digest.hexdigest()


def parse(data: bytes) -> dict[str, object]:
    """The JSON object in `data`, strictly read. Raises Unusable."""
    if len(data) > ROW_BYTES:
        raise _too_large()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("invalid_utf8", f"{error.reason} at byte {error.start} of the row") from error
    _check_depth(data)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except ValueError as error:
        raise Unusable("invalid_json", str(error)) from error
    if not isinstance(value, dict):
        raise Unusable("not_an_object", f"the row is {_kind(value)}, not an object")
    if _SURROGATE_ESCAPE.search(data):
        _check_surrogates(value)
    return value


def _too_large() -> Unusable:
    return Unusable("too_large", f"the row exceeds {ROW_BYTES} bytes")


def _check_depth(data: bytes) -> None:
    if data.count(b"{") + data.count(b"[") <= DEPTH:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        depth += {b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(match[0], 0)
        if depth > DEPTH:
            raise Unusable("too_deep", f"the row nests more than {DEPTH} levels deep")


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


# Parquet


def _parquet_rows(
    file: SourceFile, stream: BufferedReader, fields: Collection[str] | None
) -> Iterator[RawRow | Dropped]:
    try:
        table = _open_parquet(stream)
    except Unusable as error:
        detail = f"{Path(file.path).name}, sha256 {file.sha256}: {error.note}"
        yield quarantined(file.id, error.reason, detail, units=file.rows)
        return
    names = [name for name in table.schema_arrow.names if fields is None or name in fields]
    first = 0
    for group in range(table.metadata.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        yield from _row_group(file, table, group, names, range(first, first + rows))
        first += rows


def _open_parquet(stream: BufferedReader) -> "ParquetFile":
    """The file, its page checksums verified on reading. Raises Unusable where its footer makes no sense."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(stream, page_checksum_verification=True)
        names, metadata = table.schema_arrow.names, table.metadata
        groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        depth = max((metadata.schema.column(n).path.count(".") for n in range(metadata.num_columns)), default=0)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise Unusable("unreadable_file", _first_line(error)) from error
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise Unusable("unreadable_file", "its row groups do not add up to its number of rows")
    if len(set(names)) < len(names):
        raise Unusable("unreadable_file", "two of its columns have one name")
    # A list level is two steps of a column's path.
    if depth > 2 * DEPTH:
        raise Unusable("unreadable_file", f"a column nests more than {DEPTH} levels deep")
    return table


def _row_group(
    file: SourceFile, table: "ParquetFile", group: int, names: list[str], numbers: range
) -> Iterator[RawRow | Dropped]:
    """One item a row; what cannot be read of the row group is one quarantined item with the rest of its units."""
    import pyarrow as pa

    done, problem = 0, "the row group is shorter than its footer says"
    try:
        batches = table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names)
        for row in islice((row for batch in batches for row in _decoded(batch)), len(numbers)):
            yield _parquet_row(file, numbers[done], row)
            done += 1
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        problem = _first_line(error)
    if lost := len(numbers) - done:
        where = f"{Path(file.path).name}, rows {numbers[done]} to {numbers[-1]} (row group {group})"
        detail = f"{where}, sha256 of the file {file.sha256}: {problem}"
        yield quarantined(_row_id(file, numbers[done]), "unreadable_rows", detail, units=lost)


def _decoded(batch: "RecordBatch") -> Iterator[dict[str, object] | Unusable]:
    """The rows of a batch as Python values; one that does not decode costs only itself."""
    import pyarrow as pa

    unreadable = (pa.ArrowException, ValueError, OverflowError)
    try:
        batch.validate(full=True)
        yield from batch.to_pylist()
        return
    except unreadable:
        pass
    for n in range(batch.num_rows):
        row = batch.slice(n, 1)
        try:
            row.validate(full=True)
            yield row.to_pylist()[0]
        except unreadable as error:
            yield Unusable("invalid_value", _first_line(error))


def _parquet_row(file: SourceFile, number: int, row: dict[str, object] | Unusable) -> RawRow | Dropped:
    where = f"{Path(file.path).name}, row {number}"
    if isinstance(row, Unusable):
        return row.row(_row_id(file, number), f"{where}, sha256 of the file {file.sha256}")
    data = json.dumps(row, ensure_ascii=False, default=repr).encode("utf-8")
    where = f"{where}, sha256 of its values as JSON {hashlib.sha256(data).hexdigest()}"
    try:
        if len(data) > ROW_BYTES:
            raise _too_large()
        _check_depth(data)
    except Unusable as error:
        return error.row(_row_id(file, number), where)
    return RawRow(_row_id(file, number), file.id, where, row)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
