"""Records as Parquet: what goes in comes out, and damage is told."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.core.errors import StorageError
from selfalign.core.records import (
    Candidate,
    Document,
    Dropped,
    Example,
    Noted,
    Outcome,
    Pair,
    Planted,
    Rated,
    Record,
    SeedPair,
    SourcePart,
    quarantined,
    rejected,
)
from selfalign.core.tables import further_units, ledger_of, read_kept, read_outcomes, to_parquet

# Everything that UTF-8 can say.
text = st.text(st.characters(codec="utf-8"), max_size=8)
texts = st.lists(text, max_size=3).map(tuple)
count = st.integers(0, 2**62)
figure = st.none() | st.floats(allow_nan=False)
PAIR = {"source": text, "license": st.none() | text, "prompt": text, "completion": text, "parents": texts}
SEED_PAIR = {**PAIR, "split": st.sampled_from([None, "train", "held_out"]), "language": st.none() | text}
SEED_PAIR |= {"rank": st.none() | count, "quality": figure}
CANDIDATE = {**PAIR, "model": text, "prompt_hash": text, "finish": st.sampled_from(["stop", "length"])}
RATED = {**CANDIDATE, "rating": figure, "unrated": st.none() | text, "reply": text}
RATED |= {"rating_dist": st.lists(st.floats(allow_nan=False), max_size=5).map(tuple)}
RATED |= {"off_scale": figure, "entropy": figure, "probability": figure}
RATED |= {"signals": st.lists(st.fixed_dictionaries({"name": text, "value": figure}), max_size=3).map(tuple)}
PLANTED = {**PAIR, "kind": text, "good": st.booleans(), "origin": text}
turns = st.lists(st.fixed_dictionaries({"role": text, "content": text}), max_size=3).map(tuple)
FIELDS: dict[type[Record], dict[str, Any]] = {
    SourcePart: {
        "path": text,
        "sha256": text,
        "rows": count,
        "first": count,
        "offset": count,
        "format": st.none() | text,
    },
    Document: {"source": text, "license": st.none() | text, "text": text, "header": st.none() | text, "within": texts},
    Pair: PAIR,
    SeedPair: SEED_PAIR,
    Candidate: CANDIDATE,
    Rated: RATED,
    Planted: PLANTED,
    Example: {"kind": text, "prompt": turns, "completion": turns, "parents": texts},
}


@st.composite
def outcomes(draw: st.DrawFn, record: type[Record]) -> list[Outcome]:
    found: list[Outcome] = []
    for id in draw(st.lists(text, unique=True, max_size=4)):
        row = record(id=id, **draw(st.fixed_dictionaries(FIELDS[record])))
        fate = draw(st.sampled_from(["kept", "noted", "rejected", "rejected whole", "quarantined"]))
        if fate in ("kept", "noted"):
            found.append(Noted(row=row, note="unlabelled") if fate == "noted" else row)
        elif fate == "quarantined":
            found.append(quarantined(id, draw(text), draw(text), draw(st.integers(1, 99))))
        else:
            found.append(rejected(id, draw(text), row if fate == "rejected whole" else None, draw(st.none() | text)))
    return found


@pytest.mark.parametrize("record", FIELDS)
def test_every_row_of_every_record_comes_back_as_it_was(
    record: type[Record], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("table") / "shard"

    @settings(deadline=None, max_examples=40)
    @given(outcomes(record))
    def check(rows: list[Outcome]) -> None:
        path.write_bytes(to_parquet(rows, record))
        found = list(read_outcomes(path, record))
        plain = [row.row if isinstance(row, Noted) else row for row in rows]
        assert found == sorted(plain, key=lambda row: row.id)
        assert ledger_of(path).noted == Counter(row.note for row in rows if isinstance(row, Noted))
        assert list(read_kept(path, record)) == [row for row in found if isinstance(row, record)]
        ledger = ledger_of(path)
        assert ledger.kept == sum(isinstance(row, record) for row in found)
        dropped = [row for row in rows if isinstance(row, Dropped)]
        assert ledger.rejected.total() + ledger.quarantined.total() == sum(row.units for row in dropped)

    check()


@settings(deadline=None, max_examples=30)
@given(outcomes(Rated), st.randoms(use_true_random=False))
def test_the_same_rows_in_any_order_are_the_same_bytes(rows: list[Outcome], chance: random.Random) -> None:
    shuffled = chance.sample(rows, len(rows))
    assert to_parquet(shuffled, Rated) == to_parquet(rows, Rated)


def test_a_table_without_rows_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(to_parquet([], Example))
    assert list(read_outcomes(tmp_path / "shard", Example)) == []
    assert ledger_of(tmp_path / "shard").to_json()["kept"] == 0


def test_a_ledger_counts_units_by_outcome_and_reason(tmp_path: Path) -> None:
    rows = [
        Document(id="a", source="s", text="t"),
        rejected("b", "empty"),
        rejected("c", "empty"),
        quarantined("d", "crashed_worker", "3 times", units=4),
    ]
    (tmp_path / "shard").write_bytes(to_parquet(rows, Document))
    assert ledger_of(tmp_path / "shard").to_json() == {
        "sources": 0,
        "in": 0,
        "kept": 1,
        "rejected": {"empty": 2},
        "quarantined": {"crashed_worker": 4},
        "noted": {},
    }


@pytest.fixture(scope="module")
def shard() -> bytes:
    rows = [Pair(id=f"p{n}", source="s", prompt=f"question {n}", completion="answer " * n) for n in range(20)]
    return to_parquet(rows, Pair)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_shard_that_was_cut_off_is_a_storage_error(shard: bytes, tmp_path: Path, cut: int) -> None:
    (tmp_path / "shard").write_bytes(shard[:cut])
    for read in (lambda path: list(read_outcomes(path, Pair)), ledger_of):
        with pytest.raises(StorageError, match="shard is damaged or unreadable") as caught:
            read(tmp_path / "shard")
        assert caught.value.exit_code == 74


def test_a_missing_shard_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        list(read_kept(tmp_path / "nowhere", Pair))


def test_a_damaged_page_is_a_storage_error_and_never_another_row(shard: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(shard)
    rows = list(read_outcomes(path, Pair))
    told = 0
    # All of the file: pages, which carry checksums, and the footer, which does not.
    for bit in random.Random(1).sample(range(len(shard) * 8), 300):
        damaged = bytearray(shard)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert list(read_outcomes(path, Pair)) == rows
        except StorageError:
            told += 1
    assert told > 150


def test_a_table_of_other_columns_is_told_not_misread(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(to_parquet([Document(id="a", source="s", text="t")], Document))
    with pytest.raises(StorageError, match="its columns are not a Pair's"):
        list(read_outcomes(path, Pair))


def test_a_ledgers_columns_are_missed_when_they_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    data = to_parquet([Document(id="a", source="s", text="t")], Document)
    path.write_bytes(data.replace(b"units", b"unitz"))
    with pytest.raises(StorageError, match="damaged or unreadable"):
        ledger_of(path)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 12)), unique=True, max_size=12))
def test_further_units_are_those_after_the_first_of_a_record(units: list[tuple[int, int]]) -> None:
    # The number of a record has seven digits, so a record is never taken for a unit.
    rows = [Document(id=f"pages/{record:07d}/{n}", source="s", text="x") for record, n in units]
    rows += [Document(id=f"whole/{n:07d}", source="s", text="x") for n in range(3)]
    with TemporaryDirectory() as folder:
        (Path(folder) / "shard").write_bytes(to_parquet(rows, Document))
        assert further_units(Path(folder) / "shard") == sum(n > 0 for _, n in units)


READS = """
import os, pathlib, sys
from selfalign.core.records import Document
from selfalign.core.tables import ledger_of, read_kept
import pyarrow.parquet
before = os.listdir("/proc/self/task")
list(read_kept(pathlib.Path(sys.argv[1]), Document)), ledger_of(pathlib.Path(sys.argv[1]))
assert os.listdir("/proc/self/task") == before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its threads")
def test_reading_leaves_no_thread_that_could_abort_the_process_at_its_end(tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    rows = [Document(id=f"{n}", source="s", text="t" * n) for n in range(64)]
    shard.write_bytes(to_parquet(rows, Document))
    subprocess.run([sys.executable, "-c", READS, shard], check=True)
