"""Rows 7 and 8: what runner, shards and backend add to the work of a stage, and what a step costs that does nothing.

`python benchmarks/run.py 7` measures a row. The same work differs by several per cent from process to process, which is
more than row 7 is about: so the stage clocks itself within the run, and a run of the stage alone is beside it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from shutil import copytree

from measure import Result, Spent, Work, by_turns, machine, median_ratio
from pydantic import TypeAdapter
from rich.table import Table
from spending import Spending, backend

from selfalign.backends.local import LocalBackend
from selfalign.core.errors import UsageError
from selfalign.core.identity import digest
from selfalign.core.protocols import Request
from selfalign.core.records import Candidate, Document, Outcome
from selfalign.core.shards import ShardReport
from selfalign.core.stage import Context, External, Process, Resources, Step, Workers
from selfalign.core.store import Artifact, Store
from selfalign.core.tables import read_kept, to_parquet
from selfalign.engines.open import open_engine
from selfalign.pipelines.externals import Externals
from selfalign.pipelines.runner import Runner, Silent
from selfalign.recipe import load
from selfalign.stages.augment import Generate
from selfalign.stages.prepare.pick import PickCorpus
from selfalign.stages.prepare.read import ReadCorpus

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
CORPUS = Path(__file__).parents[1] / "src" / "selfalign" / "demo" / "data" / "corpus.jsonl"
DISTILABEL = Path(__file__).parents[1] / ".venv-distilabel" / "bin" / "python"
ROUNDS, ROUNDS_OF_PROCESSES = 5, 9
SHARD_S = 1.0
DOCUMENTS, PAGES = 2_048, 8
FEW, MANY = 1, 5
"""Numbers of steps whose difference is what a further one costs."""


# Row 7


@dataclass(frozen=True)
class Clocked(Generate):
    """Generation that appends the CPU-seconds of each batch to the file `notes`."""

    notes: Path = field(kw_only=True)

    def open(self, context: Context) -> Process:
        """As ever, but for the clock."""
        opened = super().open(context)

        def run(rows: Sequence[Document]) -> Iterable[Outcome]:
            started = time.process_time()
            outcomes = list(opened.run(rows))
            with self.notes.open("a") as file:
                file.write(f"{time.process_time() - started}\n")
            return outcomes

        return Process(run, opened.tokens)


@dataclass(frozen=True)
class Side:
    """What a side took: all CPU-seconds, those at which each shard was done, and each batch's own. `content` is the
    digest of the instructions."""

    cpu_s: float
    marks: tuple[float, ...]
    batches: tuple[float, ...]
    content: str

    @property
    def share(self) -> float:
        """What is not the stage's own, of everything."""
        return 1 - sum(self.batches) / self.cpu_s

    @property
    def steady_share(self) -> float:
        """The same from the first shard's end to the last one's, where nothing starts or ends."""
        first = len(self.batches) // len(self.marks)
        return 1 - sum(self.batches[first:]) / (self.marks[-1] - self.marks[0])

    @property
    def shard_s(self) -> float:
        """The stage's own CPU-seconds a shard."""
        return sum(self.batches) / len(self.marks)


def demo_steps(corpus: Path, notes: Path) -> list[Step]:
    """The documents of a file, and an instruction for each of them by the demo's base, clocked."""
    recipe, externals = load(RECIPE, [f"prepare.corpus.path={corpus}", "model.slots=16"]).recipe, Externals()
    model, base = externals.model(recipe.model, "model.path")
    source = recipe.prepare.corpus
    read = Step("prepare.read_corpus", ReadCorpus(source), {"rows": externals.source(source, "prepare.corpus")}, 0)
    picked = Step("prepare.pick_corpus", PickCorpus(config=source), {"rows": read}, 0)
    pool = Resources(workers=Workers(min=1, max=1))
    generate = Clocked(recipe.augment, model, notes=notes)
    return [read, picked, Step("augment.generate", generate, {"rows": picked, "model": base}, 0, resources=pool)]


