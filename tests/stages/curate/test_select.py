"""Which rated pairs are kept."""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.errors import GateError
from selfalign.core.ledger import Ledger
from selfalign.core.records import Candidate, Dropped, Rated, Signal, rejected
from selfalign.core.stage import Context
from selfalign.core.store import Manifest
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.fit import Fit
from selfalign.stages.curate.select import KeepAll, Select
from stages.conftest import Stored
from stages.curate.conftest import CALIBRATED

Seen = Callable[..., Context]


def candidate(document: int, n: int = 0) -> Candidate:
    return Candidate(
        id=f"d{document:03d}/{n}",
        source="s",
        prompt="q",
        completion="a",
        parents=(f"d{document:03d}",),
        model="m",
        prompt_hash="h",
        finish="stop",
    )


def rated(document: int, rating: float | None, n: int = 0, **verdict: object) -> Rated:
    row = candidate(document, n)
    return Rated(**{f.name: getattr(row, f.name) for f in fields(row)}, rating=rating, **verdict)


def fates(rows: list[Rated], context: Context | None = None, **config: object) -> dict[str, str | None]:
    stage = Select(config=CurateConfig(**config))
    found = list(stage.run(rows, context or Context("s", 0, {})))
    assert [row.id for row in found] == [row.id for row in rows]
    return {row.id: row.reason if isinstance(row, Dropped) else None for row in found}


@pytest.mark.parametrize(
    ("threshold", "kept"), [(4.0, {4.0, 4.0001, 5.0}), (4.5, {5.0}), (1, {1.0, 3.9999, 4.0, 4.0001, 5.0}), (5, {5.0})]
)
def test_the_threshold_itself_is_good_enough(threshold: float, kept: set[float]) -> None:
    ratings = [1.0, 3.9999, 4.0, 4.0001, 5.0]
    found = fates([rated(n, rating) for n, rating in enumerate(ratings)], threshold=threshold)
    assert {rating for rating, reason in zip(ratings, found.values(), strict=True) if reason is None} == kept
    assert set(found.values()) <= {None, "below_threshold"}


@given(st.floats(1, 5), st.floats(0, 1), st.sampled_from([None, "too_long", "unparsed", "off_scale", "unmeasured"]))
def test_an_unrated_pair_is_never_kept(threshold: float, allowed: float, unrated: str | None) -> None:
    found = fates([rated(0, None, unrated=unrated)], threshold=threshold, max_off_scale=allowed)
    assert found == {"d000/0": unrated or "unparsed"}


def test_a_rating_with_too_much_mass_off_the_scale_is_none() -> None:
    rows = [rated(0, 5.0, off_scale=0.51), rated(1, 5.0, off_scale=0.5), rated(2, 5.0, off_scale=None)]
    assert list(fates(rows, max_off_scale=0.5).values()) == ["off_scale", None, None]
    assert list(fates(rows, max_off_scale=1).values()) == [None] * 3


def test_of_a_documents_candidates_the_best_is_kept_and_of_equals_the_first() -> None:
    rows = [
        rated(0, 4.0, 0),
        rated(0, 4.5, 1),
        rated(0, 4.5, 2),
        rated(0, 2.0, 3),
        rated(1, 4.0),
        rated(0, 5.0, 4, off_scale=0.9),
    ]
    assert fates(rows) == {
        "d000/0": "not_best",
        "d000/1": None,
        "d000/2": "not_best",
        "d000/3": "below_threshold",
        "d001/0": None,
        "d000/4": "off_scale",
    }


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([None, 1.0, 3.0, 4.0, 5.0])), max_size=20))
def test_a_document_is_kept_once_if_any_candidate_is_good_enough(verdicts: list[tuple[int, float | None]]) -> None:
    rows = [rated(document, rating, n) for n, (document, rating) in enumerate(verdicts)]
    found = fates(rows, threshold=4)
    kept = [row.parents for row in rows if found[row.id] is None]
    assert sorted(kept) == sorted({row.parents for row in rows if (row.rating or 0) >= 4})


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 3.5, 4.0, 5.0]), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_a_quantile_keeps_the_documents_whose_best_pair_is_among_the_best(
    ratings: list[float], quantile: float
) -> None:
    rows = [rated(n, rating) for n, rating in enumerate(ratings)]
    found = fates(rows, threshold=1, quantile=quantile)
    kept = [row.rating for row in rows if found[row.id] is None]
    below = [row.rating for row in rows if found[row.id] == "below_quantile"]
    assert len(kept) + len(below) == len(rows)
    # At most that share is passed over, and of equals all or none.
    assert len(below) <= quantile * len(rows)
    assert all(low < high for low in below for high in kept)
    assert len(below) + ratings.count(min(kept)) > quantile * len(rows)


