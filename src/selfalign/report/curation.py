"""The sections of a report on how pairs were judged: ratings, calibration, injection, agreement."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

from selfalign.report import charts
from selfalign.report.charts import Estimate, Ridge, Scale, Words
from selfalign.report.facts import RATINGS, Facts, Planted, Ratings, manifest_of
from selfalign.report.run import StepView
from selfalign.report.sections import Figure, Section, Table, ends_of, from_to, spread, why_missing
from selfalign.report.status import verdict_first
from selfalign.stages.curate.signals import SIGNALS

# Of the thresholds, so many are told in numbers, and of the pairs rated twice, so many are drawn.
THRESHOLDS, POINTS = 24, 1_000
NOTHING = "This recipe rates nothing: curate.keep is all."


def ratings(facts: Facts) -> Section:
    """How the rater's verdicts on the candidates are distributed."""
    lead = "What the rater gave the candidates, from 1 to 5"
    if facts.scale is not RATINGS:
        lead = (
            "How likely the calibrated rater finds it that a candidate is a good pair, where good and bad are as many"
        )
    section = Section("ratings", "Ratings", f"{lead}; from the threshold on a pair is kept.")
    if facts.setting("curate", "keep") == "all":
        return replace(section, missing=[NOTHING])
    figures = [_rating_figure(facts, found) for found in facts.ratings()]
    if figures:
        return replace(section, figures=figures)
    step = "rate" if facts.scale is RATINGS else "select"
    return replace(section, missing=[why_missing(facts, f"curate.{step}@{facts.round}") or "No pairs were rated."])


def _rating_figure(facts: Facts, found: Ratings) -> Figure:
    below, above = sum(found.below), sum(found.above)
    k, scale = found.step.name.rpartition("@")[2], facts.scale
    threshold = facts.threshold(int(k))
    unrated = ", ".join(f"{n:,} {reason}" for reason, n in found.unrated.items())
    caption = f"n = {found.n:,} rated; {f'without a usable rating: {unrated}' if unrated else 'none is unrated'}."
    if threshold is not None:
        caption = f"{above:,} at or above {threshold:.4g}, {below:,} below. {caption}"
    words = Words(f"ratings-{k}", f"Ratings, round {k}", caption)
    svg = charts.histogram(found.below, found.above, scale, threshold, words)
    whole = [a + b for a, b in zip(found.below, found.above, strict=True)]
    middles = [round((low + high) / 2, 4) for low, high in pairwise(scale.edges)]
    rows = [[f"{middle:g}", f"{n:,}"] for middle, n in zip(middles, whole, strict=True) if n]
    near = "tenth" if scale is RATINGS else "40th"
    return Figure(f"Round {k}", svg, caption, Table((f"{scale.name}, to the nearest {near}", "pairs"), rows))


# Calibration


def calibration(facts: Facts) -> Section:
    """Whether the rater can be trusted."""
    section = Section(
        "calibration",
        "Calibration: can the rater be trusted?",
        "Held-out seed pairs as they are, and the same spoilt on purpose. The area under the curve (AUC) is how often "
        "a good pair is rated above a spoilt one: 1 is perfect, .5 is chance.",
    )
    if facts.scale is not RATINGS:
        told = "Each pair's probability is from a fit that saw neither it nor what was made of the same seed pair."
        section = replace(section, lead=f"{section.lead} {told}")
    if facts.setting("curate", "keep") == "all":
        return replace(section, missing=[NOTHING])
    figures = [
        figure
        for k, step, planted in facts.calibrations()
        if any(kind.n for kind in planted)
        for figure in (
            *_areas(k, step, planted, facts.scale),
            *_thresholds(k, step, facts),
            *_weights(k, step, planted),
        )
    ]
    if figures:
        return replace(section, lead=f"{section.lead} {_gated(facts)}", figures=figures, table=_signals(facts))
    missing = why_missing(facts, f"curate.calibrate@{facts.round}") or "No planted pairs were rated."
    return replace(section, missing=[missing])


def _gated(facts: Facts) -> str:
    """What the gate wants, what each round reached, and what that is not."""
    areas = [(k, manifest_of(step).metrics.get("auc")) for k, step, _ in facts.calibrations()]
    told = ", ".join(f"{area:.3f} in round {k}" for k, area in areas if isinstance(area, float))
    least = facts.number("curate", "min_auc")
    wanted = "" if least is None else f", and curate.min_auc wants {least:g}"
    return f"Reached: {told or 'nothing'}{wanted}. These are planted pairs, not the generated ones."


