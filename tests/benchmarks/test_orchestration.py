"""Rows 7 and 8 of the benchmarks: that their sides do the same work, and what becomes of it."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from selfalign.core.errors import UsageError
from selfalign.engines.open import release

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BURN = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"


@pytest.fixture(scope="module")
def orchestration() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("orchestration")
    release()


@pytest.fixture(scope="module")
def measure(orchestration: ModuleType) -> ModuleType:
    return importlib.import_module("measure")


# Row 7


def test_a_stage_writes_the_same_in_a_loop_and_through_the_runner(orchestration: ModuleType, tmp_path: Path) -> None:
    orchestration.prepare(tmp_path, documents=530)
    bare, through = (
        orchestration.Side(**side())
        for side in (orchestration.bare(str(tmp_path)), orchestration.through(str(tmp_path), "local"))
    )
    assert bare.content == through.content
    # Two shards, of four batches and of one.
    assert [len(side.batches) for side in (bare, through)] == [5, 5]
    assert len(bare.marks) == len(through.marks) == 2
    for side in (bare, through):
        assert 0 < sum(side.batches) <= side.cpu_s
        assert side.marks[0] < side.marks[1] <= side.cpu_s


def side(content: str = "same", shard: float = 1.0, rest: float = 0.0, start: float = 0.0) -> dict[str, object]:
    """Three shards of two batches, each with `rest` beside them, after a start."""
    marks = [start + n * (shard + rest) for n in (1, 2, 3)]
    return {"cpu_s": marks[-1], "marks": marks, "batches": [shard / 2] * 6, "content": content}


def measured(measure: ModuleType, **sides: dict[str, object]) -> list[dict[str, Any]]:
    return [{name: measure.Spent(9.0, 9.0, 0, output) for name, output in sides.items()}] * 5


def test_orchestrations_share_is_what_is_not_the_stages_own(orchestration: ModuleType, measure: ModuleType) -> None:
    local, ray = side(shard=1.9, rest=0.1, start=0.3), side(shard=1.5, rest=0.5, start=7.0)
    rounds = measured(measure, bare=side(shard=2.0), local=local, ray=ray)
    result, details = orchestration.result_of_7(rounds)
    assert (result.row, result.better, result.rounds, result.passed) == ("7", "lower", 5, True)
    assert result.value == pytest.approx(100 * 0.6 / 6.3)
    assert "on Ray 25.0 %" in result.check
    assert not result.is_met
    assert details.row_count == 3


@pytest.mark.parametrize("other", [{"content": "another"}, {"shard": 0.5}])
def test_row_7_is_void_where_outputs_differ_or_shards_are_too_small(
    orchestration: ModuleType, measure: ModuleType, other: dict[str, Any]
) -> None:
    result, _ = orchestration.result_of_7(measured(measure, bare=side(), local=side(**other), ray=side()))
    assert (result.value, result.passed) == (None, False)


def test_what_children_took_is_counted_after_their_end_too(orchestration: ModuleType) -> None:
    spending = importlib.import_module("spending").Spending()
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        assert spending.look() > 0.4
        child.stdin.write(b"\n")
    assert spending.look() > 0.4


# Row 8


class FakeStep:
    """As much of a step as a chain of them needs."""

    def __init__(self, **settings: Any) -> None:
        self.__dict__.update(settings)
        CHAIN.append(self)

    def __rshift__(self, other: "FakeStep") -> None:
        assert CHAIN.index(other) == CHAIN.index(self) + 1


class FakePipeline:
    """Runs a chain of steps."""

    def __init__(self, name: str, cache_dir: Path) -> None:
        CHAIN.clear()

    def __enter__(self) -> "FakePipeline":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, use_cache: bool) -> dict[str, Any]:
        assert not use_cache
        rows: Sequence[dict[str, str]] = CHAIN[0].data
        for step in CHAIN[1:]:
            rows = [row for batch in step.process([dict(row) for row in rows]) for row in batch]
        return {"default": {"train": {"text": [row["text"] for row in rows]}}}


CHAIN: list[Any] = []


def test_both_sides_of_row_8_send_the_same_rows_through_as_many_steps(
    orchestration: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = SimpleNamespace(LoadDataFromDicts=FakeStep, Step=FakeStep, StepInput=list)
    monkeypatch.setitem(sys.modules, "distilabel.pipeline", SimpleNamespace(Pipeline=FakePipeline))
    monkeypatch.setitem(sys.modules, "distilabel.steps", steps)
    written = []
    for name in ("ours", "distilabel"):
        (tmp_path / name).mkdir()
        importlib.import_module(f"trivial_{name}").main(3, tmp_path / name)
        written.append(json.loads((tmp_path / name / "texts.json").read_text()))
    assert written[0] == written[1]
    assert len(written[0]) == 16
    assert written[0][7] == "row 7, 0, 1, 2"


def test_a_whole_process_is_measured_with_its_children(orchestration: ModuleType) -> None:
    texts = orchestration.process(sys.executable, "trivial_ours.py", "1")()
    assert texts[:2] == ["row 0, 0", "row 1, 0"]


@pytest.mark.parametrize(("theirs", "value"), [("text", 3.0), ("another", None)])
def test_row_8_compares_whole_processes_and_is_void_where_texts_differ(
    orchestration: ModuleType, measure: ModuleType, theirs: str, value: float | None
) -> None:
    took = {"selfalign, 1": 0.5, "selfalign, 5": 0.54, "distilabel, 1": 1.5, "distilabel, 5": 1.9}
    spent = {
        name: measure.Spent(cpu_s, cpu_s, 0, ["text" if name.startswith("selfalign") else theirs])
        for name, cpu_s in took.items()
    }
    result, details = orchestration.result_of_8([spent] * 3)
    assert (result.value, result.passed) == (value, value is not None)
    assert "0.010 against 0.100 CPU-s" in result.check
    assert details.row_count == 2


def test_without_distilabels_environment_row_8_says_how_to_make_it(
    orchestration: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(orchestration, "DISTILABEL", tmp_path / "python")
    with pytest.raises(UsageError, match="make bench-peers"):
        orchestration.row_8()
