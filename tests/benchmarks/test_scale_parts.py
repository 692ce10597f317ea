"""The parts of docs/scale.md's arithmetic."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_part_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("scale_parts").figures(tmp_path, shards=300, rows=600, batches=3)
    assert len(found) == 6
    assert all(value > 0 for value in found.values())
    # A name, a digest and what JSON puts around them.
    assert 90 < found["manifest a shard, bytes"] < 100
