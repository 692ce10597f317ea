"""What all tests share: the real data's folder, one Ray and one object store for the session."""

import atexit
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from s3 import S3
from selfalign.core import preemption
from selfalign.core.locations import Location

TESTS = Path(__file__).parent
# Workers and child processes import test stages by name.
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The session's Ray listens on loopback, and serves those who know its token alone. Ray reads this when it is imported.
_token, _token_path = tempfile.mkstemp(prefix="selfalign-token-")
os.write(_token, secrets.token_hex(32).encode())
os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=_token_path)
atexit.register(os.unlink, _token_path)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """A real Ray of this machine, started once a session."""
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def _s3() -> Iterator[S3]:
    store = S3()
    # Child processes and Ray's workers find it too.
    before = dict(os.environ)
    os.environ.update(store.environment)
    yield store
    store.close()
    for name in store.environment:
        os.environ.pop(name)
        os.environ.update({name: before[name]} if name in before else {})


@pytest.fixture
def s3(_s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An object store without faults, and an empty scratch folder."""
    monkeypatch.setenv("SELFALIGN_SCRATCH", str(tmp_path / "scratch"))
    # Another test may have asked this process to end.
    monkeypatch.setattr(preemption, "_ending", False)
    yield _s3
    _s3.mend()


@pytest.fixture
def impatient(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients of the object store give up at once."""
    from selfalign.core.objects import Client

    # A client keeps the patience that it was made with.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    Client.clear_instance_cache()
    yield
    Client.clear_instance_cache()


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """Where a run folder may lie: a folder that is not there yet, of each kind."""
    store: S3 | None = request.getfixturevalue("s3") if request.param == "s3" else None
    return store.folder() if store else tmp_path / "run"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real public files, where this checkout has one beside it."""
    folder = TESTS.parent.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Fail the session for a skip that allowed_skips.txt does not name."""
    lines = (TESTS / "allowed_skips.txt").read_text().splitlines()
    allowed = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason not in allowed:
            terminalreporter.write_line(f"{report.nodeid}: this skip is not allowed: {reason}", red=True)
            terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
