"""Sets of hashes."""

from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.keys import Keys, key_of

SIGNED_64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.sampled_from([0, 2**10, 2**11, -(2**63), 2**63 - 1, -1, 5]) | SIGNED_64))
def test_a_key_is_new_once(keys: list[int]) -> None:
    found, known = Keys(), set[int]()
    for each in keys:
        assert found.add(each) == (each not in known)
        known.add(each)


def test_a_set_that_has_grown_many_times_still_knows_all() -> None:
    found = Keys()
    texts = [f"d{n}" for n in range(10_000)]
    assert all(found.add(key_of(text)) for text in texts)
    assert not any(found.add(key_of(text)) for text in texts)


def test_a_key_counts_where_one_text_ends() -> None:
    assert len({key_of("a", "b"), key_of("ab"), key_of("a"), key_of("b", "a"), key_of()}) == 5
    # The same in every process.
    assert key_of("a", "b") == 320862978261066923
