"""`selfalign report`: a run as one HTML file that needs nothing else, for a person to look at."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from selfalign.core.locations import Location, replace
from selfalign.report import curation, sections
from selfalign.report.facts import Facts, Measured, Sample, count, manifest_of, read_json
from selfalign.report.run import RunView
from selfalign.report.sections import gap_text, percents, reasons, spread, why_missing
from selfalign.report.trainings import training

if TYPE_CHECKING:
    from markupsafe import Markup

SAMPLES = 5
# A text is shown up to here, the rest on a click; beyond the second it is left to the run folder.
SHOWN, FOLDED = 480, 20_000
STATES = {"done": "✓", "running": "▸", "waiting": "○", "skipped": "–", "failed": "✗"}


def write_report(run: RunView, to: Location) -> Location:
    """Write the report of a run, complete or not, to the file `to`; returns it.

    The same run folder gives the same bytes. Raises StorageError where a part of the folder is damaged, or `to`
    cannot be written.
    """
    # A lone surrogate, which JSON can hold and UTF-8 cannot, is shown as a question mark.
    replace(to, render(run).encode("utf-8", "replace"))
    return to


def render(run: RunView) -> str:
    """The page."""
    import jinja2

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"folded": folded, "breakable": breakable, "shade": shade}
    facts = Facts(run)
    return environment.get_template("report.html.jinja").render(
        title=str(facts.recipe.get("name") or run.root.absolute().name),
        facts_line=facts_line(facts),
        summary=[*summary(facts)],
        alerts=[*alerts(run)],
        sections=[
            sections.data(facts),
            curation.ratings(facts),
            curation.calibration(facts),
            *curation.injection(facts),
            *curation.agreement(facts),
            sections.texts(facts),
            training(facts),
            sections.results(facts),
        ],
        samples=samples(facts),
        corpus=facts.setting("prepare", "corpus", "path"),
        steps=steps(run),
        totals=totals(run),
        recipe=yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True) if facts.recipe else None,
        provenance=provenance(run),
    )


# The head


def facts_line(facts: Facts) -> list[str]:
    """Seed, time and state, in words."""
    done = sum(step.state == "done" for step in facts.run.steps)
    total = sum(step.state != "skipped" for step in facts.run.steps)
    seed = facts.recipe.get("seed")
    base = facts.setting("model", "path")
    return [
        *([f"seed {seed}"] if seed is not None else []),
        *([f"model {'/'.join(Path(str(base)).parts[-2:])}"] if base else []),
        _when(facts.run),
        f"complete, {total} steps" if facts.run.complete else f"not complete: {done} of {total} steps are done",
    ]


def _when(run: RunView) -> str:
    """When the last step ended, by its manifest's file: nothing in it names a time."""
    manifests = [step.artifact.folder / "manifest.json" for step in run.steps if step.manifest is not None]
    newest = max((path.stat().st_mtime for path in manifests), default=None)
    if newest is None:
        return "no step has ended yet"
    return f"last step ended {datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M} UTC"


def summary(facts: Facts) -> Iterator[str]:
    """What came of it, and out of what, in two lines."""
    rows = facts.measured()
    base = next((row for row in rows if row.model == "base"), None)
    final = next((row for row in rows if row.model == f"M{facts.run.final_round}"), None)
    if final is None:
        yield "No forward model of the main arm has been measured yet."
    elif final.metrics.get("exact_match"):
        yield _match_line(final, base)
    else:
        yield _loss_line(final, base)
    yield _cost_line(facts)


def _match_line(final: Measured, base: Measured | None) -> str:
    match = final.metrics["exact_match"]
    line = f"{final.model} answers {match['share']:.1%} of {match['n']:,} questions right"
    gap = (final.metrics.get("against_base") or {}).get("exact_match")
    if base and gap and base.metrics.get("exact_match"):
        before = base.metrics["exact_match"]["share"]
        return f"{line}, the base {before:.1%}: {gap_text(gap, 100, 1, ' points')}."
    return f"{line} ({percents(match['ci'])})."


def _loss_line(final: Measured, base: Measured | None) -> str:
    loss = final.metrics["held_out"]
    if loss["nats_per_token"] is None:
        return f"{final.model} was trained; no seed pairs are held out and no questions named, so nothing measures it."
    line = f"{final.model} has a held-out loss of {loss['nats_per_token']:.3f} nats a token (n = {loss['n']:,})"
    gap = (final.metrics.get("against_base") or {}).get("held_out")
    if base and gap and base.metrics["held_out"]["nats_per_token"] is not None:
        before = base.metrics["held_out"]["nats_per_token"]
        return f"{line}, the base {before:.3f}: {gap_text(gap, 1, 3, '')}; lower is better."
    return f"{line}{spread(loss['ci'])}; lower is better."


