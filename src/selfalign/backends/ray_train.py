"""A build in several ranks on a Ray cluster: Ray Train places them, and starts them anew when one of them is lost."""

import asyncio
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selfalign.backends.ray_pool import check_fits, check_possible, reason
from selfalign.core import preemption
from selfalign.core.builds import Line, as_ours, hand_on, run_for_driver
from selfalign.core.errors import (
    InternalError,
    LeaseHeldError,
    PreemptedError,
    SelfalignError,
    ServiceError,
    UsageError,
)
from selfalign.core.lease import Lease
from selfalign.core.protocols import BuildJob, Committed
from selfalign.core.stage import Log

_logger = logging.getLogger(__name__)

WATCH_S = 2.0
END_S = 60
"""How long Ray Train may take to end what has failed. What it does not end in time leaves its room taken."""
ROOM_S = 60
"""After how long without ranks it is said that they wait."""
PATIENCE_S = 10**7
"""For how long they may."""
IN_VAIN = 5
"""How often the ranks may be lost without one further step before it is given up."""


def build_ranks(job: BuildJob, processes: int, code: str, log: Log) -> Committed:
    """Run `job` in `processes` ranks, and return what rank 0 committed. Raises what a rank raised.

    Where a rank or its node is lost all are started anew, and the build goes on from what it kept. A request to end is
    handed on to the ranks, which save themselves. `code` is the driver's `code_digest`. Raises UsageError at once where
    the cluster cannot hold the ranks. What these write to their standard output and error is in Ray's logs.
    """
    if job.resources.gpus not in (0, 1):
        raise UsageError(
            f"a rank computes on one GPU or none: set resources.<section>.gpus={job.resources.gpus:g} to 1"
        )
    strategy = _placed(job, processes)
    preemption.defer()
    # With the driver: if that node is lost, so is the driver.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    group = ray.remote(num_cpus=0, scheduling_strategy=here)(Group).remote()
    with tempfile.TemporaryDirectory(prefix="selfalign-train-") as storage:
        running = group.run.remote(job, processes, strategy, code, storage)
        try:
            _follow(group, running, log)
            committed: Committed | PreemptedError = ray.get(running)
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:
            raise ServiceError(f"Ray lost the process that leads the ranks of {job.artifact.name}") from error
        finally:
            ray.kill(group)
    if isinstance(committed, Committed):
        return committed
    preemption.deliver()
    raise committed


def _placed(job: BuildJob, processes: int) -> str:
    """How Ray places the ranks. Raises UsageError where the cluster cannot hold them so."""
    if isinstance(job.artifact.folder, Path):
        check_possible(job.resources, processes)
        return "PACK"
    # Ranks that write one checkpoint share a folder, which an object store gives to one machine only.
    share = {"cpus": processes * job.resources.cpus, "gpus": processes * job.resources.gpus}
    try:
        check_possible(job.resources.model_copy(update=share), 1)
    except UsageError as error:
        raise UsageError(
            f"with the run folder on object storage one node must hold all {processes} ranks: {error}"
        ) from error
    return "STRICT_PACK"


def _follow(group: Any, running: Any, log: Log) -> None:
    """Hand on what rank 0 logs, and to the ranks a request to end, until they have ended. Raises what ended them."""
    ended, asked_at, failed_at = False, float("inf"), float("inf")
    while not ended:
        ended = bool(ray.wait([running], timeout=preemption.LOOK_S)[0])
        now = time.monotonic()
        if asked_at > now and preemption.asked():
            asked_at = now
            ray.get(group.ask.remote())
        lines, error, begun = ray.get(group.heard.remote())
        for line in lines:
            hand_on(line, log)
        if error is not None:
            failed_at = min(failed_at, now)
            if ended or now > failed_at + END_S:
                raise error
        elif now > asked_at + (preemption.SAVE_S if begun else 0):
            preemption.deliver()


class Group:
    """An actor between the driver and the ranks: it runs the trainer, and hands on what either side says.

    Killing it ends them all: the trainer's controller belongs to it, and the ranks to the controller. Its methods run
    one at a time, except where `run` waits.
    """

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._error: SelfalignError | None = None
        self._asked, self._begun, self._waits_from = False, False, time.monotonic()
        self._in_vain, self._step = 0, -1.0

    async def run(
        self, job: BuildJob, processes: int, strategy: str, code: str, storage: str
    ) -> Committed | PreemptedError:
        """What rank 0 returned."""
        me = ray.get_runtime_context().current_actor
        return await asyncio.to_thread(_fit, me, job, processes, strategy, code, storage)

    async def begin(self, rank: int) -> SelfalignError | None:
        """A rank is there. Returns the error that it must raise, since the build has failed for good."""
        self._begun = self._begun or rank == 0
        return self._error

    async def say(self, line: Line) -> None:
        """What rank 0 measures or logs."""
        self._lines.append(line)
        if isinstance(line, Mapping) and (step := line.get("step", -1.0)) > self._step:
            self._step, self._in_vain = step, 0

    async def fail(self, error: SelfalignError) -> None:
        """The build has failed, and is not tried again. The first error counts, those of the others follow from it."""
        self._error = self._error or error

    async def lose(self, why: str, taken: bool = False) -> bool:
        """Ranks are lost. Returns whether they are to be started anew.

        `taken`: with a node that is taken away, which says nothing about them, and which Ray Train tells repeatedly.
        """
        if not taken:
            self._in_vain += 1
        if self._in_vain >= IN_VAIN:
            await self.fail(
                InternalError(
                    f"the ranks were lost {IN_VAIN} times without one further step, the last time by {why}; their "
                    "output is in Ray's logs"
                )
            )
        elif self._begun or not taken:
            self._note(f"the ranks are started again, after {why}")
        self._begun, self._waits_from = False, time.monotonic()
        return self._error is None

    async def ask(self) -> None:
        """Ask the ranks to end."""
        self._asked = True

    async def is_asked(self) -> bool:
        """Whether the ranks were asked to end."""
        return self._asked

    async def heard(self) -> tuple[list[Line], SelfalignError | None, bool]:
        """What was said since this was last called, the error that ends the build, and whether there are ranks."""
        if not self._begun and time.monotonic() > self._waits_from + ROOM_S:
            self._waits_from = float("inf")
            self._note(
                "the ranks have not begun: the cluster has no room for them at present, is slow to start them, or they "
                "die as they start, of which Ray's logs say more"
            )
        lines, self._lines = self._lines, []
        return lines, self._error, self._begun

    def _note(self, message: str) -> None:
        self._lines.append((__name__, logging.WARNING, message))


