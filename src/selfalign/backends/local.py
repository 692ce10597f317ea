"""The local backend: everything in this process, or, for a build of several ranks, in processes beside it."""

from collections.abc import Callable

from selfalign.core.builds import run_build
from selfalign.core.protocols import BuildJob, Committed, MapJob
from selfalign.core.shards import ShardReport, run_shard
from selfalign.core.stage import Log


class LocalBackend:
    """Runs shards one after the other."""

    def map(self, job: MapJob, done: Callable[[ShardReport], None]) -> None:
        """See `core.protocols.Backend`."""
        process = job.stage.open(job.context)
        for number in job.todo:
            done(run_shard(job.stage, process, job.sources[number], job.artifact, number, job.stall_minutes))

    def build(self, job: BuildJob, log: Log) -> Committed:
        """See `core.protocols.Backend`."""
        if (processes := job.stage.processes) is not None:
            from selfalign.backends.torchrun import launch

            return launch(job, processes, log)
        return run_build(job, log)

    def close(self) -> None:
        """Nothing is held."""
