"""Many rows: prepared shard by shard, by several workers, resumed where they were, without all of them in memory."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfalign.backends.local import LocalBackend
from selfalign.backends.ray import RayBackend
from selfalign.core.protocols import Backend
from selfalign.core.records import Document
from selfalign.core.stage import Context, Step
from selfalign.core.store import Store
from selfalign.data.config import CorpusConfig
from selfalign.engines.config import ModelConfig
from selfalign.pipelines.externals import Externals
from selfalign.pipelines.runner import Runner, Silent
from selfalign.stages.prepare.filter import FilterCorpus
from selfalign.stages.prepare.pick import PickCorpus
from selfalign.stages.prepare.read import ReadCorpus

ROWS = 9_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in plain and compressed files, and pages."""
    root = tmp_path_factory.mktemp("corpus")
    rows = [json.dumps({"text": f"Text {n} about {n % 97} things."}) + "\n" for n in range(ROWS)]
    (root / "plain.jsonl").write_text("".join(rows))
    (root / "packed.jsonl.gz").write_bytes(gzip.compress("".join(rows[:5_000]).encode()))
    for n in range(40):
        (root / f"page{n}.html").write_text(f"<h1>Page {n}</h1><p>Top {n}.</p><h2>Part</h2><p>Below {n}.</p>")
    return root


def steps(folder: Path) -> list[Step]:
    config = CorpusConfig(path=str(folder), min_chars=6, drop_nested=True, drop_duplicates=True)
    files = Externals().source(config, "prepare.corpus")
    read = Step("prepare.read_corpus", ReadCorpus(config), {"rows": files}, 0)
    filtered = Step("prepare.filter_corpus", FilterCorpus(config, ModelConfig(path="none")), {"rows": read}, 0)
    return [read, filtered, Step("prepare.pick_corpus", PickCorpus(config=config), {"rows": filtered}, 0)]


def contents(root: Path, made: list[Step]) -> list[str]:
    runner = Runner(made, Store(root), LocalBackend(), Silent())
    manifests = [runner.artifact(step).manifest() for step in runner.steps]
    return [manifest.sha256 for manifest in manifests if manifest]


def prepared(root: Path, made: list[Step], backend: Backend) -> list[str]:
    Runner(made, Store(root), backend, Silent()).run()
    return contents(root, made)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("run")
    return root, prepared(root, steps(folder), LocalBackend())


def test_every_record_of_every_kind_of_file_is_accounted_for(folder: Path, undisturbed: tuple[Path, list[str]]) -> None:
    runner = Runner(steps(folder), Store(undisturbed[0]), LocalBackend(), Silent())
    read, _, picked = (runner.artifact(step).manifest() for step in runner.steps)
    assert read is not None
    assert picked is not None
    assert (read.ledger["sources"], read.ledger["in"]) == (ROWS + 5_000 + 40, ROWS + 5_000 + 80)
    assert read.ledger["kept"] == read.ledger["in"]
    # The packed rows are the first of the plain ones, and a page's part lies inside the page.
    assert picked.ledger["rejected"] == {"duplicate": 5_000, "nested": 40}


def test_several_workers_read_the_same_bytes_as_one(
    folder: Path, undisturbed: tuple[Path, list[str]], tmp_path: Path, shared_ray: None
) -> None:
    assert prepared(tmp_path, steps(folder), RayBackend()) == undisturbed[1]


def test_what_was_read_before_a_stop_is_not_read_again(
    folder: Path, undisturbed: tuple[Path, list[str]], tmp_path: Path
) -> None:
    made = steps(folder)
    prepared(tmp_path, made[:1], LocalBackend())
    artifact = Store(tmp_path).artifact(made[0].stage.name, made[0].identity)
    shards = artifact.shards()
    assert len(shards) > 3
    (artifact.folder / "manifest.json").unlink()
    for lost in shards[1::2]:
        lost.unlink()
    before = [os.stat(path).st_mtime_ns for path in shards[::2]]
    assert prepared(tmp_path, made, LocalBackend()) == undisturbed[1]
    assert [os.stat(path).st_mtime_ns for path in shards[::2]] == before


class Endless:
    """So many documents, made anew each time they are gone through."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Document]:
        for n in range(self.count):
            yield Document(id=f"d{n:07d}", source="s", text=f"{n} " * 500)


def test_picking_holds_no_texts(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        stage = PickCorpus(
            config=CorpusConfig(path="x", drop_duplicates=True, drop_nested=True, sample=50, length_quantiles=(0, 1))
        )
        tracemalloc.start()
        for _ in stage.run(Endless(count), Context("s", 0, {})):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(500), peak(4_000)
    # A text takes over 2,000 bytes; what is kept of it, its place, seed and digest, a tenth of it and less.
    assert (many - few) / 3_500 < 500
