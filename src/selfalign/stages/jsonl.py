"""JSON lines: what a build leaves for people and for the builds that come after it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A line a row."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All rows."""
    # Not splitlines: JSON strings may hold other line ends, U+2028 among them.
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]
