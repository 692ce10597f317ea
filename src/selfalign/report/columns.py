"""Read a step's table by column, whatever version of the package wrote it, a batch at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from selfalign.core.errors import StorageError
from selfalign.core.locations import Location
from selfalign.core.tables import opened
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

    for shard in step.shards():
        with _readable(shard.path), opened(shard.path, shard.sha256) as file:
            wanted = dict.fromkeys(["id", "outcome", *columns])
            names = [name for name in wanted if name in file.schema_arrow.names]
            for batch in file.iter_batches(size, columns=names, use_threads=False):
                yield batch if dropped else batch.filter(pc.equal(batch.column("outcome"), pa.scalar("kept")))


def rows_by_id(step: StepView, ids: Sequence[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Some rows of a step, whatever came of them, with `id` and those of `columns` that its table has."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found: dict[str, dict[str, Any]] = {}
    wanted = pa.array(ids, pa.string())
    for shard in step.shards() if ids else ():
        with _readable(shard.path), opened(shard.path, shard.sha256) as file:
            these = pc.is_in(file.read(["id"], use_threads=False)["id"], value_set=wanted)
            # Most shards hold none of them.
            if pc.any(these).as_py():
                names = [name for name in ("id", *columns) if name in file.schema_arrow.names]
                rows = file.read(names, use_threads=False).filter(these).to_pylist()
                found |= {row["id"]: row for row in rows}
    return found


@contextmanager
def _readable(shard: Location) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (OSError, KeyError, pa.ArrowException) as error:
        raise StorageError(f"{shard} is damaged or unreadable: {error}") from error
