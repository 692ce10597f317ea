"""The contract that carries everything: identity, ledger, reuse, one commit, bounded retries, gates and stops."""

import json
import pickle
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from selfalign.backends.local import LocalBackend
from selfalign.core.errors import GateError, MismatchError, PreemptedError, StorageError
from selfalign.core.records import Candidate
from selfalign.core.shards import ShardReport
from selfalign.core.stage import Step
from selfalign.core.store import Store
from selfalign.core.tables import read_outcomes
from selfalign.engines.config import ModelConfig
from selfalign.engines.open import release
from selfalign.pipelines.runner import Runner, Silent
from skeleton.toy import Toy

NAMES = [f"{name}@{k}" for k in (1, 2) for name in ("augment.ask", "curate.keep", "forward.train")]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    script = tmp_path / "script.json"
    script.write_text(json.dumps([{"match": "nothing here", "reply": " "}]))
    texts = tuple(f"text number {n}" + (" nothing here" if n % 9 == 0 else "") for n in range(40))
    return Toy(ModelConfig(path=str(script), engine="scripted"), "digest of the script", texts)


class Counting(Silent):
    """Notes which steps really ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.notes: list[str] = []

    def step_started(self, step: Step, total: int | None) -> None:
        self.ran.append(step.name)

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(toy: Toy, root: Path, backend: object | None = None) -> Runner:
    runner = Runner(toy.steps(), Store(root), backend or LocalBackend(), Counting())
    runner.run()
    return runner


def ran(runner: Runner) -> list[str]:
    assert isinstance(runner.listener, Counting)
    return runner.listener.ran


def contents(toy: Toy, root: Path) -> dict[str, str]:
    runner = Runner(toy.steps(), Store(root), LocalBackend(), Silent())
    return {step.name: runner.artifact(step).manifest().sha256 for step in runner.steps}


def rows(toy: Toy, root: Path, name: str) -> list[object]:
    runner = Runner(toy.steps(), Store(root), LocalBackend(), Silent())
    step = next(s for s in runner.steps if s.name == name)
    return [row for shard in runner.artifact(step).shards() for row in read_outcomes(shard, Candidate)]


def test_a_second_run_reuses_everything(toy: Toy, tmp_path: Path) -> None:
    assert ran(run(toy, tmp_path / "run")) == ["prepare.read", *NAMES]
    before = contents(toy, tmp_path / "run")
    assert ran(run(toy, tmp_path / "run")) == []
    assert contents(toy, tmp_path / "run") == before


@pytest.mark.parametrize(
    ("change", "reruns"),
    [
        ({"threshold": 9}, ["curate.keep@1", "forward.train@1", "augment.ask@2", "curate.keep@2", "forward.train@2"]),
        ({"candidates": 3}, NAMES),
        ({"seed": 1}, NAMES),
        ({"shard_rows": 32}, ["prepare.read", *NAMES]),
        ({"model_digest": "another"}, NAMES),
        ({"min_kept": 2}, []),
        ({"rounds": 1}, []),
        ({"stop_below": 1}, ["forward.train@1", "augment.ask@2", "curate.keep@2", "forward.train@2"]),
        ({"texts": ("another",)}, ["prepare.read", *NAMES]),
    ],
)
def test_changing_a_key_runs_exactly_the_steps_that_follow_from_it(
    toy: Toy, tmp_path: Path, change: dict[str, object], reruns: list[str]
) -> None:
    run(toy, tmp_path / "run")
    changed = replace(toy, **change)
    if change == {"texts": ("another",)}:
        changed = replace(changed, texts=(*toy.texts, "another"))
    assert ran(run(changed, tmp_path / "run")) == reruns


def test_the_slots_of_an_engine_join_identity(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path / "run")
    assert ran(run(replace(toy, model=toy.model.model_copy(update={"slots": 4})), tmp_path / "run")) == NAMES


def test_every_step_accounts_for_every_unit(toy: Toy, tmp_path: Path) -> None:
    runner = run(toy, tmp_path / "run")
    ledgers = {step.name: runner.artifact(step).manifest().ledger for step in runner.steps}
    empty = sum("nothing here" in text for text in toy.texts)
    assert ledgers["augment.ask@1"] == {
        "sources": 40,
        "in": 80,
        "kept": 80 - 2 * empty,
        "rejected": {"empty": 2 * empty},
        "quarantined": {},
        "noted": {},
    }


def test_a_stop_skips_what_comes_after_it_and_the_run_is_complete(toy: Toy, tmp_path: Path) -> None:
    runner = run(replace(toy, stop_below=1000), tmp_path / "run")
    states = [runner.states[step.key] for step in runner.steps]
    assert states == ["done"] * 4 + ["skipped"] * 3


def test_a_failed_gate_ends_the_run_and_reads_the_same_the_second_time(toy: Toy, tmp_path: Path) -> None:
    strict = replace(toy, min_kept=1000)
    for _ in range(2):
        runner = Runner(strict.steps(), Store(tmp_path / "run"), LocalBackend(), Counting())
        with pytest.raises(GateError, match="rows kept, 1000 wanted"):
            runner.run()
        assert runner.states["curate.keep@1"] == "failed"
        assert runner.states["forward.train@1"] == "waiting"
    assert ran(run(toy, tmp_path / "run"))[0] == "forward.train@1"


def test_an_input_whose_bytes_changed_is_an_error(toy: Toy, tmp_path: Path) -> None:
    runner = run(toy, tmp_path / "run")
    shard = runner.artifact(runner.steps[1]).shards()[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match="is not what"):
        run(replace(toy, threshold=9), tmp_path / "run")


def test_a_reused_artifact_made_from_other_bytes_is_an_error(toy: Toy, tmp_path: Path) -> None:
    runner = run(toy, tmp_path / "run")
    manifest = runner.artifact(runner.steps[1]).folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(runner.artifact(runner.steps[0]).manifest().sha256, "0" * 64))
    with pytest.raises(MismatchError, match="made from other data"):
        run(toy, tmp_path / "run")


def start(toy: Toy, root: Path) -> "subprocess.Popen[str]":
    recipe = root.with_suffix(".pickle")
    recipe.write_bytes(pickle.dumps(toy))
    command = [sys.executable, "-m", "skeleton.drive", str(recipe), str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "started\n"
    return process


def test_killed_at_random_moments_it_ends_with_the_same_content(toy: Toy, tmp_path: Path) -> None:
    big = replace(toy, texts=tuple(f"text {n}" for n in range(400)), shard_rows=8)
    run(big, tmp_path / "calm")
    chance = random.Random(7)
    for _ in range(8):
        process = start(big, tmp_path / "stormy")
        time.sleep(chance.uniform(0, 0.6))
        process.kill()
        process.wait()
    run(big, tmp_path / "stormy")
    assert contents(big, tmp_path / "stormy") == contents(big, tmp_path / "calm")


def poisoned(toy: Toy, tmp_path: Path) -> Toy:
    script = tmp_path / "poison.json"
    script.write_text(json.dumps([{"match": "number 13", "action": "exit"}]))
    return replace(toy, model=ModelConfig(path=str(script), engine="scripted"), rounds=1)


def surviving(toy: Toy, root: Path) -> tuple[list[str], dict[str, tuple[str, int]]]:
    found = rows(toy, root, "augment.ask@1")
    dropped = {r.id: (r.reason, r.units) for r in found if not isinstance(r, Candidate) and r.outcome == "quarantined"}
    return [r.id for r in found if isinstance(r, Candidate)], dropped


def test_a_row_that_kills_the_driver_is_quarantined_after_three_deaths(toy: Toy, tmp_path: Path) -> None:
    poison = poisoned(toy, tmp_path)
    deaths = 0
    while start(poison, tmp_path / "run").wait() != 0:
        deaths += 1
        assert deaths < 10
    kept, dropped = surviving(poison, tmp_path / "run")
    assert deaths == 3
    assert dropped == {"doc/0013": ("crashed_worker", 2)}
    assert len(kept) == 78


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ray_workers_make_the_same_bytes_as_this_process(
    toy: Toy, tmp_path: Path, shared_ray: None, workers: int
) -> None:
    from selfalign.backends.ray import RayBackend

    run(toy, tmp_path / "local")
    run(replace(toy, workers=workers), tmp_path / "ray", RayBackend())
    assert contents(toy, tmp_path / "ray") == contents(toy, tmp_path / "local")


def test_either_backend_resumes_the_others_run(toy: Toy, tmp_path: Path, shared_ray: None) -> None:
    from selfalign.backends.ray import RayBackend

    run(replace(toy, rounds=1), tmp_path / "run")
    assert ran(run(toy, tmp_path / "run", RayBackend())) == NAMES[3:]


class Ended(Counting):
    """Asked to end after so many shards."""

    def __init__(self, shards: int) -> None:
        super().__init__()
        self.left = shards

    def shard_done(self, step: Step, report: ShardReport) -> None:
        self.left -= 1
        if self.left < 0:
            raise PreemptedError("stopped; the same command goes on")


def test_more_ray_workers_go_on_from_what_one_has_done_and_leave_it_untouched(
    toy: Toy, tmp_path: Path, shared_ray: None
) -> None:
    from selfalign.backends.ray import RayBackend

    many = replace(toy, rounds=1, shard_rows=4, workers=1)
    run(many, tmp_path / "local")
    with pytest.raises(PreemptedError):
        Runner(many.steps(), Store(tmp_path / "run"), RayBackend(), Ended(3)).run()
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("shard-*")}
    assert len([path for path in before if path.parent.name.startswith("augment.ask")]) in range(4, 10)
    run(replace(many, workers=4), tmp_path / "run", RayBackend())
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before
    assert contents(many, tmp_path / "run") == contents(many, tmp_path / "local")


def test_a_row_that_kills_ray_workers_is_quarantined_and_the_rest_completes(
    toy: Toy, tmp_path: Path, shared_ray: None
) -> None:
    from selfalign.backends.ray import RayBackend

    poison = poisoned(toy, tmp_path)
    run(poison, tmp_path / "run", RayBackend())
    kept, dropped = surviving(poison, tmp_path / "run")
    assert dropped == {"doc/0013": ("crashed_worker", 2)}
    assert len(kept) == 78


@pytest.fixture(autouse=True)
def _no_engine_left() -> None:
    release()
