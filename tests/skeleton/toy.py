"""A pipeline as small as the contract allows: a map of 1 → k rows, a whole, a fake build, two rounds and a stop."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from selfalign.core.errors import GateError
from selfalign.core.identity import digest, seed_for
from selfalign.core.ledger import Ledger
from selfalign.core.protocols import Request, Sampling
from selfalign.core.records import Candidate, Document, Outcome, Record, rejected
from selfalign.core.stage import (
    BuildStage,
    Built,
    Context,
    External,
    Log,
    MapStage,
    Place,
    Process,
    Resources,
    Step,
    WholeStage,
    Workers,
)
from selfalign.core.store import Manifest
from selfalign.engines.config import ModelConfig
from selfalign.engines.open import open_engine


@dataclass(frozen=True)
class Read(WholeStage):
    """Makes the documents."""

    name: ClassVar[str] = "prepare.read"
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document
    texts: tuple[str, ...] = ()

    def settings(self) -> dict[str, object]:
        return {"texts": list(self.texts)}

    def units(self, rows: Sequence[Document], context: Context) -> int:
        return len(self.texts)

    def run(self, rows: Sequence[Document], context: Context) -> Iterable[Outcome]:
        for n, text in enumerate(self.texts):
            yield Document(id=f"doc/{n:04d}", source="toy", text=text)


@dataclass(frozen=True)
class Ask(MapStage):
    """k questions a document, by the engine."""

    name: ClassVar[str] = "augment.ask"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Candidate
    batch_rows: ClassVar[int] = 4
    model: ModelConfig = field(default_factory=lambda: ModelConfig(path="."))
    candidates: int = 2
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, max_new_tokens=8))

    def settings(self) -> dict[str, object]:
        return {"candidates": self.candidates, "sampling": self.sampling, "slots": self.model.slots}

    def units(self, row: Document) -> int:
        return self.candidates

    def size(self, row: Document) -> int:
        return len(row.text)

    def open(self, context: Context) -> Process:
        engine = open_engine(self.model)
        identity = context.identity("model")

        def run(rows: Sequence[Document]) -> Iterable[Outcome]:
            ids = [(row, f"{row.id}/{n}") for row in rows for n in range(self.candidates)]
            requests = [
                Request(i, ({"role": "user", "content": row.text},), seed_for(context.seed, i, self.name))
                for row, i in ids
            ]
            for (row, i), reply in zip(ids, engine.generate(requests, self.sampling), strict=True):
                candidate = Candidate(
                    id=i,
                    source=row.source,
                    prompt=reply.text,
                    completion=row.text,
                    model=identity,
                    prompt_hash="",
                    finish=reply.finish,
                    parents=(row.id,),
                )
                yield candidate if reply.text.strip() else rejected(i, "empty", candidate)

        return Process(run, lambda: engine.tokens)


@dataclass(frozen=True)
class Keep(WholeStage):
    """Keeps those whose text hashes below a threshold, and refuses to keep none."""

    name: ClassVar[str] = "curate.keep"
    record: ClassVar[type[Record]] = Candidate
    output: ClassVar[type[Record]] = Candidate
    threshold: int = 8
    min_kept: int = 1
    shard_rows: int = 8

    def settings(self) -> dict[str, object]:
        return {"threshold": self.threshold}

    def run(self, rows: Sequence[Candidate], context: Context) -> Iterable[Outcome]:
        for row in rows:
            low = int(digest(row.completion)[0], 16) < self.threshold
            yield row if low else rejected(row.id, "above", row)

    def check(self, manifest: Manifest) -> None:
        kept = manifest.ledger["kept"]
        if not isinstance(kept, int) or kept < self.min_kept:
            raise GateError(f"{kept} rows kept, {self.min_kept} wanted: raise the threshold")


@dataclass(frozen=True)
class FakeTrain(BuildStage):
    """Writes a file that depends on every row, and on the model before."""

    name: ClassVar[str] = "forward.train"
    seeded: ClassVar[bool] = True
    stop_below: int = 0

    def settings(self) -> dict[str, object]:
        return {"stop_below": self.stop_below}

    def build(self, context: Context, place: Place, log: Log) -> Built:
        rows = [[row.id, row.prompt] for row in context.rows("rows", Candidate)]
        log({"step": 1, "loss": 0.5})
        weights = digest([rows, context.identity("model"), context.seed])
        (place.draft / "weights.json").write_text(json.dumps(weights))
        stop = f"only {len(rows)} rows" if len(rows) < self.stop_below else None
        return Built(("weights.json",), Ledger(len(rows), len(rows), len(rows)), stop=stop)


@dataclass(frozen=True)
class Toy:
    """The toy's recipe."""

    model: ModelConfig
    model_digest: str
    texts: tuple[str, ...]
    seed: int = 0
    candidates: int = 2
    threshold: int = 8
    min_kept: int = 1
    stop_below: int = 0
    rounds: int = 2
    shard_rows: int = 16
    workers: int = 2

    def steps(self) -> list[Step]:
        """Read, ask, then in each round: keep and train, the next round asking the trained model."""
        base = External(self.model.path, self.model_digest)
        read = Step("prepare.read", Read(shard_rows=self.shard_rows, texts=self.texts), {}, self.seed)
        steps, model, after = [read], base, ()
        for k in range(1, self.rounds + 1):
            ask_stage = Ask(self.model, self.candidates)
            inputs = {"rows": read, "model": model}
            pool = Resources(workers=Workers(max=self.workers))
            ask = Step(f"augment.ask@{k}", ask_stage, inputs, self.seed, after=after, resources=pool)
            keep = Step(
                f"curate.keep@{k}", Keep(threshold=self.threshold, min_kept=self.min_kept), {"rows": ask}, self.seed
            )
            train_stage = FakeTrain(self.stop_below)
            train = Step(f"forward.train@{k}", train_stage, {"rows": keep, "model": model}, self.seed, after=(keep,))
            steps += [ask, keep, train]
            model, after = train, (train,)
        return steps
