"""Where seed pairs and corpus documents come from, and which are used: `prepare.seed` and `prepare.corpus`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from selfalign.core.frozen import Frozen, RecipePath
from selfalign.text.headers import HeaderKind
from selfalign.text.language import LANGUAGES, nearest_language

FormatName = Literal[
    "messages", "prompt_completion", "sharegpt", "lima", "guanaco", "oasst", "alpaca", "self_instruct", "document"
]


class SourceConfig(Frozen):
    """Rows outside the run. No filter is on unless it is named; each counts what it drops."""

    path: Annotated[str, RecipePath] = Field(
        min_length=1, description="a file, a folder, a glob, or a dataset on the Hub (org/name)"
    )
    revision: str | None = Field(None, description="a branch, tag or commit of a dataset on the Hub")
    format: FormatName | None = Field(None, description="told from the fields where it is not named")
    languages: tuple[str, ...] | None = Field(
        None, min_length=1, description="keep these (ISO 639-1): by the source's label, by the text where there is none"
    )
    decontaminate: tuple[Annotated[str, RecipePath], ...] = Field(
        (), description="evaluation sets: what shares 13 words in a row with one is dropped"
    )
    max_tokens: PositiveInt | None = Field(
        None, description="of the model's tokenizer: a document's, or a pair's prompt and completion together"
    )
    drop_duplicates: bool = Field(False, description="drop what equals an earlier row but for case and spacing")
    sample: PositiveInt | None = Field(None, description="this many rows, drawn at random; all where it is null")
    sample_seed: int | None = Field(None, description="the run's seed where it is null")

    @field_validator("languages")
    @classmethod
    def _known(cls, languages: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for code in languages or ():
            if code not in LANGUAGES:
                raise ValueError(f"{code!r} is no ISO 639-1 code of a language we can tell; {nearest_language(code)}")
        return languages


class SeedConfig(SourceConfig):
    """The seed pairs. A label that a row does not have passes its filter, and is counted as `unlabelled`."""

    turns: Literal["first", "all"] = Field("first", description="all: every question of a conversation with its answer")
    max_rank: NonNegativeInt | None = Field(None, description="0 keeps the best answer to each prompt")
    min_quality: float | None = Field(None, ge=0, le=1)
    min_words: PositiveInt | None = Field(None, description="of the prompt, and of the completion")
    top: PositiveInt | None = Field(None, description="keep so many: the highest quality, then the best rank, first")
    held_out: NonNegativeInt = Field(64, description="pairs that no training sees; calibration and evaluation do")


class CorpusConfig(SourceConfig):
    """The unlabelled documents: responses of single-turn conversations, plain text, or segments of HTML pages."""

    min_chars: NonNegativeInt | None = None
    max_chars: PositiveInt | None = None
    drop_headers: tuple[HeaderKind, ...] = Field((), description="segments under headers of these kinds")
    max_repetition: float | None = Field(None, ge=0, le=1, description="of its word 5-grams, the share said before")
    hook: Annotated[str | None, RecipePath] = Field(
        None, description="a Python file with `clean(text) -> str | None`: personal data, say; None drops the document"
    )
    length_quantiles: tuple[float, float] | None = Field(
        None, description="keep lengths between these quantiles of what the filters before left"
    )
    near_duplicates: float | None = Field(
        None, gt=0, le=1, description="drop what has this Jaccard similarity (word 5-grams) to an earlier document"
    )
    drop_nested: bool = Field(False, description="drop a segment inside one that passed the filters too")

    @model_validator(mode="after")
    def _ordered(self) -> "CorpusConfig":
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(
                f"min_chars {self.min_chars} is above max_chars {self.max_chars}, so nothing would be kept"
            )
        if self.length_quantiles is not None:
            low, high = self.length_quantiles
            if not 0 <= low < high <= 1:
                raise ValueError(f"length_quantiles {low} and {high} must go up, from 0 to 1")
        return self
