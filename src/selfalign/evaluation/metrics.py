"""What is measured, each figure with its 95% interval. The same input gives the same figures, to the last digit."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from rapidfuzz.distance import LCSseq

from selfalign.text.overlap import UNSPACED, folded

Z95 = 1.959963984540054
RESAMPLES = 10_000
# Bounds the memory of resampling: so many drawn values at a time.
CHUNK = 1 << 20

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% confidence interval."""

    low: float
    high: float

    def rounded(self) -> list[JsonValue] | None:
        """`[low, high]` to four digits, as metrics hold it. None without an end: JSON has no infinity."""
        return [round(self.low, 4), round(self.high, 4)] if math.isfinite(self.high - self.low) else None


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean of paired differences over `n` pairs. It is told apart from none when `interval` leaves out 0."""

    mean: float
    interval: Interval
    n: int


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counted half, 0.0..1.0. O(n log n).

    The Mann-Whitney statistic over average ranks (Hanley and McNeil, Radiology 143, 1982). Raises ValueError
    where a side is empty or holds NaN.
    """
    above, below = _floats(positives), _floats(negatives)
    ranks = _average_ranks(np.concatenate([above, below]))
    wins = ranks[: above.size].sum() - above.size * (above.size + 1) / 2
    return float(wins / (above.size * below.size))


def auc_interval(positives: Sequence[float], negatives: Sequence[float]) -> Interval:
    """95% interval of `auc`: method 5 of Newcombe, Statistics in Medicine 25:559-573, 2006.

    A score interval (the variance is Hanley and McNeil's at each bound, with both sample sizes taken as their
    mean): it stays within 0..1 and keeps a width where the two sides are perfectly apart, which DeLong's does not.
    """
    estimate, m, n = auc(positives, negatives), len(positives), len(negatives)
    each = (m + n) / 2 - 1

    def distance(theta: float) -> float:
        spread = 1 + each * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return abs(estimate - theta) - Z95 * math.sqrt(theta * (1 - theta) * spread / (m * n))

    return Interval(_root(distance, 0.0, estimate), _root(distance, 1.0, estimate))


def proportion_interval(successes: int, n: int) -> Interval:
    """95% interval of a proportion: Wilson's score interval (JASA 22:209-212, 1927). 0..1 for n = 0."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion")
    if n == 0:
        return Interval(0.0, 1.0)
    share, shrink = successes / n, 1 + Z95**2 / n
    middle = (share + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    # Rounding must not take the bound off the end that the formula meets exactly.
    low = 0.0 if successes == 0 else middle - half
    return Interval(low, 1.0 if successes == n else middle + half)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """95% interval of the mean: percentile bootstrap, 10,000 resamples from a fixed seed.

    Widened by sqrt(n / (n - 1)) about the mean against the bootstrap's narrowness (Hesterberg, The American
    Statistician 69:371-386, 2015); below some 20 values it is still a little narrow. One value says
    nothing about the spread: -inf..inf. Raises ValueError for none, and for NaN.
    """
    sample = _floats(values)
    if sample.size == 1:
        return Interval(-math.inf, math.inf)
    middle = float(sample.mean())
    bounds = np.quantile(_resampled_means(sample, seed), [0.025, 0.975])
    low, high = middle + (bounds - middle) * math.sqrt(sample.size / (sample.size - 1))
    return Interval(float(low), float(high))


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Difference:
    """Mean of a - b over pairs with its 95% interval: pairs are resampled whole, as in `mean_interval`.

    (Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004.)
    """
    _refuse_unpaired(a, b)
    differences = _floats(a) - _floats(b)
    return Difference(float(differences.mean()), mean_interval(differences.tolist(), seed), differences.size)


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation of pairs, -1.0..1.0: Pearson's of the average ranks (Spearman, Am. J. Psychol. 15, 1904).

    None where a side has one value throughout, and so no order. Raises ValueError for two sequences of different
    lengths, for none, and for NaN.
    """
    _refuse_unpaired(a, b)
    middle = (len(a) + 1) / 2
    first, second = _average_ranks(_floats(a)) - middle, _average_ranks(_floats(b)) - middle
    spread = float(first @ first) * float(second @ second)
    return float(first @ second) / math.sqrt(spread) if spread else None


