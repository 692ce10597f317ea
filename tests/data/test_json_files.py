"""Every record of a JSON file is read or quarantined, whatever its bytes, and found where its place says."""

import gzip
import hashlib
import json
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfalign.core.errors import StorageError
from selfalign.core.records import Dropped, SourcePart
from selfalign.data import json_files
from selfalign.data.readers import DEPTH, ROW_BYTES, RawRow, read_rows
from selfalign.data.sources import resolve

Listed = Callable[..., SourcePart]
Parts = Callable[..., tuple[SourcePart, ...]]

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


def test_a_huge_row_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    with (tmp_path / "big.jsonl").open("wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(64):
            stream.write(b"x" * ROW_BYTES)
        stream.write(b'"}\n' + GOOD)
    tracemalloc.start()
    found = resolve("big.jsonl", tmp_path, format="document").parts
    huge, good = (item for part in found for item in read_rows(part))
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


@pytest.mark.parametrize("now", [GOOD, GOOD + b"\n" + GOOD[:-1], GOOD + b"\n\n" + GOOD, b"", b"\n" * 9])
def test_a_file_that_changed_since_it_was_listed_is_an_error_and_so_is_one_that_went(
    listed: Listed, now: bytes
) -> None:
    file = listed(GOOD + b"\n" + GOOD)
    Path(file.path).write_bytes(now)
    with pytest.raises(StorageError, match="has changed since it was listed; run again"):
        list(read_rows(file))
    Path(file.path).unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        list(read_rows(file))


# Parts

values = st.dictionaries(st.text(max_size=3), st.text(max_size=9) | st.lists(st.text(max_size=3)), max_size=3)
gaps = st.sampled_from(["", "\n", "\r\n \t\n", " "])
quick = settings(deadline=None, suppress_health_check=list(HealthCheck))


def in_parts_of(rows: int, size: int, data: bytes, name: str, parts: Parts) -> list[SourcePart]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "PART_ROWS", rows)
        patch.setattr(json_files, "PART_BYTES", size)
        return list(parts(data, name))


def as_lines(rows: list[dict[str, object]], gaps: list[str], bom: bool) -> bytes:
    text = "".join(gap + json.dumps(row, ensure_ascii=False) + "\n" for row, gap in zip(rows, gaps, strict=False))
    return b"\xef\xbb\xbf" * bom + text.encode()


def as_array(rows: list[dict[str, object]], gaps: list[str], bom: bool) -> bytes:
    # A text that ends in a gap would end in a comma.
    texts = [gap + json.dumps(row, ensure_ascii=False, indent=1) + gap for row, gap in zip(rows, gaps, strict=False)]
    return b"\xef\xbb\xbf" * bom + f"[{','.join(texts)}]".encode()


@quick
@given(
    rows=st.lists(values, max_size=12),
    gaps=st.lists(gaps, min_size=12, max_size=12),
    bom=st.booleans(),
    array=st.booleans(),
    limits=st.tuples(st.integers(1, 4), st.integers(1, 80)),
)
def test_parts_hold_each_record_once_within_their_limits_and_where_they_say(
    parts: Parts,
    rows: list[dict[str, object]],
    gaps: list[str],
    bom: bool,
    array: bool,
    limits: tuple[int, int],
) -> None:
    data = (as_array if array else as_lines)(rows, gaps, bom)
    name = "rows.json" if array else "rows.jsonl"

    found = in_parts_of(*limits, data, name, parts)

    assert sum(part.rows for part in found) == len(rows)
    assert all(part.rows <= limits[0] and (part.rows <= 1 or part.size <= limits[1]) for part in found)
    assert len({part.id for part in found}) == len(found)
    items = []
    for part in found:
        assert data[: part.offset].count(b"\n") + 1 == part.line or not rows
        read = list(read_rows(part))
        assert part.id == f"rows/{part.first:07d}"
        assert len(read) == part.rows
        items += read
    for n, (item, row) in enumerate(zip(items, rows, strict=True)):
        assert isinstance(item, RawRow)
        assert (item.id, item.source, item.values) == (f"rows/{n:07d}", "rows", row)
        line, offset, digest = place_of(item)
        text = data[offset:].decode()
        end = json.JSONDecoder().raw_decode(text)[1] if array else text.index("\n")
        assert hashlib.sha256(text[:end].encode()).hexdigest() == digest
        assert line == 1 + data[:offset].count(b"\n")


