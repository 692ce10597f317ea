"""Training rows: from whom, with which tag, and never from a held-out pair."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from selfalign.core.records import Dropped, Example, Outcome, Rated, SeedPair
from selfalign.core.stage import Context, External
from selfalign.data.sources import resolve
from selfalign.stages.augment import AugmentConfig
from selfalign.stages.compose import ComposeBackward, ComposeConfig, ComposeForward, ReplayConfig
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rubric import RatingPrompt
from stages.conftest import Stored

Seen = Callable[..., Context]

SEED = [
    SeedPair(
        id=f"seed/{n}",
        source="s",
        prompt=f"question {n}",
        completion=f"answer {{response}} {n}",
        split="held_out" if n % 3 == 0 else "train",
    )
    for n in range(9)
]
HELD_OUT = {row.id for row in SEED if row.split == "held_out"}
CURATED = [
    Rated(
        id=f"doc/{n}/0",
        source="w",
        prompt=f"instruction {n}",
        completion=f"text {n}",
        parents=(f"doc/{n}",),
        model="m",
        prompt_hash="h",
        finish="stop",
        rating=5.0,
    )
    for n in range(4)
]


def forward(context: Context, **config: object) -> tuple[list[Example], list[Dropped]]:
    stage = ComposeForward(config=ComposeConfig(**config), curate=CurateConfig())
    found: list[Outcome] = list(stage.run(SEED, context))
    assert len(found) == stage.units(SEED, context)
    assert len({row.id for row in found}) == len(found)
    examples = [row for row in found if isinstance(row, Example)]
    return examples, [row for row in found if isinstance(row, Dropped)]


def test_the_backward_rows_turn_the_pairs_round(tmp_path: Path, seen: Seen) -> None:
    (tmp_path / "prompt.txt").write_text("Ask for:\n{response}")
    stage = ComposeBackward(augment=AugmentConfig(prompt_file=str(tmp_path / "prompt.txt")))
    found = list(stage.run(SEED, seen()))
    assert [row.id for row in found] == [row.id for row in SEED]
    assert {row.id for row in found if isinstance(row, Dropped) and row.reason == "held_out"} == HELD_OUT
    example = found[1]
    assert isinstance(example, Example)
    assert example.prompt == ({"role": "user", "content": "Ask for:\nanswer {response} 1"},)
    assert example.completion == ({"role": "assistant", "content": "question 1"},)
    assert example.parents == ("seed/1",)


def test_no_held_out_pair_is_ever_trained_on(seen: Seen, stored: Stored) -> None:
    for config in ({}, {"include_seed": False}, {"seed_system": "x"}):
        examples, dropped = forward(seen(curated=stored("select", CURATED, Rated)), **config)
        trained = {parent for row in examples for parent in row.parents}
        assert not trained & HELD_OUT
        assert {row.id for row in dropped if row.reason == "held_out"} == HELD_OUT


def test_every_row_traces_to_what_it_was_made_from(seen: Seen, stored: Stored) -> None:
    examples, _ = forward(seen(curated=stored("select", CURATED, Rated)))
    by_id = {row.id: row for row in examples}
    assert by_id["seed/seed/1"].parents == ("seed/1",)
    assert by_id["augmented/doc/2/0"].parents == ("doc/2/0", "doc/2")
    assert by_id["augmented/doc/2/0"].completion == ({"role": "assistant", "content": "text 2"},)
    assert {row.id for row in examples} == {f"{row.kind}/{row.parents[0]}" for row in examples}


def test_seed_pairs_and_documents_may_come_from_files_of_one_name(seen: Seen, stored: Stored) -> None:
    twin = replace(CURATED[0], id=next(row.id for row in SEED if row.split == "train"))
    examples, _ = forward(seen(curated=stored("select", [twin], Rated)))
    assert len({row.id for row in examples}) == len(examples)
    assert [row.parents[0] for row in examples].count(twin.id) == 2


def test_tags_tell_seed_rows_from_augmented_ones(seen: Seen, stored: Stored) -> None:
    context = seen(curated=stored("select", CURATED, Rated))
    examples, _ = forward(context, seed_system="Sa", augmented_system="Sw")
    tags = {(row.kind, row.prompt[0]["role"], row.prompt[0]["content"]) for row in examples}
    assert tags == {("seed", "system", "Sa"), ("augmented", "system", "Sw")}
    assert {row.prompt[1]["role"] for row in examples} == {"user"}
    untagged, _ = forward(context)
    assert {len(row.prompt) for row in untagged} == {1}


def test_without_the_seed_the_curated_pairs_train_alone(seen: Seen, stored: Stored) -> None:
    examples, dropped = forward(seen(curated=stored("select", CURATED, Rated)), include_seed=False)
    assert {row.kind for row in examples} == {"augmented"}
    assert {row.reason for row in dropped} == {"held_out", "seed_left_out"}


def test_the_first_model_sees_the_seed_alone(seen: Seen) -> None:
    examples, _ = forward(seen())
    assert {row.parents for row in examples} == {(row.id,) for row in SEED if row.id not in HELD_OUT}


GOOD = [{"prompt": f"p{n}", "completion": f"c{n}", "reply": f"Fine.\nScore: {n}"} for n in range(1, 6)]


@pytest.fixture
def replay(tmp_path: Path) -> Callable[..., External]:
    def write(*lines: object) -> External:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "ratings.jsonl").write_text("".join(text + "\n" for text in texts))
        found = resolve("ratings.jsonl", tmp_path)
        return External("ratings.jsonl", "digest", found.shards)

    return write


def test_replayed_ratings_are_asked_as_the_rater_is_and_counted(seen: Seen, replay: Callable[..., External]) -> None:
    examples, _ = forward(seen(replay=replay(*GOOD)), rating_replay=ReplayConfig(path="x"))
    rows = [row for row in examples if row.kind == "rating"]
    assert len(rows) == 5
    assert rows[0].prompt == RatingPrompt.of(CurateConfig()).messages("p1", "c1")
    assert rows[0].completion == ({"role": "assistant", "content": "Fine.\nScore: 1"},)
    assert len({parent for row in rows for parent in row.parents}) == 5


def test_broken_replay_rows_are_quarantined_with_where_they_stand(seen: Seen, replay: Callable[..., External]) -> None:
    broken = ["not json", {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c", "reply": 4}]
    examples, dropped = forward(seen(replay=replay(*GOOD, *broken)), rating_replay=ReplayConfig(path="x"))
    told = [row for row in dropped if row.outcome == "quarantined"]
    assert sum(row.kind == "rating" for row in examples) == 5
    assert len(told) == 3
    assert [row.reason for row in told[1:]] == ["wrong_type", "wrong_type"]
    assert all("ratings.jsonl" in (row.detail or "") for row in told)


def test_the_wanted_number_of_replay_rows_is_drawn_by_seed_from_the_whole_ones(
    seen: Seen, replay: Callable[..., External]
) -> None:
    source = replay("not json", *GOOD, {"prompt": "p"}, "[]")
    drawn = []
    for seed in range(20):
        examples, dropped = forward(seen(seed, replay=source), rating_replay=ReplayConfig(path="x", rows=3))
        drawn.append(frozenset(row.id for row in examples if row.kind == "rating"))
        assert sum(row.reason == "not_sampled" for row in dropped) == 2
    assert {len(each) for each in drawn} == {3}
    assert len(set(drawn)) > 1


def test_a_seed_row_is_not_changed_by_what_else_is_trained_on(
    seen: Seen, stored: Stored, replay: Callable[..., External]
) -> None:
    alone, _ = forward(seen())
    mixed, _ = forward(
        seen(curated=stored("select", CURATED, Rated), replay=replay(*GOOD)), rating_replay=ReplayConfig(path="x")
    )
    assert [row for row in mixed if row.kind == "seed"] == alone


def test_the_rubric_counts_in_the_identity_only_where_ratings_are_replayed(tmp_path: Path) -> None:
    (tmp_path / "rate.txt").write_text("Other rubric\n---\n{instruction} {response}")
    other = CurateConfig(prompt_file=str(tmp_path / "rate.txt"))
    for config, same in ((ComposeConfig(), True), (ComposeConfig(rating_replay=ReplayConfig(path="x")), False)):
        stage = ComposeForward(config=config, curate=CurateConfig())
        assert (stage.settings() == replace(stage, curate=other).settings()) is same
