"""Process one shard: batches under an attempt journal, the ledger proved, one commit."""

import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from selfalign.core.errors import InternalError, StorageError, is_out_of_memory
from selfalign.core.identity import file_digest
from selfalign.core.lease import Owner, heartbeat, is_abandoned
from selfalign.core.ledger import Ledger
from selfalign.core.locations import Location, commit, entries, reachable, read, remove, replace
from selfalign.core.records import Outcome, quarantined
from selfalign.core.stage import STALL_MINUTES, MapStage, Process, ShardSource
from selfalign.core.store import Artifact
from selfalign.core.tables import further_units, ledger_of, read_kept, to_parquet
from selfalign.core.watchdog import Watchdog

# A batch is tried twice whole, because what killed it may well have come from outside and a batch run whole gives
# the same bytes again; then its rows run alone, once. So a row that kills its worker does so three times in all.
WHOLE_TRIES = 2
ALONE_TRIES = 1
BEAT_S = 20.0
"""How often an attempt shows that it lives, to those who cannot ask: after a minute without they take it for dead."""


class Journal:
    """Which batch an attempt at a shard has in flight: survives its process, so that a row that kills it is found.

    It is a folder beside the shard, where each attempt has a file of its own. `deaths` counts, by batch or row, the
    attempts that had died when this one began. `stall_minutes` without an end kill it, too (`core.watchdog`).
    """

    def __init__(self, folder: Location, stall_minutes: float) -> None:
        self.folder, self._me = folder, Owner.this_process()
        self._mine = folder / f"{self._me.token}.json"
        self._in_flight: str | None = None
        self._lock = threading.Lock()
        self._watchdog = Watchdog(stall_minutes * 60)
        self.deaths = Counter(filter(None, map(_died_of, entries(folder, "*.json"))))

    def run(self, key: str, process: Process, rows: Sequence[Any]) -> list[Outcome]:
        """Process rows. They stay noted as in flight until the next `run`, or until `land`."""
        with self._lock:
            self._in_flight = key
            self._note()
        with self._watchdog.watching(f"{self.folder.parent.name}, {self.folder.name}, {key}"):
            return list(process.run(rows))

    @contextmanager
    def landing(self) -> Iterator[None]:
        """Around an attempt: it says that it lives, and when it ends, in whatever way, nothing has crashed.

        Only a process that dies does not come to that.
        """
        global _under_way
        _under_way = self
        try:
            with heartbeat(self._beat, BEAT_S):
                yield
        finally:
            _under_way = None
            self.land()

    def land(self) -> None:
        """Nothing is in flight any more."""
        with self._lock:
            if self._in_flight is not None:
                self._in_flight = None
                self._mine.unlink(missing_ok=True)

    def _beat(self) -> None:
        with self._lock:
            if self._in_flight is not None:
                self._note()

    def _note(self) -> None:
        noted = json.dumps({"owner": asdict(self._me), "in_flight": self._in_flight}).encode()
        try:
            replace(self._mine, noted)
        except StorageError:
            # Another worker has committed the shard this moment, and discarded the folder.
            replace(self._mine, noted)

    def discard(self) -> None:
        """Of a shard that is committed nobody asks any more."""
        remove(self.folder)


def _died_of(attempt: Location) -> str | None:
    """What an attempt had in flight when its process died, if it did."""
    try:
        noted = json.loads(read(attempt))
        owner, key = Owner(**noted["owner"]), str(noted["in_flight"])
        return key if is_abandoned(owner, time.time() - attempt.stat().st_mtime) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        # Gone meanwhile; or torn, where a file system does not keep what it promises.
        return None


_under_way: Journal | None = None


def withdraw() -> None:
    """This process is about to be ended on request, from any thread: what is in flight has not killed it."""
    if (journal := _under_way) is not None:
        journal.land()


@dataclass(frozen=True)
class ShardReport:
    """What happened to one shard, whose SHA-256 is `sha256`. `seconds` and `tokens` are this attempt's."""

    number: int
    sha256: str = ""
    ledger: Ledger = field(default_factory=Ledger)
    tokens: int = 0
    seconds: float = 0.0


def input_rows(stage: MapStage, source: ShardSource) -> list[Any]:
    """The rows of a map's input shard: those of a table, or records of what lies outside."""
    return list(source) if isinstance(source, tuple) else list(read_kept(source.path, stage.record, source.sha256))


@reachable()
def run_shard(
    stage: MapStage,
    process: Process,
    source: ShardSource,
    artifact: Artifact,
    number: int,
    stall_minutes: float = STALL_MINUTES,
) -> ShardReport:
    """Make output shard `number` from input shard `source` and commit it; the first commit of its name wins."""
    started, tokens = time.monotonic(), process.tokens()
    rows = input_rows(stage, source)
    journal = Journal(artifact.folder / f"journal-{number:05d}", stall_minutes)
    with journal.landing():
        outcomes = _outcomes(stage, process, rows, journal)
    ids = Counter(outcome.id for outcome in outcomes)
    if len(ids) != len(outcomes):
        raise InternalError(f"{artifact.name} shard {number}: id {ids.most_common(1)[0][0]!r} came out twice")
    commit(artifact.shard(number), to_parquet(outcomes, stage.output))
    journal.discard()
    report = shard_report(stage, rows, artifact, number)
    return dataclasses.replace(report, tokens=process.tokens() - tokens, seconds=time.monotonic() - started)


def shard_report(stage: MapStage, rows: Sequence[Any], artifact: Artifact, number: int) -> ShardReport:
    """The digest and the balanced ledger of a committed shard, from what it holds and what went in."""
    path = artifact.shard(number)
    ledger = ledger_of(path)
    ledger.sources, ledger.in_ = len(rows), sum(stage.units(row) for row in rows)
    if stage.splits:
        # The number of records is known beforehand, so that each of them must show; what they hold beyond is not.
        ledger.sources = ledger.in_
        ledger.in_ += further_units(path)
    return ShardReport(number, file_digest(path), ledger.check(f"{artifact.name} shard {number}"))


def _outcomes(stage: MapStage, process: Process, rows: Sequence[Any], journal: Journal) -> list[Outcome]:
    outcomes: list[Outcome] = []
    rows = sorted(rows, key=lambda row: (stage.size(row), row.id))
    for start in range(0, len(rows), stage.batch_rows):
        batch = rows[start : start + stage.batch_rows]
        key = f"batch {start}"
        if journal.deaths[key] < WHOLE_TRIES:
            try:
                outcomes += journal.run(key, process, batch)
                continue
            except (MemoryError, RuntimeError) as error:
                # What is too much together may fit alone. Whole it would be too much again.
                if not is_out_of_memory(error):
                    raise
        outcomes += [o for row in batch for o in _alone(stage, process, row, journal)]
    return outcomes


def _alone(stage: MapStage, process: Process, row: Any, journal: Journal) -> Iterable[Outcome]:
    key = f"row {row.id}"
    units = stage.units(row)
    if journal.deaths[key] < ALONE_TRIES:
        try:
            return journal.run(key, process, [row])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return [quarantined(row.id, "out_of_memory", "it alone is too much for the memory of its worker", units)]
    tries = WHOLE_TRIES + ALONE_TRIES
    return [quarantined(row.id, "crashed_worker", f"its worker died {tries} times while processing it", units)]
