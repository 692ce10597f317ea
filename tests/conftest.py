"""What all tests share: the real data's folder, and one Ray for the session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Workers and child processes import test stages by name.
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """A real Ray of this machine, started once a session."""
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


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
