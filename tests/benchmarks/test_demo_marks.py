"""The table of the demo's marks."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from selfalign.core.errors import UsageError
from selfalign.evaluation.metrics import Interval
from selfalign.report.run import RunView


@pytest.fixture(scope="module")
def demo_marks() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "demo_marks.py"
    spec = importlib.util.spec_from_file_location("demo_marks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_mark_is_met_at_its_least_value_and_missed_below(demo_marks: ModuleType) -> None:
    interval = Interval(0.0, 1.0)
    assert demo_marks.Mark("a", 0.85, interval, 0.85).is_met
    assert not demo_marks.Mark("a", 0.849, interval, 0.85).is_met
    assert demo_marks.Mark("a", 0.0, interval, None).is_met


def test_a_run_of_another_recipe_has_no_marks(demo_marks: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        demo_marks.marks(RunView(tmp_path, {"steps": []}))
