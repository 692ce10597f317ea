"""JSON lines: what people write for a recipe, and what a build leaves for people and for the builds after it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from selfalign.core.errors import UsageError
from selfalign.core.frozen import Frozen

F = TypeVar("F", bound=Frozen)


def read_checked(path: Path, record: type[F], what: str) -> list[tuple[int, F]]:
    """The rows of a file that a person wrote, each with its line, from 1. Raises UsageError with file and line."""
    rows = []
    try:
        # Not splitlines: JSON strings may hold other line ends, U+2028 among them.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UsageError(f"{path}:{number}: this line is empty; remove it")
        try:
            rows.append((number, record.model_validate_json(line)))
        except ValidationError as error:
            problem = error.errors()[0]
            told = " ".join([*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")])
            raise UsageError(f"{path}:{number}: {told}") from error
    return rows


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """One JSON document, the same text for the same content."""
    path.write_text(json.dumps(document, indent=1, sort_keys=True), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A line a row."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All rows."""
    # Not splitlines: JSON strings may hold other line ends, U+2028 among them.
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]
