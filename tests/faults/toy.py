"""The toy, made slow enough to be hit, with rows that hang or take all memory."""

import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

from selfalign.core.records import Document, Outcome
from selfalign.core.stage import STALL_MINUTES, Context, Process, Step
from skeleton.toy import Ask, Toy


@dataclass(frozen=True)
class SlowAsk(Ask):
    """Asks the same, and takes `pause_s` for each row.

    `room` is how many bytes its process may take beyond what it has when it is opened; the ids of each try's rows go
    into the file `tries`, a line a try.
    """

    pause_s: float = 0
    room: int | None = None
    tries: str | None = None

    def open(self, context: Context) -> Process:
        process = super().open(context)
        if self.room is not None:
            has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (has + self.room, resource.getrlimit(resource.RLIMIT_AS)[1]))

        def run(rows: Sequence[Document]) -> Iterable[Outcome]:
            if self.tries is not None:
                with open(self.tries, "a") as file:
                    file.write(" ".join(row.id for row in rows) + "\n")
            time.sleep(self.pause_s * len(rows))
            return process.run(rows)

        return Process(run, process.tokens)


@dataclass(frozen=True)
class SlowToy(Toy):
    """The same recipe as the toy with the same settings, to the identity of each step."""

    pause_s: float = 0
    room: int | None = None
    tries: str | None = None
    stall_minutes: float = STALL_MINUTES

    def steps(self) -> list[Step]:
        """See the toy."""
        slow = partial(SlowAsk, pause_s=self.pause_s, room=self.room, tries=self.tries)
        with (
            patch("skeleton.toy.Ask", slow),
            patch("skeleton.toy.Step", partial(Step, stall_minutes=self.stall_minutes)),
        ):
            return super().steps()
