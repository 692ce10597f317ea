"""What all rows of the benchmarks share: sides measured by turns in processes of their own, and one result file a row.

A side is named `module:function`, of a module in this folder. The function takes strings, imports and prepares what it
needs, and returns the work; only the work is measured.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from time import perf_counter
from typing import Literal

from rich.console import Console
from rich.table import Table

OUT = Path(__file__).parent / "out"
Work = Callable[[], object]


@dataclass(frozen=True)
class Spent:
    """What a piece of work took, and what it returned, which JSON must be able to say.

    `cpu_s` includes the system's time and children's. `peak_bytes` is by how much the process's resident memory grew.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: int
    output: object


def in_child(side: str, *arguments: str, interpreter: str = sys.executable) -> Spent:
    """Measure a side in a fresh process of `interpreter`, which may be another environment's.

    Raises CalledProcessError where it fails, after its own words.
    """
    command = [interpreter, __file__, side, *arguments]
    return Spent(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def by_turns(
    sides: Mapping[str, Sequence[str]], rounds: int, interpreters: Mapping[str, str] | None = None
) -> list[dict[str, Spent]]:
    """Measure every side, given as the arguments of `in_child`, once a round; the order turns from round to round.

    `interpreters` names those of sides that do not run in our environment.
    """
    measured = []
    foreign = interpreters or {}
    for number in range(rounds):
        order = list(sides)[:: 1 if number % 2 == 0 else -1]
        spent = {name: in_child(*sides[name], interpreter=foreign.get(name, sys.executable)) for name in order}
        told = ", ".join(f"{name} {spent[name].cpu_s:.2f} CPU-s" for name in sides)
        print(f"round {number + 1} of {rounds}: {told}", file=sys.stderr, flush=True)
        measured.append(spent)
    return measured


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of over[i] / under[i]."""
    return statistics.median(one / other for one, other in zip(over, under, strict=True))


@dataclass(frozen=True)
class Result:
    """One row. `value` is None where what `check` names did not hold."""

    row: str
    value: float | None
    unit: str
    better: Literal["higher", "lower"]
    must: float
    aim: float
    check: str
    passed: bool
    rounds: int
    machine: str

    @property
    def is_met(self) -> bool:
        """Whether the check held and the value is what it must be."""
        if not self.passed or self.value is None:
            return False
        return self.value >= self.must if self.better == "higher" else self.value <= self.must


def machine() -> str:
    """Processor, number of cores, system and Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def show(result: Result, details: Table) -> None:
    """Print a row and what is behind it."""
    sign = "≥" if result.better == "higher" else "≤"
    table = Table("row", "value", "must", "aim", "check", "")
    table.add_row(
        result.row,
        "void" if result.value is None else f"{result.value:.3g} {result.unit}",
        f"{sign} {result.must:g}",
        f"{sign} {result.aim:g}",
        result.check,
        "met" if result.is_met else "[red]missed[/red]" if result.passed else "[red]failed[/red]",
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(details, table, f"{result.rounds} rounds by turns, medians; {result.machine}")


def write(result: Result, folder: Path = OUT) -> None:
    """Write `folder`/ROW.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(result), indent=2, ensure_ascii=False)
    (folder / f"{result.row}.json").write_text(text + "\n", "utf-8")


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes. `getrusage` would count what the parent had when it forked."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _cpu_s() -> float:
    used = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _measured(work: Work) -> Spent:
    # Forgets the peak of the imports.
    Path("/proc/self/clear_refs").write_text("5")
    resident, cpu, wall = _resident("VmRSS"), _cpu_s(), perf_counter()
    output = work()
    return Spent(_cpu_s() - cpu, perf_counter() - wall, _resident("VmHWM") - resident, output)


if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    prepared: Work = getattr(import_module(module), function)(*sys.argv[2:])
    print(json.dumps(asdict(_measured(prepared))))
