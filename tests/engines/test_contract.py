"""What every engine promises: one suite over all of them."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engines.tiny import GREEDY, LIMIT, RUBRIC, SCALE, ask, opened, sentence, varied
from selfalign.core.errors import InternalError
from selfalign.core.protocols import STOP, Engine, Reply, Request, Sampling, Score
from selfalign.engines.config import ABILITIES, ModelConfig
from selfalign.engines.scripted import ScriptedEngine

WARM = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=16)
# Longer than any engine here has room for.
ENDLESS = "hello " * LIMIT
SCRIPT = [
    {"match": "(hello ){100}", "action": "too_long"},
    {"match": "^count", "reply": "one two three four five six seven eight nine ten eleven twelve"},
    {"match": "Score:$", "scores": {way: 0.3 - 0.05 * at for at, way in enumerate(SCALE)}},
]


Open = Callable[[], Engine]


@pytest.fixture(scope="module", params=sorted(ABILITIES))
def world(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens the engine that is tried: another one joins by a branch here."""
    match request.param:
        case "scripted":
            script = tmp_path_factory.mktemp("script") / "script.json"
            script.write_text(json.dumps(SCRIPT))
            return lambda: ScriptedEngine(ModelConfig(path=str(script), engine="scripted"))
        case "transformers":
            return lambda: opened(base)
    raise NotImplementedError(f"{request.param} has no place in the contract's suite yet")


@pytest.fixture(scope="module")
def one(world: Open) -> Iterator[Engine]:
    engine = world()
    yield engine
    engine.close()


def rated(count: int) -> list[Request]:
    rng = random.Random(11)
    return [ask(RUBRIC + sentence(rng, rng.randint(2, 30)), str(n), opening="Score:") for n in range(count)]


def close_to(found: list[list[Score] | None], wanted: list[list[Score] | None]) -> bool:
    """Equal but for the last bits, which a batch decides."""
    return [row and [score.tokens for score in row] for row in found] == [
        row and [score.tokens for score in row] for row in wanted
    ] and [score.log_prob for row in found for score in row or []] == pytest.approx(
        [score.log_prob for row in wanted for score in row or []], abs=1e-4
    )


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_reply_follows_its_request_whatever_its_place_and_company(one: Engine, sampling: Sampling) -> None:
    requests = varied(10)
    together = one.generate(requests, sampling)
    assert len({reply.text for reply in together}) > 5
    assert one.generate(requests[::-1], sampling)[::-1] == together
    assert [one.generate([request], sampling)[0] for request in requests] == together


def test_a_reply_follows_from_prompt_and_seed_alone(one: Engine, world: Open) -> None:
    requests = varied(8)
    replies = one.generate(requests, WARM)
    fresh = world()
    assert fresh.generate(requests, WARM) == replies
    fresh.close()
    others = one.generate([replace(request, seed=request.seed + 1) for request in requests], WARM)
    assert sum(a != b for a, b in zip(others, replies, strict=True)) >= 6
    greedy = one.generate(requests, GREEDY)
    assert one.generate([replace(request, seed=request.seed + 1) for request in requests], GREEDY) == greedy


def test_scores_come_in_the_order_of_requests_and_continuations_whatever_their_company(one: Engine) -> None:
    requests = rated(9)
    together = one.score(requests, [SCALE] * 9)
    assert [len(row or []) for row in together] == [5] * 9
    assert close_to(one.score(requests[::-1], [SCALE] * 9)[::-1], together)
    assert close_to([one.score([request], [SCALE])[0] for request in requests], together)
    turned = one.score(requests, [SCALE[::-1]] * 9)
    assert close_to([row and row[::-1] for row in turned], together)


def test_continuations_that_exclude_each_other_share_one_probability(one: Engine) -> None:
    for row in one.score(rated(4), [SCALE] * 4):
        assert row is not None
        assert len({score.log_prob for score in row}) == 5
        assert all(score.log_prob <= 0 and score.tokens >= 1 for score in row)
        assert sum(math.exp(score.log_prob) for score in row) <= 1 + 1e-6


def test_nothing_is_certain_and_the_same_scores_the_same(one: Engine) -> None:
    (row,) = one.score(rated(1), [["", " 1", " 1"]])
    assert row is not None
    assert row[0] == Score(0.0, 0)
    assert row[1] == row[2]


