import json
import re
from pathlib import Path

import pytest

from selfalign.demo.data import data_folder, write_world
from selfalign.demo.pages import RATE_PROMPT
from selfalign.demo.world import HELD, KNOWN, facts, questions

RECIPES = Path(__file__).parents[2] / "recipes" / "demo"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (data_folder() / f"{name}.jsonl").read_text("utf-8").splitlines()]


def places_in(text: str) -> set[str]:
    return set(re.findall(r"\w+", text)) & {*HELD, *KNOWN}


def test_the_shipped_files_are_what_the_atlas_writes(tmp_path: Path) -> None:
    write_world(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in data_folder().iterdir()}


@pytest.mark.parametrize("name", ["seed", "ratings"])
def test_what_teaches_speaks_of_known_places_alone(name: str) -> None:
    for row in rows(name):
        assert not places_in(json.dumps(row)) & set(HELD)


def test_the_seed_has_each_fact_once_and_asks_in_the_first_two_forms() -> None:
    asked = [row["prompt"] for row in rows("seed")]
    first_forms = {question for fact in facts(KNOWN) for question in questions(fact)[:2]}
    assert len(set(asked)) == len(asked) == 256
    assert set(asked) <= first_forms
    assert len({row["completion"].split()[-1] + min(places_in(row["prompt"])) for row in rows("seed")}) == 256


def test_the_forward_test_asks_every_held_fact_in_another_form() -> None:
    tested = rows("questions")
    assert len(tested) == 360
    assert not {row["prompt"] for row in tested} & {q for f in facts(HELD) for q in questions(f)[:2]}
    for row, fact in zip(tested, facts(HELD), strict=True):
        assert row["contains"] == [fact.place, fact.value]
        assert len(row["excludes"]) == 11
        assert fact.value not in row["excludes"]


def test_the_corpus_has_every_held_fact_twice_and_no_document_twice() -> None:
    texts = [row["text"] for row in rows("corpus")]
    assert len(set(texts)) == len(texts)
    for fact in facts(HELD):
        telling = [text for text in texts if {fact.place, fact.value} <= set(re.findall(r"\w+", text))]
        assert len(telling) == 2


def test_the_backward_test_has_four_right_answers_a_document() -> None:
    for row, fact in zip(rows("backward"), facts(HELD), strict=True):
        assert row["answers"] == questions(fact)
        assert fact.place in row["prompt"]


def test_rated_examples_end_in_their_score() -> None:
    assert {row["reply"].rsplit("\nScore: ")[1] for row in rows("ratings")} == set("12345")


def test_the_recipe_s_prompts_are_the_ones_that_the_base_was_taught() -> None:
    assert (RECIPES / "rate.txt").read_text("utf-8").strip() == RATE_PROMPT
    assert (RECIPES / "instruct.txt").read_text("utf-8").strip() == "{response}"
