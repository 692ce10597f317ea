"""A pool of Ray actors: an engine an actor, a shard a task. Ray places them."""

import json
import logging
import os
import queue
import signal
import textwrap
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
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, RuntimeEnvSetupError

from selfalign.core import preemption
from selfalign.core.builds import Line, hand_on, run_for_driver
from selfalign.core.errors import InternalError, PreemptedError, UsageError
from selfalign.core.identity import code_digest
from selfalign.core.locations import reachable
from selfalign.core.protocols import BuildJob, Committed, MapJob
from selfalign.core.shards import ShardReport, run_shard, withdraw
from selfalign.core.stage import Log, Resources, ShardSource
from selfalign.core.watchdog import Watchdog

_logger = logging.getLogger(__name__)

# A shard whose worker dies is handed out again; the journal beside it finds the row that kills, after three deaths
# a row. This bound only ends what the journal cannot explain.
DEATHS_PER_SHARD = 1_000
DEATHS_PER_BUILD = 10
DEATHS_AT_OPENING = 3
"""How many workers in a row die in one place of the pool before it counts, unless others have opened the step."""
SHARDS_IN_FLIGHT = 2
"""An actor has its next shard before it has done with one, so that its GPU does not wait for the driver."""
WAIT_S, TELL_S = 60.0, 10.0
END_S = 5.0
"""How long workers that are ended may take to say that nothing killed them."""
LOST = (RayActorError, OutOfMemoryError)
"""What a task raises whose worker died, or is out of reach."""

# In a list, a reference travels as one: what it stands for is fetched once a step, and not with every shard.
Held: TypeAlias = "Sequence[Any]"


class Worker:
    """What runs inside an actor: it opens one step after the other. The model stays where the next has the same."""

    def open(self, code: str, step: Held) -> None:
        """Be ready for a step, a MapJob without its sources or a BuildJob.

        Raises UsageError as `check_fits` does. A model that hangs while it is loaded ends this process.
        """
        job: MapJob | BuildJob = ray.get(step[0])
        check_fits(code, job)
        self._job, self._process = job, None
        if isinstance(job, MapJob):
            with Watchdog(job.stall_minutes * 60).watching(f"{job.artifact.name}, opening its stage"):
                self._process = job.stage.open(job.context)

    def shard(self, number: int, source: ShardSource) -> ShardReport:
        """Process one shard of the step."""
        job = self._job
        assert isinstance(job, MapJob)
        assert self._process is not None
        return run_shard(job.stage, self._process, source, job.artifact, number, job.stall_minutes)

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

    def build(self) -> Iterator[Line | Committed]:
        """Run the build: first what it measures and logs, each as it comes, and last what is committed."""
        job = self._job
        assert isinstance(job, BuildJob)
        said: queue.Queue[Line | None] = queue.Queue()
        with ThreadPoolExecutor(1) as thread:
            building = thread.submit(run_for_driver, job, said.put)
            building.add_done_callback(lambda _: said.put(None))
            while (line := said.get()) is not None:
                yield line
            yield building.result()


@dataclass(eq=False)
class Member:
    """An actor as the driver sees it. It is given shards while `starting` is None: it has opened the step.

    `deaths`: how many before it, in a row, died in its place before they had.
    """

    actor: Any
    starting: Any
    deaths: int = 0
    shards: int = 0


