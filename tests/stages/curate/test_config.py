"""The `curate` section: what it refuses, and where it says the mistake is."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import small
from selfalign.core.errors import RecipeError
from selfalign.recipe import load
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.signals import SIGNALS
from stages.curate.conftest import CALIBRATED

AGREEMENT = {"against": {"readout": "parsed", "reasoning_tokens": 8}}


def refused(**config: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        CurateConfig(**config)
    return str(caught.value)


def test_by_default_a_rubric_rates_and_a_calibrated_rater_weighs_what_helps_where_pairs_are_few() -> None:
    config = CurateConfig()
    assert (config.rater.kind, config.layout, config.threshold, config.agreement) == ("rubric", "as_written", 4.0, None)
    assert {*SIGNALS} - {*config.signals} == {"entropy", "off_scale"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"plants": ["swapped", "echo", "swapped"]}, "'swapped' stands twice"),
        ({"rater": {"model": "base", "chat_template": "plain"}}, "those of a rater of its own, and model=base"),
        ({"rater": {"revision": "main"}}, "those of a rater of its own, and model=previous"),
        (
            {
                "rater": {"kind": "calibrated"},
                "threshold": 0.5,
                "readout": "parsed",
                "reasoning_tokens": 8,
                "signals": ["rubric", "entropy"],
            },
            "entropy is no part of readout=parsed",
        ),
    ],
)
def test_settings_that_could_not_take_effect_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        CurateConfig(**settings)


@pytest.mark.parametrize(
    ("signals", "told"),
    [
        (["rubrik"], "'rubrik' is no signal; did you mean 'rubric'?"),
        (["rubric", "stop-token"], "'stop-token' is no signal; did you mean 'stop_token'?"),
        (["likelihood_gain_pertoken"], "did you mean 'likelihood_gain_per_token'?"),
        (["zzz"], "'zzz' is no signal; there are rubric, entropy"),
        ([], "at least 1 item"),
    ],
)
def test_an_unknown_signal_is_told_with_the_nearest_one(signals: list[str], told: str) -> None:
    assert told in refused(**CALIBRATED, signals=signals)


def test_a_threshold_that_nobody_set_is_not_told_as_somebodys_own() -> None:
    told = refused(rater={"kind": "calibrated"})
    assert "threshold is not set, and its default, 4, is a rating" in told
    assert "or set target_precision" in told


@pytest.mark.parametrize("threshold", [{"threshold": 4}, {"threshold": 1.01}])
def test_a_rating_is_no_threshold_for_a_calibrated_rater(threshold: dict[str, float]) -> None:
    told = refused(rater={"kind": "calibrated"}, **threshold)
    assert "is no probability, which rater.kind=calibrated gives: set it between 0 and 1" in told
    assert "or set target_precision" in told


@pytest.mark.parametrize("threshold", [0, 0.5, 0.99])
def test_a_probability_is_no_threshold_for_a_rubric(threshold: float) -> None:
    assert f"threshold {threshold:g} is below 1, the lowest rating; set it between 1 and 5" in refused(
        threshold=threshold
    )


@pytest.mark.parametrize(
    "config",
    [
        {"rater": {"kind": "calibrated"}, "threshold": 0},
        {"rater": {"kind": "calibrated"}, "threshold": 1},
        # Where another rule decides, the threshold that stands there by default is none.
        {"rater": {"kind": "calibrated"}, "target_precision": 0.9},
        {"rater": {"kind": "calibrated"}, "keep": "all"},
        {"threshold": 1},
        {"threshold": 5},
    ],
)
def test_thresholds_that_fit_their_rater_are_taken(config: dict[str, Any]) -> None:
    CurateConfig(**config)


def test_a_calibrated_rater_cannot_be_the_second_way_of_rating() -> None:
    told = refused(agreement={"against": {"rater": {"kind": "calibrated"}}})
    assert "against.rater.kind: a calibrated rater needs a fit of its own; compare with a rubric" in told
    assert CurateConfig(**CALIBRATED, agreement=AGREEMENT).agreement is not None


def test_a_second_way_that_does_not_differ_must_be_written_down() -> None:
    assert "agreement.against" in refused(agreement={"sample": 10})


def test_what_is_parsed_must_have_room_to_be_written() -> None:
    assert "reasoning_tokens must be above 0" in refused(readout="parsed")
    assert "reasoning_tokens must be above 0" in refused(agreement={"against": {"readout": "parsed"}})


@pytest.mark.parametrize(
    "config",
    [
        {"plants": []},
        {"plants": ["shuffled"]},
        {"target_precision": 1},
        {"target_precision": 0},
        {"quantile": 0},
        {"quantile": 1},
        {"max_per_source": 0},
        {"max_per_cluster": 0},
        {"cluster_similarity": 0},
        {"injections": -1},
        {"min_pairs": 0},
        {"layout": "answer_first"},
        {"threshold": 5.5},
    ],
)
def test_values_that_mean_nothing_are_refused(config: dict[str, Any]) -> None:
    assert next(iter(config)) in refused(**config)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return small.write(tmp_path)


@pytest.mark.parametrize(
    ("key", "line", "told"),
    [
        (
            "  threshold: 1\n",
            "  signals: [rubric, stop_tokn]\n",
            "'stop_tokn' is no signal; did you mean 'stop_token'?",
        ),
        ("  threshold: 1\n", "  threshold: 4\n  rater: {kind: calibrated}\n", "threshold 4 is no probability"),
        ("  threshold: 1\n", "  threshold: .5\n", "threshold 0.5 is below 1, the lowest rating"),
        (
            "  threshold: 1\n",
            "  agreement: {against: {rater: {kind: calibrated}}}\n",
            "a calibrated rater needs a fit of its own",
        ),
        ("  threshold: 1\n", "  plants: [swaped]\n", "swapped"),
        ("  threshold: 1\n", "  max_per_clutser: 3\n", "did you mean curate.max_per_cluster?"),
    ],
)
def test_a_recipes_mistake_is_told_with_file_and_line(recipe: Path, key: str, line: str, told: str) -> None:
    text = recipe.read_text()
    assert text.count(key) == 1
    recipe.write_text(text.replace(key, line))
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert told in message
    place = message.split("small.yaml:")[1].split(":")[0]
    section = text[: text.index("curate:")].count("\n") + 1
    assert section <= int(place) <= section + 5
