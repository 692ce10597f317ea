"""How pairs are rated and kept: the recipe's `curate` section."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from selfalign.core.frozen import Frozen, RecipePath


class RaterConfig(Frozen):
    """Who rates: the model of the round before (M0 in round 1), the base, or another model by folder or Hub name."""

    model: Annotated[str, RecipePath("previous", "base")] = "previous"
    revision: str | None = None
    chat_template: Annotated[str | None, RecipePath("plain", "chatml")] = Field(
        None, description="its own where it is null"
    )


class CurateConfig(Frozen):
    """Rating, its calibration on planted pairs, selection, and the gates of all three."""

    rater: RaterConfig = RaterConfig()
    prompt_file: Annotated[str | None, RecipePath] = Field(
        None, description="with {instruction} and {response}; what stands above a line --- is said once"
    )
    few_shot_file: Annotated[str | None, RecipePath] = Field(
        None, description="JSONL of instruction, response and the rater's reply"
    )
    reasoning_tokens: NonNegativeInt = Field(0, description="how much the rater may write before the score")
    readout: Literal["expected", "parsed"] = Field(
        "expected", description='the mean over "1".."5" in one prefill, or the score that it writes'
    )
    keep: Literal["rated", "all"] = Field("rated", description="all: no curation, to compare with")
    threshold: float = Field(4.0, ge=1, le=5)
    match_size: str | None = Field(None, description="keep as many as this arm keeps, drawn at random")
    max_off_scale: float = Field(0.5, ge=0, le=1, description="more probability off the scale: unrated")
    min_auc: float = Field(0.65, ge=0, le=1, description="gate: telling seed pairs from planted ones")
    min_rated: float = Field(0.95, ge=0, le=1, description="gate: share of pairs that got a rating")

    @model_validator(mode="after")
    def _room_to_write(self) -> "CurateConfig":
        if self.readout == "parsed" and self.reasoning_tokens == 0:
            raise ValueError("readout: parsed reads what the rater writes, so reasoning_tokens must be above 0")
        return self
