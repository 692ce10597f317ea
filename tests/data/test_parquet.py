"""Every row of a Parquet file is read or quarantined."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfalign.core.errors import StorageError
from selfalign.core.records import Dropped, SourcePart
from selfalign.data import parquet as kind
from selfalign.data.readers import DEPTH, ROW_BYTES, RawRow, read_rows

Listed = Callable[..., SourcePart]


def parquet(table: pa.Table, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def texts(values: list[bytes]) -> pa.Array:
    """A string column whose bytes nobody has checked."""
    return pa.array(values, pa.binary()).cast(pa.string(), safe=False)


def test_parquet_rows_are_read_in_order_across_row_groups(listed: Listed) -> None:
    file = listed(parquet(pa.table({"text": [f"row {n}" for n in range(1000)]}), row_group_size=300), "c.parquet")
    assert file.rows == 1000
    rows = [row for row in read_rows(file) if isinstance(row, RawRow)]
    assert [(row.id, row.values["text"]) for row in rows] == [(f"c/{n:07d}", f"row {n}") for n in range(1000)]


def test_a_parquet_text_that_is_not_utf8_costs_only_its_row(listed: Listed) -> None:
    file = listed(parquet(pa.table({"text": texts([b"a", b"caf\xe9", b"c"])})), "c.parquet")
    a, broken, c = read_rows(file)
    assert isinstance(a, RawRow)
    assert isinstance(c, RawRow)
    assert isinstance(broken, Dropped)
    assert (broken.id, broken.reason, broken.outcome) == ("c/0000001", "invalid_value", "quarantined")
    assert str(broken.detail).startswith(f"c.parquet, row 1, sha256 of the file {file.sha256}: ")


def test_damage_to_a_parquet_column_that_is_not_asked_for_does_no_harm(listed: Listed) -> None:
    table = pa.table({"text": ["a", "b"], "junk": texts([b"\xff", b"\xfe"]), "score": [float("nan"), float("inf")]})
    file = listed(parquet(table), "c.parquet")
    assert [r.values for r in read_rows(file, {"text"}) if isinstance(r, RawRow)] == [{"text": "a"}, {"text": "b"}]


def test_a_parquet_file_without_any_field_asked_for_still_has_its_rows(listed: Listed) -> None:
    file = listed(parquet(pa.table({"title": ["a", "b"]}), row_group_size=1), "c.parquet")
    assert [r.values for r in read_rows(file, {"text"}) if isinstance(r, RawRow)] == [{}, {}]


def test_parquet_values_that_json_lacks_do_no_harm(listed: Listed) -> None:
    table = pa.table({"text": ["a"], "x": [float("nan")], "when": pa.array([0], pa.timestamp("us")), "b": [b"\xff"]})
    (row,) = read_rows(listed(parquet(table), "c.parquet"))
    assert isinstance(row, RawRow)
    assert row.values["text"] == "a"


def test_a_parquet_row_that_is_too_large_or_too_deep_costs_only_itself(listed: Listed) -> None:
    table = pa.table({"text": ["a", "x" * (ROW_BYTES + 1), "c"]})
    outcome = [r.reason if isinstance(r, Dropped) else "" for r in read_rows(listed(parquet(table), "c.parquet"))]
    assert outcome == ["", "too_large", ""]
    value: object = "x"
    for _ in range(DEPTH):
        value = [value]
    table = pa.table({"text": ["a", "b"], "deep": [None, value]})
    outcome = [r.reason if isinstance(r, Dropped) else "" for r in read_rows(listed(parquet(table), "c.parquet"))]
    assert outcome == ["", "too_deep"]


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1", b"not parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", parquet(pa.table({"text": ["a"] * 9}))[:-9]],
    ids=["empty", "magic only", "text", "garbage", "torn"],
)
def test_an_unreadable_parquet_file_is_one_quarantined_unit(listed: Listed, data: bytes) -> None:
    file = listed(data, "c.parquet")
    (dropped,) = read_rows(file)
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason, dropped.units) == ("c/0000000", "unreadable_file", 1)
    assert file.sha256 in str(dropped.detail)


def test_a_parquet_file_torn_after_it_was_listed_loses_all_its_units(listed: Listed) -> None:
    file = listed(parquet(pa.table({"text": ["a"] * 9})), "c.parquet")
    Path(file.path).write_bytes(b"PAR1")
    (dropped,) = read_rows(file)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.units) == ("unreadable_file", 9)


def test_a_damaged_row_group_is_quarantined_and_the_others_are_kept(listed: Listed) -> None:
    values = [f"row {n} {hashlib.sha256(str(n).encode()).hexdigest()}" for n in range(30)]
    data = bytearray(
        parquet(
            pa.table({"text": values}),
            row_group_size=10,
            write_page_checksum=True,
            use_dictionary=False,
            compression="none",
        )
    )
    at = data.index(b"row 14 ")
    data[at : at + 4] = b"ROW!"
    file = listed(bytes(data), "c.parquet")
    items = list(read_rows(file))
    kept = [item.id for item in items if isinstance(item, RawRow)]
    (dropped,) = (item for item in items if isinstance(item, Dropped))
    assert kept == [f"c/{n:07d}" for n in (*range(10), *range(20, 30))]
    assert (dropped.id, dropped.reason, dropped.units) == ("c/0000010", "unreadable_rows", 10)
    assert "rows 10 to 19 (row group 1)" in str(dropped.detail)


def test_an_empty_parquet_file_has_no_rows(listed: Listed) -> None:
    file = listed(parquet(pa.table({"text": pa.array([], pa.string())})), "c.parquet")
    assert file.rows == 0
    assert list(read_rows(file)) == []


def test_a_parquet_file_with_two_columns_of_one_name_is_unreadable(listed: Listed) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    (dropped,) = read_rows(listed(parquet(table), "c.parquet"))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "unreadable_file"


# Parts


def test_parts_are_ranges_of_rows_whatever_the_row_groups(
    parts: Callable[..., tuple[SourcePart, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "PART_ROWS", 40)
    table = pa.table({"text": [f"row {n}" for n in range(1000)]})
    for group_rows in (1, 7, 40, 41, 300, 1000):
        found = parts(parquet(table, row_group_size=group_rows), "c.parquet")
        assert sum(part.rows for part in found) == 1000
        assert all(part.rows <= 40 for part in found)
        assert len(found) <= 1000 / 40 * 2
        assert [part.id for part in found] == [f"c/{part.first:07d}" for part in found]
        for part in (*found, *reversed(found)):
            numbers = range(part.first, part.first + part.rows)
            rows = [(row.id, row.values["text"]) for row in read_rows(part) if isinstance(row, RawRow)]
            assert rows == [(f"c/{n:07d}", f"row {n}") for n in numbers]


def test_parts_of_large_rows_are_short(
    parts: Callable[..., tuple[SourcePart, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "PART_BYTES", 10_000)
    rows = [hashlib.sha256(str(n).encode()).hexdigest() * 50 for n in range(20)]
    found = parts(parquet(pa.table({"text": rows}), use_dictionary=False), "c.parquet")
    assert [part.rows for part in found] == [2] * 10
    assert all(part.size <= 10_000 for part in found)


def test_each_part_counts_its_own_loss_of_a_damaged_row_group(
    parts: Callable[..., tuple[SourcePart, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "PART_ROWS", 1000)
    values = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(5000)]
    data = bytearray(
        parquet(
            pa.table({"text": values}),
            row_group_size=4000,
            data_page_size=20_000,
            write_page_checksum=True,
            use_dictionary=False,
            compression="none",
        )
    )
    data[data.index(values[2500].encode())] ^= 1
    found = parts(bytes(data), "c.parquet")
    in_order = [list(read_rows(part)) for part in found]
    assert in_order == list(reversed([list(read_rows(part)) for part in reversed(found)]))
    lost = [[(i.id, i.units) for i in items if isinstance(i, Dropped)] for items in in_order]
    first = len(in_order[2]) - 1
    assert lost == [[], [], [(f"c/{2000 + first:07d}", 1000 - first)], [("c/0003000", 1000)], []]
    assert 0 < first <= 500
    detail = str(next(i.detail for i in in_order[3] if isinstance(i, Dropped)))
    assert detail.startswith(f"c.parquet, rows 3000 to 3999 (row group 0), sha256 of the file {found[0].sha256}: ")


def test_a_file_with_fewer_rows_than_when_it_was_listed_is_an_error(listed: Listed) -> None:
    file = listed(parquet(pa.table({"text": ["a"] * 9})), "c.parquet")
    Path(file.path).write_bytes(parquet(pa.table({"text": ["a"] * 8})))
    with pytest.raises(StorageError, match="has changed since it was listed"):
        list(read_rows(file))


def test_a_footer_that_claims_more_rows_than_any_file_has_is_unreadable(
    listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "_MOST_ROWS", 8)
    (dropped,) = read_rows(listed(parquet(pa.table({"text": ["a"] * 9})), "c.parquet"))
    assert isinstance(dropped, Dropped)
    assert dropped.reason == "unreadable_file"
