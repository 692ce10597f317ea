"""Whatever the bytes: no crash, units out are records counted, each id comes once, and what is lost has its place.

FUZZ_CASES says how many files are tried in all; FUZZ_SEED repeats the ones that failed, and is told when they do.
"""

import gzip
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfalign.core.errors import MismatchError
from selfalign.core.records import Document, Dropped, SeedPair, SourcePart
from selfalign.data import json_files, parquet
from selfalign.data.formats import read_documents, read_pairs
from selfalign.data.readers import RawRow, read_rows
from selfalign.data.sources import resolve

# Always the same files, unless somebody asks for a number of them.
SEED = int(os.environ.get("FUZZ_SEED") or (random.randrange(1 << 32) if "FUZZ_CASES" in os.environ else 0))
CASES = int(os.environ.get("FUZZ_CASES") or 200)

ROWS: list[dict[str, object]] = [
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because ❄."}]},
    {"conversations": ["Why?", "Because."], "source": "x"},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    {"text": "### Human: Why?### Assistant: Because.", "license": "MIT"},
    {"prompt": "Why?", "completion": [{"role": "assistant", "content": "Because."}]},
    {"instruction": "Ask.", "input": "", "output": "Why?"},
    {"instruction": "Ask.", "instances": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
    {"prompt": {"role": "prompter", "text": "Why?", "lang": "en", "replies": [{"role": "assistant", "text": "So."}]}},
    {"text": "A document.", "score": 1.5, "tags": ["a", None]},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS * 3).encode()
PAGE = """<!doctype html><html><head><meta charset="utf-8"><title>Bread</title></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/a">About</a></li></ul></nav>
<h1>Bread</h1><p>Flour, water &amp; salt. ❄</p><h2>Rye</h2><ul><li>dark<li>sour</ul><pre><code>mix()
bake()</code></pre><h3>Night</h3><p>It <b>takes <i>a</b> night</i>.<table><tr><td>1<td>2</table><h2></h2>
<script>var x = "<h1>no</h1>";</script><h1 hidden>Gone</h1><p>More.</body></html>""".encode()


def _parquet(**options: object) -> bytes:
    sink = pa.BufferOutputStream()
    columns = {
        "text": [f"A document, number {n}. ❄" for n in range(60)],
        "messages": [ROWS[0]["messages"]] * 60,
        "license": ["MIT", None] * 30,
    }
    pq.write_table(pa.table(columns), sink, row_group_size=25, **options)
    data = sink.getvalue().to_pybytes()
    assert isinstance(data, bytes)
    return data


def _zstd(data: bytes) -> bytes:
    packed = pa.Codec("zstd").compress(data, asbytes=True)
    assert isinstance(packed, bytes)
    return packed


FILES: list[tuple[str, bytes]] = [
    ("f.jsonl", JSONL),
    ("f.jsonl", JSONL.replace(b"\n", b"\r\n")),
    ("f.parquet", _parquet()),
    ("f.parquet", _parquet(compression="none", use_dictionary=False, write_page_checksum=True)),
    ("f.html", PAGE),
    ("f.html", PAGE * 3),
    ("f.json", json.dumps(ROWS * 2, indent=1).encode()),
    ("f.json", b"[" + JSONL.replace(b"}\n", b"},")[:-1] + b"]"),
    ("f.jsonl.gz", gzip.compress(JSONL, mtime=0) + gzip.compress(JSONL, mtime=0)),
    ("f.jsonl.zst", _zstd(JSONL) + _zstd(JSONL)),
    ("f.json.gz", gzip.compress(json.dumps(ROWS * 9).encode(), mtime=0)),
    ("f.html.zst", _zstd(PAGE)),
    ("f.md", "# Bread\n\nFlour ❄\n".encode()),
]
SPLICES = [
    *(b"\n", b"\r\n", b"\x00", b"\xff", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"NaN", b"\\ud800", b"null\n"),
    *(b"[" * 99, b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\x1f\x8b", b"PAR1", b"<", b"</", b"<!--", b"&#0;"),
    *(b"<h1>", b"<div>" * 99, b"<table>", b"<script>", b"<meta charset=utf-16>", b"\x80" * 40),
]


def _flip(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :] if data else data


def _cut(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + data[at + rng.randint(1, 200) :]


def _truncate(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at]


def _insert(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + rng.choice(SPLICES) + data[at:]


def _repeat(data: bytes, at: int, rng: random.Random) -> bytes:
    return data[:at] + data[max(at - rng.randint(1, 400), 0) :]


def _splice(data: bytes, at: int, rng: random.Random) -> bytes:
    other = rng.choice(FILES)[1]
    start = rng.randrange(len(other))
    return data[:at] + other[start : start + rng.randint(1, 400)] + data[at:]


def _anything(data: bytes, at: int, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(0, 300))


# What leaves most of a file whole comes most often.
EDITS = [_flip, _flip, _flip, _cut, _truncate, _insert, _insert, _insert, _repeat, _splice]


def mutated(data: bytes, rng: random.Random) -> bytes:
    edits = [_anything] if rng.random() < 0.03 else rng.choices(EDITS, k=rng.randint(1, 6))
    for edit in edits:
        data = edit(data, rng.randrange(max(len(data), 1)), rng)
    return data


@pytest.mark.parametrize("kind", range(len(FILES)), ids=[f"{n}-{name}" for n, (name, _) in enumerate(FILES)])
def test_every_record_of_a_damaged_file_is_accounted_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    name, data = FILES[kind]
    for case in range(kind, CASES, len(FILES)):
        rng = random.Random(f"{SEED} {case}")
        (tmp_path / name).write_bytes(mutated(data, rng))
        for module in (json_files, parquet):
            monkeypatch.setattr(module, "PART_ROWS", rng.choice((1, 3, 4096)))
        try:
            check(tmp_path / name)
        except Exception as error:
            error.add_note(f"FUZZ_SEED={SEED} FUZZ_CASES={CASES}, case {case}: {tmp_path / name}")
            raise


def check(path: Path) -> None:
    parts = resolve(path.name, path.parent, format="document").parts
    rows = [list(read_rows(part)) for part in parts]
    # From anywhere, and not only on from where the part before it ended.
    assert rows == list(reversed([list(read_rows(part)) for part in reversed(parts)]))
    for part, items in zip(parts, rows, strict=True):
        account(items, part.rows)
    ids = [item.id for items in rows for item in items]
    assert len(set(ids)) == len(ids)
    with suppress(MismatchError):
        detected = resolve(path.name, path.parent).parts
        convert(detected, read_documents)
        convert(detected, lambda part: read_pairs(part, turns="all"))


def convert(
    parts: tuple[SourcePart, ...], read: Callable[[SourcePart], Iterable[SeedPair | Document | Dropped]]
) -> None:
    found = [list(read(part)) for part in parts]
    for part, items in zip(parts, found, strict=True):
        account(items, part.rows)
    ids = [item.id for items in found for item in items]
    assert len(set(ids)) == len(ids)


def account(items: Sequence[RawRow | SeedPair | Document | Dropped], records: int) -> None:
    """Units are records, and further units of them; what is lost says why and where, and all can be written."""
    units = sum(item.units if isinstance(item, Dropped) else 1 for item in items)
    assert units - sum(re.search(r"/[1-9]\d{0,5}$", item.id) is not None for item in items) == records
    for item in items:
        json.dumps(asdict(item), ensure_ascii=False, default=repr).encode()
        if isinstance(item, Dropped):
            assert re.fullmatch(r"[a-z0-9_]+", item.reason)
            assert re.match(r"f\.[a-z.]+(:\d+, byte offset \d+|, row|, sha256 of the file )", str(item.detail))
            assert re.search(r"sha256 (of .*)?[0-9a-f]{64}", str(item.detail))
            assert "\n" not in str(item.detail)
