"""Jobs submitted to a real cluster: what they make, what they tell, which sources they run, and what is refused."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import small
from cluster.submitting import CHECKOUT, CUT, Job, asked, ray, start, state, submit
from clusters import Cluster
from selfalign.cli import main

PREPARE = ("python", "jobs/prepare.py", "recipes/demo.yaml", *CUT)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "submitted"


@pytest.fixture(scope="module")
def submitted(two_node_cluster: Cluster, run_folder: Path) -> Job:
    """The whole loop as a job."""
    loop = ("python", "jobs/backtranslate.py", "recipes/demo.yaml", "--run", str(run_folder), *CUT)
    return submit(two_node_cluster, *loop)


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """Another selfalign than the one that is installed: a word more in a comment."""
    copy = tmp_path / "changed" / "selfalign"
    shutil.copytree(CHECKOUT / "src" / "selfalign", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "__init__.py").open("a") as file:
        file.write("# changed\n")
    return copy


def digest_of(source: Path) -> str:
    ask = "from selfalign.core.identity import code_digest; print(code_digest())"
    told = subprocess.run(
        [sys.executable, "-c", ask], env={"PYTHONPATH": str(source.parent)}, capture_output=True, text=True, check=True
    )
    return told.stdout.strip()


def contents(root: Path, capsys: pytest.CaptureFixture[str]) -> object:
    capsys.readouterr()
    assert main(["status", str(root), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["artifacts"]


def codes(root: Path) -> set[str]:
    return {json.loads(path.read_bytes())["code"] for path in root.glob("artifacts/*/manifest.json")}


def test_a_submitted_job_makes_what_selfalign_run_makes(
    submitted: Job, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted.ended == "SUCCEEDED", submitted.printed
    demo = str(CHECKOUT / "recipes" / "demo.yaml")
    assert main(["run", demo, "--run", str(tmp_path / "here"), "--backend", "local", *CUT]) == 0
    assert contents(run_folder, capsys) == contents(tmp_path / "here", capsys)


def test_the_log_of_a_job_tells_how_it_goes_on_line_by_line(submitted: Job) -> None:
    lines = [json.loads(line) for line in submitted.log.splitlines() if line.startswith('{"time"')]
    assert {"step_started", "shard_done", "logged", "step_done"} <= {line["event"] for line in lines}
    assert [line["step"] for line in lines if line["event"] == "step_done"][-1] == "evaluate.forward@1"


def test_neither_the_jobs_api_nor_any_file_tells_a_secret_of_the_environment(
    two_node_cluster: Cluster, submitted: Job, run_folder: Path, canary: str
) -> None:
    listed = ray(two_node_cluster, "job", "list")
    assert submitted.id in listed.stdout
    told = [submitted.printed, submitted.log, listed.stdout, listed.stderr, asked(two_node_cluster, "/api/jobs/")]
    told += [asked(two_node_cluster, f"/api/v0/{what}?detail=True") for what in ("jobs", "actors", "tasks", "workers")]
    token = two_node_cluster.token_file.read_text()
    assert not [text for text in told if canary in text or token in text]
    folders = (two_node_cluster.temporary, two_node_cluster.token_file.parent, run_folder)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    hits = [path for path in files if any(secret.encode() in path.read_bytes() for secret in (canary, token))]
    assert hits == [two_node_cluster.token_file]
    assert len(files) > 100


def test_a_job_that_is_stopped_ends_by_itself(two_node_cluster: Cluster, tmp_path: Path) -> None:
    endless = (*CUT, "backward.max_steps=1000000", "--run", str(tmp_path / "run"))
    command = ("python", "jobs/backtranslate.py", "recipes/demo.yaml", *endless)
    submitted = ("submit", "--submission-id", "endless", "--no-wait", "--working-dir", ".", "--", *command)
    assert ray(two_node_cluster, "job", *submitted).returncode == 0
    until = time.monotonic() + 120
    while '"event": "logged"' not in (log := json.loads(asked(two_node_cluster, "/api/jobs/endless/logs"))["logs"]):
        assert time.monotonic() < until, log
        time.sleep(0.5)
    ray(two_node_cluster, "job", "stop", "endless")
    assert json.loads(asked(two_node_cluster, "/api/jobs/endless"))["status"] == "STOPPED"
    log = json.loads(asked(two_node_cluster, "/api/jobs/endless/logs"))["logs"]
    assert log.splitlines()[-1].startswith("selfalign: stopped by SIGTERM; the same command goes on")


def test_a_run_folder_in_the_copy_that_ray_makes_is_refused(two_node_cluster: Cluster) -> None:
    refused = submit(two_node_cluster, *PREPARE)
    assert refused.ended == "FAILED"
    assert "exit code 2" in refused.printed
    assert "name one that lasts and that all nodes see, as in --run" in refused.log


def test_changed_sources_travel_as_py_modules_to_the_driver_and_its_workers(
    two_node_cluster: Cluster, changed: Path, tmp_path: Path
) -> None:
    runtime = json.dumps({"working_dir": str(CHECKOUT), "py_modules": [str(changed)]})
    command = (*PREPARE, "--run", str(tmp_path / "run"))
    job = submit(two_node_cluster, *command, runtime=("--runtime-env-json", runtime))
    assert job.ended == "SUCCEEDED", job.log
    # The driver wrote its own digest, and its workers refuse to work for another.
    assert codes(tmp_path / "run") == {digest_of(changed)} != {digest_of(CHECKOUT / "src" / "selfalign")}


def driven(cluster: Cluster, tmp_path: Path, python_path: str | None, *overrides: str) -> tuple[int, str]:
    """A job in a process of its own, as a driver of the cluster from outside."""
    recipe = small.write(tmp_path / "recipe")
    command = [sys.executable, str(CHECKOUT / "jobs" / "prepare.py"), str(recipe), "--run", str(tmp_path / "run")]
    environment = dict(cluster.environment) | ({} if python_path is None else {"PYTHONPATH": python_path})
    done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def test_a_driver_whose_workers_have_other_sources_is_refused(
    two_node_cluster: Cluster, changed: Path, tmp_path: Path
) -> None:
    code, told = driven(two_node_cluster, tmp_path, str(changed.parent))
    assert code == 2, told
    assert "other selfalign sources than the driver" in told.splitlines()[-1]


@pytest.fixture
def changed_node(two_node_cluster: Cluster, changed: Path) -> Iterator[None]:
    """One more node, with the only GPU and other sources."""
    python_path = {"PYTHONPATH": f"{changed.parent}:{two_node_cluster.environment['PYTHONPATH']}"}
    node = two_node_cluster.add_node(cpus=1, gpus=1, environment=python_path)
    yield
    node.kill()


def test_a_node_with_other_sources_is_refused(two_node_cluster: Cluster, changed_node: None, tmp_path: Path) -> None:
    code, told = driven(two_node_cluster, tmp_path, None, "resources.prepare.gpus=1")
    assert code == 2, told
    assert "other selfalign sources than the driver" in told.splitlines()[-1]


def strike(cluster: Cluster, what: str) -> bool:
    """SIGKILL a worker, the job's driver, a node or the head; whether there was one."""
    match what:
        case "head":
            cluster.kill_head()
            cluster.restart_head()
        case "node":
            cluster.nodes.pop().kill()
            cluster.add_node(cpus=1)
        case _:
            found = [process for node in (cluster.head, *cluster.nodes) for process in node.processes()]
            hit = [process for process in found if is_a(what, process)]
            for process in hit[:1]:
                process.kill()
            return bool(hit)
    return True