def _cost_line(facts: Facts) -> str:
    read, select = facts.finished("prepare.pick_corpus"), facts.finished(f"curate.select@{facts.round}")
    composed = facts.finished(f"forward.compose@{facts.round}")
    parts = []
    if read:
        parts.append(f"{count(read, 'kept'):,} documents")
    if select:
        parts.append(f"{count(select, 'kept'):,} selected pairs")
    if composed:
        parts.append(f"{count(composed, 'kept'):,} training rows")
    made = f"{' → '.join(parts)}; " if parts else ""
    return f"{made}{totals(facts.run)}."


def totals(run: RunView) -> str:
    """Seconds and tokens of all artifacts, each counted once."""
    manifests = {step.artifact.name: manifest_of(step) for step in run.steps if step.manifest is not None}
    seconds = sum(manifest.seconds for manifest in manifests.values())
    tokens = sum(manifest.tokens for manifest in manifests.values())
    return f"{_duration(seconds)} of work, {tokens:,} tokens"


def alerts(run: RunView) -> Iterator[tuple[str, str, str]]:
    """(kind, title, message) of what a reader must know first."""
    for step in run.steps:
        if step.state == "failed":
            yield "failed", f"{step.title} failed", step.message or "run.json does not say why"
    for message in dict.fromkeys(s.message for s in run.steps if s.state == "skipped" and s.message):
        yield "note", "The rounds were stopped", message or ""
    if not run.complete and not any(step.state == "failed" for step in run.steps):
        waiting = [step.title for step in run.steps if step.state in ("waiting", "running")]
        told = f"Next: {waiting[0]}. " if waiting else ""
        yield "note", "This run is not complete", f"{told}The page shows what is there."


# Rows, steps, provenance


def samples(facts: Facts) -> list[tuple[str, str, list[Sample], str]]:
    """(id, title, rows, what is missing) of each kind of rows to read."""
    found = facts.samples(SAMPLES)
    groups = (
        ("pairs", "Generated pairs", "augment.deduplicate"),
        ("high", "Rated highest", f"curate.rate@{facts.round}"),
        ("low", "Rated lowest", f"curate.rate@{facts.round}"),
        ("responses", "Replies of the final model", f"evaluate.forward@{facts.round}"),
    )
    return [
        (key, title, found[key], "" if found[key] else why_missing(facts, step) or "There are none.")
        for key, title, step in groups
    ]


def breakable(text: str) -> "Markup":
    """Text that may also be broken behind an underscore, as names have them."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in text.split("_"))


def shade(value: float | None) -> "Markup":
    """The style of a table's cell, coloured by a value from -1 to 1."""
    from markupsafe import Markup

    if not value:
        return Markup("")
    colour = "--first" if value > 0 else "--second"
    # Up to here, letters keep standing out.
    return Markup(' style="background: color-mix(in srgb, var({}) {}%, transparent)"').format(
        colour, round(45 * min(abs(value), 1))
    )


def folded(text: str) -> tuple[str, str, int]:
    """(beginning, what is shown on a click, how many characters are left out) of a text."""
    if len(text) <= SHOWN * 1.25:
        return text, "", 0
    return text[:SHOWN], text[SHOWN:FOLDED], max(len(text) - FOLDED, 0)


def steps(run: RunView) -> list[dict[str, str]]:
    """A row of the table a step."""
    return [
        {
            "name": step.name,
            "arm": step.arm or "",
            "state": step.state,
            "sign": STATES.get(step.state, "?"),
            "in": f"{count(step, 'in'):,}" if step.manifest else "",
            "kept": f"{count(step, 'kept'):,}" if step.manifest else "",
            "dropped": reasons(step) if step.manifest else "",
            "message": step.message or "",
            "tokens": f"{step.manifest.tokens:,}" if step.manifest and step.manifest.tokens else "",
            "seconds": f"{step.manifest.seconds:,.1f}" if step.manifest else "",
            "artifact": step.artifact.name,
            "sha256": step.manifest.sha256 if step.manifest else "",
        }
        for step in run.steps
    ]


def provenance(run: RunView) -> list[tuple[str, str]]:
    """What the run was made with: libraries, code, pinned names."""
    manifests = [step.manifest for step in run.steps if step.manifest is not None]
    found: dict[str, Counter[str]] = {}
    for manifest in manifests:
        for name, version in manifest.versions.items():
            found.setdefault(name, Counter())[version] += 1
        if manifest.code:
            found.setdefault("code (SHA-256)", Counter())[manifest.code] += 1
    rows = [(name, _versions(versions)) for name, versions in found.items()]
    pinned = read_json(run, "pinned.json")
    if isinstance(pinned, dict):
        rows += [(f"{name}, pinned to", str(commit)) for name, commit in sorted(pinned.items())]
    return rows


def _versions(versions: Counter[str]) -> str:
    if len(versions) == 1:
        return next(iter(versions))
    return ", ".join(f"{version} ({n} steps)" for version, n in versions.most_common())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
