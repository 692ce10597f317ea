"""Which seed pairs and documents a run uses, by what they are among the others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.errors import GateError
from selfalign.core.records import Document, Dropped, Outcome, SeedPair
from selfalign.core.stage import Context
from selfalign.core.store import Manifest
from selfalign.data.config import CorpusConfig, SeedConfig
from selfalign.stages.prepare.pick import PickCorpus, PickSeed


def pairs(count: int, start: int = 0) -> list[SeedPair]:
    return [
        SeedPair(id=f"seed/{n:04d}", source="s", prompt=f"q{n}", completion=f"a{n}")
        for n in range(start, start + count)
    ]


def split(rows: list[SeedPair], seed: int = 0, **config: object) -> dict[str, str | None]:
    stage = PickSeed(config=SeedConfig(path="x", **config))
    return {row.id: row.split for row in stage.run(rows, Context("s", seed, {})) if isinstance(row, SeedPair)}


def held_out(rows: list[SeedPair], seed: int = 0, **config: object) -> set[str]:
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
    rows = [
        SeedPair(id=f"s/{n}", source="s", prompt=f"Q{n // 3}" + "?" * (n % 2), completion="Yes.") for n in range(60)
    ]
    found = split(rows, held_out=5)
    prompts = {id: row.prompt.rstrip("?") for id, row in ((row.id, row) for row in rows)}
    held = {prompts[id] for id, name in found.items() if name == "held_out"}
    assert len(held) == list(found.values()).count("held_out") == 5
    for id, name in found.items():
        assert name == "held_out" or (name == "like_held_out") == (prompts[id] in held)


def test_held_out_pairs_come_from_the_sample_and_the_rest_is_accounted_for() -> None:
    stage = PickSeed(config=SeedConfig(path="x", sample=10, held_out=4))
    found = list(stage.run(pairs(30), Context("s", 0, {})))
    kept = [row for row in found if isinstance(row, SeedPair)]
    dropped = [row for row in found if isinstance(row, Dropped)]
    assert (len(kept), len(dropped)) == (10, 20)
    assert sum(row.split == "held_out" for row in kept) == 4
    assert {row.reason for row in dropped} == {"not_sampled"}
    assert all(row.row is not None for row in dropped)


def sampled(rows: list[SeedPair], config: SeedConfig, seed: int) -> set[str]:
    found = PickSeed(config=config.model_copy(update={"held_out": 0})).run(rows, Context("s", seed, {}))
    return {row.id for row in found if isinstance(row, SeedPair)}


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


def labelled(n: int, quality: float | None = None, rank: int | None = None) -> SeedPair:
    return SeedPair(id=f"s/{n}", source="s", prompt=f"q{n}", completion="a", quality=quality, rank=rank)


def test_the_top_are_the_best_by_quality_then_rank_and_unlabelled_rows_come_last() -> None:
    rows = [labelled(0), labelled(1, 0.2, 0), labelled(2, 0.9, 1), labelled(3, 0.9, 0), labelled(4, None, 2)]
    best = [sampled(rows, SeedConfig(path="x", top=top), 0) for top in range(1, 6)]
    order = [(after - before).pop() for before, after in zip([set(), *best], best, strict=False)]
    assert order == ["s/3", "s/2", "s/1", "s/4", "s/0"]


def test_of_equal_seed_pairs_the_first_stays_whatever_their_case_and_spacing() -> None:
    rows = [
        SeedPair(id=f"s/{n}", source="s", prompt=prompt, completion=completion)
        for n, (prompt, completion) in enumerate([("Hi?", "Yes"), ("hi", " yes. "), ("Hi?", "No"), ("Hi, no", "")])
    ]
    assert sampled(rows, SeedConfig(path="x", drop_duplicates=True), 0) == {"s/0", "s/2", "s/3"}
    assert sampled(rows, SeedConfig(path="x"), 0) == {row.id for row in rows}


def corpus(rows: list[Document], **config: object) -> dict[str, str | None]:
    found: list[Outcome] = list(PickCorpus(config=CorpusConfig(path="x", **config)).run(rows, Context("s", 0, {})))
    assert [row.id for row in found] == [row.id for row in rows]
    return {row.id: row.reason if isinstance(row, Dropped) else None for row in found}


def document(n: int, text: str, within: tuple[str, ...] = ()) -> Document:
    return Document(id=f"d{n}", source="s", text=text, within=within)


def test_no_document_is_dropped_by_a_filter_that_the_recipe_does_not_name() -> None:
    rows = [document(0, "same " * 40), document(1, "same " * 40, within=("d0",)), document(2, "x")]
    assert set(corpus(rows).values()) == {None}


def test_of_equal_documents_the_first_stays() -> None:
    rows = [document(0, "One text."), document(1, "Another"), document(2, "one  TEXT")]
    assert corpus(rows, drop_duplicates=True) == {"d0": None, "d1": None, "d2": "duplicate"}


def test_a_segment_is_dropped_when_any_that_encloses_it_is_kept() -> None:
    rows = [
        document(0, "a", ("gone",)),
        document(1, "b", ("gone", "d0")),
        document(2, "c", ("d0", "gone")),
        document(3, "d"),
    ]
    assert corpus(rows, drop_nested=True) == {"d0": None, "d1": "nested", "d2": "nested", "d3": None}


def test_a_near_duplicate_names_the_document_that_stays() -> None:
    words = [f"w{n}" for n in range(100)]
    rows = [
        document(0, "quite another text"),
        document(1, " ".join(words)),
        document(2, " ".join([*words[:-1], "end"])),
    ]
    found = list(PickCorpus(config=CorpusConfig(path="x", near_duplicates=0.8)).run(rows, Context("s", 0, {})))
    assert [type(row) for row in found] == [Document, Document, Dropped]
    assert (found[2].reason, found[2].detail) == ("near_duplicate", "of d1")


def test_lengths_are_kept_between_quantiles_of_what_the_filters_before_left() -> None:
    rows = [document(n, "x" * (n + 1)) for n in range(9)] + [document(9, "xxxxx")]
    kept = corpus(rows, drop_duplicates=True, length_quantiles=(0.25, 0.5))
    assert [id for id, reason in kept.items() if reason is None] == ["d2", "d3", "d4"]
    assert kept["d9"] == "duplicate"
    assert corpus([], length_quantiles=(0.25, 0.5)) == {}


def test_documents_are_drawn_from_those_that_pass_the_filters() -> None:
    rows = [document(n, f"{n % 20}") for n in range(40)]
    reasons = list(corpus(rows, drop_duplicates=True, sample=15).values())
    assert (reasons.count(None), reasons.count("duplicate"), reasons.count("not_sampled")) == (15, 20, 5)


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
    with pytest.raises(GateError, match=r"8 pairs were picked of seed\.jsonl and 8 are held out.*2 not_sampled, 3 bad"):
        stage.check(manifest(8, not_sampled=2))


def test_the_corpus_gate_wants_a_document_and_says_what_became_of_them() -> None:
    stage = PickCorpus(config=CorpusConfig(path="web.jsonl"))
    stage.check(manifest(1))
    with pytest.raises(GateError, match=r"no document is left of web\.jsonl; dropped here: 4 too_short, 3 bad_json"):
        stage.check(manifest(0, too_short=4))
