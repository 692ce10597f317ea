"""Self-augmentation: the backward model writes instructions for documents; useless ones are filtered."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, PositiveInt

from selfalign.core.errors import GateError
from selfalign.core.frozen import RecipePath
from selfalign.core.identity import digest
from selfalign.core.keys import Keys, key_of
from selfalign.core.protocols import Request, Sampling
from selfalign.core.records import Candidate, Document, Message, Outcome, Record, rejected
from selfalign.core.stage import Context, MapStage, Process, Rows, Settings, WholeStage
from selfalign.core.store import Manifest, dropped
from selfalign.engines.config import ModelConfig
from selfalign.stages.models import identity_of, open_model
from selfalign.stages.prompting import chat, fill, prompt_text
from selfalign.text.mismatch import is_mismatch
from selfalign.text.overlap import is_copy, is_echo, normalised
from selfalign.text.replies import is_preamble, is_refusal

FilterName = Literal["empty", "refusal", "preamble", "over_long", "echo", "copy", "language", "duplicate"]


class AugmentConfig(Sampling):
    """How instructions are sampled for corpus documents, and which are dropped."""

    candidates: PositiveInt = Field(1, description="instructions a document")
    prompt_file: Annotated[str | None, RecipePath] = Field(None, description="with the placeholder {response}")
    max_chars: PositiveInt = Field(2000, description="longer instructions are over_long")
    filters: tuple[FilterName, ...] = get_args(FilterName)

    def prompt(self) -> str:
        """The prompt of the backward direction, in training and in use."""
        return prompt_text(self.prompt_file, "instruct", ("response",))

    def sampling(self) -> Sampling:
        """The part that an engine takes."""
        return Sampling(**self.model_dump(include=set(Sampling.model_fields)))


@dataclass(frozen=True)
class Generate(MapStage):
    """Document → `candidates` pairs, each with an instruction of its own."""

    name: ClassVar[str] = "augment.generate"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Candidate
    config: AugmentConfig
    model: ModelConfig
    prompt: str = field(init=False)

    def __post_init__(self) -> None:
        # Read once, here: a file that changes while the run goes on must not slip under an identity made before.
        object.__setattr__(self, "prompt", self.config.prompt())

    def settings(self) -> Settings:
        return {
            "sampling": self.config.sampling(),
            "candidates": self.config.candidates,
            "prompt": self.prompt,
            "engine": dict(self.model.loading()),
        }

    def units(self, row: Document) -> int:
        return self.config.candidates

    def size(self, row: Document) -> int:
        return len(row.text)

    def open(self, context: Context) -> Process:
        engine, adapter = open_model(self.model, context)
        template, sampling = self.prompt, self.config.sampling()
        prompt_hash, model = digest(template)[:16], identity_of(context)

        def run(rows: Sequence[Document]) -> Iterable[Outcome]:
            units = [(row, f"{row.id}/{n}") for row in rows for n in range(self.config.candidates)]
            requests = [Request(id, self.messages(template, row), context.seed_for(id)) for row, id in units]
            replies = engine.generate(requests, sampling, adapter)
            for (row, id), reply in zip(units, replies, strict=True):
                candidate = Candidate(
                    id=id,
                    source=row.source,
                    license=row.license,
                    prompt=reply.text.strip(),
                    completion=row.text,
                    model=model,
                    prompt_hash=prompt_hash,
                    finish=reply.finish,
                    parents=(row.id,),
                )
                yield rejected(id, "too_long", candidate) if reply.finish == "too_long" else candidate

        return Process(run, lambda: engine.tokens)

    @staticmethod
    def messages(template: str, row: Document) -> tuple[Message, ...]:
        """What the backward model is asked about one document."""
        return chat(fill(template, response=row.text))


@dataclass(frozen=True)
class Filter(MapStage):
    """Drop instructions that cannot be good, each with its reason, for all that a pair tells by itself."""

    name: ClassVar[str] = "augment.filter"
    record: ClassVar[type[Record]] = Candidate
    output: ClassVar[type[Record]] = Candidate
    config: AugmentConfig
    prompt: str = field(init=False)

    def __post_init__(self) -> None:
        # Read once, here: a file that changes while the run goes on must not slip under an identity made before.
        object.__setattr__(self, "prompt", self.config.prompt())

    def settings(self) -> Settings:
        return {
            "filters": [name for name in sorted(self.config.filters) if name != "duplicate"],
            "max_chars": self.config.max_chars,
            "prompt": self.prompt,
        }

    def open(self, context: Context) -> Process:
        template = self.prompt

        def run(rows: Sequence[Candidate]) -> Iterable[Outcome]:
            for row in rows:
                reason = self._reason(row, template)
                yield rejected(row.id, reason, row) if reason else row

        return Process(run)

    def _reason(self, row: Candidate, template: str) -> str | None:
        # The first reason is the one that is told, so what says most comes first: a refusal may be over-long too, and
        # echo the prompt. An instruction that was cut off is over-long, however few characters were allowed.
        checks: dict[FilterName, Callable[[], bool]] = {
            "empty": lambda: not row.prompt,
            "refusal": lambda: is_refusal(row.prompt),
            "preamble": lambda: is_preamble(row.prompt),
            "over_long": lambda: row.finish == "length" or len(row.prompt) > self.config.max_chars,
            "echo": lambda: is_echo(row.prompt, template),
            "copy": lambda: is_copy(row.prompt, row.completion),
            "language": lambda: is_mismatch(row.prompt, row.completion),
        }
        return next((name for name, fails in checks.items() if name in self.config.filters and fails()), None)

    def check(self, manifest: Manifest) -> None:
        if not manifest.ledger["kept"]:
            raise GateError(f"augmentation: none of the generated instructions is usable; {dropped(manifest)}")


@dataclass(frozen=True)
class Deduplicate(WholeStage):
    """Of instructions that are equal but for case, spacing and final punctuation (by 64-bit hashes) the first stays."""

    name: ClassVar[str] = "augment.deduplicate"
    record: ClassVar[type[Record]] = Candidate
    output: ClassVar[type[Record]] = Candidate
    config: AugmentConfig

    def settings(self) -> Settings:
        return {"drops": "duplicate" in self.config.filters}

    def run(self, rows: Rows[Candidate], context: Context) -> Iterable[Outcome]:
        seen = Keys()
        for row in rows:
            same = "duplicate" in self.config.filters and not seen.add(key_of(normalised(row.prompt)))
            yield rejected(row.id, "duplicate", row) if same else row
