"""`selfalign doctor`: whether this machine can do what runs ask of it, a line a question, and what to do where not."""

import importlib
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import SplitResult, urlsplit

if TYPE_CHECKING:
    from packaging.requirements import Requirement

GIB = 2**30
TIMEOUT_S = 5.0
PROC, CGROUP, SHM = Path("/proc"), Path("/sys/fs/cgroup"), Path("/dev/shm")
# Extras for who works on selfalign, not with it.
_OURS = frozenset({"dev", "bench"})
_NAMED = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
# The oldest NVIDIA driver that runs each generation of CUDA (its release notes, "minor version compatibility").
_DRIVERS = {11: 450, 12: 525, 13: 580}
_PORTS = {"http": 80, "https": 443}
_ENCODED = " (in a password / is %2F, @ is %40, ? is %3F, # is %23, [ is %5B)"


@dataclass(frozen=True)
class Check:
    """An answer. `warn`: some runs will fail, or be slow; `fail`: most will. `advice` says what to do."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Card:
    """A GPU as its driver tells it."""

    name: str
    driver: str


def checks(run: Path) -> Iterator[Check]:
    """All answers, for runs in the folder `run`, which need not be there yet; those that take long come last."""
    yield python()
    yield packages()
    yield from extras()
    yield processors()
    yield memory()
    yield disk(run)
    yield hard_links(run)
    yield temporary()
    yield shared_memory()
    yield open_files()
    yield hub()
    yield hub_cache()
    yield torch_extensions()
    if _is_installed("deepspeed"):
        yield deepspeed()
    for variable in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        if os.environ.get(variable):
            yield service(variable)
    yield gpu()
    yield quantisation()


# Software


def python() -> Check:
    """The interpreter against what the package declares."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    wanted = importlib.metadata.metadata("selfalign")["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("python", "ok", version)
    return Check("python", "fail", version, f"install Python {wanted} and make a new environment with it")


def packages() -> Check:
    """What the package needs, installed and of a version that it takes."""
    wanted = _requirements("")
    bad = [told for requirement in wanted if (told := _missing(requirement))]
    if bad:
        return Check(
            "packages", "fail", ", ".join(bad), "pip install -c constraints.txt -e . (or pip install selfalign)"
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _NAMED)
    return Check("packages", "ok", f"all {len(wanted)}: {versions}")


def extras() -> Iterator[Check]:
    """The optional parts, installed or not; none is needed on one machine."""
    for extra in importlib.metadata.metadata("selfalign").get_all("Provides-Extra") or []:
        if extra in _OURS:
            continue
        bad = [told for requirement in _requirements(extra) if (told := _missing(requirement))]
        found = f"not installed ({', '.join(bad)})" if bad else "installed"
        advice = f"where you want it: pip install -e '.[{extra}]' in the checkout" if bad else ""
        yield Check(f"extra {extra}", "ok", found, advice)


def _requirements(extra: str) -> "list[Requirement]":
    """Those of an extra alone, or of the package itself where it is empty."""
    from packaging.requirements import Requirement

    every = [Requirement(text) for text in importlib.metadata.requires("selfalign") or []]
    own = [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not extra:
        return own
    return [r for r in every if r.marker is not None and r not in own and r.marker.evaluate({"extra": extra})]


def _missing(requirement: "Requirement") -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} is not {requirement.specifier}"


def quantisation() -> Check:
    """NF4 on the device that models would be loaded on: recipes with `model.quantisation` need it."""
    # It says at every import that one of its optional kernels is not there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weights = torch.linspace(-1, 1, 64 * 64, device="cuda" if torch.cuda.is_available() else "cpu").view(64, 64)
        again = dequantize_4bit(*quantize_4bit(weights, quant_type="nf4"), quant_type="nf4")
        error = float((again - weights).abs().max())
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError, ValueError) as problem:
        advice = "reinstall bitsandbytes for this torch and CUDA (python -m bitsandbytes says more), or do without nf4"
        return Check("bitsandbytes", "fail", _one_line(problem), advice)
    if not error < 0.2:
        return Check("bitsandbytes", "fail", f"NF4 is off by {error:.2g}", "install another version of bitsandbytes")
    return Check("bitsandbytes", "ok", f"NF4 works on {weights.device.type}")


# Hardware


