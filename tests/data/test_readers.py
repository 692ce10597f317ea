"""Every record of a file is read or quarantined, whatever its bytes."""

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfalign.core.errors import StorageError
from selfalign.core.records import Dropped, SourceFile
from selfalign.data.readers import DEPTH, ROW_BYTES, RawRow, read_rows

Listed = Callable[..., SourceFile]

GOOD = b'{"text": "a good row"}'
BROKEN = {
    "invalid utf-8": (b'{"text": "caf\xe9"}', "invalid_utf8"),
    "a surrogate as utf-8": (b'{"text": "\xed\xa0\x80"}', "invalid_utf8"),
    "utf-16": ('{"text": "x"}'.encode("utf-16-le"), "invalid_json"),
    "truncated": (b'{"text": "cut', "invalid_json"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "invalid_json"),
    "a control character": (b'{"text": "a\x00b"}', "invalid_json"),
    "an endless integer": (b'{"n": ' + b"9" * 5000 + b"}", "invalid_json"),
    "not JSON": (b"hello", "invalid_json"),
    "only a form feed": (b"\x0c", "invalid_json"),
    "NaN": (b'{"text": "x", "score": NaN}', "not_finite"),
    "infinity": (b'{"text": "x", "score": -Infinity}', "not_finite"),
    "duplicate keys": (b'{"text": "a", "text": "b"}', "duplicate_key"),
    "duplicate keys inside": (b'{"text": "a", "meta": [{"k": 1, "k": 1}]}', "duplicate_key"),
    "null": (b"null", "not_an_object"),
    "a list": (b'["text"]', "not_an_object"),
    "a string": (b'"text"', "not_an_object"),
    "too large": (b'{"text": "' + b"x" * ROW_BYTES + b'"}', "too_large"),
    "too large by one byte": (b'{"text": "' + b"x" * (ROW_BYTES - 11) + b'"}', "too_large"),
    "far too large": (b'{"text": "' + b"x" * (3 * ROW_BYTES) + b'"}', "too_large"),
    "too deep": (b'{"text": ' + b"[" * DEPTH + b"]" * DEPTH + b"}", "too_deep"),
    "far too deep": (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "too_deep"),
    "deep and cut": (b'{"text": ' + b'{"a":' * 5000, "too_deep"),
    "a lone surrogate": (b'{"text": "\\ud83d alone"}', "lone_surrogate"),
    "a lone surrogate in a key": (b'{"\\uDC00": "x"}', "lone_surrogate"),
}


