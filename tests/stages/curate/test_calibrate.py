"""The rater's own test: what is measured and fitted on planted pairs, and the gates."""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfalign.core.errors import GateError
from selfalign.core.ledger import Ledger
from selfalign.core.protocols import Request, Score
from selfalign.core.records import Noted, Planted
from selfalign.core.stage import Built, Context
from selfalign.core.store import Manifest
from selfalign.stages.curate.calibrate import Calibrate, Calibration
from selfalign.stages.curate.config import WEIGHED, CurateConfig, Plant
from selfalign.stages.curate.fit import cross_validated
from selfalign.stages.curate.plant import plant
from stages.conftest import FakeEngine, Stored, place_in
from stages.curate.conftest import CALIBRATED, GRADES, knows, rater, seed_pairs, strict

Seen = Callable[..., Context]


def planted(count: int, *kinds: Plant) -> list[Planted]:
    """Held-out pairs as they are, and spoilt: swapped and truncated where nothing else is named."""
    outcomes = plant(seed_pairs(count), kinds or ("swapped", "truncated"), random.Random(0))
    rows = [each.row if isinstance(each, Noted) else each for each in outcomes]
    return [row for row in rows if isinstance(row, Planted)]


Calibrated = tuple[Built, list[dict[str, Any]], Calibration]


@pytest.fixture
def calibrated(
    monkeypatch: pytest.MonkeyPatch, seen: Seen, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Calibrated]:
    """What the stage builds: its figures, the planted pairs with their verdicts, and what selection takes from it."""

    def run(engine: FakeEngine, rows: Sequence[Planted], seed: int = 0, **config: object) -> Calibrated:
        monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: engine)
        folder = tmp_path_factory.mktemp("draft")
        stage = Calibrate(CurateConfig(**config), rater(**config))
        context = seen(seed, rows=stored(folder.name, rows, Planted))
        built = stage.build(context, place_in(folder), lambda line: None)
        assert strict(folder / "metrics.json") == json.loads(json.dumps(built.metrics))
        assert set(built.content) == {"planted.jsonl", "metrics.json", "calibration.json"}
        strict(folder / "calibration.json")
        assert built.ledger.in_ == len(rows)
        return built, strict(folder / "planted.jsonl"), Calibration.of(folder)

    return run


def gate(built: Built, **config: object) -> None:
    manifest = Manifest("s", "i", "c", {}, {}, {}, metrics=json.loads(json.dumps(built.metrics)))
    Calibrate(CurateConfig(**config), rater(**config)).check(manifest)


def test_a_rater_that_knows_good_from_spoilt_gets_the_full_area(calibrated: Callable[..., Calibrated]) -> None:
    built, rows, found = calibrated(knows(), planted(6))
    assert built.metrics["auc"] == 1.0
    assert built.metrics["auc_by_kind"] == {"swapped": 1.0, "truncated": 1.0}
    low, high = built.metrics["auc_ci"]
    assert 0.5 < low < high == 1.0
    assert built.metrics["rated"] == 1.0
    assert built.metrics["pairs"] == {"seed": 6, "swapped": 6, "truncated": 6}
    assert {(row["kind"], row["rating"]) for row in rows} == {("seed", 5.0), ("swapped", 1.0), ("truncated", 1.0)}
    assert [row["verdict"] for row in rows] == [row["rating"] for row in rows]
    assert found == Calibration()
    gate(built, min_auc=1.0, min_rated=1.0)


def test_a_rubrics_areas_are_those_of_its_rating_alone(calibrated: Callable[..., Calibrated]) -> None:
    built, _, _ = calibrated(knows(), planted(6, "swapped", "echo"))
    areas = built.metrics["planted_auc"]
    assert areas.keys() == {"rubric"}
    assert areas["rubric"]["all"] == built.metrics["auc"]
    assert areas["rubric"]["ci"]["all"] == built.metrics["auc_ci"]
    assert areas["rubric"]["by_kind"] == built.metrics["auc_by_kind"]
    # Of swapped and truncated together; there are only swapped ones.
    assert areas["rubric"]["swapped_truncated"] == areas["rubric"]["by_kind"]["swapped"]
    assert built.metrics["weights"] is None