def gpu() -> Check:
    """The GPU, its driver, and whether torch can use it."""
    cards = _cards()
    seen = ", ".join(sorted({card.name for card in cards}))
    try:
        import torch
    except (ImportError, OSError) as problem:
        return Check("gpu", "fail", f"torch cannot be imported: {_one_line(problem)}", "install torch again")
    if torch.cuda.is_available():
        return _usable(torch.cuda.device_count(), cards)
    if not cards:
        advice = "enough for the demo and small models; models are loaded in float32"
        return Check("gpu", "warn", "none: torch computes on the CPU", advice)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Check("gpu", "warn", f"{seen}, hidden by CUDA_VISIBLE_DEVICES", "unset it to use the GPU")
    if torch.version.cuda is None:
        advice = "install a CUDA build of torch, as its site tells for this system"
        return Check("gpu", "fail", f"{seen}, but torch {torch.__version__} has no CUDA", advice)
    found = f"{seen}, driver {cards[0].driver}, but torch for CUDA {torch.version.cuda} cannot use it"
    advice = "python -c 'import torch; torch.cuda.init()' says why; often a reboot after a driver update is due"
    return Check("gpu", "fail", found, driver_too_old(cards[0].driver, torch.version.cuda) or advice)


def _usable(count: int, cards: list[Card]) -> Check:
    import torch

    free, total = zip(*(torch.cuda.mem_get_info(n) for n in range(count)), strict=True)
    driver = f", driver {cards[0].driver}" if cards else ""
    found = f"{count} × {torch.cuda.get_device_name(0)}, {_gib(min(free))} of {_gib(min(total))} free{driver}, " + (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    )
    if not torch.cuda.is_bf16_supported():
        return Check("gpu", "warn", f"{found}, no bfloat16", "set model.dtype=float16 in recipes")
    if min(free) < min(total) / 2:
        return Check("gpu", "warn", found, "somebody else uses it (nvidia-smi says who); choose another, or wait")
    return Check("gpu", "ok", found)


def driver_too_old(driver: str, cuda: str) -> str | None:
    """What to do where an NVIDIA driver is too old for a CUDA release; None where it is not."""
    release, have = cuda.split(".")[0], driver.split(".")[0]
    need = _DRIVERS.get(int(release), 0)
    if not have.isdigit() or int(have) >= need:
        return None
    return f"update the driver to {need} or newer, or install torch for an older CUDA"


def _cards() -> list[Card]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [Card(*(cell.strip() for cell in line.split(",")[:2])) for line in told.splitlines() if "," in line]


def processors() -> Check:
    """The cores that this process may use."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quotas = [text.split() for text in _cgroup("cpu", "cpu.max")]
    old = zip(_cgroup("cpu", "cpu.cfs_quota_us"), _cgroup("cpu", "cpu.cfs_period_us"), strict=False)
    for quota, period in [*((words[0], words[1]) for words in quotas if len(words) == 2), *old]:
        if quota not in ("max", "-1"):
            cores = min(cores, int(quota) / int(period))
    found = f"{cores:g} cores for this process, {os.cpu_count()} in the machine"
    if cores < 2:
        return Check("cpu", "warn", found, "reading, filtering and training compete for one core; ask for two or more")
    return Check("cpu", "ok", found)


def memory() -> Check:
    """Free memory, under the limit of a container or a job where there is one."""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return Check("memory", "warn", "unknown on this system", "a 7B model in bfloat16 needs 15 GiB")
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    free, total = table.get("MemAvailable", 0), table.get("MemTotal", 0)
    texts = [*_cgroup("memory", "memory.max"), *_cgroup("memory", "memory.limit_in_bytes")]
    limits = [int(text) for text in texts if text.isdigit() and int(text) < total]
    free = min([free, *limits])
    found = f"{_gib(free)} free of {_gib(min([total, *limits]))}" + (
        " (a container's or job's limit)" if limits else ""
    )
    if free < GIB:
        return Check("memory", "fail", found, "even the demo needs 1 GiB; end other programs, or raise the limit")
    if free < 8 * GIB:
        return Check("memory", "warn", found, "enough for the demo; a 7B model in bfloat16 needs 15 GiB")
    return Check("memory", "ok", found)


def _cgroup(controller: str, name: str) -> Iterator[str]:
    """A setting of this process's control group and of those around it."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = CGROUP / controller if controllers else CGROUP
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                with suppress(OSError):
                    yield (folder / name).read_text().strip()


# Files


def disk(run: Path) -> Check:
    """Space for runs."""
    folder = _existing(run)
    free = shutil.disk_usage(folder).free
    found = f"{_gib(free)} free at {folder}"
    if free < GIB:
        return Check("disk", "fail", found, "make room, or choose another folder with --run")
    if free < 20 * GIB:
        return Check("disk", "warn", found, "enough for adapters; a 7B model trained in full takes 15 GiB a round")
    return Check("disk", "ok", found)