def _fit(
    group: Any, job: BuildJob, processes: int, strategy: str, code: str, storage: str
) -> Committed | PreemptedError:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class Lost(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            why = [getattr(error, "health_check_failure", error) for error in worker_exceptions.values()]
            taken = any(isinstance(error, RayActorError) and error.preempted for error in why)
            if not ray.get(group.lose.remote(_summary(worker_exceptions), taken)):
                # Ray Train would start the ranks anew. What a callback raises ends them, and frees their room.
                raise InternalError("the build has failed")

    # Paths in the job may be relative.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    # Ranks for which there is no room wait, and have not failed to start.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(PATIENCE_S)
    gpu = job.resources.gpus > 0
    trainer = TorchTrainer(
        partial(_rank, group, code, job),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=processes,
            use_gpu=gpu,
            resources_per_worker={"CPU": job.resources.cpus, **({"GPU": job.resources.gpus} if gpu else {})},
            placement_strategy=strategy,
        ),
        # Only this node looks at the storage, since nothing is reported to Ray Train: checkpoints are the build's.
        run_config=RunConfig(
            storage_path=storage,
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=0),
            callbacks=[Lost()],
        ),
    )
    others = _rooms()
    while True:
        try:
            committed: Committed | PreemptedError = trainer.fit().return_value
            return committed
        except TrainingFailedError as error:
            # The room of ranks that died as they were started is taken as long as this job lasts (Ray 2.60).
            for room in _rooms() - others:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(room))))
            # Counted by us, since Ray Train would go on counting after a further step.
            if not ray.get(group.lose.remote(reason(error))):
                raise


def _rooms() -> set[str]:
    """The placement groups of this job, in whose number each ends."""
    job = ray.get_runtime_context().get_job_id()
    return {name for name, room in placement_group_table().items() if name.endswith(job) and room["state"] != "REMOVED"}


def _summary(errors: Mapping[int, Exception]) -> str:
    """One line on what became of the ranks; those that died say more than those that then missed them."""
    # What Ray says of an actor lies within what Ray Train says of it.
    died = {n: why for n, error in errors.items() if (why := getattr(error, "health_check_failure", None))}
    told = {n: str(error).strip().splitlines()[0] for n, error in (died or errors).items()}
    return "; ".join(f"rank {n}: {type((died or errors)[n]).__name__}, {told[n]}" for n in sorted(told))


def _rank(group: Any, code: str, job: BuildJob) -> Committed | PreemptedError:
    """One rank: a thread of a worker of Ray Train, whose main thread answers to Ray. Signals cannot be handled here."""
    mine = int(os.environ["RANK"])

    def say(line: Line) -> None:
        if mine == 0:
            # Waited for, so that lines stay in order.
            ray.get(group.say.remote(line))

    if (failed := ray.get(group.begin.remote(mine))) is not None:
        raise failed
    threading.Thread(target=_watch, args=(group, job.lease), daemon=True).start()
    try:
        check_fits(code, job)
        return run_for_driver(job, say, mine)
    except PreemptedError as error:
        # Returned, since Ray Train starts anew what raises.
        return error
    except (SelfalignError, OSError) as error:
        ray.get(group.fail.remote(as_ours(error)))
        raise


def _watch(group: Any, lease: Lease) -> None:
    """Hand a request to end on to the build, and end this process when nobody would use what it makes."""
    asked, overlooked_s, held = False, 0.0, True
    try:
        while held:
            time.sleep(WATCH_S)
            if not asked and ray.get(group.is_asked.remote()):
                asked = True
                preemption.ask(signal.SIGTERM)
            overlooked_s = overlooked_s + WATCH_S if preemption.overlooked() else 0.0
            if overlooked_s > preemption.PATIENCE_S:
                raise preemption.unsaved()
            # Where the store is away for a while, nobody takes over either.
            with suppress(SelfalignError, OSError):
                held = lease.is_held()
        lease.check()
    except (LeaseHeldError, PreemptedError) as error:
        with suppress(RayActorError):
            ray.get(group.fail.remote(error))
    except RayActorError:
        # The driver is gone, or has given the build up.
        pass
    finally:
        os._exit(LeaseHeldError.exit_code)
