"""What a training has logged, through kills and resumes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from report.whole import lines
from selfalign.report.logs import TrainingLog, read_log


def read(tmp_path: Path, *rows: dict[str, object], torn: str = "") -> TrainingLog:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(rows) + torn)
    return read_log(tmp_path)


@given(
    # Each life of the training: how many of ten steps it takes, and how many steps before its end it last saved.
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), max_size=5)
)
def test_of_a_training_that_was_killed_again_and_again_each_step_counts_as_it_was_last_logged(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, int]]
) -> None:
    rows: list[dict[str, object]] = []
    last: dict[int, float] = {}
    saved, resumed = 0, set[int]()
    for life, (steps, lost) in enumerate([*lives, (100, 0)]):
        if saved:
            rows.append({"resumed_at": float(saved)})
            resumed = {step for step in resumed if step < saved} | {saved}
        end = min(saved + steps, 30)
        for step in range(saved + 1, end + 1):
            last[step] = life + step / 100
            rows.append({"step": float(step), "max_steps": 30.0, "loss": last[step]})
        saved = max(end - lost, saved)
    log = read(tmp_path_factory.mktemp("log"), *rows)
    assert log.curves["loss"] == [(step, last[step]) for step in range(1, 31)]
    assert (list(log.resumed), log.last_step) == (sorted(resumed), 30)


def test_what_lies_behind_the_checkpoint_is_gone_when_it_is_resumed_not_when_it_is_written_again(
    tmp_path: Path,
) -> None:
    rows = [{"step": step, "max_steps": 90, "loss": step / 10} for step in (10, 20, 30)]
    log = read(tmp_path, *rows, {"resumed_at": 20})
    assert (log.curves["loss"], log.resumed, log.last_step) == ([(10, 1.0), (20, 2.0)], [20], 90)


def test_a_training_that_began_anew_was_never_resumed(tmp_path: Path) -> None:
    rows = [{"step": 10, "loss": 3}, {"resumed_at": 10}, {"step": 20, "loss": 2}, {"step": 5, "loss": 9}]
    log = read(tmp_path, *rows)
    assert (log.curves["loss"], log.resumed) == ([(5, 9)], [])


def test_what_a_line_does_not_hold_has_a_gap_and_what_none_holds_no_curve(tmp_path: Path) -> None:
    rows = [
        {"step": 10, "loss": 3.0, "tokens": 5},
        {"step": 20, "loss": float("nan"), "grad_norm": 0.5},
        {"step": 30, "loss": 1.0, "grad_norm": None},
        {"tokens": 9, "seconds": 1.0},
    ]
    log = read(tmp_path, *rows, torn='{"step": 40, "lo')
    assert log.curves == {"loss": [(10, 3.0), (30, 1.0)], "grad_norm": [(20, 0.5)]}
    assert (log.last("loss"), log.last("memory_bytes")) == (1.0, None)


def test_a_training_without_a_log_has_no_curves(tmp_path: Path) -> None:
    assert read_log(tmp_path) == TrainingLog({}, [], 0)