def _signals(facts: Facts) -> Table | None:
    """What a calibrated rater's signals are, as their own documentation begins."""
    fits = [manifest_of(step).metrics.get("weights") for _, step, _ in facts.calibrations()]
    measured = {name for weights in fits if isinstance(weights, dict) for name in weights}
    known = [(name, SIGNALS[name].read.__doc__ or "") for name in sorted(measured) if name in SIGNALS]
    rows = [[name, text.split("\n")[0]] for name, text in known]
    return Table(("signal", "what it is (x instruction, y response)"), rows, (0, 1)) if rows else None


_Area = tuple[float, tuple[float, float] | None]
_KINDS = {
    "seed": "Seed pairs as they are",
    "swapped": "Another pair's response",
    "truncated": "Response cut short",
    "echo": "Instruction repeats the response",
    "boilerplate": "Boilerplate for a response",
    "language": "Response in another language",
}


def _called(kind: str, good: bool) -> str:
    if kind == "labelled":
        return f"Called {'good' if good else 'bad'} by people"
    return _KINDS.get(kind, kind)


def _areas(k: int, step: StepView, planted: Sequence[Planted], scale: Scale) -> Iterator[Figure]:
    """How far the verdict tells planted pairs apart, and how far each signal does."""
    metrics: Mapping[str, Any] = manifest_of(step).metrics
    areas = verdict_first(metrics.get("planted_auc"))
    if not areas and metrics.get("auc") is not None:
        # An older run measured the rating alone, and no intervals by kind.
        ci: dict[str, Any] = {"all": metrics.get("auc_ci"), "by_kind": {}}
        areas = {"rubric": {"all": metrics["auc"], "by_kind": metrics.get("auc_by_kind") or {}, "ci": ci}}
    good, bad = (sum(kind.n for kind in planted if kind.good is side) for side in (True, False))
    sizes = f"n = {good:,} good pairs against {bad:,} others"
    if "calibrated" in areas:
        yield _by_kind(k, dict(_cells(areas["calibrated"])), dict(_cells(areas.get("rubric", {}))), sizes)
    elif "rubric" in areas:
        yield _by_kind(k, dict(_cells(areas["rubric"])), {}, sizes)
    yield _planted(k, step, planted, scale)
    if len(areas) > 1:
        yield _by_signal(k, areas, sizes)


def _by_kind(k: int, verdict: Mapping[str, _Area], rubric: Mapping[str, _Area], sizes: str) -> Figure:
    """The verdict's areas, with the rubric's to hold them against where another one selects."""
    labels = {"all": "All of them", "swapped_truncated": "Swapped and truncated together"}
    estimates, rows = [], []
    for kind, (middle, ends) in verdict.items():
        value = f"{middle:.3f}" + (f" ({from_to(ends)})" if ends else "")
        mark = rubric[kind][0] if kind in rubric else None
        label = labels.get(kind) or _called(kind, good=False)
        estimates.append(Estimate(label, value, middle, ends, filled=kind in labels, mark=mark))
        held = ["" if mark is None else f"{mark:.3f}"] if rubric else []
        rows.append([kind.replace("_", ", "), f"{middle:.3f}", from_to(ends), *held])
    least = min(min(each.interval or (1.0,)) for each in estimates)
    least = min(least, *(each.middle for each in estimates), *(each.mark or 1.0 for each in estimates))
    caption = f"{estimates[0].value} in all, with 95% intervals; {sizes}."
    caption += " The upright strokes are the rubric's rating alone." if rubric else ""
    title = f"Round {k}: AUC of the verdict"
    svg = charts.intervals(estimates, Words(f"auc-{k}", title, caption), (0.5 if least >= 0.5 else 0.0, 1.0))
    columns = ("planted pairs", "AUC", "95%", *(["the rubric's"] if rubric else []))
    return Figure(title, svg, caption, Table(columns, rows))


def _cells(areas: Mapping[str, Any]) -> Iterator[tuple[str, _Area]]:
    """Areas by kind with their intervals, those of several kinds together first."""
    for key in ("all", "swapped_truncated"):
        if areas.get(key) is not None:
            yield key, (areas[key], ends_of(areas["ci"].get(key)))
    for kind, area in areas.get("by_kind", {}).items():
        yield kind, (area, ends_of(areas["ci"]["by_kind"].get(kind)))


