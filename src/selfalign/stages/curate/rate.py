"""Rate candidates: the step only measures; what is kept is decided by `curate.select`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from pydantic import JsonValue

from selfalign.core.records import Candidate, Outcome, Pair, Rated, Record, Signal
from selfalign.core.stage import Context, MapStage, Process, Settings
from selfalign.engines.config import ModelConfig
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rubric import RatingConfig, RatingPrompt, rating_settings
from selfalign.stages.curate.signals import Readings, Unit, measured, refuse_unable
from selfalign.stages.models import open_model

RUBRIC = "rubric"


@dataclass(frozen=True)
class Rater:
    """Who rates by what, as all steps of curation take it: the settings, the model, and the prompts by their text.

    `instruct` is the prompt of the backward direction, which one of the signals asks by.
    """

    config: RatingConfig
    model: ModelConfig
    instruct: str
    prompt: RatingPrompt = field(init=False)

    def __post_init__(self) -> None:
        # Read once, here: a file that changes while the run goes on must not slip under an identity made before.
        object.__setattr__(self, "prompt", RatingPrompt.of(self.config))
        refuse_unable(self.model, self.signals)

    @property
    def signals(self) -> tuple[str, ...]:
        """What it measures: the rating alone, or all that a calibrated rater weighs, in an order of their own."""
        if isinstance(self.config, CurateConfig) and self.config.rater.kind == "calibrated":
            return tuple(sorted({*self.config.signals}))
        return (RUBRIC,)

    def settings(self) -> dict[str, JsonValue]:
        """What decides its readings: thresholds and gates do not."""
        settings = rating_settings(self.config, self.model, self.prompt)
        if self.config.rater.kind == "calibrated":
            settings |= {"signals": [*self.signals], "instruct": self.instruct}
        return settings

    def open(self, context: Context) -> "OpenRater":
        """Loaded, for the inputs `model` and `adapter`."""
        return OpenRater(self, context)


class OpenRater:
    """A rater with its model. `tokens` counts those processed since it was opened."""

    def __init__(self, rater: Rater, context: Context) -> None:
        self._rater = rater
        self._engine, self._adapter = open_model(rater.model, context)
        self._before = self._engine.tokens

    def __call__(self, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        """The rating columns of each pair (see `records.Rated`): the verdict, and the signals."""
        rater = self._rater
        units = [Unit(pair.id, pair.prompt, pair.completion) for pair in pairs]
        readings = Readings(units, self._engine, self._adapter, rater.config, rater.prompt, rater.instruct)
        found = measured(readings, rater.signals)
        signals = [
            tuple(Signal(name=name, value=values[n]) for name, values in found.items()) for n in range(len(units))
        ]
        if RUBRIC not in found:
            return [{"signals": each} for each in signals]
        return [{**verdict, "signals": each} for verdict, each in zip(readings.verdicts, signals, strict=True)]

    @property
    def tokens(self) -> int:
        """Since it was opened."""
        return self._engine.tokens - self._before


def signals_of(row: Rated) -> dict[str, float | None]:
    """A rated row's signals by name."""
    return {signal["name"]: signal["value"] for signal in row.signals}


@dataclass(frozen=True)
class Rate(MapStage):
    """Candidate → the same with what the rater says of it."""

    name: ClassVar[str] = "curate.rate"
    version: ClassVar[int] = 2
    record: ClassVar[type[Record]] = Candidate
    output: ClassVar[type[Record]] = Rated
    rater: Rater

    @property
    def model(self) -> ModelConfig:
        """Whose tokenizer is tried before anything runs."""
        return self.rater.model

    def settings(self) -> Settings:
        return self.rater.settings()

    def size(self, row: Candidate) -> int:
        # Candidates of one document stand together, so that its response is read once for all of them.
        return len(row.completion)

    def open(self, context: Context) -> Process:
        rater = self.rater.open(context)

        def run(rows: Sequence[Candidate]) -> Iterable[Outcome]:
            for row, verdict in zip(rows, rater(rows), strict=True):
                yield Rated(**{f.name: getattr(row, f.name) for f in fields(row)}, **verdict)

        return Process(run, lambda: rater.tokens)
