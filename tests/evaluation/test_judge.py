"""What a judge says of two replies, whatever place it likes."""

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.protocols import Request, Score
from selfalign.core.records import Message
from selfalign.evaluation.judge import Duel, Judgement, judge, read, tally
from stages.conftest import FakeEngine

DUEL = Duel("a", "Why?", "Because of this.", "No idea.")


def render(prompt: str, first: str, second: str) -> tuple[Message, ...]:
    return (Message(role="user", content=f"{prompt}|{first}|{second}"),)


def scores(*shares: float) -> list[Score]:
    return [Score(math.log(share), 1) for share in shares]


def asked(
    answer: Callable[[str, str], list[Score] | None], *duels: Duel, max_off_scale: float = 0.5
) -> tuple[list[Judgement], FakeEngine]:
    """What the judge says who answers to the texts that stand first and second."""

    def reply(request: Request, options: Sequence[str]) -> list[Score] | None:
        _, first, second = request.messages[0]["content"].split("|")
        return answer(first, second)

    engine = FakeEngine(scores=reply)
    return judge(engine, None, duels, render, max_off_scale), engine


def by_content(first: str, second: str) -> list[Score]:
    """Prefers our reply, and a little the one that stands first."""
    return scores(0.9, 0.1) if first == DUEL.ours else scores(0.3, 0.7)


def test_a_duel_is_asked_in_both_orders_as_a_choice_after_the_cue() -> None:
    _, engine = asked(by_content, DUEL)
    ((requests, options, _),) = engine.scored
    assert [request.messages[0]["content"] for request in requests] == [
        "Why?|Because of this.|No idea.",
        "Why?|No idea.|Because of this.",
    ]
    assert all(
        request.messages[1] == {"role": "assistant", "content": "The better one is Answer"} for request in requests
    )
    assert [tuple(each) for each in options] == [(" A", " B")] * 2


def test_the_preference_is_the_mean_of_both_orders() -> None:
    ((found,), _) = asked(by_content, DUEL)
    assert found == Judgement("a", 0.8, (0.9, 0.7), 0.0)
    assert (found.verdict, found.consistent) == ("win", True)
    swapped = Duel("a", "Why?", DUEL.theirs, DUEL.ours)
    ((other,), _) = asked(by_content, swapped)
    assert (other.preference, other.verdict, other.consistent) == (0.2, "loss", True)


@pytest.mark.parametrize("share", [0.99, 0.6, 0.01])
def test_a_judge_that_only_looks_at_the_place_is_undecided_and_inconsistent(share: float) -> None:
    found, _ = asked(lambda first, second: scores(share, 1 - share), DUEL, Duel("b", "x", "y", "z"))
    assert [(each.preference, each.verdict, each.consistent) for each in found] == [(0.5, "tie", False)] * 2
    figures = tally(found)
    assert (figures["win_rate"], figures["wins"], figures["ties"], figures["losses"]) == (0.5, 0, 2, 0)
    assert (figures["consistent"], figures["first_position"]) == (0.0, share)


@given(st.floats(0.01, 0.98), st.floats(0.01, 0.98), st.floats(0.1, 1))
def test_swapping_the_replies_mirrors_the_preference(p: float, q: float, on_scale: float) -> None:
    first, second = scores(p * on_scale, (1 - p) * on_scale), scores(q * on_scale, (1 - q) * on_scale)
    found, mirrored = read("a", first, second, 1), read("a", second, first, 1)
    assert found.preference is not None
    assert mirrored.preference is not None
    assert 0 <= found.preference <= 1
    assert mirrored.preference == pytest.approx(1 - found.preference, abs=2e-4)
    assert found.off_scale == pytest.approx(1 - on_scale, abs=1e-4)


def test_replies_that_are_alike_are_a_tie_that_nobody_is_asked_about() -> None:
    found, engine = asked(by_content, Duel("b", "Why?", "Same.\n", " Same."), DUEL)
    assert [each.id for each in found] == ["b", "a"]
    assert (found[0].preference, found[0].verdict, found[0].orders) == (0.5, "tie", None)
    assert {request.id for request in engine.scored[0][0]} == {"a"}
    figures = tally(found)
    assert (figures["alike"], figures["n"], figures["consistent"]) == (1, 2, 1.0)


def no_room_for(text: str) -> Callable[[str, str], list[Score] | None]:
    return lambda first, second: None if second == text else scores(0.5, 0.4)


def off_scale_after(text: str) -> Callable[[str, str], list[Score] | None]:
    return lambda first, second: scores(0.2, 0.1) if second == text else scores(0.5, 0.4)


def without_a_number_after(text: str) -> Callable[[str, str], list[Score] | None]:
    return lambda first, second: [Score(math.nan, 1)] * 2 if second == text else scores(0.5, 0.4)


@pytest.mark.parametrize("text", [DUEL.ours, DUEL.theirs])
@pytest.mark.parametrize(
    ("answer", "reason", "off_scale"),
    [
        (no_room_for, "too_long", None),
        (off_scale_after, "off_scale", 0.7),
        (without_a_number_after, "off_scale", 1.0),
    ],
)
def test_a_duel_that_one_order_does_not_answer_has_no_verdict(
    text: str, answer: Callable[[str], Callable[[str, str], list[Score] | None]], reason: str, off_scale: float | None
) -> None:
    ((found,), _) = asked(answer(text), DUEL)
    assert found == Judgement("a", None, None, off_scale, reason)
    assert found.verdict is None
    figures = tally([found])
    assert figures["unjudged"] == {reason: 1}
    assert (figures["n"], figures["win_rate"], figures["ties"]) == (0, None, 0)


def test_how_much_may_be_off_the_scale_is_the_recipes() -> None:
    ((found,), _) = asked(off_scale_after(DUEL.ours), DUEL, max_off_scale=0.7)
    assert (found.off_scale, found.unjudged) == (0.7, None)


def test_the_figures_of_some_verdicts() -> None:
    said = [
        Judgement("a", 0.8, (0.9, 0.7), 0.0),
        Judgement("b", 0.6, (0.8, 0.4), 0.0),
        Judgement("c", 0.1, (0.2, 0.0), 0.0),
        Judgement("d", 0.5),
        Judgement("e", None, unjudged="too_long"),
        Judgement("f", 0.75, (0.75, 0.75), 0.0),
    ]
    figures = tally(said)
    # By hand: the mean of .8, .6, .1, .5 and .75; over four that were asked, three say the same twice, and the one that
    # stands first gets .9 and .3, .8 and .6, .2 and 1, .75 and .25.
    assert figures["win_rate"] == 0.55
    low, high = figures["ci"]
    assert 0.1 < low < 0.55 < high < 1
    assert (figures["wins"], figures["ties"], figures["losses"], figures["alike"]) == (2, 2, 1, 1)
    assert (figures["consistent"], figures["first_position"]) == (0.75, 0.6)
    assert (figures["n"], figures["unjudged"]) == (5, {"too_long": 1})


def test_nothing_to_judge_has_no_figures() -> None:
    found, _ = asked(by_content)
    assert found == []
    assert tally([])["win_rate"] is None
    assert tally([Judgement("a", 0.5)])["ci"] is None