def prepare(folder: Path, documents: int = DOCUMENTS) -> None:
    """Make the documents of several pages each, which no side is measured on."""
    pages = [json.loads(line)["text"] for line in CORPUS.read_text("utf-8").splitlines()]
    joined = ["\n".join(pages[(n * PAGES + page) % len(pages)] for page in range(PAGES)) for n in range(documents)]
    lines = "".join(json.dumps({"text": f"{n}. {text}"}) + "\n" for n, text in enumerate(joined))
    (folder / "corpus.jsonl").write_text(lines, "utf-8")
    Runner(
        demo_steps(folder / "corpus.jsonl", folder / "notes")[:2], Store(folder / "documents"), LocalBackend(), Silent()
    ).run()


def bare(folder: str) -> Work:
    """The stage's own work in a loop over the shards' rows, which are in memory: the same batches, and nothing kept."""
    own = Path(tempfile.mkdtemp(dir=folder))
    *_, picked, generate = demo_steps(Path(folder) / "corpus.jsonl", own / "notes")
    documents = Runner([picked], Store(Path(folder) / "documents"), LocalBackend(), Silent()).artifact(picked)
    stage = _warm(generate, documents)
    shards = [[*read_kept(path, Document)] for path in documents.shards()]
    base = generate.inputs["model"]
    assert isinstance(base, External)
    for rows in shards:
        rows.sort(key=lambda row: (stage.size(row), row.id))

    def work() -> dict[str, object]:
        marks, found, started = [], list[Outcome](), time.process_time()
        process = stage.open(Context(stage.name, generate.seed, {"model": base}))
        for rows in shards:
            for start in range(0, len(rows), stage.batch_rows):
                found += process.run(rows[start : start + stage.batch_rows])
            marks.append(time.process_time() - started)
        return _side(marks[-1], marks, stage.notes, found)

    return work


class _Marks(Silent):
    """Notes the time by `clock` at which each shard was done."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.marks: list[float] = []
        self._clock = clock

    def shard_done(self, step: Step, report: ShardReport) -> None:
        self.marks.append(self._clock())


def through(folder: str, where: str) -> Work:
    """The same through the runner on a backend, from the finished documents to the manifest."""
    own = Path(tempfile.mkdtemp(dir=folder))
    copytree(Path(folder) / "documents", own / "run")
    steps, chosen = demo_steps(Path(folder) / "corpus.jsonl", own / "notes"), backend(where)
    documents = Runner(steps[:2], Store(own / "run"), LocalBackend(), Silent()).artifact(steps[1])
    stage = _warm(steps[2], documents)
    clock = time.process_time if where == "local" else Spending().look

    def work() -> dict[str, object]:
        started, listener = clock(), _Marks(clock)
        runner = Runner(steps, Store(own / "run"), chosen, listener)
        runner.run()
        spent = clock() - started
        chosen.close()
        found = [row for path in runner.artifact(steps[2]).shards() for row in read_kept(path, Candidate)]
        return _side(spent, [mark - started for mark in listener.marks], stage.notes, found)

    return work


def _warm(generate: Step, documents: Artifact) -> Clocked:
    """Load the model, which stays, and use it once; write a table, which imports pandas."""
    stage = generate.stage
    assert isinstance(stage, Clocked)
    rows = [*islice(read_kept(documents.shards()[0], Document), 2)]
    to_parquet(rows, Document)
    requests = [Request(row.id, stage.messages(stage.prompt, row)) for row in rows]
    open_engine(stage.model).generate(requests, stage.config.sampling())
    return stage


def _side(cpu_s: float, marks: Sequence[float], notes: Path, found: Sequence[Outcome]) -> dict[str, object]:
    batches = [float(line) for line in notes.read_text().splitlines()]
    content = digest({row.id: row.prompt for row in found if isinstance(row, Candidate)})
    return asdict(Side(cpu_s, tuple(marks), tuple(batches), content))


def row_7(rounds: int = ROUNDS) -> tuple[Result, Table]:
    """Row 7."""
    if find_spec("ray") is None:
        raise UsageError("row 7 has a side on Ray: pip install -e '.[ray]' in the checkout")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        sides: dict[str, Sequence[str]] = {"bare": ("orchestration:bare", folder)}
        sides |= {where: ("orchestration:through", folder, where) for where in ("local", "ray")}
        measured = by_turns(sides, rounds)
    return result_of_7(measured)


def result_of_7(measured: Sequence[dict[str, Spent]]) -> tuple[Result, Table]:
    """The row, and what is behind it, from all rounds."""
    found = [{name: TypeAdapter(Side).validate_python(spent.output) for name, spent in r.items()} for r in measured]

    def median(name: str, of: Callable[[Side], float]) -> float:
        return statistics.median(of(each[name]) for each in found)

    same = len({side.content for each in found for side in each.values()}) == 1
    shard_s = median("local", lambda side: side.shard_s)
    passed = same and shard_s >= SHARD_S
    steady = 100 * median("ray", lambda side: side.steady_share)
    whole = 100 * median("local", lambda side: side.share)
    beside = 100 * (1 - 1 / median_ratio(*([each[name].cpu_s for each in found] for name in ("local", "bare"))))
    details = Table("side", "CPU-s", "CPU-s a shard, the stage's own", "share of the rest, %", "from shard to shard, %")
    for name in ("bare", "local", "ray"):
        figures = [median(name, lambda side: side.cpu_s), median(name, lambda side: side.shard_s)]
        shares = [100 * median(name, lambda side: side.share), 100 * median(name, lambda side: side.steady_share)]
        details.add_row(name, *(f"{each:.2f}" for each in figures), *(f"{each:.1f}" for each in shares))
    check = (
        f"{'the same' if same else 'not the same'} instructions on all sides; {shard_s:.2f} CPU-s a shard (at least "
    )
    check += f"{SHARD_S:g}); against the loop of its own {beside:.1f} %; on Ray {steady:.1f} %, from shard to shard"
    return Result("7", whole if passed else None, "%", "lower", 5, 2, check, passed, len(found), machine()), details


# Row 8


def process(interpreter: str, script: str, count: str) -> Work:
    """A whole process, which sends rows through `count` steps. Only its own work and its children's is counted."""

    def work() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            command = [interpreter, str(Path(__file__).with_name(script)), count, folder]
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
            texts: list[str] = json.loads((Path(folder) / "texts.json").read_text("utf-8"))
        return texts

    return work


