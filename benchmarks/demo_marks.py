"""What the demo must show, as measured in finished runs: `python benchmarks/demo_marks.py RUN…` prints a table."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from selfalign.core.errors import UsageError
from selfalign.evaluation.metrics import Interval, paired_difference
from selfalign.report.run import RunView, StepView
from selfalign.report.status import metrics


@dataclass(frozen=True)
class Mark:
    """A figure with its 95% interval, and the least that it must be."""

    name: str
    value: float
    interval: Interval
    least: float | None

    @property
    def is_met(self) -> bool:
        """Whether the figure reaches what is asked; true where nothing is."""
        return self.least is None or self.value >= self.least


def marks(run: RunView) -> list[Mark]:
    """The marks of one run. Raises UsageError where it is no finished run of the demo."""
    found = metrics(run)
    accuracy = found.get("accuracy")
    if not run.complete or not isinstance(accuracy, dict):
        raise UsageError(f"{run.root} is no finished run of recipes/demo.yaml")
    listed = [
        _mark("backward exact match", found["backward_exact_match"], found["backward_exact_match_ci"], 0.85),
        _mark("rater AUC on planted pairs", found["rater_auc"], found["rater_auc_ci"], 0.95),
    ]
    intervals = found["accuracy_ci"]
    assert isinstance(intervals, dict)
    listed += [_mark(f"accuracy {name}", value, intervals[name], None) for name, value in accuracy.items()]
    m1 = run.step("evaluate.forward@1")
    listed.append(_gap("M1 - M0", m1, run.step("evaluate.forward@0"), 0.4))
    listed.append(_gap("M1 - uncurated", m1, run.step("evaluate.forward@1", "uncurated"), 0.1))
    for arm in ("uncurated_equal_size", "uncurated_matched_exposure"):
        listed.append(_gap(f"M1 - {arm}", m1, run.step("evaluate.forward@1", arm), None))
    return listed


def _mark(name: str, value: object, ci: object, least: float | None) -> Mark:
    assert isinstance(value, float)
    assert isinstance(ci, list)
    return Mark(name, value, Interval(*ci), least)


def _gap(name: str, better: StepView | None, worse: StepView | None, least: float | None) -> Mark:
    """Difference in accuracy, paired by question."""
    assert better is not None
    assert worse is not None
    rows = [{row["id"]: row["right"] for row in step.lines("replies.jsonl")} for step in (better, worse)]
    asked = [id for id, right in rows[0].items() if right is not None]
    gap = paired_difference([rows[0][id] for id in asked], [rows[1][id] for id in asked])
    return Mark(name, gap.mean, gap.interval, least)


def table(runs: Sequence[RunView]) -> tuple[Table, bool]:
    """The marks side by side, and whether every run meets all of them."""
    measured = [marks(run) for run in runs]
    made = Table("", "must", *(run.root.name for run in runs))
    for row in zip(*measured, strict=True):
        cells = [f"{m.value:.3f} ({m.interval.low:.3f} to {m.interval.high:.3f})" for m in row]
        told = [cell if mark.is_met else f"[red]{cell} missed[/red]" for cell, mark in zip(cells, row, strict=True)]
        made.add_row(row[0].name, "" if row[0].least is None else f"≥ {row[0].least}", *told)
    seconds = [sum(step.manifest.seconds for step in run.steps if step.manifest) for run in runs]
    made.add_row("seconds in steps", "", *(f"{value:.0f}" for value in seconds))
    return made, all(mark.is_met for found in measured for mark in found)


if __name__ == "__main__":
    shown, met = table([RunView.open(Path(argument)) for argument in sys.argv[1:]])
    Console(width=None if sys.stdout.isatty() else 160).print(shown)
    sys.exit(0 if met else 1)
