import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from selfalign.evaluation.metrics import (
    Difference,
    Interval,
    auc,
    auc_interval,
    contains_match,
    exact_match,
    mean_interval,
    paired_difference,
    proportion_interval,
    rouge_l,
    spearman,
    spearman_interval,
)

ratings = st.lists(st.sampled_from([1.0, 2.0, 3.0, 3.5, 4.0, 5.0]), min_size=1, max_size=30)


@settings(deadline=None)
@given(ratings, ratings)
def test_auc_is_the_share_of_pairs_won_with_ties_half(positives: list[float], negatives: list[float]) -> None:
    won = sum((p > n) + (p == n) / 2 for p, n in itertools.product(positives, negatives))
    assert auc(positives, negatives) == pytest.approx(won / (len(positives) * len(negatives)), abs=1e-12)
    assert auc(positives, negatives) == pytest.approx(1 - auc(negatives, positives), abs=1e-12)


def test_auc_of_known_cases() -> None:
    assert auc([3, 4, 5], [1, 2]) == 1.0
    assert auc([1, 2], [3, 4]) == 0.0
    assert auc([2, 2], [2, 2, 2]) == 0.5
    # By hand: of 9 pairs, 3 beats 1 and 2, 4 beats 1 and 2, 2 beats 1 and ties with 2; 5 wins none of the rest.
    assert auc([2, 3, 4], [1, 2, 5]) == pytest.approx(5.5 / 9)
    assert auc(list(range(200_000)), list(range(200_000))) == 0.5


@pytest.mark.parametrize(("positives", "negatives"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0])])
def test_auc_of_nothing_is_refused(positives: list[float], negatives: list[float]) -> None:
    with pytest.raises(ValueError, match="there must be values"):
        auc(positives, negatives)


@settings(deadline=None)
@given(ratings, ratings)
def test_the_auc_interval_holds_the_auc_within_0_and_1_and_mirrors(
    positives: list[float], negatives: list[float]
) -> None:
    interval = auc_interval(positives, negatives)
    assert 0.0 <= interval.low <= auc(positives, negatives) <= interval.high <= 1.0
    assert interval.high > interval.low
    mirrored = auc_interval(negatives, positives)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - interval.high, 1 - interval.low), abs=1e-9)


def test_the_bounds_of_an_auc_solve_newcombes_equation() -> None:
    positives, negatives = [2.0, 3.0, 4.0, 4.5] * 5, [1.0, 2.5, 3.5] * 5
    m, n, estimate = 20, 15, auc([2.0, 3.0, 4.0, 4.5], [1.0, 2.5, 3.5])
    interval = auc_interval(positives, negatives)
    for bound in (interval.low, interval.high):
        # Hanley and McNeil's own form, with both sizes replaced by their mean in the numerator.
        q1, q2, mean = bound / (2 - bound), 2 * bound**2 / (1 + bound), (m + n) / 2
        variance = (bound * (1 - bound) + (mean - 1) * (q1 + q2 - 2 * bound**2)) / (m * n)
        assert abs(estimate - bound) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)


def test_a_perfect_auc_still_has_a_width_that_shrinks_with_the_sample() -> None:
    few, many = (auc_interval([5.0] * n, [1.0] * n) for n in (5, 50))
    assert few.high == many.high == 1.0
    assert few.low < many.low < 1.0


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_the_auc_interval_covers_the_truth_about_95_times_in_100(shift: float) -> None:
    rng = np.random.default_rng(3)
    truth = 0.5 * (1 + math.erf(shift / 2))
    held = 0
    for _ in range(400):
        interval = auc_interval(list(rng.normal(shift, 1, 30)), list(rng.normal(0, 1, 40)))
        held += interval.low <= truth <= interval.high
    assert 0.92 <= held / 400 <= 0.985


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # By hand from Wilson's formula, z = 1.96.
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        (1, 1, 0.20655, 1.0),
        (81, 263, 0.25529, 0.36621),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_intervals(successes: int, n: int, low: float, high: float) -> None:
    interval = proportion_interval(successes, n)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=2e-5)


@settings(deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_proportion_lies_within_its_interval(case: tuple[int, int]) -> None:
    interval = proportion_interval(*case)
    assert 0.0 <= interval.low <= case[0] / case[1] <= interval.high <= 1.0


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_what_is_no_proportion_is_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        proportion_interval(successes, n)


def test_a_mean_interval_agrees_with_the_normal_one_on_a_large_sample() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    interval = mean_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / math.sqrt(values.size)
    assert interval.low == pytest.approx(values.mean() - half, abs=half * 0.1)
    assert interval.high == pytest.approx(values.mean() + half, abs=half * 0.1)


def test_intervals_are_the_same_each_time_and_other_seeds_differ() -> None:
    values = np.random.default_rng(6).normal(0, 1, 12).tolist()
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)


