"""`selfalign status`: the steps, their ledgers, and what was measured. The JSON form is a contract."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import JsonValue
from rich.markup import escape
from rich.table import Table

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
    for calibration in run.rounds("curate.calibrate")[:1]:
        measured = _metrics(calibration)
        found |= {"rater_auc": measured["auc"], "rater_auc_ci": measured.get("auc_ci")}
        found["rater_auc_by_kind"] = measured.get("auc_by_kind")
    table: dict[str, dict[str, JsonValue]] = {}
    for model, measured in measurements(run):
        if measured.get("exact_match"):
            table.setdefault("accuracy", {})[model] = measured["exact_match"]["share"]
            table.setdefault("accuracy_ci", {})[model] = measured["exact_match"]["ci"]
        table.setdefault("held_out_loss", {})[model] = measured["held_out"]["nats_per_token"]
        table.setdefault("held_out_loss_ci", {})[model] = measured["held_out"]["ci"]
        if measured.get("against_base"):
            table.setdefault("against_base", {})[model] = measured["against_base"]
    found.update(table)
    found.update(_metrics_by_epoch(run))
    return found


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


def _going(step: StepView) -> str:
    """How far a training is that runs, in words."""
    log = read_log(step.artifact.folder / "metrics.jsonl") if step.state == "running" else None
    if log is None or not log.curves.get("loss"):
        return ""
    at, loss = log.curves["loss"][-1]
    speed = log.last("tokens_per_second")
    told = [f"step {at:,.0f} of {log.last_step:,.0f}", f"loss {loss:.3g}"]
    return ", ".join(told if speed is None else [*told, f"{speed:,.0f} tokens/s"])


def _counts(value: JsonValue) -> dict[str, int]:
    return {key: n for key, n in value.items() if isinstance(n, int)} if isinstance(value, dict) else {}


def results_table(run: RunView) -> Table | None:
    """The forward models side by side; None before any was measured."""
    table = Table("model", "exact match", "95%", "held-out loss", "95%", "loss − base (95%)", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for model, measured in measurements(run):
        match, loss = measured.get("exact_match") or {}, measured["held_out"]
        gap = (measured.get("against_base") or {}).get("held_out")
        told = f"{gap['difference']:+.3f} ({_ends(gap['ci'])})" if gap else ""
        cells = [
            _figure(match.get("share")),
            _ends(match.get("ci")),
            _figure(loss["nats_per_token"]),
            _ends(loss["ci"]),
        ]
        table.add_row(escape(model), *cells, told)
    return table if table.row_count else None


def figures(run: RunView) -> list[str]:
    """The other figures, a line each."""
    found, lines = metrics(run), []
    for key, text in (
        ("backward_exact_match", "backward model, exact match of the instruction"),
        ("backward_held_out_loss", "backward model, held-out loss (nats a token)"),
        ("backward_base_held_out_loss", "the base in its place"),
        ("rater_auc", "rater, AUC on planted pairs"),
    ):
        if found.get(key) is not None:
            lines.append(f"{text}: {_figure(found[key])} (95%: {_ends(found[f'{key}_ci'])})")
    by_epoch = _metrics_by_epoch(run)
    for key, text in (("accuracy_by_epoch", "exact match"), ("held_out_loss_by_epoch", "held-out loss")):
        for model, values in by_epoch.get(key, {}).items():
            assert isinstance(values, dict)
            told = [f"{_figure(value)} ({epoch})" for epoch, value in values.items() if value is not None]
            lines += [f"{model}, {text} by epoch: {', '.join(told)}"] if told else []
    return lines


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else ""


def _ends(ci: object) -> str:
    return f"{ci[0]:.3f} to {ci[1]:.3f}" if isinstance(ci, list) else ""
