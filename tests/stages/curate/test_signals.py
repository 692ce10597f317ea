"""Signals: each held against known log-probabilities, and how often the rater is asked."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from selfalign.core.errors import UsageError
from selfalign.core.protocols import STOP, Request, Score
from selfalign.engines.config import ModelConfig
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rate import Rater
from selfalign.stages.curate.rubric import RatingPrompt
from selfalign.stages.curate.signals import SIGNALS, Readings, Unit, Values, measured, refuse_unable, signal
from selfalign.stages.prompting import fill
from stages.conftest import FakeEngine
from stages.curate.conftest import CALIBRATED, GRADES, INSTRUCT, rater

ONE, TWO = "Name the tallest of all trees", "Which tree?"
REDWOOD, OAK = "The tallest of all trees is the redwood", "Oak"
# Two candidates of one document, and one of another.
UNITS = [Unit("d/0", ONE, REDWOOD), Unit("d/1", TWO, REDWOOD), Unit("e/0", ONE, OAK)]
# What the user says and what is scored behind it: log-probability and tokens.
LIKELIHOODS = {
    (ONE, REDWOOD): (-10.0, 4),
    (ONE, REDWOOD + STOP): (-10.5, 5),
    (TWO, REDWOOD): (-6.0, 4),
    (TWO, REDWOOD + STOP): (-9.0, 5),
    (ONE, OAK): (-7.0, 2),
    (ONE, OAK + STOP): (-7.25, 3),
    ("", REDWOOD): (-12.0, 4),
    ("", OAK): (-5.0, 2),
    (fill(INSTRUCT, response=REDWOOD), ONE): (-9.0, 6),
    (fill(INSTRUCT, response=REDWOOD), TWO): (-6.0, 3),
    (fill(INSTRUCT, response=OAK), ONE): (-24.0, 6),
}
SHARES = (0.1, 0.1, 0.0, 0.0, 0.6)
EXPECTED: dict[str, Values] = {
    # (1 · .1 + 2 · .1 + 5 · .6) / .8
    "rubric": [4.125] * 3,
    "entropy": [round(-2 * 0.125 * math.log(0.125) - 0.75 * math.log(0.75), 4)] * 3,
    "off_scale": [0.2] * 3,
    "likelihood_gain": [2.0, 6.0, -2.0],
    "likelihood_gain_per_token": [0.5, 1.5, -1.0],
    "stop_token": [-0.5, -3.0, -0.25],
    "backward_likelihood": [-1.5, -2.0, -4.0],
    # "the tallest of", "tallest of all" and "of all trees" of the four.
    "ngram_overlap": [0.75, 0.0, 0.0],
}


def knowing() -> FakeEngine:
    def scores(request: Request, options: Sequence[str]) -> list[Score]:
        if list(options) == GRADES:
            return [Score(math.log(p) if p else -math.inf, 1) for p in SHARES]
        return [Score(*LIKELIHOODS[request.messages[0]["content"], option]) for option in options]

    return FakeEngine(scores=scores)


def read(
    engine: FakeEngine, *names: str, units: Sequence[Unit] = UNITS, adapter: Path | None = None
) -> dict[str, Values]:
    config = CurateConfig(**CALIBRATED)
    return measured(Readings(units, engine, adapter, config, RatingPrompt.of(config), INSTRUCT), names)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_what_its_docstring_says(name: str) -> None:
    assert read(knowing(), name) == {name: pytest.approx(EXPECTED[name], abs=1e-4)}


def test_all_signals_together_ask_nothing_twice(tmp_path: Path) -> None:
    engine = knowing()
    assert read(engine, *SIGNALS, adapter=tmp_path).keys() == EXPECTED.keys()
    assert engine.generated == []
    asked = [
        (request, options)
        for requests, each, _ in engine.scored
        for request, options in zip(requests, each, strict=True)
    ]
    by_pair, rubrics = [(r.messages[0]["content"], options) for r, options in asked if options != GRADES], len(asked)
    # The rubric, y given x, and x given y once a pair; y alone once a document.
    assert rubrics - len(by_pair) == 3
    assert len(by_pair) == 3 + 3 + 2
    assert [options for said, options in by_pair if said == ""] == [[REDWOOD], [OAK]]
    # With and without the end of the turn in one request, which shares its prefill.
    assert (ONE, [REDWOOD, REDWOOD + STOP]) in by_pair
    assert sum(len(options) == 2 for _, options in by_pair) == 3
    assert {adapter for _, _, adapter in engine.scored} == {tmp_path}


@pytest.mark.parametrize(
    ("names", "requests"),
    [
        (["ngram_overlap"], 0),
        (["rubric", "entropy", "off_scale"], 3),
        (["stop_token"], 3),
        (["likelihood_gain", "likelihood_gain_per_token", "stop_token"], 5),
        (["backward_likelihood"], 3),
    ],
)
def test_what_no_signal_wants_is_not_asked(names: list[str], requests: int) -> None:
    engine = knowing()
    read(engine, *names)
    assert sum(len(asked) for asked, _, _ in engine.scored) == requests


def test_pairs_that_are_the_same_are_asked_once_and_get_the_same() -> None:
    engine = knowing()
    units = [UNITS[0], UNITS[2], Unit("copy", ONE, REDWOOD)]
    found = read(engine, "likelihood_gain", "backward_likelihood", units=units)
    assert found == {"likelihood_gain": [2.0, -2.0, 2.0], "backward_likelihood": [-1.5, -4.0, -1.5]}
    assert sum(len(asked) for asked, _, _ in engine.scored) == 2 + 2 + 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_value(value: float) -> None:
    engine = FakeEngine(scores=lambda request, options: [Score(value, 1) for _ in options])
    found = read(engine, *SIGNALS)
    for name in ("rubric", "entropy", "likelihood_gain", "likelihood_gain_per_token", "stop_token"):
        assert found[name] == [None] * 3, name
    assert found["backward_likelihood"] == [None] * 3
    assert found["ngram_overlap"] == EXPECTED["ngram_overlap"]


def test_one_signal_that_overflows_takes_no_other_with_it() -> None:
    engine = knowing()
    known = engine.scores

    def scores(request: Request, options: Sequence[str]) -> list[Score] | None:
        found = known(request, options)
        return [
            Score(math.nan, 4) if option == OAK + STOP else s for option, s in zip(options, found or [], strict=True)
        ]

    engine.scores = scores
    found = read(engine, *SIGNALS)
    assert found["stop_token"] == [-0.5, -3.0, None]
    assert found["likelihood_gain"] == EXPECTED["likelihood_gain"]


def test_a_pair_that_left_no_room_lacks_what_the_rater_was_to_say_and_no_more() -> None:
    engine = knowing()
    known = engine.scores
    engine.scores = lambda request, options: None if ONE in request.messages[0]["content"] else known(request, options)
    found = read(engine, *SIGNALS)
    assert found["rubric"] == [None, EXPECTED["rubric"][1], None]
    assert found["stop_token"] == [None, -3.0, None]
    assert found["likelihood_gain"] == [None, 6.0, None]
    assert found["likelihood_gain_per_token"] == [None, 1.5, None]
    # Asked behind the response, where there was room.
    assert found["backward_likelihood"] == EXPECTED["backward_likelihood"]
    assert found["ngram_overlap"] == EXPECTED["ngram_overlap"]


def test_a_response_of_no_tokens_has_no_likelihood_a_token() -> None:
    engine = FakeEngine(scores=lambda request, options: [Score(0.0, 0) for _ in options])
    found = read(engine, "likelihood_gain", "likelihood_gain_per_token", "backward_likelihood")
    assert found["likelihood_gain"] == [0.0] * 3
    assert found["likelihood_gain_per_token"] == found["backward_likelihood"] == [None] * 3


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Signals that a test enters are gone after it."""
    before = dict(SIGNALS)
    yield
    SIGNALS.clear()
    SIGNALS.update(before)


