"""Which rated pairs are kept."""

from collections.abc import Callable
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.errors import GateError
from selfalign.core.ledger import Ledger
from selfalign.core.records import Candidate, Dropped, Rated, rejected
from selfalign.core.stage import Context
from selfalign.core.store import Manifest
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.select import KeepAll, Select
from stages.conftest import Stored

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


@given(st.floats(1, 5), st.floats(0, 1), st.sampled_from([None, "too_long", "unparsed", "off_scale"]))
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
    stage.check(manifest(1, below_threshold=80, not_best=9, too_long=5, unparsed=3, off_scale=2))
    for reason in ("too_long", "unparsed", "off_scale"):
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
