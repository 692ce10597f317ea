"""Workers of a real cluster of several nodes: where they are, what they have, and what happens when they are lost."""

import json
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import psutil
import pytest

import selfalign
from backends.placed import Made, Opening, Saving, Where, build_job, map_job, pids, wait_for
from clusters import Cluster
from selfalign.backends.local import LocalBackend
from selfalign.core import preemption
from selfalign.core.errors import GateError, InternalError, PreemptedError, UsageError
from selfalign.core.shards import ShardReport
from selfalign.core.stage import Resources, Workers
from selfalign.core.tables import read_outcomes
from signals import handled

pytest.importorskip("ray", reason="needs the extra `ray`")
from selfalign.backends.ray import RayBackend

pytestmark = pytest.mark.cluster

ONE_GPU = Resources(gpus=1, workers=Workers(max=4))


class Nodes:
    """A head without GPUs, and two nodes with two each."""

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder, cpus=2)
        try:
            self.nodes = [self.cluster.add_node(cpus=2, gpus=2) for _ in range(2)]
        except BaseException:
            self.cluster.close()
            raise


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    made = Nodes(tmp_path_factory.mktemp("cluster"))
    try:
        with made.cluster.connected():
            yield made
    finally:
        made.cluster.close()


@pytest.fixture
def backend(nodes: Nodes) -> Iterator[RayBackend]:
    made = RayBackend()
    yield made
    made.close()


@pytest.fixture
def meeting(tmp_path: Path) -> Path:
    folder = tmp_path / "meeting"
    folder.mkdir()
    return folder


def ignore(_: ShardReport) -> None:
    pass


def places(folder: Path) -> list[dict[str, object]]:
    """Where each shard's first row was made."""
    found = []
    for path in sorted(folder.glob("shard-*.parquet")):
        row = next(iter(read_outcomes(path, Where.output)))
        found.append(json.loads(row.text))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.parquet")}


def locally(stage: Where, folder: Path, shards: int) -> dict[str, bytes]:
    LocalBackend().map(map_job(stage, folder, shards, Resources()), ignore)
    return contents(folder)


def test_four_workers_have_each_a_device_of_their_own(backend: RayBackend, tmp_path: Path, meeting: Path) -> None:
    backend.map(map_job(Where(str(meeting), meet=4), tmp_path / "step", 4, ONE_GPU), ignore)
    found = places(tmp_path / "step")
    assert len({place["node"] for place in found}) == 2
    assert len({(place["node"], place["devices"]) for place in found}) == 4
    assert {place["devices"] for place in found} == {"0", "1"}


def test_a_worker_that_asks_for_two_gpus_gets_both_of_one_node(
    backend: RayBackend, tmp_path: Path, meeting: Path
) -> None:
    both = Resources(gpus=2, workers=Workers(max=2))
    backend.map(map_job(Where(str(meeting), meet=2), tmp_path / "step", 2, both), ignore)
    found = places(tmp_path / "step")
    assert len({place["node"] for place in found}) == 2
    assert {str(place["devices"]) for place in found} <= {"0,1", "1,0"}


def test_workers_may_share_a_gpu(backend: RayBackend, tmp_path: Path, meeting: Path) -> None:
    half = Resources(cpus=0.25, gpus=0.5, workers=Workers(max=8))
    with pytest.raises(UsageError, match=r"there is room for 8 workers of 0.25 CPUs and 0.5 GPUs, not 9"):
        backend.map(map_job(Where(str(meeting)), tmp_path / "no", 9, many(half, 9)), ignore)
    backend.map(map_job(Where(str(meeting), meet=5), tmp_path / "step", 5, half), ignore)
    found = [(place["node"], place["devices"]) for place in places(tmp_path / "step")]
    assert len(found) == 5
    assert len(set(found)) <= 4


def many(resources: Resources, number: int) -> Resources:
    return resources.model_copy(update={"workers": Workers(min=number, max=number)})


def test_a_step_without_gpus_goes_where_there_are_none(backend: RayBackend, tmp_path: Path, meeting: Path) -> None:
    import ray

    backend.map(map_job(Where(str(meeting), meet=2), tmp_path / "step", 2, Resources()), ignore)
    without = {node["NodeID"] for node in ray.nodes() if node["Alive"] and "GPU" not in node["Resources"]}
    assert {place["node"] for place in places(tmp_path / "step")} == without


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        (Resources(gpus=3), "no node can give a worker 1 CPUs and 3 GPUs"),
        (Resources(cpus=64), "no node can give a worker 64 CPUs and 0 GPUs"),
        (many(ONE_GPU, 5), "there is room for 4 workers of 1 CPUs and 1 GPUs, not 5"),
    ],
)
def test_what_the_cluster_can_never_give_is_refused_with_what_it_has(
    backend: RayBackend, tmp_path: Path, meeting: Path, resources: Resources, told: str
) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        backend.map(map_job(Where(str(meeting)), tmp_path / "step", 1, resources), ignore)
    assert "1 with 2 CPUs and 0 GPUs" in str(caught.value)
    assert "2 with 2 CPUs and 2 GPUs" in str(caught.value)
    assert list(meeting.iterdir()) == []


