"""What a row costs as their number grows: `python benchmarks/scale.py [ROWS…]`, with `--backend ray` on Ray's workers.

So many made-up documents go through reading, picking, augmentation and curation with the scripted engine, each number
in a fresh process. Printed are the costs a row, and the most memory that the driver held, after imports.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from measure import Work, in_child
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from spending import Spending, backend

from selfalign.core.shards import ShardReport
from selfalign.core.stage import External, Resources, Stage, Step, Workers
from selfalign.core.store import Manifest, Store
from selfalign.data.config import CorpusConfig
from selfalign.engines.config import ModelConfig
from selfalign.pipelines.externals import Externals
from selfalign.pipelines.runner import Runner, Silent
from selfalign.stages.augment import AugmentConfig, Deduplicate, Filter, Generate
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rate import Rate, Rater
from selfalign.stages.curate.select import Select
from selfalign.stages.prepare.pick import PickCorpus
from selfalign.stages.prepare.read import ReadCorpus
from selfalign.text.language import language

ROWS = (10_000, 30_000, 100_000)
GROWTH_MIB, SLOWER = 200, 1.3
MIB = 2**20

# A tenth of the instructions is empty, and a tenth of the pairs is rated low.
SCRIPT = [
    {"match": r"^Ask about: .*number \d*5\b", "reply": " "},
    {"match": r"^Ask about: .*number (\d+)", "reply": r"What does page number \1 say?"},
    {"match": r"number \d*7\b", "scores": {" 2": 0.9, " 3": 0.1}},
    {"match": "Rate", "scores": {" 4": 0.2, " 5": 0.8}},
]


def write(folder: Path, rows: int) -> None:
    """The corpus, the script and the prompts."""
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for n in range(rows):
            text = f"This is page number {n}. " + "It says that the lake lies north of the town. " * (1 + n % 7)
            file.write(json.dumps({"text": text}) + "\n")
    (folder / "script.json").write_text(json.dumps(SCRIPT), "utf-8")
    (folder / "instruct.txt").write_text("Ask about: {response}\n", "utf-8")
    (folder / "rate.txt").write_text("Rate it.\nQuestion: {instruction}\nAnswer: {response}\n", "utf-8")


def steps(folder: Path, workers: int = 2) -> list[Step]:
    """From the corpus in `folder` to its selected pairs, as a recipe has them."""
    externals = Externals()
    model, base = externals.model(ModelConfig(path=str(folder / "script.json"), engine="scripted"), "model.path")
    corpus = CorpusConfig(path=str(folder / "corpus.jsonl"), drop_duplicates=True)
    augment = AugmentConfig(prompt_file=str(folder / "instruct.txt"))
    curate = CurateConfig(prompt_file=str(folder / "rate.txt"))
    rater = Rater(curate, model, augment.prompt())
    pool = Resources(workers=Workers(min=1, max=workers))

    def step(name: str, stage: Stage, **inputs: Step | External) -> Step:
        return Step(name, stage, inputs, 0, resources=pool)

    read = step("prepare.read_corpus", ReadCorpus(corpus), rows=externals.source(corpus, "prepare.corpus"))
    picked = step("prepare.pick_corpus", PickCorpus(config=corpus), rows=read)
    generated = step("augment.generate", Generate(augment, model), rows=picked, model=base)
    filtered = step("augment.filter", Filter(augment), rows=generated)
    candidates = step("augment.deduplicate", Deduplicate(config=augment), rows=filtered)
    rated = step("curate.rate@1", Rate(rater), rows=candidates, model=base)
    selected = step("curate.select@1", Select(config=curate), rows=rated)
    return [read, picked, generated, filtered, candidates, rated, selected]


@dataclass(frozen=True)
class Grown:
    """What so many rows cost: CPU-seconds of the driver by step, its peak memory (bytes after imports), and all
    processes' CPU-seconds. `content` is the digest of the pairs that are selected, `kept` their number."""

    rows: int
    wall_s: float
    driver_s: float
    all_s: float
    peak_bytes: int
    by_step: Mapping[str, float]
    kept: int
    content: str

    @property
    def us_a_row(self) -> float:
        """All processes' CPU-microseconds."""
        return self.all_s / self.rows * 1e6


