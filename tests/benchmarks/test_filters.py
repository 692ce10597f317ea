"""The table of what augmentation's filters drop."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROWS = [
    ("Which lake lies north of the town?", "Lake Vage lies there."),
    ("which lake lies north of the town", "It is Lake Vage."),
    ("I'm sorry, but I can't help with that.", "Knead the dough."),
    ("I'm sorry, but I can't help with that.", "Let it rise."),
]


@pytest.fixture(scope="module")
def filters() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "filters.py"
    spec = importlib.util.spec_from_file_location("filters", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["filters"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("lines", [False, True])
def test_faults_are_counted_before_and_after(filters: ModuleType, tmp_path: Path, lines: bool) -> None:
    rows = [{"asked": asked, "answer": answer} for asked, answer in ROWS]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    found = filters.counts(filters.read(tmp_path / "rows", "asked", "answer"))
    assert found.rows == 4
    assert +found.before == {"refusal": 2, "duplicate": 2}
    # The second refusal is a duplicate too: it counts once, for what says more.
    assert found.dropped == {"refusal": 2, "duplicate": 1}
    assert +found.after == {}


def test_the_table_names_every_reason_with_its_share(
    filters: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": asked, "response": answer} for asked, answer in ROWS]))
    assert filters.main([str(file)]) == 0
    shown = capsys.readouterr().out
    for cell in ("empty", "preamble", "language", "2 (50.0%)", "3 (75.0%)"):
        assert cell in shown


@pytest.mark.parametrize(
    ("text", "told"), [("[]", "no rows"), ("{", "cannot be read"), ("[1]", "without"), ('{"a": "b"}', "--instruction")]
)
def test_a_file_that_holds_no_such_pairs_is_told(
    filters: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, told: str
) -> None:
    (tmp_path / "rows.json").write_text(text)
    assert filters.main([str(tmp_path / "rows.json")]) == 2
    assert told in capsys.readouterr().err
