"""The local backend: everything in this process."""

from collections.abc import Callable, Mapping
from pathlib import Path

from selfalign.core.protocols import MapJob
from selfalign.core.shards import ShardReport, run_shard
from selfalign.core.stage import BuildStage, Built, Context, Resources


class LocalBackend:
    """Runs shards one after the other."""

    def map(self, job: MapJob, done: Callable[[ShardReport], None]) -> None:
        """See `core.protocols.Backend`."""
        process = job.stage.open(job.context)
        for number in job.todo:
            done(run_shard(job.stage, process, job.sources[number], job.artifact, number))

    def build(
        self,
        stage: BuildStage,
        context: Context,
        folder: Path,
        log: Callable[[Mapping[str, float]], None],
        resources: Resources,
    ) -> Built:
        """See `core.protocols.Backend`."""
        return stage.build(context, folder, log)

    def close(self) -> None:
        """Nothing is held."""
