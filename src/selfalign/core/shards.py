"""Process one shard: batches under an attempt journal, the ledger proved, one commit."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfalign.core.errors import InternalError
from selfalign.core.ledger import Ledger
from selfalign.core.records import Outcome, quarantined
from selfalign.core.stage import MapStage, Process, ShardSource
from selfalign.core.store import Artifact, commit
from selfalign.core.tables import further_units, ledger_of, read_kept, to_parquet

# A batch is tried twice whole, because what killed it may well have come from outside and a batch run whole gives
# the same bytes again; then its rows run alone, once. So a row that kills its worker does so three times in all.
WHOLE_TRIES = 2
ALONE_TRIES = 1


class Journal:
    """Which batch was in flight: survives the process, so that a row that kills it is found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unfinished: Counter[str] = Counter()
        entries = path.read_text().splitlines() if path.exists() else []
        for line in entries:
            # A torn last line means that the write itself was cut off, before the batch began.
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            self.unfinished[entry["key"]] += 1 if entry["begin"] else -1

    def run(self, key: str, process: Process, rows: Sequence[Any]) -> list[Outcome]:
        """Process rows, noting the start before and the end after."""
        self._write(key, begin=True)
        try:
            return list(process.run(rows))
        finally:
            # An exception is no crash: only a process that died leaves its start without an end.
            self._write(key, begin=False)

    def _write(self, key: str, begin: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            # The line end comes first, so that a line that was torn before spoils no other.
            file.write(b"\n" + json.dumps({"key": key, "begin": begin}).encode())
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class ShardReport:
    """What happened to one shard. `seconds` and `tokens` are this attempt's."""

    number: int
    ledger: Ledger = field(default_factory=Ledger)
    tokens: int = 0
    seconds: float = 0.0


def input_rows(stage: MapStage, source: ShardSource) -> list[Any]:
    """The rows of a map's input shard: those of a table, or records of what lies outside."""
    return list(source) if isinstance(source, tuple) else list(read_kept(source, stage.record))


def run_shard(stage: MapStage, process: Process, source: ShardSource, artifact: Artifact, number: int) -> ShardReport:
    """Make output shard `number` from input shard `source` and commit it; the first commit of its name wins."""
    started, tokens = time.monotonic(), process.tokens()
    rows = input_rows(stage, source)
    outcomes = _outcomes(stage, process, rows, Journal(artifact.folder / f"journal-{number:05d}.jsonl"))
    ids = Counter(outcome.id for outcome in outcomes)
    if len(ids) != len(outcomes):
        raise InternalError(f"{artifact.name} shard {number}: id {ids.most_common(1)[0][0]!r} came out twice")
    commit(artifact.shard(number), to_parquet(outcomes, stage.output))
    ledger = shard_ledger(stage, rows, artifact, number)
    return ShardReport(number, ledger, process.tokens() - tokens, time.monotonic() - started)


def shard_ledger(stage: MapStage, rows: Sequence[Any], artifact: Artifact, number: int) -> Ledger:
    """The balanced ledger of a committed shard, from what it holds and what went in."""
    ledger = ledger_of(artifact.shard(number))
    ledger.sources, ledger.in_ = len(rows), sum(stage.units(row) for row in rows)
    if stage.splits:
        # The number of records is known beforehand, so that each of them must show; what they hold beyond is not.
        ledger.sources = ledger.in_
        ledger.in_ += further_units(artifact.shard(number))
    return ledger.check(f"{artifact.name} shard {number}")


def _outcomes(stage: MapStage, process: Process, rows: Sequence[Any], journal: Journal) -> list[Outcome]:
    outcomes: list[Outcome] = []
    rows = sorted(rows, key=lambda row: (stage.size(row), row.id))
    for start in range(0, len(rows), stage.batch_rows):
        batch = rows[start : start + stage.batch_rows]
        key = f"batch {start}"
        if journal.unfinished[key] < WHOLE_TRIES:
            outcomes += journal.run(key, process, batch)
        else:
            outcomes += [o for row in batch for o in _alone(stage, process, row, journal)]
    return outcomes


def _alone(stage: MapStage, process: Process, row: Any, journal: Journal) -> Iterable[Outcome]:
    key = f"row {row.id}"
    if journal.unfinished[key] < ALONE_TRIES:
        return journal.run(key, process, [row])
    units = stage.units(row)
    tries = WHOLE_TRIES + ALONE_TRIES
    return [quarantined(row.id, "crashed_worker", f"its worker died {tries} times while processing it", units)]
