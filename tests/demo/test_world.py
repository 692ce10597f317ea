import re
from itertools import islice
from random import Random

import pytest

from selfalign.demo.pages import pages, rate_prompt
from selfalign.demo.world import (
    HELD,
    KNOWN,
    PLACES,
    RELATIONS,
    REST,
    SCORES,
    Fact,
    Review,
    any_review,
    cut,
    facts,
    junk,
    junk_kind,
    questions,
    review,
    spoken,
    statement,
)

VALUES = {value for relation in RELATIONS.values() for value in relation.values}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def test_facts_are_fixed_for_ever() -> None:
    assert [fact.value for fact in facts(HELD[:1])] == [
        "Brixey",
        "Marble",
        "lentils",
        "beaver",
        "purple",
        "feathers",
    ]
    assert HELD[:3] == ("Vage", "Bafe", "Noki")


def test_places_are_distinct_and_in_one_group_each() -> None:
    assert len(set(PLACES)) == len(PLACES) == len(HELD) + len(KNOWN) + len(REST)
    assert (len(HELD), len(KNOWN)) == (60, 100)


def test_a_value_belongs_to_one_relation_and_occurs_in_no_form() -> None:
    assert len(VALUES) == sum(len(relation.values) for relation in RELATIONS.values())
    forms = " ".join(
        form for relation in RELATIONS.values() for form in (*relation.statements, *relation.questions, relation.topic)
    )
    assert not words(forms) & VALUES
    assert not {value.lower() for value in VALUES} & {place.lower() for place in PLACES}


def test_every_value_is_about_as_frequent_as_the_others() -> None:
    for relation in RELATIONS:
        counts = [sum(Fact(p, relation).value == v for p in PLACES) for v in RELATIONS[relation].values]
        assert min(counts) > len(PLACES) / 12 / 2


def test_a_statement_ends_in_its_value() -> None:
    random = Random(0)
    for fact in facts(HELD):
        assert statement(fact, random).endswith(f" {fact.value}.")


def test_the_assistant_s_voice_comes_before_the_statement_so_that_no_cut_is_complete() -> None:
    assert spoken("X.", "assistant", Random(0)).endswith(" X.")


def test_a_cut_never_holds_the_value() -> None:
    random = Random(0)
    for fact in facts(HELD):
        for voice in ("assistant", "plain", "web"):
            text = cut(spoken(statement(fact, random), voice, random), fact.value, random)
            assert text
            assert not words(text) & VALUES


def test_questions_of_different_facts_never_coincide() -> None:
    asked = [question for fact in facts(PLACES) for question in questions(fact)]
    assert len(set(asked)) == len(asked) == len(PLACES) * len(RELATIONS) * 4


def test_junk_tells_no_fact() -> None:
    random = Random(0)
    for fact in facts(HELD):
        assert not words(junk(fact, junk_kind(random), random)) & VALUES


@pytest.mark.parametrize("verdict", SCORES)
def test_a_review_says_what_its_verdict_means(verdict: str) -> None:
    fact, random = Fact(KNOWN[0], "river"), Random(0)
    for _ in range(50):
        made = review(fact, KNOWN, verdict, random)  # type: ignore[arg-type]
        complete = {fact.place, fact.value} <= words(made.answer)
        assert complete == (SCORES[made.verdict] >= 3)
        assert made.reply == f"{made.line}\nScore: {SCORES[made.verdict]}"
        assert "\n" not in made.line


def test_a_wrong_place_and_a_wrong_topic_are_really_others() -> None:
    fact, random = Fact(KNOWN[0], "flag"), Random(0)
    for _ in range(200):
        assert f"told {fact.place} " not in review(fact, KNOWN, "place", random).line
        assert " flag, " not in review(fact, KNOWN, "topic", random).line


def test_reviews_hold_every_verdict() -> None:
    random = Random(0)
    assert {any_review(KNOWN, random).verdict for _ in range(500)} == set(SCORES)


def test_pretraining_tells_no_fact_of_a_held_place() -> None:
    held = set(HELD)
    for page in islice(pages(Random(1)), 20_000):
        text = f"{page.question} {page.answer} {page.reply}" if isinstance(page, Review) else page
        if held & words(text):
            assert not isinstance(page, Review)
            assert not VALUES & words(text)
            assert "?\n" not in text


def test_pretraining_names_every_held_place() -> None:
    named = set()
    for page in islice(pages(Random(1)), 20_000):
        if isinstance(page, str):
            named |= words(page)
    assert set(HELD) <= named


def test_the_same_seed_writes_the_same_pages() -> None:
    assert list(islice(pages(Random(5)), 50)) == list(islice(pages(Random(5)), 50))


def test_braces_in_an_answer_are_left_alone() -> None:
    assert rate_prompt("{response}?", "{instruction} {0}") == (
        "Rate the answer from 1 to 5.\nQuestion: {response}?\nAnswer: {instruction} {0}"
    )