def test_a_calibrated_rater_is_fitted_and_its_area_stands_beside_every_signals(
    calibrated: Callable[..., Calibrated],
) -> None:
    built, rows, found = calibrated(knows(), planted(24), **CALIBRATED)
    areas = built.metrics["planted_auc"]
    assert areas.keys() == {"calibrated", *WEIGHED}
    for each in areas.values():
        assert each.keys() == {"all", "by_kind", "swapped_truncated", "ci"}
        assert each["by_kind"].keys() == each["ci"]["by_kind"].keys() == {"swapped", "truncated"}
        for area, (low, high) in (
            (each["all"], each["ci"]["all"]),
            (each["swapped_truncated"], each["ci"]["swapped_truncated"]),
        ):
            assert 0 <= low <= area <= high <= 1
    assert areas["calibrated"]["all"] == built.metrics["auc"] == 1.0
    # A swapped response is whole, so that the end of the turn tells truncated ones alone.
    assert areas["stop_token"]["by_kind"] == {"swapped": 0.5, "truncated": 1.0}
    assert found.fit is not None
    assert built.metrics["weights"] == dict(zip(found.fit.signals, found.fit.weights, strict=True))
    assert built.metrics["squares"] == dict(zip(found.fit.signals, found.fit.squares, strict=True))
    assert built.metrics["weights"].keys() == {*WEIGHED}
    assert all(row["signals"].keys() == {*WEIGHED} for row in rows)
    gate(built, **CALIBRATED)


def test_a_calibrated_verdict_is_that_of_the_folds_which_did_not_see_the_pair(
    calibrated: Callable[..., Calibrated],
) -> None:
    _, rows, found = calibrated(knows(), planted(24), **CALIBRATED)
    assert found.fit is not None
    seen = [found.fit.probability(row["signals"]) for row in rows]
    own = [row["verdict"] for row in rows]
    assert own != seen
    assert own == pytest.approx(seen, abs=0.1)
    assert all((p > 0.5) == row["good"] for p, row in zip(own, rows, strict=True))


def test_signals_that_guess_are_fitted_and_measured_as_guessing(calibrated: Callable[..., Calibrated]) -> None:
    chance = random.Random(0)
    engine = FakeEngine(scores=lambda request, options: [Score(-10 * chance.random(), 3) for _ in options])
    built, _, _ = calibrated(engine, planted(40), **CALIBRATED)
    # A fit flatters itself; what is told of it is from pairs that it did not see.
    assert abs(built.metrics["auc"] - 0.5) < 0.15
    with pytest.raises(GateError, match=r"AUC of 0\.\d\d, and curate\.min_auc wants 0\.65"):
        gate(built, **CALIBRATED)


def fickle() -> FakeEngine:
    """A rater that says anything, and the same of the same."""

    def scores(request: Request, options: Sequence[str]) -> list[Score]:
        asked = request.id + request.messages[0]["content"]
        return [Score(-9 * random.Random(asked + option).random(), 3) for option in options]

    return FakeEngine(scores=scores)


def test_pairs_of_one_origin_are_never_split_between_fitting_and_testing(
    calibrated: Callable[..., Calibrated], seen: Seen
) -> None:
    pairs = planted(10)
    _, rows, _ = calibrated(fickle(), pairs, **CALIBRATED)
    names = sorted(WEIGHED)
    values_NS = np.array([[row["signals"][name] for name in names] for row in rows])
    origins = {pair.id: pair.origin for pair in pairs}
    own = [origins[row["id"]] for row in rows]
    found = cross_validated(names, values_NS, [row["good"] for row in rows], own, seen(0).seed_for("folds"))
    assert [row["verdict"] for row in rows] == found


def test_calibration_is_the_same_again_and_the_seed_draws_its_folds(calibrated: Callable[..., Calibrated]) -> None:
    verdicts = []
    for seed in (0, 0, 1):
        _, rows, _ = calibrated(fickle(), planted(10), seed, **CALIBRATED)
        verdicts.append([row["verdict"] for row in rows])
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] != verdicts[2]


def test_a_rater_that_likes_everything_alike_is_at_chance_and_stopped_with_the_kinds(
    calibrated: Callable[..., Calibrated],
) -> None:
    built, _, _ = calibrated(knows(4, 4), planted(6))
    assert built.metrics["auc"] == 0.5
    gate(built, min_auc=0.5)
    told = r"AUC of 0\.50, and curate\.min_auc wants 0\.65 \(\.5 is chance; by kind: 0\.5 swapped, 0\.5 truncated\)"
    with pytest.raises(GateError, match=told) as caught:
        gate(built)
    assert caught.value.exit_code == 3


