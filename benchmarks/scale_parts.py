"""The parts that docs/scale.md reckons with: `python benchmarks/scale_parts.py` measures each of them alone."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table
from scale import steps, write

from selfalign.backends.local import LocalBackend
from selfalign.core.ledger import Ledger
from selfalign.core.shards import Journal
from selfalign.core.stage import Process
from selfalign.core.store import Artifact, Manifest, Store
from selfalign.pipelines.runner import Runner, Silent

SHARDS, ROWS, BATCHES = 100_000, 20_480, 500


def figures(folder: Path, shards: int = SHARDS, rows: int = ROWS, batches: int = BATCHES) -> dict[str, float]:
    """What each part takes, by what it is and its unit."""
    return {
        **_of_a_folder(folder / "many", shards),
        **_of_a_run(folder / "run", rows),
        **_of_a_journal(folder, batches),
    }


def _of_a_folder(folder: Path, shards: int) -> dict[str, float]:
    artifact = Artifact(folder, "0" * 16)
    folder.mkdir()
    for number in range(shards):
        artifact.shard(number).touch()
    files = {path.name: f"{number:064x}" for number, path in enumerate(artifact.shards())}
    artifact.finish(Manifest("stage", artifact.identity, "", {}, files, Ledger().to_json()))
    return {
        "listing a shard, CPU-µs": _cpu_s(artifact.shards) / shards * 1e6,
        "manifest a shard, bytes": (folder / "manifest.json").stat().st_size / shards,
        "manifest of 10^6 shards read, CPU-s": _cpu_s(artifact.manifest) / shards * 1e6,
    }


def _of_a_run(folder: Path, rows: int) -> dict[str, float]:
    folder.mkdir()
    write(folder, rows)

    def run() -> Artifact:
        made = steps(folder)[:3]
        runner = Runner(made, Store(folder / "run"), LocalBackend(), Silent())
        runner.run()
        return runner.artifact(made[-1])

    artifact = run()
    shards = len(artifact.shards())
    measured = (artifact.folder / "metrics.jsonl").stat().st_size
    (artifact.folder / "manifest.json").unlink()
    return {
        "measurements a shard, bytes": measured / shards,
        "a done shard in a resumed run, CPU-ms": _cpu_s(run) / shards * 1e3,
    }


def _of_a_journal(folder: Path, batches: int) -> dict[str, float]:
    journal, nothing = Journal(folder / "journal", stall_minutes=10), Process(lambda rows: ())

    def note() -> None:
        for _ in range(batches):
            journal.run("batch 0", nothing, ())

    return {"journal of a batch, CPU-µs": _cpu_s(note) / batches * 1e6}


def _cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> int:
    """The process's exit code."""
    table = Table("part", "measured")
    with TemporaryDirectory() as folder:
        for name, value in figures(Path(folder)).items():
            table.add_row(name, f"{value:.3g}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
