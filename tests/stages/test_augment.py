"""Instructions for documents: candidates, what is dropped, and why."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from selfalign.core.protocols import Reply
from selfalign.core.records import Candidate, Document, Dropped
from selfalign.core.stage import Context
from selfalign.engines.config import ModelConfig
from selfalign.stages.augment import AugmentConfig, Deduplicate, Filter, Generate
from stages.conftest import FakeEngine, Stored

Seen = Callable[..., Context]
DOCUMENTS = [Document(id=f"doc/{n}", source="web", license="CC0", text=f"text {{response}} {n}") for n in range(3)]


def test_each_document_gets_its_numbered_candidates(engine: FakeEngine, seen: Seen) -> None:
    engine.reply = lambda request: f"  What is {request.id}?\n"
    stage = Generate(AugmentConfig(candidates=3), ModelConfig(path="x"))
    found = list(stage.open(seen()).run(DOCUMENTS))
    assert [row.id for row in found] == [f"doc/{d}/{n}" for d in range(3) for n in range(3)]
    assert len(found) == sum(stage.units(row) for row in DOCUMENTS)
    for row in found:
        assert isinstance(row, Candidate)
        parent = next(each for each in DOCUMENTS if (each.id,) == row.parents)
        assert row.id.startswith(parent.id + "/")
        assert row.prompt == f"What is {row.id}?"
        assert (row.completion, row.source, row.license) == (parent.text, "web", "CC0")
        assert row.model == "digest of base"


def test_every_candidate_has_noise_of_its_own(engine: FakeEngine, seen: Seen) -> None:
    stage = Generate(AugmentConfig(candidates=2), ModelConfig(path="x"))
    list(stage.open(seen()).run(DOCUMENTS))
    list(stage.open(seen()).run(DOCUMENTS[1:2]))
    list(stage.open(seen(1)).run(DOCUMENTS[1:2]))
    (all_three, sampling, adapter), (alone, _, _), (other_run, _, _) = engine.generated
    assert len({request.seed for request in all_three}) == 6
    assert all_three[2:4] == alone
    assert {r.seed for r in other_run}.isdisjoint(r.seed for r in all_three)
    assert (sampling.temperature, adapter) == (0.7, None)
    # The document is text, whatever it looks like.
    assert "text {response} 1" in alone[0].messages[0]["content"]


def test_a_document_that_does_not_fit_is_rejected_and_still_counted(engine: FakeEngine, seen: Seen) -> None:
    engine.reply = lambda request: Reply("", 0, "too_long") if request.id.startswith("doc/1/") else "Why?"
    stage = Generate(AugmentConfig(candidates=2), ModelConfig(path="x"))
    found = list(stage.open(seen()).run(DOCUMENTS))
    assert len(found) == 6
    dropped = {row.id: row.reason for row in found if isinstance(row, Dropped)}
    assert dropped == {"doc/1/0": "too_long", "doc/1/1": "too_long"}


def test_a_trained_backward_model_is_named_in_its_candidates(engine: FakeEngine, seen: Seen, stored: Stored) -> None:
    adapter = stored("train", [], Document)
    (row,) = Generate(AugmentConfig(), ModelConfig(path="x")).open(seen(adapter=adapter)).run(DOCUMENTS[:1])
    assert isinstance(row, Candidate)
    assert row.model == "identity of train"
    assert engine.generated[0][2] == adapter.files


def test_tokens_are_the_engines(engine: FakeEngine, seen: Seen) -> None:
    process = Generate(AugmentConfig(), ModelConfig(path="x")).open(seen())
    before = process.tokens()
    list(process.run(DOCUMENTS))
    assert process.tokens() - before == 3


GOOD = Candidate(
    id="d/0",
    source="s",
    prompt="Which lake lies north of the town?",
    completion="Lake Vage lies there, deep and blue, and fish are many.",
    model="m",
    prompt_hash="h",
    finish="stop",
    parents=("d",),
)
TEMPLATE = "Write the request that the user most likely made for this text, in one short line.\n{response}"
LIFTED = "Lake Vage lies there, deep and blue, and fish are"
BAD = {
    "empty": replace(GOOD, prompt=""),
    "over_long": replace(GOOD, prompt="Which lake lies north of the town? " * 5),
    "refusal": replace(GOOD, prompt="I'm sorry, but I can't help with that."),
    "preamble": replace(GOOD, prompt="Sure! Here is the request: Which lake lies north of the town?"),
    "echo": replace(GOOD, prompt="Write the request that the user most likely made for this text"),
    "copy": replace(GOOD, prompt=LIFTED),
    "language": replace(GOOD, prompt="¿Qué lago se encuentra al norte de la ciudad y cómo es?"),
}


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "prompt.txt").write_text(TEMPLATE)
    return str(tmp_path / "prompt.txt")


BAD_IN_ORDER = ("empty", "refusal", "preamble", "over_long", "echo", "copy", "language")


def found_in(rows: list[Candidate], config: AugmentConfig) -> dict[str, str]:
    """Why rows were dropped, by id, row by row and then among those that are left."""
    context = Context("s", 0, {})
    filtered = list(Filter(config).open(context).run(rows))
    left = [row for row in filtered if isinstance(row, Candidate)]
    deduplicated = list(Deduplicate(config=config).run(left, context))
    assert [row.id for row in filtered] == [row.id for row in rows]
    assert [row.id for row in deduplicated] == [row.id for row in left]
    return {row.id: row.reason for row in (*filtered, *deduplicated) if isinstance(row, Dropped)}


def reasons(rows: list[Candidate], template: str, **config: object) -> list[str | None]:
    settings = AugmentConfig(prompt_file=template, max_chars=100, **config)
    found = found_in(rows, settings)
    return [found.get(row.id) for row in rows]


def test_a_good_instruction_passes_every_filter(template: str) -> None:
    assert reasons([GOOD], template) == [None]


@pytest.mark.parametrize("reason", BAD)
def test_each_filter_drops_for_its_own_reason_and_only_when_it_is_on(template: str, reason: str) -> None:
    assert reasons([BAD[reason]], template) == [reason]
    assert reasons([BAD[reason]], template, filters=(reason,)) == [reason]
    others = tuple(name for name in (*BAD, "duplicate") if name != reason)
    assert reasons([BAD[reason]], template, filters=others) == [None]


def test_an_instruction_that_was_cut_off_is_over_long_however_short(template: str) -> None:
    assert reasons([replace(GOOD, finish="length")], template) == ["over_long"]
    fits = replace(GOOD, prompt="x" * 100)
    assert reasons([fits, replace(fits, id="d/1", prompt="x" * 101)], template) == [None, "over_long"]


def test_of_duplicates_the_first_stays(template: str) -> None:
    again = [replace(GOOD, id=f"d/{n}", prompt=text) for n, text in enumerate(["Why?", "WHY", " why? ", "Why not?"])]
    assert reasons(again, template) == [None, "duplicate", "duplicate", None]
    assert reasons(again, template, filters=()) == [None] * 4


def test_all_filters_are_on_unless_a_recipe_names_some() -> None:
    assert AugmentConfig().filters == (*BAD_IN_ORDER, "duplicate")


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("As an AI language model, I cannot " + TEMPLATE, "refusal"),
        ("I'm sorry, but I can't help with that. " * 10, "refusal"),
        ("Sure! Here is the request: " + "word " * 50, "preamble"),
        (TEMPLATE * 2, "over_long"),
    ],
)
def test_of_several_reasons_the_one_that_says_most_is_told(template: str, instruction: str, reason: str) -> None:
    assert reasons([replace(GOOD, prompt=instruction)], template) == [reason]


def test_a_row_that_was_dropped_makes_no_other_a_duplicate(template: str) -> None:
    cut = replace(GOOD, id="d/0", prompt="Why?", finish="length")
    assert reasons([cut, replace(GOOD, id="d/1", prompt="Why?")], template) == ["over_long", None]


def test_of_150_real_generated_instructions_one_copy_is_dropped_and_no_fault_is_left(real_data: Path) -> None:
    recorded = json.loads((real_data / "lima" / "rated_150.json").read_text("utf-8"))
    rows = [
        replace(GOOD, id=str(n), prompt=row["generated_instruction"].strip(), completion=row["response"])
        for n, row in enumerate(recorded)
    ]
    filters = AugmentConfig().filters
    before = {name: list(found_in(rows, AugmentConfig(filters=(name,)))) for name in filters}
    assert before == {name: ["67"] if name == "copy" else [] for name in filters}
    assert found_in(rows, AugmentConfig()) == {"67": "copy"}
    kept = [row for row in rows if row.id != "67"]
    assert all(found_in(kept, AugmentConfig(filters=(name,))) == {} for name in filters)


def test_of_668_real_instructions_that_a_chat_model_wrote_half_are_dropped(real_data: Path) -> None:
    lines = (real_data / "self-instruct-qwen" / "all_merged_generations.jsonl").read_text("utf-8").splitlines()
    made = [row["instruction"].strip() for row in map(json.loads, lines) if "most_similar" in row]
    rows = [replace(GOOD, id=str(n), prompt=text, completion="") for n, text in enumerate(made)]
    filters = AugmentConfig().filters
    dropped = found_in(rows, AugmentConfig())
    assert (len(rows), Counter(dropped.values())) == (668, {"refusal": 2, "preamble": 201, "duplicate": 131})
    kept = [row for row in rows if row.id not in dropped]
    assert all(found_in(kept, AugmentConfig(filters=(name,))) == {} for name in filters)
