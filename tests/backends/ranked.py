"""A build in several ranks, without a model: each says who it is, and then does what it was told."""

import errno
import os
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

from selfalign.core import preemption
from selfalign.core.errors import GateError
from selfalign.core.ledger import Ledger
from selfalign.core.locations import scratch
from selfalign.core.stage import BuildStage, Built, Context, Log, Place, Settings


@dataclass(frozen=True)
class Ranked(BuildStage):
    """`then`: build | gate, full (rank 1 raises) | crash (rank 1 dies) | save (when asked to end) | wait (for ever)."""

    name: ClassVar[str] = "ranked"
    then: str = "build"

    def settings(self) -> Settings:
        return {"then": self.then}

    @property
    def processes(self) -> int | None:
        return 2

    def build(self, context: Context, place: Place, log: Log) -> Built:
        rank, kept = os.environ["RANK"], scratch(place.kept)
        preemption.defer()
        (kept / f"rank-{rank}").write_text(str(os.getpid()))
        (place.draft / f"rank-{rank}").write_text(os.environ["WORLD_SIZE"])
        log({"step": float(rank)})
        while not all((kept / f"rank-{n}").exists() for n in (0, 1)):
            time.sleep(0.01)
        match self.then:
            case "gate" if rank == "1":
                raise GateError("the loss is nan at step 3")
            case "full" if rank == "1":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "crash" if rank == "1":
                print("the last words of rank 1", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            case "save":
                while not preemption.asked():
                    time.sleep(0.01)
                (kept / f"saved-{rank}").touch()
                preemption.deliver()
            case "build":
                return Built(("rank-0",), Ledger(1, 1, 1), {"rank": int(rank)})
        time.sleep(600)
        raise AssertionError
