"""What augmentation's filters drop: `python benchmarks/filters.py FILE [--instruction FIELD] [--response FIELD]`.

FILE is JSON (an array) or JSONL, a pair a row. It prints, for each reason, how many rows have the fault, how many are
dropped for it (of several, the first reason counts) and how many of the kept rows still have it.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from selfalign.core.errors import SelfalignError, UsageError
from selfalign.core.records import Candidate, Dropped
from selfalign.core.stage import Context
from selfalign.stages.augment import AugmentConfig, Deduplicate, Filter, FilterName


@dataclass(frozen=True)
class Counts:
    """Rows in all, and by reason: those that have the fault, those dropped for it, those kept that have it."""

    rows: int
    before: Counter[str]
    dropped: Counter[str]
    after: Counter[str]


def counts(rows: list[Candidate]) -> Counts:
    """What the default filters find in `rows`, one by one and together."""
    faults = {reason: set(_dropped(rows, (reason,))) for reason in get_args(FilterName)}
    dropped = _dropped(rows, get_args(FilterName))
    return Counts(
        len(rows),
        Counter({reason: len(ids) for reason, ids in faults.items()}),
        Counter(dropped.values()),
        Counter({reason: len(_dropped([r for r in rows if r.id not in dropped], (reason,))) for reason in faults}),
    )


def _dropped(rows: list[Candidate], filters: tuple[FilterName, ...]) -> dict[str, str]:
    """Reasons by id."""
    config, context = AugmentConfig(filters=filters), Context("filters", 0, {})
    filtered = list(Filter(config).open(context).run(rows))
    left = [row for row in filtered if isinstance(row, Candidate)]
    found = (*filtered, *Deduplicate(config=config).run(left, context))
    return {row.id: row.reason for row in found if isinstance(row, Dropped)}


def read(path: Path, instruction: str, response: str) -> list[Candidate]:
    """The pairs of a file. Raises UsageError where it has none, or a row lacks a field."""
    try:
        text = path.read_text("utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        pairs = [(str(row[instruction]), str(row[response])) for row in rows]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON or JSONL: {error}") from error
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{path} has a row without {error}; name its fields by --instruction and --response"
        ) from error
    if not pairs:
        raise UsageError(f"{path} has no rows")
    return [
        Candidate(
            id=str(number),
            source=path.name,
            prompt=asked.strip(),
            completion=answer,
            model="",
            prompt_hash="",
            finish="stop",
        )
        for number, (asked, answer) in enumerate(pairs)
    ]


def table(found: Counts) -> Table:
    """The counts and their shares of all rows, and of the kept ones in the last column."""
    kept = found.rows - found.dropped.total()
    made = Table(f"{found.rows} rows", "have it", "dropped for it", "kept with it")
    for reason in found.before:
        before, dropped, after = found.before[reason], found.dropped[reason], found.after[reason]
        made.add_row(reason, _share(before, found.rows), _share(dropped, found.rows), _share(after, kept))
    made.add_row("any", "", _share(found.dropped.total(), found.rows), "", style="bold")
    return made


def _share(number: int, whole: int) -> str:
    return f"{number} ({number / whole:.1%})" if whole else "0"


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--instruction", default="instruction", metavar="FIELD")
    parser.add_argument("--response", default="response", metavar="FIELD")
    options = parser.parse_args(arguments)
    try:
        Console().print(table(counts(read(options.file, options.instruction, options.response))))
    except SelfalignError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
