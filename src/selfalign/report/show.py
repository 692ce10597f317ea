"""`selfalign show`: pairs, ratings and replies of a run, to read."""

from collections.abc import Iterator

from pydantic import JsonValue

from selfalign.core.records import Candidate, Pair, Rated
from selfalign.report.run import RunView


def shown(run: RunView, pairs: int, high: int, low: int, responses: int) -> dict[str, JsonValue]:
    """Generated pairs, the highest and lowest rated ones, and replies of the last model."""
    rated = _rated(run)
    by_rating = sorted(rated, key=lambda row: (-(row.rating or 0), row.id))
    final = run.step(f"evaluate.forward@{run.final_round}")
    replies = final.lines("replies.jsonl") if final else []
    # Held-out prompts of the seed come after the questions, and are what a user would ask.
    asked = [row for row in replies if not row["id"].startswith("question/")] or replies
    return {
        "pairs": [_pair(row) for row in list(_generated(run))[:pairs]],
        "high": [_with_rating(row) for row in by_rating[:high]],
        "low": [_with_rating(row) for row in reversed(by_rating[max(high, len(by_rating) - low) :])],
        "responses": [{"prompt": row["prompt"], "response": row["reply"]} for row in asked[:responses]],
    }


def _generated(run: RunView) -> Iterator[Candidate]:
    step = run.step("augment.filter")
    for row in step.outcomes(Candidate) if step else ():
        if isinstance(row, Candidate):
            yield row


def _rated(run: RunView) -> list[Rated]:
    steps = run.rounds("curate.rate")
    rows = steps[-1].outcomes(Rated) if steps else ()
    return [row for row in rows if isinstance(row, Rated) and row.rating is not None]


def _pair(row: Pair) -> dict[str, JsonValue]:
    return {"id": row.id, "instruction": row.prompt, "response": row.completion}


def _with_rating(row: Rated) -> dict[str, JsonValue]:
    return {**_pair(row), "rating": row.rating, "reply": row.reply}


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