def test_resampling_in_chunks_keeps_memory_bounded() -> None:
    values = [0.0, 1.0] * 1000
    interval = mean_interval(values)
    assert interval.low == pytest.approx(0.5 - 0.0219, abs=0.002)


def test_a_mean_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(300):
        interval = mean_interval(rng.normal(0.3, 1, 30).tolist())
        held += interval.low <= 0.3 <= interval.high
    assert 0.90 <= held / 300 <= 0.985


def test_one_value_says_nothing_about_its_spread() -> None:
    assert mean_interval([3.0]) == Interval(-math.inf, math.inf)
    assert mean_interval([3.0]).rounded() is None
    assert Interval(0.123456, 1.0).rounded() == [0.1235, 1.0]


def test_equal_values_have_no_spread() -> None:
    assert mean_interval([2.0] * 7) == Interval(2.0, 2.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_a_mean_of_nothing_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="there must be values"):
        mean_interval(values)


def test_a_paired_difference_sees_what_unpaired_means_would_hide() -> None:
    hardness = np.random.default_rng(2).normal(0, 10, 200)
    difference = paired_difference((hardness + 1.0).tolist(), hardness.tolist())
    assert difference.mean == pytest.approx(1.0)
    assert difference.interval.low == pytest.approx(1.0)
    assert difference.n == 200
    swapped = paired_difference([0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    assert swapped == Difference(0.0, swapped.interval, 4)
    assert swapped.interval.low < 0 < swapped.interval.high


def test_pairs_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_spearman_of_known_cases() -> None:
    assert spearman([1, 2, 3], [10, 20, 400]) == 1.0
    assert spearman([1, 2, 3], [3, 2, 1]) == -1.0
    # By hand: the squared differences of ranks 1, 1, 1, 1, 0 sum to 4, and 1 - 6 * 4 / (5 * 24) is .8.
    assert spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50]) == pytest.approx(0.8)
    # By hand: the ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4 have the covariance 4.5, the squares 4.5 and 5.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1.0, 2.5, 3.0, 4.0]), st.sampled_from([0.0, 1.0, 7.0])), min_size=1))
def test_spearman_sees_the_order_alone(pairs: list[tuple[float, float]]) -> None:
    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    rho = spearman(a, b)
    assert rho == spearman(b, a)
    assert rho == spearman([math.exp(value) for value in a], b)
    if rho is None:
        assert len(set(a)) == 1 or len(set(b)) == 1
    else:
        assert spearman([-value for value in a], b) == pytest.approx(-rho, abs=1e-12)
        # Pearson's, of ranks counted one by one.
        ranks = [[sum(o < v for o in side) + sum(o == v for o in side) / 2 for v in side] for side in (a, b)]
        assert rho == pytest.approx(np.corrcoef(ranks)[0, 1], abs=1e-12)


def test_one_value_throughout_has_no_order() -> None:
    assert spearman([1, 2, 3], [2, 2, 2]) is None


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], []), ([1.0, math.nan], [1.0, 2.0])])
def test_a_correlation_of_nothing_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"there must be values|pairs need two sequences"):
        spearman(a, b)


def test_the_interval_of_a_correlation_is_bonett_and_wrights() -> None:
    # By hand: atanh(.5) = .5493, its standard error sqrt(1.125 / 27) = .2041; tanh of .5493 -+ 1.96 * .2041.
    interval = spearman_interval(0.5, 30)
    assert (interval.low, interval.high) == (pytest.approx(0.1481, abs=1e-4), pytest.approx(0.7395, abs=1e-4))
    assert spearman_interval(-0.5, 30) == Interval(-interval.high, -interval.low)
    assert spearman_interval(0.0, 30).low == -spearman_interval(0.0, 30).high


@given(st.floats(-1, 1), st.integers(4, 200))
def test_the_interval_of_a_correlation_holds_it_within_minus_1_and_1(rho: float, n: int) -> None:
    interval = spearman_interval(rho, n)
    assert -1.0 <= interval.low <= rho <= interval.high <= 1.0
    assert interval.high > interval.low


def test_a_perfect_correlation_of_a_few_pairs_keeps_a_width() -> None:
    few, many = spearman_interval(1.0, 5), spearman_interval(1.0, 500)
    assert few.high == many.high == 1.0
    assert few.low < 0.5 < many.low
    assert spearman_interval(1.0, 3) == Interval(-1.0, 1.0)


def test_a_correlation_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(7)
    # Of two normal variables with Pearson's .6 (Pearson 1907).
    truth, held = 6 / math.pi * math.asin(0.3), 0
    for _ in range(400):
        a, noise = rng.normal(size=(2, 40))
        rho = spearman(a.tolist(), (0.6 * a + 0.8 * noise).tolist())
        assert rho is not None
        interval = spearman_interval(rho, 40)
        held += interval.low <= truth <= interval.high
    assert 0.92 <= held / 400 <= 0.98


