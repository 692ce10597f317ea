"""Records as Parquet: one shard holds the rows that were kept and, marked by `outcome`, those that were not."""

import dataclasses
import hashlib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from selfalign.core.errors import StorageError
from selfalign.core.ledger import Ledger
from selfalign.core.locations import Location, read
from selfalign.core.records import Dropped, Noted, Outcome, Record

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

R = TypeVar("R", bound=Record)
# Records are numbered with seven digits, units of a record with as few as it takes.
_FURTHER = re.compile(r"/[1-9]\d{0,5}$")


@dataclass(frozen=True)
class Shard:
    """A shard, and its SHA-256 where a manifest gives it."""

    path: Location
    sha256: str | None


def schema(record: type[Record]) -> "pa.Schema":
    """Arrow schema of a record's table, the outcome's columns included. Only `id` and `outcome` are never null."""
    import pyarrow as pa

    fields: list[pa.Field[Any]] = [pa.field("id", pa.string(), nullable=False)]
    fields += [pa.field("outcome", pa.string(), nullable=False), pa.field("reason", pa.string())]
    fields += [pa.field("detail", pa.string()), pa.field("units", pa.int64())]
    hints = typing.get_type_hints(record)
    fields += [pa.field(f.name, _arrow(hints[f.name])) for f in dataclasses.fields(record) if f.name != "id"]
    return pa.schema(fields)


def _arrow(hint: object) -> "pa.DataType":
    import pyarrow as pa

    simple: Mapping[object, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    if hint in simple:
        return simple[hint]
    if typing.is_typeddict(hint):
        return pa.struct([(name, _arrow(each)) for name, each in typing.get_type_hints(hint).items()])
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return pa.list_(_arrow(args[0]))
    if isinstance(hint, types.UnionType):
        return _arrow(next(a for a in args if a is not type(None)))
    raise TypeError(f"no Arrow type for {hint}")


def to_parquet(outcomes: Iterable[Outcome], record: type[Record]) -> bytes:
    """A shard's bytes: rows sorted by id, page checksums, the same bytes for the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [f.name for f in schema(record)]
    rows = sorted((_cells(outcome, columns) for outcome in outcomes), key=lambda row: row["id"])
    table = pa.Table.from_pylist(rows, schema=schema(record))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _cells(outcome: Outcome, columns: list[str]) -> dict[str, Any]:
    row = outcome if isinstance(outcome, Record) else outcome.row
    cells = {name: getattr(row, name, None) for name in columns}
    if isinstance(outcome, Dropped):
        cells |= {f: getattr(outcome, f) for f in ("id", "outcome", "reason", "detail", "units")}
    else:
        cells |= {"outcome": "kept", "units": 1, "reason": outcome.note if isinstance(outcome, Noted) else None}
    return cells


def _read(path: Location, columns: list[str] | None = None, sha256: str | None = None) -> "pa.Table":
    import pyarrow as pa

    try:
        with opened(path, sha256) as file:
            # A column that is not there would be left out silently.
            table = file.read(columns, use_threads=False)
            return table.select(columns) if columns else table
    except (OSError, KeyError, pa.ArrowException) as error:
        raise StorageError(
            f"{path} is damaged or unreadable: {error}; delete it (where a manifest.json lies beside it, the whole "
            "folder) and run again"
        ) from error


def opened(path: Location, sha256: str | None = None) -> "ParquetFile":
    """A shard, wherever it lies, to be read with `use_threads=False` and its page checksums verified.

    Raises StorageError where its bytes, or that there are none, do not agree with `sha256`.

    A thread of Arrow's that lets go of Python's bytes while the process ends aborts it, in 2 of 60 processes on busy
    cores. Threads save nothing on shards of this size.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        data = read(path)
    except FileNotFoundError:
        if sha256 is None:
            raise
        raise another(path, path.parent) from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise another(path, path.parent)
    return ParquetFile(pa.BufferReader(data), page_checksum_verification=True)


def another(path: Location, folder: Location) -> StorageError:
    """What to say of a file that is not the one that the artifact in `folder` committed."""
    return StorageError(
        f"{path} is not what {folder.name} committed (missing or changed bytes); delete {folder} and run again to "
        "rebuild it"
    )


def read_kept(path: Location, record: type[R], sha256: str | None = None) -> Iterator[R]:
    """The kept rows of a shard, in order of id. Raises StorageError where it has not that `sha256`."""
    for outcome in read_outcomes(path, record, sha256):
        if isinstance(outcome, record):
            yield outcome


def read_outcomes(path: Location, record: type[R], sha256: str | None = None) -> Iterator[R | Dropped]:
    """All rows of a shard, without their notes. A dropped row carries its record as far as its columns are known.

    Raises StorageError where it has not that `sha256`.
    """
    table = _read(path, sha256=sha256)
    # Page checksums leave the footer out, and the names of the columns stand there.
    if not table.schema.equals(schema(record)):
        raise StorageError(f"{path} is damaged, or of another version: its columns are not a {record.__name__}'s")
    hints = typing.get_type_hints(record)
    lists = [name for name, hint in hints.items() if typing.get_origin(hint) is tuple]
    for cells in table.to_pylist():
        meta = {f: cells.pop(f) for f in ("outcome", "reason", "detail", "units")}
        known = any(value is not None for name, value in cells.items() if name != "id")
        for name in lists:
            cells[name] = tuple(cells[name] or ())
        row = record(**cells)
        if meta["outcome"] == "kept":
            yield row
        else:
            yield Dropped(id=row.id, row=row if known else None, **meta)


def ledger_of(path: Location) -> Ledger:
    """A shard's ledger by what it holds; `sources` and `in_` are the writer's to know."""
    ledger = Ledger()
    for cells in _read(path, ["outcome", "reason", "units"]).to_pylist():
        ledger.count(cells["outcome"], cells["reason"], cells["units"])
    return ledger


def is_further(id: str) -> bool:
    """Whether an id is that of the second or a later unit of a record that was split (`id/1`, `id/2` …)."""
    return _FURTHER.search(id) is not None


def further_units(path: Location) -> int:
    """How many rows of a shard are further units."""
    return sum(is_further(str(id)) for id in _read(path, ["id"])["id"].to_pylist())
