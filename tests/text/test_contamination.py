import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.text import contamination
from selfalign.text.contamination import Contamination, Match
from selfalign.text.overlap import normalised, words

QUESTION = (
    "Rewrite the e-mail so that the reader learns in its first line what is asked of her, by when, and whom to call."
)
THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"
NOISE = "The harbour was quiet that morning, and nobody had yet seen the ship. "


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        NOISE + QUESTION + NOISE,
        QUESTION.upper(),
        QUESTION.replace(" ", "\r\n> "),
        QUESTION.replace(",", " —").replace("e-mail", "e mail"),
        NOISE + " ".join(words(QUESTION)[4:17]) + ". " + NOISE,
    ],
)
def test_thirteen_words_in_a_row_are_found_whatever_their_spelling(text: str) -> None:
    match = Contamination([("other", THIRTEEN), ("task 7", QUESTION)]).find(text)
    assert match is not None
    assert match.name == "task 7"
    assert len(match.words.split()) == 13
    assert match.words in " ".join(words(QUESTION))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "?!",
        NOISE * 30,
        " ".join(words(QUESTION)[:12]),
        NOISE + " ".join(words(QUESTION)[:12]) + " " + NOISE + " ".join(words(QUESTION)[12:]),
        " ".join(reversed(words(QUESTION))),
    ],
)
def test_twelve_words_in_a_row_are_not(text: str) -> None:
    assert Contamination([("task 7", QUESTION)]).find(text) is None


def test_words_in_a_row_do_not_run_from_one_evaluation_text_into_the_next() -> None:
    first, second = THIRTEEN, THIRTEEN.replace("one", "two")
    assert Contamination([("a", first), ("b", second)]).find(f"{THIRTEEN[4:]} {second[:20]}") is None


def test_a_match_says_which_text_and_what() -> None:
    assert str(Contamination([("task 7", THIRTEEN)]).find(f"Zero, {THIRTEEN.title()}!")) == f"task 7: {THIRTEEN}"


@pytest.mark.parametrize(
    "text", ["Name five rivers of Siberia.", "name five  RIVERS of siberia", "What is C++ used for?"]
)
def test_a_short_evaluation_text_is_found_where_it_is_the_whole_text(text: str) -> None:
    found = Contamination([("rivers", "Name five rivers of Siberia."), ("c", "What is C++ used for?")])
    assert found.find(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "Name five rivers of Siberia and say where they rise.",
        "Please name five rivers of Siberia.",
        "What is C used for?",
    ],
)
def test_a_short_evaluation_text_inside_a_longer_one_is_not_found(text: str) -> None:
    found = Contamination([("rivers", "Name five rivers of Siberia."), ("c", "What is C++ used for?")])
    assert found.find(text) is None


def test_an_evaluation_text_of_a_word_or_four_drops_nothing() -> None:
    short = {"a": "Yes", "b": "The Great Gatsby", "c": "Answer the following question.", "d": "", "e": "??"}
    found = Contamination([*short.items(), ("long", THIRTEEN)])
    assert [found.find(text) for text in short.values()] == [None] * 5


def test_nothing_is_found_in_no_evaluation_texts() -> None:
    assert Contamination([]).find(NOISE * 3) is None


def test_a_worker_finds_the_same_after_pickling() -> None:
    found = pickle.loads(
        pickle.dumps(Contamination([("task 7", QUESTION), ("rivers", "Name five rivers of Siberia.")]))
    )
    assert found.find(NOISE + QUESTION).name == "task 7"
    assert found.find("Name five rivers of Siberia").name == "rivers"


LETTERS = st.sampled_from("ab")
TEXTS = st.lists(LETTERS, min_size=13, max_size=24) | st.lists(LETTERS, max_size=14)


@st.composite
def evaluation_and_text(draw: st.DrawFn) -> tuple[list[tuple[str, str]], str]:
    """Evaluation texts of few words, and a text made of pieces of them and of others, or one of them alone."""
    texts = draw(st.lists(TEXTS, min_size=1, max_size=4))
    pieces = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(0, 3))):
        source = draw(st.sampled_from(texts) | TEXTS)
        start, size = draw(st.integers(0, 6)), draw(st.integers(0, 16))
        pieces = pieces[-draw(st.integers(1, 14)) :] + source[start : start + size]
    return [(str(i), " ".join(text)) for i, text in enumerate(texts)], " ".join(pieces)


def by_brute_force(evaluation: list[tuple[str, str]], text: str) -> Match | None:
    own = words(text)
    for i in range(max(1, len(own) - 12)):
        run = own[i : i + 13]
        for name, other in evaluation:
            theirs = words(other)
            if len(theirs) >= 13:
                if len(run) == 13 and any(theirs[j : j + 13] == run for j in range(len(theirs) - 12)):
                    return Match(name, " ".join(run))
            elif len(theirs) >= 5 and normalised(other) == normalised(text):
                return Match(name, " ".join(own))
    return None


@settings(deadline=None, max_examples=300)
@given(evaluation_and_text())
def test_what_is_found_is_what_comparing_every_run_with_every_other_finds(
    case: tuple[list[tuple[str, str]], str],
) -> None:
    assert Contamination(case[0]).find(case[1]) == by_brute_force(*case)


@settings(deadline=None)
@given(evaluation_and_text())
def test_equal_hashes_of_unequal_words_find_nothing_more(case: tuple[list[tuple[str, str]], str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "_POWERS", contamination._POWERS * 0)
        assert Contamination(case[0]).find(case[1]) == by_brute_force(*case)


def tasks(folder: Path) -> Iterator[tuple[str, str]]:
    for line in (folder / "self-instruct" / "user_oriented_instructions.jsonl").read_text("utf-8").splitlines():
        task = json.loads(line)
        yield task["id"], task["instruction"]
        for instance in task["instances"]:
            yield task["id"], instance["input"]
            yield task["id"], instance["output"]


def lima(folder: Path) -> list[list[str]]:
    lines = (folder / "lima" / "train.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["conversations"] for line in lines]


def test_every_one_of_252_real_tasks_is_found_where_it_is_planted(real_data: Path) -> None:
    evaluation = list(tasks(real_data))
    found = Contamination(evaluation)
    planted = 0
    for (name, text), conversation in zip(evaluation, lima(real_data), strict=False):
        response = conversation[1]
        middle = len(response) // 2
        match = found.find(f"{response[:middle]}\n> {text.upper()}\n{response[middle:]}")
        if len(words(text)) >= 13:
            planted += 1
            assert match is not None
            assert match.words in " ".join(words(text)), name
        else:
            assert match is None
    assert planted == 422


def test_of_1030_real_conversations_none_has_one_of_the_252_tasks_and_of_953_one_has(real_data: Path) -> None:
    found = Contamination(tasks(real_data))
    assert [text for turns in lima(real_data) for text in turns if found.find(text)] == []
    lines = (real_data / "guanaco" / "oa_questions.jsonl").read_text("utf-8").splitlines()
    matches = {str(match) for line in lines if (match := found.find(json.loads(line)["text"]))}
    assert matches == {"user_oriented_task_197: the gases and particles in the air blue light is scattered more than"}
