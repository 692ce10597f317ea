"""Every point at which a run changes its folder: its process dies there or amid a write, or the disk is full."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.runs import KILLED, NO_SPACE, Forks, Run, check_done, check_whole, committed, side_by_side
from faults.saboteur import Deed, Saboteur
from faults.toy import SlowToy


def points_of(run: Run, log: Path) -> list[str]:
    """What an undisturbed process does, point by point."""
    assert run.go(Saboteur(str(run.root), points=log)) == 0, run.said
    return log.read_text().splitlines()


def kind(point: str) -> str:
    """What is done to what sort of file."""
    what, _, path = point.partition(" ")
    # A journal's files are named for their attempts alone.
    name = Path(path).name if "journal-" not in path else "journal"
    return f"{what} {re.sub(r'[0-9a-f]{12,}|[0-9]+', '', name)}"


def some(points: list[str], number: int, wanted: Callable[[str], bool] = lambda point: True) -> list[int]:
    """The places of `number` points: at least one of every kind, and beyond them whichever."""
    chance = random.Random(7)
    places = [place for place, point in enumerate(points, 1) if wanted(point)]
    chance.shuffle(places)
    first = {kind(points[place - 1]): place for place in places}
    rest = [place for place in places if place not in first.values()]
    return sorted([*first.values(), *rest[: max(0, number - len(first))]])


@pytest.fixture
def points(toy: SlowToy, folder: Path, forks: Forks) -> list[str]:
    return points_of(Run(toy, folder / "counted", forks), folder / "points")


def test_a_run_has_hundreds_of_points_and_all_its_commits_are_among_them(points: list[str]) -> None:
    kinds = {kind(point) for point in points}
    assert kinds >= {f"os.link {name}" for name in ("shard-.parquet", "manifest.json", "lease-.json")}
    assert kinds >= {f"os.rename {name}" for name in ("run.json", "journal", "files")}
    assert kinds >= {"fsync journal", *(f"fsync .{name}." for name in ("shard-.parquet", "manifest.json"))}
    assert len(points) > 200


@pytest.mark.parametrize("deed", ["kill", "tear"])
def test_a_run_that_dies_at_any_point_twice_ends_with_the_same_rows_once_each(
    toy: SlowToy, folder: Path, forks: Forks, calm: Run, points: list[str], kills: int, deed: Deed
) -> None:
    whole = committed(calm.location)

    def die(place: int) -> None:
        run = Run(toy, folder / f"{deed}-{place}", forks)
        assert run.go(Saboteur(str(run.root), deed, place)) == KILLED
        check_whole(run, whole)
        # Where it is hit the second time is any later point, and sometimes it gets through.
        again = random.Random(place).randint(1, len(points) - place + 20)
        assert run.go(Saboteur(str(run.root), "kill", again)) in (KILLED, 0)
        check_whole(run, whole)
        assert run.go() == 0, run.said
        check_done(run, calm)

    wanted = (lambda point: point.startswith("write ")) if deed == "tear" else (lambda point: True)
    side_by_side(die, some(points, 3 * kills, wanted))


def test_a_disk_that_is_full_at_any_point_ends_the_run_with_74_and_it_goes_on_when_there_is_room(
    toy: SlowToy, folder: Path, forks: Forks, calm: Run, points: list[str], kills: int
) -> None:
    whole = committed(calm.location)

    def fill(place: int) -> None:
        run = Run(toy, folder / f"full-{place}", forks)
        assert run.go(Saboteur(str(run.root), "fill", place)) == NO_SPACE, run.said
        check_whole(run, whole)
        drafts = [path.name for path in run.root.rglob(".*")]
        assert not drafts, f"{drafts} left at {points[place - 1]}"
        assert run.go() == 0, run.said
        check_done(run, calm)

    side_by_side(fill, some(points, 2 * kills, lambda point: not re.match(r"os\.(remove|rmdir|chmod|utime)", point)))
