"""Test the rater before trusting it: can it tell held-out seed pairs from ones that were spoilt on purpose?"""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import JsonValue

from selfalign.core.errors import GateError
from selfalign.core.ledger import Ledger
from selfalign.core.records import Pair, SeedPair
from selfalign.core.stage import BuildStage, Built, Context, Log, Place, Settings
from selfalign.core.store import Manifest
from selfalign.engines.config import ModelConfig
from selfalign.evaluation.metrics import auc, auc_interval
from selfalign.stages.curate.config import CurateConfig
from selfalign.stages.curate.rate import RatingPrompt, rate, rating_settings, why_unrated
from selfalign.stages.models import open_model


@dataclass(frozen=True)
class Planted:
    """A pair of known quality: `kind` is `seed`, or the way in which it was spoilt."""

    id: str
    kind: str
    prompt: str
    completion: str


def plant(pairs: Sequence[Pair], chance: random.Random) -> list[Planted]:
    """Each pair as it is, with another pair's response (`swapped`), and with its response cut short (`truncated`).

    A response of one word cannot be cut and is left out.
    """
    planted = [Planted(pair.id, "seed", pair.prompt, pair.completion) for pair in pairs]
    for n, pair in enumerate(pairs):
        rest = (*pairs[n + 1 :], *pairs[:n])
        # Another answer to the same question is no spoilt one.
        others = [p for p in rest if p.completion != pair.completion and p.prompt != pair.prompt]
        if others:
            planted.append(Planted(f"{pair.id}/swapped", "swapped", pair.prompt, chance.choice(others).completion))
        if cut := truncated(pair.completion, chance):
            planted.append(Planted(f"{pair.id}/truncated", "truncated", pair.prompt, cut))
    return planted


def truncated(text: str, chance: random.Random) -> str:
    """The first 30 to 70 per cent of a text, ended after a word; where none ends there, the one nearest the middle.

    Empty where it has a single word.
    """
    text = text.strip()
    ends = [word.end() for word in re.finditer(r"\S+", text)][:-1]
    inside = [end for end in ends if 0.3 * len(text) <= end <= 0.7 * len(text)]
    if inside:
        return text[: chance.choice(inside)]
    return text[: min(ends, key=lambda end: abs(end - len(text) / 2))] if ends else ""


@dataclass(frozen=True)
class Calibrate(BuildStage):
    """Rate planted pairs; the gate is the area under the curve, and the share that got a rating."""

    name: ClassVar[str] = "curate.calibrate"
    seeded: ClassVar[bool] = True
    config: CurateConfig
    model: ModelConfig
    prompt: RatingPrompt = field(init=False)

    def __post_init__(self) -> None:
        # Read once, here: a file that changes while the run goes on must not slip under an identity made before.
        object.__setattr__(self, "prompt", RatingPrompt.of(self.config))

    def settings(self) -> Settings:
        return {**rating_settings(self.config, self.model, self.prompt), "max_off_scale": self.config.max_off_scale}

    def gates(self) -> Settings:
        return {"min_auc": self.config.min_auc, "min_rated": self.config.min_rated}

    def build(self, context: Context, place: Place, log: Log) -> Built:
        held_out = [pair for pair in context.rows("seed", SeedPair) if pair.split == "held_out"]
        planted = plant(held_out, random.Random(context.seed_for("planted")))
        engine, adapter = open_model(self.model, context)
        tokens = engine.tokens
        verdicts = rate(engine, adapter, [(p.id, p.prompt, p.completion) for p in planted], self.config, self.prompt)
        ratings: dict[str, list[float]] = {"seed": []}
        unrated: Counter[str] = Counter()
        with (place.draft / "planted.jsonl").open("w") as file:
            for pair, verdict in zip(planted, verdicts, strict=True):
                reason = why_unrated(verdict["rating"], verdict["unrated"], verdict["off_scale"], self.config)
                if reason is None and verdict["rating"] is not None:
                    ratings.setdefault(pair.kind, []).append(verdict["rating"])
                elif reason is not None:
                    unrated[reason] += 1
                file.write(json.dumps({"id": pair.id, "kind": pair.kind, **verdict, "unrated": reason}) + "\n")
        metrics = _metrics(ratings, unrated, len(planted))
        (place.draft / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True))
        rated = sum(map(len, ratings.values()))
        ledger = Ledger(len(held_out), len(planted), rated, unrated)
        return Built(("planted.jsonl", "metrics.json"), ledger, metrics, engine.tokens - tokens)

    def check(self, manifest: Manifest) -> None:
        rated, area = manifest.metrics.get("rated"), manifest.metrics.get("auc")
        reasons = manifest.metrics.get("unrated")
        if not manifest.metrics.get("planted") and (self.config.min_rated or self.config.min_auc):
            raise GateError(
                "calibration: no seed pairs are held out to test the rater on; hold some out (prepare.seed.held_out)"
            )
        if not isinstance(rated, float) or rated < self.config.min_rated:
            raise GateError(
                f"calibration: the rater gave a usable rating to {_percent(rated)} of the planted pairs, and "
                f"curate.min_rated wants {_percent(self.config.min_rated)} ({_told(reasons)}); choose another "
                "curate.rater.model or prompt, or look at files/planted.jsonl of this step"
            )
        if not isinstance(area, float):
            if self.config.min_auc == 0:
                return
            raise GateError(
                "calibration: no planted pairs could be compared; hold out seed pairs (prepare.seed.held_out)"
            )
        if area < self.config.min_auc:
            raise GateError(
                f"calibration: the rater tells seed pairs from planted ones with an AUC of {area:.2f}, and "
                f"curate.min_auc wants {self.config.min_auc:.2f} (.5 is chance); choose another curate.rater.model, "
                "prompt or curate.reasoning_tokens"
            )


def _metrics(ratings: Mapping[str, list[float]], unrated: Mapping[str, int], total: int) -> dict[str, JsonValue]:
    good = ratings["seed"]
    kinds = {kind: values for kind, values in ratings.items() if kind != "seed"}
    bad = [value for values in kinds.values() for value in values]
    metrics: dict[str, JsonValue] = {
        "planted": total,
        "rated": 1 - sum(unrated.values()) / total if total else 0.0,
        "unrated": dict(unrated),
        "auc": None,
    }
    if good and bad:
        interval = auc_interval(good, bad)
        metrics |= {"auc": round(auc(good, bad), 4), "auc_ci": [round(interval.low, 4), round(interval.high, 4)]}
        metrics["auc_by_kind"] = {kind: round(auc(good, values), 4) for kind, values in sorted(kinds.items()) if values}
    return metrics


def _percent(share: object) -> str:
    return f"{share:.0%}" if isinstance(share, float) else "none"


def _told(reasons: object) -> str:
    known = reasons if isinstance(reasons, dict) else {}
    return ", ".join(f"{n} {reason}" for reason, n in sorted(known.items())) or "nothing was rated"
