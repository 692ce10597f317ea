"""A disk that really is full: a small file system of its own, where this process may mount one."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from faults.runs import NO_SPACE, Forks, Run, check_done, check_whole, committed
from faults.saboteur import Saboteur
from faults.toy import SlowToy


@pytest.fixture
def disk(folder: Path) -> Iterator[Callable[[int], bool]]:
    """Gives the folder `disk` so many KiB; False where nothing can be mounted."""
    place = folder / "disk"
    place.mkdir()

    def size(kib: int) -> bool:
        again = ["remount,"] if place.is_mount() else [""]
        command = ["mount", "-t", "tmpfs", "-o", f"{again[0]}size={kib}k", "tmpfs", str(place)]
        return os.geteuid() == 0 and not subprocess.run(command, check=False, capture_output=True).returncode

    yield size
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_run_on_a_disk_that_runs_full_ends_with_74_keeps_what_is_whole_and_goes_on_with_room(
    toy: SlowToy, folder: Path, forks: Forks, disk: Callable[[int], bool], share: float
) -> None:
    toy = replace(toy, texts=tuple(f"text number {n} " + "x" * 2000 for n in range(40)))
    calm = Run(toy, folder / "calm", forks)
    assert calm.go() == 0, calm.said
    takes = sum(path.stat().st_blocks for path in calm.location.rglob("*") if path.is_file()) // 2
    run = Run(toy, folder / "disk", forks)
    mounted = disk(int(share * takes))
    assert run.go(None if mounted else Saboteur(str(run.root), "fill", int(share * 500))) == NO_SPACE, run.said
    assert "No space left on device" in run.said
    check_whole(run, committed(calm.location))
    assert not list(run.location.rglob(".*"))
    if mounted:
        disk(20 * takes)
    assert run.go() == 0, run.said
    check_done(run, calm)