def _by_signal(k: int, areas: Mapping[str, Any], sizes: str) -> Figure:
    by_name = {name: dict(_cells(each)) for name, each in areas.items()}
    kinds = dict.fromkeys(kind for found in by_name.values() for kind in found)
    rows, shades = [], []
    for name, found in by_name.items():
        cells = [found.get(kind) for kind in kinds]
        rows.append([name, *(_area(*cell) if cell else "" for cell in cells)])
        shades.append([None, *(2 * cell[0] - 1 if cell else None for cell in cells)])
    caption = (
        f"With 95% intervals; {sizes}. Blue is higher for good pairs, orange higher for spoilt ones, and a fit uses "
        "either; what is pale says nothing."
    )
    table = Table(("signal", *(kind.replace("_", ", ") for kind in kinds)), rows, shades=shades)
    return Figure(f"Round {k}: AUC by signal and kind", "", caption, table, wide=True)


def _area(middle: float, ends: tuple[float, float] | None) -> str:
    return f"{middle:.2f}" + (f" ({ends[0]:.2f}–{ends[1]:.2f})" if ends else "")


def _planted(k: int, step: StepView, planted: Sequence[Planted], scale: Scale) -> Figure:
    rows = [
        Ridge(
            _called(kind.kind, kind.good), f"n = {kind.n:,}", kind.counts, charts.FIRST if kind.good else charts.SECOND
        )
        for kind in planted
    ]
    unrated = manifest_of(step).metrics.get("unrated")
    told = ", ".join(f"{n} {reason}" for reason, n in unrated.items()) if isinstance(unrated, dict) else ""
    caption = f"n = {sum(kind.n for kind in planted):,} rated; {f'unrated: {told}' if told else 'none is unrated'}."
    ticks = [(float(tick), f"{tick:g}") for tick in scale.ticks]
    title = f"Round {k}: {'ratings' if scale is RATINGS else 'probabilities'} of planted pairs"
    middles = [(low + high) / 2 for low, high in pairwise(scale.edges)]
    cells = [[_called(kind.kind, kind.good), f"{kind.n:,}", *_quantiles(kind, middles)] for kind in planted]
    table = Table(("planted pairs", "n", "lowest", "median", "highest"), cells)
    return Figure(title, charts.ridges(rows, scale.edges, ticks, Words(f"planted-{k}", title, caption)), caption, table)


def _quantiles(kind: Planted, middles: Sequence[float]) -> list[str]:
    """Lowest, median and highest verdict, to the width of a bin."""
    values = [middle for middle, n in zip(middles, kind.counts, strict=True) for _ in range(n)]
    return [f"{value:.3g}" for value in (values[0], median(values), values[-1])] if values else ["", "", ""]


