import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.text.overlap import words
from selfalign.text.repetition import repetition

THRESHOLD = 0.25
PROSE = (
    "Knead the dough until it no longer sticks to the bowl, then cover it and let it rise for an hour in a warm place. "
    "Meanwhile heat the oven: bread that goes into a cold one spreads before it sets. Shape a loaf, cut its top "
    "with a sharp knife, and bake it for forty minutes; it is ready when it sounds hollow underneath. Wait until it is "
    "cool, however good it smells: warm crumb tears under the knife and turns to paste."
)
BANNER = "We use cookies to make this site better. By staying you agree to our policy. Accept all or choose settings."
MENU = "Home Products Services About us Contact Blog Careers Support Log in Register Search"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("— … !", 0.0),
        ("one two three four five", 0.0),
        ("a a a a a", 0.0),
        ("a a a a a a", 1 / 2),
        ("a b c d e a b c d e", 1 / 6),
        ("A b, c d e! a B c d E", 1 / 6),
        ("buy now " * 50, 94 / 96),
        ("你好吗我很好你好吗我很好", 2 / 8),
    ],
)
def test_repetition_is_the_share_of_five_word_runs_that_stood_before(text: str, expected: float) -> None:
    assert repetition(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"{part}.\n{BANNER}" for part in PROSE.split(". ")),
        "\n".join([MENU] * 5) + "\n" + PROSE,
        "Buy gold watches now! Cheap gold watches, best price, free shipping. " * 12,
        PROSE + " and it turns to paste when it is cut" * 12,
        PROSE[:200] + " bread" * 100,
        PROSE + "\n\n" + PROSE,
        PROSE + "\n\n" + PROSE[: len(PROSE) // 2 + 60],
        PROSE[:200] + "\n".join(f"{i}. It is ready when it sounds hollow underneath." for i in range(1, 13)),
    ],
    ids=["banner", "menu", "spam", "loop", "one-word-loop", "twice", "half-again", "numbered-loop"],
)
def test_banners_menus_spam_and_loops_are_above_the_threshold(text: str) -> None:
    assert repetition(text) > THRESHOLD


def test_prose_repeats_next_to_nothing() -> None:
    assert repetition(PROSE) == 0.0


@settings(deadline=None)
@given(st.text(st.sampled_from("ab ") | st.characters()))
def test_repetition_is_a_share_below_one(text: str) -> None:
    assert 0.0 <= repetition(text) < 1.0


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=5), st.integers(1, 6))
def test_a_text_said_k_times_has_but_one_kth_left(tokens: list[str], times: int) -> None:
    runs = times * len(tokens) - 4
    left = (1 - repetition(" ".join(tokens * times))) * runs
    assert round(left) <= len(tokens)


def test_of_1030_real_responses_the_threshold_drops_seven_and_all_of_them_when_said_twice(real_data: Path) -> None:
    lines = (real_data / "lima" / "train.jsonl").read_text("utf-8").splitlines()
    responses = [json.loads(line)["conversations"][1] for line in lines]
    assert sum(repetition(response) > THRESHOLD for response in responses) == 7
    long = [response for response in responses if len(words(response)) > 20]
    assert all(repetition(f"{response}\n{response}") > 0.4 for response in long)
