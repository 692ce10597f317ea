"""Rows 4 and 4b of the benchmarks: their rows, their checks, and that all sides train the same."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def row_4() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("sft")


@pytest.fixture(scope="module")
def row_4b(row_4: ModuleType) -> ModuleType:
    return importlib.import_module("packing")


def test_made_up_rows_are_as_long_as_limas_and_the_same_every_time(row_4: ModuleType) -> None:
    pairs = row_4.pairs_of(None)
    assert len(pairs) == 1_030
    assert pairs == row_4.pairs_of(None)
    rows = row_4.rows_of(row_4.examples_of(pairs))
    lengths = sorted(len(row.input_ids) for row in rows)
    assert lengths[-1] == 2_048
    assert 430 < lengths[515] < 480
    assert 0.29 < sum(lengths) / len(lengths) / 2_048 < 0.33


def test_limas_texts_are_cut_to_the_lengths_they_have_in_a_usual_vocabulary(row_4: ModuleType, real_data: Path) -> None:
    rows = row_4.rows_of(row_4.examples_of(row_4.pairs_of(real_data / "lima" / "train.jsonl")))
    lengths = sorted(len(row.input_ids) for row in rows)
    assert len(lengths) == 1_030
    assert 0.29 < sum(lengths) / len(lengths) / 2_048 < 0.33
    for place, expected in zip((103, 515, 927), row_4.LIMA_TOKENS[2::8], strict=True):
        assert lengths[place] == pytest.approx(expected, rel=0.25, abs=20)


def test_a_file_may_hold_prompts_alone_beside_pairs(row_4: ModuleType, tmp_path: Path) -> None:
    turns = (["no reply"], ["a prompt of words", "a reply of words", "and more"])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"conversations": each}) + "\n" for each in turns))
    assert row_4.pairs_of(tmp_path / "a.jsonl") == [("a promp", "a reply")]


def test_all_sides_see_the_same_loss_and_gradient(row_4: ModuleType, tmp_path: Path) -> None:
    pairs = [(prompt, reply[:300]) for prompt, reply in row_4.pairs_of(None, 9)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    told = []
    for side, settings in (("ours", {"packing": True}), ("ours", {"group_by_length": True}), ("trl", {})):
        told.append(getattr(row_4, side)(str(tmp_path / "pairs.json"), str(tmp_path), json.dumps(settings))())
    assert set(told[0]) == {"loss", "norm"}
    assert told[0]["loss"] > 1
    assert row_4.check(told).holds
    fewer = row_4.ours(str(tmp_path / "pairs.json"), str(tmp_path), '{"packing": true, "max_length": 100}')()
    assert not row_4.check([*told, fewer]).holds


@pytest.mark.parametrize(
    ("losses", "norms", "arrival", "value", "passed"),
    [
        ((2.0, 2.00005), (1.0, 1.0005), 2.0, 4.0, True),
        ((2.0, 2.0002), (1.0, 1.0), 2.0, None, False),
        ((2.0, 2.0), (1.0, 1.002), 2.0, None, False),
        ((2.0, 2.0), (1.0, 1.0), 1.2, 4.0, False),
    ],
)
def test_the_row_is_void_where_sides_differ_and_fails_where_padding_in_arrival_order_is_nearly_as_fast(
    row_4: ModuleType,
    losses: tuple[float, float],
    norms: tuple[float, float],
    arrival: float,
    value: float | None,
    passed: bool,
) -> None:
    measure = importlib.import_module("measure")
    cpu_s = {"packed": 1.0, "TRL, in arrival order": arrival, "TRL, to the maximum": 4.0}
    spent = [{name: measure.Spent(seconds, seconds, 2**20, None) for name, seconds in cpu_s.items()}] * 3
    told = [{"loss": loss, "norm": norm} for loss, norm in zip(losses, norms, strict=True)]
    result, _ = row_4.result_of(spent, row_4.check(told), 10, 1_000)
    assert (result.value, result.passed, result.rounds) == (value, passed, 3)


def test_packs_are_nearly_full_and_keep_documents_apart(row_4: ModuleType, row_4b: ModuleType) -> None:
    result, _ = row_4b.measured(row_4.pairs_of(None, 25))
    assert result.passed
    assert "none lost" in result.check
    assert result.value > 0.85


def test_a_mask_of_ones_is_seen_to_leak(row_4: ModuleType, row_4b: ModuleType) -> None:
    rows = row_4.rows_of(row_4.examples_of(row_4.pairs_of(None, 6)))
    found = row_4b.leakage(row_4b.sequences(rows, row_4.MAX_LENGTH))
    assert found.alone < 1e-4 < 1e-2 < found.ones
    assert found.replaced == 0
