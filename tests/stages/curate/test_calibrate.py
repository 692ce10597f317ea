"""The rater's own test: what is planted, what is measured, and its gates."""

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.errors import GateError
from selfalign.core.ledger import Ledger
from selfalign.core.protocols import Request, Score
from selfalign.core.records import SeedPair
from selfalign.core.stage import Built, Context
from selfalign.core.store import Manifest
from selfalign.engines.config import ModelConfig
from selfalign.stages.curate.calibrate import Calibrate, plant, truncated
from selfalign.stages.curate.config import CurateConfig
from stages.conftest import FakeEngine, Stored, place_in

Seen = Callable[..., Context]

words = st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12), min_size=1, max_size=30)
gap = st.sampled_from([" ", "\n", "  ", "\n\n", "\t", "\u3000"])


@st.composite
def responses(draw: st.DrawFn) -> str:
    parts = draw(words)
    return draw(st.sampled_from(["", " ", "\n"])) + "".join(w + draw(gap) for w in parts[:-1]) + parts[-1]


def pairs(count: int, split: str = "held_out") -> list[SeedPair]:
    def text(n: int) -> str:
        return f"The {n} answer is this and no other one"

    return [
        SeedPair(id=f"{split}/{n}", source="s", prompt=f"Q{n}", completion=text(n), split=split) for n in range(count)
    ]


@given(responses(), st.sampled_from(["", " ", "\n"]), st.randoms(use_true_random=False))
def test_a_cut_response_ends_at_a_word_between_30_and_70_per_cent(text: str, end: str, chance: random.Random) -> None:
    whole = text.strip()
    boundaries = [n for n in range(1, len(whole)) if whole[n].isspace() and not whole[n - 1].isspace()]
    cut = truncated(text + end, chance)
    if not boundaries:
        assert cut == ""
        return
    assert whole.startswith(cut)
    assert len(cut) in boundaries
    inside = [n for n in boundaries if 0.3 * len(whole) <= n <= 0.7 * len(whole)]
    if inside:
        assert len(cut) in inside


@given(responses(), st.randoms(use_true_random=False))
def test_a_cut_response_is_never_the_whole_one(text: str, chance: random.Random) -> None:
    cut = truncated(text + "\n", chance)
    assert len(cut.split()) < len(text.split())
    assert cut == "" or cut.split() == text.split()[: len(cut.split())]


def test_cuts_vary() -> None:
    text = "word " * 100
    assert len({truncated(text, random.Random(n)) for n in range(20)}) > 5


@given(st.lists(st.sampled_from(["yes", "no", "two words", "three words here"]), max_size=8), st.integers())
def test_a_swapped_pair_never_keeps_its_own_response(completions: list[str], seed: int) -> None:
    rows = [SeedPair(id=f"p{n}", source="s", prompt=f"Q{n}", completion=text) for n, text in enumerate(completions)]
    planted = plant(rows, random.Random(seed))
    own = {row.id: row for row in rows}
    for each in planted:
        origin = own[each.id.split("/")[0]]
        assert each.prompt == origin.prompt
        if each.kind == "seed":
            assert each.completion == origin.completion
        else:
            assert each.completion != origin.completion
        if each.kind == "swapped":
            assert each.completion in completions
    assert sum(each.kind == "seed" for each in planted) == len(rows)
    swaps = sum(each.kind == "swapped" for each in planted)
    assert swaps == (len(rows) if len(set(completions)) > 1 else 0)
    assert len({each.id for each in planted}) == len(planted)


def knows(good: float, bad: float) -> FakeEngine:
    """A rater that tells the right and whole response of a question from any other."""

    def scores(request: Request, options: Sequence[str]) -> list[Score]:
        text = request.messages[0]["content"]
        n = text.split("Q")[-1].split()[0]
        high = ((good if f"The {n} answer is this and no other one" in text else bad) - 1) / 4
        return [Score(math.log(p) if p else -math.inf, 1) for p in (1 - high, 0, 0, 0, high)]

    return FakeEngine(scores=scores)


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


Calibrated = tuple[Built, list[dict[str, Any]]]


@pytest.fixture
def calibrated(
    monkeypatch: pytest.MonkeyPatch, seen: Seen, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Calibrated]:
    """What the stage builds, and the planted pairs with their verdicts."""

    def run(engine: FakeEngine, rows: list[SeedPair], seed: int = 0, **config: object) -> Calibrated:
        monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: engine)
        folder = tmp_path_factory.mktemp("draft")
        stage = Calibrate(CurateConfig(**config), ModelConfig(path="x"))
        built = stage.build(seen(seed, seed=stored(folder.name, rows, SeedPair)), place_in(folder), lambda line: None)
        lines = (folder / "planted.jsonl").read_text().splitlines()
        metrics = json.loads((folder / "metrics.json").read_text(), parse_constant=_refuse)
        assert metrics == built.metrics
        return built, [json.loads(line, parse_constant=_refuse) for line in lines]

    return run


def gate(built: Built, **config: object) -> None:
    manifest = Manifest("s", "i", "c", {}, {}, {}, metrics=json.loads(json.dumps(built.metrics)))
    Calibrate(CurateConfig(**config), ModelConfig(path="x")).check(manifest)