def test_the_end_of_a_turn_is_no_likelier_than_what_it_ends(one: Engine) -> None:
    (row,) = one.score(rated(1), [[" 1", " 1" + STOP]])
    assert row is not None
    assert row[1].log_prob <= row[0].log_prob + 1e-4
    assert row[1].tokens >= row[0].tokens


@pytest.mark.parametrize("world", [name for name, can in ABILITIES.items() if "likelihood" in can], indirect=True)
def test_a_text_is_as_likely_as_its_parts_one_after_the_other(one: Engine) -> None:
    ((first, whole, ended),) = one.score([ask("say")], [["bread", "bread and ships", "bread and ships" + STOP]])
    ((rest, rest_ended),) = one.score([ask("say", opening="bread")], [[" and ships", " and ships" + STOP]])
    assert whole.log_prob == pytest.approx(first.log_prob + rest.log_prob, abs=1e-4)
    assert ended.log_prob == pytest.approx(first.log_prob + rest_ended.log_prob, abs=1e-4)
    assert ended.log_prob < whole.log_prob < first.log_prob


def test_what_leaves_no_room_is_told_and_the_others_go_on(one: Engine) -> None:
    burst, fits = ask(ENDLESS), ask("hello")
    before = one.tokens
    replies = one.generate([burst, fits], GREEDY)
    assert replies[0] == Reply("", 0, "too_long")
    spent = one.tokens - before
    assert replies[1] == one.generate([fits], GREEDY)[0]
    assert one.tokens - before == 2 * spent, "what was not read is not counted"
    scores = one.score([ask(ENDLESS, opening="Score:"), ask("hello", opening="Score:")], [SCALE, SCALE])
    assert scores[0] is None
    assert scores[1] == one.score([ask("hello", opening="Score:")], [SCALE])[0]


def test_a_shorter_limit_gives_the_beginning_of_the_same_reply(one: Engine) -> None:
    requests = [ask("count to twelve", seed=at) for at in range(4)]
    short = WARM.model_copy(update={"max_new_tokens": 6})
    for a, b in zip(one.generate(requests, WARM), one.generate(requests, short), strict=True):
        assert b.tokens <= 6
        assert a.text.startswith(b.text.rstrip("�"))
        assert (b.finish == "length") == (a.tokens > 6)


def test_a_reply_ends_before_a_stop_string(one: Engine) -> None:
    requests = varied(6)
    for request, free in zip(requests, one.generate(requests, GREEDY), strict=True):
        stop = free.text[4:6]
        sampling = GREEDY.model_copy(update={"stop": (stop, "never written")})
        (reply,) = one.generate([request], sampling)
        assert (reply.text, reply.finish) == (free.text[: free.text.index(stop)], "stop")


def test_a_reply_goes_on_after_an_opening_and_does_not_repeat_it(one: Engine) -> None:
    (reply,) = one.generate([ask("count", opening="quite another opening")], GREEDY)
    assert reply.text
    assert "quite another opening" not in reply.text


def test_nothing_asked_is_nothing_answered_and_costs_nothing(one: Engine) -> None:
    before = one.tokens
    assert one.generate([], GREEDY) == []
    assert one.score([], []) == []
    assert one.score([ask("say", opening="Score:")], [[]]) == [[]]
    assert one.tokens == before


def test_tokens_are_counted_and_count_alike_for_the_same_work(one: Engine) -> None:
    start = one.tokens
    replies = one.generate(varied(3), GREEDY)
    written = one.tokens
    assert written - start >= sum(reply.tokens for reply in replies) > 0
    one.score(rated(2), [SCALE] * 2)
    scored = one.tokens
    assert scored > written
    one.generate(varied(3), GREEDY)
    one.score(rated(2), [SCALE] * 2)
    assert one.tokens - scored == scored - start


def test_no_adapter_is_the_base(one: Engine) -> None:
    assert one.generate(varied(2), GREEDY, None) == one.generate(varied(2), GREEDY)
    assert one.score(rated(2), [SCALE] * 2, None) == one.score(rated(2), [SCALE] * 2)


def test_a_closed_engine_cannot_be_used(world: Open) -> None:
    engine = world()
    engine.close()
    engine.close()
    with pytest.raises(InternalError, match="closed"):
        engine.generate([ask("hello")], GREEDY)
    with pytest.raises(InternalError, match="closed"):
        engine.score([ask("hello", opening="Score:")], [SCALE])
