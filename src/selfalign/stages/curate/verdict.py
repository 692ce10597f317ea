"""What a rater's readings come to: one number a pair, or the reason why it has none."""

from collections.abc import Mapping
from typing import Any

from selfalign.stages.curate.fit import Fit
from selfalign.stages.curate.rubric import RatingConfig

UNRATED = ("too_long", "unparsed", "off_scale", "unmeasured")
"""Reasons why a pair has no verdict."""


def why_unrated(rating: float | None, unrated: str | None, off_scale: float | None, max_off_scale: float) -> str | None:
    """The reason why a rubric's rating does not count, or None where it does."""
    if rating is None:
        return unrated or "unparsed"
    return "off_scale" if off_scale is not None and off_scale > max_off_scale else None


def verdict(
    rating: float | None,
    unrated: str | None,
    off_scale: float | None,
    signals: Mapping[str, float | None],
    config: RatingConfig,
    fit: Fit | None,
) -> tuple[float | None, str | None]:
    """The rating, or with a `fit` the probability of a good pair; and where there is none, the reason.

    A calibrated rater weighs the mass off the scale as it weighs the rest, so that alone makes no pair unrated. One
    that could not be fitted has no verdicts: a rating is no probability.
    """
    if fit is None and config.rater.kind == "calibrated":
        return None, unrated or "unmeasured"
    if fit is None:
        reason = why_unrated(rating, unrated, off_scale, config.max_off_scale)
        return (None, reason) if reason else (rating, None)
    probability = fit.probability(signals)
    return (None, unrated or "unmeasured") if probability is None else (probability, None)


def verdict_of(read: Mapping[str, Any], config: RatingConfig, fit: Fit | None) -> tuple[float | None, str | None]:
    """The same of a pair's rating columns, as `rate.OpenRater` gives them."""
    signals = {signal["name"]: signal["value"] for signal in read["signals"]}
    return verdict(read.get("rating"), read.get("unrated"), read.get("off_scale"), signals, config, fit)