class Pool:
    """The workers, all with the same share of a node's CPUs and GPUs. Raises UsageError for workers that cannot be."""

    def __init__(self, code: str) -> None:
        self._code = code
        self._share: tuple[float, float] | None = None
        self._members: list[Member] = []
        self._step: Held = []
        self._untold, self._quiet_until = 0, 0.0
        # A worker that died is replaced, not restarted: so every death is seen, and counted.
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"meanwhile": 1})(Worker)

    def map(self, job: MapJob, done: Callable[[ShardReport], None]) -> None:
        """See `core.protocols.Backend`."""
        workers = job.resources.workers
        with preemption.delivered(), self._given_back():
            preemption.defer()
            # Those that cannot be placed yet are what an autoscaler adds nodes for.
            self._open(replace(job, sources=(), todo=()), workers.min, min(workers.max, len(job.todo)))
            self._map(job, done)
        self._shrink(workers.min)

    def build(self, job: BuildJob, log: Log) -> Committed:
        """Run a build in one worker; one that dies is followed by another, which goes on from its checkpoints."""
        with self._given_back():
            preemption.defer()
            self._open(job, 1, 1)
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

    def _open(self, step: MapJob | BuildJob, least: int, number: int) -> None:
        """Have `number` workers open a step, those that are there and new ones."""
        check_possible(step.resources, least)
        share = (step.resources.cpus, step.resources.gpus)
        self._shrink(number if share == self._share else 0)
        self._share, self._step = share, [ray.put(step)]
        for member in self._members:
            member.starting, member.deaths = member.actor.open.remote(self._code, self._step), 0
        while len(self._members) < number:
            self._members.append(self._new())

    def _new(self, deaths: int = 0) -> Member:
        assert self._share is not None
        actor = self._actor.options(num_cpus=self._share[0], num_gpus=self._share[1]).remote()
        return Member(actor, actor.open.remote(self._code, self._step), deaths)

    def _map(self, job: MapJob, done: Callable[[ShardReport], None]) -> None:
        todo, deaths = deque(job.todo), Counter[int]()
        tasks: dict[Any, tuple[Member, int]] = {}
        while todo or tasks:
            for member in self._next_for(len(todo)):
                number = todo.popleft()
                tasks[member.actor.shard.remote(number, job.sources[number])] = (member, number)
                member.shards += 1
            if not todo:
                self._shrink(job.resources.workers.min)
            ref = self._wait(tasks)
            if ref not in tasks:
                self._welcome(ref, job.artifact.name)
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
                self._replace(member, f"at shard {number} of {job.artifact.name}", error)

    def _next_for(self, shards: int) -> Iterator[Member]:
        """Who gets the next shards, of so many that are left: nobody a second one that another could soon begin."""
        there = [member for member in self._members if member.starting is None]
        for most in range(SHARDS_IN_FLIGHT):
            for member in there:
                if member.shards == most and shards > (len(self._members) if most else 0):
                    shards -= 1
                    yield member

    def _build(self, job: BuildJob, log: Log) -> Committed:
        deaths, furthest = 0, -1.0
        while deaths < DEATHS_PER_BUILD:
            while self._members[0].starting is not None:
                self._welcome(self._wait({}), job.artifact.name)
            (member,) = self._members
            ending = partial(_has_ended, member.actor, [])
            try:
                said = member.actor.build.options(num_returns="streaming").remote()
                while not isinstance(line := _get(next(_first([said], end=ending))), Committed):
                    hand_on(line, log)
                    if isinstance(line, Mapping) and line.get("step", -1.0) > furthest:
                        # It goes on, however often it is lost.
                        furthest, deaths = line["step"], 0
                return line
            except PreemptedError:
                # Asked by us: what is told is what we were asked.
                preemption.deliver()
                raise
            except LOST as error:
                lost, deaths = error, deaths + 1
                self._replace(member, f"while it built {job.artifact.name}", error)
        raise InternalError(
            f"{DEATHS_PER_BUILD} workers died while they built {job.artifact.name}, without a step; the last: {lost}"
        ) from lost

    def _wait(self, tasks: Mapping[Any, Any]) -> Any:
        """The next thing to happen: a task that ended, or an actor that is there."""
        starting = [member.starting for member in self._members if member.starting is not None]
        slow = "no worker is ready yet: has the cluster room for one? Or it loads its model still"
        return _first([*tasks, *starting], "" if tasks else slow)

    def _welcome(self, ref: Any, name: str) -> None:
        """Somebody has opened the step `name`, or has not."""
        member = next(member for member in self._members if member.starting == ref)
        try:
            _get(ref)
            member.starting = None
        except RuntimeEnvSetupError as error:
            raise UsageError(f"the cluster cannot set up the environment of its workers: {error}") from error
        except LOST as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                told = str(error).strip().splitlines()[-1]
                raise UsageError(f"a worker cannot load selfalign, which every node needs: {told}") from error
            nobody_has = all(other.starting is not None for other in self._members)
            if member.deaths + 1 >= DEATHS_AT_OPENING and nobody_has:
                raise InternalError(
                    f"{member.deaths + 1} workers in a row died before they had opened {name}; the last: "
                    f"{reason(error)}. If memory was short, give a worker more of a node (resources.<section>) or "
                    "take a smaller or quantised model; what it said last is in Ray's logs on its node"
                ) from error
            self._replace(member, f"before it had opened {name}", error)

    def _replace(self, member: Member, when: str, error: Exception) -> None:
        """Put a new worker in the place of one that was lost."""
        if member not in self._members:
            # Its other shard was told first.
            return
        self._warn(f"a worker was lost {when}, and is replaced: {reason(error)}")
        # It may live, out of reach.
        ray.kill(member.actor)
        new = self._new(member.deaths + 1 if member.starting is not None else 0)
        self._members[self._members.index(member)] = new

    def _warn(self, what: str) -> None:
        """Log a loss, and every few seconds one of many."""
        self._untold += 1
        if (now := time.monotonic()) < self._quiet_until:
            return
        more = f" ({self._untold} were lost since this was last said)" if self._untold > 1 else ""
        _logger.warning("%s%s", what, more)
        self._untold, self._quiet_until = 0, now + TELL_S


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
    raise UsageError(f"{told} (resources.<section> in the recipe); the cluster has these nodes: {has}")


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
        ended, _ = ray.wait(refs, timeout=preemption.LOOK_S)
        if preemption.asked() and end():
            preemption.deliver()
        if ended:
            return ended[0]
        looks += 1
        if slow and looks == WAIT_S // preemption.LOOK_S:
            _logger.warning(slow)


def _has_ended(worker: Any, asked: list[float]) -> bool:
    """Ask a worker to save its build and to end; whether it has had its time, or does not look.

    `asked` holds when it was asked.
    """
    if not asked:
        asked.append(time.monotonic())
        worker.ask.remote()
    passed_s = time.monotonic() - asked[0]
    return passed_s > preemption.SAVE_S or (passed_s > preemption.PATIENCE_S and ray.get(worker.overlooks.remote()))


def _get(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from error


def reason(error: Exception) -> str:
    """What Ray says of a loss, in one line."""
    return textwrap.shorten(str(error), 600).rstrip(".")


@reachable()
def check_fits(code: str, job: MapJob | BuildJob) -> None:
    """Raise UsageError where this worker's sources or its run folder are others than the driver's.

    The driver's sources have the digest `code`.
    """
    if code != code_digest():
        raise UsageError(
            f"the worker on {_node()} has other selfalign sources than the driver; give both one image, or the "
            "driver's sources to the workers by py_modules"
        )
    if job.driver is not None and not job.driver.exists():
        raise UsageError(
            f"the worker on {_node()} does not see what the driver writes to {job.driver.parent.parent}; put the run "
            "folder (--run) on a file system that all nodes share, or on object storage"
        )


def _node() -> str:
    return str(ray.util.get_node_ip_address())
