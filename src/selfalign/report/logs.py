"""What a training has logged so far, as curves by step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfalign.core.locations import Location
from selfalign.core.metrics import read_measurements

MEASURES = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes")
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class TrainingLog:
    """(step, value) of each of MEASURES that was logged. `resumed` are the steps at which the training went on from a
    checkpoint, `last_step` is where it ends."""

    curves: Mapping[str, Curve]
    resumed: Sequence[float]
    last_step: float

    def last(self, measure: str) -> float | None:
        """Its latest value."""
        curve = self.curves.get(measure)
        return curve[-1][1] if curve else None


def read_log(folder: Location) -> TrainingLog:
    """What a training has measured beside its artifact; without curves where there is nothing.

    A training that was resumed writes the steps behind its checkpoint again, one that began anew all of them: what a
    step was logged with last counts.
    """
    lines: list[Mapping[str, Any]] = []
    resumed: list[float] = []
    end = 0.0
    for line in read_measurements(folder):
        if "resumed_at" in line:
            at = line["resumed_at"]
            resumed = [*(step for step in resumed if step < at), at]
            lines = [line for line in lines if line["step"] <= at]
        elif "step" in line:
            at = line["step"]
            while lines and lines[-1]["step"] >= at:
                lines.pop()
            while resumed and resumed[-1] > at:
                resumed.pop()
            lines.append(line)
            end = max(end, at, line.get("max_steps", 0))
    curves = {measure: _curve(lines, measure) for measure in MEASURES}
    return TrainingLog({measure: curve for measure, curve in curves.items() if curve}, resumed, end)


def _curve(lines: Sequence[Mapping[str, Any]], measure: str) -> Curve:
    values = ((line["step"], line.get(measure)) for line in lines)
    return [(step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]
