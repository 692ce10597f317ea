"""Every request of a run to an object store: the process dies before it, or the answer is lost on the way."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from faults.runs import KILLED, Forks, Run, check_done, check_whole, committed, side_by_side
from faults.saboteur import Deed, Saboteur
from faults.toy import SlowToy
from s3 import S3


@pytest.fixture
def stored(s3: S3, toy: SlowToy, folder: Path, forks: Forks) -> Callable[[], Run]:
    """Makes runs in the store, of one round."""
    environment = {**s3.environment, "SELFALIGN_SCRATCH": str(folder / "scratch")}
    return lambda: Run(replace(toy, rounds=1), str(s3.folder()), forks, environment)


@pytest.mark.parametrize(("deed", "code"), [("kill", KILLED), ("lose", 0)])
def test_a_run_in_an_object_store_that_dies_at_a_request_or_gets_no_answer_ends_with_the_same_rows_once_each(
    stored: Callable[[], Run], folder: Path, kills: int, deed: Deed, code: int
) -> None:
    calm = stored()
    assert calm.go(Saboteur(str(calm.root), points=folder / "points")) == 0, calm.said
    whole = committed(calm.location)
    requests = len((folder / "points").read_text().splitlines())
    assert requests > 100

    def strike(place: int) -> None:
        run = stored()
        assert run.go(Saboteur(str(run.root), deed, place)) == code, run.said
        check_whole(run, whole)
        assert run.go() == 0, run.said
        check_done(run, calm)

    side_by_side(strike, sorted(random.Random(7).sample(range(1, requests - 4), min(kills // 4, requests - 5))))