@pytest.mark.usefixtures("own_signals")
def test_a_new_signal_is_one_function_and_its_name_in_the_recipe() -> None:
    @signal(None)
    def words(readings: Readings) -> Values:
        """How many words the response has."""
        return [float(len(unit.response.split())) for unit in readings.units]

    made = rater(**CALIBRATED, signals=["words", "rubric"])
    assert made.signals == ("rubric", "words")
    engine = knowing()
    readings = Readings(UNITS, engine, None, made.config, made.prompt, INSTRUCT)
    assert measured(readings, made.signals) == {"words": [8.0, 8.0, 1.0], "rubric": [4.125] * 3}


CHOOSES = ["rubric", "entropy", "off_scale", "ngram_overlap"]


def test_an_engine_that_tells_no_likelihoods_is_refused_before_anything_runs() -> None:
    scripted = ModelConfig(path="x", engine="scripted")
    told = (
        r"curate\.signals: backward_likelihood needs an engine that can tell how likely .*model\.engine=scripted cannot"
    )
    with pytest.raises(UsageError, match=told) as caught:
        Rater(CurateConfig(**CALIBRATED), scripted, INSTRUCT)
    assert caught.value.exit_code == 2
    assert Rater(CurateConfig(**CALIBRATED, signals=CHOOSES), scripted, INSTRUCT).signals == tuple(sorted(CHOOSES))
    # A rubric's rater weighs none of the signals that stand in the recipe by default.
    assert Rater(CurateConfig(), scripted, INSTRUCT).signals == ("rubric",)


@pytest.mark.parametrize("name", [name for name in SIGNALS if name not in CHOOSES])
def test_every_likelihood_asks_for_an_engine_that_tells_them(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} needs an engine"):
        refuse_unable(ModelConfig(path="x", engine="scripted"), [name])
    refuse_unable(ModelConfig(path="x"), [name])
