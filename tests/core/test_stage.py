"""Steps and what a running stage sees."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from selfalign.core.errors import InternalError
from selfalign.core.identity import file_digest
from selfalign.core.locations import commit
from selfalign.core.records import Document, Record, rejected
from selfalign.core.stage import Context, External, Resources, Stage, Step, WholeStage, Workers
from selfalign.core.store import Artifact, Manifest
from selfalign.core.tables import to_parquet
from selfalign.engines.config import ModelConfig


@dataclass(frozen=True)
class Plain(Stage):
    name: ClassVar[str] = "plain"
    setting: object = 1

    def settings(self) -> dict[str, object]:
        return {"setting": self.setting}


@dataclass(frozen=True)
class Seeded(Plain):
    seeded: ClassVar[bool] = True


@dataclass(frozen=True)
class Newer(Plain):
    version: ClassVar[int] = 2


@dataclass(frozen=True)
class Whole(WholeStage):
    name: ClassVar[str] = "whole"
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document

    def run(self, rows: object, context: Context) -> list[Document]:
        return []


FILE = External("/here", "digest")
STEP = Step("curate.rate@2", Plain(), {"rows": FILE}, 0)


@pytest.mark.parametrize(
    "other",
    [
        replace(STEP, stage=Plain(2)),
        replace(STEP, stage=Newer()),
        replace(STEP, stage=Seeded()),
        replace(STEP, inputs={"rows": External("/here", "another")}),
        replace(STEP, inputs={"rows": FILE, "model": FILE}),
        replace(STEP, inputs={"rows": STEP}),
        replace(STEP, stage=Plain(ModelConfig(path="x"))),
    ],
)
def test_what_decides_a_steps_bytes_is_in_its_identity(other: Step) -> None:
    assert other.identity != STEP.identity


@pytest.mark.parametrize(
    "other",
    [
        replace(STEP, name="curate.other@1"),
        replace(STEP, arm="uncurated"),
        replace(STEP, seed=1),
        replace(STEP, after=(STEP,)),
        replace(STEP, resources=Resources(workers=Workers(max=9))),
        replace(STEP, inputs={"rows": External("/elsewhere", "digest")}),
    ],
)
def test_what_does_not_is_left_out(other: Step) -> None:
    assert other.identity == STEP.identity


def test_the_runs_seed_counts_only_for_a_stage_that_draws() -> None:
    one = replace(STEP, stage=Seeded())
    assert one.identity != replace(one, seed=1).identity


def test_the_size_of_shards_counts() -> None:
    assert replace(STEP, stage=Whole()).identity != replace(STEP, stage=Whole(shard_rows=8)).identity


def test_a_change_far_up_reaches_every_step_below() -> None:
    def chain(digest: str) -> list[str]:
        steps = [replace(STEP, inputs={"rows": External("x", digest)})]
        for _ in range(3):
            steps.append(replace(STEP, inputs={"rows": steps[-1]}))
        return [step.identity for step in steps]

    assert not set(chain("a")) & set(chain("b"))


def test_a_name_tells_section_round_and_arm() -> None:
    assert (STEP.section, STEP.round, STEP.key) == ("curate", 2, "curate.rate@2")
    other = replace(STEP, name="augment.filter", arm="wide")
    assert (other.section, other.round, other.key) == ("augment", None, "wide/augment.filter")


def test_parents_are_the_steps_among_the_inputs_and_those_it_waits_for() -> None:
    first, second = replace(STEP, name="a.b"), replace(STEP, name="c.d")
    assert replace(STEP, inputs={"rows": first, "model": FILE}, after=(second,)).parents() == (first, second)


def stored(folder: Path) -> Artifact:
    artifact = Artifact(folder / "toy-01", "01")
    for number, ids in enumerate((("a", "c"), ("b",))):
        rows = [Document(id=id, source="s", text=id) for id in ids]
        commit(artifact.shard(number), to_parquet([*rows, rejected(f"{ids[0]}-not", "empty")], Document))
    return artifact


def test_a_stage_sees_kept_rows_paths_and_identities_of_its_inputs(tmp_path: Path) -> None:
    artifact = stored(tmp_path)
    files = {path.name: file_digest(path) for path in artifact.shards()}
    artifact.finish(Manifest("toy", "01", "x", {}, files, {}))
    context = Context("stage", 3, {"rows": artifact, "file": External("/here", "digest")})
    assert [row.id for row in context.rows("rows", Document)] == ["a", "c", "b"]
    assert context.path("file") == Path("/here")
    assert context.path("rows") == artifact.folder / "files"
    assert (context.identity("file"), context.identity("rows")) == ("digest", "01")
    assert pickle.loads(pickle.dumps(context)) == context


def test_an_input_that_is_not_complete_or_not_a_steps_is_a_bug(tmp_path: Path) -> None:
    artifact = stored(tmp_path)
    context = Context("stage", 3, {"rows": artifact, "file": External("/here", "digest")})
    with pytest.raises(InternalError, match="toy-01 is read before it is complete"):
        context.manifest("rows")
    with pytest.raises(InternalError, match="input 'file' is not a step's output"):
        list(context.rows("file", Document))
    artifact.finish(Manifest("toy", "01", "x", {}, {}, {}, metrics={"auc": 0.5}))
    assert context.manifest("rows").metrics == {"auc": 0.5}


def test_a_rows_seed_is_its_own_in_each_stage_and_run() -> None:
    seeds = {Context(stage, run, {}).seed_for(row) for stage in ("a", "b") for run in (0, 1) for row in ("x", "y")}
    assert len(seeds) == 8