def test_only_held_out_pairs_are_planted(calibrated: Callable[..., Calibrated]) -> None:
    engine = knows(5, 1)
    built, planted = calibrated(engine, [*pairs(4), *pairs(20, "train")])
    assert built.metrics["planted"] == len(planted) == 12
    assert all(row["id"].startswith("held_out/") for row in planted)
    assert [row["kind"] for row in planted].count("seed") == 4
    # Responses of training pairs would come in as swaps.
    assert all("The 4 answer" not in request.messages[0]["content"] for request in engine.scored[0][0])


def test_a_rater_that_knows_good_from_spoilt_gets_the_full_area(calibrated: Callable[..., Calibrated]) -> None:
    built, planted = calibrated(knows(5, 1), pairs(6))
    assert built.metrics["auc"] == 1.0
    assert built.metrics["auc_by_kind"] == {"swapped": 1.0, "truncated": 1.0}
    low, high = built.metrics["auc_ci"]
    assert 0.5 < low < high == 1.0
    assert built.metrics["rated"] == 1.0
    assert {(row["kind"], row["rating"]) for row in planted} == {("seed", 5.0), ("swapped", 1.0), ("truncated", 1.0)}
    gate(built, min_auc=1.0, min_rated=1.0)


def test_a_rater_that_likes_everything_alike_is_at_chance_and_stopped(calibrated: Callable[..., Calibrated]) -> None:
    built, _ = calibrated(knows(4, 4), pairs(6))
    assert built.metrics["auc"] == 0.5
    gate(built, min_auc=0.5)
    with pytest.raises(GateError, match=r"AUC of 0\.50, and curate\.min_auc wants 0\.65") as caught:
        gate(built)
    assert caught.value.exit_code == 3


def test_pairs_without_a_usable_rating_are_counted_by_reason(calibrated: Callable[..., Calibrated]) -> None:
    rated = knows(5, 1)

    def scores(request: Request, options: Sequence[str]) -> list[Score] | None:
        match request.id.split("/")[1:]:
            case ["0"]:
                return None
            case ["1"] | ["2"]:
                return [Score(math.log(0.02), 1) for _ in options]
        return rated.scores(request, options)

    built, planted = calibrated(FakeEngine(scores=scores), pairs(4))
    assert built.metrics["unrated"] == {"too_long": 1, "off_scale": 2}
    assert built.metrics["rated"] == 0.75
    # An unrated pair weighs in nowhere: the one seed pair that is left wins.
    assert built.metrics["auc"] == 1.0
    assert sum(row["unrated"] is None for row in planted) == 9
    gate(built, min_rated=0.75)
    told = r"usable rating to 75% of the planted pairs, and curate\.min_rated wants 95% \(2 off_scale, 1 too_long\)"
    with pytest.raises(GateError, match=told):
        gate(built)


def test_a_rater_whose_replies_cannot_be_read_is_stopped(calibrated: Callable[..., Calibrated]) -> None:
    engine = FakeEngine(reply=lambda request: "Quite good.")
    built, planted = calibrated(engine, pairs(3), readout="parsed", reasoning_tokens=8)
    assert built.metrics["unrated"] == {"unparsed": 9}
    assert built.metrics["auc"] is None
    assert all(row["rating"] is None for row in planted)
    with pytest.raises(GateError, match=r"0% of the planted pairs.*9 unparsed"):
        gate(built)


def test_with_nothing_held_out_there_is_no_test_and_the_gate_says_what_to_do(
    calibrated: Callable[..., Calibrated],
) -> None:
    built, planted = calibrated(knows(5, 1), pairs(5, "train"))
    assert planted == []
    assert built.metrics["planted"] == 0
    for config in ({}, {"min_rated": 0}, {"min_auc": 0}):
        with pytest.raises(GateError, match=r"hold some out \(prepare\.seed\.held_out\)"):
            gate(built, **config)
    gate(built, min_rated=0, min_auc=0)


def test_one_held_out_pair_of_one_word_cannot_be_compared(calibrated: Callable[..., Calibrated]) -> None:
    row = SeedPair(id="held_out/0", source="s", prompt="Q0 x", completion="Yes\n", split="held_out")
    built, planted = calibrated(knows(5, 5), [row])
    assert [each["kind"] for each in planted] == ["seed"]
    assert built.metrics["auc"] is None
    with pytest.raises(GateError, match=r"no planted pairs could be compared; hold out seed pairs"):
        gate(built)
    gate(built, min_auc=0)


def test_the_same_run_plants_the_same_and_another_seed_does_not(calibrated: Callable[..., Calibrated]) -> None:
    asked = []
    for seed in (0, 0, 1):
        engine = knows(5, 1)
        calibrated(engine, pairs(12), seed)
        asked.append(engine.scored[0][0])
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


def test_an_area_that_went_missing_fails_the_gate() -> None:
    empty = Built((), Ledger(), {"planted": 3, "rated": 1.0})
    with pytest.raises(GateError, match="no planted pairs could be compared"):
        gate(empty)
