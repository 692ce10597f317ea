"""`selfalign show`: the figures of a run, and its pairs, ratings and replies, to read."""

import heapq
from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any

from pydantic import JsonValue

from selfalign.report.columns import batches, rows_by_id
from selfalign.report.run import RunView, StepView
from selfalign.report.status import ledgers, metrics, planted_table, told, told_against_base, told_ledgers

Row = Mapping[str, Any]
_COLUMNS = [
    *("source", "license", "prompt", "completion", "parents", "model"),
    *("rating", "probability", "signals", "reply"),
]
# As wide as `selfalign status` is in a file.
WIDTH = 160


def shown(run: RunView, pairs: int, high: int, low: int, responses: int) -> dict[str, JsonValue]:
    """What was measured and what was kept, generated pairs, the highest and lowest rated ones, and replies of the last
    model."""
    best, worst = extremes(run, high, low)
    return {
        "figures": {**metrics(run), "pairs": ledgers(run)},
        "pairs": [_pair(row) for row in generated(run, pairs)],
        "high": [_with_verdict(row) for row in best],
        "low": [_with_verdict(row) for row in worst],
        "responses": [{"prompt": row["prompt"], "response": row["reply"]} for row in replies(run)[:responses]],
    }


def generated(run: RunView, n: int) -> list[Row]:
    """The first `n` pairs that the filters kept."""
    step, found = run.step("augment.deduplicate"), list[Row]()
    for batch in batches(step, _COLUMNS, size=max(n, 1)) if step else ():
        found += batch.to_pylist()
        if len(found) >= n:
            break
    return found[:n]


def extremes(run: RunView, high: int, low: int) -> tuple[list[Row], list[Row]]:
    """The highest rated rows of the last round that has any, the best first, and the lowest, the worst first; no row is
    both.

    A calibrated rater's probability ranks them, once selection has weighed it; else the rubric's rating.
    """
    rated = next(reversed(run.rounds("curate.rate")), None)
    if rated is None:
        return [], []
    selected = run.step(rated.name.replace(".rate@", ".select@"))
    step, column = rated, "rating"
    if selected and selected.finished and next(_by(selected, "probability"), None) is not None:
        step, column = selected, "probability"
    best = heapq.nsmallest(high, _by(step, column))
    worst = [key for key in heapq.nlargest(low, _by(step, column)) if key not in best]
    rows = rows_by_id(step, [id for _, id in (*best, *worst)], _COLUMNS)
    return [rows[id] for _, id in best], [rows[id] for _, id in worst]


def _by(step: StepView, column: str) -> Iterator[tuple[float, str]]:
    """The rows that have a verdict, the dropped ones too: its negative, and the id."""
    for batch in batches(step, [column], dropped=column == "probability"):
        if column in batch.schema.names:
            for id, value in zip(batch.column("id").to_pylist(), batch.column(column).to_pylist(), strict=True):
                if value is not None:
                    yield -value, str(id)


def replies(run: RunView) -> list[Row]:
    """What the final model replied to held-out prompts of the seed, or where there are none, to the questions."""
    final = run.step(f"evaluate.forward@{run.final_round}")
    lines: list[Row] = [*final.lines("replies.jsonl")] if final else []
    return [row for row in lines if not row["id"].startswith("question/")] or lines


def signals_of(row: Row) -> dict[str, float | None]:
    """A rated row's signals by name, but for the rubric's, which is its rating."""
    return {each["name"]: each["value"] for each in row.get("signals") or () if each["name"] != "rubric"}


def told_signals(signals: Mapping[str, Any]) -> str:
    """The same in a line."""
    return ", ".join(f"{name} {'not measured' if v is None else f'{v:.3g}'}" for name, v in signals.items())


def _pair(row: Row) -> dict[str, JsonValue]:
    return {"id": row["id"], "instruction": row["prompt"], "response": row["completion"]}


def _with_verdict(row: Row) -> dict[str, JsonValue]:
    verdict = {"probability": row.get("probability"), "rating": row["rating"], "signals": {**signals_of(row)}}
    return {**_pair(row), **verdict, "reply": row["reply"]}


def render(sample: Mapping[str, JsonValue]) -> str:
    """The same as text."""
    titles = {
        "pairs": "Generated pairs",
        "high": "Rated highest",
        "low": "Rated lowest",
        "responses": "Replies of the final model",
    }
    found = sample["figures"]
    assert isinstance(found, dict)
    lines = [_rule("Figures"), "", *_figures(found), ""]
    for key, title in titles.items():
        rows = sample[key]
        assert isinstance(rows, list)
        lines += [_rule(f"{title} ({len(rows)})"), ""]
        for row in rows:
            assert isinstance(row, dict)
            words = {n: told_signals(v) if n == "signals" and isinstance(v, dict) else v for n, v in row.items()}
            lines += [f"{name}: {value}" for name, value in words.items() if value not in ("", None)] + [""]
    return "\n".join(lines)


def _rule(title: str) -> str:
    return f"── {title} ".ljust(80, "─")


def _figures(found: Mapping[str, JsonValue]) -> list[str]:
    """What was measured, in lines: the backward model's figures and the rater's, what became of the pairs, and the
    forward models beside the base."""
    from rich.console import Console

    lines = told(found)
    if (table := planted_table(found)) is not None:
        text = StringIO()
        Console(file=text, width=WIDTH, color_system=None).print(table)
        lines += ["", *(line.rstrip() for line in text.getvalue().splitlines()), ""]
    pairs = found["pairs"]
    assert isinstance(pairs, dict)
    lines += [*told_ledgers(pairs), *told_against_base(found)]
    return lines or ["nothing has been measured yet"]