def test_workers_are_kept_for_a_step_with_the_same_share_and_given_back_for_another(
    backend: RayBackend, tmp_path: Path, meeting: Path
) -> None:
    two = Resources(workers=Workers(min=1, max=2))
    backend.map(map_job(Where(str(meeting), meet=2), tmp_path / "1", 2, two), ignore)
    first = {place["pid"] for place in places(tmp_path / "1")}
    backend.map(map_job(Where(str(meeting)), tmp_path / "2", 1, Resources(workers=Workers(max=1))), ignore)
    second = {place["pid"] for place in places(tmp_path / "2")}
    assert second < first
    backend.map(map_job(Where(str(meeting)), tmp_path / "3", 1, Resources(cpus=0.5)), ignore)
    third = {place["pid"] for place in places(tmp_path / "3")}
    assert not third & first
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in first))
    backend.close()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in third))


def test_a_stages_error_arrives_as_itself_and_all_workers_are_given_back(
    backend: RayBackend, tmp_path: Path, meeting: Path
) -> None:
    stage = Where(str(meeting), meet=2, error="the loss is nan")
    with pytest.raises(GateError, match="the loss is nan") as caught:
        backend.map(map_job(stage, tmp_path / "step", 4, Resources()), ignore)
    assert caught.value.exit_code == 3
    wait_for(lambda: not any(psutil.pid_exists(int(path.name)) for path in meeting.iterdir()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_ends_in_the_midst_of_a_shard(
    backend: RayBackend, tmp_path: Path, meeting: Path, number: signal.Signals
) -> None:
    def ask() -> None:
        wait_for(lambda: any(meeting.iterdir()))
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    # Nobody else comes: left alone, the step fails.
    job = map_job(Where(str(meeting), meet=9), tmp_path / "step", 4, Resources())
    asking.start()
    with handled(), pytest.raises(PreemptedError if number == signal.SIGTERM else KeyboardInterrupt):
        backend.map(job, ignore)
    asking.join()
    # No row is blamed for it.
    assert list((tmp_path / "step").glob("journal-*"))
    assert list((tmp_path / "step").glob("journal-*/*")) == []
    wait_for(lambda: not any(psutil.pid_exists(int(path.name)) for path in meeting.iterdir()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_asked_to_end_saves_itself_first(
    backend: RayBackend, tmp_path: Path, number: signal.Signals
) -> None:
    with (
        handled(),
        build_job(Saving(), tmp_path / "step", Resources()) as job,
        pytest.raises(PreemptedError if number == signal.SIGTERM else KeyboardInterrupt),
        preemption.delivered(),
    ):
        backend.build(job, lambda line: os.kill(os.getpid(), number))
    assert (tmp_path / "step/kept/saved").read_bytes() == b"all of it"


def test_a_build_that_is_done_when_it_is_asked_to_end_is_kept(backend: RayBackend, tmp_path: Path) -> None:
    committed = []
    with (
        handled(),
        build_job(Saving(done=True), tmp_path / "step", Resources()) as job,
        pytest.raises(PreemptedError),
        preemption.delivered(),
    ):
        committed.append(backend.build(job, lambda line: os.kill(os.getpid(), signal.SIGTERM)))
    assert [list(each.files) for each in committed] == [["made"]]


def test_a_run_folder_that_workers_do_not_see_is_refused(backend: RayBackend, tmp_path: Path, meeting: Path) -> None:
    written = tmp_path / "run" / "drivers" / "host-1.json"
    job = replace(map_job(Where(str(meeting)), tmp_path / "step", 1, Resources()), driver=written)
    with pytest.raises(UsageError, match=r"does not see what the driver writes to .*/run; put the run folder"):
        backend.map(job, ignore)


ONE = Resources(workers=Workers(max=1))


def test_a_worker_that_dies_again_and_again_as_it_opens_a_step_ends_it_with_rays_reason(
    backend: RayBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = tmp_path / "opened"
    told = r"3 workers in a row died before they had opened step; the last: .* OOM .*resources.<section>"
    with pytest.raises(InternalError, match=told):
        backend.map(map_job(Opening(str(opened), deaths=99), tmp_path / "step", 2, ONE), ignore)
    assert len(pids(opened)) == 3
    assert "a worker was lost before it had opened step, and is replaced: The actor died" in caplog.text


@pytest.mark.parametrize("then", ["die", "hang"])
def test_a_worker_that_dies_or_hangs_twice_as_it_opens_a_step_is_replaced(
    backend: RayBackend, tmp_path: Path, then: Literal["die", "hang"]
) -> None:
    opened = tmp_path / "opened"
    job = map_job(Opening(str(opened), 2, then), tmp_path / "step", 2, ONE)
    backend.map(replace(job, stall_minutes=0.02), ignore)
    assert len(pids(opened)) == 3
    assert len(contents(tmp_path / "step")) == 2


def test_a_worker_whose_node_is_lost_while_it_opens_a_step_is_replaced_on_another(
    nodes: Nodes, backend: RayBackend, tmp_path: Path
) -> None:
    opened = tmp_path / "opened"
    first = nodes.cluster.add_node(cpus=1, gpus=4)
    seconds = []

    def lose() -> None:
        wait_for(lambda: len(pids(opened)) == 1)
        first.kill()
        seconds.append(nodes.cluster.add_node(cpus=1, gpus=4))

    losing = threading.Thread(target=lose)
    losing.start()
    try:
        job = map_job(Opening(str(opened), 1, "hang"), tmp_path / "step", 2, Resources(gpus=4))
        backend.map(job, ignore)
        assert len(pids(opened)) == 2
        assert len(contents(tmp_path / "step")) == 2
    finally:
        losing.join()
        for node in [first, *seconds]:
            node.kill()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_killed_at_random_moments_leave_the_same_bytes(
    backend: RayBackend, tmp_path: Path, meeting: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Where(str(meeting), tells=False, pause_s=0.05)
    chance, reports = random.Random(workers), list[int]()

    def done(report: ShardReport) -> None:
        reports.append(report.number)
        if report.number % 4 == 0:
            with suppress(ProcessLookupError):
                os.kill(int(chance.choice(sorted(meeting.iterdir())).name), signal.SIGKILL)

    resources = Resources(cpus=0.5, workers=Workers(max=workers))
    backend.map(map_job(stage, tmp_path / "step", 24, resources), done)
    assert sorted(reports) == list(range(24))
    assert len(list(meeting.iterdir())) > workers
    assert re.search(
        r"a worker was lost at shard \d+ of step, and is replaced: The actor died .* pid: \d+", caplog.text
    )
    assert contents(tmp_path / "step") == locally(stage, tmp_path / "local", 24)


def test_a_worker_that_was_asked_to_end_is_replaced(backend: RayBackend, tmp_path: Path, meeting: Path) -> None:
    stage = Where(str(meeting), tells=False)

    def end_it(report: ShardReport) -> None:
        if report.number == 0:
            os.kill(int(next(meeting.iterdir()).name), signal.SIGTERM)

    backend.map(map_job(stage, tmp_path / "step", 12, Resources(workers=Workers(max=1))), end_it)
    assert len(contents(tmp_path / "step")) == 12


def test_what_a_build_measures_and_logs_arrives_while_it_runs(
    backend: RayBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard = tmp_path / "heard"
    with build_job(Made(str(heard)), tmp_path / "step", Resources()) as job:
        committed = backend.build(job, lambda line: heard.write_text(json.dumps(dict(line))) and None)
    assert json.loads(heard.read_text()) == {"attempt": 1}
    assert "attempt 1" in caplog.messages
    assert list(committed.files) == ["made"]


def test_a_build_whose_worker_dies_goes_on_in_another(backend: RayBackend, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    heard.touch()
    lines: list[float] = []
    with build_job(Made(str(heard), deaths=2), tmp_path / "step", Resources()) as job:
        committed = backend.build(job, lambda line: lines.append(line["attempt"]))
    pids = committed.built.metrics["pids"]
    assert isinstance(pids, list)
    assert len(set(pids)) == 3
    assert lines[-1] == 3
    assert (tmp_path / "step/files/made").read_text() == "whole"


@pytest.mark.parametrize(
    ("shadow", "told"),
    [
        ("empty", "a worker cannot load selfalign"),
        ("other", "has other selfalign sources"),
        ("deadly", "3 workers in a row died before they had opened step"),
    ],
)
def test_workers_with_other_sources_than_the_drivers_are_refused(
    nodes: Nodes, backend: RayBackend, tmp_path: Path, meeting: Path, shadow: str, told: str
) -> None:
    package = tmp_path / "sources/selfalign"
    if shadow == "other":
        shutil.copytree(Path(selfalign.__file__).parent, package)
    package.mkdir(parents=True, exist_ok=True)
    with (package / "__init__.py").open("a") as file:
        file.write("import os; os._exit(1)\n" if shadow == "deadly" else "# changed\n")
    path = f"{package.parent}{os.pathsep}{os.environ['PYTHONPATH']}"
    node = nodes.cluster.add_node(cpus=1, gpus=4, environment={"PYTHONPATH": path})
    try:
        with pytest.raises(InternalError if shadow == "deadly" else UsageError, match=told):
            backend.map(map_job(Where(str(meeting)), tmp_path / "step", 1, Resources(gpus=4)), ignore)
    finally:
        node.kill()


def test_when_a_node_is_lost_the_rest_finish(nodes: Nodes, backend: RayBackend, tmp_path: Path, meeting: Path) -> None:
    stage = Where(str(meeting), meet=4, tells=False, pause_s=0.1)

    def lose_one(_: ShardReport) -> None:
        if len(nodes.nodes) == 2:
            nodes.nodes.pop().kill()

    backend.map(map_job(stage, tmp_path / "step", 16, ONE_GPU), lose_one)
    assert contents(tmp_path / "step") == locally(stage, tmp_path / "local", 16)
