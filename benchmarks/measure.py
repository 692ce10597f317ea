"""What every row of the benchmarks shares: work in a process of its own, sides by turns, one result file a row.

A side is `module:function` of this folder. The function gets strings, imports and prepares what it needs and returns
the work; only the work is measured.
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
from time import perf_counter
from typing import Literal

from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

OUT = Path(__file__).parent / "out"
Work = Callable[[], JsonValue]


@dataclass(frozen=True)
class Spent:
    """What one piece of work took, its children included, and what it returned.

    `peak_bytes` is the growth of the process's resident memory, from before the work to its peak.
    """

    cpu_s: float
    wall_s: float
    peak_bytes: int
    output: JsonValue


def in_child(side: str, *arguments: str) -> Spent:
    """Measure a side in a fresh interpreter. Raises CalledProcessError where it fails; its words are on stderr."""
    command = [sys.executable, __file__, side, *arguments]
    return Spent(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def by_turns(sides: Mapping[str, Sequence[str]], rounds: int) -> list[dict[str, Spent]]:
    """Measure all sides, given as the arguments of `in_child`, once a round; every second round backwards."""
    measured = []
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        spent = {name: in_child(*sides[name]) for name in order}
        told = ", ".join(f"{name} {spent[name].cpu_s:.2f} CPU-s" for name in sides)
        print(f"round {number + 1} of {rounds}: {told}", file=sys.stderr)
        measured.append({name: spent[name] for name in sides})
    return measured


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of over[i] / under[i]."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


@dataclass(frozen=True)
class Result:
    """One row. `value` is None where the correctness that `check` names did not hold."""

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
    """Processor, cores, system and Python."""
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    return f"{models[0] if models else platform.machine()}, {cores} cores, Python {platform.python_version()}"


def publish(result: Result, details: Table) -> bool:
    """Print a row and its details, write benchmarks/out/ROW.json, and tell whether the row is met."""
    OUT.mkdir(exist_ok=True)
    (OUT / f"{result.row}.json").write_text(json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n", "utf-8")
    better = "≥" if result.better == "higher" else "≤"
    table = Table("row", "value", "must", "aim", "check", "")
    table.add_row(
        result.row,
        "void" if result.value is None else f"{result.value:.3g} {result.unit}",
        f"{better} {result.must:g}",
        f"{better} {result.aim:g}",
        result.check,
        "met" if result.is_met else "[red]missed[/red]" if result.passed else "[red]failed[/red]",
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(details, table, f"{result.rounds} rounds by turns, median of ratios; {result.machine}")
    return result.is_met


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines() if Path(path).exists() else []


def _memory_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process. getrusage would count what the parent had when it forked."""
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith(f"{field}:"))


def _measure(work: Work) -> Spent:
    # The peak before now is the imports'.
    Path("/proc/self/clear_refs").write_text("5")
    resident, cpu, wall = _memory_bytes("VmRSS"), os.times(), perf_counter()
    output = work()
    now = os.times()
    return Spent(sum(now[:4]) - sum(cpu[:4]), perf_counter() - wall, _memory_bytes("VmHWM") - resident, output)


if __name__ == "__main__":
    module, _, function = sys.argv[1].partition(":")
    prepared: Work = getattr(import_module(module), function)(*sys.argv[2:])
    print(json.dumps(asdict(_measure(prepared))))
