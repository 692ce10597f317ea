import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.stages.curate.parse import parse

GOLDEN = [json.loads(row) for row in (Path(__file__).parent / "replies.jsonl").read_text("utf-8").splitlines()]
RECORDED = Path(__file__).parents[4] / "shared/data/lima/rated_150.json"

# Pieces that replies are made of, so that random texts come near the parser's branches.
PIECES = [
    "Score:",
    "score",
    ":",
    "4",
    "5",
    "/",
    ".",
    "-",
    " ",
    "\n",
    "**",
    "<",
    ">",
    "(",
    ")",
    "[",
    "out of 5",
    "or",
    "ten",
    "½",
]


def test_every_golden_reply_is_read_as_written_down() -> None:
    assert len(GOLDEN) >= 100
    wrong = [(each, parse(each["text"])) for each in GOLDEN if parse(each["text"]) != each["expected"]]
    assert wrong == []


@pytest.mark.skipif(not RECORDED.exists(), reason="needs ../shared/data")
def test_real_replies_are_read_as_they_were_recorded() -> None:
    rows = json.loads(RECORDED.read_text("utf-8"))
    assert len(rows) == 150
    assert [parse(row["evaluation"]) for row in rows] == [row["quality_score"] for row in rows]


def test_a_reply_without_a_rating_is_unparsed_not_average() -> None:
    assert parse("A decent answer, somewhere in the middle.") is None


def test_only_the_last_score_line_counts_even_when_it_cannot_be_read() -> None:
    assert parse("Score: 2\nScore: 5") == 5.0
    assert parse("Score: 2\nScore: 5-ish") is None


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_any_text_gives_a_rating_from_one_to_five_or_none(text: str) -> None:
    for reply in (text, f"Score: {text}", f"{text}\nScore: 4 {text}"):
        rating = parse(reply)
        assert rating is None or 1.0 <= rating <= 5.0


@settings(deadline=None)
@given(st.text())
def test_what_stands_on_the_lines_before_a_plain_score_changes_nothing(text: str) -> None:
    assert parse(f"{text}\nScore: 3") == 3.0


@pytest.mark.parametrize(
    "unit", ["score ", "score(", "Score: 4 (", "<", "(", "[", " ", ". ", "- ", "4/5 ", "of ", "9", "*"]
)
def test_a_long_reply_takes_no_longer_than_its_length(unit: str) -> None:
    begun = time.thread_time()
    for reply in (unit * 50_000, "Score: 4" + unit * 50_000, "Score:" + unit * 50_000, unit * 50_000 + "Score: 4"):
        parse(reply)
    assert time.thread_time() - begun < 10
