"""Row 5 of the benchmarks: its corpus, its check, and how a side is measured. The peer itself is not run here."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def row_5() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("near_duplicates")


@pytest.fixture(scope="module")
def measure(row_5: ModuleType) -> ModuleType:
    return importlib.import_module("measure")


def test_the_corpus_is_the_same_for_a_seed_and_repeats_itself_a_little(row_5: ModuleType) -> None:
    texts = list(row_5.made_up(400, seed=1))
    assert texts == list(row_5.made_up(400, seed=1)) != list(row_5.made_up(400, seed=2))
    assert all(500 <= len(text) <= 3_300 for text in texts)
    assert 2 <= 400 - len(set(texts)) <= 60
    assert 0.1 <= sum(not text.isascii() for text in texts) / 400 <= 0.4


def test_a_side_is_measured_in_a_process_of_its_own(row_5: ModuleType, measure: ModuleType, tmp_path: Path) -> None:
    texts = [text.replace("\n", " ") for text in row_5.made_up(60, seed=3)]
    (tmp_path / "corpus.txt").write_text("".join(f"{text}\n" for text in [*texts, texts[7]]), "utf-8")
    spent = measure.in_child("near_duplicates:ours", str(tmp_path / "corpus.txt"), str(tmp_path))
    assert len(spent.output) == 61
    assert spent.output[60] in (7, spent.output[7])
    assert 0 < spent.cpu_s < 60
    assert 2**20 < spent.peak_bytes < 2**28
    held = row_5.check([*texts, texts[7]], [spent.output], [spent.output])
    assert held.holds
    assert held.missed == 0


A, B, C = "a b c d e f g h", "a b c d e f g h!", "q r s t u v w x"


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([[-1, 0, -1]], [[-1, 0, -1]], (0, 0, 0, True)),
        ([[-1, 0, -1]], [[-1, -1, -1]], (0, 0, 1, True)),
        ([[-1, -1, -1]], [[-1, 0, -1]], (0, 1, 0, True)),
        ([[-1, 0, 0]], [[-1, 0, -1]], (1, 0, 1, True)),
        ([[-1, 0, -1]] * 2, [[-1, 0, -1], [-1, -1, -1]], (0, 0, 0, False)),
    ],
)
def test_the_check_tells_false_drops_misses_and_rounds_that_differ(
    row_5: ModuleType, ours: list[list[int]], theirs: list[list[int]], expected: tuple[int, int, int, bool]
) -> None:
    held = row_5.check([A, B, C], ours, theirs)
    assert held == row_5.Checked(*expected)
    assert held.holds == (expected[0] == expected[1] == 0 and expected[3])


def test_a_drop_for_a_text_that_does_not_stay_is_false(row_5: ModuleType) -> None:
    assert row_5.check([A, A, A], [[-1, 0, 1]], [[-1, 0, 0]]).false_drops == 1


def test_other_texts_are_read_from_lines_and_from_json(row_5: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "x", "turns": ["hi", {"text": "the longest one"}]}) + "\n")
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert list(row_5.read(tmp_path)) == ["the longest one", "one\n", "two\n"]


@pytest.mark.parametrize(
    ("value", "passed", "better", "met"),
    [
        (5.0, True, "higher", True),
        (4.9, True, "higher", False),
        (5.1, True, "lower", False),
        (9.0, False, "higher", False),
        (None, False, "higher", False),
    ],
)
def test_a_row_is_met_when_its_check_holds_and_its_value_suffices(
    measure: ModuleType, tmp_path: Path, value: float | None, passed: bool, better: str, met: bool
) -> None:
    result = measure.Result("5", value, "times", better, 5.0, 15.0, "all is right", passed, 5, "here")
    assert result.is_met is met
    measure.write(result, tmp_path)
    written = json.loads((tmp_path / "5.json").read_text("utf-8"))
    assert list(written) == ["row", "value", "unit", "better", "must", "aim", "check", "passed", "rounds", "machine"]
    assert written["value"] == value


def test_a_row_that_is_not_built_is_refused(row_5: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("run").main(["99"])
    assert "no benchmark is built for row 99" in capsys.readouterr().err
