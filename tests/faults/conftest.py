"""What the fault suite shares: how many faults, processes forked from one that has everything loaded, folders in
memory."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("faults.runs")

from clusters import Cluster  # noqa: E402
from faults.runs import Driver, Forks, Run  # noqa: E402
from faults.toy import SlowToy  # noqa: E402
from selfalign.engines.config import ModelConfig  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are the fault suite's."""
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def kills() -> int:
    """How often is killed: N of `make test-faults`."""
    return int(os.environ.get("FAULT_KILLS", "20"))


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """The server of processes."""
    found = Forks()
    yield found
    found.close()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head on which nothing runs but drivers, and two nodes."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), cpus=0)
    try:
        for _ in range(2):
            made.add_node(cpus=2)
        yield made
    finally:
        made.close()


@pytest.fixture
def driver(cluster: Cluster) -> Iterator[Callable[[Run], Driver]]:
    """Makes drivers on the cluster, and starts them."""
    made: list[Driver] = []

    def start(run: Run) -> Driver:
        # A driver whose head is gone is told so by Ray after 60 s.
        made.append(Driver(run, {**cluster.environment, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where the system has one: what a test waits for is not the disk."""
    memory = Path("/dev/shm")
    found = Path(tempfile.mkdtemp(prefix="selfalign-faults-", dir=memory if memory.is_dir() else None))
    yield found
    shutil.rmtree(found, ignore_errors=True)


@pytest.fixture
def toy(folder: Path) -> SlowToy:
    """Two rounds; two shards a map, one of them of two batches."""
    script = folder / "script.json"
    script.write_text("[]")
    texts = tuple(f"text number {n}" for n in range(10))
    return SlowToy(ModelConfig(path=str(script), engine="scripted"), "digest of the script", texts, shard_rows=8)


@pytest.fixture
def calm(toy: SlowToy, folder: Path, forks: Forks) -> Run:
    """The toy's run that nothing disturbed."""
    run = Run(toy, folder / "calm", forks)
    assert run.go() == 0, run.said
    return run