def test_a_quantile_counts_documents_not_candidates_and_stands_beside_the_threshold() -> None:
    rows = [rated(n, float(n + 1)) for n in range(4)] + [rated(3, 1.0, n) for n in range(1, 9)]
    found = fates(rows, threshold=2, quantile=0.5)
    assert [found[f"d{n:03d}/0"] for n in range(4)] == ["below_threshold", "below_quantile", None, None]
    # It alone decides where the threshold lets all pass.
    assert [*fates(rows, threshold=1, quantile=0.25).values()][:4] == ["below_quantile", None, None, None]


def test_no_source_has_more_than_its_share_and_its_best_stay() -> None:
    sources = {0: ("web", 4.0), 1: ("web", 5.0), 2: ("web", 4.5), 3: ("books", 4.1), 4: ("web", 1.0), 5: ("web", 4.5)}
    rows = [replace(rated(n, rating), source=source) for n, (source, rating) in sources.items()]
    assert [*fates(rows, max_per_source=2).values()] == [
        "source_full",
        None,
        None,
        None,
        "below_threshold",
        # As good as another, and after it.
        "source_full",
    ]


SENTENCE = "We walked along the river for a whole day and saw no more than three boats on the water"


def texts(*changed: int, last: int = 0) -> str:
    """The sentence with some words changed: a near-duplicate for a few."""
    return " ".join(f"{word}{last}" if n in changed else word for n, word in enumerate(SENTENCE.split()))


def test_of_near_duplicates_the_best_stay() -> None:
    completions = {
        0: texts(17),
        1: texts(17, last=1),
        2: "Something else was written on the other page, all of it.",
        3: texts(),
    }
    ratings = {0: 4.0, 1: 5.0, 2: 4.0, 3: 4.5}
    rows = [replace(rated(n, rating), completion=completions[n]) for n, rating in ratings.items()]
    assert [*fates(rows, max_per_cluster=1).values()] == ["cluster_full", None, None, "cluster_full"]
    assert [*fates(rows, max_per_cluster=2).values()] == ["cluster_full", None, None, None]
    assert set(fates(rows, max_per_cluster=1, cluster_similarity=1).values()) == {None}


def test_what_is_not_kept_takes_no_room_in_source_or_cluster() -> None:
    rows = [
        replace(rated(0, 5.0, off_scale=0.9), completion=texts()),
        replace(rated(1, 2.0), completion=texts()),
        replace(rated(2, 4.0), completion=texts()),
    ]
    assert [*fates(rows, max_per_source=1, max_per_cluster=1).values()] == ["off_scale", "below_threshold", None]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 6),
            st.sampled_from([None, 1.0, 3.0, 4.0, 4.5, 5.0]),
            st.sampled_from(["a", "b"]),
            st.sampled_from([texts(), texts(17), "Something else was written on the other page, all of it."]),
        ),
        max_size=20,
    ),
    st.none() | st.floats(0.1, 0.9),
    st.none() | st.integers(1, 3),
    st.none() | st.integers(1, 3),
)
def test_whatever_is_asked_of_pairs_all_is_kept_to(
    pairs: list[tuple[int, float | None, str, str]], quantile: float | None, source: int | None, cluster: int | None
) -> None:
    rows = [
        replace(rated(document, rating, n), source=name, completion=text)
        for n, (document, rating, name, text) in enumerate(pairs)
    ]
    asked = {"quantile": quantile, "max_per_source": source, "max_per_cluster": cluster}
    found = fates(rows, threshold=4, **asked)
    kept = [row for row in rows if found[row.id] is None]
    assert all(row.rating is not None and row.rating >= 4 for row in kept)
    assert max(Counter(row.parents for row in kept).values(), default=0) <= 1
    assert max(Counter(row.source for row in kept).values(), default=0) <= (source or len(rows))
    assert max(Counter(row.completion[:20] for row in kept).values(), default=0) <= (cluster or len(rows))
    if quantile is None and any((row.rating or 0) >= 4 for row in rows):
        assert kept
    assert fates(rows, threshold=4, **asked) == found


