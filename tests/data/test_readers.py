"""The end of a file's name says how it is read."""

import gzip
import json
from collections.abc import Callable
from pathlib import PurePath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfalign.core.records import SourcePart
from selfalign.data.readers import SUFFIXES, RawRow, kind_of, read_rows

PAGE = b"<h1>One</h1><p>A text.</p>"
TEXT = "A text."


def content(kind: str | None) -> bytes:
    match kind:
        case ".jsonl":
            return json.dumps({"text": TEXT}).encode()
        case ".json":
            return json.dumps([{"text": TEXT}]).encode()
        case ".parquet":
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table({"text": [TEXT]}), sink)
            return sink.getvalue().to_pybytes()
        case ".html" | ".htm":
            return PAGE
        case _:
            return TEXT.encode()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_is_read_by_its_suffix(listed: Callable[..., SourcePart], suffix: str) -> None:
    data = content(kind_of(PurePath("a" + suffix)))
    if suffix.endswith(".gz"):
        data = gzip.compress(data)
    elif suffix.endswith(".zst"):
        data = pa.Codec("zstd").compress(data, asbytes=True)
    part = listed(data, "some.name" + suffix)
    (row,) = read_rows(part)
    assert isinstance(row, RawRow)
    assert row.values["text"] == TEXT
    assert row.source == "some.name"
    assert row.id.startswith("some.name/0000000")
    assert part.rows == 1


@pytest.mark.parametrize(
    "name",
    ["a", "a.csv", "a.gz", "a.parquet.gz", "a.jsonl.gz.bak", "a.tar.gz", "a.jsonl.zst.gz", ".jsonl", ".gz", "jsonl"],
)
def test_other_names_are_no_kind(name: str) -> None:
    assert kind_of(PurePath(name)) is None


def test_a_dot_in_the_name_is_no_suffix() -> None:
    assert kind_of(PurePath("x.html/a.b.jsonl")) == ".jsonl"
    assert kind_of(PurePath("a.html.json.gz")) == ".json"


def test_an_ending_may_be_in_capitals(listed: Callable[..., SourcePart]) -> None:
    (row,) = read_rows(listed(gzip.compress(PAGE), "Contents.HTML.Gz"))
    assert isinstance(row, RawRow)
    assert (row.source, row.values["text"]) == ("Contents", TEXT)
