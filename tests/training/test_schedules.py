import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfalign.core.errors import UsageError
from selfalign.engines.config import ModelConfig
from selfalign.training.config import TrainConfig, refuse_contradictions
from selfalign.training.schedules import humpback, scheduled

# arXiv 2308.06259: rows → (rows a step, steps).
TABLE = {
    100: (8, 30),
    800: (8, 300),
    1600: (8, 600),
    3200: (32, 500),
    6400: (32, 600),
    12_800: (32, 600),
    25_600: (32, 1200),
    51_200: (32, 1600),
}
ROWS = st.integers(1, 600_000)


@pytest.mark.parametrize("rows", TABLE)
def test_the_papers_points_are_met_exactly(rows: int) -> None:
    assert humpback(rows) == TABLE[rows]


def test_the_batch_grows_at_three_thousand_rows() -> None:
    assert (humpback(2999)[0], humpback(3000)[0]) == (8, 32)


@given(ROWS, ROWS)
def test_more_rows_are_never_shown_less(one: int, other: int) -> None:
    fewer, more = (batch * steps for batch, steps in map(humpback, sorted((one, other))))
    assert 1 <= fewer <= more


def test_beyond_the_table_its_last_line_goes_on() -> None:
    # From 25,600 to 51,200 rows the steps grow by a third; so they do from there to twice as many.
    assert humpback(102_400) == (32, round(1600 * 4 / 3))
    # The paper's A4 is seen about half.
    assert 2500 < humpback(195_043)[1] < 3000


def test_below_the_table_steps_are_in_proportion_to_rows() -> None:
    assert [humpback(rows) for rows in (50, 10, 1)] == [(8, 15), (8, 3), (8, 1)]


@given(ROWS, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]))
def test_a_scheduled_configuration_shows_the_batch_in_that_many_steps(rows: int, ranks: int, size: int) -> None:
    asked = TrainConfig(size_schedule="humpback", num_processes=ranks, per_device_train_batch_size=size)
    batch, steps = humpback(rows)
    if batch % (ranks * size):
        with pytest.raises(UsageError, match=f"{batch} rows a step.*per_device_train_batch_size"):
            scheduled(asked, rows)
        return
    found = scheduled(asked, rows)
    assert found.max_steps == steps
    assert found.num_processes * found.per_device_train_batch_size * found.gradient_accumulation_steps == batch
    assert scheduled(found, rows) == found
    refuse_contradictions(found, ModelConfig(path="x"))


def test_without_a_schedule_nothing_changes() -> None:
    asked = TrainConfig(max_steps=7)
    assert scheduled(asked, 100) is asked


@pytest.mark.parametrize(
    ("ranks", "size", "advice"),
    [
        (8, 4, "set per_device_train_batch_size to 1$"),
        (2, 3, "set per_device_train_batch_size to one of 1, 2, 4$"),
        (3, 1, "set num_processes to one of 1, 2, 4, 8$"),
    ],
)
def test_a_batch_that_does_not_divide_is_told_with_what_to_set(ranks: int, size: int, advice: str) -> None:
    asked = TrainConfig(size_schedule="humpback", num_processes=ranks, per_device_train_batch_size=size)
    with pytest.raises(UsageError, match=advice):
        scheduled(asked, 100)