def hard_links(run: Path) -> Check:
    """Commits are hard links, so that the first writer of a name wins."""
    folder = _existing(run)
    other = "choose a folder on another disk with --run"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".selfalign-doctor-") as scratch:
            one, two = Path(scratch, "one"), Path(scratch, "two")
            one.write_bytes(b"")
            try:
                os.link(one, two)
            except OSError as problem:
                return Check("run folder", "fail", f"{folder} takes no hard links: {problem.strerror}", other)
    except OSError as problem:
        return Check("run folder", "fail", f"{folder} cannot be written: {problem.strerror}", other)
    return Check("run folder", "ok", f"{folder} can be written and takes hard links")


def temporary() -> Check:
    """The folder for temporary files."""
    try:
        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
    except OSError as problem:
        return Check("temporary files", "fail", _one_line(problem), "set TMPDIR to a folder that can be written")
    found = f"{_gib(free)} free at {folder}"
    if free < 2 * GIB:
        return Check(
            "temporary files", "warn", found, "set TMPDIR to a larger disk; near duplicates and Ray spill there"
        )
    return Check("temporary files", "ok", found)


def shared_memory() -> Check:
    """Ray keeps its objects there."""
    total = shutil.disk_usage(SHM).total if SHM.is_dir() else 0
    found = f"{_gib(total)} at {SHM}" if total else f"no {SHM}"
    if total < 2 * GIB and _is_installed("ray"):
        advice = "Ray falls back to the disk: give the container more (docker run --shm-size=8g)"
        return Check("shared memory", "warn", found, advice)
    return Check("shared memory", "ok", found + ("" if _is_installed("ray") else "; only Ray needs it"))


def open_files() -> Check:
    """How many files a process may hold open."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if limit == resource.RLIM_INFINITY else f"{limit} at once"
    need = 4096 if _is_installed("ray") else 256
    if limit != resource.RLIM_INFINITY and limit < need:
        why = "Ray opens thousands" if need > 256 else "that is very few"
        return Check("open files", "warn", found, f"ulimit -n 65536 before you start; {why}")
    return Check("open files", "ok", found)


def torch_extensions() -> Check:
    """A build of a CUDA or CPU extension that was killed leaves a lock, and the next one waits for it for ever."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    locks = sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")})
    if locks:
        age = (time.time() - locks[0].stat().st_mtime) / 60
        advice = f"if nothing is building now, delete it: rm {locks[0]}"
        return Check("torch extensions", "warn", f"{locks[0]} has been locked for {age:.0f} minutes", advice)
    return Check("torch extensions", "ok", "no lock is left behind")


def deepspeed() -> Check:
    """Nothing in the environment turns it off, or makes it compute somewhere else than the models are.

    It compiles nothing with the configurations that come with the package, so no compiler is asked for.
    """
    version = importlib.metadata.version("deepspeed")
    from selfalign.engines.config import has_accelerator

    off = os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("", "0", "false", "no", "off")
    # Without a GPU every command of ours sets it to cpu.
    elsewhere = os.environ.get("DS_ACCELERATOR") not in (None, "", "cuda" if has_accelerator() else "cpu")
    for variable, is_odd, told in (
        ("ACCELERATE_USE_CPU", off, "turns it off"),
        ("DS_ACCELERATOR", elsewhere, "decides where it computes"),
    ):
        if is_odd:
            found = f"{version}; {variable}={os.environ[variable]} {told}"
            return Check("deepspeed", "warn", found, f"unset {variable}, unless you mean it")
    return Check("deepspeed", "ok", f"{version}; nothing has to be compiled for it")


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


# Services


def hub() -> Check:
    """The Hub, and whether it takes the token. The token is never shown."""
    if not _endpoint_is_good():
        return Check("hub", "fail", "HF_ENDPOINT is no address", f"unset it, or set it to https://HOST{_ENCODED}")
    import huggingface_hub
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    # No HTTPError, and its package changes with the library's major versions.
    invalid_url: type[Exception] = importlib.import_module(HTTPError.__module__).InvalidURL
    endpoint = os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT
    where = urlsplit(endpoint).hostname
    if huggingface_hub.constants.is_offline_mode():
        return Check("hub", "warn", "offline: only what is cached is found", "unset HF_HUB_OFFLINE to download")
    token = huggingface_hub.get_token()
    path = "/api/whoami-v2" if token else "/api/models?limit=1"
    try:
        # Without the redirects: a portal that asks everybody to log in is not the Hub.
        answer = get_session().get(
            endpoint.rstrip("/") + path,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=TIMEOUT_S,
            follow_redirects=False,
        )
    except (OSError, HTTPError, invalid_url, ValueError) as problem:
        advice = "check the network, HTTPS_PROXY and HF_ENDPOINT; models and data in folders work without it"
        return Check("hub", "warn", f"{where} cannot be reached: {type(problem).__name__}", advice)
    if token and answer.status_code in (401, 403):
        advice = "even public names fail with it: set HF_TOKEN to a valid one, or unset it and run `hf auth logout`"
        return Check("hub", "fail", f"{where} refuses the token ({answer.status_code})", advice)
    if answer.status_code >= 500 or 300 <= answer.status_code < 400:
        return Check("hub", "warn", f"{where} answers {answer.status_code}", "try again later; check HF_ENDPOINT")
    if not token:
        return Check("hub", "ok", f"{where}, without a token", "gated models, Llama's among them, want HF_TOKEN")
    return Check("hub", "ok", f"{where}, with a token" + (" that it takes" if answer.status_code == 200 else ""))


