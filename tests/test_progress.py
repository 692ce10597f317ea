"""What people see while a run goes on."""

import io
import json

import pytest
from rich.console import Console

from selfalign.core.ledger import Ledger
from selfalign.core.shards import ShardReport
from selfalign.core.stage import Step
from selfalign.core.store import Manifest
from selfalign.progress import Bars, JsonLines
from skeleton.toy import Keep

STEP = Step("curate.keep@1", Keep(), {}, 0, arm="strict")
COUNTS = {"sources": 4, "in": 4, "kept": 1, "rejected": {"above": 2}, "quarantined": {"not_finite": 1}}
MANIFEST = Manifest("curate.keep", "01", "x", {}, {}, COUNTS, seconds=1.25)


def follow(listener: Bars | JsonLines) -> None:
    listener.step_started(STEP, 4)
    ledger = Ledger(4, 4, 1)
    ledger.count("rejected", "above", 2)
    listener.shard_done(STEP, ShardReport(0, "digest", ledger, 100, 0.5))
    listener.logged(STEP, {"step": 5.0, "max_steps": 10.0, "loss": 0.5})
    listener.note("a note [of brackets]")
    listener.step_done(STEP, MANIFEST, reused=False)


def test_on_a_terminal_each_step_is_a_line_with_what_was_dropped() -> None:
    out = io.StringIO()
    with Bars(Console(file=out, force_terminal=True, width=140)) as bars:
        follow(bars)
    shown = out.getvalue()
    assert "a note [of brackets]" in shown
    line = next(line for line in shown.splitlines() if "1 of 4" in line)
    assert "curate.keep@1 [strict]" in line
    assert "2 above, 1 not_finite" in line


def test_in_a_log_each_event_is_a_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    with JsonLines() as lines:
        follow(lines)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == ["step_started", "shard_done", "logged", "note", "step_done"]
    assert events[-1]["step"] == "strict/curate.keep@1"
    assert events[-1]["rejected"] == {"above": 2}


def test_a_log_says_how_far_a_step_is_and_how_fast(capsys: pytest.CaptureFixture[str]) -> None:
    with JsonLines() as lines:
        lines.step_started(STEP, 8)
        for number in range(2):
            lines.shard_done(STEP, ShardReport(number, "digest", Ledger(4, 4, 4), 100, 0.5))
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event.get("rows_done") for event in events] == [None, 4, 8]
    assert events[-1]["rows_total"] == 8
    assert events[-1]["tokens_per_second"] == pytest.approx(25 * events[-1]["rows_per_second"], rel=0.01)


def test_a_training_says_its_loss_and_speed_and_where_it_goes_on() -> None:
    out = io.StringIO()
    with Bars(Console(file=out, force_terminal=True, width=140)) as bars:
        bars.step_started(STEP, None)
        bars.logged(STEP, {"resumed_at": 1200.0})
        bars.logged(STEP, {"step": 1210.0, "max_steps": 2000.0, "loss": 0.5, "tokens_per_second": 12345.6})
    shown = out.getvalue()
    assert "curate.keep@1 [strict] goes on from its checkpoint at step 1,200" in shown
    assert "loss 0.5 · 12,346 tokens/s" in shown
