"""Which seed pairs and documents a run uses."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.errors import GateError
from selfalign.core.records import Document, Dropped, Outcome, Pair
from selfalign.core.stage import Context
from selfalign.core.store import Manifest
from selfalign.data.config import CorpusConfig, SeedConfig
from selfalign.data.sources import resolve
from selfalign.stages.prepare import PickCorpus, PickSeed, ReadCorpus, ReadSeed, sampled

Seen = Callable[..., Context]


def pairs(count: int, start: int = 0) -> list[Pair]:
    return [
        Pair(id=f"seed/{n:04d}", source="s", prompt=f"q{n}", completion=f"a{n}") for n in range(start, start + count)
    ]


def split(rows: list[Pair], seed: int = 0, **config: object) -> dict[str, str | None]:
    stage = PickSeed(config=SeedConfig(path="x", **config))
    return {row.id: row.split for row in stage.run(rows, Context("s", seed, {})) if isinstance(row, Pair)}


def held_out(rows: list[Pair], seed: int = 0, **config: object) -> set[str]:
    return {id for id, name in split(rows, seed, **config).items() if name == "held_out"}


def test_held_out_pairs_are_the_same_for_every_seed_when_nothing_is_sampled() -> None:
    first = held_out(pairs(100), seed=0, held_out=20)
    assert len(first) == 20
    assert all(held_out(pairs(100), seed=seed, held_out=20) == first for seed in range(1, 6))
    assert held_out(pairs(100)[::-1], held_out=20) == first
    # By hash, not by place.
    assert first != {row.id for row in pairs(20)}


def test_every_pair_that_is_kept_is_in_one_split() -> None:
    found = split(pairs(30), held_out=8)
    assert sorted(found.values()) == ["held_out"] * 8 + ["train"] * 22
    assert set(split(pairs(30), held_out=0).values()) == {"train"}


def test_a_pair_that_shares_its_prompt_with_a_held_out_one_is_neither_trained_on_nor_measured() -> None:
    rows = [Pair(id=f"s/{n}", source="s", prompt=f"Q{n // 3}" + "?" * (n % 2), completion="Yes.") for n in range(60)]
    found = split(rows, held_out=5)
    prompts = {id: row.prompt.rstrip("?") for id, row in ((row.id, row) for row in rows)}
    held = {prompts[id] for id, name in found.items() if name == "held_out"}
    assert len(held) == list(found.values()).count("held_out") == 5
    for id, name in found.items():
        assert name == "held_out" or (name == "like_held_out") == (prompts[id] in held)


def test_held_out_pairs_come_from_the_sample_and_the_rest_is_accounted_for() -> None:
    stage = PickSeed(config=SeedConfig(path="x", sample=10, held_out=4))
    found = list(stage.run(pairs(30), Context("s", 0, {})))
    kept = [row for row in found if isinstance(row, Pair)]
    dropped = [row for row in found if isinstance(row, Dropped)]
    assert (len(kept), len(dropped)) == (10, 20)
    assert sum(row.split == "held_out" for row in kept) == 4
    assert {row.reason for row in dropped} == {"not_sampled"}
    assert all(row.row is not None for row in dropped)


@given(st.integers(1, 60), st.integers(0, 40), st.integers(0, 3))
def test_a_sample_is_stable_when_other_rows_are_added(count: int, more: int, seed: int) -> None:
    config = SeedConfig(path="x", sample=20)
    before = sampled(pairs(count), config, seed)
    after = sampled(pairs(count + more), config, seed)
    assert len(before) == min(20, count)
    # A row that was there before leaves only where a new one comes.
    old = {row.id for row in pairs(count)}
    assert after & old <= before
    assert len(before - after) == len(after - old) - (len(after) - len(before))
    assert sampled(pairs(count)[::-1], config, seed) == before


def test_another_seed_draws_another_sample_unless_the_sample_has_its_own() -> None:
    rows, drawn = pairs(200), SeedConfig(path="x", sample=20)
    assert sampled(rows, drawn, 0) != sampled(rows, drawn, 1)
    fixed = SeedConfig(path="x", sample=20, sample_seed=1)
    assert sampled(rows, fixed, 0) == sampled(rows, fixed, 7) == sampled(rows, drawn, 1)
    assert sampled(rows, SeedConfig(path="x"), 0) == {row.id for row in rows}


def corpus(rows: list[Document], **config: object) -> dict[str, str | None]:
    found: list[Outcome] = list(PickCorpus(config=CorpusConfig(path="x", **config)).run(rows, Context("s", 0, {})))
    assert [row.id for row in found] == [row.id for row in rows]
    return {row.id: row.reason if isinstance(row, Dropped) else None for row in found}


def test_documents_are_filtered_by_length_inclusively_and_only_when_asked() -> None:
    rows = [Document(id=f"d{n}", source="s", text="é" * n) for n in range(6)]
    assert set(corpus(rows).values()) == {None}
    reasons = corpus(rows, min_chars=2, max_chars=4)
    assert reasons == {"d0": "too_short", "d1": "too_short", "d2": None, "d3": None, "d4": None, "d5": "too_long"}


def test_documents_are_drawn_from_those_that_pass_the_filters() -> None:
    rows = [Document(id=f"d{n}", source="s", text="x" * (n % 2)) for n in range(40)]
    reasons = corpus(rows, min_chars=1, sample=15)
    assert list(reasons.values()).count(None) == 15
    assert list(reasons.values()).count("too_short") == 20
    assert list(reasons.values()).count("not_sampled") == 5


def manifest(kept: int, **dropped: int) -> Manifest:
    return Manifest(
        "s",
        "i",
        "c",
        {},
        {},
        {"sources": 9, "in": 9, "kept": kept, "rejected": dropped, "quarantined": {"bad_json": 3}},
    )


def test_the_seed_gate_wants_a_pair_to_train_on() -> None:
    stage = PickSeed(config=SeedConfig(path="seed.jsonl", held_out=8))
    stage.check(manifest(9))
    with pytest.raises(GateError, match=r"8 pairs were read from seed\.jsonl and 8 are held out.*2 not_sampled, 3 bad"):
        stage.check(manifest(8, not_sampled=2))


def test_the_corpus_gate_wants_a_document_and_says_what_became_of_them() -> None:
    stage = PickCorpus(config=CorpusConfig(path="web.jsonl"))
    stage.check(manifest(1))
    with pytest.raises(GateError, match=r"no document is left of web\.jsonl; dropped here: 4 too_short, 3 bad_json"):
        stage.check(manifest(0, too_short=4))


def test_a_file_is_a_shard_whose_records_are_its_units(tmp_path: Path, seen: Seen) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 2 + "broken\n")
    (file,) = resolve("rows.jsonl", tmp_path).files
    for stage in (ReadSeed(SeedConfig(path="x")), ReadCorpus(CorpusConfig(path="x"))):
        found = list(stage.open(seen()).run([file]))
        assert len(found) == stage.units(file) == 3
        assert [type(row) for row in found] == [stage.output, stage.output, Dropped]
