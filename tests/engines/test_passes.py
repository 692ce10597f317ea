"""Which forward passes are planned, by token ids alone."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.engines.chat import common_prefix
from selfalign.engines.passes import SHORTEST_PREFIX, groups, readings

PASS = 32
tokens = st.lists(st.integers(0, 2), max_size=5)


def test_options_of_one_token_are_read_from_one_pass_that_holds_none_of_them() -> None:
    (reading,) = readings(3, [7, 8], [[1], [2], [1]])
    assert (reading.request, reading.tokens) == (3, [7, 8])
    assert sorted(reading.tails) == [(0, [1]), (1, [2]), (2, [1])]
    assert reading.positions(0) == [1]


def test_a_text_and_the_same_with_its_end_are_read_from_one_pass() -> None:
    (reading,) = readings(0, [7], [[1, 2, 3], [1, 2, 3, 9]])
    assert reading.tokens == [7, 1, 2, 3]
    assert reading.positions(0) == [0, 1, 2, 3]


def test_an_end_that_changes_the_texts_last_token_has_a_pass_of_its_own_where_it_needs_one() -> None:
    assert len(readings(0, [7], [[1, 2, 3], [1, 2, 4, 9]])) == 1
    assert len(readings(0, [7], [[1, 2, 3], [1, 4, 9]])) == 2


def test_no_tail_needs_no_pass() -> None:
    assert readings(0, [7], []) == readings(0, [7], [[], []]) == []


@given(st.lists(tokens, max_size=8))
def test_every_tail_is_read_once_from_a_pass_that_holds_what_stands_before_its_last_token(
    tails: list[list[int]],
) -> None:
    found = readings(0, [9, 9], tails)
    read = [way for reading in found for way, _ in reading.tails]
    assert sorted(read) == [way for way, tail in enumerate(tails) if tail]
    for reading in found:
        for way, tail in reading.tails:
            assert tail == tails[way]
            assert reading.tokens[: 1 + len(tail)] == [9, 9, *tail[:-1]]
    # None is part of another.
    assert not any(a is not b and b.tokens[: len(a.tokens)] == a.tokens for a in found for b in found)


def spent(rows: list[list[int]], alone: list[int], alike: list[tuple[int, list[int]]]) -> int:
    """What a plan costs, in tokens."""
    dear = sum(len(rows[row]) for row in alone)
    return dear + sum(PASS + shared + sum(len(rows[row]) - shared for row in members) for shared, members in alike)


def test_the_candidates_of_a_document_share_it_and_a_lone_row_stays_alone() -> None:
    rng = random.Random(1)
    documents = [[rng.randrange(100) for _ in range(200)] for _ in range(3)]
    rows = [[*documents[at % 2], 200 + at] for at in range(6)] + [documents[2]]
    alone, alike = groups(rows, PASS)
    assert alone == [6]
    assert sorted((shared, sorted(members)) for shared, members in alike) == [(200, [0, 2, 4]), (200, [1, 3, 5])]


def test_documents_that_begin_alike_are_shared_by_their_own_candidates_only() -> None:
    head = list(range(40))
    rows = [[*head, *[100 + at // 3] * 300, at] for at in range(9)]
    _, alike = groups(rows, PASS)
    assert sorted(shared for shared, _ in alike) == [340, 340, 340]


def test_what_saves_less_than_a_pass_costs_is_not_shared() -> None:
    rows = [[*range(100), at] for at in range(3)]
    assert groups(rows, 199)[1]
    assert groups(rows, 200) == ([2, 1, 0], [])
    assert not groups([[*range(SHORTEST_PREFIX - 1), at] for at in range(50)], 0)[1]


def test_no_rows_need_no_plan() -> None:
    assert groups([], PASS) == ([], [])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 90)), max_size=9), st.randoms(use_true_random=False))
def test_every_row_is_in_one_place_and_no_plan_of_one_group_a_beginning_is_cheaper(
    shape: list[tuple[int, int]], rng: random.Random
) -> None:
    rows = [[kind] * length + [9] for kind, length in shape]
    alone, alike = groups(rows, PASS)
    assert sorted([*alone, *(row for _, members in alike for row in members)]) == list(range(len(rows)))
    for shared, members in alike:
        assert len(members) > 1
        assert SHORTEST_PREFIX <= shared <= common_prefix([rows[row] for row in members])
    cost = spent(rows, alone, alike)
    assert cost <= spent(rows, list(range(len(rows))), [])
    for kind in range(4):
        for least in range(SHORTEST_PREFIX, 91):
            members = [row for row, (own, length) in enumerate(shape) if own == kind and length >= least]
            if len(members) > 1:
                others = [row for row in range(len(rows)) if row not in members]
                assert cost <= spent(rows, others, [(least, members)])


@pytest.mark.parametrize("seed", range(3))
def test_the_plan_is_the_same_in_any_order_of_the_rows(seed: int) -> None:
    rng = random.Random(seed)
    rows = [[rng.randrange(2)] * rng.randrange(30, 60) + [at] for at in range(30)]
    turned = rows[::-1]

    def plan(rows: list[list[int]]) -> list[tuple[int, list[list[int]]]]:
        return sorted((shared, sorted(rows[row] for row in members)) for shared, members in groups(rows, PASS)[1])

    assert plan(rows) == plan(turned)
