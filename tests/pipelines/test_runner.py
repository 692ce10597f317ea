"""What a run refuses of its own steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from selfalign.backends.local import LocalBackend
from selfalign.core.errors import InternalError
from selfalign.core.records import Document, Outcome, Record
from selfalign.core.stage import Context, Rows, Step, WholeStage
from selfalign.core.store import Store
from selfalign.pipelines.runner import Runner, Silent


@dataclass(frozen=True)
class Makes(WholeStage):
    """A document of each id."""

    name: ClassVar[str] = "prepare.make"
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document
    ids: tuple[str, ...]

    def run(self, rows: Rows[Any], context: Context) -> Iterator[Outcome]:
        return (Document(id=id, source="s", text="x") for id in self.ids)

    def units(self, rows: Rows[Any], context: Context) -> int:
        return len(self.ids)


def test_an_id_that_comes_out_twice_is_named_and_the_step_is_not_done(tmp_path: Path) -> None:
    ids = (*(f"d{n}" for n in range(2_000)), "d7")
    step = Step("prepare.make", Makes(ids, shard_rows=500), {}, seed=0)
    runner = Runner([step], Store(tmp_path / "run"), LocalBackend(), Silent())
    with pytest.raises(InternalError, match=r"prepare\.make: the id 'd7' came out twice"):
        runner.run()
    assert runner.artifact(step).manifest() is None
