"""`selfalign status`: the steps, their ledgers, and what was measured. The JSON form is a contract."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import JsonValue
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from selfalign.core.metrics import read_measurements
from selfalign.report.logs import read_log
from selfalign.report.run import RunView, StepView


def status(run: RunView) -> dict[str, JsonValue]:
    """The document that `selfalign status --json` prints.

    `sha256` of an artifact is over its content alone, so that two undisturbed runs of one recipe print the same.
    """
    artifacts: dict[str, JsonValue] = {
        step.artifact.name: {
            "name": step.artifact.name,
            "identity": step.artifact.identity,
            "sha256": step.manifest.sha256,
        }
        for step in run.steps
        if step.manifest is not None
    }
    return {
        "run": str(run.root),
        "complete": run.complete,
        "steps": [_step(step) for step in run.steps],
        "artifacts": list(artifacts.values()),
        "metrics": metrics(run),
    }


def _step(step: StepView) -> dict[str, JsonValue]:
    manifest = step.manifest
    ledger: Mapping[str, JsonValue] = manifest.ledger if manifest else {}
    return {
        "name": step.name,
        "arm": step.arm,
        "state": step.state,
        **{key: ledger.get(key) for key in ("sources", "in", "kept", "rejected", "quarantined", "noted")},
        "seconds": manifest.seconds if manifest else None,
        "tokens": manifest.tokens if manifest else None,
        "message": step.message,
        **({"progress": going} if (going := progress(step)) else {}),
    }


def metrics(run: RunView) -> dict[str, JsonValue]:
    """What the run measured: each figure, and under the same name with `_ci` its 95% interval."""
    found: dict[str, JsonValue] = {}
    for name, step in (("backward", "evaluate.backward"), ("backward_base", "evaluate.base_backward")):
        measured = _metrics(run.step(step))
        if measured.get("exact_match"):
            found[f"{name}_exact_match"] = measured["exact_match"]["share"]
            found[f"{name}_exact_match_ci"] = measured["exact_match"]["ci"]
        if measured:
            found[f"{name}_held_out_loss"] = measured["held_out"]["nats_per_token"]
            found[f"{name}_held_out_loss_ci"] = measured["held_out"]["ci"]
    found |= _backward_gains(run)
    found |= _curation(run)
    table: dict[str, dict[str, JsonValue]] = {}
    for model, measured in measurements(run):
        if measured.get("exact_match"):
            table.setdefault("accuracy", {})[model] = measured["exact_match"]["share"]
            table.setdefault("accuracy_ci", {})[model] = measured["exact_match"]["ci"]
        table.setdefault("held_out_loss", {})[model] = measured["held_out"]["nats_per_token"]
        table.setdefault("held_out_loss_ci", {})[model] = measured["held_out"]["ci"]
        if measured.get("rouge_l"):
            table.setdefault("rouge_l", {})[model] = measured["rouge_l"]["mean"]
            table.setdefault("rouge_l_ci", {})[model] = measured["rouge_l"]["ci"]
        if measured.get("against_base"):
            table.setdefault("against_base", {})[model] = measured["against_base"]
    for view in run.steps:
        if view.name.startswith("evaluate.judge@") and (judged := _metrics(view)):
            table.setdefault("judge", {})[_model(view)] = judged
    found.update(table)
    found.update(_metrics_by_epoch(run))
    return found


def _backward_gains(run: RunView) -> dict[str, JsonValue]:
    """What training changed of the backward model: the base's figure, its own, and the paired difference.

    `backward_nll` is in nats a token of held-out instructions, so a negative difference is a gain.
    """
    before, after = (_metrics(run.step(f"evaluate.{verb}")) for verb in ("base_backward", "backward"))
    found: dict[str, JsonValue] = {}
    for key, name, value in (("backward_nll", "held_out", "nats_per_token"), ("backward_rouge_l", "rouge_l", "mean")):
        if before.get(name) and after.get(name):
            gap = (after.get("against_base") or {}).get(name) or {}
            ends = {"before": before[name][value], "after": after[name][value]}
            found[key] = {**ends, "difference": gap.get("difference"), "difference_ci": gap.get("ci")}
    return found


def _curation(run: RunView) -> dict[str, JsonValue]:
    """What was measured of the rater in the first round that measured it; by round where there are several.

    A calibration whose gate failed counts: what it measured is why.
    """
    found: dict[str, JsonValue] = {}
    for calibration in run.rounds("curate.calibrate", failed=True)[:1]:
        assert calibration.manifest is not None
        measured = calibration.manifest.metrics
        found |= {"rater_auc": measured["auc"], "rater_auc_ci": measured.get("auc_ci")}
        found["rater_auc_by_kind"] = measured.get("auc_by_kind")
        if measured.get("planted_auc"):
            found["planted_auc"] = measured["planted_auc"]
    for key, verb in (("injection", "inject"), ("agreement", "agree")):
        rounds = {step.name.partition("@")[2]: _metrics(step) for step in run.rounds(f"curate.{verb}")}
        if rounds:
            found[key] = next(iter(rounds.values()))
        if len(rounds) > 1:
            found[f"{key}_by_round"] = {**rounds}
    return found


def ledgers(run: RunView) -> dict[str, JsonValue]:
    """What became of the generated pairs: filtered, and selected in the last round that selected any."""
    augmented = (run.step("augment.filter"), run.step("augment.deduplicate"))
    steps = [*augmented, *run.rounds("curate.select", failed=True)[-1:]]
    keys = ("in", "kept", "rejected", "quarantined")
    return {step.name: {key: _step(step)[key] for key in keys} for step in steps if step and step.finished}


def _metrics_by_epoch(run: RunView) -> dict[str, dict[str, JsonValue]]:
    """Figures by model and epoch, where a training kept the models of its epochs: "1", "2" … and "last"."""
    table: dict[str, dict[str, JsonValue]] = {}
    for model, epochs in measurements_by_epoch(run):
        for key, name, value in (
            ("accuracy_by_epoch", "exact_match", "share"),
            ("held_out_loss_by_epoch", "held_out", "nats_per_token"),
        ):
            if found := {epoch: measured[name] for epoch, measured in epochs.items() if measured.get(name)}:
                table.setdefault(key, {})[model] = {epoch: each[value] for epoch, each in found.items()}
                table.setdefault(f"{key}_ci", {})[model] = {epoch: each["ci"] for epoch, each in found.items()}
    return table


def measurements(run: RunView) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was measured of each forward model: `base`, the arms by name (with the round, above 1), M0, M1, …"""
    for step in run.steps:
        if step.name == "evaluate.base":
            model = "base" if step.arm is None else f"{step.arm} base"
        elif step.name.startswith("evaluate.forward@"):
            model = _model(step)
        else:
            continue
        if measured := _metrics(step):
            yield model, measured


