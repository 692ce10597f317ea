import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.text.overlap import UNSPACED, folded, is_copy, is_echo, ngram_overlap, normalised, words

RECORDED = Path(__file__).parents[3] / "shared/data/lima/rated_150.json"
needs_data = pytest.mark.skipif(not RECORDED.exists(), reason="needs ../shared/data")

TEMPLATE = (
    "Below is a text that an assistant wrote as its response. Work out the one instruction that a user most probably "
    "gave to receive it. Write that instruction alone, as the user would have typed it.\n\nResponse:\n{response}\n\n"
    "Instruction:"
)


def recorded() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads(RECORDED.read_text("utf-8"))
    return rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't PANIC, 3.5 times!", ["don", "t", "panic", "3", "5", "times"]),
        ("ＦＵＬＬ　ｗｉｄｔｈ ﬁne", ["full", "width", "fine"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("東京へ行く Python で", ["東", "京", "へ", "行", "く", "python", "で"]),
        ("서울에 가다", ["서울에", "가다"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("café cafe\u0301", ["café", "café"]),
        ("snake_case x->y", ["snake", "case", "x", "y"]),
        ("?! …", []),
    ],
)
def test_words_are_told_apart_in_any_script(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def one_by_one(text: str) -> list[str]:
    """The words of `text`, character for character of its folded form."""
    spelled = ""
    for letter in folded(text):
        kind = unicodedata.category(letter)[0]
        unspaced = kind == "L" and re.match(f"[{UNSPACED}]", letter)
        spelled += f" {letter}" if unspaced else letter if kind in "LNM" else " "
    return spelled.split()


@settings(deadline=None)
@given(st.text() | st.text(st.sampled_from("aÀ ß\u0301\u0345\u3000\u0085\x1c\u200b\ufb01東कि…_İ\r\n")))
def test_words_are_those_of_the_folded_text(text: str) -> None:
    assert words(text) == words(folded(text)) == one_by_one(text)


def test_overlap_is_the_share_of_the_first_text_found_in_the_second() -> None:
    assert ngram_overlap("a b c d", "x a b c y", 3) == 0.5
    assert ngram_overlap("x a b c y", "a b c d", 3) == pytest.approx(1 / 3)
    assert ngram_overlap("a b", "c a b d", 3) == 1.0
    assert ngram_overlap("", "a b", 3) == 0.0
    assert ngram_overlap("a b", "", 3) == 0.0


@settings(deadline=None)
@given(st.text(), st.text(), st.integers(1, 6))
def test_overlap_is_a_share_and_whole_with_itself(text: str, other: str, n: int) -> None:
    assert 0.0 <= ngram_overlap(text, other, n) <= 1.0
    assert ngram_overlap(text, text, n) == (1.0 if words(text) else 0.0)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("Write a poem.", "write  a\npoem"),
        ("What is C++?", "what is c++ ?"),
        ("ＷＲＩＴＥ a poem", "write a poem"),
        ("Nenne drei Straßen!", "NENNE DREI STRASSEN"),
        ("什么是熵？", "什么是熵"),
    ],
)
def test_spelling_that_does_not_matter_gives_one_key(one: str, two: str) -> None:
    assert normalised(one) == normalised(two)


@pytest.mark.parametrize(
    ("one", "two"), [("What is C?", "What is C++?"), ("x = -5", "x = 5"), ("?", "!"), ("Is it 3.5?", "Is it 35?")]
)
def test_spelling_that_matters_gives_two_keys(one: str, two: str) -> None:
    assert normalised(one) != normalised(two)


@settings(deadline=None)
@given(st.text())
def test_a_key_is_its_own_key(text: str) -> None:
    key = normalised(text)
    assert normalised(key) == key


@pytest.mark.parametrize(
    "instruction",
    [
        TEMPLATE,
        TEMPLATE.split("\n")[0],
        "Write that instruction alone, as the user would have typed it.",
        "The one instruction that a user most probably gave to receive it is: bake bread at home",
        "INSTRUCTION: write that instruction alone",
        TEMPLATE.replace("{response}", "Knead the dough, let it rise twice and bake it for forty minutes. " * 20),
    ],
)
def test_an_instruction_in_the_templates_own_words_is_an_echo(instruction: str) -> None:
    assert is_echo(instruction, TEMPLATE)


@pytest.mark.parametrize(
    "instruction",
    [
        "",
        "Write an instruction manual for a kettle.",
        "How should a user respond to an assistant that gave a wrong response?",
        "Below is a text. Translate it into French: the cat sat on the mat.",
        "What is entropy?",
    ],
)
def test_an_instruction_of_its_own_is_no_echo(instruction: str) -> None:
    assert not is_echo(instruction, TEMPLATE)


RESPONSE = (
    "Call `items.sort(key=len)` to sort the list in place. It changes the list and returns None, so do not assign its "
    "result. To keep the original, use `sorted(items, key=len)`, which returns a new list and leaves the old one alone."
)


@pytest.mark.parametrize(
    "instruction",
    [
        RESPONSE,
        RESPONSE.upper(),
        RESPONSE.split(". ")[1] + ".",
        RESPONSE[: len(RESPONSE) // 2],
        "Output: " + RESPONSE,
        RESPONSE.replace("original", "first one"),
    ],
)
def test_an_instruction_lifted_from_the_response_is_a_copy(instruction: str) -> None:
    assert is_copy(instruction, RESPONSE)


@pytest.mark.parametrize(
    "instruction",
    [
        "",
        "Why does `items.sort(key=len)` return None?",
        "What is the difference between `items.sort(key=len)` and `sorted(items, key=len)`, which returns a new list?",
        "How do I sort a list in place?",
        "sort the list in place",
        "Explain how to sort the list in place.",
    ],
)
def test_a_question_that_quotes_the_response_is_no_copy(instruction: str) -> None:
    assert not is_copy(instruction, RESPONSE)


def test_a_response_that_restates_its_task_does_not_make_the_task_a_copy() -> None:
    assert not is_copy(
        "Write an imaginary rap battle between a kettle and a toaster.",
        "Here is an imaginary rap battle between a kettle and a toaster:\n\nI boil, you burn…",
    )


def test_a_short_instruction_is_a_copy_when_it_is_the_whole_response() -> None:
    assert is_copy("The Treaty of Westphalia", "the treaty of Westphalia.")
    assert not is_copy("The Treaty of Westphalia", "The Treaty of Westphalia ended the war in 1648.")


@needs_data
def test_of_150_real_instructions_the_one_copy_is_found_and_no_echo() -> None:
    rows = recorded()
    copies = [i for i, row in enumerate(rows) if is_copy(row["generated_instruction"], row["response"])]
    assert copies == [67]
    assert [row for row in rows if is_echo(row["generated_instruction"], TEMPLATE)] == []


@needs_data
def test_of_150_real_responses_every_lifted_opening_is_found() -> None:
    for row in recorded():
        opening = row["response"][: max(200, len(row["response"]) // 4)]
        assert is_copy(opening, row["response"])
        assert is_echo(TEMPLATE.replace("{response}", row["response"]), TEMPLATE)
