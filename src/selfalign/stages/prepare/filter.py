"""Filter seed pairs and documents by what each is on its own. No filter is on unless the recipe names it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from selfalign.core.errors import UsageError
from selfalign.core.records import Document, Dropped, Noted, Outcome, Record, SeedPair, SourcePart, rejected
from selfalign.core.stage import Context, External, MapStage, Process, Settings
from selfalign.data.config import CorpusConfig, SeedConfig, SourceConfig
from selfalign.engines.config import ModelConfig
from selfalign.stages.prepare.hook import hooked, open_hook, read_hook
from selfalign.text.headers import header_kinds
from selfalign.text.overlap import words

if TYPE_CHECKING:
    from selfalign.text.contamination import Contamination

# Role of an evaluation set among a filter's inputs.
EVALUATION = "evaluation"
# A filter's label that a row does not have lets it pass, and is counted under this note.
UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class FilterSeed(MapStage):
    """Labels, lengths, languages and contamination of seed pairs, and their tokens where these are limited: then
    `model`, whose tokenizer counts them, is an input too."""

    name: ClassVar[str] = "prepare.filter_seed"
    record: ClassVar[type[Record]] = SeedPair
    output: ClassVar[type[Record]] = SeedPair
    config: SeedConfig
    model: ModelConfig

    def settings(self) -> Settings:
        keys = {"languages", "max_rank", "min_quality", "min_words"}
        return {**self.config.model_dump(include=keys), **_limit(self.config)}

    def open(self, context: Context) -> Process:
        contamination = _contamination(context)
        limited = _limited(self.config, self.model)
        return Process(lambda rows: limited(self._outcome(row, contamination) for row in rows))

    def _outcome(self, row: SeedPair, contamination: "Contamination | None") -> Outcome:
        config = self.config
        if config.max_rank is not None and row.rank is not None and row.rank > config.max_rank:
            return rejected(row.id, "rank", row)
        if config.min_quality is not None and row.quality is not None and row.quality < config.min_quality:
            return rejected(row.id, "quality", row)
        if config.min_words is not None:
            for text in (row.prompt, row.completion):
                if len(words(text)) < config.min_words:
                    return rejected(row.id, "too_short", row)
        language = _language(config, _text(row), row.language)
        if language == "other":
            return rejected(row.id, "language", row)
        if contamination and (found := contamination.find(row.prompt) or contamination.find(row.completion)):
            return rejected(row.id, "contaminated", row, detail=str(found))
        missing = (
            (config.max_rank is not None and row.rank is None)
            or (config.min_quality is not None and row.quality is None)
            or language == "unknown"
        )
        return Noted(row=row, note=UNLABELLED) if missing else row


@dataclass(frozen=True)
class FilterCorpus(MapStage):
    """Lengths, headers, repetition, languages and contamination of documents, the recipe's hook, and tokens, in this
    order. Where tokens are limited, `model`, whose tokenizer counts them, is an input too."""

    name: ClassVar[str] = "prepare.filter_corpus"
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document
    config: CorpusConfig
    model: ModelConfig
    hook: str | None = field(init=False)

    def __post_init__(self) -> None:
        # Read once, here: a file that changes while the run goes on must not slip under an identity made before.
        path = self.config.hook
        object.__setattr__(self, "hook", None if path is None else read_hook(path))

    def settings(self) -> Settings:
        keys = {"min_chars", "max_chars", "drop_headers", "max_repetition", "languages"}
        return {**self.config.model_dump(include=keys), "hook": self.hook, **_limit(self.config)}

    def open(self, context: Context) -> Process:
        contamination = _contamination(context)
        clean = None if self.hook is None else open_hook(self.hook, str(self.config.hook))

        def run(rows: Sequence[Document]) -> Iterator[Outcome]:
            for row in rows:
                if reason := self._reason(row):
                    yield rejected(row.id, reason, row)
                elif (language := _language(self.config, row.text, None)) == "other":
                    yield rejected(row.id, "language", row)
                elif contamination and (found := contamination.find(row.text)):
                    yield rejected(row.id, "contaminated", row, detail=str(found))
                else:
                    outcome = hooked(row, clean) if clean else row
                    if language == "unknown" and isinstance(outcome, Record):
                        outcome = Noted(row=outcome, note=UNLABELLED)
                    yield outcome

        limited = _limited(self.config, self.model)
        return Process(lambda rows: limited(run(rows)))

    def _reason(self, row: Document) -> str | None:
        config = self.config
        if config.min_chars is not None and len(row.text) < config.min_chars:
            return "too_short"
        if config.max_chars is not None and len(row.text) > config.max_chars:
            return "too_long"
        if config.drop_headers and row.header is not None:
            kinds = header_kinds(row.header)
            if named := [kind for kind in config.drop_headers if kind in kinds]:
                return f"header_{named[0]}"
        if config.max_repetition is not None:
            from selfalign.text.repetition import repetition

            if repetition(row.text) > config.max_repetition:
                return "repetitive"
        return None


def _limit(config: SourceConfig) -> Settings:
    """What identity counts of `max_tokens`: nothing where it is not set, beside no model among the inputs."""
    return {} if config.max_tokens is None else {"max_tokens": config.max_tokens}


def _limited(config: SourceConfig, model: ModelConfig) -> Callable[[Iterable[Outcome]], list[Outcome]]:
    """What drops the kept rows of a batch's outcomes that have more than `max_tokens` tokens."""
    limit = config.max_tokens
    if limit is None:
        return list
    from selfalign.engines.chat import Chat
    from selfalign.engines.loading import load_tokenizer

    encode = Chat(load_tokenizer(model)).encode

    def limited(found: Iterable[Outcome]) -> list[Outcome]:
        outcomes = list(found)
        rows = [outcome.row if isinstance(outcome, Noted) else outcome for outcome in outcomes]
        kept = [(at, row) for at, row in enumerate(rows) if not isinstance(row, Dropped)]
        for (at, row), ids in zip(kept, encode([_text(row) for _, row in kept]), strict=True):
            if len(ids) > limit:
                outcomes[at] = rejected(row.id, "too_many_tokens", row, f"{len(ids)} tokens")
        return outcomes

    return limited


