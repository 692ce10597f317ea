"""A whole run, written by hand: every step that a report looks at, in texts as hostile as the caller likes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from report.conftest import Run
from selfalign.core.records import Candidate, Document, Example, Rated, SeedPair, rejected
from selfalign.core.store import commit

LOGGED = {"learning_rate": 2.5e-5, "grad_norm": 0.5, "tokens_per_second": 12_345.0, "memory_bytes": 3.5 * 2**30}
HOSTILE = (
    "<script>document.title='taken'</script><img src=http://nowhere.example/a.png onerror=\"document.title='taken'\">"
    "</style></svg></details> & \" ' {{ 7*7 }} --> $x^2$ 語 \u202e \x00\x1b"
)


def whole(run: Run, text: str = "What for?", rows: int = 6, kept: int = 3, arm: str | None = "other") -> Run:
    """`rows` candidates rated 1.0, 1.5, … of which the best `kept` are selected; base, M0 and M1, whose
    training kept two epochs before the last, and M1 of an arm."""
    recipe = {
        "name": text,
        "seed": 3,
        "model": {"path": "org/tiny"},
        "prepare": {"corpus": {"path": text}},
        "curate": {"threshold": 2.5, "max_off_scale": 0.5, "keep": "rated"},
        "arms": {arm: {}} if arm else None,
    }
    (run.store.root / "recipe.json").write_text(json.dumps(recipe))
    ids = [f"d/{n:04d}" for n in range(rows)]
    _prepare(run, text, ids)
    maker = f"{len(run.steps):016x}"
    log(run.add("backward.train"), [3.0, 1.0, 0.5])
    common = {"source": text, "model": maker, "prompt_hash": "h", "finish": "stop"}
    made = [Candidate(id=f"{id}/0", prompt=f"{text} {id}", completion=text, parents=(id,), **common) for id in ids]
    for name in ("augment.generate", "augment.filter"):
        run.add(name, rows=made, record=Candidate, ledger={"in": rows, "kept": rows})
    _curate(run, text, made, kept, common)
    seed = [Example(id=f"s/{n}", kind="seed", prompt=(), completion=()) for n in range(4)]
    best = [Example(id=f"c/{n}", kind="augmented", prompt=(), completion=()) for n in range(kept)]
    run.add("forward.compose@1", rows=[*best, *seed], record=Example, ledger={"in": kept + 4, "kept": kept + 4})
    for name, of in (
        ("forward.train@0", None),
        ("forward.train@1", None),
        *([("forward.train@1", arm)] if arm else []),
    ):
        losses = [2.0 / (n + 1) for n in range(40)]
        log(run.add(name, arm=of), losses, 100 if name.endswith("1") else None, **LOGGED)
    _evaluate(run, text, arm)
    return run


def log(folder: Path, losses: Iterable[float], resumed_at: float | None = None, **more: float) -> None:
    """Write a training's log: a loss every ten steps, with `more` that stays the same."""
    rows = [{"step": 10.0 * n, "max_steps": 400.0, "loss": loss, **more} for n, loss in enumerate(losses, 1)]
    if resumed_at is not None:
        at = sum(row["step"] <= resumed_at for row in rows)
        rows[at:at] = [*rows[at : at + 2], {"resumed_at": resumed_at}]
    commit(folder / "metrics.jsonl", lines(rows).encode())


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def change(run: Run, name: str, **state: Any) -> None:
    """Another state, or another message, of a step."""
    next(step for step in run.steps if step["name"] == name).update(state)
    (run.store.root / "run.json").write_text(json.dumps({"steps": run.steps}))


def _prepare(run: Run, text: str, ids: list[str]) -> None:
    n = len(ids)
    run.add("prepare.read_corpus", ledger={"in": n + 4, "kept": n + 3, "quarantined": {"not_json": 1}})
    documents = [Document(id=id, source=text, text=text, license=text) for id in ids]
    dropped = {"in": n + 3, "kept": n, "rejected": {"too_short": 2, text: 1}}
    run.add("prepare.pick_corpus", rows=documents, record=Document, ledger=dropped)
    seed = [SeedPair(id=f"s/{n}", source="seed", prompt=text, completion=text * 2) for n in range(4)]
    run.add("prepare.pick_seed", rows=seed, record=SeedPair, ledger={"in": 4, "kept": 4})


def _curate(run: Run, text: str, made: list[Candidate], kept: int, common: Mapping[str, Any]) -> None:
    n = len(made)
    planted = [
        {"id": f"s/{n}/{kind}", "kind": kind, "rating": rating + n / 10, "unrated": None}
        for kind, rating in (("seed", 4.0), ("swapped", 2.0), (text, 1.5))
        for n in range(4)
    ]
    auc = {"auc": 1.0, "auc_ci": [0.7, 1.0], "planted": 12, "rated": 1.0, "unrated": {}}
    run.add("curate.calibrate@1", metrics=auc, files={"planted.jsonl": lines(planted)})
    rated = [
        Rated(
            id=row.id,
            prompt=row.prompt,
            completion=row.completion,
            parents=row.parents,
            rating=1 + 0.5 * (number % 9),
            off_scale=0.1,
            reply=text,
            **common,
        )
        for number, row in enumerate(made)
    ]
    run.add("curate.rate@1", rows=rated, record=Rated, ledger={"in": n, "kept": n})
    best = sorted(rated, key=lambda row: -(row.rating or 0))[:kept]
    chosen = [row if row in best else rejected(row.id, "below_threshold", row) for row in rated]
    below = {"in": n, "kept": kept, "rejected": {"below_threshold": n - kept} if n > kept else {}}
    run.add("curate.select@1", rows=chosen, record=Rated, ledger=below)


def _evaluate(run: Run, text: str, arm: str | None) -> None:
    ids = [f"s/{n}" for n in range(6)]
    replies = [{"id": id, "prompt": text, "reply": f"{text} {id}", "finish": "stop", "right": None} for id in ids]
    for name, of, share in (
        ("evaluate.base", None, 0.2),
        ("evaluate.forward@0", None, 0.3),
        ("evaluate.forward_epoch_1@1", None, 0.6),
        ("evaluate.forward_epoch_2@1", None, 0.9),
        ("evaluate.forward@1", None, 0.8),
        *([("evaluate.forward@1", arm, 0.5)] if arm else []),
    ):
        gap = {"difference": round(share - 0.2, 4), "ci": [share - 0.3, share - 0.1], "n": 9}
        metrics = {
            "exact_match": {"share": share, "ci": [share - 0.1, share + 0.1], "n": 9},
            "held_out": {"nats_per_token": 3 - share, "ci": [2.9 - share, 3.1 - share], "n": 4},
            "against_base": None if name == "evaluate.base" else {"exact_match": gap},
        }
        run.add(name, arm=of, metrics=metrics, files={"replies.jsonl": lines(replies)})
