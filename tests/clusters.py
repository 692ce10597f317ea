"""A real Ray cluster on loopback, in token mode, whose nodes a test can lose one by one."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import psutil

RAY = str(Path(sys.executable).parent / "ray")
HOST = "127.0.0.1"
# Ray puts the machine's own address in the place of "127.0.0.1", and then listens on every interface. It does not know
# this name of the same, and a node that reaches the cluster by it listens on loopback.
LOOPBACK = "LOCALHOST"
WAIT_S = 120.0
# The processes of a node inherit it. Ray's agents lose it with their new title, and keep the session; the drivers of
# jobs leave the session, and keep the mark.
MARK = "SELFALIGN_TEST_NODE"
# Asks the cluster, in a process of its own, since a process keeps the authentication it began with.
JOINED = """
import sys, time
from ray._raylet import GcsClient
client, alive = GcsClient(address=sys.argv[1]), 0
while not any(n.state == alive and n.node_name == sys.argv[2] for n in client.get_all_node_info().values()):
    time.sleep(0.2)
"""


@dataclass(eq=False)
class Node:
    """A raylet with its agents and workers; the head's, also the cluster's services."""

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def start(self) -> None:
        """Start it in a session of its own."""
        self.killed = False
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [RAY, "start", *self.command, f"--node-name={self.mark}", "--block", "--disable-usage-stats"],
                env={**self.environment, MARK: self.mark},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process that holds the node."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process that holds the node is gone."""
        return self._process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """All that lives on the node: services, workers, drivers of jobs."""
        return [process for process in psutil.process_iter() if self._holds(process)]

    def kill(self) -> None:
        """SIGKILL everything on the node, as when a machine goes."""
        self.killed = True
        while living := self.processes():
            for process in living:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            # The one that holds the node is our child.
            self._process.wait()
            psutil.wait_procs([p for p in living if p.pid != self.pid], timeout=10)

    def _holds(self, process: psutil.Process) -> bool:
        try:
            mine = os.getsid(process.pid) == self.pid or process.environ().get(MARK) == self.mark
            return mine and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False


class Cluster:
    """A head, and nodes beside it. Everything listens on loopback alone, at ports of its own.

    `environment` is what a client's process needs. Raises TimeoutError, with the node's last words, where a node does
    not join within two minutes.
    """

    def __init__(self, folder: Path, dashboard: bool = False, cpus: float = 1, gpus: float = 0) -> None:
        # Unix sockets have names of 107 bytes at most, and Ray adds some 60 to this one.
        self.temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        folder.mkdir(parents=True, exist_ok=True)
        self.token_file = folder / "token"
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(secrets.token_hex(32))
        port, board, client, *metrics = free_ports(5)
        self.address = f"{LOOPBACK}:{port}"
        self.dashboard = f"http://{HOST}:{board}"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            # As in an activated environment, so that `python` in a job's command is this one.
            "PATH": os.pathsep.join([str(Path(RAY).parent), os.environ["PATH"]]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A lost node is noticed in 3 s, not 15, since its ports refuse; a slow one still has as long as ever.
            "RAY_health_check_period_ms": "600",
            # A job that is asked to end has this long to save.
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            "RAY_ADDRESS": self.address,
        }
        command = ["--head", f"--port={port}", f"--dashboard-host={HOST}", f"--dashboard-port={board}"]
        command += [f"--include-dashboard={str(dashboard).lower()}"]
        command += [f"--ray-client-server-port={client}"]
        # The first keeps a head, and drivers beside it, on loopback.
        own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        own |= dict(zip(("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"), map(str, metrics), strict=True))
        self.head = self._node(command, cpus, gpus, {}, own)
        self.nodes: list[Node] = []
        try:
            self._start(self.head)
        except BaseException:
            self.close()
            raise

    def add_node(
        self,
        cpus: float,
        gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Node:
        """Start one more node of this machine, and wait until the cluster knows it."""
        node = self._node([f"--address={self.address}"], cpus, gpus, resources or {}, environment or {})
        self.nodes.append(node)
        self._start(node)
        return node

    def kill_head(self) -> None:
        """SIGKILL the head's node, and with it what the cluster knows."""
        self.head.kill()

    def restart_head(self) -> None:
        """Start the head anew at its address, and the nodes that were left, since a new head knows none of them."""
        self.nodes = [node for node in self.nodes if not node.killed]
        for node in [self.head, *self.nodes]:
            node.kill()
        self._start(self.head)
        for node in self.nodes:
            self._start(node)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """This process as a driver of the cluster."""
        import ray

        with patch.dict(os.environ, {k: v for k, v in self.environment.items() if k.startswith("RAY_")}):
            _forget_authentication()
            try:
                ray.init(address=self.address, log_to_driver=False)
                yield
            finally:
                ray.shutdown()
        _forget_authentication()

    def close(self) -> None:
        """Kill what was started, and remove what it wrote."""
        for node in [*self.nodes, self.head]:
            node.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _node(
        self,
        command: Sequence[str],
        cpus: float,
        gpus: float,
        resources: Mapping[str, float],
        environment: Mapping[str, str],
    ) -> Node:
        services = ("node-manager", "object-manager", "dashboard-agent-listen", "dashboard-agent-grpc")
        services += ("runtime-env-agent", "metrics-export")
        ports = free_ports(len(services))
        asked = [f"--{name}-port={port}" for name, port in zip(services, ports, strict=True)]
        asked += [f"--num-cpus={cpus:g}", f"--num-gpus={gpus:g}", f"--resources={json.dumps(dict(resources))}"]
        # Nodes that share this folder would replace the working directory of a job under each other's feet.
        asked += ["--object-store-memory=80000000", f"--temp-dir={self.temporary}/{ports[0]}"]
        log = self.token_file.with_name(f"node-{ports[0]}.log")
        # A node's own services find the cluster by its command line.
        own = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        return Node([*command, *asked], {**own, **environment}, log)

    def _start(self, node: Node) -> None:
        node.start()
        ask = [sys.executable, "-c", JOINED, self.address, node.mark]
        until = time.monotonic() + WAIT_S
        with subprocess.Popen(ask, env=self.environment, stderr=subprocess.PIPE, text=True) as asking:
            while (code := asking.poll()) is None and time.monotonic() < until and not node.ended:
                time.sleep(0.1)
            asking.kill()
            said = asking.stderr.read() if asking.stderr else ""
        if code != 0:
            last = node.log.read_text(errors="replace").splitlines()[-30:]
            raise TimeoutError("\n".join([f"a node did not join {self.address}; it said:", *last, said]))


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, below those that the system gives to connections."""
    found: list[int] = []
    while len(found) < number:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as one, suppress(OSError):
            one.bind((HOST, port))
            found += [port] if port not in found else []
    return found


def _forget_authentication() -> None:
    """Ray keeps what it read from the environment first."""
    from ray._private.authentication_test_utils import reset_auth_token_state

    reset_auth_token_state()