def measurements_by_epoch(run: RunView) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """What was measured of each model whose training kept its epochs, by epoch: "1", "2" … and "last", in order.

    Models are named as in `measurements`; backward models are `backward`, with the arm in front of it if there is one.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for step in run.steps:
        verb, epoch, number = step.name.partition("@")[0].partition("_epoch_")
        if verb in ("evaluate.backward", "evaluate.forward") and (measured := _metrics(step)):
            found.setdefault(_model(step), {})[number if epoch else "last"] = measured
    for model, epochs in found.items():
        if epochs.keys() != {"last"}:
            yield model, epochs


def _model(step: StepView) -> str:
    """What the model is called that an evaluation measured."""
    k = step.name.partition("@")[2]
    if not k:
        return "backward" if step.arm is None else f"{step.arm} backward"
    return f"M{k}" if step.arm is None else step.arm if k == "1" else f"{step.arm} M{k}"


def _metrics(step: StepView | None) -> dict[str, Any]:
    return dict(step.manifest.metrics) if step and step.manifest and step.state == "done" else {}


def steps_table(run: RunView) -> Table:
    """The ledger as people read it."""
    table = Table(
        "step", "state", "in", "kept", "dropped", "tokens", "seconds", title=escape(str(run.root)), title_justify="left"
    )
    for column in table.columns[2:4] + table.columns[5:]:
        column.justify = "right"
    for step in run.steps:
        row = _step(step)
        dropped = {
            **_counts(row["rejected"]),
            **{f"{k} (quarantined)": n for k, n in _counts(row["quarantined"]).items()},
            **{f"{k} (kept)": n for k, n in _counts(row["noted"]).items()},
        }
        told = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        told = "; ".join(filter(None, (told, step.message, _going(step))))
        cells = [row["in"], row["kept"], told, row["tokens"] or None, row["seconds"]]
        # Brackets are text here: rich would take `[arm]` for a style and drop it.
        table.add_row(escape(step.title), step.state, *("" if cell is None else escape(str(cell)) for cell in cells))
    return table


def progress(step: StepView) -> dict[str, Any] | None:
    """How far a step is that runs, and how fast: a map in shards and rows, a training in steps."""
    if step.state != "running":
        return None
    log = read_log(step.artifact.folder)
    if log.curves.get("loss"):
        at, loss = log.curves["loss"][-1]
        return {"step": at, "of": log.last_step, "loss": loss, "tokens_per_second": log.last("tokens_per_second")}
    lines = read_measurements(step.artifact.folder)
    began = max((n for n, line in enumerate(lines) if "shards" in line), default=None)
    if began is None:
        return None
    start, done = lines[began], [line for line in lines[began + 1 :] if "shard" in line]
    seconds = done[-1]["time"] - start["time"] if done else 0
    rows, tokens = (sum(line[key] for line in done) for key in ("rows", "tokens"))
    return {
        "shards": len(step.artifact.shards()),
        "of": start["shards"],
        "rows": start["rows_there"] + rows,
        "rows_per_second": round(rows / seconds, 3) if seconds else None,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
    }


def _going(step: StepView) -> str:
    """How far a step is that runs, in words."""
    found = progress(step)
    if found is None:
        return ""
    told = [f"step {found['step']:,.0f} of {found['of']:,.0f}"] if "step" in found else []
    told += [f"{found['shards']:,} of {found['of']:,} shards, {found['rows']:,} rows"] if "shards" in found else []
    told += [f"loss {found['loss']:.3g}"] if "loss" in found else []
    rates = [(found.get(f"{unit}_per_second"), unit) for unit in ("rows", "tokens")]
    return ", ".join([*told, *(f"{rate:,.0f} {unit}/s" for rate, unit in rates if rate)])


def _counts(value: JsonValue) -> dict[str, int]:
    return {key: n for key, n in value.items() if isinstance(n, int)} if isinstance(value, dict) else {}


def results_table(run: RunView) -> Group | None:
    """The rater's signals and the forward models, side by side; None before any was measured."""
    tables = [table for table in (planted_table(metrics(run)), _models_table(run)) if table is not None]
    return Group(*tables) if tables else None


