"""What a rater's readings come to."""

import pytest

from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.fit import Fit
from selfalign.stages.curate.verdict import UNRATED, verdict, why_unrated

FIT = Fit(
    ("rubric", "stop_token"), weights=(1.0, 1.0), squares=(0.0, 0.0), means=(0.0, 0.0), scales=(1.0, 1.0), intercept=0.0
)
MEASURED = {"rubric": 0.0, "stop_token": 0.0}


@pytest.mark.parametrize(
    ("rating", "unrated", "off_scale", "reason"),
    [
        (3.0, None, 0.5, None),
        (3.0, None, 0.5001, "off_scale"),
        (3.0, None, None, None),
        (None, "too_long", None, "too_long"),
        (None, None, None, "unparsed"),
    ],
)
def test_a_rating_counts_up_to_the_allowed_mass_off_the_scale(
    rating: float | None, unrated: str | None, off_scale: float | None, reason: str | None
) -> None:
    assert why_unrated(rating, unrated, off_scale, max_off_scale=0.5) == reason
    found = verdict(rating, unrated, off_scale, {}, CurateConfig(max_off_scale=0.5), None)
    assert found == ((None, reason) if reason else (rating, None))


def test_with_a_fit_the_verdict_is_the_probability_and_the_rating_alone_decides_nothing() -> None:
    for rating, off_scale in ((1.0, 0.0), (5.0, 0.99), (None, None)):
        assert verdict(rating, None, off_scale, MEASURED, CurateConfig(), FIT) == (0.5, None)


@pytest.mark.parametrize(("unrated", "reason"), [("too_long", "too_long"), (None, "unmeasured")])
def test_a_pair_that_lacks_a_signal_has_no_verdict_and_says_why(unrated: str | None, reason: str) -> None:
    signals = {**MEASURED, "stop_token": None}
    assert verdict(4.0, unrated, 0.0, signals, CurateConfig(), FIT) == (None, reason)
    assert reason in UNRATED


def test_a_calibrated_rater_that_could_not_be_fitted_keeps_nothing_by_its_rating() -> None:
    config = CurateConfig(rater={"kind": "calibrated"}, threshold=0.5)
    assert verdict(5.0, None, 0.0, MEASURED, config, None) == (None, "unmeasured")
    assert verdict(None, "too_long", None, {}, config, None) == (None, "too_long")
