"""What the tests of this room share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from selfalign.core.records import SourceFile
from selfalign.data.sources import resolve


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., SourceFile]:
    """Write bytes into a file and list it as a source."""

    def write(data: bytes, name: str = "rows.jsonl") -> SourceFile:
        (tmp_path / name).write_bytes(data)
        return resolve(name, tmp_path).files[0]

    return write
