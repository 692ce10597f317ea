"""The section of a report on how the trainings went: what each logged by step, side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from selfalign.report import charts
from selfalign.report.charts import Words
from selfalign.report.facts import Facts, Training, count
from selfalign.report.logs import Curve
from selfalign.report.sections import Figure, Section, Table

# Of more logged values than this, the running mean is drawn.
DENSE = 150
GIB = 2.0**30


@dataclass(frozen=True)
class _Measure:
    """A column of a training's log. The axis of a `spread` one may be logarithmic, a `noisy` one is drawn with its
    running mean."""

    key: str
    name: str
    spread: bool = False
    noisy: bool = False


_MEASURES = (
    _Measure("loss", "loss", spread=True, noisy=True),
    _Measure("learning_rate", "learning rate"),
    _Measure("grad_norm", "gradient norm", spread=True, noisy=True),
    _Measure("tokens_per_second", "tokens/s", noisy=True),
    _Measure("memory_bytes", "memory"),
)


def training(facts: Facts) -> Section:
    """How the trainings went."""
    trainings = facts.trainings()
    forward = [t for t in trainings if t.step.name.startswith("forward")]
    backward = [t for t in trainings if t not in forward]
    figures = [
        _figure(found, group, n)
        for group in (backward, forward)
        for n, found in enumerate(group, len(backward) if group is forward else 0)
    ]
    names = [step.title for step in facts.run.steps if ".train" in step.name and step.state != "skipped"]
    have = {found.step.title for found in trainings}
    without = [name for name in names if name not in have]
    missing = [f"Nothing is logged yet of {', '.join(without)}."] if without else []
    if not names:
        missing.append("This run has no training.")
    lead = (
        "By step, as logged. Loss is in nats a token of the completions; memory is the most that was in use so far, on "
    )
    lead += "the device or, without one, by the process."
    lead += " The forward models share their axes." if len(forward) > 1 else ""
    lead += " Axes of loss and gradient norm are logarithmic where values span more than a factor of 20."
    return Section("training", "Training", lead, figures, missing)


def _figure(found: Training, group: Sequence[Training], number: int) -> Figure:
    step, log = found.step, found.log
    k = step.name.partition("@")[2]
    model = f"M{k}" if k else "Backward model"
    title = model if step.arm is None else f"{model}, {step.arm}"
    drawn = [measure for measure in _MEASURES if measure.key in log.curves]
    svgs = [_chart(found, measure, _bounds(group, measure), title, number) for measure in drawn]
    rows = [[_column(measure), *_figures(measure, log.curves[measure.key])] for measure in drawn]
    table = Table(("", "first", "last", "lowest", "median", "highest"), rows)
    return Figure(title, svgs[0], f"{'; '.join(_told(found))}.", table, svgs[1:], wide=True)


def _told(found: Training) -> list[str]:
    step, log = found.step, found.log
    losses = _values(log.curves["loss"])
    smooth = _smooth(losses, noisy=True)
    last, at, end = (smooth or losses)[-1], f"{log.curves['loss'][-1][0]:,.0f}", f"{log.last_step:,.0f}"
    went = f"Loss {losses[0]:.3g} → {last:.3g} in {at} steps" if at == end else f"Loss {last:.3g} at step {at} of {end}"
    told = [went + (f", n = {count(step, 'kept'):,} rows" if step.finished else "")]
    if speeds := _values(log.curves.get("tokens_per_second", ())):
        told.append(f"{median(speeds):,.0f} tokens/s (median)")
    if memory := _values(log.curves.get("memory_bytes", ())):
        told.append(f"at most {max(memory) / GIB:,.2f} GiB of memory")
    if log.resumed:
        told.append(f"resumed from a checkpoint at {_steps(found)}")
    if smooth:
        told.append(f"lines are the mean of {_window(losses)} values, single ones pale")
    return told


def _steps(found: Training) -> str:
    resumed = [f"{step:,.0f}" for step in found.log.resumed]
    return f"step{'s' if len(resumed) > 1 else ''} {' and '.join(resumed)}"


def _chart(found: Training, measure: _Measure, bounds: tuple[float, float], title: str, number: int) -> str:
    curve = found.log.curves[measure.key]
    unit, axis = _unit(measure.key, bounds[1])
    values = [value / unit for value in _values(curve)]
    drawn = charts.Curve(
        axis,
        [step for step, _ in curve],
        values,
        (bounds[0] / unit, bounds[1] / unit),
        _smooth(values, measure.noisy),
    )
    first, last, low, _, high = _figures(measure, curve)
    told = f"{_column(measure)}: {first} at step {curve[0][0]:,.0f}, {last} at step {curve[-1][0]:,.0f}"
    told += f"; lowest {low}, highest {high}"
    told += f"; resumed at {_steps(found)}" if found.log.resumed else ""
    words = Words(f"{measure.key.replace('_', '-')}-{number}", f"{measure.name.capitalize()} of {title}", f"{told}.")
    return charts.curve(drawn, found.log.last_step, found.log.resumed, words, wide=measure.key == "loss")


def _bounds(group: Sequence[Training], measure: _Measure) -> tuple[float, float]:
    """Of the axis that the trainings of a group share."""
    values = [value for training in group for value in _values(training.log.curves.get(measure.key, ()))]
    low, high = min(values), max(values)
    if measure.spread and charts.is_logarithmic((low, high)):
        return low * 0.8, high * 1.25
    return 0.0, high * 1.05 or 1.0


def _unit(key: str, high: float) -> tuple[float, str]:
    """What an axis up to `high` counts in, so that the numbers along it are short, and what it is called."""
    match key:
        case "loss":
            return 1.0, "loss (nats a token)"
        case "learning_rate":
            power = math.floor(math.log10(high))
            return 10.0**power, f"learning rate (1e{power})"
        case "tokens_per_second":
            return (1000.0, "1,000 tokens/s") if high >= 10_000 else (1.0, "tokens/s")
        case "memory_bytes":
            return (GIB, "memory (GiB)") if high >= GIB else (2.0**20, "memory (MiB)")
    return 1.0, "gradient norm"


def _column(measure: _Measure) -> str:
    return {"loss": "loss (nats a token)", "memory_bytes": "memory (GiB)"}.get(measure.key, measure.name)


def _figures(measure: _Measure, curve: Curve) -> list[str]:
    """First, last, lowest, median and highest value."""
    values = _values(curve)
    found = (values[0], values[-1], min(values), median(values), max(values))
    match measure.key:
        case "tokens_per_second":
            return [f"{value:,.0f}" for value in found]
        case "memory_bytes":
            return [f"{value / GIB:,.2f}" for value in found]
    return [f"{value:,.3g}" for value in found]


def _values(curve: Curve) -> list[float]:
    return [value for _, value in curve]


def _window(values: Sequence[float]) -> int:
    return max(len(values) // 40, 2)


def _smooth(values: Sequence[float], noisy: bool) -> list[float]:
    """The running mean over as many values before as there are behind: what a curve says without its noise. Empty where
    the curve says it itself."""
    if not noisy or len(values) <= DENSE:
        return []
    half = _window(values) // 2
    found = []
    for n in range(len(values)):
        near = min(half, n, len(values) - 1 - n)
        found.append(math.fsum(values[n - near : n + near + 1]) / (2 * near + 1))
    return found