def planted_table(found: Mapping[str, JsonValue]) -> Table | None:
    """Areas under the curve by signal and kind of planted pairs, with intervals; None where metrics hold none."""
    areas = verdict_first(found.get("planted_auc"))
    if not areas:
        return None
    kinds = dict.fromkeys(kind for each in areas.values() for kind in each["by_kind"])
    table = Table("planted AUC (95%)", "all", "swapped, truncated", *kinds, title_justify="left")
    for name, each in areas.items():
        ends = each["ci"]
        cells = [(each.get(key), ends.get(key)) for key in ("all", "swapped_truncated")]
        cells += [(each["by_kind"].get(kind), ends["by_kind"].get(kind)) for kind in kinds]
        table.add_row(name, *(_area(*cell) for cell in cells))
    return table


def verdict_first(areas: Any) -> dict[str, Any]:
    """Areas by signal, those that are verdicts before the others."""
    return dict(sorted((areas or {}).items(), key=lambda pair: (pair[0] != "calibrated", pair[0] != "rubric")))


def _area(value: float | None, ends: Sequence[float] | None) -> str:
    """An area with its interval, as short as can be: ten columns stand beside each other."""
    if value is None or ends is None:
        return ""
    middle, low, high = (f"{number:.2f}".removeprefix("0") for number in (value, *ends))
    return f"{middle} ({low}–{high})"


