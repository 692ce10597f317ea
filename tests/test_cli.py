"""The command line on a small recipe: the whole loop, its contract for programs, its errors and exit codes."""

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

import small
from selfalign.cli import main
from selfalign.demo.base import base_folder
from selfalign.report.export import Format, StageName


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def calm(recipe: Path) -> Path:
    """An undisturbed run."""
    root = recipe.parent / "calm"
    assert main(["run", str(recipe), "--run", str(root)]) == 0
    return root


def status(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    capsys.readouterr()
    assert main(["status", str(root), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def contents(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return {a["name"]: a["sha256"] for a in status(root, capsys)["artifacts"]}


def test_help_answers_without_loading_a_heavy_library() -> None:
    code = "import sys; from selfalign.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'ray', 'trl', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_step_of_a_run_balances_and_is_told_to_programs(calm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = status(calm, capsys)
    assert document["complete"] is True
    for step in document["steps"]:
        assert step["state"] == "done"
        out = step["kept"] + sum(step["rejected"].values()) + sum(step["quarantined"].values())
        assert step["in"] == out
    names = {(step["name"], step["arm"]) for step in document["steps"]}
    assert {("curate.rate@2", None), ("forward.train@1", "uncurated"), ("forward.train@1", "exposed")} <= names
    assert {"base", "M0", "M1", "M2", "uncurated", "exposed"} == set(document["metrics"]["accuracy"])
    assert 0 <= document["metrics"]["rater_auc"] <= 1


def test_a_second_run_changes_nothing(recipe: Path, calm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (calm / "artifacts").rglob("*") if p.is_file()}
    assert main(["run", str(recipe), "--run", str(calm)]) == 0
    assert {p: p.stat().st_mtime_ns for p in (calm / "artifacts").rglob("*") if p.is_file()} == before


def test_plan_tells_what_is_reused_and_what_would_run(
    recipe: Path, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["plan", str(recipe), "curate.threshold=2", "--run", str(calm), "--json", "arms=null"]) == 0
    states = {step["name"]: step["state"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert states["curate.rate@1"] == "reused"
    assert states["curate.select@1"] == "to run"


def test_show_prints_pairs_ratings_and_replies(calm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["show", str(calm), "--json", "--pairs", "3"]) == 0
    sample = json.loads(capsys.readouterr().out)
    assert [len(sample[key]) for key in ("pairs", "high", "low", "responses")] == [3, 5, 5, 5]
    assert sample["high"][0]["rating"] >= sample["low"][0]["rating"]
    assert main(["show", str(calm)]) == 0
    assert "Rated highest" in capsys.readouterr().out


def test_report_writes_one_file(calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(calm), "--to", str(tmp_path / "look.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "look.html")
    assert (tmp_path / "look.html").read_text().startswith("<!doctype html>")


def test_report_replaces_its_own_file_and_another_only_where_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    (tmp_path / "run.json").write_text('{"recipe": "a", "complete": false, "steps": []}')
    (tmp_path / "report.html").write_text("old")
    assert main(["report", str(tmp_path), "--to", str(mine)]) == 2
    assert "--force" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert main(["report", str(tmp_path), "--to", str(mine), "--force"]) == 0
    assert main(["report", str(tmp_path)]) == 0
    assert "old" not in (mine.read_text(), (tmp_path / "report.html").read_text())


@pytest.mark.parametrize("stage", get_args(StageName))
def test_every_stage_of_a_run_is_exported(
    calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["export", str(calm), "--stage", stage, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / f"{stage}.jsonl").read_text().splitlines()]
    assert (told["path"], told["rows"]) == (f"{stage}.jsonl", len(rows))
    assert all(list(row) == told["columns"] for row in rows)
    # The ledger's count of what was kept.
    step = next(s for s in status(calm, capsys)["steps"] if s["name"] == told["step"] and s["arm"] is None)
    assert sum(row.get("outcome", "kept") == "kept" for row in rows) == step["kept"]
    assert main(["export", str(calm), "--stage", stage]) == 2
    assert "--force" in capsys.readouterr().err
    for format in get_args(Format):
        assert main(["export", str(calm), "--stage", stage, "--force", "--format", format, "--arm", "exposed"]) == (
            2 if stage == "rated" else 0
        )


def test_merge_makes_a_model_of_a_runs_adapter(
    recipe: Path, calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, dest = tmp_path / "run", tmp_path / "merged"
    adapters = ["backward.lora_r=4", "forward.lora_r=4", "arms=null", "rounds=1"]
    for only in (["prepare"], ["forward", "--round", "0"]):
        assert main(["run", str(recipe), *adapters, "--run", str(root), "--only", *only]) == 0
    capsys.readouterr()
    assert main(["merge", str(root), str(dest), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["difference"] <= told["allowed"]
    replies = []
    for model in (root, dest):
        assert main(["generate", str(model), "--prompt", "Which colour has Vage?", "--max-new-tokens", "8"]) == 0
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1]
    assert main(["merge", str(root), str(dest)]) == 2
    assert main(["merge", str(calm), str(tmp_path / "other")]) == 2
    assert "full model" in capsys.readouterr().err


def test_gc_removes_what_earlier_settings_made_and_the_run_stays_whole(
    recipe: Path, calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(calm, tmp_path / "run")
    again = ["run", str(recipe), "arms=null", "rounds=1", "--run", str(root)]
    assert main(again) == 0
    before = contents(root, capsys)
    assert main(["gc", str(root), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert any("no step names" in thing["why"] for thing in told["removed"])
    assert main(["gc", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {**told, "dry_run": False}
    assert {path.name for path in (root / "artifacts").iterdir()} == set(before)
    assert main(again) == 0
    assert contents(root, capsys) == before
    assert main(["gc", str(tmp_path)]) == 2


def test_doctor_ends_with_2_where_something_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfalign.doctor import Check

    answers = [Check("disk", "ok", "much"), Check("gpu", "warn", "none", "buy one")]
    monkeypatch.setattr("selfalign.doctor.checks", lambda run: iter(answers))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "warn gpu" in said
    assert "→ buy one" in said
    answers.append(Check("memory", "fail", "little", "close something"))
    assert main(["doctor", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], [check["state"] for check in told["checks"]]) == (False, ["ok", "warn", "fail"])


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_only_what_is_needed_is_asked_for(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb])
    assert capsys.readouterr().err.strip().endswith("the following arguments are required: RECIPE")


def test_every_verb_has_an_example_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    verbs = re.findall(r"^    (\w+) +\S", capsys.readouterr().out, re.MULTILINE)
    assert {"run", "export", "merge", "gc", "doctor", "report"} <= set(verbs)
    for verb in verbs:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert f"example: selfalign {verb} " in capsys.readouterr().out.replace("\n", " ") + " "


def test_generate_asks_the_last_model_of_a_run(calm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["generate", str(calm), "--prompt", "Which colour has Vage?", "--json", "--max-new-tokens", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Which colour has Vage?"


def test_one_section_runs_alone_and_says_what_it_needs(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "run")
    assert main(["run", str(recipe), "--run", root, "--only", "augment"]) == 2
    assert "run it first" in capsys.readouterr().err
    assert main(["run", str(recipe), "--run", root, "--only", "prepare"]) == 0
    assert main(["run", str(recipe), "--run", root, "--only", "nothing"]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["curate.treshold=3"], 2, "did you mean curate.threshold"),
        (["rounds=none"], 2, "rounds"),
        (["prepare.seed.path=./missing.jsonl"], 2, "prepare.seed.path"),
        (["model.path=./missing"], 2, "model.path"),
        (["augment.prompt_file=./missing.txt"], 2, "missing.txt"),
        (["curate.min_auc=1", "curate.min_rated=0"], 3, "curate.min_auc"),
        (["prepare.seed.held_out=32"], 3, "held out"),
    ],
)
def test_a_mistake_is_one_sentence_and_its_exit_code(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["run", str(recipe), *arguments, "--run", str(tmp_path / "run")]) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_an_empty_corpus_is_told_and_nothing_is_trained(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert main(["run", str(recipe), f"prepare.corpus.path={empty}", "--run", str(tmp_path / "run")]) == 3
    assert "empty.jsonl holds no record" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "artifacts").glob("train-*"))


def test_a_base_without_a_chat_template_is_told_so(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(base_folder(), tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert main(["run", str(recipe), f"model.path={bare}", "--run", str(tmp_path / "run")]) == 2
    assert "model.chat_template" in capsys.readouterr().err


def test_bad_rows_are_quarantined_and_no_good_row_is_lost(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (recipe.parent / "corpus.jsonl").read_bytes().splitlines()
    bad = [
        b"\xff\xfe",
        b'{"text": ',
        b'{"text": NaN}',
        b'{"text": "a", "text": "b"}',
        b"null",
        b'{"text": 3}',
        b'{"x": ""}',
    ]
    bad += [b'{"text": "' + b"a" * 10_000_000 + b'"}', b"[" * 5000, b'{"text": "\\ud800"}', b'{"text": " "}']
    mixed = tmp_path / "corpus.jsonl"
    mixed.write_bytes(b"\n".join(line for pair in zip(good, bad, strict=False) for line in pair) + b"\n")
    root = tmp_path / "run"
    assert main(["run", str(recipe), f"prepare.corpus.path={mixed}", "--run", str(root), "--only", "prepare"]) == 0
    step = next(s for s in status(root, capsys)["steps"] if s["name"] == "prepare.read_corpus")
    assert step["kept"] == len(bad)
    assert step["in"] == 2 * len(bad)
    assert sum(step["quarantined"].values()) == len(bad)
    assert step["rejected"] == {}


def test_killed_at_random_moments_a_run_ends_with_the_same_content(
    recipe: Path, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, chance = recipe.parent / "stormy", random.Random(3)
    command = [sys.executable, "-m", "selfalign", "run", str(recipe), "--run", str(root)]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(4, 16))
        process.kill()
        process.wait()
    assert main(command[3:]) == 0
    assert contents(root, capsys) == contents(calm, capsys)


@pytest.mark.slow
def test_ray_ends_with_the_same_content(
    recipe: Path, calm: Path, shared_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = recipe.parent / "ray"
    once = ["rounds=1", "arms=null"]
    assert main(["run", str(recipe), *once, "--run", str(root), "--backend", "ray"]) == 0
    made = contents(root, capsys)
    assert any(name.startswith("evaluate-") for name in made)
    assert made.items() <= contents(calm, capsys).items()


def test_a_folder_of_another_recipe_is_refused(
    recipe: Path, calm: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["run", str(recipe), "name=other", "--run", str(calm)]) == 2
    assert "holds a run of the recipe 'small'" in capsys.readouterr().err


def test_deepspeed_that_is_not_installed_is_told_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfalign.training.sharding.importlib.util.find_spec", lambda name: None)
    recipe = small.write(tmp_path / "recipe")
    asked = ["forward.deepspeed=zero2", "forward.num_processes=2", "--only", "prepare"]
    assert main(["run", str(recipe), "--run", str(tmp_path / "run"), *asked]) == 2
    assert "deepspeed=zero2 needs the extra" in capsys.readouterr().err
    assert not (tmp_path / "run" / "artifacts").exists()
