"""Reaching a cluster, or starting one that only this process can use."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from selfalign.core.errors import ServiceError, UsageError
from selfalign.core.stage import Resources, Workers

pytest.importorskip("ray", reason="needs the extra `ray`")
from selfalign.backends import ray_pool
from selfalign.backends.ray import RayBackend

# What a new cluster is like, seen from the process that started it: a backend reads its settings once a process.
OURS = """
import json, os, signal, sys
from selfalign.core import preemption
preemption.handle()
handler = signal.getsignal(signal.SIGTERM)
from selfalign.backends.ray import RayBackend
backend = RayBackend()
import grpc, psutil, ray
from pathlib import Path

def asked(token):
    client = grpc.insecure_channel(ray.get_runtime_context().gcs_address)
    ask = client.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
    try:
        ask(b"", timeout=30, metadata=[("authorization", f"Bearer {token}")] if token else [])
    except grpc.RpcError as error:
        return error.code().name
    return "OK"

path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
me = psutil.Process()
open_ = [c for p in (me, *me.children(recursive=True)) for c in p.net_connections() if c.status == "LISTEN"]
found = {
    "answers": [asked(None), asked("0" * 64), asked(path.read_text())],
    "modes": [oct(path.stat().st_mode & 0o777), oct(path.parent.stat().st_mode & 0o777)],
    "listening": sorted({c.laddr.ip for c in open_}),
    "handler": signal.getsignal(signal.SIGTERM) is handler,
    "dashboard": ray._private.worker.global_worker.node.webui_url,
    "token": str(path),
}
backend.close()
print(json.dumps(found))
"""

CONNECT = """
import sys
from ray._private import utils
utils.compute_version_info = lambda: ("2.0.0", "3.9.1")
from selfalign.backends.ray import RayBackend
from selfalign.core.errors import SelfalignError
try:
    RayBackend()
except SelfalignError as error:
    print(type(error).__name__, error.exit_code, error)
"""


def python(script: str, **environment: str) -> str:
    """What a process printed whose environment names no cluster."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=clean | environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_a_cluster_of_our_own_serves_only_those_who_know_its_token_and_this_machine() -> None:
    found = json.loads(python(OURS).splitlines()[-1])
    assert found["answers"] == ["UNAUTHENTICATED", "UNAUTHENTICATED", "OK"]
    assert found["modes"] == ["0o600", "0o700"]
    assert {address.removeprefix("::ffff:") for address in found["listening"]} == {"127.0.0.1"}
    assert found["handler"]
    assert not found["dashboard"]
    assert not Path(found["token"]).parent.exists()


def test_a_cluster_of_other_versions_is_refused_in_a_sentence(shared_ray: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    settings = {key: value for key, value in os.environ.items() if key.startswith("RAY_")}
    said = python(CONNECT, **settings | {"RAY_ADDRESS": address})
    assert said.startswith(f"UsageError 2 the cluster at {address} has another Ray or Python than this process")
    assert "3.9.1" in said
    assert said.count("\n") == 1


LOSE = """
import socket, threading
from selfalign.backends import ray as backend
backend.HEAD_LOOK_S, backend.HEAD_AWAY_S = 0.1, 0.5
head = socket.create_server(("127.0.0.1", 0))
address = f"127.0.0.1:{head.getsockname()[1]}"
threading.Thread(target=backend._watch_head, args=(address, threading.Event()), daemon=True).start()
threading.Event().wait(1)
print("still here", flush=True)
head.close()
threading.Event().wait(60)
"""


def test_a_driver_whose_cluster_has_gone_ends_and_says_so() -> None:
    ended = subprocess.run([sys.executable, "-c", LOSE], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "still here\n"
    assert ended.returncode == 69
    assert "the head of the Ray cluster at 127.0.0.1:" in ended.stderr


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nobody listens, in a process that is connected to no cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    return address


def test_an_address_where_nobody_listens_is_told_at_once(nobody: str) -> None:
    with pytest.raises(ServiceError, match=rf"Ray cannot be reached at {nobody} \(RAY_ADDRESS\)") as caught:
        RayBackend()
    assert caught.value.exit_code == 69


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "auto", "LOCALHOST", ":6379", "head:port", "head:65536"])
def test_what_is_no_heads_address_is_told_at_once(nobody: str, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=rf"RAY_ADDRESS is {address}; name the head .* by HOST:PORT"):
        RayBackend()


@pytest.mark.parametrize(
    ("resources", "room"),
    [
        (Resources(cpus=2), 4),
        (Resources(cpus=3), 2),
        (Resources(gpus=1), 2),
        (Resources(gpus=2), 1),
        (Resources(gpus=3), 0),
        (Resources(gpus=0.5), 4),
        # Not five: what is left of a GPU is of no use together with what is left of another.
        (Resources(gpus=0.4), 4),
        (Resources(cpus=0.1, gpus=0.1), 20),
    ],
)
def test_room_counts_whole_shares(resources: Resources, room: int) -> None:
    assert ray_pool._room({"CPU": 8.0, "GPU": 2.0}, resources) == room


def test_more_than_one_gpu_is_a_whole_number() -> None:
    with pytest.raises(ValidationError, match=r"1.5 GPUs cannot be given"):
        Resources(gpus=1.5)


def test_min_is_not_above_max() -> None:
    with pytest.raises(ValidationError, match="min is 3 and max is 2; min must not be above max"):
        Workers(min=3)
