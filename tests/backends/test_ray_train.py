"""Builds of several ranks on a Ray cluster: heard, restarted where a rank is lost, ended, and as torchrun's."""

import asyncio
import json
import logging
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from backends.placed import build_job, wait_for
from backends.ray_ranked import Counted, Deadly, Tiny
from selfalign.backends.local import LocalBackend
from selfalign.core import preemption
from selfalign.core.errors import (
    GateError,
    InternalError,
    LeaseHeldError,
    PreemptedError,
    SelfalignError,
    UsageError,
)
from selfalign.core.identity import code_digest, file_digest
from selfalign.core.lease import Owner
from selfalign.core.protocols import BuildJob, Committed
from selfalign.core.stage import Log, Resources
from signals import handled
from training.resumable import Case

pytest.importorskip("ray", reason="needs the extra `ray`")
from selfalign.backends import ray_train
from selfalign.backends.ray_train import Group, build_ranks

LORA = {"lora_r": 8, "lora_dropout": 0.1, "num_processes": 2, "per_device_train_batch_size": 2}
LONG = {"num_train_epochs": 16, "save_steps": 10}
CASES = {"zero2-lora": Case({**LORA, **LONG, "deepspeed": "zero2"})}
if int(os.environ.get("TRAIN_KILLS", "3")) > 3:
    # By night, the rest.
    CASES["two-ranks-lora"] = Case({**LORA, **LONG})
    CASES["zero3-full"] = Case(
        {**LONG, "num_train_epochs": 8, "num_processes": 2, "deepspeed": "zero3", "per_device_train_batch_size": 2}
    )

Build = Callable[[BuildJob, Log], Committed]


def on_ray(job: BuildJob, log: Log) -> Committed:
    return build_ranks(job, 2, code_digest(), log)


def attempt(build: Build, stage: Counted | Tiny, folder: Path, log: Log = lambda _: None) -> Committed:
    with build_job(stage, folder, Resources()) as job, preemption.delivered():
        return build(job, log)


def rank_lives(folder: Path) -> bool:
    """Whether a process lives that built there as a rank."""
    return any(psutil.pid_exists(int(path.read_text())) for path in (folder / "kept").glob("rank-*"))


@pytest.mark.train
def test_an_error_that_a_rank_raises_is_raised_as_itself_and_not_tried_again(tmp_path: Path, shared_ray: None) -> None:
    import ray
    from ray.util import placement_group_table

    logged: list[Mapping[str, float]] = []
    with pytest.raises(GateError, match="nan at step 3"):
        attempt(on_ray, Counted("gate"), tmp_path, logged.append)
    assert logged == [{"step": 0.0}]
    assert sorted((tmp_path / "kept" / "starts").read_text().split()) == ["0", "1"]
    wait_for(lambda: not rank_lives(tmp_path))
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
    assert ray.available_resources()["CPU"] == 2


@pytest.mark.train
def test_ranks_that_lost_the_lease_end_and_say_so(tmp_path: Path, shared_ray: None) -> None:
    def take_over(_: Any) -> None:
        (tmp_path / "lease-000002.json").write_text(json.dumps(asdict(Owner("quicker", 1, "1", "other"))))

    with pytest.raises(LeaseHeldError, match="taken over by process 1 on quicker"):
        attempt(on_ray, Counted("wait"), tmp_path, take_over)
    wait_for(lambda: not rank_lives(tmp_path))