def _text(row: Record) -> str:
    """All of a row's text: a pair is one training row."""
    if isinstance(row, SeedPair):
        return f"{row.prompt}\n{row.completion}"
    assert isinstance(row, Document)
    return row.text


def _language(config: SourceConfig, text: str, label: str | None) -> str | None:
    """`wanted`, `other` or `unknown`; None where any is wanted."""
    from selfalign.text.language import LANGUAGES, language, primary

    if config.languages is None:
        return None
    labelled = primary(label) if label else None
    # A label that is no code tells nothing.
    found = labelled if labelled in LANGUAGES else language(text)
    return "unknown" if found is None else "wanted" if found in config.languages else "other"


def _contamination(context: Context) -> "Contamination | None":
    """The texts of the evaluation sets among the inputs; None where there is no such set."""
    from selfalign.text.contamination import Contamination

    sources = (source for role, source in context.inputs.items() if role.startswith(EVALUATION))
    sets = [list(_texts(source)) for source in sources if isinstance(source, External)]
    return Contamination(text for texts in sets for text in texts) if sets else None


def _texts(source: External) -> Iterator[tuple[str, str]]:
    """Every text of an evaluation set, with its row's id. Raises UsageError for a set that could not do its duty."""
    from selfalign.data.readers import read_rows
    from selfalign.text.contamination import SHORTEST

    longest = 0
    for part in source.rows:
        assert isinstance(part, SourcePart)
        for row in read_rows(part):
            if isinstance(row, Dropped):
                raise UsageError(f"decontaminate: {source.path} has a row that cannot be read: {row.detail}")
            for text in _strings(row.values):
                longest = max(longest, len(words(text)))
                yield row.id, text
    if longest < SHORTEST:
        raise UsageError(
            f"decontaminate: {source.path} has no text of {SHORTEST} words or more, so it would drop nothing; name "
            "the file that holds the questions"
        )


def _strings(value: object) -> Iterator[str]:
    """Every text in a row: whatever an evaluation set calls its fields, none of it may be trained on."""
    if isinstance(value, str):
        yield value
    # A map of a Parquet file is a list of pairs.
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _strings(child)
