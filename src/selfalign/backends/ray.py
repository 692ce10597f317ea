"""The Ray backend: a pool of actors, one engine an actor, one shard a task."""

import os
from collections.abc import Callable
from typing import Any

from selfalign.core.errors import InternalError, ServiceError, UsageError
from selfalign.core.identity import code_digest
from selfalign.core.protocols import BuildJob, MapJob
from selfalign.core.shards import ShardReport, run_shard
from selfalign.core.stage import Built, Log, Process, Resources

# A shard whose worker dies is handed out again; the journal beside it finds the row that kills, after three deaths
# a row. This bound only ends what the journal cannot explain (a node that kills every worker at start).
DEATHS_PER_SHARD = 50


class Worker:
    """What runs inside an actor: it opens a stage once and then processes shards."""

    def __init__(self) -> None:
        self._opened: tuple[str, Process] | None = None

    def shard(self, code: str, job: MapJob, number: int) -> ShardReport:
        """Process one shard."""
        _check_code(code)
        if self._opened is None or self._opened[0] != job.artifact.name:
            self._opened = (job.artifact.name, job.stage.open(job.context))
        return run_shard(job.stage, self._opened[1], job.sources[number], job.artifact, number)

    def build(self, code: str, job: BuildJob) -> tuple[Built, list[dict[str, float]]]:
        """Run a build; its log lines come back with the result."""
        _check_code(code)
        lines: list[dict[str, float]] = []
        return job.stage.build(job.context, job.place, lambda line: lines.append(dict(line))), lines


class RayBackend:
    """Runs shards on a Ray cluster whose workers see the run folder."""

    def __init__(self) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UsageError("the Ray backend needs Ray: pip install -e '.[ray]' in the checkout") from error
        self._ray, self._code = ray, code_digest()
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS"), ignore_reinit_error=True, log_to_driver=False)
        except (ConnectionError, RuntimeError) as error:
            raise ServiceError(f"Ray cannot be reached at {os.environ.get('RAY_ADDRESS')}: {error}") from error
        # Lost actors are replaced by hand below, so that the shard they held is known.
        self._actor = ray.remote(max_restarts=0)(Worker)

    def map(self, job: MapJob, done: Callable[[ShardReport], None]) -> None:
        """See `core.protocols.Backend`."""
        from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

        todo = list(reversed(job.todo))
        idle = [self._start(job.resources) for _ in range(min(job.resources.workers, len(todo)))]
        busy: dict[Any, tuple[Any, int]] = {}
        deaths: dict[int, int] = {}
        while todo or busy:
            while todo and idle:
                worker, number = idle.pop(), todo.pop()
                busy[worker.shard.remote(self._code, job, number)] = (worker, number)
            ready, _ = self._ray.wait(list(busy), num_returns=1)
            worker, number = busy.pop(ready[0])
            try:
                done(self._ray.get(ready[0]))
            except (ActorDiedError, ActorUnavailableError, OutOfMemoryError) as error:
                deaths[number] = deaths.get(number, 0) + 1
                if deaths[number] > DEATHS_PER_SHARD:
                    raise InternalError(f"shard {number} of {job.artifact.name} kills every worker") from error
                todo.append(number)
                # It may be out of reach and not dead; what it holds is needed for the next one.
                self._ray.kill(worker)
                worker = self._start(job.resources)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error
            idle.append(worker)
        for worker in idle:
            self._ray.kill(worker)

    def build(self, job: BuildJob, log: Log) -> Built:
        """See `core.protocols.Backend`."""
        if (processes := job.stage.processes) is not None:
            raise UsageError(
                f"{job.stage.name} wants {processes} processes that build together, which the Ray backend does not "
                "start yet; run this section with --backend local on the machine that has the GPUs, and the rest on Ray"
            )
        worker = self._start(job.resources)
        try:
            built, lines = self._ray.get(worker.build.remote(self._code, job))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        finally:
            self._ray.kill(worker)
        for line in lines:
            log(line)
        return built  # type: ignore[no-any-return]

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()

    def _start(self, resources: Resources) -> Any:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= resources.cpus and n.get("GPU", 0) >= resources.gpus for n in nodes):
            has = "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
            raise UsageError(
                f"no node can give a worker {resources.cpus:g} CPUs and {resources.gpus:g} GPUs (resources.<section>); "
                f"the cluster's nodes have {has}"
            )
        return self._actor.options(num_cpus=resources.cpus, num_gpus=resources.gpus).remote()


def _check_code(code: str) -> None:
    if code != code_digest():
        raise UsageError("driver and workers run different selfalign sources; use one image, or py_modules")
