"""Runs in an object store on a cluster whose nodes share nothing else: each has its own scratch folder."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from backends.placed import build_job
from backends.ray_ranked import Tiny
from cluster.submitting import CHECKOUT, CUT, asked, ray
from clusters import Cluster
from s3 import S3
from selfalign.backends.local import LocalBackend
from selfalign.backends.ray import RayBackend
from selfalign.backends.ray_train import build_ranks
from selfalign.cli import main
from selfalign.core.errors import UsageError
from selfalign.core.identity import code_digest
from selfalign.core.locations import Location, files_in
from selfalign.core.stage import Resources
from selfalign.core.store import Store
from selfalign.engines.config import ModelConfig
from selfalign.pipelines.runner import Runner, Silent
from skeleton.toy import Toy
from training.resumable import Case

WITHIN_S = 300


@pytest.fixture(scope="module")
def cluster(_s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and a node of two CPUs, which have the store's keys in their environment."""
    folder = tmp_path_factory.mktemp("cluster")
    with patch.dict(os.environ, {"SELFALIGN_SCRATCH": str(folder / "the head's")}):
        made = Cluster(folder, dashboard=True)
    try:
        made.add_node(cpus=2, environment={"SELFALIGN_SCRATCH": str(folder / "the node's")})
        yield made
    finally:
        made.close()


def status(root: Location, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Empty while there is no run."""
    capsys.readouterr()
    found = main(["status", str(root), "--json"]) == 0
    told = capsys.readouterr().out
    document: dict[str, Any] = json.loads(told) if found else {}
    return document


def test_a_run_by_ray_workers_has_the_content_of_one_on_disk_though_a_row_kills_them(
    cluster: Cluster, s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, recipe, root = tmp_path / "script.json", tmp_path / "toy.pickle", s3.folder()
    script.write_text(json.dumps([{"match": "number 13", "action": "exit"}, {"match": "number 7", "reply": " "}]))
    texts = tuple(f"text number {n}" for n in range(40))
    toy = Toy(ModelConfig(path=str(script), engine="scripted"), "digest of the script", texts)
    recipe.write_bytes(pickle.dumps(toy))
    with cluster.connected():
        Runner(toy.steps(), Store(root), RayBackend(), Silent()).run()
    # In each of two rounds three drivers die of the row.
    deaths = 0
    while subprocess.run([sys.executable, "-m", "skeleton.drive", str(recipe), str(tmp_path / "run")]).returncode:
        deaths += 1
        assert deaths <= 6
    found = status(root, capsys)
    assert found["artifacts"] == status(tmp_path / "run", capsys)["artifacts"]
    assert [step["quarantined"] for step in found["steps"] if step["name"] == "augment.ask@1"] == [
        {"crashed_worker": 2}
    ]


def test_a_submitted_run_is_seen_while_it_goes_on_and_makes_what_one_on_disk_makes(
    cluster: Cluster, s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = s3.folder()
    command = ("python", "jobs/backtranslate.py", "recipes/demo.yaml", "--run", str(root), *CUT)
    begun = ray(cluster, "job", "submit", "--submission-id", "s3", "--no-wait", "--working-dir", ".", "--", *command)
    assert begun.returncode == 0, begun.stderr
    seen: list[set[str]] = []
    until = time.monotonic() + WITHIN_S
    while (job := json.loads(asked(cluster, "/api/jobs/s3")))["status"] in ("PENDING", "RUNNING"):
        assert time.monotonic() < until
        seen.append({step["state"] for step in status(root, capsys).get("steps", [])})
        time.sleep(0.5)
    assert job["status"] == "SUCCEEDED", json.loads(asked(cluster, "/api/jobs/s3/logs"))["logs"]
    assert {"done", "running", "waiting"} in seen
    demo = str(CHECKOUT / "recipes" / "demo.yaml")
    assert main(["run", demo, "--run", str(tmp_path / "run"), "--backend", "local", *CUT]) == 0
    found = status(root, capsys)
    assert found["complete"]
    assert found["artifacts"] == status(tmp_path / "run", capsys)["artifacts"]
    # The store's keys are the nodes' own, and travel with no job.
    assert "AWS_" not in asked(cluster, "/api/jobs/")


def test_ranks_share_one_node_and_a_training_in_them_has_the_weights_of_torchrun(
    cluster: Cluster, s3: S3, tmp_path: Path
) -> None:
    settings = {"lora_r": 8, "num_processes": 2, "deepspeed": "zero2", "per_device_train_batch_size": 2}
    stage, root = Tiny(Case(settings), str(tmp_path)), s3.folder() / "artifacts" / "tiny-identity"
    with build_job(stage, tmp_path / "disk", Resources()) as job:
        expected = LocalBackend().build(job, lambda _: None)
    with cluster.connected(), build_job(stage, root, Resources()) as job:
        committed = build_ranks(job, 2, code_digest(), lambda _: None)
    content = expected.built.content
    assert committed.built.content == content
    assert [committed.files[name] for name in content] == [expected.files[name] for name in content]
    assert sorted(committed.files) == files_in(root / "files")


def test_ranks_that_no_single_node_can_hold_are_refused_at_once(cluster: Cluster, s3: S3, tmp_path: Path) -> None:
    told = r"one node must hold all 3 ranks: no node can give a worker 3 CPUs .* with (1|2) CPUs .*; 1 with (1|2) CPUs"
    stage = Tiny(Case({"num_processes": 3}), str(tmp_path))
    with cluster.connected(), build_job(stage, s3.folder(), Resources()) as job, pytest.raises(UsageError, match=told):
        build_ranks(job, 3, code_digest(), lambda _: None)
