"""What a cluster in token mode tells and opens to somebody who has no token."""

import re
import stat
import subprocess
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil

import small
from cluster.submitting import CHECKOUT
from clusters import Cluster, Node

# Ray answers these to anybody: the page itself and its assets, whether it lives, and whether it wants a token.
OPEN = {
    *("/", "/favicon.ico", "/static/x", "/api/authentication_mode"),
    *("/api/gcs_healthz", "/api/healthz", "/api/local_raylet_healthz"),
}
ROUTE = re.compile(r"<ResourceRoute \[(\w+)\] <(Plain|Dynamic|Static)Resource +([^\s>]+)")


def listening(node: Node) -> list[tuple[str, int]]:
    found = []
    for process in node.processes():
        try:
            found += [(c.laddr.ip, c.laddr.port) for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:
            continue
    return found


def every_port(cluster: Cluster) -> set[int]:
    return {port for node in (cluster.head, *cluster.nodes) for _, port in listening(node)}


def exporters(cluster: Cluster) -> set[int]:
    """Ports that tell figures to Prometheus."""
    return {port for port in every_port(cluster) if answer(port, "GET", "/metrics") == 200}


def routes(cluster: Cluster, pattern: str) -> set[tuple[str, str]]:
    """The routes that a running server wrote into its log when it began."""
    until = time.monotonic() + 60
    while not (found := {at for log in cluster.temporary.rglob(pattern) for at in ROUTE.findall(log.read_text())}):
        assert time.monotonic() < until, f"no routes in any {pattern}"
        time.sleep(0.2)
    # A static route stands for a folder; names in braces for anything.
    return {(method, re.sub(r"{\w+}", "x", path) + "/x" * (kind == "Static")) for method, kind, path in found}


def answer(port: int, method: str, path: str, token: str | None = None) -> int | None:
    """The status of an answer; None where no HTTP is spoken, or nothing comes."""
    bearer = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urlopen(Request(f"http://127.0.0.1:{port}{path}", headers=bearer, method=method), timeout=5) as got:
            return int(got.status)
    except HTTPError as error:
        error.close()
        return error.code
    except (URLError, HTTPException, OSError):
        return None


def test_all_that_listens_listens_on_loopback(two_node_cluster: Cluster) -> None:
    found = [at for node in (two_node_cluster.head, *two_node_cluster.nodes) for at in listening(node)]
    assert len(found) > 10
    assert {ip.removeprefix("::ffff:") for ip, _ in found} == {"127.0.0.1"}


def test_the_token_is_for_its_owner_alone(two_node_cluster: Cluster) -> None:
    assert stat.S_IMODE(two_node_cluster.token_file.stat().st_mode) == 0o600


def test_without_a_token_only_health_and_the_page_itself_are_answered(two_node_cluster: Cluster) -> None:
    swept = routes(two_node_cluster, "dashboard.log")
    assert {("GET", "/api/jobs/"), ("POST", "/api/jobs/"), ("GET", "/api/v0/logs"), ("GET", "/nodes")} <= swept
    port = int(two_node_cluster.dashboard.rpartition(":")[2])
    got = {route: answer(port, *route) for route in swept}
    assert {path for (_, path), status in got.items() if status not in (401, 403)} <= OPEN
    assert got["POST", "/api/jobs/"] == got["GET", "/api/jobs/"] == 401
    assert answer(port, "GET", "/api/jobs/", "wrong") == 403
    assert answer(port, "GET", "/api/jobs/", two_node_cluster.token_file.read_text()) == 200


def test_without_a_token_no_port_answers_more_than_health(two_node_cluster: Cluster) -> None:
    swept = routes(two_node_cluster, "dashboard_agent*.log")
    assert ("POST", "/api/job_agent/jobs/") in swept
    swept |= {("POST", "/get_or_create_runtime_env"), ("POST", "/get_runtime_envs_info")}
    ports = every_port(two_node_cluster) - exporters(two_node_cluster)
    got = {(port, *route): status for port in ports for route in swept if (status := answer(port, *route))}
    assert {path for (_, _, path), status in got.items() if status not in (401, 403)} <= OPEN
    # The dashboard, and two agents a node; the others speak gRPC, whose refusal is tested by a driver.
    assert len({port for port, _, _ in got}) == 5


def test_figures_of_the_cluster_are_told_to_anybody_and_hold_no_secret(two_node_cluster: Cluster, canary: str) -> None:
    """Ray's Prometheus exporters know no token, which is why they must listen on loopback, or behind a policy."""
    found = exporters(two_node_cluster)
    assert len(found) >= 3
    token = two_node_cluster.token_file.read_text()
    for port in found:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as got:
            told = got.read().decode()
        assert canary not in told
        assert token not in told


def test_a_driver_without_the_token_is_refused(two_node_cluster: Cluster, tmp_path: Path) -> None:
    environment = {k: v for k, v in two_node_cluster.environment.items() if not k.startswith("RAY_AUTH")}
    job = [sys.executable, str(CHECKOUT / "jobs" / "prepare.py"), str(small.write(tmp_path / "recipe"))]
    job += ["--run", str(tmp_path / "run")]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 69, done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr.splitlines()[-1]
