"""The rater as all steps take it, and the step that rates candidates."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from selfalign.core.protocols import Request, Score
from selfalign.core.records import Candidate, Outcome, Rated
from selfalign.core.stage import Context, External
from selfalign.core.tables import read_kept, to_parquet
from selfalign.engines.config import ModelConfig
from selfalign.stages.curate.config import WEIGHED, CurateConfig
from selfalign.stages.curate.rate import Rate, Rater, signals_of
from selfalign.stages.curate.signals import SIGNALS
from stages.conftest import FakeEngine
from stages.curate.conftest import CALIBRATED, GRADES, INSTRUCT, answer, knows, probable, rater

Seen = Callable[..., Context]
ROW = Candidate(
    id="d/0",
    source="s",
    license="CC0",
    prompt="Q1",
    completion=answer(1),
    parents=("d",),
    model="m",
    prompt_hash="h",
    finish="stop",
)


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> Callable[..., list[Outcome]]:
    """The rows as the step makes them of candidates."""

    def run(engine: FakeEngine, rows: Sequence[Candidate], **config: object) -> list[Outcome]:
        monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: engine)
        found: Iterable[Outcome] = Rate(rater(**config)).open(seen()).run(rows)
        return list(found)

    return run


def test_a_candidate_keeps_all_its_columns_and_gains_the_verdict(rated: Callable[..., list[Outcome]]) -> None:
    (row,) = rated(FakeEngine(scores=probable(0, 0, 0, 1, 0)), [ROW])
    assert isinstance(row, Rated)
    kept = (row.id, row.source, row.license, row.prompt, row.completion, row.parents, row.model)
    assert kept == ("d/0", "s", "CC0", "Q1", answer(1), ("d",), "m")
    assert (row.rating, row.off_scale, row.unrated, row.probability) == (4.0, 0.0, None, None)
    assert signals_of(row) == {"rubric": 4.0}


def test_a_calibrated_rater_writes_every_signal_it_weighs_and_leaves_the_verdict_to_the_fit(
    rated: Callable[..., list[Outcome]],
) -> None:
    (row,) = rated(knows(), [ROW], **CALIBRATED)
    assert isinstance(row, Rated)
    assert set(signals_of(row)) == set(WEIGHED)
    assert None not in signals_of(row).values()
    assert (row.rating, row.probability) == (5.0, None)


def test_signals_stand_in_one_order_whatever_order_the_recipe_names_them_in(
    rated: Callable[..., list[Outcome]],
) -> None:
    orders = [[*SIGNALS], [*reversed(SIGNALS)], [*SIGNALS, "rubric"]]
    one, *others = (rated(knows(), [ROW], **CALIBRATED, signals=order) for order in orders)
    assert others == [one, one]


def test_without_the_rubric_among_its_signals_nobody_is_asked_for_a_grade(
    rated: Callable[..., list[Outcome]],
) -> None:
    engine = knows()
    (row,) = rated(engine, [ROW], **CALIBRATED, signals=["stop_token"])
    assert isinstance(row, Rated)
    assert (row.rating, row.unrated, signals_of(row)) == (None, None, {"stop_token": -0.1})
    assert all(GRADES not in options for _, options, _ in engine.scored)


def test_candidates_are_rated_in_order_each_by_its_own(rated: Callable[..., list[Outcome]]) -> None:
    rows = [replace(ROW, id=f"d/{n}", prompt=f"Q{n % 2}") for n in range(6)]
    found = rated(knows(), rows, **CALIBRATED)
    assert [row.id for row in found] == [row.id for row in rows]
    assert [row.rating for row in found if isinstance(row, Rated)] == [1.0, 5.0] * 3


def test_a_response_is_read_once_for_all_its_candidates_which_share_a_batch(
    rated: Callable[..., list[Outcome]],
) -> None:
    rows = [
        replace(ROW, id=f"{document}/{n}", prompt=f"Q{n}", completion=answer(document))
        for document in (1, 2, 3)
        for n in range(8)
    ]
    engine = knows()
    rated(engine, rows, **CALIBRATED)
    alone = [
        request for requests, _, _ in engine.scored for request in requests if request.messages[0]["content"] == ""
    ]
    assert len(alone) == 3
    # As long as their response, whatever they ask.
    stage = Rate(rater(**CALIBRATED))
    assert {stage.size(row) for row in rows[:8]} == {len(answer(1))}


def test_signals_that_could_not_be_measured_are_null_in_the_table(
    rated: Callable[..., list[Outcome]], tmp_path: Path
) -> None:
    known = knows().scores

    def scores(request: Request, options: Sequence[str]) -> list[Score] | None:
        return None if list(options) == GRADES else known(request, options)

    found = rated(FakeEngine(scores=scores), [ROW], **CALIBRATED)
    (tmp_path / "shard").write_bytes(to_parquet(found, Rated))
    (row,) = read_kept(tmp_path / "shard", Rated)
    assert [row] == found
    assert (row.unrated, row.entropy, signals_of(row)["rubric"]) == ("too_long", None, None)
    assert signals_of(row)["stop_token"] == -0.1


def test_tokens_are_those_since_the_rater_was_opened(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    engine = knows()
    engine.tokens = 1000
    monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: engine)
    process = Rate(rater()).open(seen())
    assert process.tokens() == 0
    list(process.run([ROW, ROW]))
    assert process.tokens() == 2


def test_the_adapter_of_the_round_rates(monkeypatch: pytest.MonkeyPatch, seen: Seen, tmp_path: Path) -> None:
    engine = knows()
    monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: engine)
    context = seen(adapter=External(str(tmp_path), "digest"))
    list(Rate(rater(**CALIBRATED)).open(context).run([ROW]))
    assert {adapter for _, _, adapter in engine.scored} == {tmp_path}


def test_identity_counts_which_signals_there_are_and_by_which_words_they_are_asked() -> None:
    settings = rater(**CALIBRATED).settings()
    assert settings != rater().settings()
    assert settings != rater(**CALIBRATED, signals=["rubric", "stop_token"]).settings()
    assert settings != Rater(CurateConfig(**CALIBRATED), ModelConfig(path="x"), "Other words: {response}").settings()
    # Not in which order or how often they are named, nor what is kept of what they tell.
    assert settings == rater(**CALIBRATED, signals=[*reversed(WEIGHED), "rubric"]).settings()
    assert settings == rater(rater={"kind": "calibrated"}, threshold=0.9, min_pairs=3, target_precision=0.8).settings()


def test_a_rubrics_rater_does_not_depend_on_signals_that_it_does_not_weigh() -> None:
    assert rater().settings() == rater(signals=["stop_token"]).settings()
    assert rater().settings() == Rater(CurateConfig(), ModelConfig(path="x"), "Other words: {response}").settings()


def test_a_prompt_that_changes_while_the_run_goes_on_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "rate.txt"
    file.write_text("Grade {instruction} and {response}")
    made = rater(prompt_file=str(file))
    before = made.settings()
    file.write_text("{instruction} or {response}")
    assert made.settings() == before
    assert made.prompt.messages("i", "r")[0]["content"] == "Grade i and r"


def test_its_model_is_known_before_it_runs() -> None:
    assert Rate(Rater(CurateConfig(), ModelConfig(path="here"), INSTRUCT)).model.path == "here"