@pytest.mark.train
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_training_that_loses_a_rank_and_is_asked_to_end_ends_with_the_weights_of_torchrun(
    case: Case, tmp_path: Path, shared_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Tiny(case, str(tmp_path / "pids"))
    (tmp_path / "pids").mkdir()
    expected = attempt(LocalBackend().build, stage, tmp_path / "torchrun")

    resumed: list[int] = []
    deeds: dict[int, Callable[[], None]] = {
        0: lambda: os.kill(int((tmp_path / "pids" / "rank-1").read_text()), signal.SIGKILL),
        1: lambda: os.kill(os.getpid(), signal.SIGTERM),
    }

    def disturb(line: Mapping[str, float]) -> None:
        if "resumed_at" in line:
            resumed.append(int(line["resumed_at"]))
        elif line["step"] > (resumed[-1] if resumed else 0) + 12 and (deed := deeds.pop(len(resumed), None)):
            deed()

    with caplog.at_level(logging.INFO, "selfalign"):
        with handled(), pytest.raises(PreemptedError, match="SIGTERM"):
            attempt(on_ray, stage, tmp_path / "ray", disturb)
        assert "the ranks are started again, after rank 1: ActorDiedError" in caplog.text
        assert "going on from" in caplog.text
        assert not (tmp_path / "ray" / "files").exists()
        committed = attempt(on_ray, stage, tmp_path / "ray", disturb)
    assert not deeds
    assert len(resumed) == 2
    assert resumed[0] % 10 == 0 < resumed[0] < resumed[1]
    assert committed.built == expected.built
    assert {n: committed.files[n] for n in committed.built.content} == {
        n: expected.files[n] for n in expected.built.content
    }
    assert all(file_digest(tmp_path / "ray" / "files" / name) == sha256 for name, sha256 in committed.files.items())


def test_more_ranks_than_the_cluster_can_hold_are_refused_at_once(tmp_path: Path, shared_ray: None) -> None:
    told = r"room for 2 workers of 1 CPUs and 0 GPUs, not 3 .* with 2 CPUs"
    with build_job(Counted(), tmp_path, Resources()) as job, pytest.raises(UsageError, match=told):
        build_ranks(job, 3, code_digest(), lambda _: None)


def test_a_rank_has_one_gpu_or_none(tmp_path: Path, shared_ray: None) -> None:
    with build_job(Counted(), tmp_path, Resources(gpus=2)) as job, pytest.raises(UsageError, match=r"gpus=2 to 1"):
        build_ranks(job, 2, code_digest(), lambda _: None)


def test_ranks_that_are_lost_again_and_again_without_a_step_are_given_up() -> None:
    async def lost() -> SelfalignError | None:
        group = Group()
        for step in range(2 * ray_train.IN_VAIN):
            await group.begin(0)
            await group.say({"step": float(step)})
            assert await group.lose("rank 1: ActorDiedError")
        for _ in range(ray_train.IN_VAIN - 2):
            assert await group.begin(0) is None
            # What was reached before is no step further.
            await group.say({"step": 4.0})
            assert await group.lose("rank 1: ActorDiedError")
        assert not await group.lose("rank 1: ActorDiedError")
        return await group.begin(1)

    with pytest.raises(InternalError, match=r"5 times without one further step.*rank 1: ActorDiedError"):
        raise asyncio.run(lost()) or AssertionError


def test_ranks_that_die_before_they_begin_are_told_and_given_up() -> None:
    async def lost() -> tuple[list[Any], SelfalignError | None]:
        group = Group()
        for _ in range(ray_train.IN_VAIN - 1):
            assert await group.lose("rank 0: ActorDiedError")
        assert not await group.lose("rank 0: OutOfMemoryError")
        lines, error, _ = await group.heard()
        return lines, error

    lines, error = asyncio.run(lost())
    told = "the ranks are started again, after rank 0: ActorDiedError"
    assert [message for _, _, message in lines] == [told] * (ray_train.IN_VAIN - 1)
    with pytest.raises(InternalError, match=r"5 times without one further step.*rank 0: OutOfMemoryError"):
        raise error or AssertionError


def test_ranks_whose_node_is_taken_away_are_not_given_up_however_often_that_is_told() -> None:
    async def lost() -> list[Any]:
        group = Group()
        await group.begin(0)
        for _ in range(10 * ray_train.IN_VAIN):
            assert await group.lose("rank 0: ActorDiedError", taken=True)
        return (await group.heard())[0]

    assert len(asyncio.run(lost())) == 1


@pytest.mark.train
def test_ranks_that_die_as_they_are_started_end_the_build_with_the_reason(
    tmp_path: Path, shared_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    with pytest.raises(InternalError, match=r"lost 5 times without one further step.* The actor died .*RayTrainWorker"):
        attempt(on_ray, Deadly(), tmp_path)
    assert caplog.text.count("the ranks are started again, after ") == ray_train.IN_VAIN - 1
    wait_for(lambda: ray.available_resources().get("CPU") == 2)


def test_ranks_that_do_not_come_are_said_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "ROOM_S", -1)

    async def heard() -> list[Any]:
        group = Group()
        first, _, begun = await group.heard()
        assert not begun
        return [*first, *(await group.heard())[0]]

    ((_, level, message),) = asyncio.run(heard())
    assert level == logging.WARNING
    assert "no room" in message
    assert "die as they start" in message
