"""Whatever the bytes: no crash, units out are records counted, and each id comes once."""

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfalign.core.errors import MismatchError
from selfalign.core.records import Dropped, SourceFile
from selfalign.data.formats import read_documents, read_pairs
from selfalign.data.readers import RawRow, count_rows_and_digest, read_rows

fuzzed = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

ROWS = [
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because ❄."}]},
    {"conversations": ["Why?", "Because."], "source": "x"},
    {"text": "### Human: Why?### Assistant: Because.", "license": "MIT"},
    {"prompt": "Why?", "completion": [{"role": "assistant", "content": "Because."}]},
    {"text": "A document.", "score": 1.5, "tags": ["a", None]},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS * 3).encode()
SPLICES = [
    b"\n",
    b"\r\n",
    b"\x00",
    b"\xff",
    b'"',
    b"{",
    b"}",
    b"NaN",
    b"\\ud800",
    b"null\n",
    b"[" * 99,
    b"\xef\xbb\xbf",
]


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    columns = {
        "text": [f"A document, number {n}. ❄" for n in range(60)],
        "messages": [ROWS[0]["messages"]] * 60,
        "license": ["MIT", None] * 30,
    }
    pq.write_table(pa.table(columns), sink, row_group_size=25, compression="none", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


PARQUET = _parquet()

edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]),
        st.integers(0, 1 << 30),
        st.integers(1, 255),
        st.sampled_from(SPLICES) | st.binary(max_size=6),
    ),
    min_size=1,
    max_size=6,
)


def mutated(data: bytes, edits: Iterable[tuple[str, int, int, bytes]]) -> bytes:
    for kind, at, n, splice in edits:
        at %= max(len(data), 1)
        match kind:
            case "flip":
                data = data[:at] + bytes([data[at] ^ n]) + data[at + 1 :] if data else data
            case "cut":
                data = data[:at] + data[at + n :]
            case "insert":
                data = data[:at] + splice + data[at:]
            case _:
                data = data[:at] + data[max(at - n, 0) :]
    return data


def check(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    rows, sha256 = count_rows_and_digest(path)
    file = SourceFile(id="f", path=str(path), sha256=sha256, rows=rows)
    items = list(read_rows(file))
    assert sum(item.units if isinstance(item, Dropped) else 1 for item in items) == rows
    assert len({item.id for item in items}) == len(items)
    for item in items:
        json.dumps(item.values if isinstance(item, RawRow) else item.detail, ensure_ascii=False, default=repr).encode()
    for read in (read_pairs, read_documents):
        try:
            converted = list(read(file))
        except MismatchError:
            continue
        assert len({item.id for item in converted}) == len(converted)
        assert sum(item.units if isinstance(item, Dropped) else 1 for item in converted) == rows


@fuzzed
@given(edits=edits)
def test_every_record_of_a_damaged_jsonl_file_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[str, int, int, bytes]]
) -> None:
    check(tmp_path_factory.getbasetemp() / "fuzz.jsonl", mutated(JSONL, edits))


@fuzzed
@given(edits=edits)
def test_every_record_of_a_damaged_parquet_file_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[str, int, int, bytes]]
) -> None:
    check(tmp_path_factory.getbasetemp() / "fuzz.parquet", mutated(PARQUET, edits))


@fuzzed
@given(data=st.binary(max_size=300) | st.lists(st.sampled_from(SPLICES), max_size=30).map(b"".join))
def test_every_record_of_arbitrary_bytes_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    for name in ("any.jsonl", "any.parquet"):
        check(tmp_path_factory.getbasetemp() / name, data)
