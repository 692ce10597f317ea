"""The Ray backend: steps on a cluster, or on a cluster of this machine that it starts itself."""

import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from selfalign.core.errors import InternalError, ServiceError, UsageError
from selfalign.core.identity import code_digest
from selfalign.core.protocols import BuildJob, Committed, MapJob
from selfalign.core.shards import ShardReport
from selfalign.core.stage import Log

CONNECT_S = 10.0
HEAD_LOOK_S, HEAD_AWAY_S = 5.0, 40.0
# By this name Ray knows that a cluster is of one machine, which is its default where there is no Linux.
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class RayBackend:
    """Runs steps on a Ray cluster whose workers see the run folder.

    The cluster is the one at RAY_ADDRESS, the one that this process runs a job of or is connected to, or else a new one
    on this machine, with a token that nobody else has. Raises ServiceError where it cannot be reached, and UsageError
    where its versions are others.
    """

    def __init__(self) -> None:
        if named := os.environ.get("RAY_ADDRESS"):
            head_of(named)
        address = named or ("auto" if os.environ.get("RAY_JOB_ID") else "local")
        self._ours = not ("ray" in sys.modules and sys.modules["ray"].is_initialized())
        if self._ours and address == "local":
            _keep_to_ourselves()
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UsageError("the Ray backend needs Ray: pip install -e '.[ray]' in the checkout") from error
        from selfalign.backends.ray_pool import Pool

        self._ray, self._code = ray, code_digest()
        if self._ours and address not in ("auto", "local"):
            _check_answers(address)
        if self._ours:
            ours = {"include_dashboard": False} if address == "local" else {}
            try:
                with _handlers_kept():
                    ray.init(address=address, log_to_driver=False, **ours)
            except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
                raise _explained(address, error) from error
        self._closed = threading.Event()
        if self._ours and address != "local":
            head = ray.get_runtime_context().gcs_address
            threading.Thread(target=_watch_head, args=(head, self._closed), daemon=True).start()
        self._pool = Pool(self._code)

    def map(self, job: MapJob, done: Callable[[ShardReport], None]) -> None:
        """See `core.protocols.Backend`."""
        self._pool.map(job, done)

    def build(self, job: BuildJob, log: Log) -> Committed:
        """See `core.protocols.Backend`."""
        if (processes := job.stage.processes) is None:
            return self._pool.build(job, log)
        self._pool.close()
        from selfalign.backends.ray_train import build_ranks

        return build_ranks(job, processes, self._code, log)

    def close(self) -> None:
        """Give the workers back, and leave the cluster; one that this backend started ends."""
        try:
            self._pool.close()
            if self._ours:
                self._ray.shutdown()
        finally:
            self._closed.set()


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder that nobody else can read, until this process ends."""
    return tempfile.TemporaryDirectory(prefix="selfalign-ray-")


def _keep_to_ourselves() -> None:
    """Have a cluster that we start listen on loopback only, and serve only those who know a token.

    Ray reads this when it is imported.
    """
    if "ray" in sys.modules and LOOPBACK not in os.environ:
        raise InternalError("Ray was imported before it could be told to listen on loopback only")
    os.environ.setdefault(LOOPBACK, "0")
    if any(name.startswith("RAY_AUTH_") for name in os.environ):
        return
    path = Path(_folder().name) / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path))


def _watch_head(address: str, closed: threading.Event) -> None:
    """End this process with 69 when nobody has listened at the head for a while.

    Calls of Ray wait for it without end, and Ray itself ends a process after a minute, with 1.
    """
    host, _, port = address.rpartition(":")
    answered = time.monotonic()
    while not closed.wait(HEAD_LOOK_S):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_LOOK_S).close()
            answered = time.monotonic()
        except OSError:
            if time.monotonic() - answered > HEAD_AWAY_S:
                told = f"selfalign: the head of the Ray cluster at {address} is gone; run again when there is one\n"
                os.write(2, told.encode())
                os._exit(ServiceError.exit_code)


def head_of(address: str) -> tuple[str, int] | None:
    """Host and port of a cluster's head; None for a cluster of one's own. Raises UsageError for what names neither.

    Ray would take "auto" for whatever cluster it finds on this machine, and ask for ever where none answers.
    """
    if address == "local":
        return None
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"RAY_ADDRESS is {address}; name the head of the cluster by HOST:PORT, or submit a Ray job")
    return host.strip("[]"), int(port)


def _check_answers(address: str) -> None:
    """Raise ServiceError where nobody listens: Ray itself would wait for minutes."""
    host, port = head_of(address) or ("", 0)
    advice = "; start it, or unset RAY_ADDRESS"
    if host in ("127.0.0.1", "localhost", "::1"):
        from ray.util import get_node_ip_address

        host = get_node_ip_address()
        advice = f"; Ray takes that for {host}, so that a cluster on loopback is to be named LOCALHOST:{port}"
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        raise ServiceError(f"Ray cannot be reached at {address} (RAY_ADDRESS): {error}{advice}") from error


def _explained(address: str, error: Exception) -> UsageError | ServiceError:
    told = " ".join(str(error).split())
    if "Version mismatch" in told:
        return UsageError(f"the cluster at {address} has another Ray or Python than this process: {told}")
    return ServiceError(
        f"Ray cannot be used at {address}: {told}; do RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH name the cluster's "
        "token, and is it the right address?"
    )


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Whatever Ray does when this process is asked to end, we save first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)
