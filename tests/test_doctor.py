"""What doctor says of a machine that lacks something: each question, on the side where the answer is no."""

import errno
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hub as fake_hub
from selfalign import doctor
from selfalign.doctor import GIB, Check, driver_too_old

Usage = namedtuple("Usage", ["total", "used", "free"])


def is_told(check: Check, state: str, *words: str) -> None:
    """The state, and what is said; whatever is not fine comes with advice."""
    assert check.state == state, check
    for word in words:
        assert word in f"{check.found} → {check.advice}", check
    assert check.advice or check.state == "ok"


def with_space(patch: pytest.MonkeyPatch, total: float, free: float) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: Usage(int(total * GIB), 0, int(free * GIB)))


# Software


def test_this_environment_has_what_the_package_declares() -> None:
    assert doctor.python().state == "ok"
    is_told(doctor.packages(), "ok", f"torch {importlib.metadata.version('torch')}")


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    is_told(doctor.python(), "fail", "3.10.4", ">=3.11")


def test_a_missing_package_and_an_old_one_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch", "no-such-package", "trl>=99", "extra-thing; extra == 'ray'", "other; python_version < '3'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    is_told(doctor.packages(), "fail", "no-such-package is missing", "is not >=99")
    assert "extra-thing" not in doctor.packages().found
    assert "other" not in doctor.packages().found


def test_an_extra_that_is_not_there_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["torch", "no-such-package[x]; extra == 'ray'"])
    checks = {check.name: check for check in doctor.extras()}
    assert "extra dev" not in checks
    is_told(checks["extra ray"], "ok", "no-such-package is missing", "pip install -e '.[ray]'")


def test_quantisation_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional

    assert doctor.quantisation().state == "ok"

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel\nfor this card")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    is_told(doctor.quantisation(), "fail", "no kernel for this card")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    is_told(doctor.quantisation(), "fail")


