"""`selfalign export`: a stage's rows as one file that TRL, axolotl and LLaMA-Factory read as it is."""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import JsonValue

from selfalign.core.errors import UsageError
from selfalign.core.records import Candidate, Document, Dropped, Example, Pair, Rated, Record, SeedPair
from selfalign.core.tables import schema
from selfalign.report.run import RunView, StepView

if TYPE_CHECKING:
    import pyarrow as pa

StageName = Literal["corpus", "prepared", "candidates", "rated", "curated"]
Format = Literal["json", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
Columns = Literal["messages", "prompt_completion"]
Row = dict[str, JsonValue]

# Said of a row only where dropped rows stand among the kept ones.
OUTCOME = ("outcome", "reason", "detail")
BATCH_ROWS = 1024


@dataclass(frozen=True)
class _Stage:
    """What a stage's rows are, and the steps that they pass: the kept rows of the last one are exported."""

    record: type[Record]
    steps: tuple[str, ...]
    in_rounds: bool = False
    dropped: bool = False


_CURATE = ("curate.rate", "curate.select")
STAGES: Mapping[StageName, _Stage] = {
    "corpus": _Stage(Document, ("prepare.read_corpus", "prepare.filter_corpus", "prepare.pick_corpus")),
    "prepared": _Stage(SeedPair, ("prepare.read_seed", "prepare.filter_seed", "prepare.pick_seed")),
    "candidates": _Stage(Candidate, ("augment.generate", "augment.filter", "augment.deduplicate")),
    "rated": _Stage(Rated, _CURATE, in_rounds=True, dropped=True),
    "curated": _Stage(Rated, _CURATE, in_rounds=True),
}


@dataclass(frozen=True)
class Exported:
    """A file that was written, and the step whose kept rows it holds."""

    path: Path
    rows: int
    columns: tuple[str, ...]
    step: StepView


def export(
    run: RunView,
    stage: StageName,
    to: Path | None = None,
    format: Format | None = None,
    columns: Columns = "messages",
    arm: str | None = None,
    round: int | None = None,
    dropped: bool = False,
    replace: bool = False,
) -> Exported:
    """Write a stage's rows to the file `to`, which is there whole or not at all.

    By default it is STAGE.FORMAT in the working directory; a file's name tells its format. A stage always has the same
    columns. With `dropped`, and always for `rated`, the rows that its steps rejected or quarantined stand there too,
    told apart by `outcome`. `round` is the final model's where it is None. Rows are streamed. Raises UsageError where
    the stage is not done (with `dropped`, where none of its steps is), or `to` is there already and is not to be
    replaced.
    """
    if format is None:
        named: list[Format] = [known for known in FORMATS if to is not None and to.suffix == f".{known}"]
        if to is not None and not named:
            raise UsageError(f"{to}: its name tells no format; end it in .{', .'.join(FORMATS)}, or name --format")
        format = named[0] if named else "jsonl"
    to = to or Path(f"{stage}.{format}")
    if to.is_dir() or not to.parent.is_dir():
        raise UsageError(f"--to: {to} is a folder; name a file" if to.is_dir() else f"--to: no folder {to.parent}")
    if to.exists() and not replace:
        raise UsageError(f"{to} is there already; name another file with --to, or replace it with --force")
    what = STAGES[stage]
    steps = _steps(run, stage, arm, round, unfinished=dropped)
    # Of a stage that a gate ended early there are dropped rows alone.
    finished = steps[-1].name.split("@")[0] == what.steps[-1]
    dropped = dropped or what.dropped
    table = _schema(what.record, columns, dropped)

    def rows() -> Iterator[Row]:
        for step in reversed(steps):
            for outcome in step.outcomes(what.record):
                if dropped if isinstance(outcome, Dropped) else finished and step is steps[-1]:
                    yield _row(outcome, table.names)

    with _draft(to) as draft:
        count = _write(draft, format, _typed_first(rows, table.names), table)
    return Exported(to, count, tuple(table.names), steps[-1])


# Which steps


def _steps(run: RunView, stage: StageName, arm: str | None, round: int | None, unfinished: bool) -> list[StepView]:
    """The stage's steps, complete and in order; a gate that one failed does not hide what it computed.

    With `unfinished` the stage need not have come to its end.
    """
    what = STAGES[stage]
    arms = sorted({step.arm for step in run.steps if step.arm is not None})
    if arm is not None and arm not in arms:
        raise UsageError(f"--arm {arm}: {run.root} has no steps of such an arm; it has {', '.join(arms) or 'none'}")
    if round is not None and not what.in_rounds:
        raise UsageError(f"--round: {stage} is the same in all rounds; it goes with rated and curated")
    if what.in_rounds and round is None:
        round = _last_round(run, what.steps[-1], arm)
    *before, name = (f"{name}@{round}" if what.in_rounds else name for name in what.steps)
    last = _of_arm(run, name, arm)
    while unfinished and before and (last is None or last.manifest is None):
        last = _of_arm(run, before.pop(), arm)
    if last is None or last.manifest is None:
        whose = "" if arm is None else f" for the arm {arm}"
        raise UsageError(f"{name} is not done{whose} in {run.root}; `selfalign status` shows how far the run is")
    steps = [last]
    for name in reversed(before):
        if (step := _made_from(run, steps[0], name)) is None:
            break
        steps.insert(0, step)
    if stage == "rated" and len(steps) == 1:
        raise UsageError(f"the arm {arm or 'main'} keeps all pairs and rates none (curate.keep: all); export curated")
    return steps


def _last_round(run: RunView, name: str, arm: str | None) -> int:
    """The final model's, or the last one that is complete."""
    numbers = {int(step.name.rpartition("@")[2]) for step in run.steps if step.arm == arm and "@" in step.name}
    done = [k for k in numbers if (step := _of_arm(run, f"{name}@{k}", arm)) and step.manifest is not None]
    if arm is None and run.final_round in done:
        return run.final_round
    return max(done, default=1)


def _of_arm(run: RunView, name: str, arm: str | None) -> StepView | None:
    """The step that an arm has, or uses: run.json names one that arms share under the first of them alone."""
    named = [step for step in run.steps if step.name == name]
    own = next((step for step in named if step.arm == arm), None)
    if own is not None or arm is None:
        return own
    used = {sha256 for s in run.steps if s.arm == arm and s.manifest for sha256 in s.manifest.inputs.values()}
    for step in named:
        if step.manifest is not None and step.manifest.sha256 in used:
            return step
    if len(named) > 1:
        others = ", ".join(f"--arm {step.arm}" if step.arm else "no --arm" for step in named)
        raise UsageError(f"--arm {arm}: it shares {name} with another one; export it from there: {others}")
    return named[0] if named else None


def _made_from(run: RunView, step: StepView, name: str) -> StepView | None:
    """The step called `name` whose rows `step` was made from."""
    rows = step.manifest.inputs.get("rows") if step.manifest else None
    return next((s for s in run.steps if s.name == name and s.manifest and s.manifest.sha256 == rows), None)


# Rows


def _schema(record: type[Record], columns: Columns, dropped: bool) -> "pa.Schema":
    """The columns of a stage: its record's, with the texts of a pair as messages, and the outcome's."""
    import pyarrow as pa

    own = schema(record)
    messages = schema(Example).field("prompt").type
    found = [own.field("id")]
    if issubclass(record, Pair):
        names = ("messages",) if columns == "messages" else ("prompt", "completion")
        found += [pa.field(name, messages) for name in names]
    elif columns != "messages":
        raise UsageError(f"--columns {columns}: documents are no pairs; leave it out")
    skipped = {"id", "prompt", "completion"} if issubclass(record, Pair) else {"id"}
    found += [own.field(f.name) for f in fields(record) if f.name not in skipped]
    return pa.schema([*found, *(own.field(name) for name in OUTCOME if dropped)])


def _row(outcome: Record | Dropped, columns: Iterable[str]) -> Row:
    """A row's cells. Of a row that was dropped before it parsed, only id and outcome are known."""
    record = outcome.row if isinstance(outcome, Dropped) else outcome
    cells: Row = {name: _plain(getattr(record, name, None)) for name in columns}
    cells["id"] = outcome.id
    if isinstance(record, Pair):
        prompt, completion = _turn("user", record.prompt), _turn("assistant", record.completion)
        if "messages" in cells:
            cells["messages"] = [*prompt, *completion] if prompt and completion else None
        else:
            cells |= {"prompt": prompt, "completion": completion}
    if "outcome" in cells:
        cells |= {"outcome": "kept", "reason": None, "detail": None}
        if isinstance(outcome, Dropped):
            cells |= {"outcome": outcome.outcome, "reason": outcome.reason, "detail": outcome.detail}
    return cells


def _turn(role: str, content: str | None) -> list[JsonValue] | None:
    return None if content is None else [{"role": role, "content": content}]


def _plain(value: object) -> JsonValue:
    return list(value) if isinstance(value, tuple) else value  # type: ignore[return-value]


def _typed_first(rows: Callable[[], Iterator[Row]], columns: Iterable[str]) -> Iterator[Row]:
    """All rows, but first those few that show every column's type.

    `datasets` takes the types of a JSONL file from its first ten megabytes, and fails later on a column that was null
    until there.
    """
    wanted, first = set(columns), dict[int, Row]()
    for place, row in enumerate(rows()):
        shown = {name for name in wanted if _typed(row[name])}
        if shown:
            first[place] = row
            wanted -= shown
        if not wanted:
            break
    yield from first.values()
    yield from (row for place, row in enumerate(rows()) if place not in first)


def _typed(value: JsonValue) -> bool:
    """Whether a cell shows its column's type, down to the fields of what it lists."""
    if isinstance(value, list):
        return any(map(_typed, value))
    return all(map(_typed, value.values())) if isinstance(value, dict) else value is not None


# Files


def _write(path: Path, format: Format, rows: Iterator[Row], table: "pa.Schema") -> int:
    """How many rows there were."""
    if format == "parquet":
        return _write_parquet(path, rows, table)
    begin, between, end = ("[\n", ",\n", "\n]\n") if format == "json" else ("", "\n", "\n")
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(begin)
        for count, row in enumerate(rows, 1):
            file.write((between if count > 1 else "") + json.dumps(row, ensure_ascii=False))
        file.write(end if count or format == "json" else "")
        file.flush()
        os.fsync(file.fileno())
    return count


def _write_parquet(path: Path, rows: Iterator[Row], table: "pa.Schema") -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    with path.open("wb") as file:
        with pq.ParquetWriter(file, table, write_page_checksum=True) as writer:
            while batch := list(islice(rows, BATCH_ROWS)):
                writer.write_table(pa.Table.from_pylist(batch, schema=table))
                count += len(batch)
        file.flush()
        os.fsync(file.fileno())
    return count


@contextmanager
def _draft(to: Path) -> Iterator[Path]:
    """A file beside `to` that takes its place when the block is done, and is gone where it fails."""
    draft = to.with_name(f".{to.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield draft
        os.replace(draft, to)
    finally:
        draft.unlink(missing_ok=True)