FIT = Fit(("stop_token",), weights=(1.0,), squares=(0.0,), means=(0.0,), scales=(1.0,), intercept=0.0)
# 1 / (1 + exp(-log(1 + v))) = (1 + v) / (2 + v)
VALUES = {0: 3.0, 1: 0.0, 2: -3.0, 3: None}


def measured(document: int, value: float | None, n: int = 0) -> Rated:
    return rated(document, 5.0, n, off_scale=0.9, signals=(Signal(name="stop_token", value=value),))


Kept = Callable[..., dict[str, tuple[str | None, float | None]]]


@pytest.fixture
def judged(seen: Seen, calibration: Callable[..., Any]) -> Kept:
    """Each row's reason and probability as the step writes them, under a calibration."""

    def run(rows: list[Rated], fit: Fit | None = FIT, reached: float | None = None, **config: Any) -> Any:
        stage = Select(config=CurateConfig(**config))
        outcomes = stage.run(rows, seen(calibration=calibration(fit, reached)))
        both = [(each.reason, each.row) if isinstance(each, Dropped) else (None, each) for each in outcomes]
        assert [row.id for _, row in both if isinstance(row, Rated)] == [row.id for row in rows]
        return {row.id: (reason, row.probability) for reason, row in both if isinstance(row, Rated)}

    return run


def test_a_calibrated_rater_keeps_by_the_probability_that_it_writes(judged: Kept) -> None:
    rows = [measured(n, value) for n, value in VALUES.items()]
    # Neither the rating nor its mass off the scale decides.
    assert judged(rows, **CALIBRATED) == {
        "d000/0": (None, 0.8),
        "d001/0": (None, 0.5),
        "d002/0": ("below_threshold", 0.2),
        "d003/0": ("unmeasured", None),
    }
    assert judged(rows, **{**CALIBRATED, "threshold": 0.81})["d000/0"] == ("below_threshold", 0.8)


def test_a_calibrated_rater_chooses_among_candidates_by_probability(judged: Kept) -> None:
    rows = [measured(0, 1.0, 0), measured(0, 3.0, 1), measured(0, None, 2), measured(0, -3.0, 3)]
    found = judged(rows, **CALIBRATED)
    assert [reason for reason, _ in found.values()] == ["not_best", None, "unmeasured", "below_threshold"]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_calibrated_rater_without_a_fit_keeps_nothing(judged: Kept, threshold: float) -> None:
    # Its ratings, from 1 to 5, would all be above a probability.
    found = judged([measured(0, 1.0)], fit=None, **{**CALIBRATED, "threshold": threshold})
    assert found == {"d000/0": ("unmeasured", None)}


def test_the_threshold_of_a_target_precision_is_the_calibrations(judged: Kept) -> None:
    rows = [measured(n, value) for n, value in VALUES.items()]
    found = judged(rows, reached=0.6, **CALIBRATED, target_precision=0.9)
    assert [reason for reason, _ in found.values()] == [None, "below_threshold", "below_threshold", "unmeasured"]
    ratings = [rated(0, 4.0), rated(1, 3.0)]
    by_rating = judged(ratings, fit=None, reached=2.5, target_precision=0.9)
    assert by_rating == {"d000/0": (None, None), "d001/0": (None, None)}


