"""How far two ways of rating agree, on a sample of the candidates."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import JsonValue

from selfalign.core.identity import seed_for
from selfalign.core.ledger import Ledger
from selfalign.core.records import Rated
from selfalign.core.stage import BuildStage, Built, Context, Log, Place, Settings
from selfalign.engines.config import ModelConfig
from selfalign.evaluation.metrics import spearman, spearman_interval
from selfalign.stages.curate.calibrate import Calibration
from selfalign.stages.curate.config import AgreementConfig, CurateConfig
from selfalign.stages.curate.rate import Rater, signals_of
from selfalign.stages.curate.verdict import verdict, verdict_of
from selfalign.stages.jsonl import write_document, write_lines


@dataclass(frozen=True)
class Agree(BuildStage):
    """Rate a sample of rated pairs once more, by `second`: rank correlation, and who keeps what at the thresholds."""

    name: ClassVar[str] = "curate.agree"
    seeded: ClassVar[bool] = True
    config: CurateConfig
    agreement: AgreementConfig
    second: Rater

    @property
    def model(self) -> ModelConfig:
        """Whose tokenizer is tried before anything runs."""
        return self.second.model

    def settings(self) -> Settings:
        own = {"kind": self.config.rater.kind, **self.config.model_dump(include={"threshold", "max_off_scale"})}
        other = {"max_off_scale": self.second.config.max_off_scale, "threshold": self.agreement.threshold}
        return {"first": own, "second": {**self.second.settings(), **other}, "sample": self.agreement.sample}

    def build(self, context: Context, place: Place, log: Log) -> Built:
        rows = context.rows("rows", Rated)
        calibration = Calibration.of(context.path("calibration"))
        ids = sorted((row.id for row in rows), key=lambda id: seed_for(context.seed, id, "agreement"))
        drawn = set(ids[: self.agreement.sample])
        sample = [row for row in rows if row.id in drawn]
        rater = self.second.open(context)
        unrated: Counter[str] = Counter()
        told: list[dict[str, Any]] = []
        for row, read in zip(sample, rater(sample), strict=True):
            rubric = (row.rating, row.unrated, row.off_scale)
            first, why_not = verdict(*rubric, signals_of(row), self.config, calibration.fit)
            second, why_no_second = verdict_of(read, self.second.config, None)
            for which, reason in (("first", why_not), ("second", why_no_second)):
                if reason is not None:
                    unrated[f"{which}_{reason}"] += 1
            told.append({"id": row.id, "first": first, "second": second, "reply": read["reply"]})
        write_lines(place.draft / "both.jsonl", told)
        metrics = self._metrics(told, unrated, calibration.cut(self.config))
        write_document(place.draft / "metrics.json", metrics)
        ledger = Ledger(len(told), len(told), len(told))
        return Built(("both.jsonl", "metrics.json"), ledger, metrics, rater.tokens)

    def _metrics(self, told: Sequence[dict[str, Any]], unrated: Counter[str], cut: float) -> dict[str, JsonValue]:
        """A pair without a verdict is kept by nobody, so it counts in the confusion, and in no correlation."""
        both = [(each["first"], each["second"]) for each in told if None not in (each["first"], each["second"])]
        keeps = Counter(
            (
                each["first"] is not None and each["first"] >= cut,
                each["second"] is not None and each["second"] >= self.agreement.threshold,
            )
            for each in told
        )
        rho = spearman([a for a, _ in both], [b for _, b in both]) if len(both) > 1 else None
        return {
            "sample": len(told),
            "both_rated": len(both),
            "unrated": dict(unrated),
            "spearman": None if rho is None else round(rho, 4),
            "spearman_ci": None if rho is None else spearman_interval(rho, len(both)).rounded(),
            "thresholds": {"first": cut, "second": self.agreement.threshold},
            "confusion": {
                "both_keep": keeps[True, True],
                "first_keeps": keeps[True, False],
                "second_keeps": keeps[False, True],
                "neither": keeps[False, False],
            },
        }
