"""One shard: three tries for a row that kills, the ledger proved, one commit."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from selfalign.core import locations, shards
from selfalign.core.errors import InternalError, PreemptedError
from selfalign.core.identity import file_digest
from selfalign.core.lease import Owner
from selfalign.core.ledger import Ledger
from selfalign.core.locations import Location, commit, entries
from selfalign.core.records import Document, Dropped, Outcome, Record, SourcePart, rejected
from selfalign.core.shards import Journal, run_shard, withdraw
from selfalign.core.stage import Context, MapStage, Process
from selfalign.core.store import Artifact
from selfalign.core.tables import Shard, read_outcomes, to_parquet

# Processes the shard once. A row that says so takes the whole process with it, as a crash would.
DRIVE = """
import os, sys
from pathlib import Path
from core.test_shards import Upper, once
def upper(rows):
    with open(sys.argv[1] + ".log", "a") as log:
        log.write(" ".join(row.id for row in rows) + chr(10))
    for row in rows:
        if row.text == sys.argv[2]:
            os._exit(9)
        yield Upper.one(row)
once(Path(sys.argv[1]), upper)
# Libraries may end badly once all is done, on a busy machine, which is no death of a row.
os._exit(0)
"""


@dataclass(frozen=True)
class Upper(MapStage):
    """Upper case; two units a row when it says so."""

    name: ClassVar[str] = "toy.upper"
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document
    batch_rows: ClassVar[int] = 4
    per_row: int = 1

    def open(self, context: Context) -> Process:
        raise NotImplementedError

    def units(self, row: Document) -> int:
        return self.per_row

    @staticmethod
    def one(row: Document) -> Document:
        return Document(id=row.id, source=row.source, text=row.text.upper())


Work = Callable[[Sequence[Document]], Iterable[Outcome]]


def plain(rows: Sequence[Document]) -> Iterable[Outcome]:
    return [Upper.one(row) for row in rows]


def once(folder: Path, work: Work, stage: MapStage = Upper()) -> Artifact:
    artifact = Artifact(folder / "out", "id")
    run_shard(stage, Process(work, lambda: 0), shard(folder), artifact, 0)
    return artifact


def put(folder: Path, texts: Sequence[str]) -> list[str]:
    folder.mkdir(exist_ok=True)
    rows = [Document(id=f"d{n:02d}", source="s", text=text) for n, text in enumerate(texts)]
    (folder / "in.parquet").write_bytes(to_parquet(rows, Document))
    return [row.id for row in rows]


def shard(folder: Path) -> Shard:
    return Shard(folder / "in.parquet", file_digest(folder / "in.parquet"))


def outcomes(artifact: Artifact) -> list[Outcome]:
    return list(read_outcomes(artifact.shard(0), Document))


def died(journal: Location, key: str, host: str | None = None) -> Location:
    """What a process leaves that died with `key` in flight."""
    owner = Owner.this_process()
    owner = replace(owner, started="long ago", host=host or owner.host)
    path = journal / f"{owner.token}.json"
    assert commit(path, json.dumps({"owner": asdict(owner), "in_flight": key}).encode())
    return path


def test_every_row_comes_out_once_and_the_report_balances(tmp_path: Path) -> None:
    ids = put(tmp_path, ["b", "a", "c"] * 3)
    tokens = iter([5, 12])
    artifact = Artifact(tmp_path / "out", "id")
    report = run_shard(Upper(), Process(plain, lambda: next(tokens)), shard(tmp_path), artifact, 0)
    assert [row.id for row in outcomes(artifact)] == ids
    assert report.tokens == 7
    assert report.ledger == Ledger(sources=9, in_=9, kept=9)


def test_only_kept_rows_of_the_input_go_in(tmp_path: Path) -> None:
    rows = [Document(id="a", source="s", text="x"), rejected("b", "empty", Document(id="b", source="s", text="y"))]
    (tmp_path / "in.parquet").write_bytes(to_parquet(rows, Document))
    assert [row.id for row in outcomes(once(tmp_path, plain))] == ["a"]


def test_a_shard_of_things_outside_is_processed_as_it_is_given(tmp_path: Path) -> None:
    file = SourcePart(id="f", path="/x", sha256="0", rows=2)
    artifact = Artifact(tmp_path / "out", "id")
    seen: list[object] = []

    def read(files: Sequence[SourcePart]) -> Iterable[Outcome]:
        seen.extend(files)
        return [Document(id=f"f/{n}", source="f", text="t") for n in range(2)]

    run_shard(Upper(per_row=2), Process(read, lambda: 0), (file,), artifact, 0)
    assert seen == [file]
    assert [row.id for row in outcomes(artifact)] == ["f/0", "f/1"]


@dataclass(frozen=True)
class Split(Upper):
    """Finds only as it reads how many units a record holds."""

    splits: ClassVar[bool] = True


@pytest.mark.parametrize("lost", [False, True])
def test_a_record_that_is_split_counts_all_its_units_and_none_may_be_lost(tmp_path: Path, lost: bool) -> None:
    part = SourcePart(id="f", path="/x", sha256="0", rows=2)
    artifact = Artifact(tmp_path / "out", "id")
    ids = ["f/0000000/0", "f/0000000/1", "f/0000000/2", *([] if lost else ["f/0000001"])]
    process = Process(lambda parts: [Document(id=id, source="f", text="t") for id in ids])
    stage = Split(per_row=2)
    if lost:
        with pytest.raises(InternalError, match="does not balance: 4 units in, 3 out"):
            run_shard(stage, process, (part,), artifact, 0)
    else:
        ledger = run_shard(stage, process, (part,), artifact, 0).ledger
        assert (ledger.sources, ledger.in_, ledger.kept) == (2, 4, 4)


def test_a_second_writer_of_a_shard_changes_nothing_and_reports_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, ["a", "b"])
    artifact = once(tmp_path, plain)
    before = artifact.shard(0).read_bytes()
    process = Process(lambda rows: [rejected(row.id, "changed") for row in rows], lambda: 0)
    report = run_shard(Upper(), process, shard(tmp_path), artifact, 0)
    assert artifact.shard(0).read_bytes() == before
    assert report.ledger.kept == 2


def test_an_id_that_comes_out_twice_is_a_bug_and_nothing_is_committed(tmp_path: Path) -> None:
    put(tmp_path, ["a", "b"])
    with pytest.raises(InternalError, match=r"out shard 0: id 'd01' came out twice"):
        once(tmp_path, lambda rows: [*plain(rows), Upper.one(rows[-1])])
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.parametrize("lose", [0, 1])
def test_units_that_are_lost_or_made_up_are_a_bug(tmp_path: Path, lose: int) -> None:
    put(tmp_path, ["a", "b"])
    added = [Document(id="new", source="s", text="t")]
    with pytest.raises(InternalError, match="out shard 0: the ledger does not balance: 2 units in"):
        once(tmp_path, lambda rows: [*plain(rows)[lose:], *(added * (1 - lose))])


def test_a_row_of_several_units_must_account_for_each(tmp_path: Path) -> None:
    put(tmp_path, ["a"])
    with pytest.raises(InternalError, match="2 units in, 1 out"):
        once(tmp_path, plain, Upper(per_row=2))


def drive(folder: Path, poison: str) -> list[list[str]]:
    """Run until it ends well; the ids that each batch of each try was given."""
    for _ in range(6):
        if subprocess.run([sys.executable, "-c", DRIVE, str(folder), poison], check=False).returncode == 0:
            break
    return [line.split() for line in Path(f"{folder}.log").read_text().splitlines()]


def test_a_row_that_kills_its_process_is_tried_twice_whole_once_alone_and_then_quarantined(tmp_path: Path) -> None:
    ids = put(tmp_path / "run", ["fine", "fine", "bad", "fine", "fine"])
    tries = drive(tmp_path / "run", "bad")
    whole, rest = ids[:4], ids[4:]
    # The third process dies at the row alone; the fourth passes over it, and the rest completes.
    alone = [[ids[0]], [ids[1]], [ids[2]]]
    assert tries == [whole, whole, *alone, [ids[0]], [ids[1]], [ids[3]], rest]
    found = outcomes(Artifact(tmp_path / "run" / "out", "id"))
    (dropped,) = (row for row in found if isinstance(row, Dropped))
    assert (dropped.id, dropped.reason, dropped.outcome) == (ids[2], "crashed_worker", "quarantined")
    assert dropped.detail == "its worker died 3 times while processing it"
    assert [row.id for row in found] == ids


def test_a_crash_that_came_from_outside_costs_no_row(tmp_path: Path) -> None:
    ids = put(tmp_path / "run", ["fine"] * 3)
    for _ in range(2):
        died(tmp_path / "run" / "out" / "journal-00000", "batch 0")
    tries = drive(tmp_path / "run", "bad")
    assert tries == [[id] for id in ids]
    assert all(isinstance(row, Document) for row in outcomes(Artifact(tmp_path / "run" / "out", "id")))


def test_an_exception_is_no_crash_and_is_never_counted_as_one(tmp_path: Path) -> None:
    put(tmp_path, ["a", "b"])

    def fails(rows: Sequence[Document]) -> Iterable[Outcome]:
        raise OSError("the disk is full")

    for _ in range(5):
        with pytest.raises(OSError, match="the disk is full"):
            once(tmp_path, fails)
    seen: list[int] = []

    def works(rows: Sequence[Document]) -> Iterable[Outcome]:
        seen.append(len(rows))
        return plain(rows)

    assert all(isinstance(row, Document) for row in outcomes(once(tmp_path, works)))
    assert seen == [2]


def test_a_journal_tells_what_processes_had_in_flight_when_they_died_and_goes_with_its_shards_commit(
    place: Location,
) -> None:
    folder = place / "journal-00000"
    died(folder, "batch 0")
    died(folder, "batch 0")
    journal = Journal(folder, 20)
    journal.run("batch 4", Process(plain), [])
    # That process is alive, whatever it has in flight.
    for known in (journal, Journal(folder, 20)):
        assert known.deaths == {"batch 0": 2}
    journal.land()
    assert len(entries(folder, "*")) == 2
    journal.discard()
    journal.discard()
    assert entries(place, "*") == []
    assert Journal(folder, 20).deaths == {}


def test_whoever_is_out_of_reach_counts_as_dead_after_a_minute_without_a_sign_of_life(tmp_path: Path) -> None:
    path = died(tmp_path / "journal", "row a", host="elsewhere")
    assert Journal(tmp_path / "journal", 20).deaths == {}
    os.utime(path, (time.time() - 61,) * 2)
    assert Journal(tmp_path / "journal", 20).deaths == {"row a": 1}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"owner": {}, "in_flight": "batch 0"}', b'{"owner": 1}', b"\xff"])
def test_a_journal_that_cannot_be_read_says_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "torn.json").write_bytes(data)
    assert Journal(tmp_path, 20).deaths == {}


def test_a_committed_shard_leaves_no_journal(tmp_path: Path) -> None:
    put(tmp_path, ["a", "b"])
    once(tmp_path, plain)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-00000.parquet"]


def test_a_batch_that_is_too_much_for_the_memory_is_done_row_by_row_and_what_still_is_set_aside(tmp_path: Path) -> None:
    ids = put(tmp_path, ["small", "small", "large", "small"])
    tries: list[list[str]] = []

    def greedy(rows: Sequence[Document]) -> Iterable[Outcome]:
        tries.append([row.id for row in rows])
        if len(rows) > 3 or any(row.text == "large" for row in rows):
            raise MemoryError
        return plain(rows)

    found = outcomes(once(tmp_path, greedy))
    assert tries == [ids, *([id] for id in ids)]
    (dropped,) = (row for row in found if isinstance(row, Dropped))
    assert (dropped.id, dropped.reason, dropped.outcome) == (ids[2], "out_of_memory", "quarantined")
    assert [row.id for row in found] == ids


def test_what_was_ended_on_request_has_not_crashed(tmp_path: Path) -> None:
    put(tmp_path, ["a", "b"])
    left: list[list[Location]] = []

    def ends(rows: Sequence[Document]) -> Iterable[Outcome]:
        left.append(entries(tmp_path / "out" / "journal-00000", "*"))
        withdraw()
        left.append(entries(tmp_path / "out" / "journal-00000", "*"))
        return plain(rows)

    once(tmp_path, ends)
    withdraw()
    assert [len(each) for each in left] == [1, 0]


def test_what_is_asked_to_end_between_two_batches_has_not_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, ["fine"] * 8)
    seen: list[str] = []

    def asked(path: Location, data: bytes) -> None:
        if seen:
            assert entries(tmp_path / "out" / "journal-00000", "*")
            raise PreemptedError("asked to end")
        seen.append(path.name)
        locations.replace(path, data)

    monkeypatch.setattr(shards, "replace", asked)
    with pytest.raises(PreemptedError):
        once(tmp_path, plain)
    assert entries(tmp_path / "out" / "journal-00000", "*") == []


def test_an_attempt_shows_that_it_lives_while_a_batch_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, ["fine"])
    monkeypatch.setattr(shards, "BEAT_S", 0.01)

    def long(rows: Sequence[Document]) -> Iterable[Outcome]:
        (note,) = (tmp_path / "out" / "journal-00000").glob("*.json")
        os.utime(note, (0, 0))
        while note.stat().st_mtime == 0:
            time.sleep(0.001)
        return plain(rows)

    once(tmp_path, long)


def test_a_journal_that_another_worker_discards_this_moment_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, ["fine"])
    fsync, gone = os.fsync, list[int]()

    def late(handle: int) -> None:
        fsync(handle)
        if not gone:
            gone.append(handle)
            locations.remove(tmp_path / "out" / "journal-00000")

    monkeypatch.setattr(os, "fsync", late)
    assert len(outcomes(once(tmp_path, plain))) == 1
    assert gone


ASIDE = """
import sys, time
from pathlib import Path
from core.test_shards import Upper, once
def alone(rows):
    time.sleep(0.02)
    if len(rows) > 1:
        raise MemoryError("too much at once")
    return [Upper.one(row) for row in rows]
Path(sys.argv[1], "there-" + sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).glob("there-*"))) < 2:
    time.sleep(0.001)
once(Path(sys.argv[1]), alone)
"""


@pytest.mark.parametrize("deaths", [0, 2])
def test_of_two_workers_at_one_shard_neither_takes_the_other_for_dead(tmp_path: Path, deaths: int) -> None:
    ids = put(tmp_path, ["fine"] * 12)
    for _ in range(deaths):
        died(tmp_path / "out" / "journal-00000", "batch 0")
    workers = [subprocess.Popen([sys.executable, "-c", ASIDE, str(tmp_path), str(n)]) for n in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    found = outcomes(Artifact(tmp_path / "out", "id"))
    assert [row.id for row in found if isinstance(row, Document)] == ids
