"""Runs on a cluster of three nodes go on while workers, actors, nodes, drivers and the head are killed."""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from clusters import Cluster, Node
from faults.runs import KILLED, Driver, Forks, Run, check_done, check_whole, committed, stamps, until
from faults.toy import SlowToy

pytest.importorskip("ray", reason="needs the extra `ray`")

# What a driver ends with that lost its cluster: as the command line does, or as Ray itself ends a process.
LOST_ITS_CLUSTER = (69, 1)


def journals(run: Run) -> list[Counter[str]]:
    """What attempts at a shard have in flight, or had when they died."""
    found = []
    for folder in run.location.glob("artifacts/*/journal-*"):
        # Of a shard that is committed it tells nothing, and may have been left.
        if not folder.with_name(folder.name.replace("journal", "shard")).with_suffix(".parquet").exists():
            found.append(Counter[str]())
            for attempt in folder.glob("*.json"):
                with suppress(FileNotFoundError):
                    found[-1][json.loads(attempt.read_bytes())["in_flight"]] += 1
    return [each for each in found if each]


def may_be_hit(run: Run) -> bool:
    """Something is in flight, and no batch for the last time: a row that dies three times is set aside, and should."""
    now = journals(run)
    return bool(now) and all(count < 2 and not key.startswith("row") for each in now for key, count in each.items())


class Storm:
    """Kills, one of everything in turn."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster, self.chance = cluster, random.Random(seed)
        self.done: Counter[str] = Counter()

    def plan(self, kills: int) -> list[str]:
        """What is killed: the head in one of ten, the rest shared out."""
        heads = max(1, kills // 10)
        others = ["worker", "actor", "driver", "node", "worker", "actor"]
        plan = ["head"] * heads + [others[n % len(others)] for n in range(kills - heads)]
        self.chance.shuffle(plan)
        return plan

    def hit(self, what: str, driver: Driver) -> bool:
        """Kill one; whether there was one."""
        hit: bool = getattr(self, what)(driver)
        self.done[what] += hit
        return hit

    def worker(self, driver: Driver) -> bool:
        """The process of an actor that has a shard: three deaths in a row before that may end a step, and should."""
        title = "ray::Worker.shard"
        found = [p for node in self.cluster.nodes for p in node.processes() if _title(p).startswith(title)]
        if not found:
            return False
        with suppress(psutil.NoSuchProcess):
            self.chance.choice(sorted(found, key=lambda p: p.pid)).kill()
        return True

    def actor(self, driver: Driver) -> bool:
        """An actor, by its driver."""
        driver.kill_an_actor()
        return True

    def driver(self, driver: Driver) -> bool:
        """The driver, at once."""
        driver.process.send_signal(signal.SIGKILL)
        return True

    def node(self, driver: Driver) -> bool:
        """A node with all its processes; another takes its place."""
        lost: Node = self.chance.choice(self.cluster.nodes)
        lost.kill()
        self.cluster.nodes.remove(lost)
        self.cluster.add_node(cpus=2)
        return True

    def head(self, driver: Driver) -> bool:
        """The head, and with it the cluster, which is then started anew."""
        self.cluster.kill_head()
        until(driver.ended, f"a driver goes on though its cluster is gone: {driver.run.said}")
        self.cluster.restart_head()
        return True


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def long_toy(toy: SlowToy) -> SlowToy:
    """Twenty shards a map, each of four batches, which take a quarter of a second each."""
    return replace(toy, texts=tuple(f"text number {n}" for n in range(320)), shard_rows=16, workers=4, pause_s=0.06)


def weather(run: Run, at_work: Driver, storm: Storm, todo: list[str], whole: Mapping[str, object]) -> None:
    """Drive a run to its end, killing what is to do on the way."""
    while not (at_work.ended() and at_work.codes[-1] == 0):
        if at_work.ended():
            check_whole(run, whole)
            assert at_work.codes[-1] in (KILLED, *LOST_ITS_CLUSTER), run.said
            at_work.start()
        time.sleep(storm.chance.uniform(0, 1))
        until(lambda: at_work.ended() or may_be_hit(run) or not journals(run), f"nothing goes on: {run.said}")
        if todo and not at_work.ended() and may_be_hit(run) and storm.hit(todo[-1], at_work):
            todo.pop()


def test_every_row_comes_out_once_whatever_dies_of_a_cluster_on_the_way(
    cluster: Cluster, long_toy: SlowToy, folder: Path, forks: Forks, driver: Callable[[Run], Driver], kills: int
) -> None:
    calm = Run(replace(long_toy, pause_s=0), folder / "calm", forks)
    assert calm.go() == 0, calm.said
    storm = Storm(cluster, seed=7)
    todo = storm.plan(kills)
    # As many runs as it takes: how fast they are is the machine's to say.
    while todo:
        run = Run(long_toy, folder / f"stormy-{len(todo)}", forks)
        weather(run, driver(run), storm, todo, committed(calm.location))
        check_done(run, calm)
    print(dict(storm.done))
    assert storm.done.total() == kills


def test_shards_that_are_done_stay_untouched_when_more_workers_go_on(
    long_toy: SlowToy, folder: Path, forks: Forks, driver: Callable[[Run], Driver]
) -> None:
    toy = replace(long_toy, texts=long_toy.texts[:160], rounds=1)
    calm = Run(replace(toy, pause_s=0), folder / "calm", forks)
    assert calm.go() == 0, calm.said
    run = Run(toy, folder / "resumed", forks)
    done = stamps(run)
    for workers in (1, 2, 4):
        at_work = driver(replace(run, toy=replace(toy, workers=workers)))
        if workers == 4:
            assert at_work.go() == 0, run.said
        else:
            wait_for_more(run, len(done) + 3)
            assert not at_work.ended(), run.said
            at_work.close()
        now = stamps(run)
        assert now.items() > done.items()
        done = now
    check_done(run, calm)


def wait_for_more(run: Run, shards: int) -> None:
    until(lambda: len(stamps(run)) > shards, f"nothing goes on: {run.said}")