@pytest.mark.parametrize(("row", "reason"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_broken_row_is_quarantined_with_its_place_and_its_neighbours_are_kept(
    listed: Listed, row: bytes, reason: str, end: bytes
) -> None:
    file = listed(end.join([GOOD, row, GOOD]) + end)

    before, broken, after = read_rows(file)

    assert isinstance(before, RawRow)
    assert isinstance(after, RawRow)
    assert before.values == after.values == {"text": "a good row"}
    assert isinstance(broken, Dropped)
    assert (broken.id, broken.reason, broken.outcome, broken.units) == ("rows/0000001", reason, "quarantined", 1)
    assert broken.detail is not None
    place = f"rows.jsonl:2, byte offset {len(GOOD + end)}, sha256 {hashlib.sha256(row).hexdigest()}: "
    assert broken.detail.startswith(place)
    broken.detail.encode("utf-8")


def test_offsets_and_hashes_find_each_row_in_the_file(listed: Listed) -> None:
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\n" + b"broken\n" + b" \t\n" + GOOD
    file = listed(data)

    places = [row.where if isinstance(row, RawRow) else str(row.detail) for row in read_rows(file)]

    assert [place.split(",")[0] for place in places] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:5"]
    for place, row in zip(places, [GOOD, b"broken", GOOD], strict=True):
        offset = int(place.split("byte offset ")[1].split(",")[0])
        assert data[offset : offset + len(row)] == row
        assert hashlib.sha256(row).hexdigest() in place


def test_the_same_rows_come_from_any_line_ends_and_blank_lines(listed: Listed) -> None:
    rows = [b'{"n": 1}', b'{"n": 2}', b'{"n": 3}']
    variants = [
        b"\n".join(rows),
        b"\n".join(rows) + b"\n",
        b"\r\n".join(rows) + b"\r\n",
        b"\xef\xbb\xbf" + b"\n\n \t\r\n".join(rows),
        b"\n" + b" " * (2 * ROW_BYTES) + b"\n" + b"\n".join(rows),
    ]
    for data in variants:
        file = listed(data)
        assert file.rows == 3
        assert [(r.id, r.values) for r in read_rows(file) if isinstance(r, RawRow)] == [
            (f"rows/000000{n}", {"n": n + 1}) for n in range(3)
        ]


@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n \n", b" " * (2 * ROW_BYTES)])
def test_a_file_without_rows_has_no_rows(listed: Listed, data: bytes) -> None:
    file = listed(data)
    assert file.rows == 0
    assert list(read_rows(file)) == []


def test_a_row_of_exactly_the_limit_is_kept(listed: Listed) -> None:
    row = b'{"text": "' + b"x" * (ROW_BYTES - 12) + b'"}'
    assert len(row) == ROW_BYTES
    for end in (b"", b"\n", b"\r\n"):
        assert isinstance(next(read_rows(listed(row + end))), RawRow)


def test_a_row_of_exactly_the_depth_limit_is_kept_and_brackets_in_texts_do_not_count(listed: Listed) -> None:
    deep = b'{"a": ' + b"[" * (DEPTH - 1) + b"]" * (DEPTH - 1) + b"}"
    texts = json.dumps({"text": '[{"' * 5000, "more": "\\" * 999 + "[" * 999}).encode()
    assert all(isinstance(row, RawRow) for row in read_rows(listed(deep + b"\n" + texts)))


def test_escaped_nul_bytes_and_whole_surrogate_pairs_are_kept(listed: Listed) -> None:
    (row,) = read_rows(listed(b'{"text": "a\\u0000b \\ud83d\\ude00"}'))
    assert isinstance(row, RawRow)
    assert row.values == {"text": "a\0b \U0001f600"}


@pytest.mark.parametrize(
    "row",
    [
        b'{"a": "' + b'\\"' * 400_000,
        b'"' * 900_000,
        b"[" * 900_000,
        b'{"a": "' + b"\\" * 900_001,
        b"{" + b",".join(b'"%d":0' % n for n in range(90_000)) + b',"89999":0}',
    ],
)
def test_a_hostile_row_takes_no_time(listed: Listed, row: bytes) -> None:
    (dropped,) = read_rows(listed(row))
    assert isinstance(dropped, Dropped)


def test_a_huge_row_is_passed_over_in_bounded_memory(tmp_path: Path, listed: Listed) -> None:
    with (tmp_path / "big.jsonl").open("wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(64):
            stream.write(b"x" * ROW_BYTES)
        stream.write(b'"}\n' + GOOD)
    tracemalloc.start()
    file = SourceFile(id="big", path=str(tmp_path / "big.jsonl"), sha256="", rows=2)
    huge, good = read_rows(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(huge, Dropped)
    assert isinstance(good, RawRow)
    assert peak < 8 * ROW_BYTES


def test_a_carriage_return_at_the_end_of_a_piece_is_part_of_the_hash_unless_the_line_ends_there(
    listed: Listed,
) -> None:
    first = ROW_BYTES + 2
    for inner in (b"x" * (first - 1) + b"\r" + b"y" * 9, b"x" * (first - 1), b"x" * (first + ROW_BYTES - 1)):
        (dropped,) = read_rows(listed(inner + b"\r\n"))
        assert isinstance(dropped, Dropped)
        assert hashlib.sha256(inner).hexdigest() in str(dropped.detail)


def test_the_digest_is_the_sha256_of_the_whole_file(listed: Listed) -> None:
    for data in (b"", b"\xef\xbb\xbf" + GOOD + b"\r\n\n", b"x" * (2 * ROW_BYTES + 5) + b"\n" + GOOD):
        assert listed(data).sha256 == hashlib.sha256(data).hexdigest()


def test_a_file_that_changed_since_it_was_listed_is_an_error_and_so_is_one_that_went(listed: Listed) -> None:
    file = listed(GOOD + b"\n" + GOOD)
    Path(file.path).write_bytes(GOOD)
    with pytest.raises(StorageError, match="2 records when it was listed and holds 1 now"):
        list(read_rows(file))
    Path(file.path).unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        list(read_rows(file))


# Parquet


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
    assert (dropped.id, dropped.reason, dropped.units) == ("c", "unreadable_file", 1)
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
