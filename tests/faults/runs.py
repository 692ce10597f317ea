"""Runs of the toy in processes that may die, and what must hold of their folders at any time and at the end."""

import json
import multiprocessing
import pickle
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from faults.drive import trial
from faults.saboteur import Saboteur
from selfalign.backends.local import LocalBackend
from selfalign.core.locations import Location, files_in, located
from selfalign.core.records import Candidate, Document
from selfalign.core.stage import Step
from selfalign.core.store import Manifest, Store, balanced
from selfalign.core.tables import read_outcomes
from selfalign.pipelines.gc import collect
from selfalign.pipelines.runner import Runner, Silent
from skeleton.toy import Toy

WAIT_S = 120.0
NO_SPACE = 74
KILLED = -9
# Whatever a driver loads, so that each trial is a fork away. Pandas is Arrow's wish; pytest is its main module.
LOADED = ["faults.drive", "faults.toy", "pyarrow.parquet", "pandas", "pytest", "selfalign.engines.scripted"]
LOADED += ["s3fs"]
COMMITTED = re.compile(r"(.*/)?(shard-\d{5}\.parquet|manifest\.json|files/.*)")
# What processes that died leave in an object store: journals, leases, and measurements, which are files of their own.
LEFT = re.compile(r"artifacts/[\w.-]+/(journal-\d{5}/\w+\.json|lease-\d{6}\.json|metrics-[\w.-]+\.jsonl)|drivers/.*")
# What a manifest says of how it came about, and not of what it holds.
OF_THE_WAY = ("seconds", "tokens", "code")


class Forks:
    """Processes forked from a server that has everything loaded."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(LOADED)
        self._lock = threading.Lock()

    def start(self, *arguments: Any) -> Any:
        """A process that is at `faults.drive.trial`."""
        process = self._context.Process(target=trial, args=arguments, daemon=True)
        # Each start looks after the others, and of two who look at one that has ended only one is told how.
        with self._lock:
            process.start()
        return process

    def end(self, process: Any, within_s: float = WAIT_S) -> int | None:
        """Wait for a process; its exit code, or minus the signal that killed it. None where it was still at work."""
        ended = wait([process.sentinel], within_s)
        with self._lock:
            if not ended:
                process.kill()
            process.join()
            return int(process.exitcode) if ended else None

    def close(self) -> None:
        """End the server."""
        from multiprocessing.forkserver import _forkserver

        _forkserver._stop()


@dataclass
class Run:
    """A run folder of a toy, and the processes that work on it one after the other."""

    toy: Toy
    root: Path | str
    forks: Forks
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def location(self) -> Location:
        return located(str(self.root))

    @property
    def log(self) -> Path:
        """Beside the folder, or where none is, beside the toy's script."""
        at = self.root if isinstance(self.root, Path) else Path(self.toy.model.path)
        return at.with_name(re.sub(r"\W+", "-", str(self.root)) + ".log")

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def start(self, saboteur: Saboteur | None = None) -> Any:
        return self.forks.start(self.toy, str(self.root), self.log, self.environment, saboteur)

    def go(self, saboteur: Saboteur | None = None) -> int:
        """Work until the process ends; its exit code, or minus the signal that killed it."""
        code = self.forks.end(self.start(saboteur))
        assert code is not None, f"{self.root} hangs: {self.said}"
        return code

    def manifests(self) -> dict[str, Manifest]:
        """By the names of the steps that are complete."""
        found = {step.name: self.runner().artifact(step).manifest() for step in self.toy.steps()}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    def contents(self) -> dict[str, str]:
        return {name: manifest.sha256 for name, manifest in self.manifests().items()}

    def runner(self) -> Runner:
        return Runner(self.toy.steps(), Store(self.location), LocalBackend(), Silent())

    def step(self, name: str) -> Step:
        return next(step for step in self.toy.steps() if step.name == name)

    def ids(self, name: str) -> list[str]:
        """The ids of all rows that came out of a step."""
        step = self.step(name)
        return [
            row.id for shard in self.runner().artifact(step).shards() for row in read_outcomes(shard, _record(step))
        ]


@dataclass
class Driver:
    """A driver of a run in a process of its own, started again until the run is done."""

    run: Run
    environment: Mapping[str, str]
    codes: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Start it, and wait until it has loaded."""
        assert isinstance(self.run.root, Path)
        toy = self.run.root.with_suffix(".pickle")
        toy.write_bytes(pickle.dumps(self.run.toy))
        command = [sys.executable, "-m", "faults.drive", str(toy), str(self.run.root), "ray"]
        with self.run.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
            )

    def ended(self) -> bool:
        """Whether it is gone; how, is among `codes`."""
        code = self.process.poll()
        if code is not None and self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
            self.codes.append(code)
        return code is not None

    def kill_an_actor(self) -> None:
        """Have the driver use ray.kill."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write("kill\n")
            self.process.stdin.flush()

    def go(self) -> int:
        """Wait for it; its exit code."""
        self.process.wait(WAIT_S)
        self.ended()
        return self.codes[-1]

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.ended()


def until(true: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < limit, what
        time.sleep(0.05)


def side_by_side(work: Callable[[int], None], places: Iterable[int]) -> None:
    """Two at a time, until one fails."""
    with ThreadPoolExecutor(2) as threads:
        started = [threads.submit(work, place) for place in places]
        try:
            for each in as_completed(started):
                each.result()
        finally:
            threads.shutdown(cancel_futures=True)


def _record(step: Step) -> type[Any]:
    output: type[Any] = step.stage.output  # type: ignore[attr-defined]
    assert output in (Candidate, Document)
    return output


def committed(root: Location) -> dict[str, object]:
    """What counts in a run folder, by name: bytes, or what a manifest says."""
    names = [name for name in files_in(root) if COMMITTED.fullmatch(name) and "/draft-" not in name]
    return {name: _said(root / name) for name in names}


def _said(path: Location) -> object:
    data = path.read_bytes()
    if path.name != "manifest.json":
        return data
    return {key: value for key, value in json.loads(data).items() if key not in OF_THE_WAY}


def check_whole(run: Run, calm: Mapping[str, object]) -> None:
    """Whatever is committed so far is, to the byte, what the undisturbed run committed under that name."""
    for name, said in committed(run.location).items():
        # A build's files count with its manifest, and until then may be left behind.
        assert said == calm.get(name), f"{run.root}/{name} differs: {run.said}"


def check_done(run: Run, calm: Run) -> None:
    """The same content, every row once, ledgers that balance, and nothing left that gc does not remove."""
    assert run.contents() == calm.contents(), run.said
    manifests = run.manifests()
    for step in run.toy.steps():
        balanced(manifests[step.name]).check(step.name)
        if hasattr(step.stage, "output"):
            ids = run.ids(step.name)
            assert ids == calm.ids(step.name)
            assert max(Counter(ids).values()) == 1
    if isinstance(run.root, Path):
        list(collect(run.root))
    # gc serves folders alone.
    left = set(files_in(run.location)) - set(files_in(calm.location))
    assert not [name for name in left if isinstance(run.root, Path) or not LEFT.fullmatch(name)], run.said


def stamps(run: Run) -> dict[str, tuple[int, int]]:
    """Which file each shard is, and when it was written."""
    found = {str(path): path.stat() for path in Path(run.root).glob("artifacts/*/shard-*.parquet")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}
