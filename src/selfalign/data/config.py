"""Where seed pairs and corpus documents come from: the recipe's `prepare.seed` and `prepare.corpus`."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from selfalign.core.frozen import Frozen, RecipePath
from selfalign.data.formats import FormatName


class SourceConfig(Frozen):
    """Rows outside the run."""

    path: Annotated[str, RecipePath] = Field(
        min_length=1, description="a file, a folder, a glob, or a dataset on the Hub (org/name)"
    )
    revision: str | None = Field(None, description="a branch, tag or commit of a dataset on the Hub")
    format: FormatName | None = Field(None, description="told from the fields where it is not named")
    sample: PositiveInt | None = Field(None, description="this many rows, drawn at random; all where it is null")
    sample_seed: int | None = Field(None, description="the run's seed where it is null")


class SeedConfig(SourceConfig):
    """The seed pairs: the first turn of each conversation."""

    held_out: NonNegativeInt = Field(64, description="pairs that no training sees; calibration and evaluation do")


class CorpusConfig(SourceConfig):
    """The unlabelled documents, from single-turn conversations or plain text. No filter is on unless named."""

    min_chars: NonNegativeInt | None = None
    max_chars: PositiveInt | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "CorpusConfig":
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(
                f"min_chars {self.min_chars} is above max_chars {self.max_chars}, so nothing would be kept"
            )
        return self
