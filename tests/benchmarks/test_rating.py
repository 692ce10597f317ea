"""Rows 2, 2b and 2c of the benchmarks: their pairs, their checks, and that all sides rate the same."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from selfalign.core.errors import UsageError
from selfalign.demo.base import base_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def rating() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("rating")


@pytest.fixture(scope="module")
def measure(rating: ModuleType) -> ModuleType:
    return importlib.import_module("measure")


@pytest.fixture(scope="module")
def job(rating: ModuleType) -> Any:
    return rating.job_of(base_folder(), 5, 210, 60, new=30)


@pytest.fixture
def file(job: Any, tmp_path: Path) -> str:
    job.write(tmp_path / "job.json")
    return str(tmp_path / "job.json")


def test_pairs_share_as_many_tokens_as_the_row_says_and_add_about_as_many(rating: ModuleType, job: Any) -> None:
    shared, own = rating.tokens_of(job)
    assert shared == 210
    assert 45 <= own <= 80
    assert len({response for _, _, response in job.pairs}) == 5
    assert job == rating.job_of(base_folder(), 5, 210, 60, new=30)


def test_the_job_in_its_file_is_the_job_and_tells_a_stranger_the_conversations(
    rating: ModuleType, job: Any, file: str
) -> None:
    assert rating.Job.read(file) == job
    told = json.loads(Path(file).read_text())
    assert told["conversations"] == job.conversations
    assert told["new"] == 30


def test_ratings_and_logits_are_the_same_with_the_cache_and_without(rating: ModuleType, job: Any, file: str) -> None:
    ours, uncached = rating.ours(file)(), rating.uncached(file)()
    assert ours == pytest.approx(uncached, abs=1e-4)
    assert len(set(ours)) > 1
    assert rating.logits_differ(job) < 1e-4


def test_a_cache_that_changes_what_is_rated_is_noticed(
    rating: ModuleType, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = rating._reader
    monkeypatch.setattr(rating, "_reader", lambda job: lambda messages: [log + 2e-4 for log in read(job)(messages)])
    assert rating.logits_differ(job) == pytest.approx(2e-4, rel=0.2)


def test_a_peer_whose_model_names_no_stop_token_writes_to_the_limit(
    rating: ModuleType, job: Any, file: str, tmp_path: Path
) -> None:
    endless = rating.without_stop(base_folder(), tmp_path / "model")
    ending, unending = (rating.batched(file, str(folder), "2")() for folder in (base_folder(), endless))
    assert len(ending) == len(unending) == 5
    assert all(long.startswith(short) for short, long in zip(ending, unending, strict=True))
    assert sum(map(len, unending)) > sum(map(len, ending))


def test_distilabel_is_asked_for_greedy_replies_to_the_same_conversations(
    rating: ModuleType, job: Any, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class TransformersLLM:
        def __init__(self, **settings: Any) -> None:
            assert settings == {"model": "folder", "torch_dtype": "float32", "device": "cpu"}

        def load(self) -> None:
            pass

        def generate(self, **how: Any) -> list[dict[str, Any]]:
            asked.append(how)
            return [{"generations": [messages[-1]["content"][:9]]} for messages in how["inputs"]]

    monkeypatch.setitem(sys.modules, "distilabel.models.llms", SimpleNamespace(TransformersLLM=TransformersLLM))
    replies = importlib.import_module("distilabel_side").rates(file, "folder")()
    assert replies == ["You judge"] * 5
    assert [len(how["inputs"]) for how in asked] == [2, 5]
    assert asked[1]["inputs"] == job.conversations
    assert (asked[1]["max_new_tokens"], asked[1]["do_sample"], asked[1]["repetition_penalty"]) == (30, False, 1.0)


def test_a_side_may_run_in_another_environment(measure: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("import os\ndef side(word):\n    return lambda: word + os.environ['PLACE']\n")
    foreign = tmp_path / "python"
    foreign.write_text(f'#!/bin/sh\nPLACE=there PYTHONPATH={tmp_path} exec "{sys.executable}" "$@"\n')
    foreign.chmod(0o755)
    (spent,) = measure.by_turns({"theirs": ("theirs:side", "over ")}, 1, {"theirs": str(foreign)})
    assert spent["theirs"].output == "over there"


def test_without_distilabels_environment_row_2_says_how_to_make_it(
    rating: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rating, "DISTILABEL", tmp_path / "python")
    with pytest.raises(UsageError, match="make bench-peers"):
        rating.measured("2", base_folder(), 2, 1)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("Asked, told.\nScore: 4 Score: 1", 4), ("Score:5", 5), ("Score: 7", None), ("four", None)],
)
def test_a_peer_reads_the_first_score_of_a_reply(rating: ModuleType, reply: str, grade: int | None) -> None:
    assert rating.grade_in(reply) == grade


def test_agreement_counts_only_replies_with_a_score(rating: ModuleType) -> None:
    told = rating.agreement([1.2, 4.8, 3.0, None], ["Score: 1", "Score: 5", "well", "Score: 2"])
    assert told == "2 of 4 replies hold a score, 2 of them within 1 of our rating, Spearman 1.00"
    assert rating.agreement([1.0], ["none"]) == "0 of 1 replies hold a score"


def test_a_missing_rating_or_one_that_is_no_number_differs_infinitely(rating: ModuleType, measure: ModuleType) -> None:
    for other in (None, math.nan):
        spent = {
            name: measure.Spent(1.0, 1.0, 0, ratings)
            for name, ratings in (("ours", [other, 2.0]), ("uncached", [1.0, 2.0]))
        }
        assert rating.ratings_differ([spent]) == math.inf


@pytest.mark.parametrize(
    ("difference", "value", "passed"), [(1e-5, 12.0, True), (2e-4, None, False), (math.inf, None, False)]
)
def test_a_row_is_void_where_the_cache_changes_logits(
    rating: ModuleType, measure: ModuleType, job: Any, difference: float, value: float | None, passed: bool
) -> None:
    sides = {"ours": (1.0, [3.0] * 5), "distilabel, 120 new": (12.0, ["Score: 3"] * 5)}
    spent = [{name: measure.Spent(cpu, cpu, 0, output) for name, (cpu, output) in sides.items()}] * 3
    result, details = rating.result_of("2", job, spent, measure.Spent(4.0, 4.0, 0, ["Score: 3"] * 5), difference)
    assert (result.value, result.passed, result.rounds) == (value, passed, 3)
    assert "210 tokens shared" in result.check
    assert details.row_count == 3