def spearman_interval(rho: float, n: int) -> Interval:
    """95% interval of `spearman` over `n` pairs: Bonett and Wright, Psychometrika 65:23-28, 2000.

    Fisher's transformation with the variance (1 + rho² / 2) / (n - 3). It has no value at ±1, so the inner bound is
    taken from at most 1 - 12 / (n³ - n), the correlation of an order with one neighbouring pair swapped: a perfect
    one keeps a width. Up to three pairs say nothing: -1..1. Raises ValueError for a `rho` that is no correlation.
    """
    if not -1 <= rho <= 1:
        raise ValueError(f"{rho} is no correlation")
    if n <= 3:
        return Interval(-1.0, 1.0)
    size = abs(rho)

    def bound(correlation: float, side: float) -> float:
        return math.tanh(math.atanh(correlation) + side * Z95 * math.sqrt((1 + correlation**2 / 2) / (n - 3)))

    near = bound(min(size, 1 - 12 / (n**3 - n)), -1.0)
    far = 1.0 if size == 1 else bound(size, 1.0)
    return Interval(near, far) if rho >= 0 else Interval(-far, -near)


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L of a text against its reference, 0.0..1.0: the F-measure of their longest common subsequence of words.

    (Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004, with precision and recall weighed alike.) To
    the last digit what the package rouge_score calls rougeL, without stemming. A word is a run of a-z and 0-9 in the
    lower-cased text, so this is for English: a text in another script has no words, and 0.0 against anything.
    """
    numbers: dict[str, int] = {}
    # Numbers, because words would be compared by their hashes.
    own, other = ([numbers.setdefault(word, len(numbers)) for word in _rouge_words(each)] for each in (text, reference))
    common = LCSseq.similarity(own, other)
    if not common:
        return 0.0
    precision, recall = common / len(own), common / len(other)
    return 2 * precision * recall / (precision + recall)


def exact_match(reply: str, answers: Sequence[str]) -> bool:
    """Whether `reply` is one of `answers`, but for case, spacing, quotes around it and punctuation at its end.

    Kept, since they carry meaning: articles, signs, brackets, inner punctuation and a leading point. "Paris." is
    "paris"; "-5" is not "5", "C++" not "C", "3.5" not "35". An empty reply matches nothing.
    """
    own = _answer(reply)
    return bool(own) and own in {_answer(answer) for answer in answers}


def contains_match(reply: str, contains: Sequence[str], excludes: Sequence[str] = ()) -> bool:
    """Whether `reply` holds all of `contains` and none of `excludes`, as whole words or phrases, without case.

    A number is whole too: "3" is not in "3.5", "13" or "3,000". In scripts without spaces any place will do.
    Raises ValueError for an empty phrase, which every reply would hold.
    """
    text = folded(reply)
    return all(_holds(text, phrase) for phrase in contains) and not any(_holds(text, each) for each in excludes)


def _floats(values: Sequence[float]) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or np.isnan(array).any():
        raise ValueError("there must be values, and none of them NaN")
    return array


def _refuse_unpaired(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b):
        raise ValueError(f"pairs need two sequences of one length, not {len(a)} and {len(b)}")


def _average_ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return ranks


def _root(distance: Callable[[float], float], outer: float, inner: float) -> float:
    """Where `distance` changes sign between `outer` (positive) and `inner` (not positive), by bisection."""
    if distance(outer) <= 0:
        return outer
    # 60 halvings of 0..1 reach the last bit of a float.
    for _ in range(60):
        middle = (outer + inner) / 2
        outer, inner = (middle, inner) if distance(middle) > 0 else (outer, middle)
    return inner


def _resampled_means(sample: Floats, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // sample.size)
    means = [
        sample[rng.integers(sample.size, size=(min(rows, RESAMPLES - done), sample.size))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(means)


def _rouge_words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


_QUOTES = "\"'`*“”‘’«»„「」"
_ENDINGS = ".,;:!?。！？、"


def _answer(text: str) -> str:
    key = folded(text)
    while (shorter := key.rstrip(_ENDINGS + _QUOTES + " ").lstrip(_QUOTES + " ")) != key:
        key = shorter
    return key


_SPACED = rf"(?![{UNSPACED}])\w"


def _holds(text: str, phrase: str) -> bool:
    key = folded(phrase)
    if not key:
        raise ValueError("an empty phrase cannot be looked for")
    before = rf"(?<!{_SPACED})" if re.match(_SPACED, key[0]) else ""
    after = rf"(?!{_SPACED})" if re.match(_SPACED, key[-1]) else ""
    # A point or comma between two digits joins them into one number.
    before += r"(?<![0-9][.,])" if key[0].isdigit() else ""
    after += r"(?![.,][0-9])" if key[-1].isdigit() else ""
    return re.search(before + re.escape(key) + after, text) is not None
