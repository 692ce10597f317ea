"""What a step measures, in several attempts and wherever its run folder lies."""

from pathlib import Path
from typing import Any

import pytest

from s3 import S3
from selfalign.core import metrics as module
from selfalign.core.errors import ServiceError, StoreAwayError
from selfalign.core.locations import Location, entries, files_in
from selfalign.core.metrics import Measurements, read_measurements


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_what_every_attempt_measured_is_kept_in_order(place: Location) -> None:
    assert read_measurements(place) == []
    for attempt in range(3):
        with Measurements(place) as measured:
            measured.add({"attempt": attempt, "seconds": 0.5})
            assert timeless(measured.lines())[-1] == {"attempt": attempt, "seconds": 0.5}
            measured.add({"attempt": attempt, "seconds": 1})
    assert [line["attempt"] for line in read_measurements(place)] == [0, 0, 1, 1, 2, 2]


def test_what_a_failed_attempt_measured_is_kept(place: Location) -> None:
    with pytest.raises(ZeroDivisionError), Measurements(place) as measured:  # noqa: PT012
        measured.add({"seconds": 1})
        raise ZeroDivisionError
    assert timeless(read_measurements(place)) == [{"seconds": 1}]


def test_an_attempt_that_measured_nothing_leaves_nothing(place: Location) -> None:
    with Measurements(place):
        pass
    assert files_in(place) == []


def test_a_torn_last_line_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    with Measurements(tmp_path) as measured:
        measured.add({"step": 3})
    assert timeless(read_measurements(tmp_path)) == [{"step": 1}, {"step": 3}]


def test_in_an_object_store_lines_wait_for_company_but_not_for_long(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = s3.folder()
    with Measurements(folder) as measured:
        for step in range(50):
            measured.add({"step": step})
        assert entries(folder, "*") == []
        monkeypatch.setattr(module, "FLUSH_S", -1)
        measured.add({"step": 50})
        assert len(entries(folder, "metrics-*.jsonl")) == 1
    assert [line["step"] for line in read_measurements(folder)] == list(range(51))


def test_a_store_that_was_away_is_not_asked_again_on_the_way_out(s3: S3) -> None:
    folder = s3.folder()
    before = s3.asked
    with pytest.raises(StoreAwayError), Measurements(folder) as measured:  # noqa: PT012
        measured.add({"step": 1})
        raise StoreAwayError("it cannot be reached")
    assert s3.asked == before


def test_a_store_that_is_away_is_told(s3: S3, impatient: None) -> None:
    folder = s3.folder()
    s3.fail("unavailable")
    with pytest.raises(ServiceError), Measurements(folder) as measured:
        measured.add({"step": 1})
    with pytest.raises(ServiceError):
        read_measurements(folder)
