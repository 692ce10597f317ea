"""Parquet files: a record is a row. What cannot be read of a row group costs the rest of that group only."""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from selfalign.core.records import Dropped, SourcePart, quarantined
from selfalign.data.archives import opened
from selfalign.data.rows import (
    DEPTH,
    PART_BYTES,
    PART_ROWS,
    ROW_BYTES,
    Extent,
    Left,
    RawRow,
    Unusable,
    as_json,
    changed,
    check_depth,
    file_id,
    file_name,
    row_id,
    too_large,
)

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

_BATCH_ROWS = 256
# A footer may claim anything, and the parts of a file are listed before any of it is read.
_MOST_ROWS = 1 << 31


@dataclass(frozen=True, slots=True)
class _Lost:
    """Rows that cannot be read: those of a row group from the damage on."""

    group: int
    numbers: range
    problem: str


_Walk = Iterator[RawRow | Dropped | _Lost]
_left: Left[_Walk] = Left()


def parquet_extents(path: Path) -> tuple[str, list[Extent]]:
    """SHA-256 and parts of a file. One that cannot be read is one record."""
    with opened(path) as source:
        digest = hashlib.file_digest(source.stream, "sha256").hexdigest()
        try:
            table = _table(source.stream)
        except Unusable:
            return digest, [Extent(1)]
        return digest, _cut(table)


def parquet_rows(part: SourcePart, fields: Collection[str] | None) -> Iterator[RawRow | Dropped]:
    """The part's records, in order, of the columns in `fields`. Raises StorageError where there are too few."""
    columns = None if fields is None else frozenset(fields)
    walk = _left.take(part, columns) or _walk(part, columns)
    name, file, left = file_name(part), file_id(part), part.rows
    while left:
        try:
            item = next(walk, None)
        except Unusable as error:
            detail = f"{name}, sha256 of the file {part.sha256}: {error.note}"
            yield quarantined(part.id, error.reason, detail, units=left)
            return
        if item is None:
            raise changed(part)
        if not isinstance(item, _Lost):
            left -= 1
            yield item
            continue
        numbers = item.numbers[:left]
        left -= len(numbers)
        where = f"{name}, rows {numbers[0]} to {numbers[-1]} (row group {item.group})"
        detail = f"{where}, sha256 of the file {part.sha256}: {item.problem}"
        yield quarantined(row_id(file, numbers[0]), "unreadable_rows", detail, units=len(numbers))
        if len(numbers) < len(item.numbers):
            # The next part finds the damage anew, and so counts its own loss.
            return
    _left.keep(walk, part, columns)


def _cut(table: "ParquetFile") -> list[Extent]:
    """Parts of a row group, or of several small ones."""
    parts: list[Extent] = []
    rows = first = size = 0
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        row_bytes = max(group.total_byte_size, 0) // max(group.num_rows, 1)
        most = min(PART_ROWS, max(PART_BYTES // max(row_bytes, 1), 1))
        for start in range(0, group.num_rows, most):
            more = min(most, group.num_rows - start)
            if rows and (rows + more > PART_ROWS or size + more * row_bytes > PART_BYTES):
                parts.append(Extent(rows, first, size=size))
                first, rows, size = first + rows, 0, 0
            rows, size = rows + more, size + more * row_bytes
    return [*parts, Extent(rows, first, size=size)]


def _walk(part: SourcePart, columns: frozenset[str] | None) -> _Walk:
    """The file's records from where `part` begins on. Raises Unusable where its footer makes no sense."""
    with opened(Path(part.path)) as source:
        table = _table(source.stream)
        names = [name for name in table.schema_arrow.names if columns is None or name in columns]
        first = 0
        for group in range(table.metadata.num_row_groups):
            numbers = range(first, first + table.metadata.row_group(group).num_rows)
            first = numbers.stop
            if part.first < first:
                yield from _row_group(part, table, group, names, numbers)


def _table(stream: BufferedReader) -> "ParquetFile":
    """The file, its page checksums verified on reading. Raises Unusable where its footer makes no sense."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        # With a buffer, so that a page is held and not a whole column of a row group.
        table = ParquetFile(stream, page_checksum_verification=True, buffer_size=1 << 18, pre_buffer=False)
        names, metadata = table.schema_arrow.names, table.metadata
        groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        depth = max((metadata.schema.column(n).path.count(".") for n in range(metadata.num_columns)), default=0)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise Unusable("unreadable_file", _first_line(error)) from error
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows or metadata.num_rows > _MOST_ROWS:
        raise Unusable("unreadable_file", "its row groups do not add up to its number of rows")
    if len(set(names)) < len(names):
        raise Unusable("unreadable_file", "two of its columns have one name")
    # A list level is two steps of a column's path.
    if depth > 2 * DEPTH:
        raise Unusable("unreadable_file", f"a column nests more than {DEPTH} levels deep")
    return table


def _row_group(part: SourcePart, table: "ParquetFile", group: int, names: list[str], numbers: range) -> _Walk:
    """The group's records from where `part` begins on. There is no way to a row but through those before it."""
    import pyarrow as pa

    done, problem = numbers.start, "the row group is shorter than its footer says"
    try:
        # Threads that read from a Python stream may keep this process from ending.
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
            passed = min(max(part.first - done, 0), batch.num_rows)
            done += passed
            for row in _decoded(batch.slice(passed)):
                if done < numbers.stop:
                    yield _row(part, done, row)
                    done += 1
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        problem = _first_line(error)
    if lost := range(max(done, part.first), numbers.stop):
        yield _Lost(group, lost, problem)


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


def _row(part: SourcePart, number: int, row: dict[str, object] | Unusable) -> RawRow | Dropped:
    file = file_id(part)
    id, where = row_id(file, number), f"{file_name(part)}, row {number}"
    if isinstance(row, Unusable):
        return row.row(id, f"{where}, sha256 of the file {part.sha256}")
    data = as_json(row)
    where = f"{where}, sha256 of its values as JSON {hashlib.sha256(data).hexdigest()}"
    try:
        if len(data) > ROW_BYTES:
            raise too_large()
        check_depth(data)
    except Unusable as error:
        return error.row(id, where)
    return RawRow(id, file, where, row)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
