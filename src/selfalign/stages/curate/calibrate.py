"""Test the rater before trusting it: can it tell held-out seed pairs from ones that were spoilt on purpose?"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import JsonValue

from selfalign.core.errors import GateError
from selfalign.core.ledger import Ledger
from selfalign.core.records import Planted
from selfalign.core.stage import BuildStage, Built, Context, Log, Place, Settings
from selfalign.core.store import Manifest
from selfalign.engines.config import ModelConfig
from selfalign.evaluation.metrics import auc, auc_interval
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.fit import Fit, by_threshold, cross_validated, fit, reaching, reliability
from selfalign.stages.curate.rate import Rater
from selfalign.stages.curate.verdict import verdict_of
from selfalign.stages.jsonl import write_document, write_lines

TOGETHER = ("swapped", "truncated")
"""The plants that no filter catches: their area under the curve is told for both together, too."""

FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """What selection takes from a calibration: a calibrated rater's fit, and the threshold of a target precision."""

    fit: Fit | None = None
    threshold: float | None = None

    def cut(self, config: CurateConfig) -> float:
        """The verdict from which on a pair is kept."""
        return config.threshold if self.threshold is None else self.threshold

    @staticmethod
    def of(folder: Path) -> "Calibration":
        """Read the files of a calibration."""
        document = json.loads((folder / FILE).read_bytes())
        return Calibration(document["fit"] and Fit.of_json(document["fit"]), document["threshold"])


@dataclass(frozen=True)
class Calibrate(BuildStage):
    """Rate planted pairs, fit the signals' worth on them, and measure both by cross-validation.

    The gates are the area under the curve of the verdict that will select, and the share of pairs that got one.
    """

    name: ClassVar[str] = "curate.calibrate"
    version: ClassVar[int] = 2
    seeded: ClassVar[bool] = True
    config: CurateConfig
    rater: Rater

    @property
    def model(self) -> ModelConfig:
        """Whose tokenizer is tried before anything runs."""
        return self.rater.model

    def settings(self) -> Settings:
        own: dict[str, JsonValue] = {"target_precision": self.config.target_precision}
        if self.config.rater.kind == "rubric":
            own["max_off_scale"] = self.config.max_off_scale
        return {**self.rater.settings(), **own}

    def gates(self) -> Settings:
        return {"min_auc": self.config.min_auc, "min_rated": self.config.min_rated}

    def build(self, context: Context, place: Place, log: Log) -> Built:
        planted = list(context.rows("rows", Planted))
        rater = self.rater.open(context)
        read = rater(planted)
        values = {name: [_value(each, name) for each in read] for name in self.rater.signals}
        fitted, own = self._fit(planted, values, context.seed_for("folds"))
        found = [verdict_of(each, self.config, fitted) for each in read]
        # What a pair gets from a fit that saw it would flatter: its own is from the folds that did not.
        scores = own if fitted else [score for score, _ in found]
        reasons = [reason for _, reason in found]
        unrated = Counter(reason for reason in reasons if reason is not None)
        metrics = self._metrics(planted, values, scores, unrated, fitted)
        document = {"fit": fitted.to_json() if fitted else None, "threshold": metrics["threshold"]}
        write_document(place.draft / FILE, document)
        write_document(place.draft / "metrics.json", metrics)
        told = [
            {
                **each,
                "signals": {signal["name"]: signal["value"] for signal in each["signals"]},
                **{"id": pair.id, "kind": pair.kind, "good": pair.good, "verdict": score, "unrated": reason},
            }
            for pair, each, score, reason in zip(planted, read, scores, reasons, strict=True)
        ]
        write_lines(place.draft / "planted.jsonl", told)
        ledger = Ledger(len(planted), len(planted), len(planted) - unrated.total(), unrated)
        return Built(("planted.jsonl", "metrics.json", FILE), ledger, metrics, rater.tokens)

    def _fit(
        self, planted: Sequence[Planted], values: Mapping[str, Sequence[float | None]], seed: int
    ) -> tuple[Fit | None, list[float | None]]:
        """The fit on all pairs that were measured whole, and each pair's probability by cross-validation."""
        own: list[float | None] = [None] * len(planted)
        names = self.rater.signals
        whole = [n for n in range(len(planted)) if all(values[name][n] is not None for name in names)]
        good = [planted[n].good for n in whole]
        if self.config.rater.kind == "rubric" or all(good) or not any(good):
            return None, own
        values_NS = np.array([[values[name][n] for name in names] for n in whole], dtype=np.float64)
        for n, p in zip(
            whole, cross_validated(names, values_NS, good, [planted[n].origin for n in whole], seed), strict=True
        ):
            own[n] = p
        return fit(names, values_NS, good), own

    def _metrics(
        self,
        planted: Sequence[Planted],
        values: Mapping[str, Sequence[float | None]],
        scores: Sequence[float | None],
        unrated: Counter[str],
        fitted: Fit | None,
    ) -> dict[str, JsonValue]:
        config = self.config
        good = [pair.good for pair in planted]
        rated = [n for n, score in enumerate(scores) if score is not None]
        known, truth = [scores[n] or 0.0 for n in rated], [good[n] for n in rated]
        curve = by_threshold(known, truth) if any(truth) and not all(truth) else []
        wanted = config.target_precision
        areas = {name: _areas(planted, each) for name, each in values.items()}
        whole = _areas(planted, scores)
        if config.rater.kind == "calibrated":
            areas = {"calibrated": whole, **areas}
        return {
            "planted": len(planted),
            "pairs": dict(sorted(Counter(pair.kind for pair in planted).items())),
            "rated": 1 - unrated.total() / len(planted) if planted else 0.0,
            "unrated": dict(unrated),
            "auc": whole["all"] if whole else None,
            "auc_ci": whole["ci"]["all"] if whole else None,
            "auc_by_kind": whole["by_kind"] if whole else None,
            "planted_auc": {name: each for name, each in areas.items() if each},
            "weights": dict(zip(fitted.signals, fitted.weights, strict=True)) if fitted else None,
            "squares": dict(zip(fitted.signals, fitted.squares, strict=True)) if fitted else None,
            "threshold": None if wanted is None else reaching(curve, wanted),
            "thresholds": [asdict(point) for point in curve],
            "reliability": [asdict(each) for each in reliability(known, truth)] if curve else [],
        }

    def check(self, manifest: Manifest) -> None:
        config = self.config
        metrics = manifest.metrics
        rated, area = metrics.get("rated"), metrics.get("auc")
        if not metrics.get("planted") and (config.min_rated or config.min_auc):
            raise GateError(
                "calibration: no seed pairs are held out to test the rater on; hold some out (prepare.seed.held_out)"
            )
        if not isinstance(rated, float) or rated < config.min_rated:
            raise GateError(
                f"calibration: the rater gave a usable rating to {_percent(rated)} of the planted pairs, and "
                f"curate.min_rated wants {_percent(config.min_rated)} ({_told(metrics.get('unrated'))}); choose "
                "another curate.rater.model or prompt, or look at files/planted.jsonl of this step"
            )
        if not isinstance(area, float) and config.min_auc:
            raise GateError(
                "calibration: no planted pairs could be compared; hold out seed pairs (prepare.seed.held_out)"
            )
        if isinstance(area, float) and area < config.min_auc:
            raise GateError(
                f"calibration: the rater tells seed pairs from planted ones with an AUC of {area:.2f}, and "
                f"curate.min_auc wants {config.min_auc:.2f} (.5 is chance; by kind: "
                f"{_told(metrics.get('auc_by_kind'))}); `selfalign report` draws how it rated them; choose "
                "another curate.rater.model, prompt or curate.reasoning_tokens, or curate.rater.kind=calibrated"
            )
        if config.target_precision is not None and metrics.get("threshold") is None:
            raise GateError(
                f"calibration: at no threshold are {config.target_precision:.0%} of the planted pairs that it keeps "
                "good ones (curate.target_precision, at as many good as bad ones); lower it"
            )