# Hardware


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A torch and an nvidia-smi that say what they are told to."""

    def make(
        cards: str = "",
        cuda: str | None = None,
        available: bool = False,
        free: float = 70.0,
        bfloat16: bool = True,
        visible: str | None = None,
    ) -> Check:
        def smi(*_: object, **__: object) -> Any:
            if not cards:
                raise FileNotFoundError("nvidia-smi")
            return subprocess.CompletedProcess([], 0, cards)

        monkeypatch.setattr(subprocess, "run", smi)
        device = SimpleNamespace(
            is_available=lambda: available,
            device_count=lambda: 2,
            mem_get_info=lambda n: (int(free * GIB) + n, 80 * GIB),
            get_device_name=lambda n: "NVIDIA A800",
            is_bf16_supported=lambda: bfloat16,
        )
        torch = SimpleNamespace(cuda=device, version=SimpleNamespace(cuda=cuda, hip=None), __version__="2.13.0")
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return doctor.gpu()

    return make


A800 = "NVIDIA A800, 550.54.15\nNVIDIA A800, 550.54.15\n"


def test_a_gpu_is_told_with_its_memory_driver_and_cuda(machine: Any) -> None:
    check = machine(A800, "12.8", available=True)
    is_told(check, "ok", "2 × NVIDIA A800", "70.0 GiB of 80.0 GiB free", "driver 550.54.15", "CUDA 12.8")


@pytest.mark.parametrize(
    ("told", "state", "words"),
    [
        ({}, "warn", ["none", "demo"]),
        ({"cards": A800}, "fail", ["NVIDIA A800", "has no CUDA"]),
        ({"cards": A800, "cuda": "13.0"}, "fail", ["550.54.15", "update the driver to 580"]),
        ({"cards": A800, "cuda": "12.8"}, "fail", ["cannot use it", "torch.cuda.init()"]),
        ({"cards": "GPU, [N/A]", "cuda": "12.8"}, "fail", ["cannot use it"]),
        ({"cards": A800, "cuda": "12.8", "visible": ""}, "warn", ["CUDA_VISIBLE_DEVICES"]),
        ({"cards": A800, "cuda": "12.8", "available": True, "free": 9}, "warn", ["9.0 GiB of", "somebody else"]),
        ({"cards": A800, "cuda": "12.8", "available": True, "bfloat16": False}, "warn", ["model.dtype=float16"]),
        ({"cards": "No devices were found\n"}, "warn", ["none"]),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told(machine: Any, told: Mapping[str, Any], state: str, words: list[str]) -> None:
    is_told(machine(**told), state, *words)


def test_a_torch_that_cannot_be_imported_is_told(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setitem(sys.modules, "torch", None)
    is_told(doctor.gpu(), "fail", "torch cannot be imported")


def test_a_driver_is_measured_by_the_generation_of_cuda() -> None:
    assert driver_too_old("525.60", "12.8") is None
    assert driver_too_old("520.10", "12.8")
    assert driver_too_old("580.1", "13.0") is None
    assert driver_too_old("400.1", "14.0") is None  # not known to us


def write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc and a /sys/fs/cgroup: 8 GiB free of 16, no limits."""
    monkeypatch.setattr(doctor, "PROC", tmp_path / "proc")
    monkeypatch.setattr(doctor, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    meminfo = f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {9 * GIB // 1024} kB\nHugePages_Total: 0\n"
    write(tmp_path, {"proc/meminfo": meminfo, "proc/self/cgroup": "0::/job/step\n"})
    write(tmp_path, {"cgroup/memory.max": "max\n", "cgroup/cpu.max": "max 100000\n"})
    return tmp_path


def test_memory_and_cores_without_limits(system: Path) -> None:
    is_told(doctor.memory(), "ok", "9.0 GiB free of 16.0 GiB")
    is_told(doctor.processors(), "ok", "8 cores")


def test_the_limits_of_a_job_count_also_where_they_stand_above_its_own_group(system: Path) -> None:
    write(system, {"cgroup/job/memory.max": str(4 * GIB), "cgroup/job/step/memory.max": "max"})
    write(system, {"cgroup/job/cpu.max": "150000 100000"})
    is_told(doctor.memory(), "warn", "4.0 GiB free of 4.0 GiB", "limit")
    is_told(doctor.processors(), "warn", "1.5 cores", "two or more")


def test_the_limits_of_the_first_version_of_cgroups_count(system: Path) -> None:
    write(system, {"proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n3:pids:/b\n"})
    write(system, {"cgroup/memory/a/memory.limit_in_bytes": str(GIB // 2)})
    write(system, {"cgroup/cpu/a/cpu.cfs_quota_us": "100000", "cgroup/cpu/a/cpu.cfs_period_us": "100000"})
    is_told(doctor.memory(), "fail", "0.5 GiB")
    is_told(doctor.processors(), "warn", "1 cores")
    write(system, {"cgroup/memory/a/memory.limit_in_bytes": str(2**63 - 4096)})
    write(system, {"cgroup/cpu/a/cpu.cfs_quota_us": "-1"})
    assert doctor.memory().state == doctor.processors().state == "ok"


def test_a_system_that_tells_no_memory(system: Path) -> None:
    shutil.rmtree(system / "proc")
    is_told(doctor.memory(), "warn", "unknown")
    assert doctor.processors().state == "ok"


# Files


@pytest.mark.parametrize(("free", "state"), [(0.5, "fail"), (5, "warn"), (50, "ok")])
def test_a_small_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, state: str) -> None:
    with_space(monkeypatch, 100, free)
    is_told(doctor.disk(tmp_path / "not" / "there" / "yet"), state, f"{free:.1f} GiB free at {tmp_path}")


def test_a_disk_without_hard_links_is_told_and_nothing_is_left_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.hard_links(tmp_path / "run").state == "ok"

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    is_told(doctor.hard_links(tmp_path / "run"), "fail", "no hard links", "--run")
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    is_told(doctor.hard_links(tmp_path), "fail", "Read-only file system", "--run")


def test_a_full_or_missing_folder_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.temporary().state in ("ok", "warn")
    with_space(monkeypatch, 10, 1)
    is_told(doctor.temporary(), "warn", "TMPDIR")

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    is_told(doctor.temporary(), "fail", "No usable temporary directory", "TMPDIR")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda there: monkeypatch.setattr(doctor, "_is_installed", lambda name: there)


def test_little_shared_memory_matters_to_ray_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray: Any) -> None:
    monkeypatch.setattr(doctor, "SHM", tmp_path)
    with_space(monkeypatch, 0.06, 0.06)
    ray(True)
    is_told(doctor.shared_memory(), "warn", "--shm-size")
    ray(False)
    is_told(doctor.shared_memory(), "ok", "only Ray")
    ray(True)
    monkeypatch.setattr(doctor, "SHM", tmp_path / "none")
    is_told(doctor.shared_memory(), "warn", "no ")


@pytest.mark.parametrize(("limit", "there", "state"), [(1024, True, "warn"), (1024, False, "ok"), (64, False, "warn")])
def test_few_open_files_are_told(
    monkeypatch: pytest.MonkeyPatch, ray: Any, limit: int, there: bool, state: str
) -> None:
    ray(there)
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    is_told(doctor.open_files(), state, str(limit))


def test_a_lock_of_a_build_that_was_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.torch_extensions().state == "ok"
    lock = tmp_path / "py311_cpu" / "shm_comm" / "lock"
    write(tmp_path, {"py311_cpu/shm_comm/lock": ""})
    os.utime(lock, (0, 0))
    is_told(doctor.torch_extensions(), "warn", f"rm {lock}", "minutes")


def test_locks_are_looked_for_where_torch_keeps_its_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write(tmp_path, {"torch_extensions/py311_cu130/cpu_adam/lock": ""})
    is_told(doctor.torch_extensions(), "warn", f"rm {tmp_path / 'torch_extensions/py311_cu130/cpu_adam/lock'}")


def test_what_turns_deepspeed_off_or_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("ACCELERATE_USE_CPU", "DS_ACCELERATOR")
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    is_told(doctor.deepspeed(), "ok", importlib.metadata.version("deepspeed"))
    for variable in variables:
        with monkeypatch.context() as patch:
            patch.setenv(variable, "xpu")
            is_told(doctor.deepspeed(), "warn", f"{variable}=xpu", f"unset {variable}")


# Services


class Answer(fake_hub.Answer):
    """A Hub that knows one token, and where asked, says something else."""

    status = 0

    def do_GET(self) -> None:
        if self.status:
            return self.say(self.status, b"", Location="http://127.0.0.1:9/login")
        if self.path.startswith("/api/whoami-v2"):
            known = self.headers.get("authorization") == "Bearer hf_good"
            return self.say(200 if known else 401, json.dumps({"name": "me"}).encode())
        return self.say(200, b"[]")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.Hub]:
    monkeypatch.setattr(fake_hub, "Answer", Answer)
    with fake_hub.serving(tmp_path, monkeypatch) as running:
        yield running


@pytest.mark.usefixtures("server")
def test_the_hub_and_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    is_told(doctor.hub(), "ok", "without a token", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    is_told(doctor.hub(), "ok", "with a token that it takes")


@pytest.mark.usefixtures("server")
def test_a_token_that_the_hub_refuses_is_told_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    check = doctor.hub()
    is_told(check, "fail", "refuses the token (401)", "HF_TOKEN")
    assert "canary" not in str(check)


@pytest.mark.parametrize("status", [302, 500, 503])
def test_a_hub_that_answers_something_else_is_told(
    server: fake_hub.Hub, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(Answer, "status", status)
    is_told(doctor.hub(), "warn", str(status))


def test_a_hub_that_is_not_there_is_told_without_the_password_of_its_url(
    server: fake_hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:canary@127.0.0.1:9")
    check = doctor.hub()
    is_told(check, "warn", "127.0.0.1 cannot be reached", "HF_ENDPOINT")
    assert "canary" not in str(check)


# Each is read otherwise than it was meant, by some parser.
NO_ADDRESSES = [
    *("http://canary:canary/w@h", "http://canary:12/canary@h", "http://me:canary@canary/w@h", "http://[canary"),
    *("http://[canary]", "me:canary@x", "http://me:can ary@h", "http:///canary", "http://me:12#canary@h"),
]


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_an_endpoint_that_is_no_address_is_told_before_its_library_is_imported(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for check in (doctor.hub(), doctor.hub_cache()):
        is_told(check, "fail", "HF_ENDPOINT is no address", "HF_ENDPOINT")
        assert "canary" not in str(check)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "HTTP_PROXY"])
def test_a_proxy_whose_password_is_not_encoded_is_told_without_it(
    server: fake_hub.Hub, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    from huggingface_hub.utils import close_session

    monkeypatch.setenv(variable, "http://me:canary/w@127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY")
    close_session()
    check = doctor.hub()
    close_session()
    is_told(check, "warn", "cannot be reached", variable[-5:])
    assert "canary" not in str(check)


def test_a_hub_that_says_nothing_is_not_waited_for(server: fake_hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        is_told(doctor.hub(), "warn", "cannot be reached")


def test_offline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    is_told(doctor.hub(), "warn", "offline", "unset HF_HUB_OFFLINE")


def test_a_cache_that_is_nearly_full_or_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    write(cache, {"blobs/a": "x" * 1000})
    with_space(monkeypatch, 100, 50)
    is_told(doctor.hub_cache(), "ok", str(cache), "50.0 GiB free")
    with_space(monkeypatch, 100, 3)
    is_told(doctor.hub_cache(), "warn", "HF_HOME")
    monkeypatch.setattr(os, "access", lambda *_: False)
    is_told(doctor.hub_cache(), "fail", "cannot be written", "HF_HOME")


@pytest.mark.parametrize(
    ("variable", "form"),
    [
        ("RAY_ADDRESS", "127.0.0.1:{}"),
        ("MLFLOW_TRACKING_URI", "http://me:canary@127.0.0.1:{}/path"),
    ],
)
def test_a_service_is_asked_where_its_variable_points(
    monkeypatch: pytest.MonkeyPatch, ray: Any, variable: str, form: str
) -> None:
    ray(True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        monkeypatch.setenv(variable, form.format(port))
        is_told(doctor.service(variable), "ok", f"127.0.0.1:{port} listens")
    check = doctor.service(variable)
    is_told(check, "fail", f"127.0.0.1:{port} cannot be reached", f"unset {variable}")
    assert "canary" not in str(check)


def test_a_cluster_of_ones_own_is_not_asked(monkeypatch: pytest.MonkeyPatch, ray: Any) -> None:
    ray(True)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert doctor.service("RAY_ADDRESS").state == "ok"


@pytest.mark.parametrize(
    "address", ["http://[", "head:port", "head:99999", "auto", "head", "ray://head:10001", "http://head:8265"]
)
def test_an_address_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, ray: Any, address: str) -> None:
    ray(True)
    monkeypatch.setenv("RAY_ADDRESS", address)
    is_told(doctor.service("RAY_ADDRESS"), "fail", "RAY_ADDRESS is no address", "unset it", "HOST:PORT")


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "MLFLOW_TRACKING_URI"])
@pytest.mark.parametrize("address", [address for address in NO_ADDRESSES if address != "me:canary@x"])
def test_no_word_of_an_address_that_is_none_is_told(
    monkeypatch: pytest.MonkeyPatch, ray: Any, variable: str, address: str
) -> None:
    ray(True)
    monkeypatch.setenv(variable, address)
    check = doctor.service(variable)
    is_told(check, "fail", f"{variable} is no address")
    assert "canary" not in str(check)


@pytest.mark.parametrize("address", ["nonsense", "localhost:5000", "http//host", "me:canary@host", "://x", "x" * 5000])
def test_a_tracking_address_that_is_no_uri_and_no_path_is_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    is_told(doctor.service("MLFLOW_TRACKING_URI"), "fail", "is no address", "http://HOST:PORT")


@pytest.mark.parametrize("address", ["/srv/a", "./new", "there", "file:/a", "sqlite:///a@b.db", "databricks"])
def test_a_tracking_address_without_a_host_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert doctor.service("MLFLOW_TRACKING_URI").state == "ok"


def test_a_host_whose_name_is_too_long_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{'a' * 70}:1")
    is_told(doctor.service("MLFLOW_TRACKING_URI"), "fail", "cannot be reached: UnicodeError")


def test_an_address_of_ray_without_ray_is_told(monkeypatch: pytest.MonkeyPatch, ray: Any) -> None:
    ray(False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    is_told(doctor.service("RAY_ADDRESS"), "fail", "pip install -e '.[ray]'")
