"""A whole run on the demo's base whose replies are compared and judged."""

import json
from pathlib import Path

import pytest

import small
from selfalign.cli import main

QUICK = ("arms=null", "rounds=1", "curate.keep=all", "backward.max_steps=1", "forward.max_steps=40")
JUDGED = ("evaluate.replies=8", "evaluate.judge={model: base, max_off_scale: 1}")


def test_a_judged_run_tells_programs_and_people_who_won(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, root = small.write(tmp_path / "recipe"), tmp_path / "run"
    assert main(["run", str(recipe), "--run", str(root), *QUICK, *JUDGED]) == 0
    told = capsys.readouterr().out
    assert "M1 and the base, judged: win rate" in told
    assert "ROUGE-L" in told
    assert main(["status", str(root), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    figures = document["metrics"]
    judged = figures["judge"]["M1"]
    assert judged["n"] == judged["wins"] + judged["ties"] + judged["losses"] == 8
    assert judged["alike"] < 8
    # This judge has half a million weights and never saw such a question: it goes by the place.
    assert judged["consistent"] < 1
    assert {"base", "M1"} == figures["rouge_l"].keys()
    assert figures["rouge_l"]["M1"] > figures["rouge_l"]["base"]
    low, high = figures["backward_nll"]["difference_ci"]
    assert low <= figures["backward_nll"]["after"] - figures["backward_nll"]["before"] <= high
    (step,) = (step for step in document["steps"] if step["name"] == "evaluate.judge@1")
    assert (step["in"], step["kept"], step["rejected"], step["state"]) == (8, 8, {}, "done")
    assert step["tokens"] > 0
    # A stricter scale judges anew, and measures nothing else again.
    strict = [*JUDGED[:1], "evaluate.judge={model: base, max_off_scale: 0}"]
    capsys.readouterr()
    assert main(["plan", str(recipe), "--run", str(root), *QUICK, *strict, "--json"]) == 0
    states = {step["name"]: step["state"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert {name for name, state in states.items() if state != "reused"} == {"evaluate.judge@1"}
