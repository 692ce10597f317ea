"""What the tests of this room share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from selfalign.core.records import SourcePart
from selfalign.data.sources import resolve


@pytest.fixture
def parts(tmp_path: Path) -> Callable[..., tuple[SourcePart, ...]]:
    """Write bytes into a file and list its parts, without a look at their format."""

    def write(data: bytes, name: str = "rows.jsonl") -> tuple[SourcePart, ...]:
        (tmp_path / name).write_bytes(data)
        return resolve(name, tmp_path, format="document").parts

    return write


@pytest.fixture
def listed(parts: Callable[..., tuple[SourcePart, ...]]) -> Callable[..., SourcePart]:
    """Write bytes into a file that is one part."""

    def write(data: bytes, name: str = "rows.jsonl") -> SourcePart:
        (part,) = parts(data, name)
        return part

    return write
