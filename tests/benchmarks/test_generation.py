"""Rows 3 and 3b of the benchmarks: their prompts, their check, and that all sides write the same."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from selfalign.demo.base import base_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def generation() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("generation")


@pytest.fixture(scope="module")
def job(generation: ModuleType) -> Any:
    return generation.job_of(base_folder(), 24, 40)


def test_prompts_are_broken_off_pages_of_many_lengths(generation: ModuleType, job: Any) -> None:
    assert job == generation.job_of(base_folder(), 24, 40)
    lengths = {len(prompt) for prompt in job.prompts}
    assert len(lengths) > 12
    assert all("Question:".startswith(prompt[:9]) for prompt in job.prompts)


def test_all_sides_write_the_same_replies_of_different_lengths(
    generation: ModuleType, job: Any, tmp_path: Path
) -> None:
    file = tmp_path / "job.json"
    job.write(file)
    assert generation.Job.read(str(file)) == job
    ours = generation.ours(str(file))()
    assert ours == generation.batched(str(file), "1")() == generation.batched(str(file), "16")()
    lengths = {tokens for _, tokens in ours}
    assert len(lengths) > 8
    assert max(lengths) <= 40


@pytest.mark.parametrize(
    ("theirs", "value", "check"),
    [
        ([("a", 1), ("b", 9)], 2.5, "0 differ"),
        ([("a", 1), ("b", 8)], None, "1 differ"),
        ([("x", 1), ("c", 9)], None, "2 differ"),
    ],
)
def test_a_row_is_void_where_a_reply_differs(
    generation: ModuleType, theirs: list[tuple[str, int]], value: float | None, check: str
) -> None:
    measure = importlib.import_module("measure")
    spent = [
        {
            "ours": measure.Spent(1.0, 1.0, 0, [["a", 1], ["b", 9]]),
            generation.ROWS["3"].peer: measure.Spent(2.5, 2.5, 0, [list(each) for each in theirs]),
        }
    ] * 3
    result, _ = generation.result_of("3", spent)
    assert (result.value, result.passed) == (value, value is not None)
    assert check in result.check
