"""Pairs, ratings and replies to read."""

import json
from dataclasses import fields, replace

from report.conftest import Run
from selfalign.core.records import Candidate, Rated, rejected
from selfalign.report.show import render, shown

CANDIDATE = Candidate(
    id="d/0", source="s", prompt="Why?", completion="Because.", model="m", prompt_hash="h", finish="stop"
)


def rated(n: int, rating: float | None) -> Rated:
    row = replace(CANDIDATE, id=f"d{n}/0")
    return Rated(**{f.name: getattr(row, f.name) for f in fields(row)}, rating=rating, reply=f"reply {n}")


def rate(run: Run, k: int, ratings: list[float | None]) -> None:
    run.add(f"curate.rate@{k}", rows=[rated(n, rating) for n, rating in enumerate(ratings)], record=Rated)


def ids(sample: dict[str, object], key: str) -> list[str]:
    return [row["id"] for row in sample[key]]  # type: ignore[attr-defined]


def test_a_run_that_has_nothing_yet_shows_nothing(run: Run) -> None:
    assert shown(run.view(), 5, 5, 5, 5) == {"pairs": [], "high": [], "low": [], "responses": []}
    assert "Rated highest (0)" in render(shown(run.view(), 5, 5, 5, 5))


def test_the_highest_come_first_and_the_lowest_from_below(run: Run) -> None:
    rate(run, 1, [3.0, None, 5.0, 1.0, 4.0, 2.0])
    sample = shown(run.view(), 0, 2, 2, 0)
    assert ids(sample, "high") == ["d2/0", "d4/0"]
    assert ids(sample, "low") == ["d3/0", "d5/0"]
    assert sample["high"][0]["reply"] == "reply 2"


def test_no_pair_is_both_high_and_low_and_an_unrated_one_is_neither(run: Run) -> None:
    rate(run, 1, [3.0, None, 5.0, 1.0])
    sample = shown(run.view(), 0, 2, 5, 0)
    assert ids(sample, "high") == ["d2/0", "d0/0"]
    assert ids(sample, "low") == ["d3/0"]


def test_the_last_round_that_is_done_is_shown(run: Run) -> None:
    rate(run, 2, [2.0])
    rate(run, 10, [5.0])
    run.add("curate.rate@11", state="running")
    assert shown(run.view(), 0, 1, 0, 0)["high"][0]["rating"] == 5.0


def test_pairs_are_those_that_the_filters_kept(run: Run) -> None:
    rows = [CANDIDATE, rejected("d/1", "empty", replace(CANDIDATE, id="d/1")), replace(CANDIDATE, id="d/2")]
    run.add("augment.filter", rows=rows, record=Candidate)
    assert ids(shown(run.view(), 5, 0, 0, 0), "pairs") == ["d/0", "d/2"]
    assert ids(shown(run.view(), 1, 0, 0, 0), "pairs") == ["d/0"]


def replies(*ids: str) -> dict[str, str]:
    rows = [{"id": id, "prompt": f"about {id}", "reply": "line\u2028end"} for id in ids]
    return {"replies.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}


def test_replies_are_the_last_models_to_what_a_user_would_ask(run: Run) -> None:
    run.add("forward.train@1")
    run.add("forward.train@2")
    run.add("evaluate.forward@1", files=replies("old"))
    run.add("evaluate.forward@2", files=replies("question/00000", "seed/1", "seed/2"))
    run.add("evaluate.forward@2", arm="other", files=replies("other"))
    found = shown(run.view(), 0, 0, 0, 5)["responses"]
    assert found == [{"prompt": f"about seed/{n}", "response": "line\u2028end"} for n in (1, 2)]


def test_where_only_questions_were_asked_they_are_shown(run: Run) -> None:
    run.add("forward.train@1")
    run.add("evaluate.forward@1", files=replies("question/00000"))
    assert len(shown(run.view(), 0, 0, 0, 5)["responses"]) == 1


def test_text_names_each_field_that_says_something(run: Run) -> None:
    rate(run, 1, [4.5])
    text = render(shown(run.view(), 1, 1, 1, 1))
    assert "rating: 4.5" in text
    assert "instruction: Why?" in text
    assert "None" not in text
