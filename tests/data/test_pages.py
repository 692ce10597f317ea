"""A text and a page are one record each, whatever their bytes; a page's segments are its units."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from selfalign.core.errors import StorageError
from selfalign.core.records import Document, Dropped, SourcePart
from selfalign.data import pages
from selfalign.data.formats import read_documents
from selfalign.data.html import PAGE_BYTES
from selfalign.data.readers import ROW_BYTES, RawRow, read_rows
from selfalign.data.sources import resolve

Listed = Callable[..., SourcePart]

PAGE = b"""<!doctype html><meta charset=utf-8><body>
<h1>Bread</h1><p>Flour and water.
<h2>Rye</h2><p>It is dark.
<h3>Sour</h3><p>It takes a night.
<h2>Empty</h2>
<h1>Broken</h1><p>caf\xe9 au lait \xe2\x9d\x84 \xe2\x9d\x84 \xe2\x9d\x84
"""


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_a_text_is_one_document(listed: Listed, name: str) -> None:
    for mark in (b"", b"\xef\xbb\xbf"):
        part = listed(mark + b"# One\r\n\ntwo \xe2\x9d\x84\n", name)
        (row,) = read_rows(part)
        assert isinstance(row, RawRow)
        assert (row.id, row.source, row.values) == ("a/0000000", "a", {"text": "# One\r\n\ntwo ❄\n"})
        assert row.where == f"{name}, sha256 of the file {part.sha256}"
        (document,) = read_documents(part)
        assert isinstance(document, Document)
        assert document.text == "# One\n\ntwo ❄"


@pytest.mark.parametrize(
    ("data", "reason", "says"),
    [
        (b"caf\xe9", "invalid_utf8", "byte 3 of the text"),
        ("x".encode("utf-16"), "invalid_utf8", "byte 0"),
        (b"x" * (ROW_BYTES + 1), "too_large", "split the file, or write it as .jsonl"),
        (b"", "empty_response", "a.txt"),
        (b" \n", "empty_response", "a.txt"),
    ],
)
def test_a_text_that_is_none_is_quarantined(listed: Listed, data: bytes, reason: str, says: str) -> None:
    part = listed(data, "a.txt")
    (dropped,) = read_documents(part)
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason, dropped.outcome) == ("a/0000000", reason, "quarantined")
    assert says in str(dropped.detail)
    assert part.sha256 in str(dropped.detail)


def test_a_text_of_exactly_the_limit_is_kept(listed: Listed) -> None:
    assert isinstance(next(read_rows(listed(b"x" * ROW_BYTES, "a.txt"))), RawRow)


@pytest.mark.parametrize("name", ["p.html", "p.htm"])
def test_a_page_is_one_record_and_its_segments_are_units_that_know_what_they_lie_within(
    listed: Listed, name: str
) -> None:
    part = listed(PAGE, name)
    assert part.rows == 1

    bread, rye, sour, empty, broken = read_rows(part)

    for row, n, header, within in (
        (bread, 0, "Bread", []),
        (rye, 1, "Rye", ["p/0000000/0"]),
        (sour, 2, "Sour", ["p/0000000/0", "p/0000000/1"]),
    ):
        assert isinstance(row, RawRow)
        assert (row.id, row.source) == (f"p/0000000/{n}", "p")
        assert (row.values["header"], row.values["within"]) == (header, within)
        assert row.where == f"{name}, sha256 of the file {part.sha256}, under {header!r}"
    assert isinstance(sour, RawRow)
    assert sour.values["text"] == "It takes a night."
    assert isinstance(empty, Dropped)
    assert (empty.id, empty.reason, empty.outcome) == ("p/0000000/3", "no_text", "rejected")
    assert isinstance(broken, Dropped)
    assert (broken.id, broken.reason, broken.outcome) == ("p/0000000/4", "invalid_characters", "quarantined")
    assert "under 'Broken'" in str(broken.detail)


BAD: dict[str, tuple[bytes, str, str]] = {
    "no headers": (b"<p>Just a text.", "no_headers", "rejected"),
    "nothing": (b"", "not_html", "quarantined"),
    "binary": (bytes(range(256)) * 400, "not_html", "quarantined"),
    "too large": (b"<h1>a</h1>" + b"x" * PAGE_BYTES, "too_large", "quarantined"),
    "50 MB": (b"<h1>a</h1>" + b"<p>x</p>" * 6_500_000, "too_large", "quarantined"),
    "too deep": (b"<h1>a</h1>" + b"<div>" * 200_000, "too_deep", "quarantined"),
}


@pytest.mark.parametrize(("data", "reason", "outcome"), BAD.values(), ids=BAD.keys())
def test_a_page_that_cannot_be_segmented_is_one_unit_with_its_reason_and_place(
    listed: Listed, data: bytes, reason: str, outcome: str
) -> None:
    part = listed(data, "p.html")
    (dropped,) = read_rows(part)
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason, dropped.outcome) == ("p/0000000", reason, outcome)
    assert str(dropped.detail).startswith(f"p.html, sha256 of the file {part.sha256}: ")


def test_a_page_of_more_headers_than_any_text_has_is_one_unit(listed: Listed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MOST_SEGMENTS", 8)
    assert len(list(read_rows(listed(b"<h1>a</h1>b" * 8, "p.html")))) == 8
    (dropped,) = read_rows(listed(b"<h1>a</h1>b" * 9, "p.html"))
    assert isinstance(dropped, Dropped)
    assert (dropped.id, dropped.reason) == ("p/0000000", "too_many_segments")


def test_a_page_nested_ten_thousand_deep_is_read(listed: Listed) -> None:
    data = b"<h1>a</h1>" + b"<div>" * 10_000 + b"deep" + b"</div>" * 10_000
    (row,) = read_rows(listed(data, "p.html"))
    assert isinstance(row, RawRow)
    assert row.values["text"] == "deep"


def test_a_segment_too_large_for_a_row_is_rejected_and_its_parts_are_kept(listed: Listed) -> None:
    paragraph = b"<p>" + b"word " * 100_000
    large, *kept = read_rows(listed(b"<h1>all</h1>" + b"".join(b"<h2>x</h2>" + paragraph for _ in range(3)), "p.html"))
    assert isinstance(large, Dropped)
    assert (large.id, large.reason, large.outcome) == ("p/0000000/0", "too_large", "rejected")
    assert [isinstance(row, RawRow) and row.values["within"] for row in kept] == [["p/0000000/0"]] * 3


@pytest.mark.parametrize("name", ["p.html", "p.txt"])
def test_a_page_that_changed_since_it_was_listed_is_an_error(listed: Listed, name: str) -> None:
    part = listed(PAGE, name)
    Path(part.path).write_bytes(PAGE[:-1])
    with pytest.raises(StorageError, match="has changed since it was listed"):
        list(read_rows(part))


# Real data


def test_every_segment_of_the_real_pages_becomes_a_document_or_says_why_not(real_data: Path) -> None:
    found = resolve("html/nodejs", real_data)
    assert len(found.parts) == 10
    assert {part.format for part in found.parts} == {"document"}
    items = [item for part in found.parts for item in read_documents(part)]
    reasons = Counter(item.reason if isinstance(item, Dropped) else "kept" for item in items)
    assert reasons["kept"] > 500
    assert set(reasons) <= {"kept", "no_text"}
    kept = {item.id: item for item in items if isinstance(item, Document)}
    for item in kept.values():
        assert item.header
        assert all(around in {i.id for i in items} for around in item.within[-1:])
