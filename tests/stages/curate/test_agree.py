"""Agreement: two ways of rating, held against each other on the same pairs."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from selfalign.core.protocols import Reply, Request, Score
from selfalign.core.records import Rated, Signal
from selfalign.core.stage import Built, Context
from selfalign.engines.config import ModelConfig
from selfalign.evaluation.metrics import spearman, spearman_interval
from selfalign.stages.curate.agree import Agree
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.fit import Fit
from selfalign.stages.curate.rate import Rater
from stages.conftest import FakeEngine, Stored, place_in
from stages.curate.conftest import CALIBRATED, INSTRUCT, probable, rater, strict

Seen = Callable[..., Context]
WRITES = {"readout": "parsed", "reasoning_tokens": 8}


def rated(id: str, rating: float | None, **verdict: object) -> Rated:
    texts = {"source": "s", "prompt": f"Q {id}", "completion": "a", "model": "m", "prompt_hash": "h", "finish": "stop"}
    return Rated(id=id, **texts, parents=(id,), rating=rating, **verdict)


def stage(against: dict[str, Any] | None = None, sample: int = 100, cut: float = 4, **config: Any) -> Agree:
    agreement = {"against": against or WRITES, "sample": sample, "threshold": cut}
    made = CurateConfig(**config, agreement=agreement)
    assert made.agreement is not None
    return Agree(made, made.agreement, Rater(made.agreement.against, ModelConfig(path="x"), INSTRUCT))


Compared = tuple[Built, list[dict[str, Any]]]


@pytest.fixture
def compared(
    monkeypatch: pytest.MonkeyPatch,
    seen: Seen,
    stored: Stored,
    calibration: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Compared]:
    """The figures of the step, and both verdicts of every pair that was drawn."""

    def run(
        engine: FakeEngine,
        rows: Sequence[Rated],
        seed: int = 0,
        fit: Fit | None = None,
        reached: float | None = None,
        **config: Any,
    ) -> Compared:
        monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: engine)
        folder = tmp_path_factory.mktemp("draft")
        context = seen(seed, rows=stored(folder.name, rows, Rated), calibration=calibration(fit, reached))
        built = stage(**config).build(context, place_in(folder), lambda line: None)
        assert strict(folder / "metrics.json") == built.metrics
        assert built.ledger.kept == built.metrics["sample"]
        return built, strict(folder / "both.jsonl")

    return run


def writes(scores: dict[str, object]) -> FakeEngine:
    """A rater that writes these, by id; nothing for any other."""
    return FakeEngine(reply=lambda request: f"So.\nScore: {scores[request.id]}" if request.id in scores else "Hm.")


def test_confusion_and_rank_correlation_on_known_numbers(compared: Callable[..., Compared]) -> None:
    first = {"a": 5.0, "b": 4.5, "c": 4.0, "d": 3.0, "e": 1.0}
    second = {"a": 4, "b": 5, "c": 3, "d": 4, "e": 1}
    built, both = compared(writes(second), [rated(id, rating) for id, rating in first.items()])
    assert [(each["id"], each["first"], each["second"]) for each in both] == [
        (id, first[id], second[id]) for id in first
    ]
    assert built.metrics["confusion"] == {"both_keep": 2, "first_keeps": 1, "second_keeps": 1, "neither": 1}
    # Ranks 5 4 3 2 1 and 3.5 5 2 3.5 1: Σd² = 6.5, 1 − 6 · 6.5 / 120 = .675, and with its tie .6669.
    assert built.metrics["spearman"] == pytest.approx(0.6669, abs=1e-4)
    rho = spearman([*first.values()], [*second.values()])
    assert rho is not None
    interval = spearman_interval(rho, 5)
    assert built.metrics["spearman_ci"] == [round(interval.low, 4), round(interval.high, 4)]
    assert (built.metrics["sample"], built.metrics["both_rated"], built.metrics["unrated"]) == (5, 5, {})
    assert built.metrics["thresholds"] == {"first": 4.0, "second": 4.0}
    assert {each["reply"].splitlines()[0] for each in both} == {"So."}


def test_each_side_keeps_by_its_own_threshold(compared: Callable[..., Compared]) -> None:
    rows = [rated("a", 3.0), rated("b", 2.0)]
    built, _ = compared(writes({"a": 3, "b": 3}), rows, threshold=2.5, cut=3)
    assert built.metrics["confusion"] == {"both_keep": 1, "first_keeps": 0, "second_keeps": 1, "neither": 0}


def test_what_is_unrated_is_kept_by_nobody_and_told_by_side_and_reason(compared: Callable[..., Compared]) -> None:
    rows = [
        rated("a", 5.0),
        rated("b", 5.0),
        rated("c", None, unrated="too_long"),
        rated("d", 5.0, off_scale=0.9),
        rated("e", None, unrated="off_scale"),
    ]
    built, both = compared(writes({"a": 5, "c": 5, "d": 2}), rows)
    assert built.metrics["unrated"] == {
        "first_too_long": 1,
        "first_off_scale": 2,
        "second_unparsed": 2,
    }
    assert built.metrics["confusion"] == {"both_keep": 1, "first_keeps": 1, "second_keeps": 1, "neither": 2}
    assert built.metrics["both_rated"] == 1
    # One pair has no order.
    assert (built.metrics["spearman"], built.metrics["spearman_ci"]) == (None, None)
    assert [each["second"] for each in both] == [5.0, None, 5.0, 2.0, None]


def test_the_second_rating_counts_up_to_its_own_mass_off_the_scale(compared: Callable[..., Compared]) -> None:
    half = FakeEngine(scores=probable(0, 0, 0, 0, 0.5))
    for allowed, kept in ((0.4, 0), (0.6, 1)):
        built, _ = compared(half, [rated("a", 5.0)], against={"max_off_scale": allowed})
        assert built.metrics["confusion"]["both_keep"] == kept


def test_a_second_rater_that_likes_all_alike_orders_nothing(compared: Callable[..., Compared]) -> None:
    built, _ = compared(writes(dict.fromkeys("abcde", 4)), [rated(id, n / 2 + 1) for n, id in enumerate("abcde")])
    assert (built.metrics["spearman"], built.metrics["spearman_ci"]) == (None, None)


def test_a_calibrated_rater_is_compared_by_its_probability(compared: Callable[..., Compared]) -> None:
    fit = Fit(("stop_token",), weights=(1.0,), squares=(0.0,), means=(0.0,), scales=(1.0,), intercept=0.0)
    values = {"a": 5.0, "b": 0.5, "c": -0.5, "d": None}
    rows = [rated(id, 3.0, signals=(Signal(name="stop_token", value=value),)) for id, value in values.items()]
    built, both = compared(writes({"a": 5, "b": 3, "c": 4, "d": 5}), rows, fit=fit, **CALIBRATED)
    assert [each["first"] for each in both] == [fit.probability({"stop_token": value}) for value in values.values()]
    assert built.metrics["confusion"] == {"both_keep": 1, "first_keeps": 1, "second_keeps": 2, "neither": 0}
    assert built.metrics["unrated"] == {"first_unmeasured": 1}
    built, _ = compared(writes({}), rows, fit=fit, reached=0.8, **CALIBRATED, target_precision=0.9)
    assert built.metrics["thresholds"] == {"first": 0.8, "second": 4.0}
    assert built.metrics["confusion"]["first_keeps"] == 1


def test_a_sample_is_drawn_by_the_seed_and_only_it_is_rated_again(compared: Callable[..., Compared]) -> None:
    rows = [rated(f"{n:02d}", 4.0) for n in range(30)]
    drawn = []
    for seed in (0, 0, 1):
        engine = writes({})
        built, both = compared(engine, rows, seed, sample=10)
        assert built.metrics["sample"] == len(both) == 10
        assert [request.id for request in engine.generated[0][0]] == [each["id"] for each in both]
        drawn.append([each["id"] for each in both])
    assert drawn[0] == drawn[1] != drawn[2]
    built, _ = compared(writes({}), rows[:3], sample=10)
    assert built.metrics["sample"] == 3


def test_nothing_to_compare_is_no_failure(compared: Callable[..., Compared]) -> None:
    built, both = compared(writes({}), [])
    assert both == []
    assert (built.metrics["sample"], built.metrics["spearman"]) == (0, None)


def test_the_second_rating_is_asked_by_its_own_settings(compared: Callable[..., Compared]) -> None:
    def reply(request: Request) -> Reply:
        return Reply("Fine.", 1, "stop")

    def scores(request: Request, options: Sequence[str]) -> list[Score]:
        assert request.messages[-1]["content"] == "Fine.\nScore:"
        return probable(0, 0, 0, 0, 1)(request, options)

    engine = FakeEngine(reply=reply, scores=scores)
    _, both = compared(engine, [rated("a", 1.0)], against={"reasoning_tokens": 8})
    assert engine.order == ["generate", "score"]
    assert both[0]["second"] == 5.0


def test_identity_counts_both_sides_and_the_sample() -> None:
    usual = stage().settings()
    assert stage(sample=50).settings() != usual
    assert stage(cut=3).settings() != usual
    assert stage(threshold=3).settings() != usual
    assert stage(against={"reasoning_tokens": 9}).settings() != usual
    assert stage(against={**WRITES, "max_off_scale": 0.1}).settings() != usual
    assert stage(min_auc=0.9).settings() == usual
    assert stage().model == rater().model
