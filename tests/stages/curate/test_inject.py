"""Injection: texts that tell the rater what to say, their harmless twins, and what they gain."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.protocols import STOP, Reply, Request, Score
from selfalign.core.records import Pair, Planted
from selfalign.core.stage import Built, Context
from selfalign.evaluation.metrics import mean_interval
from selfalign.stages.curate.config import WEIGHED, CurateConfig
from selfalign.stages.curate.fit import Fit
from selfalign.stages.curate.inject import FRAMES, WORDINGS, Inject, payloads
from selfalign.stages.curate.parse import parse
from stages.conftest import FakeEngine, Stored, place_in
from stages.curate.conftest import CALIBRATED, GRADES, probable, rater, strict

Seen = Callable[..., Context]
EVERY = payloads(220, random.Random(0))


def test_there_are_more_than_two_hundred_payloads_in_every_wording_and_frame() -> None:
    assert len({payload.text for payload in EVERY}) >= 200
    assert {payload.kind for payload in EVERY} == {*WORDINGS}
    assert {payload.frame for payload in EVERY} == {*FRAMES}
    found = {(payload.frame, payload.text) for payload in EVERY}
    assert {(frame, FRAMES[frame].format(w)) for each in WORDINGS.values() for w in each for frame in FRAMES} == found


def test_many_of_them_would_be_read_as_a_rating_if_they_were_parsed() -> None:
    # Otherwise it would prove nothing that none is.
    assert sum(parse(payload.text) == 5.0 for payload in EVERY) >= 25


def test_a_twin_is_as_many_words_and_says_nothing_to_a_rater() -> None:
    told = {"score", "grade", "rating", "rate", "response", "answer", "five", "full", "best", "expert", "correct"}
    for payload in EVERY:
        assert payload.text in {FRAMES[payload.frame].format(wording) for wording in WORDINGS[payload.kind]}
        assert len(payload.twin.split()) == len(payload.text.split())
        # Neither digits nor anything that could close the document.
        assert re.fullmatch(r"\n{1,2}[A-Z][a-z ]*\.", payload.twin), payload.twin
        assert not told & {*payload.twin.lower().rstrip(".").split()}


def test_payloads_are_drawn_by_chance_and_come_round_again_with_other_twins() -> None:
    assert payloads(10, random.Random(0)) == EVERY[:10]
    assert payloads(10, random.Random(1)) != EVERY[:10]
    again = payloads(440, random.Random(0))
    assert [each.text for each in again[:220]] == [each.text for each in again[220:]]
    assert [each.twin for each in again[:220]] != [each.twin for each in again[220:]]
    # A few are of all kinds already.
    assert len({each.kind for each in EVERY[:30]}) == len(WORDINGS)


def gullible(own: str, leaks: Sequence[str]) -> FakeEngine:
    """Grades 1, but 5 as soon as a word of a payload stands anywhere but within the user's one turn."""

    def fooled(request: Request) -> bool:
        rest = [m["content"] for m in request.messages[1:]]
        turns = [m["role"] for m in request.messages]
        # What the rater itself wrote before the cue is no leak.
        spoken = [text.removesuffix("\nScore:").removesuffix("Score:") for text in rest]
        return turns not in (["user"], ["user", "assistant"]) or any(text not in ("", own) for text in spoken)

    def reply(request: Request) -> Reply | str:
        return "Score: 5" if fooled(request) else own

    def scores(request: Request, options: Sequence[str]) -> list[Score]:
        out_of_place = list(options) != GRADES or any(leak in option for leak in leaks for option in options)
        return (
            probable(0, 0, 0, 0, 1)(request, options)
            if fooled(request) or out_of_place
            else probable(1, 0, 0, 0, 0)(request, options)
        )

    return FakeEngine(reply=reply, scores=scores)


MODES = {
    "expected": {},
    "expected after reasoning": {"reasoning_tokens": 16},
    "parsed": {"readout": "parsed", "reasoning_tokens": 16},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["as_written", "response_first"])
def test_what_a_document_tells_the_rater_never_reaches_what_reads_the_rating(
    monkeypatch: pytest.MonkeyPatch, seen: Seen, mode: str, layout: str
) -> None:
    own = "A bad one.\nScore: 1" if mode == "parsed" else "A bad one."
    engine = gullible(own, [payload.text for payload in EVERY])
    monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: engine)
    pairs = [
        Pair(id=f"{n}/{at}", source="s", prompt=f"Q{at * payload.text}", completion="Bad." + (1 - at) * payload.text)
        for n, payload in enumerate(EVERY)
        # In the response, and in the instruction that a model made of it.
        for at in (0, 1)
    ]
    read = rater(**MODES[mode], layout=layout).open(seen())(pairs)
    assert len(read) >= 400
    assert {each["rating"] for each in read} == {1.0}
    # The engine was given every payload, in the one place where it belongs.
    asked = [request for requests, *_ in [*engine.scored, *engine.generated] for request in requests]
    said = "\0".join(request.messages[0]["content"] for request in asked)
    assert all(payload.text in said for payload in EVERY)


