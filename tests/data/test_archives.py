"""Compressed files are read like others, and up to where they are torn or damaged."""

import errno
import gzip
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from selfalign.core.errors import StorageError
from selfalign.core.records import Dropped, SourcePart
from selfalign.data import archives, json_files
from selfalign.data.readers import RawRow, read_rows

Parts = Callable[..., tuple[SourcePart, ...]]

LINES = [b'{"text": "row %d, %s"}\n' % (n, hashlib.sha256(b"%d" % n).hexdigest().encode()) for n in range(400)]
DATA = b"".join(LINES)


def packed(data: bytes, codec: str) -> bytes:
    if codec == "gzip":
        return gzip.compress(data, mtime=0)
    compressed = pa.Codec("zstd").compress(data, asbytes=True)
    assert isinstance(compressed, bytes)
    return compressed


CODECS = {"gzip": ".gz", "zstd": ".zst"}
both = pytest.mark.parametrize("codec", CODECS)


def read(found: tuple[SourcePart, ...]) -> tuple[list[RawRow], list[Dropped]]:
    """What can be read of all parts, and what cannot."""
    items = [item for part in found for item in read_rows(part)]
    assert len(items) == sum(part.rows for part in found)
    return [i for i in items if isinstance(i, RawRow)], [i for i in items if isinstance(i, Dropped)]


@both
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_compressed_file_holds_the_rows_of_the_file_itself(parts: Parts, codec: str, kind: str) -> None:
    data = DATA if kind == ".jsonl" else b"[" + DATA.replace(b"}\n", b"},\n")[:-2] + b"]"
    plain, _ = read(parts(data, "rows" + kind))
    archive = packed(data, codec)
    found = parts(archive, "rows" + kind + CODECS[codec])
    rows, dropped = read(found)
    assert [(row.id, row.values) for row in rows] == [(row.id, row.values) for row in plain]
    assert not dropped
    assert {part.sha256 for part in found} == {hashlib.sha256(archive).hexdigest()}
    assert rows[5].where == plain[5].where.replace(f"rows{kind}", f"rows{kind}{CODECS[codec]}").replace(
        ", sha256", " (decompressed), sha256"
    )


@both
def test_several_archives_in_one_file_are_read_one_after_the_other(parts: Parts, codec: str) -> None:
    archive = packed(DATA[:9999], codec) + packed(b"", codec) + packed(DATA[9999:], codec)
    rows, dropped = read(parts(archive, "rows.jsonl" + CODECS[codec]))
    assert (len(rows), dropped) == (len(LINES), [])


@both
def test_an_empty_file_and_an_empty_archive_hold_nothing(parts: Parts, codec: str) -> None:
    for data in (b"", packed(b"", codec)):
        assert read(parts(data, "rows.jsonl" + CODECS[codec])) == ([], [])


@both
def test_an_archive_that_ends_early_is_read_up_to_there_and_the_rest_is_one_unit(parts: Parts, codec: str) -> None:
    middle = len(DATA) // 2
    first, second = packed(DATA[:middle], codec), packed(DATA[middle:], codec)
    counts = set()
    for cut in (*range(1, len(first) + len(second), 531), *range(1, 9), *range(-9, 0)):
        rows, (torn,) = read(parts((first + second)[:cut], "rows.jsonl" + CODECS[codec]))
        n = len(rows)
        assert [row.values["text"] for row in rows] == [line.decode()[10:-3] for line in LINES[:n]]
        assert (torn.id, torn.reason, torn.outcome) == (f"rows/{n:07d}", "archive_ends_early", "quarantined")
        place = f"rows.jsonl{CODECS[codec]}:{n + 1}, byte offset {len(b''.join(LINES[:n]))} (decompressed), sha256 "
        assert str(torn.detail).startswith(place)
        assert str(torn.detail).endswith(f"the {codec} archive is cut off here; fetch it again")
        counts.add(n)
    # zstd divides so little into no more than one block for each archive.
    assert len(counts) > 20 if codec == "gzip" else counts == {0, DATA[:middle].count(b"\n")}


def test_a_torn_archive_gives_what_there_is_to_the_last_byte(parts: Parts) -> None:
    archive = packed(DATA, "gzip")
    for cut in (len(archive) - 1, len(archive) - 8):
        rows, dropped = read(parts(archive[:cut], "rows.jsonl.gz"))
        assert len(rows) == len(LINES)
        assert [item.reason for item in dropped] == ["archive_ends_early"]


@both
@pytest.mark.parametrize("tail", [b"garbage, which is no archive", b"\0" * 512], ids=["garbage", "zeros"])
def test_what_follows_an_archive_is_one_unit(parts: Parts, codec: str, tail: bytes) -> None:
    rows, dropped = read(parts(packed(DATA, codec) + tail, "rows.jsonl" + CODECS[codec]))
    assert len(rows) == len(LINES)
    assert [item.reason for item in dropped] == ["unreadable_archive"]


@both
def test_damage_inside_an_archive_costs_no_row_before_it(parts: Parts, codec: str) -> None:
    first = packed(DATA, codec)
    second = bytearray(packed(DATA, codec))
    second[10] ^= 0xFF
    rows, dropped = read(parts(first + bytes(second), "rows.jsonl" + CODECS[codec]))
    assert len(rows) == len(LINES)
    assert [item.reason for item in dropped] == ["unreadable_archive"]
    assert f"the {codec} archive is damaged here or before" in str(dropped[0].detail)


@both
@pytest.mark.parametrize("data", [DATA, b"\x00", bytes(range(256))], ids=["rows", "a byte", "binary"])
def test_what_only_has_the_name_of_an_archive_is_one_unit(parts: Parts, codec: str, data: bytes) -> None:
    for kind in (".jsonl", ".json", ".txt", ".html"):
        rows, dropped = read(parts(data, f"rows{kind}{CODECS[codec]}"))
        assert rows == []
        assert [(item.id, item.units, item.outcome) for item in dropped] == [("rows/0000000", 1, "quarantined")]
        assert dropped[0].reason in ("unreadable_archive", "archive_ends_early")


@both
def test_a_torn_array_ends_in_one_unit(parts: Parts, codec: str) -> None:
    archive = packed(b"[" + b",".join(LINES * 9), codec)
    rows, dropped = read(parts(archive[:-20], "rows.json" + CODECS[codec]))
    assert [item.reason for item in dropped] == ["archive_ends_early"]
    assert len(rows) > 1000


def test_listing_and_reading_find_a_tear_at_the_same_place_however_the_file_is_divided(parts: Parts) -> None:
    archive = bytearray(packed(DATA * 9, "gzip"))
    archive[len(archive) // 2] ^= 0x10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "PART_ROWS", 100)
        found = parts(bytes(archive[:-100]), "rows.jsonl.gz")
    backwards = [list(read_rows(part)) for part in reversed(found)]
    assert [item for items in reversed(backwards) for item in items] == [i for part in found for i in read_rows(part)]


def test_a_bomb_takes_no_memory(parts: Parts) -> None:
    line = gzip.compress(b"x" * (64 << 20), 9)
    for name, reason in (("rows.jsonl.gz", "too_large"), ("rows.txt.gz", "too_large"), ("rows.html.gz", "too_large")):
        rows, dropped = read(parts(line, name))
        assert (rows, [item.reason for item in dropped]) == ([], [reason])


class _Failing(io.FileIO):
    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(100)


def test_a_file_that_cannot_be_read_is_no_archive_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed(DATA, "gzip"))
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: _Failing(self))
    with pytest.raises(StorageError, match="cannot be read: Input/output error"), archives.opened(path) as source:
        source.stream.read()