def row_8(rounds: int = ROUNDS_OF_PROCESSES) -> tuple[Result, Table]:
    """Row 8."""
    if not DISTILABEL.exists():
        raise UsageError("row 8 compares with distilabel, which has an environment of its own: make bench-peers")
    sides = {
        f"{name}, {count}": ("orchestration:process", interpreter, script, str(count))
        for name, interpreter, script in (
            ("selfalign", sys.executable, "trivial_ours.py"),
            ("distilabel", str(DISTILABEL), "trivial_distilabel.py"),
        )
        for count in (FEW, MANY)
    }
    return result_of_8(by_turns(sides, rounds))


def result_of_8(measured: Sequence[dict[str, Spent]]) -> tuple[Result, Table]:
    """The row, and what is behind it, from all rounds."""

    def cpu_s(name: str, count: int) -> list[float]:
        return [spent[f"{name}, {count}"].cpu_s for spent in measured]

    def further_s(name: str) -> float:
        # Of medians, since the difference of two processes is mostly noise.
        return (statistics.median(cpu_s(name, MANY)) - statistics.median(cpu_s(name, FEW))) / (MANY - FEW)

    same = all(
        spent[f"selfalign, {n}"].output == spent[f"distilabel, {n}"].output for n in (FEW, MANY) for spent in measured
    )
    ratio = median_ratio(cpu_s("distilabel", FEW), cpu_s("selfalign", FEW))
    details = Table("side", f"CPU-s, {FEW} step", f"CPU-s, {MANY} steps", "CPU-s a further step")
    for name in ("selfalign", "distilabel"):
        medians = [f"{statistics.median(cpu_s(name, count)):.2f}" for count in (FEW, MANY)]
        details.add_row(name, *medians, f"{further_s(name):.3f}")
    check = f"{'the same' if same else 'not the same'} texts on both sides; a further step: "
    check += f"{further_s('selfalign'):.3f} against {further_s('distilabel'):.3f} CPU-s"
    return Result("8", ratio if same else None, "times", "higher", 1, 2, check, same, len(measured), machine()), details
