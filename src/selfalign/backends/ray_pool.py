"""A pool of Ray actors: an engine an actor, a shard a task. Ray places them and restarts them."""

import json
import logging
import os
import queue
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import ray
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError, RuntimeEnvSetupError

from selfalign.core import preemption
from selfalign.core.builds import logged, run_build
from selfalign.core.errors import InternalError, UsageError
from selfalign.core.identity import code_digest
from selfalign.core.protocols import BuildJob, Committed, MapJob
from selfalign.core.shards import ShardReport, run_shard, withdraw
from selfalign.core.stage import Log, Process, Resources, ShardSource

_logger = logging.getLogger(__name__)

# A shard whose worker dies is handed out again; the journal beside it finds the row that kills, after three deaths
# a row. This bound only ends what the journal cannot explain (a node that kills every worker at start).
DEATHS_PER_SHARD = 1_000
DEATHS_PER_BUILD = 10
SHARDS_IN_FLIGHT = 2
"""An actor has its next shard before it has done with one, so that its GPU does not wait for the driver."""
LOOK_S, WAIT_S = 0.2, 60.0
END_S = 5.0
"""How long workers that are ended may take to say that nothing killed them."""
SAVE_S = 300.0
"""How long a build that was asked to end may save. A cluster may have less patience."""
LOST = (RayActorError, OutOfMemoryError)
"""What a task raises whose worker died, or is out of reach."""

# In a list, a reference travels as one: what it stands for is fetched once a step, and not with every shard.
Held: TypeAlias = "Sequence[Any]"
Said: TypeAlias = "Committed | Mapping[str, float] | tuple[str, int, str]"


class Worker:
    """What runs inside an actor. It opens a stage once, and its model stays for the steps that come after."""

    def __init__(self) -> None:
        self._opened: tuple[Any, MapJob, Process] | None = None

    def ready(self, code: str) -> None:
        """Answer. Raises UsageError where this worker's sources are not the driver's, which have the digest `code`."""
        if code != code_digest():
            raise UsageError(
                f"the worker on {_node()} has other selfalign sources than the driver; give both one image, or the "
                "driver's sources to the workers by py_modules"
            )

    def shard(self, step: Held, number: int, source: ShardSource) -> ShardReport:
        """Process one shard of a MapJob that came without its sources."""
        if self._opened is None or self._opened[0] != step[0]:
            job: MapJob = ray.get(step[0])
            check_sees(job)
            self._opened = (step[0], job, job.stage.open(job.context))
        _, job, process = self._opened
        return run_shard(job.stage, process, source, job.artifact, number, job.stall_minutes)

    @ray.method(concurrency_group="meanwhile")  # type: ignore[untyped-decorator]
    def ask(self) -> None:
        """Ask the build under way to save and end."""
        preemption.ask(signal.SIGTERM)

    @ray.method(concurrency_group="meanwhile")  # type: ignore[untyped-decorator]
    def overlooks(self) -> bool:
        """Whether the build does not look for such a request."""
        return preemption.overlooked()

    @ray.method(concurrency_group="meanwhile")  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """End at once, by the driver's will."""
        withdraw()
        os._exit(0)

    def build(self, step: Held) -> Iterator[Said]:
        """Run a build: first what it measures and logs, each as it comes, and last what is committed."""
        self._opened = None
        job: BuildJob = ray.get(step[0])
        check_sees(job)
        said: queue.Queue[Said | None] = queue.Queue()

        def build() -> Committed:
            with preemption.delivered():
                committed = run_build(job, lambda line: said.put(dict(line)))
                # Done is done: the driver finishes the artifact, and obeys the request itself.
                preemption.forget()
                return committed

        with ThreadPoolExecutor(1) as thread, logged(said.put):
            building = thread.submit(build)
            building.add_done_callback(lambda _: said.put(None))
            while (line := said.get()) is not None:
                yield line
            yield building.result()


@dataclass(eq=False)
class Member:
    """An actor as the driver sees it. It is given shards while `starting` is None: nobody waits for it to answer."""

    actor: Any
    starting: Any
    shards: int = 0


