"""Steps without a model, whose rows say where they were made, and jobs of them."""

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from selfalign.core import preemption
from selfalign.core.errors import GateError
from selfalign.core.lease import lease
from selfalign.core.ledger import Ledger
from selfalign.core.locations import replace
from selfalign.core.protocols import BuildJob, MapJob
from selfalign.core.records import Document, Outcome, Record
from selfalign.core.stage import BuildStage, Built, Context, Log, MapStage, Place, Process, Resources
from selfalign.core.store import Artifact

WAIT_S = 60.0


@dataclass(frozen=True)
class Where(MapStage):
    """A row says its node, devices and process, if it `tells`. No worker goes on before `meet` of them are at work.

    Who was at work has a file in the folder `meeting`.
    """

    name: ClassVar[str] = "where"
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document
    meeting: str
    meet: int = 1
    tells: bool = True
    pause_s: float = 0.0
    error: str | None = None

    def open(self, context: Context) -> Process:
        folder = Path(self.meeting)

        def run(rows: Sequence[Document]) -> Iterable[Outcome]:
            (folder / str(os.getpid())).touch()
            wait_for(lambda: len(list(folder.iterdir())) >= self.meet)
            time.sleep(self.pause_s)
            if self.error is not None:
                raise GateError(self.error)
            for row in rows:
                yield Document(id=row.id, source="here", text=_here() if self.tells else row.text)

        return Process(run)


@dataclass(frozen=True)
class Opening(MapStage):
    """Its first `deaths` openings die, or hang. Each leaves its process's number in the file `opened`."""

    name: ClassVar[str] = "opening"
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document
    opened: str
    deaths: int = 0
    then: Literal["die", "hang"] = "die"

    def open(self, context: Context) -> Process:
        with Path(self.opened).open("a") as file:
            file.write(f"{os.getpid()}\n")
        if len(pids(Path(self.opened))) <= self.deaths:
            if self.then == "hang":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        return Process(list)


def pids(path: Path) -> list[int]:
    """The numbers that a file has, one a line."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def _here() -> str:
    import ray

    node = ray.get_runtime_context().get_node_id()
    return json.dumps({"node": node, "devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "pid": os.getpid()})


@dataclass(frozen=True)
class Made(BuildStage):
    """A build that goes on only when its first line was `heard`, and dies in its first `deaths` attempts."""

    name: ClassVar[str] = "made"
    heard: str
    deaths: int = 0

    def build(self, context: Context, place: Place, log: Log) -> Built:
        assert isinstance(place.kept, Path)
        place.kept.mkdir(parents=True, exist_ok=True)
        attempts = place.kept / "attempts"
        with attempts.open("a") as file:
            file.write(f"{os.getpid()}\n")
        tries = attempts.read_text().split()
        log({"attempt": float(len(tries))})
        logging.getLogger("selfalign.made").warning("attempt %d", len(tries))
        if len(tries) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for(Path(self.heard).exists)
        (place.draft / "made").write_text("whole")
        return Built(("made",), Ledger(), metrics={"pids": [int(pid) for pid in tries]})


@dataclass(frozen=True)
class Saving(BuildStage):
    """A build that goes on until it is asked to end, and then saves itself, or is `done` anyway."""

    name: ClassVar[str] = "saving"
    done: bool = False

    def build(self, context: Context, place: Place, log: Log) -> Built:
        preemption.defer()
        log({"step": 1.0})
        wait_for(preemption.asked)
        if self.done:
            (place.draft / "made").write_text("whole")
            return Built(("made",), Ledger())
        replace(place.kept / "saved", b"all of it")
        preemption.deliver()
        raise AssertionError


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds. Raises TimeoutError after a minute."""
    until = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)


def map_job(stage: MapStage, folder: Path, shards: int, resources: Resources) -> MapJob:
    """A job of so many shards of two rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = tuple(
        tuple(Document(id=f"{n:02d}/{i}", source="toy", text=f"text {n} {i}") for i in range(2)) for n in range(shards)
    )
    artifact, todo = Artifact(folder, "identity"), tuple(range(shards))
    return MapJob(stage, Context(stage.name, 0, {}), artifact, sources, todo, resources)


@contextmanager
def build_job(stage: BuildStage, folder: Path, resources: Resources) -> Iterator[BuildJob]:
    """A job under its lease."""
    folder.mkdir(parents=True, exist_ok=True)
    with lease(folder, wait=False, say=print) as held:
        yield BuildJob(stage, Context(stage.name, 0, {}), Artifact(folder, "identity"), held, resources)