def _models_table(run: RunView) -> Table | None:
    """The forward models side by side; None before any was measured."""
    models = list(measurements(run))
    compared = any(measured.get("rouge_l") for _, measured in models)
    columns = ["exact match", "95%", "held-out loss", "95%", "loss − base (95%)"]
    table = Table("model", *columns, *(("ROUGE-L", "95%") if compared else ()), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for model, measured in models:
        match, loss = measured.get("exact_match") or {}, measured["held_out"]
        gap = (measured.get("against_base") or {}).get("held_out")
        told = f"{gap['difference']:+.3f} ({_ends(gap['ci'])})" if gap else ""
        likeness = measured.get("rouge_l") or {}
        cells = [
            _figure(match.get("share")),
            _ends(match.get("ci")),
            _figure(loss["nats_per_token"]),
            _ends(loss["ci"]),
            told,
            *((_figure(likeness.get("mean")), _ends(likeness.get("ci"))) if compared else ()),
        ]
        table.add_row(escape(model), *cells)
    return table if table.row_count else None


def figures(run: RunView) -> list[str]:
    """The other figures, a line each."""
    return told(metrics(run))


def told(found: Mapping[str, JsonValue]) -> list[str]:
    """Metrics that stand in no table, a line each."""
    lines = []
    for key, text in (
        ("backward_exact_match", "backward model, exact match of the instruction"),
        ("backward_held_out_loss", "backward model, held-out loss (nats a token)"),
        ("backward_base_held_out_loss", "the base in its place"),
        ("rater_auc", "rater, AUC on planted pairs"),
    ):
        if found.get(key) is not None:
            lines.append(f"{text}: {_figure(found[key])} (95%: {_ends(found[f'{key}_ci'])})")
    for key, text in (("backward_nll", "held-out loss"), ("backward_rouge_l", "ROUGE-L of held-out instructions")):
        gain = found.get(key)
        if isinstance(gain, dict) and gain["difference"] is not None:
            both = f"{_figure(gain['after'])} and {_figure(gain['before'])}, {gain['difference']:+.3f}"
            lines.append(f"backward model and the base, {text}: {both} (95%: {_ends(gain['difference_ci'])})")
    judged = found.get("judge")
    lines += [_judged(model, each) for model, each in judged.items()] if isinstance(judged, dict) else []
    lines += [*_injected(found.get("injection")), *_agreed(found.get("agreement"))]
    for key, text in (("accuracy_by_epoch", "exact match"), ("held_out_loss_by_epoch", "held-out loss")):
        by_epoch: Any = found.get(key) or {}
        for model, values in by_epoch.items():
            parts = [f"{_figure(value)} ({epoch})" for epoch, value in values.items() if value is not None]
            lines += [f"{model}, {text} by epoch: {', '.join(parts)}"] if parts else []
    return lines


def told_against_base(found: Mapping[str, JsonValue]) -> list[str]:
    """Each forward model against the base on the same rows, as the table of models has it, a line a figure."""
    gaps: Any = found.get("against_base") or {}
    lines = []
    for model, each in gaps.items():
        for name, key, text in (
            ("exact_match", "accuracy", "exact match"),
            ("held_out", "held_out_loss", "held-out loss"),
            ("rouge_l", "rouge_l", "ROUGE-L"),
        ):
            values: Any = found.get(key)
            if (gap := each.get(name)) and values:
                both = f"{_figure(values.get(model))} and {_figure(values.get('base'))}, {gap['difference']:+.3f}"
                ends = f"95%: {_ends(gap['ci'])}; " if gap["ci"] else ""
                lines.append(f"{model} and the base, {text}: {both} ({ends}n = {gap['n']})")
    return lines


def told_ledgers(found: Mapping[str, JsonValue]) -> list[str]:
    """The ledgers of `ledgers`, a line each."""
    lines = []
    for name, ledger in found.items():
        assert isinstance(ledger, dict)
        dropped = {**_counts(ledger["rejected"]), **_counts(ledger["quarantined"])}
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items(), key=lambda pair: -pair[1]))
        lines.append(f"{name}: {ledger['kept']} of {ledger['in']} pairs kept; dropped: {reasons or 'none'}")
    return lines


def _injected(found: Any) -> list[str]:
    """What texts that speak to the rater gain, in one line."""
    gap = found and found["by_signal"]["verdict"]
    if not gap:
        return []
    above, n = found["above_threshold"], found["payloads"]
    return [
        f"injection, the verdict with a payload and with a harmless twin: {gap['difference']:+.3f} "
        f"(95%: {_ends(gap['ci'])}; n = {gap['n']}); at the threshold or above: {above['payload']} and {above['twin']} "
        f"of {n}"
    ]


def _agreed(found: Any) -> list[str]:
    """How far a second rater agrees, in one line."""
    if not found:
        return []
    rho, keeps = found["spearman"], found["confusion"]
    ends = f"95%: {_ends(found['spearman_ci'])}; " if found["spearman_ci"] else ""
    order = "no rank correlation" if rho is None else f"Spearman {rho:+.3f} ({ends}n = {found['both_rated']})"
    return [
        f"agreement with the second rater: {order}; kept by both {keeps['both_keep']}, by the first alone "
        f"{keeps['first_keeps']}, by the second alone {keeps['second_keeps']}, by neither {keeps['neither']}"
    ]


def _judged(model: str, found: Any) -> str:
    """A judge's verdicts on a model, in one line."""
    parts = []
    if found["n"]:
        parts.append(f"win rate {_figure(found['win_rate'])} (95%: {_ends(found['ci'])})")
        parts.append(f"{found['wins']} won, {found['ties']} tied ({found['alike']} alike), {found['losses']} lost")
    if found["consistent"] is not None:
        parts.append(f"the same in both orders {_figure(found['consistent'])}")
        parts.append(f"for what stands first {_figure(found['first_position'])}")
    parts += [f"{n} {reason}" for reason, n in found["unjudged"].items()]
    return f"{model} and the base, judged: {'; '.join(parts)}"


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else ""


def _ends(ci: object) -> str:
    return f"{ci[0]:.3f} to {ci[1]:.3f}" if isinstance(ci, list) else ""
