"""Do one build: into a draft, and under its lease to the files of its artifact."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selfalign.core import preemption
from selfalign.core.errors import LeaseHeldError, SelfalignError, StorageError
from selfalign.core.identity import file_digest
from selfalign.core.locations import commit_folder, files_in, reachable, remove, scratch
from selfalign.core.protocols import BuildJob, Committed
from selfalign.core.stage import Log, Place


@contextmanager
def logged(say: Callable[[tuple[str, int, str]], None]) -> Iterator[None]:
    """Hand on what our loggers say while the block runs: each record's logger, level and message."""

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


def as_ours(error: SelfalignError | OSError) -> SelfalignError:
    """An error that tells its exit code, also to the process that asked for the build."""
    return error if isinstance(error, SelfalignError) else StorageError(str(error))


@reachable()
def run_build(job: BuildJob, log: Log) -> Committed:
    """Build, and commit the files; of several processes (RANK) the first commits, and what it returns counts.

    Raises LeaseHeldError where somebody else has taken over, whose files stay.
    """
    artifact = job.artifact
    place = Place(artifact.draft(job.lease.owner.token), artifact.kept, artifact.identity, job.lease)
    for leftover in place.draft.parent.glob("draft-*"):
        # What a dead builder left on this machine.
        if leftover != place.draft:
            remove(leftover)
    place.draft.mkdir(parents=True, exist_ok=True)
    built = job.stage.build(job.context, place, log)
    if os.environ.get("RANK", "0") != "0":
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