class Pool:
    """The workers, all with the same share of a node's CPUs and GPUs. Raises UsageError for workers that cannot be."""

    def __init__(self, code: str) -> None:
        self._code = code
        self._share: tuple[float, float] | None = None
        self._members: list[Member] = []
        # Ray restarts a worker that died, wherever it can place it. The tasks that it had are the driver's to give
        # out again: to it, or to others if it is never placed again.
        self._actor = ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={"meanwhile": 1})(Worker)

    def map(self, job: MapJob, done: Callable[[ShardReport], None]) -> None:
        """See `core.protocols.Backend`."""
        workers = job.resources.workers
        with preemption.delivered(), self._given_back():
            preemption.defer()
            # Those that cannot be placed yet are what an autoscaler adds nodes for.
            self._ask_for(job.resources, workers.min, min(workers.max, len(job.todo)))
            self._map(job, done)
        self._shrink(workers.min)

    def build(self, job: BuildJob, log: Log) -> Committed:
        """Run a build in one worker; one that dies is followed by another, which goes on from its checkpoints."""
        with self._given_back():
            preemption.defer()
            self._ask_for(job.resources, 1, 1)
            return self._build(job, log)

    def close(self) -> None:
        """Give all workers back, whatever they do."""
        if asked := [member.actor.end.remote() for member in self._members if member.shards]:
            ray.wait(asked, num_returns=len(asked), timeout=END_S)
        while self._members:
            ray.kill(self._members.pop().actor)

    @contextmanager
    def _given_back(self) -> Iterator[None]:
        """Whatever ends the work: nobody goes on with it."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _shrink(self, number: int) -> None:
        """Give back workers that have nothing to do, those first that are not there yet, until `number` are left."""
        idle = sorted((m for m in self._members if not m.shards), key=lambda m: m.starting is None)
        for member in idle[: max(0, len(self._members) - number)]:
            self._members.remove(member)
            ray.kill(member.actor)

    def _ask_for(self, resources: Resources, least: int, number: int) -> None:
        check_possible(resources, least)
        share = (resources.cpus, resources.gpus)
        self._shrink(number if share == self._share else 0)
        self._share = share
        while len(self._members) < number:
            self._members.append(self._new())

    def _new(self) -> Member:
        assert self._share is not None
        actor = self._actor.options(num_cpus=self._share[0], num_gpus=self._share[1]).remote()
        return Member(actor, actor.ready.remote(self._code))

    def _answer_again(self, actor: Any) -> Any:
        """What is there as soon as Ray has restarted the actor."""
        return actor.ready.options(max_task_retries=-1).remote(self._code)

    def _map(self, job: MapJob, done: Callable[[ShardReport], None]) -> None:
        step = [ray.put(replace(job, sources=(), todo=()))]
        todo, deaths = deque(job.todo), Counter[int]()
        tasks: dict[Any, tuple[Member, int]] = {}
        while todo or tasks:
            for member in self._next_for(len(todo)):
                number = todo.popleft()
                tasks[member.actor.shard.remote(step, number, job.sources[number])] = (member, number)
                member.shards += 1
            if not todo:
                self._shrink(job.resources.workers.min)
            ref = self._wait(tasks)
            if ref not in tasks:
                self._welcome(ref)
                continue
            member, number = tasks.pop(ref)
            member.shards -= 1
            try:
                done(_get(ref))
            except LOST as error:
                deaths[number] += 1
                if deaths[number] > DEATHS_PER_SHARD:
                    raise InternalError(f"shard {number} of {job.artifact.name} kills every worker: {error}") from error
                todo.appendleft(number)
                member.starting = member.starting or self._answer_again(member.actor)

    def _next_for(self, shards: int) -> Iterator[Member]:
        """Who gets the next shards, of so many that are left: nobody a second one that another could soon begin."""
        there = [member for member in self._members if member.starting is None]
        for most in range(SHARDS_IN_FLIGHT):
            for member in there:
                if member.shards == most and shards > (len(self._members) if most else 0):
                    shards -= 1
                    yield member

    def _build(self, job: BuildJob, log: Log) -> Committed:
        step, (member,) = [ray.put(job)], self._members
        ending = partial(_has_ended, member.actor, [])
        deaths, furthest = 0, -1.0
        while deaths < DEATHS_PER_BUILD:
            while member.starting is not None:
                self._welcome(self._wait({}))
            try:
                said = member.actor.build.options(num_returns="streaming").remote(step)
                while True:
                    match _get(next(_first([said], end=ending))):
                        case Committed() as committed:
                            return committed
                        case (name, level, message):
                            logging.getLogger(name).log(level, "%s", message)
                        case line:
                            log(line)
                            if line.get("step", -1.0) > furthest:
                                # It goes on, however often it is lost.
                                furthest, deaths = line["step"], 0
            except LOST as error:
                lost, deaths = error, deaths + 1
                _logger.warning("the worker that built %s was lost; another goes on", job.artifact.name)
                member.starting = self._answer_again(member.actor)
        raise InternalError(
            f"{DEATHS_PER_BUILD} workers died while they built {job.artifact.name}, without a step; the last: {lost}"
        ) from lost

    def _wait(self, tasks: Mapping[Any, Any]) -> Any:
        """The next thing to happen: a task that ended, or an actor that is there."""
        starting = [member.starting for member in self._members if member.starting is not None]
        return _first([*tasks, *starting], "" if tasks else "no worker has started yet: has the cluster room for one?")

    def _welcome(self, ref: Any) -> None:
        member = next(member for member in self._members if member.starting == ref)
        try:
            _get(ref)
            member.starting = None
        except RuntimeEnvSetupError as error:
            raise UsageError(f"the cluster cannot set up the environment of its workers: {error}") from error
        except RayActorError as error:
            if error.actor_init_failed:
                told = str(error).strip().splitlines()[-1]
                raise UsageError(f"a worker cannot load selfalign, which every node needs: {told}") from error
            if isinstance(error, ActorUnavailableError):
                member.starting = self._answer_again(member.actor)
                return
            # One that ended of its own accord (SIGTERM) is not restarted.
            new = self._new()
            member.actor, member.starting = new.actor, new.starting


def check_possible(resources: Resources, least: int) -> None:
    """Raise UsageError, with what the cluster has, where its nodes cannot give `least` workers their shares.

    Where an autoscaler may add nodes nobody knows what they will have, and nothing is refused.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(_room(node, resources) for node in nodes)
    if room >= least or _grows():
        return
    share = f"{resources.cpus:g} CPUs and {resources.gpus:g} GPUs"
    told = f"there is room for {room} workers of {share}, not {least}" if room else f"no node can give a worker {share}"
    kinds = Counter(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    has = "; ".join(f"{number} with {what}" for what, number in kinds.items())
    raise UsageError(f"{told} (resources.<section>); of the cluster's nodes there are {has}")


def _room(node: Mapping[str, float], resources: Resources) -> int:
    """How many workers a node has room for."""
    # Shares of one GPU are all of the same one.
    shares = resources.gpus if resources.gpus >= 1 else 1 / int(1 / resources.gpus + 1e-9) if resources.gpus else 0
    cpus = int(node.get("CPU", 0) / resources.cpus + 1e-9)
    return min(cpus, int(node.get("GPU", 0) / shares + 1e-9)) if shares else cpus


def _grows() -> bool:
    """Whether an autoscaler looks after the cluster. Ray has no public word for it, but its monitor reports.

    The monitor that every head has, which only watches, calls a node's type `node_<id>`.
    """
    client = ray._private.worker.global_worker.gcs_client
    told = json.loads(client.internal_kv_get(b"__autoscaling_status", None) or b"{}")
    types = (told.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    newer = GetClusterStatusReply.FromString(client.get_cluster_status()).HasField("autoscaling_state")
    return newer or any(not name.startswith("node_") for name in types.values())


def _first(refs: Sequence[Any], slow: str = "", end: Callable[[], bool] = lambda: True) -> Any:
    """The first that has something to say; that nothing has for a minute is told by the warning `slow`.

    Looks for a request to end meanwhile, since what a signal's handler raises does not interrupt Ray, and obeys it when
    `end` says so.
    """
    looks = 0
    while True:
        ended, _ = ray.wait(refs, timeout=LOOK_S)
        if preemption.asked() and end():
            preemption.deliver()
        if ended:
            return ended[0]
        looks += 1
        if slow and looks == WAIT_S // LOOK_S:
            _logger.warning(slow)


def _has_ended(worker: Any, asked: list[float]) -> bool:
    """Ask a worker to save its build and to end; whether it has had its time, or does not look.

    `asked` holds when it was asked.
    """
    if not asked:
        asked.append(time.monotonic())
        worker.ask.remote()
    passed_s = time.monotonic() - asked[0]
    return passed_s > SAVE_S or (passed_s > preemption.PATIENCE_S and ray.get(worker.overlooks.remote()))


def _get(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from error


def check_sees(job: MapJob | BuildJob) -> None:
    """Raise UsageError where this worker's run folder is another than the driver's, by the same name."""
    if job.driver is not None and not job.driver.exists():
        raise UsageError(
            f"the worker on {_node()} does not see what the driver writes to {job.driver.parent.parent}; put the run "
            "folder (--run) on a file system that all nodes share, or on object storage"
        )


def _node() -> str:
    return str(ray.util.get_node_ip_address())