def place_of(item: RawRow | Dropped) -> tuple[int, int, str]:
    """Line, byte offset and SHA-256."""
    place = item.where if isinstance(item, RawRow) else str(item.detail)
    found = re.match(r"[^:]+:(\d+), byte offset (\d+)(?: \(decompressed\))?, sha256 (\w+)", place)
    assert found is not None
    return int(found[1]), int(found[2]), found[3]


def test_parts_can_be_read_in_any_order_and_say_where_they_are_not_what_they_were(parts: Parts) -> None:
    data = b"\n".join(b'{"n": %d}' % n for n in range(100))
    for name, content in (("rows.jsonl", data), ("rows.jsonl.gz", gzip.compress(data))):
        found = in_parts_of(7, 1 << 20, content, name, parts)
        assert len(found) == 15
        for part in (found[14], found[3], found[4], found[4], found[5], found[0]):
            numbers = range(part.first, part.first + part.rows)
            rows = [(row.id, row.values) for row in read_rows(part) if isinstance(row, RawRow)]
            assert rows == [(f"rows/{n:07d}", {"n": n}) for n in numbers]
        part = replace(found[3], sha256="another", offset=found[3].offset + 1)
        with pytest.raises(StorageError, match="has changed"):
            list(read_rows(part))


def test_a_reading_that_was_given_up_does_not_move_the_next(parts: Parts) -> None:
    data = gzip.compress(b"\n".join(b'{"n": %d}' % n for n in range(9)))
    first, second, _ = in_parts_of(3, 1 << 20, data, "rows.jsonl.gz", parts)
    assert next(iter(read_rows(first))).id == "rows/0000000"
    for part in (first, second, second, first):
        assert [row.id for row in read_rows(part)] == [f"rows/{part.first + n:07d}" for n in range(3)]


def test_a_record_larger_than_a_part_is_a_part_of_its_own(parts: Parts) -> None:
    rows = [b'{"t": "%s"}' % (b"x" * size) for size in (5, 5, 500, 5, 5)]
    found = in_parts_of(9, 100, b"\n".join(rows), "rows.jsonl", parts)
    assert [part.rows for part in found] == [2, 1, 2]


# Arrays and objects


def outcome(part: SourcePart) -> list[object]:
    return [item.values if isinstance(item, RawRow) else item.reason for item in read_rows(part)]


