"""Files of one record: a text, or a page of HTML, whose segments are its units."""

from collections.abc import Callable, Iterator
from pathlib import Path

from selfalign.core.records import Dropped, SourcePart, quarantined, rejected
from selfalign.data.archives import opened
from selfalign.data.rows import ROW_BYTES, Extent, RawRow, Unusable, changed, file_id, file_name

_BOM = b"\xef\xbb\xbf"
_MOST_SEGMENTS = 1 << 16


def page_extents(path: Path, most_bytes: int) -> tuple[str, list[Extent]]:
    """SHA-256 of a file, and the one part of it: as large as what is read of it."""
    with opened(path, hashed=True) as source:
        size = len(source.stream.read(most_bytes + 1))
        return source.sha256(), [Extent(1, size=size)]


def text_rows(part: SourcePart) -> Iterator[RawRow | Dropped]:
    """The text of a file, as one row with `text`."""
    yield from _page(part, ROW_BYTES, _text)


def html_rows(part: SourcePart) -> Iterator[RawRow | Dropped]:
    """The segments of a page, each with `header`, `text` and the ids of those that it lies `within`, outermost first.

    A page without segments is one unit.
    """
    from selfalign.data.html import PAGE_BYTES

    yield from _page(part, PAGE_BYTES, _segments)


_Read = Callable[[str, str, str, bytes], Iterator[RawRow | Dropped]]


def _page(part: SourcePart, most_bytes: int, read: _Read) -> Iterator[RawRow | Dropped]:
    where = f"{file_name(part)}, sha256 of the file {part.sha256}"
    with opened(Path(part.path)) as source:
        data = source.stream.read(most_bytes + 1)
        torn = source.torn
    if len(data) != part.size:
        raise changed(part)
    try:
        if torn:
            raise torn
        yield from read(part.id, file_id(part), where, data)
    except Unusable as error:
        yield error.row(part.id, where)


def _text(id: str, source: str, where: str, data: bytes) -> Iterator[RawRow]:
    if len(data) > ROW_BYTES:
        raise Unusable("too_large", f"the text exceeds {ROW_BYTES} bytes; split the file, or write it as .jsonl")
    try:
        text = data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable("invalid_utf8", f"{error.reason} at byte {error.start} of the text") from error
    yield RawRow(id, source, where, {"text": text})


def _segments(id: str, source: str, where: str, data: bytes) -> Iterator[RawRow | Dropped]:
    from selfalign.data.html import segments

    try:
        found = segments(data)
    except Unusable as error:
        if error.reason != "no_headers":
            raise
        # Nothing is wrong with such a page.
        yield rejected(id, error.reason, detail=f"{where}: {error.note}")
        return
    if len(found) > _MOST_SEGMENTS:
        raise Unusable("too_many_segments", f"the page has {len(found)} headers, more than {_MOST_SEGMENTS}")
    within: list[list[str]] = []
    for n, segment in enumerate(found):
        around = [] if segment.within is None else [*within[segment.within], f"{id}/{segment.within}"]
        within.append(around)
        unit, place = f"{id}/{n}", f"{where}, under {segment.header[:80]!r}"
        if segment.too_large:
            yield rejected(unit, "too_large", detail=f"{place}: the segment exceeds {ROW_BYTES} bytes")
        elif segment.damaged:
            yield quarantined(unit, "invalid_characters", f"{place}: some of its bytes are no text")
        elif not segment.text:
            yield rejected(unit, "no_text", detail=place)
        else:
            yield RawRow(unit, source, place, {"text": segment.text, "header": segment.header, "within": around})
