"""The calibrated rater: what each signal is worth, by a logistic fit on pairs of known quality, and how good that is.

Good and bad pairs weigh the same in all, whatever their numbers: a probability of .5 is at even odds, and precision is
that of a half-and-half mixture.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDS = 5
# Of the standardised weights: keeps them finite where the signals tell all planted pairs apart.
RIDGE = 3.0
LIMIT = 3.0
"""Standard deviations."""
BINS = 8

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """p(good) = 1 / (1 + exp(-(intercept + Σ weight·z + square·z²))), with z = (s - mean) / scale, held within ±3, and
    s = sign(v)·log(1 + |v|) of a signal v.

    The square is there because a signal may be too high as well as too low: a response gains little from another one's
    instruction, and far too much from one that repeats it. The logarithm is for the long tails of likelihoods, and the
    limit keeps a square from calling good what lies beyond everything that was planted.
    """

    signals: tuple[str, ...]
    weights: tuple[float, ...]
    squares: tuple[float, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]
    intercept: float

    def probability(self, values: Mapping[str, float | None]) -> float | None:
        """That of a good pair, 0..1; None where a signal could not be measured. Rounded to 6 decimals."""
        found = [values.get(name) for name in self.signals]
        known = [value for value in found if value is not None]
        if len(known) < len(found):
            return None
        terms = _terms(np.array([known]), np.array(self.means), np.array(self.scales))[0]
        return round(float(_sigmoid(terms @ np.array([self.intercept, *self.weights, *self.squares]))), 6)

    def to_json(self) -> dict[str, Any]:
        """As calibration.json holds it."""
        return asdict(self)

    @staticmethod
    def of_json(document: Mapping[str, Any]) -> "Fit":
        """The reverse of `to_json`."""
        lists = {key: tuple(document[key]) for key in ("signals", "weights", "squares", "means", "scales")}
        return Fit(**lists, intercept=document["intercept"])


def fit(names: Sequence[str], values_NS: Floats, good_N: Sequence[bool]) -> Fit:
    """The logistic regression with a ridge penalty (Hosmer and Lemeshow, Applied Logistic Regression, 2nd ed., ch. 1).

    By Newton's method, from zero, to the last bits. Raises ValueError where all pairs are good, or all bad.
    """
    good = np.asarray(good_N, bool)
    if good.all() or not good.any():
        raise ValueError("a fit needs good pairs and bad ones")
    squashed_NS = _squashed(values_NS)
    means_S, scales_S = squashed_NS.mean(axis=0).round(6), squashed_NS.std(axis=0).round(6)
    # A signal that never varies says nothing, and must not divide by zero.
    scales_S = np.where(scales_S > 0, scales_S, 1.0)
    design_NC = _terms(values_NS, means_S, scales_S)
    weight_N = balanced(good)
    penalty_C = np.array([0.0, *([RIDGE] * 2 * len(names))])
    coefficients = np.zeros(design_NC.shape[1])

    def loss(coefficients: Floats) -> float:
        odds_N = design_NC @ coefficients
        return float(weight_N @ (np.logaddexp(0.0, odds_N) - good * odds_N) + penalty_C @ coefficients**2 / 2)

    for _ in range(100):
        p_N = _sigmoid(design_NC @ coefficients)
        gradient = design_NC.T @ (weight_N * (p_N - good)) + penalty_C * coefficients
        curvature = (design_NC * (weight_N * p_N * (1 - p_N))[:, None]).T @ design_NC + np.diag(penalty_C)
        # Saturated probabilities leave no curvature in the intercept.
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(curvature)), gradient)
        # Beside outliers a whole step may overshoot, and the next one back.
        while loss(coefficients - step) > loss(coefficients) and np.abs(step).max() >= 1e-10:
            step = step / 2
        coefficients = coefficients - step
        if np.abs(step).max() < 1e-10:
            break
    # Rounded, so that the last bits of a linear algebra library do not reach the artifact.
    intercept, *rest = (round(float(value), 6) for value in coefficients)
    weights, squares = tuple(rest[: len(names)]), tuple(rest[len(names) :])
    return Fit(tuple(names), weights, squares, tuple(means_S.tolist()), tuple(scales_S.tolist()), intercept)


def balanced(good_N: Sequence[bool] | NDArray[np.bool_]) -> Floats:
    """A weight a pair: good and bad ones sum to the same, all of them to their number."""
    good = np.asarray(good_N, bool)
    ones, zeros = max(int(good.sum()), 1), max(int((~good).sum()), 1)
    return np.where(good, 0.5 / ones, 0.5 / zeros).astype(np.float64) * good.size


def cross_validated(
    names: Sequence[str], values_NS: Floats, good_N: Sequence[bool], origins: Sequence[str], seed: int
) -> list[float | None]:
    """Each pair's probability under a fit that saw no pair of the same origin (5 folds, drawn by `seed`).

    None where the other folds hold only good or only bad pairs.
    """
    good = np.asarray(good_N, bool)
    found: list[float | None] = [None] * good.size
    for inside in _folds(origins, seed):
        outside = np.setdiff1d(np.arange(good.size), inside)
        if not good[outside].any() or good[outside].all():
            continue
        model = fit(names, values_NS[outside], good[outside].tolist())
        for n in inside.tolist():
            found[n] = model.probability(dict(zip(names, values_NS[n].tolist(), strict=True)))
    return found


def _folds(origins: Sequence[str], seed: int) -> Iterator[NDArray[np.int64]]:
    names = sorted(set(origins))
    random.Random(seed).shuffle(names)
    for fold in range(FOLDS):
        own = set(names[fold::FOLDS])
        yield np.array([n for n, origin in enumerate(origins) if origin in own], dtype=np.int64)


@dataclass(frozen=True)
class Threshold:
    """What is kept from `threshold` on: `precision` and `recall` at even odds; `kept`, the share of all."""

    threshold: float
    precision: float
    recall: float
    kept: float


def by_threshold(scores: Sequence[float], good_N: Sequence[bool]) -> list[Threshold]:
    """Precision and recall at every score as threshold, from the lowest on."""
    good, values = np.asarray(good_N, bool), np.asarray(scores, float)
    weight = balanced(good)
    found = []
    for threshold in np.unique(values).tolist():
        kept = values >= threshold
        right, all_ = weight[kept & good].sum(), weight[kept].sum()
        share = right / max(weight[good].sum(), 1e-12)
        found.append(Threshold(threshold, round(right / all_, 6), round(share, 4), round(all_ / good.size, 4)))
    return found


def reaching(curve: Sequence[Threshold], precision: float) -> float | None:
    """The lowest threshold that has this precision; None where none has."""
    return min((point.threshold for point in curve if point.precision >= precision), default=None)


@dataclass(frozen=True)
class Bin:
    """Pairs of like score: their number, mean score, and the share of good ones at even odds."""

    n: int
    score: float
    good: float


def reliability(scores: Sequence[float], good_N: Sequence[bool]) -> list[Bin]:
    """Bins of as many pairs each (equal-mass, as arXiv 1909.10155 advises), from the lowest score on."""
    good, values = np.asarray(good_N, bool), np.asarray(scores, float)
    weight = balanced(good)
    order = np.argsort(values, kind="stable")
    found = []
    for part in np.array_split(order, min(BINS, order.size)) if order.size else ():
        share = weight[part[good[part]]].sum() / weight[part].sum()
        found.append(Bin(part.size, round(float(values[part].mean()), 4), round(float(share), 4)))
    return found


def _terms(values_NS: Floats, means_S: Floats, scales_S: Floats) -> Floats:
    """[N, 1 + 2S]: one, the standardised signals, and their squares."""
    z_NS = np.clip((_squashed(values_NS) - means_S) / scales_S, -LIMIT, LIMIT)
    return np.hstack([np.ones((len(z_NS), 1)), z_NS, z_NS**2])


def _squashed(values: Floats) -> Floats:
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)), dtype=np.float64)


def _sigmoid(x: Any) -> Any:
    # Not 1 / (1 + exp(-x)): that overflows for what is far below zero.
    return np.exp(-np.logaddexp(0.0, -x))
