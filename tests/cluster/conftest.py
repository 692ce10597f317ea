"""One cluster of two nodes for all tests here, with a secret in its environment that nothing may tell."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from clusters import Cluster

HERE = Path(__file__).parent
# Made when it is needed: these sources travel to the cluster, too.
CANARY = f"canary-{secrets.token_hex(16)}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need a real cluster."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def canary() -> str:
    """What stands in HF_TOKEN, of the cluster and of whoever submits."""
    return CANARY


@pytest.fixture(scope="session")
def two_node_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and a node beside it, with the dashboard."""
    with patch.dict(os.environ, {"HF_TOKEN": CANARY}):
        cluster = Cluster(tmp_path_factory.mktemp("cluster"), dashboard=True)
    try:
        cluster.add_node(cpus=1)
        yield cluster
    finally:
        cluster.close()
