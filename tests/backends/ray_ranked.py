"""Builds of several ranks for Ray's workers to import: one that counts its starts, and a training of a small model."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from backends.ranked import Ranked
from selfalign.core.ledger import Ledger
from selfalign.core.stage import BuildStage, Built, Context, Log, Place
from selfalign.training import ranks
from training.resumable import Case, examples


@dataclass(frozen=True)
class Counted(Ranked):
    """Beside what it is told: `starts` in the place's `kept` has a line for each start of a rank."""

    def build(self, context: Context, place: Place, log: Log) -> Built:
        assert isinstance(place.kept, Path)
        place.kept.mkdir(parents=True, exist_ok=True)
        with (place.kept / "starts").open("a") as file:
            file.write(f"{os.environ['RANK']}\n")
        return super().build(context, place, log)


@dataclass(frozen=True)
class Tiny(BuildStage):
    """Trains as a case says; each rank leaves its process's number in the folder `pids`."""

    name: ClassVar[str] = "tiny"
    case: Case
    pids: str

    @property
    def processes(self) -> int | None:
        return self.case.training().num_processes

    def build(self, context: Context, place: Place, log: Log) -> Built:
        from selfalign.training.checkpoints import Checkpoints
        from selfalign.training.sft import train

        (Path(self.pids) / f"rank-{ranks.rank()}").write_text(str(os.getpid()))
        checkpoints = Checkpoints(place.kept, "this", place.lease)
        trained = train(
            examples(self.case.rows), self.case.base(), self.case.training(), place.draft, 7, log, checkpoints
        )
        return Built(trained.content, Ledger(1, 1, 1), dict(trained.metrics), int(trained.metrics["tokens"]))


@dataclass(frozen=True)
class Alone(Tiny):
    """In the driver's own process."""

    @property
    def processes(self) -> int | None:
        return None


@dataclass(frozen=True)
class Deadly(Counted):
    """Kills the ranks that unpickle it."""

    def __reduce__(self) -> tuple[Callable[[], "Deadly"], tuple[()]]:
        return (_load, ())


def _load() -> Deadly:
    if "TrainWorker" in Path("/proc/self/cmdline").read_text():
        os.kill(os.getpid(), signal.SIGKILL)
    return Deadly()
