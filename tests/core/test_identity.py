"""Names that follow from content."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfalign.core.identity import canonical, digest, file_digest, seed_for, step_identity

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


@settings(deadline=None)
@given(st.dictionaries(st.text(), values, min_size=2))
def test_the_order_of_keys_changes_no_digest(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert canonical(turned) == canonical(value)
    assert canonical({"inner": [turned]}) == canonical({"inner": [value]})


@pytest.mark.parametrize(
    ("one", "other"),
    [([1, 2], [2, 1]), ("1", 1), (None, "null"), ({"a": None}, {}), (["ab"], ["a", "b"]), (True, 1), ("é", "e\u0301")],
)
def test_different_values_have_different_digests(one: object, other: object) -> None:
    assert digest(one) != digest(other)


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"a": {"b": math.nan}}])
def test_what_has_no_fixed_form_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(value)


def test_seeds_are_the_same_in_every_release_and_process() -> None:
    assert seed_for(0, "doc/0001", "augment.generate") == 7642905764481681503
    code = "from selfalign.core.identity import seed_for; print(seed_for(7, 'é/1', 's'))"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(told) == seed_for(7, "é/1", "s")


def test_seeds_spread_over_63_bits_and_differ_by_run_row_and_step() -> None:
    seeds = [seed_for(run, f"row/{n}", step) for run in (0, 1) for n in range(2000) for step in ("a", "b")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Every bit is set about half of the time: 8000 fair throws stray by 6 sigma (270) less than once in a billion.
    for bit in range(63):
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 4000) < 270


def test_ids_and_steps_that_join_to_the_same_text_have_different_seeds() -> None:
    assert seed_for(1, "1a", "b") != seed_for(1, "1", "ab")
    assert seed_for(1, "1a", "b") != seed_for(11, "a", "b")


def test_every_part_of_a_step_changes_its_identity() -> None:
    plain = ("rate", 1, {"x": 1}, 0, {"rows": "abc"})
    others = [
        ("rated", 1, {"x": 1}, 0, {"rows": "abc"}),
        ("rate", 2, {"x": 1}, 0, {"rows": "abc"}),
        ("rate", 1, {"x": 2}, 0, {"rows": "abc"}),
        ("rate", 1, {"x": 1}, 1, {"rows": "abc"}),
        ("rate", 1, {"x": 1}, None, {"rows": "abc"}),
        ("rate", 1, {"x": 1}, 0, {"rows": "abd"}),
        ("rate", 1, {"x": 1}, 0, {"model": "abc"}),
    ]
    found = [step_identity(*parts) for parts in (plain, *others)]
    assert len(set(found)) == len(found)
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in found)


def test_a_file_is_known_by_its_bytes_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
