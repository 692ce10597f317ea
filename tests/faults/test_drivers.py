"""Two drivers on one run at once: they waste work, and harm nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from faults.runs import Driver, Forks, Run, check_done, stamps, until
from faults.toy import SlowToy


@pytest.fixture
def calm(toy: SlowToy, folder: Path, forks: Forks) -> Run:
    """Five shards a round."""
    run = Run(replace(toy, texts=tuple(f"text number {n}" for n in range(40))), folder / "calm", forks)
    assert run.go() == 0, run.said
    return run


def test_two_local_drivers_end_well_with_one_content_and_the_second_says_who_is_there(
    calm: Run, folder: Path, forks: Forks
) -> None:
    run = Run(replace(calm.toy, pause_s=0.03), folder / "run", forks)
    first = run.start()
    until(lambda: any((folder / "run" / "drivers").glob("*.json")), "the first driver has not come")
    second = run.start()
    seen: dict[str, tuple[int, int]] = {}
    until(lambda: seen.update({**stamps(run), **seen}) or not first.is_alive(), f"nothing goes on: {run.said}")
    assert [forks.end(first), forks.end(second)] == [0, 0], run.said
    # Whoever came second to a name changed nothing.
    assert stamps(run).items() >= seen.items()
    assert f"process {first.pid} on " in run.said
    check_done(run, calm)


def test_a_driver_beside_one_of_a_cluster_ends_well_with_one_content(
    calm: Run, folder: Path, forks: Forks, driver: Callable[[Run], Driver]
) -> None:
    run = Run(replace(calm.toy, pause_s=0.1), folder / "run", forks)
    there = driver(run)
    until(lambda: any((folder / "run").glob("artifacts/augment*/journal-*")), f"nothing goes on: {run.said}")
    beside = run.start()
    assert [there.go(), forks.end(beside)] == [0, 0], run.said
    assert f"process {there.process.pid} on " in run.said
    check_done(run, calm)