ARRAYS: dict[str, tuple[bytes, list[object]]] = {
    "objects": (b'[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
    "over lines": (b'\n[\n  {\n    "a": 1\n  }\n]\n', [{"a": 1}]),
    "empty": (b"[]", []),
    "blank": (b" [ \n ] ", []),
    "a comma too many": (b'[{"a": 1},\n]', [{"a": 1}]),
    "brackets and quotes in texts": (
        json.dumps([{"a": '}], {"\\'}, {"b": "\\"}]).encode(),
        [{"a": '}], {"\\'}, {"b": "\\"}],
    ),
    "what is no object": (b'[{"a": 1}, 2, "x", [3], {"a": 4}]', [{"a": 1}, *["not_an_object"] * 3, {"a": 4}]),
    "a broken element": (b'[{"a": NaN}, {"a": }, {"a" 1}, {"a": 1}]', ["not_finite", *["invalid_json"] * 2, {"a": 1}]),
    "a bracket too many": (b'[{"a": 1}}, {"a": 2}]', ["invalid_json", {"a": 2}]),
    "no comma": (b'[{"a": 1} {"a": 2}, {"a": 3}]', ["invalid_json", {"a": 3}]),
    "invalid utf-8": (b'[{"a": "\xff"}, {"a": 2}]', ["invalid_utf8", {"a": 2}]),
    "a bracket too few": (b'[{"a": 1}, {"a": [2}, {"a": 3}]', [{"a": 1}, "unfinished_array"]),
    "a quote too few": (b'[{"a": 1}, {"a": "2}, {"a": 3}]', [{"a": 1}, "unfinished_array"]),
    "cut off": (b'[{"a": 1}, {"a": 2', [{"a": 1}, "unfinished_array"]),
    "cut off after an element": (b'[{"a": 1},', [{"a": 1}, "unfinished_array"]),
    "cut off in an escape": (b'[{"a": "\\', ["unfinished_array"]),
    "only its bracket": (b"[", ["unfinished_array"]),
    "something after it": (b'[{"a": 1}] {"a": 2}\n{"a": 3}', [{"a": 1}, "after_the_array"]),
    "an element that is too large": (
        b'[{"a": 1}, {"a": "' + b"x" * (3 * ROW_BYTES) + b'"}, {"a": 2}]',
        [{"a": 1}, "too_large", {"a": 2}],
    ),
    "an element of exactly the limit": (
        b'[{"a": "' + b"x" * (ROW_BYTES - 9) + b'"}' + b" " * 999 + b"]",
        [{"a": "x" * (ROW_BYTES - 9)}],
    ),
    "one object": (b'{\n "a": 1,\n "b": [{"c": 2}]\n}\n', [{"a": 1, "b": [{"c": 2}]}]),
    "one object on a line": (b'{"a": 1}', [{"a": 1}]),
    "one object that is cut off": (b'{\n "a": 1,\n', ["invalid_json"]),
    "one object that is too large": (b'{\n "a": "' + b"x" * (3 * ROW_BYTES) + b'"}', ["too_large"]),
    "lines": (b'{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
    "lines of which the first is cut off": (b'{"a": "1\n{"a": 2}\n', ["invalid_json", {"a": 2}]),
    "nothing": (b"", []),
    "a number": (b"1", ["not_an_object"]),
    "no JSON": (b"hello\nworld", ["invalid_json", "invalid_json"]),
}


@pytest.mark.parametrize(("data", "expected"), ARRAYS.values(), ids=ARRAYS.keys())
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_a_json_file_is_an_array_or_an_object_or_lines_and_what_is_broken_costs_only_itself_where_that_can_be_told(
    parts: Parts, bom: bytes, data: bytes, expected: list[object]
) -> None:
    found = parts(bom + data, "rows.json")
    assert [item for part in found for item in outcome(part)] == expected
    for item in (item for part in found for item in read_rows(part)):
        line, offset, digest = place_of(item)
        assert line == 1 + (bom + data)[:offset].count(b"\n")
        rest = (bom + data)[offset:]
        assert len(rest) > 1000 or digest in {hashlib.sha256(rest[:end]).hexdigest() for end in range(len(rest) + 1)}


@quick
@given(
    data=st.lists(
        st.sampled_from(
            [b"{", b"}", b"[", b"]", b",", b'"', b"\\", b'{"a": "b"}', b'"\\\\"', b"\n", b" ", b"x", b"\xff"]
        ),
        max_size=40,
    ).map(b"".join),
    size=st.integers(1, 9),
)
def test_where_a_file_happens_to_be_divided_for_reading_changes_nothing(parts: Parts, data: bytes, size: int) -> None:
    found = in_parts_of(1, 1 << 20, b"[" + data, "rows.json", parts)
    whole = [list(read_rows(part)) for part in found]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_PIECE", size)
        assert in_parts_of(1, 1 << 20, b"[" + data, "rows.json", parts) == found
        assert [list(read_rows(part)) for part in found] == whole


def test_a_huge_element_is_passed_over_in_bounded_memory(tmp_path: Path) -> None:
    with (tmp_path / "big.json").open("wb") as stream:
        stream.write(b'[{"text": "')
        for _ in range(64):
            stream.write(b"x" * ROW_BYTES)
        stream.write(b'"},\n' + GOOD + b"]")
    tracemalloc.start()
    found = resolve("big.json", tmp_path, format="document").parts
    huge, good = (item for part in found for item in read_rows(part))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(huge, Dropped)
    assert isinstance(good, RawRow)
    assert peak < 8 * ROW_BYTES