def _thresholds(k: int, step: StepView, facts: Facts) -> Iterator[Figure]:
    """What a verdict is worth: the share of good pairs at it, and from it on."""
    metrics: Mapping[str, Any] = manifest_of(step).metrics
    scale, threshold = facts.scale, facts.threshold(k)
    bins, curve = metrics.get("reliability") or [], metrics.get("thresholds") or []
    if bins:
        sizes = [f"{n:,}" for n in sorted({each["n"] for each in bins})]
        title = f"Round {k}: reliability"
        caption = (
            "The share of good pairs among those of like verdict, good and bad weighed as if they were as many; "
            f"n = {sum(each['n'] for each in bins):,}, {' or '.join(sizes)} in each of {len(bins)} bins."
        )
        if scale is not RATINGS:
            caption += " On the broken line, a probability is what it says."
        points = [(each["score"], each["good"]) for each in bins]
        svg = charts.reliability(points, scale, scale is not RATINGS, Words(f"reliability-{k}", title, caption))
        rows = [[f"{each['score']:.3f}", f"{each['n']:,}", f"{each['good']:.1%}"] for each in bins]
        yield Figure(title, svg, caption, Table((f"mean {scale.name}", "n", "good"), rows))
    if curve:
        title = f"Round {k}: precision and recall by threshold"
        at = next((point for point in curve if threshold is not None and point["threshold"] >= threshold), None)
        caption = (
            f"n = {sum(each['n'] for each in bins):,} planted pairs, good and bad weighed as if they were as many."
        )
        if threshold is not None:
            told = f"precision {at['precision']:.1%}, recall {at['recall']:.1%}" if at else "no planted pair is kept"
            caption = f"From {threshold:.4g} on: {told}. {caption}"
        svg = charts.by_threshold(
            [(name, [point[name] for point in curve]) for name in ("precision", "recall")],
            [point["threshold"] for point in curve],
            scale,
            threshold,
            Words(f"thresholds-{k}", title, caption),
        )
        every = max(len(curve) // THRESHOLDS, 1)
        shown = [p for n, p in enumerate(curve, 1) if not n % every or p is at or n in (1, len(curve))]
        rows = [
            [f"{point['threshold']:.3f}", *(f"{point[name]:.1%}" for name in ("precision", "recall", "kept"))]
            for point in shown
        ]
        yield Figure(title, svg, caption, Table(("threshold", "precision", "recall", "kept of all"), rows))


def _weights(k: int, step: StepView, planted: Sequence[Planted]) -> Iterator[Figure]:
    """What each signal counts for in the fit."""
    metrics: Mapping[str, Any] = manifest_of(step).metrics
    if not metrics.get("weights"):
        return
    found = {name: (weight, metrics["squares"][name]) for name, weight in metrics["weights"].items()}
    ordered = sorted(found.items(), key=lambda pair: -max(map(abs, pair[1])))
    most = max(abs(weight) for _, both in ordered for weight in both) or 1.0
    caption = (
        "Log-odds of a good pair by standard deviation of the signal's logarithm, and by its square: below zero, the "
        f"signal may be too high as well as too low. Fitted on n = {sum(kind.n for kind in planted):,} planted pairs. "
        "Signals that say the same share their weight."
    )
    rows = [[name, *(f"{weight:+.3f}".replace("-", "−") for weight in both)] for name, both in ordered]
    shades = [[None, *(weight / most for weight in both)] for _, both in ordered]
    table = Table(("signal", "weight", "of its square"), rows, shades=shades)
    yield Figure(f"Round {k}: weights of the fit", "", caption, table)


# Injection


def injection(facts: Facts) -> Iterator[Section]:
    """What documents that speak to the rater gain; no section where the recipe asks for none."""
    rounds = facts.rounds("curate.inject")
    if not rounds and not facts.number("curate", "injections"):
        return
    section = Section(
        "injection",
        "Injection: what a document gains by speaking to the rater",
        "Spoilt pairs whose response ends in a text that tells the rater what to say (the payload), and the same pairs "
        "with as many harmless words instead (the twin). A document is never parsed for a rating: verdicts come from "
        "the rater's own probabilities and reply, so a payload can only act on the model that reads it.",
    )
    figures = [figure for k, step in rounds for figure in _injection(k, manifest_of(step).metrics, facts)]
    missing = (
        [] if figures else [why_missing(facts, f"curate.inject@{facts.round}") or "No pair could be given a payload."]
    )
    yield replace(section, figures=figures, missing=missing)


_PAYLOADS = {"score": "A score", "command": "A command", "praise": "Praise", "role": "Another speaker's words"}


def _injection(k: int, metrics: Mapping[str, Any], facts: Facts) -> Iterator[Figure]:
    n, above = metrics["payloads"], metrics["above_threshold"]
    gaps = {"All payloads": metrics["by_signal"]["verdict"]}
    gaps |= {_PAYLOADS.get(kind, kind): gap for kind, gap in metrics["by_kind"].items()}
    known = {name: gap for name, gap in gaps.items() if gap}
    if not known:
        return
    caption = f"The {facts.scale.name} with a payload minus that with its twin, with 95% intervals over pairs; "
    # Older runs do not say behind how many.
    behind = f" behind {metrics['pairs']:,} pairs" if "pairs" in metrics else ""
    caption += f"n = {n:,} payloads{behind}."
    told = f"{above['payload']:,} of {n:,} payloads and {above['twin']:,} of {n:,} twins"
    caption = f"{told} are at or above {metrics['threshold']:.4g}. {caption}"
    title = f"Round {k}: what payloads add to the verdict"
    estimates = [
        Estimate(name, _gap(gap), gap["difference"], ends_of(gap["ci"]), filled=name == "All payloads")
        for name, gap in known.items()
    ]
    most = max(abs(end) for each in estimates for end in (*(each.interval or ()), each.middle)) * 1.06 or 1.0
    svg = charts.intervals(estimates, Words(f"injection-{k}", title, caption), (-most, most), reference=0.0)
    yield Figure(title, svg, caption, _gaps("payload", known))
    signals = {name: gap for name, gap in metrics["by_signal"].items() if gap and name != "verdict"}
    if len(signals) < 2:
        return
    rows = []
    for name, gap in signals.items():
        ends = ends_of(gap["ci"]) or (gap["difference"], gap["difference"])
        whole = max(abs(ends[0]), abs(ends[1])) or 1.0
        middle, scaled = gap["difference"] / whole, (ends[0] / whole, ends[1] / whole)
        rows.append(Estimate(name, _gap(gap), middle, scaled, filled=False))
    title = f"Round {k}: what payloads add to each signal"
    caption = (
        "The signal with a payload minus that with its twin, with 95% intervals, each row in its own unit; the upright "
        f"strokes are no difference. n = {min(gap['n'] for gap in signals.values()):,} payloads."
    )
    words = Words(f"injection-signals-{k}", title, caption)
    svg = charts.intervals(rows, words, (-1.06, 1.06), reference=0.0, numbered=False)
    yield Figure(title, svg, caption, _gaps("signal", signals))


def _gap(gap: Mapping[str, Any]) -> str:
    ends = ends_of(gap["ci"])
    told = f"{gap['difference']:+.3g}" + (f" ({ends[0]:.3g} to {ends[1]:.3g})" if ends else "")
    return told.replace("-", "−")


def _gaps(by: str, gaps: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [[name, f"{gap['n']:,}", _gap(gap), f"{gap['raised']:.1%}"] for name, gap in gaps.items()]
    return Table((by, "n", "difference (95%)", "raised"), rows)


# Agreement


def agreement(facts: Facts) -> Iterator[Section]:
    """How far a second way of rating agrees; no section where the recipe asks for none."""
    rounds = facts.rounds("curate.agree")
    if not rounds and not facts.setting("curate", "agreement"):
        return
    section = Section(
        "agreement",
        "Agreement: would another rater keep the same pairs?",
        f"A sample of the candidates, rated a second time. First: {_way(facts.setting('curate'))}. "
        f"Second: {_way(facts.setting('curate', 'agreement', 'against'))}.",
    )
    figures = [figure for k, step in rounds for figure in _agreement(k, step, facts.scale)]
    missing = [] if figures else [why_missing(facts, f"curate.agree@{facts.round}") or "No pair was rated twice."]
    yield replace(section, figures=figures, missing=missing)


def _way(found: Any) -> str:
    """A way of rating by its settings, in words."""
    config = found if isinstance(found, dict) else {}
    rater = config.get("rater") or {}
    told = [f"model: {rater.get('model', 'previous')}"]
    told += [f"{key}: {config[key]}" for key in ("readout", "reasoning_tokens") if config.get(key) is not None]
    return f"{rater.get('kind', 'rubric')} ({'; '.join(told)})"


def _agreement(k: int, step: StepView, scale: Scale) -> Iterator[Figure]:
    metrics: Mapping[str, Any] = manifest_of(step).metrics
    rows = step.lines("both.jsonl")
    both = [(row["first"], row["second"]) for row in rows if None not in (row["first"], row["second"])]
    keeps, cuts = metrics["confusion"], metrics["thresholds"]
    if both:
        rho, n = metrics["spearman"], len(both)
        order = "No rank correlation, since one side has one value throughout"
        if rho is not None:
            order = f"Spearman's rank correlation {rho:+.3f}{spread(metrics['spearman_ci'])}".replace("-", "−")
        middles = [f"{median(values):.3g}" for values in zip(*both, strict=True)]
        caption = f"{order}; n = {n:,} pairs with both verdicts. Medians: first {middles[0]}, second {middles[1]}."
        caption += f" Drawn are the first {POINTS:,}." if n > POINTS else ""
        title = f"Round {k}: both verdicts on each pair"
        svg = charts.scatter(
            both[:POINTS],
            (scale, RATINGS),
            (cuts["first"], cuts["second"]),
            (f"first ({scale.name})", "second (rating)"),
            Words(f"agreement-{k}", title, caption),
        )
        table = Table(
            ("verdict", "n", "lowest", "median", "highest", "threshold"),
            [
                [name, f"{n:,}", f"{min(values):.3g}", middle, f"{max(values):.3g}", f"{cuts[name]:.4g}"]
                for name, values, middle in zip(("first", "second"), zip(*both, strict=True), middles, strict=True)
            ],
        )
        yield Figure(title, svg, caption, table)
    total = sum(keeps.values())
    if not total:
        return
    unrated = ", ".join(f"{count} {reason.replace('_', ', ', 1)}" for reason, count in metrics["unrated"].items())
    alike = (keeps["both_keep"] + keeps["neither"]) / total
    caption = f"n = {total:,} pairs: {alike:.1%} are treated alike at the thresholds {cuts['first']:.4g} and "
    caption += f"{cuts['second']:.4g}; "
    caption += f"without a verdict, so not kept: {unrated}." if unrated else "all have both verdicts."
    cells = [
        ["first keeps", f"{keeps['both_keep']:,}", f"{keeps['first_keeps']:,}"],
        ["first drops", f"{keeps['second_keeps']:,}", f"{keeps['neither']:,}"],
    ]
    shades = [
        [None, keeps["both_keep"] / total, -keeps["first_keeps"] / total],
        [None, -keeps["second_keeps"] / total, keeps["neither"] / total],
    ]
    yield Figure(
        f"Round {k}: who keeps what", "", caption, Table(("", "second keeps", "second drops"), cells, shades=shades)
    )
