"""What people see while a run goes on: a bar on a terminal, JSON lines in a log."""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from selfalign.core.shards import ShardReport
from selfalign.core.stage import Step
from selfalign.core.store import Manifest, balanced


class Bars:
    """A line for each step that is done, and a bar for the one that runs. A `runner.Listener`."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[more]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._tokens, self._seconds = 0, 0.0
        self._dropped: Counter[str] = Counter()

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step_started(self, step: Step, total: int | None) -> None:
        """A new bar."""
        self._task = self._progress.add_task(escape(_title(step)), total=total, more="")
        self._tokens, self._seconds, self._dropped = 0, 0.0, Counter()

    def shard_done(self, step: Step, report: ShardReport) -> None:
        """Rows so far, what was dropped of them, tokens a second."""
        if self._task is None:
            return
        self._tokens += report.tokens
        self._seconds += report.seconds
        self._dropped += report.ledger.rejected + report.ledger.quarantined
        more = [f"{n} {reason}" for reason, n in self._dropped.most_common(3)]
        more += [f"{self._tokens / self._seconds:,.0f} tokens/s"] if self._seconds and self._tokens else []
        self._progress.update(self._task, advance=report.ledger.sources, more=escape(" · ".join(more)))

    def logged(self, step: Step, line: Mapping[str, float]) -> None:
        """The training's last words."""
        if "resumed_at" in line:
            self.note(f"{_title(step)} goes on from its checkpoint at step {line['resumed_at']:,.0f}")
        if self._task is not None and "step" in line:
            told = [f"{key} {line[key]:.4g}" for key in ("loss", "learning_rate") if key in line]
            told += [f"{line['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in line else []
            more = " · ".join(told)
            self._progress.update(self._task, completed=line["step"], total=line.get("max_steps"), more=more)

    def step_done(self, step: Step, manifest: Manifest, reused: bool) -> None:
        """The step's line."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._progress.console.print(_line(step, manifest), highlight=False, markup=False)

    def note(self, text: str) -> None:
        """Said above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)


class JsonLines:
    """One JSON object a line, on standard error. A `runner.Listener`."""

    def __init__(self) -> None:
        self._started, self._rows, self._tokens = 0.0, 0, 0
        self._total: int | None = None

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def step_started(self, step: Step, total: int | None) -> None:
        """Begins."""
        self._started, self._rows, self._tokens, self._total = time.monotonic(), 0, 0, total
        self._say("step_started", step=step.key, total=total)

    def shard_done(self, step: Step, report: ShardReport) -> None:
        """A shard more, and how fast it goes: rows and tokens a second since the step began here."""
        self._rows += report.ledger.sources
        self._tokens += report.tokens
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._say(
            "shard_done",
            step=step.key,
            shard=report.number,
            tokens=report.tokens,
            **report.ledger.to_json(),
            rows_done=self._rows,
            rows_total=self._total,
            rows_per_second=round(self._rows / seconds, 3),
            tokens_per_second=round(self._tokens / seconds, 1),
        )

    def logged(self, step: Step, line: Mapping[str, float]) -> None:
        """A training's measurement."""
        self._say("logged", name=step.key, **line)

    def step_done(self, step: Step, manifest: Manifest, reused: bool) -> None:
        """Ends."""
        self._say("step_done", step=step.key, reused=reused, seconds=manifest.seconds, **manifest.ledger)

    def note(self, text: str) -> None:
        """Something people should know."""
        self._say("note", text=text)

    def _say(self, event: str, **fields: object) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        print(line, file=sys.stderr, flush=True)


def _title(step: Step) -> str:
    return step.name if step.arm is None else f"{step.name} [{step.arm}]"


def _line(step: Step, manifest: Manifest) -> str:
    ledger = balanced(manifest)
    noted = {f"{note} (kept)": n for note, n in ledger.noted.items()}
    told = {**(ledger.rejected + ledger.quarantined), **noted}
    dropped = ", ".join(f"{n} {reason}" for reason, n in told.items())
    counts = f"{ledger.kept:>6} of {ledger.in_:<6}" if manifest.ledger["in"] else " " * 16
    return f"{_title(step):38} {counts} {manifest.seconds:7.1f} s  {dropped}"
