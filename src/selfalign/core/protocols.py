"""The protocols: what every engine and every backend implements, and what passes through them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field

from selfalign.core.frozen import Frozen
from selfalign.core.lease import Lease
from selfalign.core.locations import Location
from selfalign.core.records import Message
from selfalign.core.shards import ShardReport
from selfalign.core.stage import STALL_MINUTES, BuildStage, Built, Context, Log, MapStage, Resources, ShardSource
from selfalign.core.store import Artifact

# Private-use characters around a word, as no text holds them.
STOP = "\ue002end of turn\ue003"
"""What a continuation to be scored may end in: here the assistant's turn ends, and its stop token counts too."""


@dataclass(frozen=True, slots=True)
class Request:
    """What one row asks of a model.

    A last message of role `assistant` is an opening that the model continues, not a finished turn. `seed` keys
    the row's own sampling noise, so that batching and sharding change nothing.
    """

    id: str
    messages: tuple[Message, ...]
    seed: int = 0


class Sampling(Frozen):
    """How the next token is chosen. Defaults are the paper's (arXiv 2308.06259, section 3.1)."""

    temperature: float = Field(0.7, ge=0, description="0 is greedy")
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 is off")
    max_new_tokens: int = Field(512, gt=0)
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model wrote, without the stop string. `too_long`: the prompt left no room, and `text` is empty."""

    text: str
    tokens: int
    finish: Literal["stop", "length", "too_long"]


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability (nats, summed over `tokens` tokens) of one continuation given its request."""

    log_prob: float
    tokens: int


class Generator(Protocol):
    """Writes replies."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, adapter: Path | None = None) -> list[Reply]:
        """One reply a request, in order."""
        ...


class Scorer(Protocol):
    """Scores given continuations without writing any."""

    def score(
        self, requests: Sequence[Request], continuations: Sequence[Sequence[str]], adapter: Path | None = None
    ) -> list[list[Score] | None]:
        """For each request, one Score for each of its continuations; None where the prompt left no room.

        A continuation is the text right after the request's last message. The tokens of request and
        continuation are those of the joint text, so that no token boundary is forced between the two; those that
        reach beyond the text of the request, in any of its continuations, count as the continuation.

        A continuation that ends in `STOP` is followed by what the chat template ends an assistant turn with, up to
        its stop token: log p(stop | x, y) = score(y + STOP) - score(y).
        """
        ...


class Engine(Generator, Scorer, Protocol):
    """A loaded base model that can do both. `tokens` counts all tokens processed since it was opened."""

    tokens: int

    def close(self) -> None:
        """Free the model's memory. The engine cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class MapJob:
    """A map step to be done: input shard i makes output shard i, for every i in `todo`.

    `driver` is a file of the run folder that the driver has just written: who does not see it sees another folder.
    """

    stage: MapStage
    context: Context
    artifact: Artifact
    sources: tuple[ShardSource, ...]
    todo: tuple[int, ...]
    resources: Resources
    stall_minutes: float = STALL_MINUTES
    driver: Location | None = None


@dataclass(frozen=True)
class BuildJob:
    """A build step to be done under `lease`: `core.builds.run_build` does it. Travels by pickle."""

    stage: BuildStage
    context: Context
    artifact: Artifact
    lease: Lease
    resources: Resources
    driver: Location | None = None


@dataclass(frozen=True)
class Committed:
    """A build that is done, and its files with their SHA-256, which lie where they belong."""

    built: Built
    files: Mapping[str, str]


class Backend(Protocol):
    """Runs steps somewhere: shards through `core.shards.run_shard`, builds through `core.builds.run_build`."""

    def map(self, job: MapJob, done: Callable[[ShardReport], None]) -> None:
        """Run the shards of `job.todo`, calling `done` in this process after each."""
        ...

    def build(self, job: BuildJob, log: Log) -> Committed:
        """Run a build and commit its files; `log` receives its measurements, at the latest when it ends."""
        ...

    def close(self) -> None:
        """Give back what the backend holds."""
        ...
