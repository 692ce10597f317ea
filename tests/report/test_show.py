"""Pairs, ratings and replies to read."""

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from report.conftest import Run
from report.whole import change, whole
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
    found = shown(run.view(), 5, 5, 5, 5)
    assert found == {"figures": {"pairs": {}}, "pairs": [], "high": [], "low": [], "responses": []}
    assert "nothing has been measured yet" in render(found)
    assert "Rated highest (0)" in render(found)


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
    run.add("augment.deduplicate", rows=rows, record=Candidate)
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


def test_the_figures_that_matter_come_first(run: Run, measured: Callable[..., dict[str, Any]]) -> None:
    gap = {"held_out": {"difference": -2.0, "ci": [-2.5, -1.5], "n": 9}}
    run.add("evaluate.base_backward", metrics=measured(None, 3.5))
    run.add("evaluate.backward", metrics=measured(None, 1.5, against_base=gap))
    run.add("augment.filter", ledger={"in": 9, "kept": 6, "rejected": {"echo": 1, "empty": 2}})
    sample: dict[str, Any] = shown(whole(run, "atlas", rater="calibrated").view(), 1, 1, 1, 1)
    assert sample["figures"]["backward_nll"]["difference_ci"] == [-2.5, -1.5]
    assert sample["figures"]["planted_auc"]["calibrated"]["by_kind"]["swapped"] == 0.75
    assert sample["figures"]["pairs"]["curate.select@1"]["kept"] == 3
    head = re.sub(r"[ │]+", " ", render(sample).partition("── Generated pairs")[0])
    for line in (
        "held-out loss: 1.500 and 3.500, -2.000 (95%: -2.500 to -1.500)",
        "calibrated .90 (.70–.90) .75 (.70–.90) 1.00 (.70–.90)",
        "augment.filter: 6 of 9 pairs kept; dropped: 2 empty, 1 echo",
        "curate.select@1: 3 of 6 pairs kept; dropped: 3 below_threshold",
        "M1 and the base, exact match: 0.800 and 0.200, +0.600 (95%: 0.500 to 0.700; n = 9)",
    ):
        assert line in head


def test_a_run_whose_calibration_failed_shows_what_it_measured(run: Run) -> None:
    whole(run, "x", rater="calibrated")
    change(run, "curate.calibrate@1", state="failed", message="an AUC of 0.51")
    for name in ("curate.rate@1", "curate.select@1", "forward.train@1", "evaluate.forward@1"):
        change(run, name, state="waiting")
    text = render(shown(run.view(), 1, 1, 1, 1))
    assert "rater, AUC on planted pairs: 1.000" in text
    assert "calibrated" in text
    assert "Rated highest (0)" in text


def test_a_calibrated_raters_probability_ranks_the_pairs_dropped_ones_too(run: Run) -> None:
    sample: dict[str, Any] = shown(whole(run, "x", rows=6, kept=2, rater="calibrated").view(), 0, 2, 2, 0)
    assert [row["probability"] for row in sample["high"]] == [0.3, 0.25]
    assert [row["probability"] for row in sample["low"]] == [0.05, 0.1]
    assert sample["high"][0]["signals"] == {"stop_token": -0.5, "x": None}
    text = render(sample)
    assert "probability: 0.3" in text
    assert "signals: stop_token -0.5, x not measured" in text


def test_until_selection_has_weighed_the_signals_the_rating_ranks_the_pairs(run: Run) -> None:
    whole(run, "x", rows=6, rater="calibrated")
    change(run, "curate.select@1", state="waiting")
    sample: dict[str, Any] = shown(run.view(), 0, 1, 0, 0)
    (best,) = sample["high"]
    assert (best["rating"], best["probability"]) == (3.5, None)


def test_a_rubrics_rating_stands_once(run: Run) -> None:
    text = render(shown(whole(run, "x").view(), 0, 1, 0, 0))
    assert "rating: 3.5" in text
    assert "signals:" not in text
    assert "probability:" not in text
