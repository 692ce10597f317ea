"""The jobs: each is one call of the command line, and in a row they make what `selfalign run` makes."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import small
from selfalign.cli import main
from selfalign.pipelines.backtranslate import steps
from selfalign.pipelines.externals import Externals
from selfalign.recipe import load

JOBS = Path(__file__).parents[1] / "jobs"
FILES = sorted(JOBS.glob("*.py"))
SHAPE = re.compile(
    r'"""[A-Z][^\n]+\."""\n\nimport sys\n\nfrom selfalign\.cli import main\n\n'
    r'sys\.exit\(main\(\["run", (?:"--only", "(?P<section>\w+)", )?\*sys\.argv\[1:\]\]\)\)\n'
)
QUICK = ("arms=null", "rounds=1", "backward.max_steps=1", "forward.max_steps=2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write(tmp_path_factory.mktemp("small"))


def job(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(JOBS / f"{name}.py"), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def contents(root: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["status", str(root), "--json"]) == 0
    artifacts: list[dict[str, str]] = json.loads(capsys.readouterr().out)["artifacts"]
    return artifacts


def test_there_is_a_job_for_every_section_of_a_recipe_and_one_for_all(recipe: Path) -> None:
    sections = {step.section for step in steps(load(recipe, []), Externals())}
    assert {path.stem for path in FILES} == {*sections, "backtranslate"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_job_is_a_docstring_and_one_call_of_the_command_line(path: Path) -> None:
    found = SHAPE.fullmatch(path.read_text())
    assert found is not None
    assert found["section"] == (None if path.stem == "backtranslate" else path.stem)
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_jobs_in_a_row_make_what_one_run_makes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row, whole = tmp_path / "row", tmp_path / "whole"
    for name, *arguments in (
        ("prepare",),
        ("backward",),
        ("augment",),
        ("forward", "--round", "0"),
        ("curate", "--round", "1"),
        ("forward", "--round", "1"),
        ("evaluate",),
    ):
        assert job(monkeypatch, name, str(recipe), "--run", str(row), *arguments, *QUICK) == 0
    assert job(monkeypatch, "backtranslate", str(recipe), "--run", str(whole), *QUICK) == 0
    made = contents(row, capsys)
    assert made == contents(whole, capsys)
    assert len(made) > 15


@pytest.mark.parametrize(
    ("early", "first"), [("augment", "jobs/prepare.py"), ("backward", "jobs/prepare.py"), ("curate", "jobs/prepare.py")]
)
def test_a_job_whose_inputs_are_missing_names_the_job_that_makes_them(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    early: str,
    first: str,
) -> None:
    assert job(monkeypatch, early, str(recipe), "--run", str(tmp_path / "run"), *QUICK) == 2
    assert f"run it first, by {first} or --only {Path(first).stem}" in capsys.readouterr().err


def test_a_round_s_job_names_the_round_that_it_needs(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = ["--run", str(tmp_path / "run"), *QUICK, "curate.injections=0"]
    for name in ("prepare", "backward", "augment"):
        assert job(monkeypatch, name, str(recipe), *ran) == 0
    assert job(monkeypatch, "curate", str(recipe), *ran) == 2
    assert "by jobs/forward.py --round 0 or --only forward --round 0" in capsys.readouterr().err


def test_a_run_folder_in_ray_s_copy_of_a_job_s_folder_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    for arguments in ([], ["--run", "runs/mine"], ["--run", str(copy / "mine")]):
        assert job(monkeypatch, "prepare", str(recipe), *arguments) == 2
        assert "name one that lasts and that all nodes see" in capsys.readouterr().err
    assert not list(copy.iterdir())
