"""The calibrated rater's arithmetic: held against its objective, brute force, and signals that were really measured."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from selfalign.evaluation.metrics import auc
from selfalign.stages.curate import fit as fitting
from selfalign.stages.curate.fit import (
    LIMIT,
    RIDGE,
    Fit,
    Threshold,
    balanced,
    by_threshold,
    cross_validated,
    fit,
    reaching,
    reliability,
)

Floats = NDArray[np.float64]

# Likelihoods of whole texts among them: thousands of nats.
values = st.floats(-20_000, 20_000).map(lambda value: round(value, 4))
truths = st.lists(st.booleans(), min_size=2, max_size=30).filter(lambda good: any(good) and not all(good))


@st.composite
def planted(draw: st.DrawFn) -> tuple[list[str], Floats, list[bool]]:
    """Signal names, measured values [N, S], and which pairs are good."""
    good = draw(truths)
    size = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=len(good), max_size=len(good)))
    return [f"s{n}" for n in range(size)], np.array(rows), good


def squashed(value: float) -> float:
    return math.copysign(math.log(1 + abs(value)), value)


def objective(model: Fit, values_NS: Floats, good: Sequence[bool], coefficients: Sequence[float]) -> float:
    """What a fit makes smallest: the weighted log loss and the ridge of the weights, not of the intercept."""
    ones, zeros = sum(good), len(good) - sum(good)
    loss = 0.5 * RIDGE * sum(weight**2 for weight in coefficients[1:])
    for row, is_good in zip(values_NS.tolist(), good, strict=True):
        scaled = [(squashed(v) - m) / s for v, m, s in zip(row, model.means, model.scales, strict=True)]
        held = [max(-LIMIT, min(LIMIT, s)) for s in scaled]
        odds = coefficients[0] + sum(
            w * s for w, s in zip(coefficients[1:], [*held, *(s**2 for s in held)], strict=True)
        )
        odds = odds if is_good else -odds
        share = len(good) / (2 * (ones if is_good else zeros))
        loss += share * (math.log1p(math.exp(-abs(odds))) + max(0.0, -odds))
    return loss


def assert_lowest(model: Fit, values_NS: Floats, good: Sequence[bool]) -> None:
    """By finite differences: level in every direction, and higher all around."""
    best = [model.intercept, *model.weights, *model.squares]
    for at in range(len(best)):

        def moved(step: float, at: int = at) -> float:
            return objective(model, values_NS, good, [c + step * (n == at) for n, c in enumerate(best)])

        assert (moved(1e-4) - moved(-1e-4)) / 2e-4 == pytest.approx(0, abs=1e-4)
        assert min(moved(0.1), moved(-0.1)) > moved(0)


@settings(deadline=None)
@given(planted())
def test_a_fit_is_where_the_objective_is_lowest(data: tuple[list[str], Floats, list[bool]]) -> None:
    names, values_NS, good = data
    assert_lowest(fit(names, values_NS, good), values_NS, good)


def test_a_fit_is_found_beside_outliers_where_whole_steps_go_to_and_fro() -> None:
    rows = np.array([*[[0.34, 0.34]] * 17, [0.32, -1.4], *[[0.0, 0.0]] * 54, [-10.0, 0.12]])
    good = [True] * 18 + [False] * 55
    assert_lowest(fit(["a", "b"], rows, good), rows, good)


@settings(deadline=None)
@given(planted(), st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_changes_nothing(
    data: tuple[list[str], Floats, list[bool]], chance: random.Random
) -> None:
    names, values_NS, good = data
    order = chance.sample(range(len(good)), len(good))
    one, other = fit(names, values_NS, good), fit(names, values_NS[order], [good[n] for n in order])
    for key in ("weights", "squares", "means", "scales"):
        assert getattr(one, key) == pytest.approx(getattr(other, key), abs=2e-6)
    assert one.intercept == pytest.approx(other.intercept, abs=2e-6)


@pytest.mark.parametrize("far", [1.0, 1e3, 1e12])
def test_signals_that_tell_all_pairs_apart_get_finite_weights(far: float) -> None:
    good = [True, False] * 20
    model = fit(["s"], np.array([[far if each else -far] for each in good]), good)
    assert 0 < model.weights[0] < 5
    low, high = model.probability({"s": -far}), model.probability({"s": far})
    assert low is not None
    assert high is not None
    assert 0 < low < 0.2 < 0.8 < high < 1


def test_a_signal_that_never_varies_weighs_nothing_and_moves_nothing() -> None:
    rows = np.array([[3.0, 1.0], [3.0, 2.0], [3.0, -1.0], [3.0, -2.0]])
    good = [True, True, False, False]
    model = fit(["same", "tells"], rows, good)
    alone = fit(["tells"], rows[:, 1:], good)
    assert model.weights[0] == 0
    assert model.weights[1] == pytest.approx(alone.weights[0], abs=2e-6)
    assert model.probability({"same": 3.0, "tells": 1.5}) == pytest.approx(alone.probability({"tells": 1.5}), abs=1e-5)


def test_where_nothing_tells_the_pairs_apart_every_pair_is_at_even_odds_however_many_are_bad() -> None:
    model = fit(["s"], np.full((10, 1), 7.0), [True, *[False] * 9])
    assert model.probability({"s": 7.0}) == pytest.approx(0.5, abs=1e-6)


@given(truths)
def test_good_and_bad_pairs_weigh_the_same_in_all(good: list[bool]) -> None:
    weights = balanced(good)
    assert sum(w for w, each in zip(weights, good, strict=True) if each) == pytest.approx(len(good) / 2)
    assert weights.sum() == pytest.approx(len(good))
    assert len(set(weights[np.array(good)])) == 1


@pytest.mark.parametrize("good", [[True, True], [False, False]])
def test_a_fit_without_both_kinds_is_refused(good: list[bool]) -> None:
    with pytest.raises(ValueError, match="needs good pairs and bad ones"):
        fit(["s"], np.array([[1.0], [2.0]]), good)


PLAIN = Fit(("a", "b"), weights=(1.0, -2.0), squares=(0.0, 0.5), means=(0.0, 1.0), scales=(1.0, 2.0), intercept=0.5)


@pytest.mark.parametrize(
    ("a", "b", "odds"),
    [
        # intercept + 1 · a' − 2 · z + .5 · z², z = (b' − 1) / 2 within ±3, with v' = sign(v) · log(1 + |v|)
        (0.0, 0.0, 1.625),
        (math.e - 1, 0.0, 2.625),
        (1 - math.e, 0.0, 0.625),
        (0.0, math.e**3 - 1, -1.0),
        (0.0, math.e**7 - 1, -1.0),
        (0.0, math.e**9 - 1, -1.0),
    ],
)
def test_a_probability_is_the_logistic_of_the_weighted_logarithms_and_their_squares(
    a: float, b: float, odds: float
) -> None:
    assert PLAIN.probability({"a": a, "b": b}) == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-6)


@pytest.mark.parametrize("values", [{"a": 1.0}, {"a": 1.0, "b": None}, {}])
def test_a_pair_that_lacks_a_signal_has_no_probability(values: dict[str, float | None]) -> None:
    assert PLAIN.probability(values) is None


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([-500.0, 500.0]))
def test_any_value_gives_a_probability_without_overflow(value: float, weight: float) -> None:
    model = Fit(("s",), (weight,), (weight,), (0.0,), (1.0,), 0.0)
    with np.errstate(over="raise", invalid="raise"):
        found = model.probability({"s": value})
    assert found is not None
    assert 0 <= found <= 1


@settings(deadline=None)
@given(planted())
def test_a_fit_comes_back_from_json_as_it_was(data: tuple[list[str], Floats, list[bool]]) -> None:
    model = fit(*data)
    assert Fit.of_json(json.loads(json.dumps(model.to_json(), allow_nan=False))) == model


@settings(deadline=None)
@given(planted(), st.integers(2, 8), st.integers(0, 99), st.randoms(use_true_random=False))
def test_a_pair_is_judged_by_a_fit_that_saw_none_of_its_origin(
    data: tuple[list[str], Floats, list[bool]], count: int, seed: int, chance: random.Random
) -> None:
    names, values_NS, good = data
    origins = [f"o{chance.randrange(count)}" for _ in good]
    before = cross_validated(names, values_NS, good, origins, seed)
    pair = chance.randrange(len(good))
    own = [n for n, origin in enumerate(origins) if origin == origins[pair]]
    values_NS, good = values_NS.copy(), [*good]
    for n in own:
        good[n] = not good[n]
        if n != pair:
            values_NS[n] = 1000 * (chance.random() - 0.5)
    if any(good) and not all(good):
        assert cross_validated(names, values_NS, good, origins, seed)[pair] == before[pair]


def test_every_other_origin_counts() -> None:
    # As many folds as origins, so that each pair's fit saw all the others.
    rows, good = np.arange(10.0).reshape(-1, 1), [n % 2 == 0 for n in range(10)]
    origins = [f"o{n // 2}" for n in range(10)]
    before = cross_validated(["s"], rows, good, origins, 0)
    assert None not in before
    rows = rows.copy()
    rows[0] = 100.0
    after = cross_validated(["s"], rows, good, origins, 0)
    assert [one != other for one, other in zip(before[2:], after[2:], strict=True)] == [True] * 8
    assert after[1] == before[1]


def test_the_seed_draws_the_folds_and_the_order_of_the_pairs_does_not() -> None:
    chance = random.Random(0)
    rows, good = np.array([[chance.random()] for _ in range(40)]), [n % 2 == 0 for n in range(40)]
    origins = [f"o{n // 2}" for n in range(40)]
    found = cross_validated(["s"], rows, good, origins, 3)
    back = cross_validated(["s"], rows[::-1], good[::-1], origins[::-1], 3)[::-1]
    assert found == pytest.approx(back, abs=1e-5)
    assert found != cross_validated(["s"], rows, good, origins, 4)


def test_one_origin_alone_cannot_be_cross_validated() -> None:
    rows = np.array([[1.0], [2.0], [3.0]])
    assert cross_validated(["s"], rows, [True, False, False], ["o"] * 3, 0) == [None] * 3


scored = truths.flatmap(
    lambda good: st.tuples(
        st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0]), min_size=len(good), max_size=len(good)),
        st.just(good),
    )
)


@given(scored)
def test_precision_and_recall_at_every_threshold_are_those_of_counting_at_even_odds(
    data: tuple[list[float], list[bool]],
) -> None:
    scores, good = data
    curve = by_threshold(scores, good)
    assert [point.threshold for point in curve] == sorted(set(scores))
    for point in curve:
        hits = [each for score, each in zip(scores, good, strict=True) if score >= point.threshold]
        right, wrong = sum(hits) / sum(good), (len(hits) - sum(hits)) / (len(good) - sum(good))
        assert point.precision == pytest.approx(right / (right + wrong), abs=1e-4)
        assert point.recall == pytest.approx(right, abs=1e-4)
        assert point.kept == pytest.approx((right + wrong) / 2, abs=1e-4)


@given(scored, st.floats(0.05, 0.99))
def test_the_threshold_of_a_precision_is_the_lowest_that_has_it(
    data: tuple[list[float], list[bool]], precision: float
) -> None:
    curve = by_threshold(*data)
    good_enough = [point.threshold for point in curve if point.precision >= precision]
    assert reaching(curve, precision) == min(good_enough, default=None)


def test_one_bad_pair_at_the_very_top_leaves_a_precision_within_reach() -> None:
    curve = by_threshold([0.99, *[0.9] * 50, *[0.1] * 50], [False, *[True] * 50, *[False] * 50])
    assert curve[-1].precision == 0
    assert reaching(curve, 0.9) == 0.9
    assert reaching(curve, 0.999) is None
    assert reaching([], 0.8) is None


def test_a_precision_that_rounds_up_to_what_is_wanted_is_not_reached() -> None:
    assert reaching([Threshold(0.5, 0.94996, 1, 1)], 0.95) is None


@given(scored)
def test_reliability_bins_hold_every_pair_once_from_the_lowest_score_on(data: tuple[list[float], list[bool]]) -> None:
    scores, good = data
    bins = reliability(scores, good)
    sizes = [each.n for each in bins]
    assert sum(sizes) == len(scores)
    assert max(sizes) - min(sizes) <= 1
    assert sum(each.n * each.score for each in bins) == pytest.approx(sum(scores), abs=1e-3 * len(scores))
    assert [each.score for each in bins] == sorted(each.score for each in bins)
    ranked = sorted(range(len(scores)), key=lambda n: scores[n])
    for each in bins:
        inside, ranked = ranked[: each.n], ranked[each.n :]
        right = sum(good[n] for n in inside) / sum(good)
        wrong = sum(not good[n] for n in inside) / (len(good) - sum(good))
        assert each.good == pytest.approx(right / (right + wrong), abs=1e-4)


def test_no_scores_are_no_bins() -> None:
    assert reliability([], []) == []


GOLDEN = json.loads((Path(__file__).parent / "golden_signals.json").read_text("utf-8"))
SIGNALS: list[str] = GOLDEN["columns"][2:]
KINDS = [row[1] for row in GOLDEN["rows"]]
TOGETHER, ALL = ("swapped", "truncated"), ("swapped", "truncated", "echo", "boilerplate")


def area(scores: Sequence[Any], kinds: Sequence[str]) -> float:
    """Good pairs against those that were spoilt in one of the ways."""
    good = [score for score, kind in zip(scores, KINDS, strict=True) if kind == "seed"]
    return auc(good, [score for score, kind in zip(scores, KINDS, strict=True) if kind in kinds])


def measured(seed: int) -> list[float | None]:
    """The cross-validated probabilities of pairs that a real model rated, on Guanaco's held-out English pairs."""
    values_NS = np.array([row[2:] for row in GOLDEN["rows"]])
    good = [kind == "seed" for kind in KINDS]
    return cross_validated(SIGNALS, values_NS, good, [str(row[0]) for row in GOLDEN["rows"]], seed)


@pytest.mark.parametrize("seed", range(3))
def test_on_real_signals_the_calibrated_rater_tells_what_no_single_signal_does(seed: int) -> None:
    probabilities = measured(seed)
    assert None not in probabilities
    assert area(probabilities, TOGETHER) >= 0.98
    assert area(probabilities, ALL) >= 0.98
    for kind in ALL:
        assert area(probabilities, (kind,)) >= 0.98
    for n, name in enumerate(SIGNALS):
        single = [row[2 + n] for row in GOLDEN["rows"]]
        for kinds in (TOGETHER, ALL):
            # What is low for good pairs tells as much.
            assert max(area(single, kinds), 1 - area(single, kinds)) < 0.85, name


def test_a_line_alone_cannot_say_that_a_signal_is_too_high_as_well_as_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither logarithm nor square: what an echo gains then decides alone, and the wrong way for swapped responses.
    monkeypatch.setattr(fitting, "_squashed", lambda values: values)
    monkeypatch.setattr(fitting, "_terms", lambda v, m, s: np.hstack([np.ones((len(v), 1)), (v - m) / s, 0 * v]))
    for seed in range(3):
        assert 0.7 < area(measured(seed), ALL) < 0.86