def test_a_rubric_without_a_target_needs_no_calibration_and_writes_no_probability() -> None:
    stage = Select(config=CurateConfig())
    assert not stage.needs_calibration
    assert Select(config=CurateConfig(target_precision=0.5)).needs_calibration
    (row,) = stage.run([rated(0, 4.0)], Context("s", 0, {}))
    assert isinstance(row, Rated)
    assert row.probability is None


def test_as_many_are_kept_as_another_arm_keeps_drawn_from_the_good_ones(seen: Seen, stored: Stored) -> None:
    other = stored("other", [rated(n, 5.0) for n in range(3)], Rated)
    rows = [rated(n, 5.0 if n % 2 else 2.0) for n in range(40)]
    drawn = []
    for seed in range(5):
        found = fates(rows, seen(seed, match=other))
        assert list(found.values()).count("match_size") == 17
        assert list(found.values()).count("below_threshold") == 20
        drawn.append(frozenset(id for id, reason in found.items() if reason is None))
        assert len(drawn[-1]) == 3
    assert len(set(drawn)) > 1


def test_where_there_are_fewer_than_the_other_arm_keeps_all_stay(seen: Seen, stored: Stored) -> None:
    other = stored("other", [rated(n, 5.0) for n in range(9)], Rated)
    assert set(fates([rated(n, 5.0) for n in range(4)], seen(match=other)).values()) == {None}


def test_without_curation_the_first_candidate_of_every_document_stays(seen: Seen, stored: Stored) -> None:
    rows = [candidate(document, n) for document in range(6) for n in range(2)]
    found = list(KeepAll().run(rows[1:], seen()))
    kept = {row.id for row in found if not isinstance(row, Dropped)}
    assert kept == {"d000/1", *(f"d{n:03d}/0" for n in range(1, 6))}
    assert {row.reason for row in found if isinstance(row, Dropped)} == {"not_first"}
    other = stored("other", [rated(0, 5.0), rejected("x", "below_threshold")], Rated)
    matched = list(KeepAll().run(rows, seen(match=other)))
    assert sum(not isinstance(row, Dropped) for row in matched) == 1
    assert len(matched) == len(rows)


def manifest(kept: int, **dropped: int) -> Manifest:
    ledger = Ledger(in_=kept + sum(dropped.values()), kept=kept)
    ledger.rejected.update(dropped)
    return Manifest("s", "i", "c", {}, {}, ledger.to_json())


def test_the_gate_counts_every_way_of_having_no_rating() -> None:
    stage = Select(config=CurateConfig(min_rated=0.9))
    stage.check(manifest(1, below_threshold=80, not_best=9, too_long=5, unparsed=2, off_scale=2, unmeasured=1))
    for reason in ("too_long", "unparsed", "off_scale", "unmeasured"):
        with pytest.raises(GateError, match=rf"89\.0% of the pairs .*curate\.min_rated wants 90% .*11 {reason}"):
            stage.check(manifest(9, below_threshold=80, **{reason: 11}))


def test_where_nothing_was_rated_another_threshold_is_no_advice() -> None:
    stage = Select(config=CurateConfig(min_rated=0))
    with pytest.raises(GateError, match=r"no pair has a rating: .*curate\.readout=expected"):
        stage.check(manifest(0, unparsed=7))


def test_the_gate_wants_something_kept_and_names_the_threshold() -> None:
    stage = Select(config=CurateConfig())
    with pytest.raises(GateError, match=r"kept none of 7 pairs \(7 below_threshold\); lower curate\.threshold"):
        stage.check(manifest(0, below_threshold=7))
    with pytest.raises(GateError):
        stage.check(manifest(0))
    with pytest.raises(GateError, match="no pair is left after augmentation"):
        KeepAll().check(manifest(0))
    KeepAll().check(manifest(1))
