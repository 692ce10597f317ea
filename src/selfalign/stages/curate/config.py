"""How pairs are rated and kept: the recipe's `curate` section."""

from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from selfalign.core.frozen import Frozen, RecipePath
from selfalign.stages.curate.rubric import RatingConfig
from selfalign.stages.curate.signals import SIGNALS

WEIGHED = tuple(name for name in SIGNALS if name not in ("entropy", "off_scale"))
"""What a calibrated rater weighs unless told. The other two add noise to the fit where pairs are few."""

Plant = Literal["swapped", "truncated", "echo", "boilerplate", "language"]


class AgreementConfig(Frozen):
    """A second way of rating, held against the first on a sample."""

    sample: PositiveInt = Field(100, description="pairs that are rated both ways")
    against: RatingConfig = Field(description="how they are rated the second time: all that differs from the defaults")
    threshold: float = Field(4.0, ge=1, le=5, description="of the second rating")

    @model_validator(mode="after")
    def _second_is_a_rubric(self) -> "AgreementConfig":
        if self.against.rater.kind != "rubric":
            raise ValueError("against.rater.kind: a calibrated rater needs a fit of its own; compare with a rubric")
        return self


class CurateConfig(RatingConfig):
    """Rating, its calibration on planted pairs, selection, and the gates of all three."""

    signals: tuple[str, ...] = Field(WEIGHED, min_length=1, description="what a calibrated rater weighs")
    plants: tuple[Plant, ...] = Field(
        ("swapped", "truncated", "echo", "boilerplate", "language"),
        min_length=1,
        description="how held-out seed pairs are spoilt to test the rater; language: where the seed has several",
    )
    labels: Annotated[str | None, RecipePath] = Field(
        None, description="JSONL of people's verdicts that join the planted pairs: good or rating, of an id or a pair"
    )
    keep: Literal["rated", "all"] = Field("rated", description="all: no curation, to compare with")
    threshold: float = Field(4.0, ge=0, le=5, description="of the rating, or of a calibrated rater's probability")
    target_precision: float | None = Field(
        None, gt=0, lt=1, description="instead: the lowest threshold that has it on planted pairs, good and bad as many"
    )
    quantile: float | None = Field(None, gt=0, lt=1, description="of documents' best pairs, keep those from it on")
    max_per_source: PositiveInt | None = None
    max_per_cluster: PositiveInt | None = Field(None, description="of pairs that are near-duplicates of each other")
    cluster_similarity: float = Field(0.7, gt=0, le=1, description="Jaccard, of word 5-grams")
    match_size: str | None = Field(None, description="keep as many as this arm keeps, drawn at random")
    min_pairs: PositiveInt = Field(
        20, description="gate: good pairs, held out or labelled, to fit a calibrated rater on"
    )
    min_auc: float = Field(0.65, ge=0, le=1, description="gate: telling seed pairs from planted ones")
    min_rated: float = Field(0.95, ge=0, le=1, description="gate: share of pairs that got a rating")
    injections: NonNegativeInt = Field(
        0, description="texts that tell the rater what to say, measured beside harmless ones; 0: none"
    )
    agreement: AgreementConfig | None = None

    @field_validator("signals")
    @classmethod
    def _known(cls, signals: tuple[str, ...]) -> tuple[str, ...]:
        for name in signals:
            if name not in SIGNALS:
                close = get_close_matches(name, SIGNALS, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(SIGNALS)}"
                raise ValueError(f"{name!r} is no signal; {hint}")
        return signals

    @field_validator("plants")
    @classmethod
    def _once(cls, plants: tuple[Plant, ...]) -> tuple[Plant, ...]:
        if twice := [kind for n, kind in enumerate(plants) if kind in plants[:n]]:
            raise ValueError(f"{twice[0]!r} stands twice; name each kind once")
        return plants

    @model_validator(mode="after")
    def _signals_are_read(self) -> "CurateConfig":
        unread = sorted({"entropy", "off_scale"}.intersection(self.signals))
        if self.readout == "parsed" and self.rater.kind == "calibrated" and unread:
            raise ValueError(
                f"signals: {unread[0]} is no part of readout=parsed; leave it out, or set readout=expected"
            )
        return self

    @model_validator(mode="after")
    def _threshold_fits(self) -> "CurateConfig":
        calibrated = self.rater.kind == "calibrated"
        if self.keep == "all" or self.target_precision is not None:
            return self
        if calibrated and "threshold" not in self.model_fields_set:
            raise ValueError(
                "threshold is not set, and its default, 4, is a rating: rater.kind=calibrated gives probabilities, so "
                "set it between 0 and 1 (0.5 keeps what is more like a seed pair than like a spoilt one), or set "
                "target_precision"
            )
        if calibrated and self.threshold > 1:
            raise ValueError(
                f"threshold {self.threshold:g} is no probability, which rater.kind=calibrated gives: set it between "
                "0 and 1 (0.5 keeps what is more like a seed pair than like a spoilt one), or set target_precision"
            )
        if not calibrated and self.threshold < 1:
            raise ValueError(f"threshold {self.threshold:g} is below 1, the lowest rating; set it between 1 and 5")
        return self
