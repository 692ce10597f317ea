"""What a step is: a stage (a value that knows no backend), its inputs, and what it sees while it runs."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import Field, JsonValue, PositiveInt, field_validator, model_validator

from selfalign.core.errors import InternalError
from selfalign.core.frozen import Frozen
from selfalign.core.identity import seed_for, step_identity
from selfalign.core.lease import Lease
from selfalign.core.ledger import Ledger
from selfalign.core.locations import Location
from selfalign.core.records import Outcome, Record
from selfalign.core.tables import Shard, read_kept

if TYPE_CHECKING:
    from selfalign.core.store import Artifact, Manifest

R = TypeVar("R", bound=Record)
R_co = TypeVar("R_co", bound=Record, covariant=True)

Settings = Mapping[str, Frozen | JsonValue]
# What a map's output shard is made from: a shard of a table, or records of what lies outside.
ShardSource = Shard | tuple[Record, ...]
Log = Callable[[Mapping[str, float]], None]


SHARDS_AHEAD = 4
"""How many shards of an object store are on their way, or wait, while one is gone through."""
STALL_MINUTES = 30.0
"""How long a batch may take without anybody minding."""


class Workers(Frozen):
    """How many workers a step has: as many of `max` as have shards to do, and `min` are kept for the next step."""

    min: PositiveInt = 1
    max: PositiveInt = 2

    @model_validator(mode="after")
    def _in_order(self) -> "Workers":
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; min must not be above max")
        return self


class Resources(Frozen):
    """What each of a step's workers gets, and how many there are. Only a cluster obeys it; this process is one worker.

    `gpus` may be a share of one, or whole GPUs of one node.
    """

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    workers: Workers = Workers()

    @field_validator("gpus")
    @classmethod
    def _whole_or_shared(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"{gpus:g} GPUs cannot be given: a share is at most 1, and more are whole ones")
        return gpus


@dataclass(frozen=True)
class External:
    """Something outside the run: a file, a folder or a model, pinned by the digest of its content.

    `shards` make it the main input of a map: of records that say where the rows are (parts of source files).
    """

    path: str
    digest: str
    shards: tuple[tuple[Record, ...], ...] = ()

    @property
    def rows(self) -> tuple[Record, ...]:
        """The records of all shards."""
        return tuple(row for shard in self.shards for row in shard)


class Rows(Protocol[R_co]):
    """Rows that may be gone through several times."""

    def __iter__(self) -> Iterator[R_co]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class KeptRows(Generic[R]):
    """The kept rows of a step's output: read from its shards each time they are gone through, a few shards held."""

    artifact: "Artifact"
    record: type[R]

    def __iter__(self) -> Iterator[R]:
        shards = iter(self.artifact.committed())
        if isinstance(self.artifact.folder, Path):
            for shard in shards:
                yield from read_kept(shard.path, self.record, shard.sha256)
            return
        # In an object store each of them is a journey there and back.
        with ThreadPoolExecutor(SHARDS_AHEAD) as pool:
            coming = deque(pool.submit(self._rows, shard) for shard in islice(shards, SHARDS_AHEAD))
            while coming:
                rows = coming.popleft().result()
                coming.extend(pool.submit(self._rows, shard) for shard in islice(shards, 1))
                yield from rows

    def _rows(self, shard: Shard) -> list[R]:
        return list(read_kept(shard.path, self.record, shard.sha256))

    def __len__(self) -> int:
        kept = self.artifact.complete().ledger["kept"]
        assert isinstance(kept, int)
        return kept


@dataclass(frozen=True)
class Context:
    """What a running step sees: its inputs by role, and the run's seed. Travels to workers by pickle."""

    stage: str
    seed: int
    inputs: Mapping[str, "Artifact | External"]

    def rows(self, role: str, record: type[R]) -> KeptRows[R]:
        """The kept rows of an input, shard by shard, each in order of id."""
        return KeptRows(self._artifact(role), record)

    def path(self, role: str) -> Path:
        """The folder of a build's files on this machine, or the path of something outside."""
        source = self.inputs[role]
        return Path(source.path) if isinstance(source, External) else source.local_files()

    def manifest(self, role: str) -> "Manifest":
        """The manifest of an input made by a step."""
        return self._artifact(role).complete()

    def identity(self, role: str) -> str:
        """Identity of a step's output, or digest of something outside."""
        source = self.inputs[role]
        return source.digest if isinstance(source, External) else source.identity

    def seed_for(self, row_id: str) -> int:
        """The seed of one row in this step."""
        return seed_for(self.seed, row_id, self.stage)

    def _artifact(self, role: str) -> "Artifact":
        source = self.inputs[role]
        if isinstance(source, External):
            raise InternalError(f"{self.stage}: input {role!r} is not a step's output")
        return source


