"""The command that measures rows."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.table import Table

from selfalign.core.errors import UsageError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def run() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("run")


def test_every_row_has_a_function_that_measures_it(run: ModuleType) -> None:
    for place in run.ROWS.values():
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_a_row_without_its_peer_is_told_and_the_others_are_measured(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = importlib.import_module("measure")

    def lacking() -> Any:
        raise UsageError("its peer is not here: make it")

    def measured() -> Any:
        return measure.Result("b", 2.0, "times", "higher", 1.0, 3.0, "all is right", True, 5, "here"), Table("side")

    monkeypatch.setitem(sys.modules, "fake_rows", SimpleNamespace(lacking=lacking, measured=measured))
    monkeypatch.setattr(run, "ROWS", {"a": "fake_rows:lacking", "b": "fake_rows:measured"})
    monkeypatch.setattr(run, "write", lambda result: measure.write(result, tmp_path))
    assert run.main([]) == 2
    assert "make it" in capsys.readouterr().err
    assert json.loads((tmp_path / "b.json").read_text("utf-8"))["value"] == 2.0
    assert run.main(["b"]) == 0