def test_people_who_call_pairs_bad_are_a_kind_of_their_own(calibrated: Callable[..., Calibrated]) -> None:
    rows = planted(6, "swapped")
    label = Planted(
        id="label/x", source="labels", prompt="Q1", completion="bad", kind="labelled", good=False, origin="x"
    )
    built, _, _ = calibrated(knows(), [*rows, label])
    assert built.metrics["auc_by_kind"] == {"labelled": 1.0, "swapped": 1.0}


def test_pairs_without_a_usable_rating_are_counted_by_reason(calibrated: Callable[..., Calibrated]) -> None:
    rated = knows()

    def scores(request: Request, options: Sequence[str]) -> list[Score] | None:
        match request.id.split("/")[1:]:
            case ["00"]:
                return None
            case ["01"] | ["02"]:
                return [Score(math.log(0.02), 1) for _ in options]
        return rated.scores(request, options)

    built, rows, _ = calibrated(FakeEngine(scores=scores), planted(4))
    assert built.metrics["unrated"] == {"too_long": 1, "off_scale": 2}
    assert built.metrics["rated"] == 0.75
    assert (built.ledger.kept, built.ledger.rejected) == (9, {"too_long": 1, "off_scale": 2})
    # An unrated pair weighs in nowhere: the one seed pair that is left wins.
    assert built.metrics["auc"] == 1.0
    assert sum(row["unrated"] is None for row in rows) == 9
    assert all((row["verdict"] is None) == (row["unrated"] is not None) for row in rows)
    gate(built, min_rated=0.75)
    told = r"usable rating to 75% of the planted pairs, and curate\.min_rated wants 95% \(2 off_scale, 1 too_long\)"
    with pytest.raises(GateError, match=told):
        gate(built)


def test_a_pair_that_lacks_one_signal_is_left_out_of_the_fit_and_counted(
    calibrated: Callable[..., Calibrated],
) -> None:
    known = knows().scores

    def scores(request: Request, options: Sequence[str]) -> list[Score] | None:
        # Too long for one of the questions alone; another pair for the rubric.
        if request.id == "held_out/00" and options[0].startswith("Q"):
            return None
        return None if request.id == "held_out/01" and list(options) == GRADES else known(request, options)

    built, rows, found = calibrated(FakeEngine(scores=scores), planted(12), **CALIBRATED)
    assert built.metrics["unrated"] == {"unmeasured": 1, "too_long": 1}
    assert [row["id"] for row in rows if row["verdict"] is None] == ["held_out/00", "held_out/01"]
    assert built.metrics["auc"] == 1.0
    assert found.fit is not None


def test_a_rater_whose_replies_cannot_be_read_is_stopped(calibrated: Callable[..., Calibrated]) -> None:
    engine = FakeEngine(reply=lambda request: "Quite good.")
    built, rows, _ = calibrated(engine, planted(3), readout="parsed", reasoning_tokens=8)
    assert built.metrics["unrated"] == {"unparsed": 9}
    assert built.metrics["auc"] is None
    assert all(row["rating"] is None for row in rows)
    with pytest.raises(GateError, match=r"0% of the planted pairs.*9 unparsed"):
        gate(built)


@pytest.mark.parametrize("kind", [{}, CALIBRATED])
def test_with_nothing_held_out_there_is_no_test_and_the_gate_says_what_to_do(
    calibrated: Callable[..., Calibrated], kind: dict[str, Any]
) -> None:
    built, rows, _ = calibrated(knows(), [], **kind)
    assert rows == []
    assert built.metrics["planted"] == 0
    for config in ({}, {"min_rated": 0}, {"min_auc": 0}):
        with pytest.raises(GateError, match=r"hold some out \(prepare\.seed\.held_out\)"):
            gate(built, **kind, **config)
    gate(built, **kind, min_rated=0, min_auc=0)