def is_a(what: str, process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    if what == "worker":
        return bool(words) and words[0].startswith("ray::Worker")
    return len(words) > 1 and Path(words[0]).name.startswith("python") and words[1] == "jobs/backtranslate.py"


def test_a_job_that_is_killed_again_and_again_makes_what_it_would_have_made(
    two_node_cluster: Cluster, submitted: Job, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance, run = random.Random(0), tmp_path / "run"
    loop = ("python", "jobs/backtranslate.py", "recipes/demo.yaml", "--run", str(run), *CUT)
    kinds = ("worker", "driver", "head", "node")
    plan = [kinds[n % len(kinds)] for n in range(int(os.environ.get("JOB_KILLS", "3")))]
    job = start(two_node_cluster, *loop)
    while (now := state(two_node_cluster, job)) != "SUCCEEDED" or plan:
        if now in ("FAILED", "STOPPED", "SUCCEEDED"):
            assert now != "SUCCEEDED" or not plan, f"it was done before {plan}"
            job = start(two_node_cluster, *loop)
        elif plan and any(run.glob("artifacts/*")):
            time.sleep(chance.uniform(0, 3))
            if strike(two_node_cluster, plan[0]) and plan.pop(0) == "head":
                # What the cluster knew of the job went with it.
                job = start(two_node_cluster, *loop)
        time.sleep(1)
    assert contents(run, capsys) == contents(run_folder, capsys)
