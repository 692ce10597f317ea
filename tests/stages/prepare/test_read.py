"""Parts of files as shards of seed pairs and documents."""

from collections.abc import Callable
from pathlib import Path

import pytest

from selfalign.core.errors import GateError
from selfalign.core.records import Document, Dropped, SeedPair
from selfalign.core.stage import Context
from selfalign.core.store import Manifest
from selfalign.data.config import CorpusConfig, SeedConfig
from selfalign.data.sources import resolve
from selfalign.stages.prepare.read import ReadCorpus, ReadSeed

Seen = Callable[..., Context]


def test_the_records_of_a_part_are_its_units(tmp_path: Path, seen: Seen) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 2 + "broken\n")
    (parts,) = resolve("rows.jsonl", tmp_path).shards
    for stage in (ReadSeed(SeedConfig(path="x")), ReadCorpus(CorpusConfig(path="x"))):
        found = list(stage.open(seen()).run(parts))
        assert len(found) == sum(stage.units(part) for part in parts) == 3
        assert [type(row) for row in found] == [stage.output, stage.output, Dropped]


def test_all_turns_of_a_conversation_are_pairs_where_the_recipe_wants_them(tmp_path: Path, seen: Seen) -> None:
    (tmp_path / "rows.jsonl").write_text('{"conversations": ["a", "b", "c", "d", "e"]}\n')
    (parts,) = resolve("rows.jsonl", tmp_path).shards
    first, every = ReadSeed(SeedConfig(path="x")), ReadSeed(SeedConfig(path="x", turns="all"))
    assert first.settings() != every.settings()
    assert [row.prompt for row in first.open(seen()).run(parts) if isinstance(row, SeedPair)] == ["a"]
    found = list(every.open(seen()).run(parts))
    assert [row.prompt for row in found if isinstance(row, SeedPair)] == ["a", "c"]
    assert [row.reason for row in found if isinstance(row, Dropped)] == ["no_response"]


def test_a_format_that_is_named_is_the_rows_and_not_the_texts_and_pages(tmp_path: Path, seen: Seen) -> None:
    files = {"a.jsonl": '{"conversations": ["q", "a"]}\n', "b.md": "# B", "c.html": "<h1>C</h1><p>c</p>"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    config = CorpusConfig(path="x", format="lima")
    (parts,) = resolve(".", tmp_path, format=config.format).shards
    found = list(ReadCorpus(config).open(seen()).run(parts))
    assert [row.text for row in found if isinstance(row, Document)] == ["a", "# B", "c"]


def test_a_page_comes_out_as_its_segments_with_those_that_enclose_them(tmp_path: Path, seen: Seen) -> None:
    page = "<h1>Boats</h1><p>All of them.</p><h2>Sails</h2><p>White ones.</p><h3>Sewing</h3><p>By hand.</p>"
    (tmp_path / "page.html").write_text(page)
    (parts,) = resolve("page.html", tmp_path).shards
    found = list(ReadCorpus(CorpusConfig(path="x")).open(seen()).run(parts))
    rows = sorted((row for row in found if isinstance(row, Document)), key=lambda row: row.id)
    assert [row.header for row in rows] == ["Boats", "Sails", "Sewing"]
    assert [row.within for row in rows] == [(), (rows[0].id,), (rows[0].id, rows[1].id)]
    assert rows[1].text.split() == ["White", "ones.", "Sewing", "By", "hand."]


def test_a_source_without_a_usable_row_ends_the_run_and_says_where_to_look() -> None:
    stage = ReadCorpus(CorpusConfig(path="web"))

    def manifest(kept: int, **lost: int) -> Manifest:
        ledger = {"sources": 1, "in": kept + sum(lost.values()), "kept": kept, "rejected": {}, "quarantined": lost}
        return Manifest("s", "i", "c", {}, {}, ledger)

    stage.check(manifest(1, not_html=3))
    with pytest.raises(GateError, match=r"nothing that web holds can be used; dropped here: 3 not_html\. `selfalign"):
        stage.check(manifest(0, not_html=3))
    with pytest.raises(GateError, match=r"prepare\.read_corpus: web holds no record; name a file that does"):
        stage.check(manifest(0))