def hub_cache() -> Check:
    """Where models and datasets are downloaded to."""
    if not _endpoint_is_good():
        return Check("hub cache", "fail", "not looked at: HF_ENDPOINT is no address", "correct or unset HF_ENDPOINT")
    import huggingface_hub

    folder = Path(huggingface_hub.constants.HF_HUB_CACHE)
    there = _existing(folder)
    if not os.access(there, os.W_OK):
        return Check("hub cache", "fail", f"{there} cannot be written", "set HF_HOME to a folder that can be")
    size, whole = _size(folder)
    free = shutil.disk_usage(there).free
    found = f"{'' if whole else 'more than '}{_gib(size)} at {folder}, {_gib(free)} free"
    if free < 20 * GIB:
        return Check(
            "hub cache", "warn", found, "a 7B model takes 15 GiB; set HF_HOME to a larger disk, or `hf cache rm`"
        )
    return Check("hub cache", "ok", found)


def service(variable: str) -> Check:
    """Whether somebody listens where an environment variable points."""
    name = variable.split("_")[0].lower()
    address = os.environ[variable]
    if name == "ray" and not _is_installed("ray"):
        return Check(
            "ray", "fail", f"{variable} is set and Ray is not installed", "pip install -e '.[ray]' in the checkout"
        )
    if name == "ray" and address == "local":
        return Check(name, "ok", "each run starts Ray for itself")
    # Ray's own form is host:port, and a run takes no other.
    is_form = name != "ray" or re.fullmatch(r"[^/@]+:\d+", address)
    url = _url(address if name != "ray" else f"ray://{address}") if is_form else None
    if url is None or (name == "mlflow" and not _is_place(address)) or (url.scheme in _PORTS and not url.hostname):
        form = "HOST:PORT" if name == "ray" else "http://HOST:PORT or to a folder that is there"
        return Check(name, "fail", f"{variable} is no address", f"unset it, or set it to {form}{_ENCODED}")
    port = url.port or _PORTS.get(url.scheme)
    if url.hostname is None or port is None:
        return Check(name, "ok", f"{variable} names no host and port to reach")
    try:
        socket.create_connection((url.hostname, port), TIMEOUT_S).close()
    except (OSError, UnicodeError) as problem:
        why = getattr(problem, "strerror", None) or type(problem).__name__
        return Check(name, "fail", f"{url.hostname}:{port} cannot be reached: {why}", f"start it, or unset {variable}")
    return Check(name, "ok", f"{url.hostname}:{port} listens")


# Parts


def _url(address: str) -> SplitResult | None:
    """A URL in its parts, whose host and port can be told; None where it is none.

    The parser's own words are nobody's to read: they quote passwords.
    """
    try:
        url = urlsplit(address)
        _ = url.port
    except ValueError:
        return None
    # A bare / in a password ends the host too early, so that the user's name would pass for it.
    misplaced = url.netloc and "@" in url.path + url.query + url.fragment
    return None if misplaced or any(letter.isspace() for letter in url.netloc) else url


def _endpoint_is_good() -> bool:
    """Whether HF_ENDPOINT, where it is set, is a URL. Where it is not, huggingface_hub cannot even be imported."""
    endpoint = os.environ.get("HF_ENDPOINT")
    url = _url(endpoint or "https://huggingface.co")
    return url is not None and url.scheme in ("http", "https") and bool(url.hostname)


def _is_place(address: str) -> bool:
    """Whether MLflow can keep something there: a URI, or a path that is there or plainly meant as one."""
    if address.partition(":")[0] in ("file", "databricks", "databricks-uc", "uc"):
        return True
    if "://" in address:
        return not address.startswith("://")
    # Path's own would raise where the name is too long, with the name in its words.
    return address.startswith(("/", "./", "../")) or os.path.exists(address)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _size(folder: Path, most_s: float = 3.0) -> tuple[int, bool]:
    """Bytes of what lies in a folder, and whether there was time to see it all."""
    size, until = 0, time.monotonic() + most_s
    for top, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += Path(top, name).lstat().st_size
        if time.monotonic() > until:
            return size, False
    return size, True


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
