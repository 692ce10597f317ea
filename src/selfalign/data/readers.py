"""List and read files of rows, so that whatever bytes they hold, every record is accounted for.

What a record is depends on the kind of file, and the end of its name tells that: a line, an element of an array, a
row of a table, a text, a page. A broken one is quarantined with its place and hash, and its neighbours are read.
"""

from collections.abc import Collection, Iterator
from pathlib import Path, PurePath

from selfalign.core.records import Dropped, SourcePart
from selfalign.data.archives import CODECS, codec_of
from selfalign.data.json_files import json_extents, json_rows
from selfalign.data.pages import html_rows, page_extents, text_rows
from selfalign.data.parquet import parquet_extents, parquet_rows
from selfalign.data.rows import DEPTH, PART_BYTES, PART_ROWS, ROW_BYTES, Extent, RawRow, Unusable

__all__ = [
    "DEPTH",
    "KINDS",
    "LISTING",
    "PART_BYTES",
    "PART_ROWS",
    "PROSE",
    "ROW_BYTES",
    "SUFFIXES",
    "RawRow",
    "Unusable",
    "extents",
    "kind_of",
    "read_rows",
]

_HTML = (".html", ".htm")
_TEXT = (".txt", ".md")
# Raise it where `extents` comes to divide some file otherwise, or `detect` to tell its format otherwise: what runs keep
# of their files is then found anew.
LISTING = 1
# Whose records are documents, whatever they say.
PROSE = (*_HTML, *_TEXT)
KINDS = (".jsonl", ".json", ".parquet", *PROSE)
SUFFIXES = (*KINDS, *(kind + packed for kind in KINDS if kind != ".parquet" for packed in CODECS))


def kind_of(path: PurePath) -> str | None:
    """Which of KINDS a file is, by its name in any case; None where it is none that can be read."""
    packed = codec_of(path) is not None
    kind = (PurePath(path.stem).suffix if packed else path.suffix).lower()
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def extents(path: Path) -> tuple[str, list[Extent]]:
    """SHA-256 of a file, and its parts in order: one at least.

    Each holds up to PART_ROWS records and PART_BYTES bytes, unless a single record is larger. Raises StorageError
    where the file cannot be read.
    """
    match kind_of(path):
        case ".jsonl" | ".json" as kind:
            return json_extents(path, arrays=kind == ".json")
        case ".parquet":
            return parquet_extents(path)
        case ".html" | ".htm":
            from selfalign.data.html import PAGE_BYTES

            return page_extents(path, PAGE_BYTES)
        case _:
            return page_extents(path, ROW_BYTES)


def read_rows(part: SourcePart, fields: Collection[str] | None = None) -> Iterator[RawRow | Dropped]:
    """Every record of `part`, in order: `part.rows` units in all, and those beyond the first of a page.

    `fields` limits what is decoded of a Parquet file, so that damage to other columns does no harm. Raises
    StorageError where the file cannot be opened, or has changed since it was listed.
    """
    match kind_of(PurePath(part.path)):
        case ".jsonl" | ".json" as kind:
            yield from json_rows(part, arrays=kind == ".json")
        case ".parquet":
            yield from parquet_rows(part, fields)
        case ".html" | ".htm":
            yield from html_rows(part)
        case _:
            yield from text_rows(part)