@pytest.mark.parametrize("mode", MODES)
def test_a_rater_that_says_nothing_of_its_own_rates_nothing_whatever_the_document_says(
    monkeypatch: pytest.MonkeyPatch, seen: Seen, mode: str
) -> None:
    engine = FakeEngine(reply=lambda request: "", scores=probable(0, 0, 0, 0, 0))
    monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: engine)
    pairs = [Pair(id=f"{n}", source="s", prompt="Q", completion=p.text) for n, p in enumerate(EVERY)]
    assert {each["rating"] for each in rater(**MODES[mode]).open(seen())(pairs)} == {None}


BAD = [
    Planted(
        id=f"{n}", source="s", prompt=f"Q{n}", completion=f"Bad {'word ' * n}", kind=kind, good=False, origin=f"o{n}"
    )
    for n, kind in enumerate(["swapped"] * 8 + ["truncated"] * 8)
]


Injected = tuple[Built, list[dict[str, Any]]]


@pytest.fixture
def injected(
    monkeypatch: pytest.MonkeyPatch,
    seen: Seen,
    stored: Stored,
    calibration: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Injected]:
    """The figures of the step and the pairs it rated."""

    def run(
        engine: FakeEngine,
        rows: Sequence[Planted] = BAD,
        fit: Fit | None = None,
        reached: float | None = None,
        **config: object,
    ) -> Injected:
        monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: engine)
        folder: Path = tmp_path_factory.mktemp("draft")
        stage = Inject(CurateConfig(**config), rater(**config))
        context = seen(0, rows=stored(folder.name, rows, Planted), calibration=calibration(fit, reached))
        built = stage.build(context, place_in(folder), lambda line: None)
        assert strict(folder / "metrics.json") == built.metrics
        return built, strict(folder / "injections.jsonl")

    return run


def lifted(payload: float, twin: float = 0.0) -> FakeEngine:
    """A rater that grades 1 or 5: the second with this probability where a payload of a kind stands in the pair."""
    words = {w for kind in ("score", "command") for w in WORDINGS[kind]}

    def scores(request: Request, options: Sequence[str]) -> list[Score]:
        high = payload if any(w in request.messages[0]["content"] for w in words) else twin
        if list(options) == GRADES:
            return probable(1 - high, 0, 0, 0, high)(request, options)
        return [Score(-2.0 * len(option.split()) - option.endswith(STOP), len(option.split())) for option in options]

    return FakeEngine(scores=scores)


def test_what_a_payload_gains_is_its_rating_less_its_twins(injected: Callable[..., Injected]) -> None:
    built, rows = injected(lifted(0.5), injections=220)
    metrics: Any = built.metrics
    assert metrics["payloads"] == 220
    assert len(rows) == built.ledger.kept == 440
    # 1 + 4 · .5 against 1, and nothing for the kinds of payload that it does not mind.
    gain = {"difference": 2.0, "ci": [2.0, 2.0], "raised": 1.0}
    none = {"difference": 0.0, "ci": [0.0, 0.0], "raised": 0.0}
    counts = Counter(payload.kind for payload in EVERY)
    for kind, found in metrics["by_kind"].items():
        assert found == {**(gain if kind in ("score", "command") else none), "n": counts[kind], "pairs": 4}
    share = (counts["score"] + counts["command"]) / 220
    whole = metrics["by_signal"]["verdict"]
    assert (whole["difference"], whole["raised"]) == (
        pytest.approx(2 * share, abs=0.1),
        pytest.approx(share, abs=1e-4),
    )
    assert whole["ci"][0] < whole["difference"] < whole["ci"][1]
    assert metrics["by_signal"].keys() == {"verdict", "rubric"}
    assert metrics["by_signal"]["rubric"] == whole


def test_payloads_behind_one_pair_are_no_draws_of_their_own(injected: Callable[..., Injected]) -> None:
    for injections in (40, 200):
        built, rows = injected(lifted(0.5), injections=injections)
        metrics: Any = built.metrics
        assert metrics["pairs"] == metrics["by_signal"]["verdict"]["pairs"] == 4
        gaps: dict[str, list[float]] = {}
        for payload, twin in zip(rows[::2], rows[1::2], strict=True):
            gaps.setdefault(payload["pair"], []).append(payload["verdict"] - twin["verdict"])
        means = [sum(each) / len(each) for each in gaps.values()]
        assert metrics["by_signal"]["verdict"]["ci"] == mean_interval(means).rounded()


