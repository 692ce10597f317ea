"""Do one build: into a draft, and under its lease to the files of its artifact."""

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from selfalign.core import preemption
from selfalign.core.errors import LeaseHeldError, SelfalignError, StorageError
from selfalign.core.identity import file_digest
from selfalign.core.locations import commit_folder, files_in, reachable, remove, scratch
from selfalign.core.protocols import BuildJob, Committed
from selfalign.core.stage import Log, Place

Line: TypeAlias = Mapping[str, float] | tuple[str, int, str]
"""What a build says: figures, or a log record by its logger, level and message."""

# A pod or a launcher may have set them for a process that builds alone, where the libraries would wait for the others.
_RANKED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@contextmanager
def logged(say: Callable[[Line], None]) -> Iterator[None]:
    """Hand on what our loggers say while the block runs."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say((record.name, record.levelno, record.getMessage()))

    ours, handler = logging.getLogger("selfalign"), Handler()
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)


def hand_on(line: Line, log: Log) -> None:
    """Say in the driver what a build said in another process."""
    match line:
        case (name, level, message):
            logging.getLogger(name).log(level, "%s", message)
        case figures:
            log(figures)


def run_for_driver(job: BuildJob, say: Callable[[Line], None], rank: int | None = None) -> Committed:
    """`run_build` for a driver in another process, to which `say` brings what is measured and logged."""
    with preemption.delivered(), logged(say):
        committed = run_build(job, lambda figures: say(dict(figures)), rank)
        # Done is done: the driver finishes the artifact, and obeys the request itself.
        preemption.forget()
        return committed


def as_ours(error: SelfalignError | OSError) -> SelfalignError:
    """An error that tells its exit code, also to the process that asked for the build."""
    return error if isinstance(error, SelfalignError) else StorageError(str(error))


@reachable()
def run_build(job: BuildJob, log: Log, rank: int | None = None) -> Committed:
    """Build, and commit the files. Of several processes, each with its `rank`, those of rank 0, whose result counts.

    Raises LeaseHeldError where somebody else has taken over, whose files stay.
    """
    if rank is None:
        for name in _RANKED:
            os.environ.pop(name, None)
    artifact, token = job.artifact, job.lease.owner.token
    mine = f"{token}-{rank or 0}-"
    # New at every start: whoever was lost under the same lease may have left his half written.
    place = Place(artifact.draft(f"{mine}{uuid.uuid4().hex[:12]}"), artifact.kept, artifact.identity, job.lease)
    for leftover in place.draft.parent.glob("draft-*"):
        # What the dead left on this machine; the other ranks are at work in theirs.
        if token not in leftover.name or mine in leftover.name:
            remove(leftover)
    place.draft.mkdir(parents=True)
    built = job.stage.build(job.context, place, log)
    if rank:
        remove(place.draft)
        return Committed(built, {})
    preemption.defer(looks=False)
    files = {name: file_digest(place.draft / name) for name in files_in(place.draft)}
    # Whoever left files without a manifest is dead as long as the lease is ours.
    job.lease.check()
    if artifact.manifest() is None:
        remove(artifact.files)
    job.lease.check()
    if not commit_folder(place.draft, artifact.files):
        raise LeaseHeldError(f"{artifact.name}: somebody else took over and committed it; run again to use it")
    if not isinstance(artifact.kept, Path):
        # This machine's copies of checkpoints; the checkpoints themselves stay until the manifest is there.
        remove(scratch(artifact.kept))
    return Committed(built, files)
