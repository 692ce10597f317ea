"""Many rows through preparation, augmentation and curation: what a row costs, and what the driver holds."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# A cost a row that grew with their number would be ten times as high. `make scale` has the benchmark's own bound, which
# other work on the machine can break.
NOT_GROWING = 2.5


@pytest.fixture(scope="module")
def scale() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("scale")


def test_ten_times_the_rows_cost_ten_times_as_much_and_the_driver_holds_hardly_more(scale: ModuleType) -> None:
    few, many = (scale.grown(rows) for rows in (10_000, 100_000))
    assert (few.kept, many.kept) == (8_000, 80_000)
    assert few.by_step.keys() == many.by_step.keys()
    assert scale.slower([few, many]) < NOT_GROWING
    assert scale.growth_mib([few, many]) <= scale.GROWTH_MIB


@pytest.mark.cluster
def test_on_ray_rows_are_selected_as_here_and_the_driver_holds_hardly_more(scale: ModuleType) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    here = scale.grown(2_000)
    few, many = (scale.grown(rows, "ray", 1) for rows in (2_000, 20_000))
    assert (here.kept, here.content) == (few.kept, few.content)
    assert scale.slower([few, many]) < NOT_GROWING
    # A tenth of what the other test takes, so a tenth of the rows to grow by.
    assert scale.growth_mib([few, many]) <= scale.GROWTH_MIB / 5
    assert many.driver_s < many.all_s
