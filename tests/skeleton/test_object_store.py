"""A whole run in an object store: the same content as on disk, whatever kills it, and whenever the store is away."""

import json
import pickle
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from s3 import S3, Fault
from selfalign.backends.local import LocalBackend
from selfalign.cli import main
from selfalign.core.errors import ServiceError, UsageError
from selfalign.core.locations import Location, entries, files_in, located
from selfalign.core.store import Store
from selfalign.engines.config import ModelConfig
from selfalign.pipelines.runner import Runner, Silent
from skeleton.toy import Toy


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    script = tmp_path / "script.json"
    script.write_text(json.dumps([{"match": "nothing here", "reply": " "}]))
    texts = tuple(f"text number {n}" + (" nothing here" if n % 9 == 0 else "") for n in range(40))
    return Toy(ModelConfig(path=str(script), engine="scripted"), "digest of the script", texts)


def run(toy: Toy, root: Location) -> dict[str, str]:
    """The content of each step."""
    runner = Runner(toy.steps(), Store(root), LocalBackend(), Silent())
    runner.run()
    return {step.name: runner.artifact(step).manifest().sha256 for step in runner.steps}


def test_a_run_in_an_object_store_has_the_content_of_one_on_disk_and_leaves_no_more(
    toy: Toy, s3: S3, tmp_path: Path
) -> None:
    root = s3.folder()
    assert run(toy, root) == run(toy, tmp_path / "run")
    names = [name for name in files_in(root) if "metrics" not in name]
    assert names == [name for name in files_in(tmp_path / "run") if "metrics" not in name]
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []


def test_killed_at_random_moments_it_ends_with_the_same_content(toy: Toy, s3: S3, tmp_path: Path) -> None:
    big = replace(toy, texts=tuple(f"text {n}" for n in range(120)))
    root, recipe = s3.folder(), tmp_path / "toy.pickle"
    recipe.write_bytes(pickle.dumps(big))
    chance = random.Random(7)
    for _ in range(5):
        command = [sys.executable, "-m", "skeleton.drive", str(recipe), str(root)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "started\n"
        time.sleep(chance.uniform(0, 1.5))
        process.kill()
        process.wait()
    assert run(big, root) == run(big, tmp_path / "calm")


@pytest.mark.parametrize("fault", ["closed", "unavailable", "broken"])
def test_a_store_that_is_away_for_a_while_costs_nothing(toy: Toy, s3: S3, tmp_path: Path, fault: Fault) -> None:
    root = s3.folder()
    s3.fail(fault, after=60, lasts=2)
    found = run(toy, root)
    s3.mend()
    assert found == run(toy, tmp_path / "run")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["closed", "unavailable"])
def test_a_store_that_stays_away_ends_the_run_which_goes_on_when_it_is_back(
    toy: Toy, s3: S3, tmp_path: Path, fault: Fault
) -> None:
    root = s3.folder()
    for after in (0, 3, 25, 70):
        s3.fail(fault, after=after)
        with pytest.raises(ServiceError, match="the object store cannot be reached"):
            run(toy, root)
        s3.mend()
    assert run(toy, root) == run(toy, tmp_path / "run")


@pytest.mark.parametrize("verb", ["status", "show", "report"])
def test_a_run_in_an_object_store_is_read_like_any_other(
    toy: Toy, s3: S3, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = s3.folder()
    run(toy, root)
    assert main([verb, str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert [path.name for path in entries(root, "report.html")] == (["report.html"] if verb == "report" else [])


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("verb", ["status", "show", "report"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_store_that_is_away_is_told_to_whoever_reads(
    toy: Toy, s3: S3, verb: str, after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    root = s3.folder()
    run(replace(toy, rounds=1), root)
    s3.fail("unavailable", after=after)
    assert main([verb, str(root)]) == 69
    assert "the object store cannot be reached" in capsys.readouterr().err


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("verb", ["status", "show", "report"])
def test_a_store_that_refuses_is_no_outage_and_the_users_to_set_right(
    toy: Toy, s3: S3, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = s3.folder()
    run(replace(toy, rounds=1), root)
    s3.fail("forbidden")
    assert main([verb, str(root)]) == 2
    assert f"the object store refuses: {root}/run.json: Forbidden" in capsys.readouterr().err
    with pytest.raises(UsageError, match="the object store refuses: s3://"):
        run(toy, root)


def test_a_run_in_a_bucket_that_is_not_there_is_told_what_is_missing(toy: Toy, s3: S3) -> None:
    with pytest.raises(UsageError, match="The specified bucket does not exist; see that the bucket is there"):
        run(toy, located("s3://nobodys/run"))
