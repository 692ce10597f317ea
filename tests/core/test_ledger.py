"""in = kept + rejected + quarantined."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.errors import InternalError
from selfalign.core.ledger import Ledger, total

units = st.tuples(
    st.sampled_from(["kept", "rejected", "quarantined"]), st.sampled_from([None, "a", "b"]), st.integers(1, 9)
)


def counted(entries: list[tuple[str, str | None, int]]) -> Ledger:
    ledger = Ledger(in_=sum(n for _, _, n in entries))
    for outcome, reason, n in entries:
        ledger.count(outcome, reason, n)
    return ledger


@given(st.lists(units))
def test_all_units_counted_balance_and_one_more_or_less_does_not(entries: list[tuple[str, str | None, int]]) -> None:
    ledger = counted(entries)
    assert ledger.check("here") is ledger
    for wrong in (ledger.in_ - 1, ledger.in_ + 1):
        ledger.in_ = wrong
        with pytest.raises(InternalError, match=f"somewhere: the ledger does not balance: {wrong} units in") as caught:
            ledger.check("somewhere")
        assert caught.value.exit_code == 70


@given(st.lists(st.lists(units)))
def test_the_total_of_shards_is_the_ledger_of_all_their_units(shards: list[list[tuple[str, str | None, int]]]) -> None:
    ledgers = [counted(entries) for entries in shards]
    before = [ledger.to_json() for ledger in ledgers]
    assert total(ledgers).to_json() == counted([entry for entries in shards for entry in entries]).to_json()
    assert [ledger.to_json() for ledger in ledgers] == before


def test_reasons_are_listed_in_one_order_and_a_missing_one_is_unknown() -> None:
    ledger = counted(
        [("rejected", "b", 1), ("rejected", "a", 2), ("quarantined", None, 3), ("kept", None, 3), ("kept", "so", 1)]
    )
    assert list(ledger.to_json()["rejected"].items()) == [("a", 2), ("b", 1)]
    assert ledger.to_json() | {"in": 10} == {
        "sources": 0,
        "in": 10,
        "kept": 4,
        "rejected": {"a": 2, "b": 1},
        "quarantined": {"unknown": 3},
        "noted": {"so": 1},
    }