def test_what_is_no_correlation_has_no_interval() -> None:
    with pytest.raises(ValueError, match=r"1\.5 is no correlation"):
        spearman_interval(1.5, 10)


def rouge_score(text: str, reference: str) -> float:
    found: float = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    return found


def test_rouge_l_of_known_cases() -> None:
    assert rouge_l("The cat, the DOG!", "the cat the dog") == 1.0
    # By hand: "police the gunman" of four words and four.
    assert rouge_l("police kill the gunman", "police ended the gunman") == pytest.approx(0.75)
    assert rouge_l("a b c d e f", "a c f") == pytest.approx(2 * 0.5 / 1.5)
    assert rouge_l("don't", "don t") == 1.0


@pytest.mark.parametrize(
    ("text", "reference"), [("", "a"), ("a", ""), ("", ""), ("!?", "a"), ("東京", "東京"), ("a", "b")]
)
def test_rouge_l_without_a_common_word_is_none_at_all(text: str, reference: str) -> None:
    assert rouge_l(text, reference) == rouge_score(text, reference) == 0.0


WORDS = st.lists(st.sampled_from(["a", "b", "C", "c", "10", "über", "K", "İ", "東京", "\ud800"]), max_size=30)


@settings(deadline=None)
@given(WORDS.map(" ".join) | st.text(max_size=60), WORDS.map(" ".join) | st.text(max_size=60))
def test_rouge_l_is_rouge_scores_to_the_last_digit(text: str, reference: str) -> None:
    assert rouge_l(text, reference) == rouge_score(text, reference)


def test_rouge_l_of_all_real_predictions_is_rouge_scores(real_data: Path) -> None:
    folder = real_data / "self-instruct"
    golden = json.loads((folder / "golden_metrics.json").read_bytes())["rows"]
    files = sorted(folder.glob("*_predictions.jsonl"))
    assert len(files) == 8
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
        found = [rouge_l(row["response"], row["target"]) for row in rows]
        assert len(found) == 252
        assert found == [rouge_score(row["response"], row["target"]) for row in rows]
        assert round(sum(found) / len(found), 4) == golden[file.name.removesuffix("_predictions.jsonl")]["mean_rougeL"]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Paris", "paris"),
        ("  Paris.\n", "Paris"),
        ("**Paris**", "paris"),
        ("“Paris!”", "Paris"),
        ("'New   York'", "new york"),
        ("5.", "5"),
        ("ＰＡＲＩＳ", "paris"),
        ("Straße", "STRASSE"),
        ("东京。", "东京"),
        (".5", ".5"),
    ],
)
def test_an_answer_matches_whatever_its_dress(reply: str, answer: str) -> None:
    assert exact_match(reply, ["something else", answer])


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("It is Paris", "Paris"),
        ("-5", "5"),
        (".5", "5"),
        ("3.5", "35"),
        ("C++", "C"),
        ("the Seine", "Seine"),
        ("5%", "5"),
        ("", ""),
        (".", ""),
    ],
)
def test_an_answer_that_says_something_else_does_not_match(reply: str, answer: str) -> None:
    assert not exact_match(reply, [answer])


@pytest.mark.parametrize(
    ("reply", "contains", "excludes"),
    [
        ("The capital is New  York.", ["new york"], []),
        ("It has 3 rivers, 3,000 lakes.", ["3", "3,000", "rivers"], ["000"]),
        ("Use C++ here", ["c++"], []),
        ("我在东京住", ["东京"], ["大阪"]),
        ("The artist", [], ["art"]),
        ("It grew by 3.", ["3"], []),
        ("anything", [], []),
        ("Mount Straßen", ["STRASSEN"], []),
    ],
)
def test_phrases_are_found_whole(reply: str, contains: list[str], excludes: list[str]) -> None:
    assert contains_match(reply, contains, excludes)


@pytest.mark.parametrize(
    ("reply", "contains", "excludes"),
    [
        ("The artist", ["art"], []),
        ("It is 3.5 m", ["3"], []),
        ("It is 3.5 m", ["5"], []),
        ("It is 13 m", ["3"], []),
        ("Paris and Rome", ["Paris"], ["rome"]),
        ("Paris", ["Paris", "Rome"], []),
        ("", ["x"], []),
    ],
)
def test_a_part_of_a_word_or_number_is_not_found(reply: str, contains: list[str], excludes: list[str]) -> None:
    assert not contains_match(reply, contains, excludes)


def test_an_empty_phrase_is_refused() -> None:
    with pytest.raises(ValueError, match="empty phrase"):
        contains_match("x", [" "])
