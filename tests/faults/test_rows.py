"""Rows that take their process with them: three tries at most, and all others come out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from faults.runs import Driver, Forks, Run
from faults.toy import SlowToy
from selfalign.core.records import Candidate, Dropped
from selfalign.core.store import balanced
from selfalign.core.tables import read_outcomes

HUNG = 75
ROWS = 24
CRASHED = ("crashed_worker", "its worker died 3 times while processing it")
# By what a row does: how it is set aside, and what the local process ends with when it was tried.
BAD = {
    "exit": (CRASHED, [1, 1, 1]),
    "hang": (CRASHED, [HUNG, HUNG, HUNG]),
    "fill": (("out_of_memory", "it alone is too much for the memory of its worker"), []),
}


def with_bad_rows(toy: SlowToy, folder: Path, bad: dict[int, str]) -> SlowToy:
    """A round of three shards, where the rows of those numbers do harm. No process gets more than half a GiB more."""
    script = folder / "bad.json"
    script.write_text(json.dumps([{"match": f"number {n}$", "action": what} for n, what in bad.items()]))
    return replace(
        toy,
        model=toy.model.model_copy(update={"path": str(script)}),
        texts=tuple(f"text number {n}" for n in range(ROWS)),
        rounds=1,
        room=1 << 29,
        stall_minutes=0.05,
        tries=str(folder / "tries"),
    )


def check_rows(run: Run, bad: dict[int, str]) -> None:
    """The bad ones are set aside after three tries at most, and the others are there."""
    step = run.step("augment.ask@1")
    artifact = run.runner().artifact(step)
    rows = [row for shard in artifact.shards() for row in read_outcomes(shard, Candidate)]
    aside = {row.id: (row.reason, row.detail) for row in rows if isinstance(row, Dropped)}
    assert aside == {f"doc/{n:04d}": BAD[what][0] for n, what in bad.items()}
    asked = [f"doc/{n:04d}/{k}" for n in range(ROWS) if n not in bad for k in range(2)]
    assert [row.id for row in rows if isinstance(row, Candidate)] == asked
    assert len(run.manifests()) == len(run.toy.steps())
    assert balanced(run.manifests()["augment.ask@1"]).quarantined.total() == 2 * len(bad)
    tries = [line.split() for line in Path(f"{run.toy.tries}").read_text().splitlines()]
    assert all(1 <= sum(id in each for each in tries) <= 3 for id in aside)


@pytest.mark.parametrize("what", BAD)
def test_a_row_that_kills_hangs_or_fills_this_process_is_set_aside_and_the_rest_completes(
    toy: SlowToy, folder: Path, forks: Forks, what: str
) -> None:
    run = Run(with_bad_rows(toy, folder, {13: what}), folder / "run", forks)
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        codes.append(run.go())
        assert len(codes) < 6, run.said
    assert codes[:-1] == BAD[what][1]
    check_rows(run, {13: what})


def test_rows_that_kill_hang_and_fill_workers_of_a_cluster_are_set_aside_and_the_rest_completes(
    toy: SlowToy, folder: Path, forks: Forks, driver: Callable[[Run], Driver]
) -> None:
    bad = {3: "exit", 13: "hang", 21: "fill"}
    run = Run(with_bad_rows(toy, folder, bad), folder / "run", forks)
    assert driver(run).go() == 0, run.said
    check_rows(run, bad)
