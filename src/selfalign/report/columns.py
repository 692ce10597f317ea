"""Read a step's table by column, whatever version of the package wrote it, a batch at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from selfalign.core.errors import StorageError
from selfalign.core.locations import Location
from selfalign.core.tables import in_memory
from selfalign.report.run import StepView

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 4_096


def batches(
    step: StepView, columns: Sequence[str], size: int = BATCH_ROWS, dropped: bool = False
) -> Iterator["pa.RecordBatch"]:
    """Its kept rows, with `dropped` the others too, at most `size` at a time, with `id` and those of `columns` that its
    table has."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    for shard in step.artifact.shards():
        with _readable(shard), pq.ParquetFile(in_memory(shard), page_checksum_verification=True) as file:
            wanted = dict.fromkeys(["id", "outcome", *columns])
            names = [name for name in wanted if name in file.schema_arrow.names]
            for batch in file.iter_batches(size, columns=names):
                yield batch if dropped else batch.filter(pc.equal(batch.column("outcome"), pa.scalar("kept")))


def rows_by_id(step: StepView, ids: Sequence[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Some rows of a step, whatever came of them, with `id` and those of `columns` that its table has."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    found: dict[str, dict[str, Any]] = {}
    for shard in step.artifact.shards() if ids else ():
        with _readable(shard):
            file = in_memory(shard)
            names = [name for name in ("id", *columns) if name in pq.read_schema(file).names]
            # Rows are sorted by id, so that most shards are told by their statistics to hold none of them.
            table = pq.read_table(
                file, columns=names, filters=pc.field("id").isin(list(ids)), page_checksum_verification=True
            )
        found |= {row["id"]: row for row in table.to_pylist()}
    return found


@contextmanager
def _readable(shard: Location) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{shard} is damaged or unreadable: {error}") from error