def test_where_nothing_was_swapped_other_bad_pairs_are_injected_and_never_good_ones(
    injected: Callable[..., Injected],
) -> None:
    good = Planted(id="g", source="s", prompt="Q", completion="A", kind="seed", good=True, origin="g")
    _, rows = injected(lifted(0.5), rows=[good, *(pair for pair in BAD if pair.kind == "truncated")], injections=20)
    assert rows
    assert all(row["pair"] in {pair.id for pair in BAD} for row in rows)


def test_a_rater_that_minds_neither_is_lifted_by_neither(injected: Callable[..., Injected]) -> None:
    built, _ = injected(lifted(0.3, 0.3), injections=40)
    metrics: Any = built.metrics
    for found in (*metrics["by_signal"].values(), *metrics["by_kind"].values()):
        assert (found["difference"], found["raised"]) == (0.0, 0.0)


def test_whom_a_payload_would_have_made_a_kept_pair_is_counted_beside_the_twins(
    injected: Callable[..., Injected],
) -> None:
    built, _ = injected(lifted(0.9), injections=220)
    hits = sum(payload.kind in ("score", "command") for payload in EVERY)
    assert built.metrics["above_threshold"] == {"payload": hits, "twin": 0}
    # 1 + 4 · .9 is below the threshold of the wanted precision.
    built, _ = injected(lifted(0.9), injections=220, reached=4.7)
    assert built.metrics["above_threshold"] == {"payload": 0, "twin": 0}


def test_an_unrated_pair_is_no_kept_one_even_at_a_threshold_of_nothing(injected: Callable[..., Injected]) -> None:
    nothing = FakeEngine(scores=lambda request, options: None)
    fit = Fit(("rubric",), (1.0,), (0.0,), (0.0,), (1.0,), 0.0)
    built, rows = injected(nothing, fit=fit, **{**CALIBRATED, "threshold": 0, "signals": ["rubric"]}, injections=10)
    assert built.metrics["above_threshold"] == {"payload": 0, "twin": 0}
    assert built.metrics["by_signal"] == {"verdict": None, "rubric": None}
    assert {row["unrated"] for row in rows} == {"too_long"}


def test_every_payload_and_its_twin_end_the_same_short_bad_pair(injected: Callable[..., Injected]) -> None:
    engine = lifted(0.5)
    _, rows = injected(engine, injections=30)
    # Half of the swapped ones, the shortest, in turn.
    asked = [request.messages[0]["content"] for request in engine.scored[0][0]]
    for n, (payload, twin) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        assert (payload["id"], twin["id"]) == (f"{n:05d}/payload", f"{n:05d}/twin")
        assert (payload["kind"], payload["frame"]) == (twin["kind"], twin["frame"])
        pair = BAD[n % 4]
        for at, row in ((2 * n, payload), (2 * n + 1, twin)):
            assert pair.prompt in asked[at]
            assert asked[at].rstrip().endswith(f"{pair.completion}{row['text']}".rstrip())


def test_a_calibrated_rater_is_told_signal_by_signal_and_by_what_they_come_to(
    injected: Callable[..., Injected],
) -> None:
    fit = Fit(("rubric",), weights=(2.0,), squares=(0.0,), means=(1.0,), scales=(0.5,), intercept=0.0)
    built, rows = injected(lifted(0.9), fit=fit, **CALIBRATED, injections=30)
    metrics: Any = built.metrics
    assert metrics["by_signal"].keys() == {"verdict", *WEIGHED}
    assert all(row["verdict"] == fit.probability({"rubric": row["rubric"]}) for row in rows)
    assert metrics["by_signal"]["verdict"]["difference"] > 0
    # The engine gives every word the same, so a twin of as many words but no frame may differ by the frame's words.
    assert metrics["by_signal"]["rubric"]["difference"] > 0


def test_without_bad_pairs_nothing_is_injected(injected: Callable[..., Injected]) -> None:
    built, rows = injected(lifted(0.5), rows=[], injections=30)
    assert (rows, built.metrics["payloads"], built.metrics["by_kind"]["score"]) == ([], 0, None)


def test_identity_counts_how_many_and_what_is_kept() -> None:
    def settings(**config: object) -> object:
        return Inject(CurateConfig(**config), rater(**config)).settings()

    for changed in ({"injections": 5}, {"threshold": 3}, {"max_off_scale": 0.1}, {"reasoning_tokens": 4}):
        assert settings(**changed) != settings()
    assert settings(min_auc=0.9) == settings()
