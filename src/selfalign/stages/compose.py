"""Write the training rows: prompts, system tags, seed mix and rating replay, so that training knows no prompt."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, PositiveInt

from selfalign.core.frozen import Frozen, RecipePath
from selfalign.core.identity import seed_for
from selfalign.core.records import (
    Dropped,
    Example,
    Message,
    Outcome,
    Pair,
    Rated,
    Record,
    SeedPair,
    SourcePart,
    quarantined,
    rejected,
)
from selfalign.core.stage import Context, External, Rows, Settings, WholeStage
from selfalign.stages.augment import AugmentConfig
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rubric import RatingPrompt
from selfalign.stages.prompting import chat, fill

if TYPE_CHECKING:
    from selfalign.data.readers import RawRow


class ReplayConfig(Frozen):
    """Rated pairs mixed into forward training, so that the model does not forget how to rate."""

    path: Annotated[str, RecipePath] = Field(description="JSONL of prompt, completion and the rater's reply")
    rows: PositiveInt | None = Field(None, description="how many of them, drawn by seed; all by default")


class ComposeConfig(Frozen):
    """What goes into forward training (arXiv 2308.06259, section 2.3)."""

    include_seed: bool = Field(True, description="train on the seed pairs too, not on the curated ones alone")
    seed_system: str | None = Field(None, description="system prompt of seed pairs: the paper's tag Sa")
    augmented_system: str | None = Field(None, description="system prompt of curated pairs: the paper's tag Sw")
    rating_replay: ReplayConfig | None = None


def _answer(text: str) -> tuple[Message, ...]:
    return (Message(role="assistant", content=text),)


@dataclass(frozen=True)
class ComposeBackward(WholeStage):
    """Seed pairs, turned round: the response is the prompt, the instruction is what is learnt."""

    name: ClassVar[str] = "backward.compose"
    record: ClassVar[type[Record]] = SeedPair
    output: ClassVar[type[Record]] = Example
    augment: AugmentConfig
    prompt: str = field(init=False)

    def __post_init__(self) -> None:
        # Read once, here: a file that changes while the run goes on must not slip under an identity made before.
        object.__setattr__(self, "prompt", self.augment.prompt())

    def settings(self) -> Settings:
        return {"prompt": self.prompt}

    def run(self, rows: Rows[SeedPair], context: Context) -> Iterable[Outcome]:
        for row in rows:
            if row.split != "train":
                yield rejected(row.id, row.split or "no_split")
                continue
            prompt = chat(fill(self.prompt, response=row.completion))
            yield Example(id=row.id, kind="seed", prompt=prompt, completion=_answer(row.prompt), parents=(row.id,))


@dataclass(frozen=True)
class ComposeForward(WholeStage):
    """Seed pairs, curated pairs (input `curated`) and rating replay (input `replay`) as training rows."""

    name: ClassVar[str] = "forward.compose"
    version: ClassVar[int] = 2
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = SeedPair
    output: ClassVar[type[Record]] = Example
    config: ComposeConfig
    curate: CurateConfig
    rating: RatingPrompt = field(init=False)

    def __post_init__(self) -> None:
        # Read once, here: a file that changes while the run goes on must not slip under an identity made before.
        object.__setattr__(self, "rating", RatingPrompt.of(self.curate))

    def settings(self) -> Settings:
        config = self.config.model_dump(mode="json", include=set(ComposeConfig.model_fields) - {"rating_replay"})
        replay = self.config.rating_replay
        if replay is not None:
            config |= {"replay_rows": replay.rows, **self.rating.settings()}
        return config

    def units(self, rows: Rows[SeedPair], context: Context) -> int:
        curated = len(self._curated(context))
        return len(rows) + curated + sum(file.rows for file in self._replay_files(context))

    def run(self, rows: Rows[SeedPair], context: Context) -> Iterable[Outcome]:
        # In an order of their own, whatever they come from: the trainer's shuffle starts from it.
        yield from sorted(self._outcomes(rows, context), key=lambda outcome: outcome.id)

    def _outcomes(self, rows: Rows[SeedPair], context: Context) -> Iterator[Example | Dropped]:
        for row in rows:
            reason = row.split if row.split != "train" else None if self.config.include_seed else "seed_left_out"
            yield rejected(row.id, reason) if reason else _example(row, "seed", self.config.seed_system)
        for curated in self._curated(context):
            yield _example(curated, "augmented", self.config.augmented_system)
        yield from self._replay(context)

    def _curated(self, context: Context) -> Rows[Rated]:
        return context.rows("curated", Rated) if "curated" in context.inputs else ()

    def _replay_files(self, context: Context) -> list[SourcePart]:
        source = context.inputs.get("replay")
        rows = source.rows if isinstance(source, External) else ()
        return [row for row in rows if isinstance(row, SourcePart)]

    def _replay(self, context: Context) -> Iterator[Example | Dropped]:
        from selfalign.data.readers import RawRow, read_rows

        replay = self.config.rating_replay
        found = [row for file in self._replay_files(context) for row in read_rows(file)]
        usable = (row.id for row in found if isinstance(row, RawRow) and _texts(row) is not None)
        drawn = sorted(usable, key=lambda id: seed_for(context.seed, id, "replay"))
        kept = set(drawn[: replay.rows if replay else None])
        for row in found:
            id = f"replay/{row.id}"
            if isinstance(row, Dropped):
                yield quarantined(id, row.reason, row.detail or "", row.units)
                continue
            texts = _texts(row)
            if texts is None:
                yield quarantined(id, "wrong_type", f"{row.where}: prompt, completion and reply must be texts")
            elif row.id not in kept:
                yield rejected(id, "not_sampled")
            else:
                question, answer, reply = texts
                messages = self.rating.messages(question, answer)
                yield Example(id=id, kind="rating", prompt=messages, completion=_answer(reply), parents=(row.id,))


def _texts(row: "RawRow") -> list[str] | None:
    texts = [row.values.get(key) for key in ("prompt", "completion", "reply")]
    known = [text for text in texts if isinstance(text, str)]
    return known if len(known) == len(texts) else None


def _example(row: Pair, kind: str, system: str | None) -> Example:
    prompt, completion = chat(row.prompt, system), _answer(row.completion)
    # Seed pairs and documents may come from files of one name.
    parents = (row.id, *row.parents)
    return Example(id=f"{kind}/{row.id}", kind=kind, prompt=prompt, completion=completion, parents=parents)
