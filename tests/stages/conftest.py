"""What the stages' tests share: an engine that does as it is told, and inputs without a runner."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from selfalign.core.identity import file_digest
from selfalign.core.lease import Lease, Owner
from selfalign.core.locations import commit
from selfalign.core.protocols import Reply, Request, Sampling, Score
from selfalign.core.records import Outcome, Record
from selfalign.core.stage import Context, External, Place
from selfalign.core.store import Artifact, Manifest
from selfalign.core.tables import ledger_of, to_parquet


@dataclass
class FakeEngine:
    """Implements `core.protocols.Engine` by two functions, and notes what it was asked."""

    reply: Callable[[Request], Reply | str] = lambda request: "a reply"
    scores: Callable[[Request, Sequence[str]], list[Score] | None] = lambda request, options: [
        Score(-1.0, 1) for _ in options
    ]
    tokens: int = 0
    generated: list[tuple[list[Request], Sampling, Path | None]] = field(default_factory=list)
    scored: list[tuple[list[Request], list[list[str]], Path | None]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def generate(self, requests: Sequence[Request], sampling: Sampling, adapter: Path | None = None) -> list[Reply]:
        self.order.append("generate")
        self.generated.append((list(requests), sampling, adapter))
        self.tokens += len(requests)
        replies = [self.reply(request) for request in requests]
        return [Reply(each, 1, "stop") if isinstance(each, str) else each for each in replies]

    def score(
        self, requests: Sequence[Request], continuations: Sequence[Sequence[str]], adapter: Path | None = None
    ) -> list[list[Score] | None]:
        self.order.append("score")
        self.scored.append((list(requests), [list(options) for options in continuations], adapter))
        self.tokens += len(requests)
        return [self.scores(r, options) for r, options in zip(requests, continuations, strict=True)]

    def close(self) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine that every stage gets."""
    fake = FakeEngine()
    monkeypatch.setattr("selfalign.engines.open.open_engine", lambda config: fake)
    return fake


def place_in(folder: Path) -> Place:
    """Where a build without a runner works: its files go into `folder`."""
    return Place(folder, folder / "kept", folder.name, Lease(folder / "lease-000001.json", Owner.this_process()))


Stored = Callable[..., Artifact]


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """Rows as a complete artifact of one shard."""

    def store(name: str, rows: Sequence[Outcome], record: type[Record]) -> Artifact:
        artifact = Artifact(tmp_path / "artifacts" / f"{name}-id", f"identity of {name}")
        commit(artifact.shard(0), to_parquet(rows, record))
        ledger = ledger_of(artifact.shard(0)).to_json()
        files = {artifact.shard(0).name: file_digest(artifact.shard(0))}
        artifact.finish(Manifest(name, artifact.identity, "sha", {}, files, ledger))
        return artifact

    return store


@pytest.fixture
def seen() -> Callable[..., Context]:
    """What a stage sees, by its inputs; the model is there unless it is given."""

    def see(run_seed: int = 0, /, **inputs: Artifact | External) -> Context:
        return Context("stage", run_seed, {"model": External("base", "digest of base"), **inputs})

    return see
