"""The judge over the replies of two evaluations."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.errors import UsageError
from selfalign.core.protocols import Reply, Request, Score
from selfalign.core.records import SeedPair
from selfalign.core.stage import Built, Context, External
from selfalign.core.store import Artifact
from selfalign.engines.config import ModelConfig
from selfalign.stages.evaluate import Evaluate, EvaluateConfig
from selfalign.stages.judge import Judge, JudgeConfig
from stages.conftest import FakeEngine, Stored, place_in

PAIRS = [
    SeedPair(id=f"s/{n}", source="s", prompt=f"prompt {n}", completion=f"completion {n}", split="held_out")
    for n in range(6)
]
CONFIG = JudgeConfig(model="base")


class Judging:
    """Evaluates two models by their replies, and has them judged."""

    def __init__(self, folder: Path, engine: FakeEngine, seen: Callable[..., Context], seed: Artifact) -> None:
        self.folder, self.engine, self.seen, self.seed = folder, engine, seen, seed
        questions = folder / "questions.jsonl"
        questions.write_text('{"prompt": "Capital?", "answers": ["Vage"]}\n')
        self.questions = External(str(questions), "digest")

    def evaluated(self, name: str, reply: Callable[[str], str | Reply]) -> Artifact:
        self.engine.reply = lambda request: reply(request.messages[-1]["content"])
        stage = Evaluate(EvaluateConfig(replies=6), ModelConfig(path="x"), "forward")
        context = self.seen(seed=self.seed, questions=self.questions)
        _, artifact = self._built(stage, name, context)
        return artifact

    def __call__(self, config: JudgeConfig = CONFIG, **inputs: Any) -> tuple[Built, list[dict[str, Any]]]:
        built, artifact = self._built(Judge(config, ModelConfig(path="x")), "judge", self.seen(**inputs))
        assert json.loads((artifact.files / "metrics.json").read_text()) == built.metrics
        assert {artifact.files / name for name in built.content} == set(artifact.files.iterdir())
        return built, [json.loads(line) for line in (artifact.files / "judged.jsonl").read_text().splitlines()]

    def _built(self, stage: Evaluate | Judge, name: str, context: Context) -> tuple[Built, Artifact]:
        artifact = Artifact(self.folder / name, name)
        artifact.files.mkdir(parents=True)
        return stage.build(context, place_in(artifact.files), lambda line: None), artifact


@pytest.fixture
def judging(tmp_path: Path, engine: FakeEngine, seen: Callable[..., Context], stored: Stored) -> Judging:
    return Judging(tmp_path, engine, seen, stored("seed", PAIRS, SeedPair))


def likes(word: str) -> Callable[[Request, Sequence[str]], list[Score]]:
    """A judge who prefers the answer that holds a word."""

    def score(request: Request, options: Sequence[str]) -> list[Score]:
        before, _, _ = request.messages[0]["content"].partition("Answer B:")
        return [Score(math.log(share), 1) for share in ((0.8, 0.1) if word in before else (0.1, 0.8))]

    return score


def test_the_replies_to_held_out_prompts_are_compared_and_not_those_to_questions(judging: Judging) -> None:
    base = judging.evaluated("base", lambda prompt: f"plain, {prompt}")
    now = judging.evaluated("now", lambda prompt: f"fine, {prompt}")
    judging.engine.scores, judging.engine.tokens = likes("fine"), 1000
    built, rows = judging(now=now, base=base)
    assert [row["id"] for row in rows] == [pair.id for pair in PAIRS]
    assert rows[0] == {
        "id": "s/0",
        "prompt": "prompt 0",
        "ours": "fine, prompt 0",
        "base": "plain, prompt 0",
        "preference": 0.8889,
        "verdict": "win",
        "orders": [0.8889, 0.8889],
        "off_scale": 0.1,
        "unjudged": None,
    }
    assert (built.metrics["win_rate"], built.metrics["wins"], built.metrics["n"]) == (0.8889, 6, 6)
    assert built.tokens == 12
    requests, _, _ = judging.engine.scored[-1]
    text = requests[0].messages[0]["content"]
    assert text.index("prompt 0") < text.index("fine, prompt 0") < text.index("plain, prompt 0")


def test_each_prompt_is_judged_or_told_why_not(judging: Judging) -> None:
    base = judging.evaluated("base", lambda prompt: Reply("", 0, "too_long") if "5" in prompt else f"plain, {prompt}")

    def reply(prompt: str) -> str | Reply:
        if "5" in prompt:
            return Reply("", 0, "too_long")
        return f"plain, {prompt}" if "0" in prompt else f"fine, {prompt}"

    now = judging.evaluated("now", reply)
    prefer = likes("fine")
    judging.engine.scores = lambda request, options: (
        None if request.id == "s/1" else [Score(-5.0, 1)] * 2 if request.id == "s/2" else prefer(request, options)
    )
    built, rows = judging(now=now, base=base)
    assert [row["unjudged"] for row in rows] == [None, "too_long", "off_scale", None, None, "no_reply"]
    assert [row["verdict"] for row in rows] == ["tie", None, None, "win", "win", None]
    ledger = built.ledger.check("evaluate.judge").to_json()
    assert (ledger["in"], ledger["kept"]) == (6, 3)
    assert ledger["rejected"] == built.metrics["unjudged"] == {"no_reply": 1, "off_scale": 1, "too_long": 1}


def test_braces_in_a_reply_are_text(judging: Judging) -> None:
    base = judging.evaluated("base", lambda prompt: "{first} {instruction}")
    now = judging.evaluated("now", lambda prompt: "{second}")
    judging(now=now, base=base)
    text = judging.engine.scored[-1][0][0].messages[0]["content"]
    assert "Answer A:\n{second}\n\nAnswer B:\n{first} {instruction}\n" in text


def test_the_prompt_is_the_recipes_where_it_names_one_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("{instruction}: {first} or {second}?\n")
    stages = [Judge(JudgeConfig(model="base", prompt_file=file), ModelConfig(path="x")) for file in (None, str(path))]
    assert stages[1].prompt == "{instruction}: {first} or {second}?"
    assert stages[0].settings()["prompt"] != stages[1].settings()["prompt"]


@pytest.mark.parametrize("text", ["{instruction} {first}", "{first} {second}", "{instruction} {second}"])
def test_a_prompt_that_lacks_a_placeholder_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"mine\.txt lacks the placeholder \{(second|instruction|first)\}") as caught:
        Judge(JudgeConfig(model="base", prompt_file=str(path)), ModelConfig(path="x"))
    assert caught.value.exit_code == 2


def test_a_judge_without_replies_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="set replies to their number"):
        EvaluateConfig(judge=CONFIG)
    assert EvaluateConfig(judge=CONFIG, replies=1).judge == CONFIG
