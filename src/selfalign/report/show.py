"""`selfalign show`: pairs, ratings and replies of a run, to read."""

import heapq
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import JsonValue

from selfalign.report.columns import batches, rows_by_id
from selfalign.report.run import RunView, StepView

Row = Mapping[str, Any]
_COLUMNS = ["source", "license", "prompt", "completion", "parents", "model", "rating", "reply"]


def shown(run: RunView, pairs: int, high: int, low: int, responses: int) -> dict[str, JsonValue]:
    """Generated pairs, the highest and lowest rated ones, and replies of the last model."""
    best, worst = extremes(run, high, low)
    return {
        "pairs": [_pair(row) for row in generated(run, pairs)],
        "high": [_with_rating(row) for row in best],
        "low": [_with_rating(row) for row in worst],
        "responses": [{"prompt": row["prompt"], "response": row["reply"]} for row in replies(run)[:responses]],
    }


def generated(run: RunView, n: int) -> list[Row]:
    """The first `n` pairs that the filters kept."""
    step, found = run.step("augment.filter"), list[Row]()
    for batch in batches(step, _COLUMNS, size=max(n, 1)) if step else ():
        found += batch.to_pylist()
        if len(found) >= n:
            break
    return found[:n]


def last_rated(run: RunView) -> StepView | None:
    """The ratings of the last round that has any."""
    return next(reversed(run.rounds("curate.rate")), None)


def extremes(run: RunView, high: int, low: int) -> tuple[list[Row], list[Row]]:
    """The highest rated rows, the best first, and the lowest, the worst first; no row is both."""
    step = last_rated(run)
    if step is None:
        return [], []
    best = heapq.nsmallest(high, _by_rating(step))
    worst = [key for key in heapq.nlargest(low, _by_rating(step)) if key not in best]
    rows = rows_by_id(step, [id for _, id in (*best, *worst)], _COLUMNS)
    return [rows[id] for _, id in best], [rows[id] for _, id in worst]


def _by_rating(step: StepView) -> Iterator[tuple[float, str]]:
    for batch in batches(step, ["rating"]):
        for id, rating in zip(batch.column("id").to_pylist(), batch.column("rating").to_pylist(), strict=True):
            if rating is not None:
                yield -rating, str(id)


def replies(run: RunView) -> list[Row]:
    """What the final model replied to held-out prompts of the seed, or where there are none, to the questions."""
    final = run.step(f"evaluate.forward@{run.final_round}")
    lines: list[Row] = [*final.lines("replies.jsonl")] if final else []
    return [row for row in lines if not row["id"].startswith("question/")] or lines


def _pair(row: Row) -> dict[str, JsonValue]:
    return {"id": row["id"], "instruction": row["prompt"], "response": row["completion"]}


def _with_rating(row: Row) -> dict[str, JsonValue]:
    return {**_pair(row), "rating": row["rating"], "reply": row["reply"]}


def render(sample: dict[str, JsonValue]) -> str:
    """The same as text."""
    titles = {
        "pairs": "Generated pairs",
        "high": "Rated highest",
        "low": "Rated lowest",
        "responses": "Replies of the final model",
    }
    lines = []
    for key, title in titles.items():
        rows = sample[key]
        assert isinstance(rows, list)
        lines += [f"── {title} ({len(rows)}) ".ljust(80, "─"), ""]
        for row in rows:
            assert isinstance(row, dict)
            lines += [f"{name}: {value}" for name, value in row.items() if value not in ("", None)] + [""]
    return "\n".join(lines)