@pytest.mark.parametrize("kind", [{}, CALIBRATED])
def test_good_pairs_alone_cannot_be_compared(calibrated: Callable[..., Calibrated], kind: dict[str, Any]) -> None:
    good = [row for row in planted(1) if row.good]
    built, rows, found = calibrated(knows(5, 5), good, **kind)
    assert [each["kind"] for each in rows] == ["seed"]
    assert built.metrics["auc"] is None
    assert found == Calibration()
    with pytest.raises(GateError, match="no planted pairs could be compared; hold out seed pairs"):
        gate(built, **kind, min_rated=0)
    gate(built, **kind, min_auc=0, min_rated=0)


def test_an_area_that_went_missing_fails_the_gate() -> None:
    empty = Built((), Ledger(), {"planted": 3, "rated": 1.0})
    with pytest.raises(GateError, match="no planted pairs could be compared"):
        gate(empty)


def test_a_threshold_is_found_for_the_precision_that_is_wanted(calibrated: Callable[..., Calibrated]) -> None:
    built, rows, found = calibrated(knows(), planted(24), **CALIBRATED, target_precision=0.99)
    good, bad = ([row["verdict"] for row in rows if row["good"] is each] for each in (True, False))
    assert found.threshold is not None
    assert max(bad) < found.threshold <= min(good)
    assert built.metrics["threshold"] == found.threshold
    lowest = built.metrics["thresholds"][0]
    # All are kept: as many good ones as bad ones, at even odds.
    assert (lowest["precision"], lowest["recall"], lowest["kept"]) == (0.5, 1.0, 1.0)
    gate(built, **CALIBRATED, target_precision=0.99)


def test_a_rubric_can_be_held_to_a_precision_too(calibrated: Callable[..., Calibrated]) -> None:
    _, _, found = calibrated(knows(), planted(6), target_precision=0.9)
    assert found == Calibration(None, 5.0)


@pytest.mark.parametrize("gates", [{"min_auc": 0.5}, {"min_auc": 0}])
def test_a_precision_that_no_threshold_has_stops_the_run(
    calibrated: Callable[..., Calibrated], gates: dict[str, float]
) -> None:
    built, _, found = calibrated(knows(4, 4), planted(6), target_precision=0.8)
    assert found.threshold is None
    with pytest.raises(GateError, match=r"at no threshold are 80% .*curate\.target_precision.*lower it") as caught:
        gate(built, target_precision=0.8, **gates)
    assert caught.value.exit_code == 3


def test_without_a_verdict_a_wanted_precision_is_not_taken_for_reached(calibrated: Callable[..., Calibrated]) -> None:
    built, _, _ = calibrated(knows(), planted(3)[:1], target_precision=0.8)
    with pytest.raises(GateError, match=r"curate\.target_precision"):
        gate(built, target_precision=0.8, min_auc=0)


def test_reliability_covers_every_pair(calibrated: Callable[..., Calibrated]) -> None:
    built, _, _ = calibrated(knows(), planted(24), **CALIBRATED)
    bins = built.metrics["reliability"]
    assert sum(each["n"] for each in bins) == 72
    assert (bins[0]["good"], bins[-1]["good"]) == (0.0, 1.0)


def test_moving_a_threshold_or_a_gate_measures_nothing_anew() -> None:
    def settings(**config: object) -> object:
        return Calibrate(CurateConfig(**config), rater(**config)).settings()

    for kind in ({}, {"rater": {"kind": "calibrated"}}):
        usual = settings(**kind, threshold=1)
        for moved in ({"threshold": 0.9 if kind else 2}, {"quantile": 0.5}, {"min_auc": 0.9}, {"min_rated": 0.1}):
            assert settings(**kind, **{"threshold": 1, **moved}) == usual
        assert settings(**kind, target_precision=0.9) != usual
    # What counts as rated: a calibrated rater weighs it as it weighs the rest.
    assert settings(max_off_scale=0.1) != settings()
    assert settings(**CALIBRATED, max_off_scale=0.1) == settings(**CALIBRATED)


def test_a_calibration_is_read_as_it_was_written(calibrated: Callable[..., Calibrated], tmp_path: Path) -> None:
    _, _, found = calibrated(knows(), planted(24), **CALIBRATED, target_precision=0.9)
    assert found.fit is not None
    document = {"fit": found.fit.to_json(), "threshold": found.threshold}
    (tmp_path / "calibration.json").write_text(json.dumps(document))
    assert Calibration.of(tmp_path) == found