def _value(read: Mapping[str, Any], name: str) -> float | None:
    value = next(signal["value"] for signal in read["signals"] if signal["name"] == name)
    return None if value is None else float(value)


def _areas(planted: Sequence[Planted], scores: Sequence[float | None]) -> dict[str, Any] | None:
    """Areas under the curve of good pairs against bad ones: all, of each kind, and of those that no filter catches."""
    good, bad = list[float](), dict[str, list[float]]()
    for pair, score in zip(planted, scores, strict=True):
        if score is not None:
            (good if pair.good else bad.setdefault(pair.kind, [])).append(score)
    if not good or not bad:
        return None
    ci: dict[str, Any] = {"by_kind": {}}
    areas: dict[str, Any] = {"by_kind": {}, "ci": ci}
    for kind, values in sorted(bad.items()):
        areas["by_kind"][kind], ci["by_kind"][kind] = _area(good, values)
    areas["all"], ci["all"] = _area(good, [value for values in bad.values() for value in values])
    if together := [value for kind in TOGETHER for value in bad.get(kind, ())]:
        areas["swapped_truncated"], ci["swapped_truncated"] = _area(good, together)
    return areas


def _area(good: Sequence[float], bad: Sequence[float]) -> tuple[float, list[JsonValue] | None]:
    return round(auc(good, bad), 4), auc_interval(good, bad).rounded()


def _percent(share: object) -> str:
    return f"{share:.0%}" if isinstance(share, float) else "none"


def _told(counts: object) -> str:
    known = counts if isinstance(counts, dict) else {}
    return ", ".join(f"{n} {reason}" for reason, n in sorted(known.items())) or "nothing was rated"
