"""The sections of a report: what a run's facts look like, chart by chart, and in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfalign.report import charts
from selfalign.report.charts import Estimate, Level, Ridge, Words
from selfalign.report.facts import (
    Facts,
    Lengths,
    count,
    counts,
    drops,
    manifest_of,
)
from selfalign.report.run import StepView
from selfalign.report.status import measurements_by_epoch

SOURCES = 12


@dataclass(frozen=True)
class Table:
    """The numbers behind a chart, or a table of its own. `words` are the columns that hold no numbers.

    `shades` colour cells, by row and column: from -1 (orange) over 0 or None (none) to 1 (blue).
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    shades: Sequence[Sequence[float | None]] = ()


@dataclass(frozen=True)
class Figure:
    """A chart with its caption and its numbers, and small charts `beside` it. Without a chart, the table is seen at
    once."""

    title: str
    svg: str
    caption: str
    table: Table | None = None
    beside: Sequence[str] = ()
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A heading with what belongs under it; `missing` says what does not exist, and why."""

    id: str
    title: str
    lead: str = ""
    figures: Sequence[Figure] = ()
    missing: Sequence[str] = ()
    table: Table | None = None


def data(facts: Facts) -> Section:
    """From documents to training rows."""
    levels = facts.levels()
    section = Section(
        "data",
        "From documents to training rows",
        f"The main arm{f', round {facts.round}' if facts.rounds('curate.select') else ''}. "
        "Blue is what is left at each stage, pale what was dropped there.",
    )
    steps = [
        "prepare.read_seed",
        "prepare.filter_seed",
        "prepare.pick_seed",
        "prepare.read_corpus",
        "prepare.filter_corpus",
        "prepare.pick_corpus",
        "augment.generate",
        "augment.filter",
        "augment.deduplicate",
        *(f"{name}@{facts.round}" for name in ("curate.rate", "curate.select", "forward.compose", "forward.train")),
    ]
    rows = [
        [name, f"{count(step, 'in'):,}", f"{count(step, 'kept'):,}", reasons(step)]
        for name in steps
        if (step := facts.finished(name))
    ]
    # Older runs have no filters of their own, and a recipe that keeps all rates nothing.
    optional = ("prepare.filter_seed", "prepare.filter_corpus", f"curate.rate@{facts.round}")
    missing = [why for name in steps if name not in optional and (why := why_missing(facts, name))]
    if not levels:
        return replace(section, missing=missing)
    text = f"n = {levels[0].count:,} at the top, {levels[-1].count:,} at the end."
    title = "What is left at each stage"
    figure = Figure(title, charts.waterfall(levels, Words("flow", title, _spoken(levels))), text)
    table = Table(("step", "in", "kept", "dropped, by reason"), rows, (0, 3))
    return replace(section, figures=[figure], missing=missing, table=table)


def _spoken(levels: Sequence[Level]) -> str:
    return "; ".join(f"{level.label}: {level.count:,}" for level in levels)


def texts(facts: Facts) -> Section:
    """How long the texts are and where they come from."""
    section = Section("texts", "Lengths and sources", "Length is counted in characters; the line marks the median.")
    figures = [
        _length_figure(found, title, name)
        for column, title, name in (
            ("prompt", "Instructions", "lengths-instructions"),
            ("completion", "Responses", "lengths-responses"),
        )
        if (found := facts.lengths(column))[1]
    ]
    sources = facts.sources()
    missing = []
    if sources:
        figures.append(_source_figure(sources))
    else:
        missing.append(why_missing(facts, f"curate.select@{facts.round}") or "No pairs were selected.")
    return replace(section, figures=figures, missing=missing)


def _length_figure(found: tuple[Sequence[float], Sequence[Lengths]], title: str, name: str) -> Figure:
    edges, groups = found
    colours = {"Seed": charts.SECOND, "Candidates": charts.MUTED, "Curated": charts.FIRST}
    rows = [
        Ridge(
            f"{group.group}, n = {group.n:,}",
            f"median {group.median:,.0f}",
            group.counts,
            colours[group.group],
            group.median,
        )
        for group in groups
    ]
    steps = (1, 2, 5) if edges[-1] < 200 * edges[0] else (1, 3)
    ticks = [step * 10**n for n in range(8) for step in steps if edges[0] <= step * 10**n <= edges[-1]]
    if len(ticks) < 2:
        ticks = sorted({int(edges[0] + 0.5), int(edges[-1])})
    told = [f"{g.group}: 90% from {g.low:,.0f} to {g.high:,.0f}" for g in groups]
    caption = f"{'; '.join(told)}. The axis is logarithmic."
    table = Table(
        ("group", "n", "5%", "median", "95%"),
        [[g.group, f"{g.n:,}", f"{g.low:,.0f}", f"{g.median:,.0f}", f"{g.high:,.0f}"] for g in groups],
    )
    svg = charts.ridges(rows, edges, [(n, f"{n:,}") for n in ticks], Words(name, f"Length of {title.lower()}", caption))
    return Figure(title, svg, caption, table)


def _source_figure(sources: Sequence[tuple[str, int, int]]) -> Figure:
    shown, rest = sources[:SOURCES], sources[SOURCES:]
    before, after = sum(n for _, n, _ in sources), sum(n for _, _, n in sources)
    caption = f"Candidates (pale) and what curation kept of them (blue): {after:,} of n = {before:,}"
    caption += f", from {len(sources):,} {'source' if len(sources) == 1 else 'sources'}"
    caption += f"; shown are the {SOURCES} largest." if rest else "."
    title = "Sources before and after curation"
    svg = charts.before_and_after(shown, Words("sources", title, caption))
    others = [(f"{len(rest):,} others", sum(n for _, n, _ in rest), sum(n for _, _, n in rest))] if rest else []
    rows = [[name, f"{had:,}", f"{has:,}", f"{has / had:.1%}"] for name, had, has in (*shown, *others)]
    return Figure(title, svg, caption, Table(("source", "candidates", "curated", "kept"), rows))


def results(facts: Facts) -> Section:
    """What was measured."""
    section = Section(
        "results",
        "Results by model and arm",
        "With 95% intervals. Filled dots are the main arm's, hollow ones the other arms'; the grey dot and the upright "
        "strokes are the base.",
    )
    rows = facts.measured()
    figures = [
        *_match_figure([(r.model, r.main, r.metrics) for r in rows], "Questions answered right", "accuracy"),
        *_held_out_figure([(r.model, r.main, r.metrics) for r in rows], "Held-out loss", "held-out"),
    ]
    backward = [
        (model, True, manifest_of(step).metrics)
        for model, name in (("base", "evaluate.base_backward"), ("backward", "evaluate.backward"))
        if (step := facts.finished(name))
    ]
    figures += _match_figure(backward, "Backward model: the instruction guessed exactly", "backward-accuracy")
    figures += _held_out_figure(backward, "Backward model: held-out loss", "backward-held-out")
    if by_epoch := [*_epoch_figures(facts)]:
        figures += by_epoch
        told = f"{section.lead} By epoch, the filled dot is the last, with which all that followed went on."
        section = replace(section, lead=told)
    missing = []
    if not rows:
        missing.append(why_missing(facts, "evaluate.base") or "No forward model was measured.")
    elif not any(row.metrics.get("exact_match") for row in rows):
        missing.append("The recipe names no questions (evaluate.forward_questions), so there is no accuracy.")
    return replace(section, figures=figures, missing=missing)


Rows = Sequence[tuple[str, bool, Mapping[str, Any]]]


def _epoch_figures(facts: Facts) -> Iterator[Figure]:
    """Of each model whose training kept those of its epochs: what was measured of each, the last one filled."""
    for number, (model, epochs) in enumerate(measurements_by_epoch(facts.run)):
        title = f"{'Backward model' if model == 'backward' else model} by epoch"
        rows = [(e if e == "last" else f"epoch {e}", e == "last", measured) for e, measured in epochs.items()]
        yield from _match_figure(rows, f"{title}: answered right", f"epochs-accuracy-{number}", "epoch")
        yield from _held_out_figure(rows, f"{title}: held-out loss", f"epochs-held-out-{number}", "epoch")


def _match_figure(rows: Rows, title: str, name: str, by: str = "model") -> Iterator[Figure]:
    found = [(model, main, m["exact_match"], m) for model, main, m in rows if m.get("exact_match")]
    if not found:
        return
    estimates = [
        Estimate(model, _percent(match), match["share"], ends_of(match["ci"]), _colour(model), main)
        for model, main, match, _ in found
    ]
    base = next((match["share"] for model, _, match, _ in found if model == "base"), None)
    sizes = _sizes(match["n"] for _, _, match, _ in found)
    caption = f"Highest: {_best(max(estimates, key=_middle))}. {sizes} questions."
    words = Words(name, title, caption)
    if by == "epoch":
        svg = charts.by_epoch(estimates, words, percent=True)
    else:
        svg = charts.intervals(estimates, words, (0.0, 1.0), True, base)
    cells = [
        [
            model,
            f"{match['n']:,}",
            f"{match['share']:.1%}",
            percents(match["ci"], ""),
            _difference(m, "exact_match", 100, 1),
        ]
        for model, _, match, m in found
    ]
    yield Figure(title, svg, caption, Table((by, "n", "right", "95%", "− base, points (95%)"), cells))


def _held_out_figure(rows: Rows, title: str, name: str, by: str = "model") -> Iterator[Figure]:
    found = [(model, main, m["held_out"], m) for model, main, m in rows if m["held_out"]["nats_per_token"] is not None]
    if not found:
        return
    estimates = [
        Estimate(model, _nats(loss), loss["nats_per_token"], ends_of(loss["ci"]), _colour(model), main)
        for model, main, loss, _ in found
    ]
    base = next((loss["nats_per_token"] for model, _, loss, _ in found if model == "base"), None)
    sizes = _sizes(loss["n"] for _, _, loss, _ in found)
    caption = f"Nats a token; lower is better. Lowest: {_best(min(estimates, key=_middle))}. {sizes} held-out pairs."
    words = Words(name, title, caption)
    svg = charts.by_epoch(estimates, words) if by == "epoch" else charts.intervals(estimates, words, reference=base)
    cells = [
        [
            model,
            f"{loss['n']:,}",
            f"{loss['nats_per_token']:.3f}",
            from_to(ends_of(loss["ci"])),
            _difference(m, "held_out", 1, 3),
        ]
        for model, _, loss, m in found
    ]
    yield Figure(title, svg, caption, Table((by, "n", "loss", "95%", "− base (95%)"), cells))


def _colour(model: str) -> str:
    return charts.MUTED if model == "base" or model.endswith(" base") else charts.FIRST


def _middle(estimate: Estimate) -> float:
    return estimate.middle


def _best(estimate: Estimate) -> str:
    return f"{estimate.label}, {estimate.value}"


def _percent(match: Mapping[str, Any]) -> str:
    ends = ends_of(match["ci"])
    return f"{match['share']:.1%}" + (f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if ends else "")


def _nats(loss: Mapping[str, Any]) -> str:
    ends = ends_of(loss["ci"])
    return f"{loss['nats_per_token']:.3f}" + (f" ({from_to(ends)})" if ends else "")


def _sizes(sizes: Iterator[int]) -> str:
    found = sorted(set(sizes))
    return f"n = {found[0]:,}" if len(found) == 1 else f"n = {found[0]:,} to {found[-1]:,}"


def _difference(metrics: Mapping[str, Any], name: str, scale: float, digits: int) -> str:
    gap = (metrics.get("against_base") or {}).get(name)
    return gap_text(gap, scale, digits, "") if gap else ""


# Words


def why_missing(facts: Facts, name: str) -> str:
    """Why a step shows nothing; empty where it has a result."""
    if facts.finished(name):
        return ""
    step = facts.run.step(name)
    if step is None:
        return f"This run has no step {name}."
    return f"{name} is {step.state}{f': {step.message}' if step.message else ''}."


def reasons(step: StepView) -> str:
    """What a step dropped, by reason, and what it noted of rows that it kept."""
    told = [f"{n:,} {reason}" for reason, n in drops(step)]
    told += [f"noted: {n:,} {what}" for what, n in counts(step, "noted").items()]
    return ", ".join(told)


def ends_of(ends: object) -> tuple[float, float] | None:
    """An interval as metrics hold it, or None where there is none."""
    return (float(ends[0]), float(ends[1])) if isinstance(ends, list | tuple) else None


def from_to(ends: tuple[float, float] | None) -> str:
    """An interval in words; empty where there is none."""
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ""


def spread(ends: object) -> str:
    """An interval in brackets; empty where there is none."""
    pair = ends_of(ends)
    return f" (95%: {from_to(pair)})" if pair else ""


def percents(ends: object, lead: str = "95%: ") -> str:
    """An interval of a share; empty where there is none."""
    pair = ends_of(ends)
    return f"{lead}{pair[0]:.1%} to {pair[1]:.1%}" if pair else ""


def gap_text(gap: Mapping[str, Any], scale: float, digits: int, unit: str) -> str:
    """A difference with its interval."""
    told = [f"{scale * value:+.{digits}f}" for value in (gap["difference"], *(gap["ci"] or ()))]
    ends = f" (95%: {told[1]} to {told[2]})" if len(told) > 1 else ""
    return f"{told[0]}{unit}{ends}".replace("-", "−")