@dataclass(frozen=True)
class Stage(ABC):
    """A value: name, version, configuration. `version` changes when its code computes something else.

    `seeded` says whether the run's seed decides its output.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    seeded: ClassVar[bool] = False

    def settings(self) -> Settings:
        """What identity counts, beside the inputs. Gates are left out: they decide no bytes."""
        return {}

    def gates(self) -> Settings:
        """What the gate wants; two steps that want different things are two, whatever they share."""
        return {}

    def check(self, manifest: "Manifest") -> None:
        """The stage's quality gate: raise GateError where the output is not good enough to go on with."""
        return


@dataclass(frozen=True)
class Process:
    """An opened map: `run` takes a batch of rows; `tokens` says how many the model has processed so far."""

    run: Callable[[Sequence[Any]], Iterable[Outcome]]
    tokens: Callable[[], int] = lambda: 0


@dataclass(frozen=True)
class MapStage(Stage):
    """One row → rows or dropped rows, by shard. Its main input has the role `rows`.

    `batch_rows` rows are processed at a time: they crash together, and are then retried one by one. A stage that
    `splits` finds only as it reads how many units its records hold; it calls them `id/0`, `id/1` …
    """

    record: ClassVar[type[Record]]
    output: ClassVar[type[Record]]
    batch_rows: ClassVar[int] = 128
    splits: ClassVar[bool] = False

    @abstractmethod
    def open(self, context: Context) -> Process:
        """What processes a batch of rows. Called once a worker, so that models are loaded once."""

    def units(self, row: Any) -> int:
        """How many units a row is split into, or where the stage `splits`, how many records it stands for; each must
        come out as a row or as dropped."""
        return 1

    def size(self, row: Any) -> int:
        """Rows of like size share a batch."""
        return 0


@dataclass(frozen=True)
class WholeStage(Stage):
    """All rows → rows, by one writer, which streams them. Without inputs that are rows, it makes them."""

    record: ClassVar[type[Record]]
    output: ClassVar[type[Record]]
    shard_rows: int = field(default=512, kw_only=True)

    @abstractmethod
    def run(self, rows: Rows[Any], context: Context) -> Iterable[Outcome]:
        """Every input row comes out once, kept or dropped; new rows name theirs in `parents`."""

    def units(self, rows: Rows[Any], context: Context) -> int:
        """How many units must come out: one for each row of the inputs."""
        return len(rows)


@dataclass(frozen=True)
class Built:
    """What a build leaves: `content` names the files whose bytes are its result (never logs, times, paths).

    `ledger` accounts for the rows that it was meant to use, those that it could not use by reason. `stop` ends the
    rounds: the steps that come after this one are skipped.
    """

    content: tuple[str, ...]
    ledger: Ledger
    metrics: Mapping[str, JsonValue] = field(default_factory=dict)
    tokens: int = 0
    stop: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a build works, in one process or in several.

    What is written into `draft` becomes the artifact's files; of several processes each has its own, and that of rank
    0 counts. What is in `kept` outlives a build that ends early, until the artifact is complete: before anything is
    committed there, `lease` must have been checked.
    """

    draft: Path
    kept: Location
    identity: str
    lease: Lease


@dataclass(frozen=True)
class BuildStage(Stage):
    """Rows → files: training, evaluation. One build at a time, under a lease."""

    @property
    def processes(self) -> int | None:
        """How many processes build together, each with its RANK; None where the driver itself does."""
        return None

    @abstractmethod
    def build(self, context: Context, place: Place, log: Log) -> Built:
        """Write the files into `place.draft`. Of several processes that build, the files and result of rank 0 count."""


@dataclass(frozen=True)
class Step:
    """A stage in its place: `name` is `section.verb` or `section.verb@round`, `arm` is None for the main one.

    `inputs` decide its identity. `after` only orders it, and carries a stop or a failed gate to it, `resources` says
    what its workers get, and after `stall_minutes` without progress one of them ends.
    """

    name: str
    stage: Stage
    inputs: Mapping[str, "Step | External"]
    seed: int
    arm: str | None = None
    after: tuple["Step", ...] = ()
    resources: Resources = field(default_factory=Resources)
    stall_minutes: float = STALL_MINUTES

    @property
    def section(self) -> str:
        """The recipe's key, and what `--only` takes."""
        return self.name.split(".")[0]

    @property
    def round(self) -> int | None:
        """The number behind the @."""
        return int(self.name.split("@")[1]) if "@" in self.name else None

    @property
    def key(self) -> str:
        """Unique within a run: arm and name."""
        return self.name if self.arm is None else f"{self.arm}/{self.name}"

    @cached_property
    def identity(self) -> str:
        """See `core.identity.step_identity`."""
        settings = {
            key: value.model_dump(mode="json") if isinstance(value, Frozen) else value
            for key, value in self.stage.settings().items()
        }
        if isinstance(self.stage, WholeStage):
            settings["shard_rows"] = self.stage.shard_rows
        inputs = {r: s.digest if isinstance(s, External) else s.identity for r, s in self.inputs.items()}
        seed = self.seed if self.stage.seeded else None
        return step_identity(self.stage.name, self.stage.version, settings, seed, inputs)

    def parents(self) -> tuple["Step", ...]:
        """The steps that must be done first."""
        return (*(s for s in self.inputs.values() if isinstance(s, Step)), *self.after)
