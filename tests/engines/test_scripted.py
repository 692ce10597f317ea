"""The engine that follows a script."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfalign.core.errors import UsageError
from selfalign.core.protocols import Request, Sampling
from selfalign.engines.config import ModelConfig
from selfalign.engines.scripted import ScriptedEngine
from selfalign.stages.curate import rubric
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rubric import RatingPrompt

GREEDY = Sampling(temperature=0)


def rate(engine: Any, adapter: Path | None, pairs: Any, config: CurateConfig) -> list[rubric.Verdict]:
    return rubric.rate(engine, adapter, pairs, config, RatingPrompt.of(config))


@pytest.fixture
def scripted(tmp_path: Path) -> Callable[..., ScriptedEngine]:
    def make(*rules: object) -> ScriptedEngine:
        (tmp_path / "script.json").write_text(json.dumps(rules))
        return ScriptedEngine(ModelConfig(path=str(tmp_path / "script.json"), engine="scripted"))

    return make


def ask(text: str, seed: int = 0) -> Request:
    return Request("row", ({"role": "user", "content": text},), seed)


def test_the_first_rule_that_matches_replies_with_what_it_found(scripted: Callable[..., ScriptedEngine]) -> None:
    engine = scripted(
        {"match": "nowhere", "reply": "no"},
        {"match": r"capital of (\w+)", "reply": r"What is the capital of \1?"},
        {"match": "capital", "reply": "later"},
    )
    replies = engine.generate([ask("The capital of\nVage"), ask("The capital of Vage")], GREEDY)
    assert [r.text for r in replies] == ["later", "What is the capital of Vage?"]


def test_a_rule_may_match_over_lines_and_all_messages(scripted: Callable[..., ScriptedEngine]) -> None:
    engine = scripted({"match": "rubric.*Score:$", "scores": {" 4": 0.5}})
    request = Request("r", ({"role": "user", "content": "rubric\nx"}, {"role": "assistant", "content": "Score:"}))
    ((first, second),) = engine.score([request], [[" 3", " 4"]])
    assert second.log_prob == pytest.approx(math.log(0.5))
    assert first.log_prob < math.log(1e-8)


def test_rules_for_scores_and_for_replies_do_not_hide_each_other(scripted: Callable[..., ScriptedEngine]) -> None:
    engine = scripted({"match": "x", "scores": {" 1": 1.0}}, {"match": "x", "reply": "yes"})
    assert engine.generate([ask("x")], GREEDY)[0].text == "yes"
    assert engine.score([ask("x")], [[" 1"]])[0][0].log_prob == 0


def test_without_a_rule_replies_follow_from_prompt_and_seed(scripted: Callable[..., ScriptedEngine]) -> None:
    engine = scripted()
    warm = Sampling(temperature=0.7)

    def written(text: str, seed: int, sampling: Sampling) -> str:
        return engine.generate([ask(text, seed)], sampling)[0].text

    assert written("a", 1, warm) == written("a", 1, warm)
    assert written("a", 1, warm) != written("a", 2, warm)
    assert written("a", 1, warm) != written("b", 1, warm)
    assert written("a", 1, GREEDY) == written("a", 2, GREEDY)


def test_without_a_rule_scores_are_uniform(scripted: Callable[..., ScriptedEngine]) -> None:
    (scores,) = scripted().score([ask("x")], [[" 1", " 2", " 3", " 4"]])
    assert [score.log_prob for score in scores] == [pytest.approx(math.log(0.25))] * 4


def test_a_probability_of_nought_is_none_at_all(scripted: Callable[..., ScriptedEngine]) -> None:
    engine = scripted({"match": "x", "scores": {f" {n}": 0 for n in range(1, 6)}})
    (verdict,) = rate(engine, None, [("row", "x", "x")], CurateConfig())
    assert (verdict["rating"], verdict["unrated"]) == (None, "off_scale")


def test_replies_end_at_stops_and_at_the_limit(scripted: Callable[..., ScriptedEngine]) -> None:
    engine = scripted({"match": "x", "reply": "one two three\nfour"})
    (reply,) = engine.generate([ask("x")], Sampling(max_new_tokens=2))
    assert (reply.text, reply.tokens, reply.finish) == ("one two", 2, "length")
    (reply,) = engine.generate([ask("x")], Sampling(max_new_tokens=3, stop=("\n",)))
    assert (reply.text, reply.tokens, reply.finish) == ("one two three", 3, "stop")


def test_it_counts_tokens(scripted: Callable[..., ScriptedEngine]) -> None:
    engine = scripted({"match": "x", "reply": "one two"})
    engine.generate([ask("x"), ask("x")], GREEDY)
    assert engine.tokens == 4


def test_a_script_can_kill_the_process_as_a_crash_would(tmp_path: Path) -> None:
    (tmp_path / "script.json").write_text('[{"match": "poison", "action": "exit"}]')
    code = (
        "import sys; from selfalign.engines.scripted import *\n"
        "engine = ScriptedEngine(ModelConfig(path=sys.argv[1], engine='scripted'))\n"
        "try: engine.generate([Request('r', ({'role': 'user', 'content': sys.argv[2]},))], Sampling())\n"
        "finally: print('alive', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "script.json")]
    fine = subprocess.run([*command, "food"], capture_output=True, text=True, check=True)
    assert fine.stdout == "alive\n"
    dead = subprocess.run([*command, "poison"], capture_output=True, text=True, check=False)
    assert (dead.returncode, dead.stdout) == (1, "")


@pytest.mark.parametrize("text", ["{", "{}", '[{"reply": "x"}]', '[{"match": "x", "replay": "y"}]', '[{"match": "("}]'])
def test_what_is_no_script_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "script.json").write_text(text)
    with pytest.raises(UsageError, match=r"script\.json is no script"):
        ScriptedEngine(ModelConfig(path=str(tmp_path / "script.json"), engine="scripted"))


def test_a_script_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.path: no script .*nowhere\.json"):
        ScriptedEngine(ModelConfig(path=str(tmp_path / "nowhere.json"), engine="scripted"))