class _ByStep(Silent):
    """How much of the driver's CPU time each step took."""

    def __init__(self, spending: Spending) -> None:
        self.spent: dict[str, float] = {}
        self._spending = spending
        self._last = time.process_time()

    def shard_done(self, step: Step, report: ShardReport) -> None:
        # The last look at workers that live for one step.
        self._spending.look()

    def step_done(self, step: Step, manifest: Manifest, reused: bool) -> None:
        now = time.process_time()
        self.spent[step.name], self._last = now - self._last, now


def pipeline(folder: str, run: str, where: str, workers: str) -> Work:
    """The side: all steps, on a backend that stands already. The corpus is listed and hashed within it."""
    chosen = backend(where)
    language("What is loaded once is no part of a row's cost.")

    def work() -> dict[str, object]:
        spending, driver = Spending(), time.process_time()
        listener = _ByStep(spending)
        made = steps(Path(folder), int(workers))
        runner = Runner(made, Store(Path(run)), chosen, listener)
        runner.run()
        driver, spent = time.process_time() - driver, spending.look()
        manifest = runner.artifact(made[-1]).manifest()
        chosen.close()
        assert manifest is not None
        return {
            "all_s": spent,
            "driver_s": driver,
            "by_step": listener.spent,
            "kept": manifest.ledger["kept"],
            "content": manifest.sha256,
        }

    return work


def grown(rows: int, where: str = "local", workers: int = 2) -> Grown:
    """Measure so many rows in a fresh process."""
    with TemporaryDirectory(prefix="scale-") as folder:
        write(Path(folder), rows)
        spent = in_child("scale:pipeline", folder, f"{folder}/run", where, str(workers))
    assert isinstance(spent.output, dict)
    found = {"rows": rows, "wall_s": spent.wall_s, "peak_bytes": spent.peak_bytes, **spent.output}
    return TypeAdapter(Grown).validate_python(found)


def slower(found: Sequence[Grown]) -> float:
    """How many times the CPU time a row of the fewest rows the most take."""
    return found[-1].us_a_row / found[0].us_a_row


def growth_mib(found: Sequence[Grown]) -> float:
    """By how much the driver holds more memory at the most rows than at the fewest."""
    return (found[-1].peak_bytes - found[0].peak_bytes) / MIB


def main(arguments: list[str]) -> int:
    """The process's exit code: 1 where the cost a row or the driver's memory grows more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", metavar="ROWS", default=[*ROWS])
    parser.add_argument("--backend", choices=("local", "ray"), default="local")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    found = [grown(rows, given.backend, given.workers) for rows in sorted(given.rows)]
    table = Table("rows", "wall s", "CPU-s", "CPU-µs a row", "driver's share", "driver's peak MiB", "kept")
    for each in found:
        cells = [f"{each.rows:,}", f"{each.wall_s:.1f}", f"{each.all_s:.1f}", f"{each.us_a_row:.0f}"]
        cells += [f"{each.driver_s / each.all_s:.0%}", f"{each.peak_bytes / MIB:.0f}", f"{each.kept:,}"]
        table.add_row(*cells)
    steps_table = Table("driver's CPU-µs a row", *(f"{each.rows:,}" for each in found))
    for name in found[0].by_step:
        steps_table.add_row(name, *(f"{each.by_step[name] / each.rows * 1e6:.0f}" for each in found))
    told = f"{slower(found):.2f} times the cost a row (at most {SLOWER}), "
    told += f"{growth_mib(found):.0f} MiB more in the driver (at most {GROWTH_MIB})"
    Console(width=None if sys.stdout.isatty() else 120).print(table, steps_table, told)
    return 0 if slower(found) <= SLOWER and growth_mib(found) <= GROWTH_MIB else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
