"""What the tests of curation share: seed pairs, and raters whose engine knows good pairs from bad ones."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.protocols import STOP, Request, Score
from selfalign.core.records import SeedPair
from selfalign.core.store import Artifact
from selfalign.engines.config import ModelConfig
from selfalign.stages.curate.calibrate import FILE
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.fit import Fit
from selfalign.stages.curate.rate import Rater
from stages.conftest import FakeEngine

INSTRUCT = "Ask what this answers: {response}"
CALIBRATED: dict[str, Any] = {"rater": {"kind": "calibrated"}, "threshold": 0.5}
GRADES = [" 1", " 2", " 3", " 4", " 5"]


def rater(**config: object) -> Rater:
    """A rater by the recipe's `curate` section, on an engine that can do everything."""
    return Rater(CurateConfig(**config), ModelConfig(path="x"), INSTRUCT)


def answer(n: int) -> str:
    """The one good response to the question `Q{n}`."""
    return f"The {n} answer is this and no other one"


def seed_pairs(count: int, split: str = "held_out") -> list[SeedPair]:
    """Questions and their answers."""
    return [
        SeedPair(id=f"{split}/{n:02d}", source="s", prompt=f"Q{n}", completion=answer(n), split=split)
        for n in range(count)
    ]


def probable(*shares: float) -> Callable[[Request, Sequence[str]], list[Score]]:
    """An engine's scores: these probabilities, whatever it is asked."""
    return lambda request, options: [Score(math.log(p) if p else -math.inf, 1) for p in shares]


def knows(good: float = 5, bad: float = 1) -> FakeEngine:
    """A rater that tells the right and whole response of a question from any other, by grade and by likelihood."""

    def right(text: str, response: str) -> bool:
        asked = re.search(r"Q(\d+)", text)
        return asked is not None and answer(int(asked[1])) in response

    def scores(request: Request, options: Sequence[str]) -> list[Score]:
        text = request.messages[0]["content"]
        if list(options) == GRADES:
            high = ((good if right(text, text) else bad) - 1) / 4
            return probable(1 - high, 0, 0, 0, high)(request, options)
        tokens = len(options[0].split())
        backward = options[0].startswith("Q")
        fits = right(options[0], text) if backward else right(text, options[0])
        each = -2.0 if not text else -1.0 if fits else -3.0
        ends = -0.1 if any(options[0] == answer(n) for n in range(100)) else -5.0
        return [Score(tokens * each + (ends if o.endswith(STOP) else 0.0), tokens + o.endswith(STOP)) for o in options]

    return FakeEngine(scores=scores)


def strict(path: Path) -> Any:
    """A JSON document that holds no NaN; of a .jsonl file, a list of them."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    found = [json.loads(line, parse_constant=_refuse) for line in lines]
    return found if path.suffix == ".jsonl" else found[0]


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@pytest.fixture
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """A complete calibration, as selection and what is measured beside it take it."""

    def store(fit: Fit | None = None, threshold: float | None = None) -> Artifact:
        artifact = Artifact(tmp_path_factory.mktemp("calibration") / "calibrate-id", "identity")
        document = {"fit": fit.to_json() if fit else None, "threshold": threshold}
        artifact.files.mkdir(parents=True)
        (artifact.files / FILE).write_text(json.dumps(document))
        return artifact

    return store
