"""A whole run, written by hand: every step that a report looks at, in texts as hostile as the caller likes."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from report.conftest import Run
from selfalign.core.locations import commit
from selfalign.core.records import Candidate, Document, Example, Rated, SeedPair, Signal, rejected
from selfalign.stages.curate.fit import by_threshold, reliability

LOGGED = {"learning_rate": 2.5e-5, "grad_norm": 0.5, "tokens_per_second": 12_345.0, "memory_bytes": 3.5 * 2**30}
HOSTILE = (
    "<script>document.title='taken'</script><img src=http://nowhere.example/a.png onerror=\"document.title='taken'\">"
    "</style></svg></details> & \" ' {{ 7*7 }} --> $x^2$ 語 \u202e \x00\x1b"
)


def whole(
    run: Run,
    text: str = "What for?",
    rows: int = 6,
    kept: int = 3,
    arm: str | None = "other",
    rater: Literal["rubric", "calibrated"] = "rubric",
) -> Run:
    """`rows` candidates rated 1.0, 1.5, … (calibrated: with probabilities .05, .1 …) of which the best `kept` are
    selected; base, M0 and M1, whose training kept two epochs before the last, and M1 of an arm."""
    recipe = {
        "name": text,
        "seed": 3,
        "model": {"path": "org/tiny"},
        "prepare": {"corpus": {"path": text}},
        "curate": {
            "rater": {"kind": rater, "model": "previous"},
            "threshold": 2.5 if rater == "rubric" else 0.5,
            "max_off_scale": 0.5,
            "keep": "rated",
            "injections": 4,
            "agreement": {"against": {"rater": {"kind": "rubric", "model": "base"}, "readout": "parsed"}},
        },
        "arms": {arm: {}} if arm else None,
    }
    (run.store.root / "recipe.json").write_text(json.dumps(recipe))
    ids = [f"d/{n:04d}" for n in range(rows)]
    _prepare(run, text, ids)
    maker = f"{len(run.steps):016x}"
    log(run.add("backward.train"), [3.0, 1.0, 0.5])
    common = {"source": text, "model": maker, "prompt_hash": "h", "finish": "stop"}
    made = [Candidate(id=f"{id}/0", prompt=f"{text} {id}", completion=text, parents=(id,), **common) for id in ids]
    for name in ("augment.generate", "augment.filter", "augment.deduplicate"):
        run.add(name, rows=made, record=Candidate, ledger={"in": rows, "kept": rows})
    _calibrate(run, text, rater)
    _curate(run, text, made, kept, common, rater)
    _compare(run, text, rater)
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


def _calibrate(run: Run, text: str, rater: str) -> None:
    """Four pairs of each kind: the rubric's rating falls with the kind, and the probability with it."""
    run.add("curate.plant", ledger={"in": 4, "kept": 14})
    names = ("rubric",) if rater == "rubric" else ("rubric", "stop_token", text)
    planted: list[dict[str, Any]] = []
    for kind, good, rating in (
        ("seed", True, 4.0),
        ("swapped", False, 2.0),
        (text, False, 1.5),
        ("labelled", True, 4.5),
        ("labelled", False, 1.0),
    ):
        for n in range(4 if kind != "labelled" else 1):
            verdict = rating + n / 10 if rater == "rubric" else round((rating + n / 10) / 5, 3)
            row = {"id": f"s/{n}/{kind}", "kind": kind, "good": good, "rating": rating + n / 10, "unrated": None}
            planted.append({**row, "verdict": verdict, "signals": dict.fromkeys(names, rating)})
    verdicts, good = [row["verdict"] for row in planted], [row["good"] for row in planted]
    metrics = {
        **{"auc": 1.0, "auc_ci": [0.7, 1.0], "planted": len(planted), "rated": 1.0, "unrated": {}, "threshold": None},
        "planted_auc": {name: areas(text, 1.0) for name in names},
        "thresholds": [asdict(point) for point in by_threshold(verdicts, good)],
        "reliability": [asdict(each) for each in reliability(verdicts, good)],
        "weights": None,
    }
    if rater == "calibrated":
        metrics["planted_auc"] |= {"calibrated": areas(text, 0.9), text: areas(text, 0.25)}
        metrics["weights"] = {"rubric": 0.5, "stop_token": 1.25, text: -2.0}
        metrics["squares"] = {"rubric": 0.25, "stop_token": -0.5, text: -1.0}
    run.add("curate.calibrate@1", metrics=metrics, files={"planted.jsonl": lines(planted)})


def areas(text: str, whole: float) -> dict[str, Any]:
    """Areas under the curve of one signal, as a calibration's metrics hold them."""
    ends = [round(whole - 0.2, 4), whole]
    by_kind = {"labelled": 1.0, "swapped": 0.75, text: whole}
    ci = {"all": ends, "swapped_truncated": ends, "by_kind": dict.fromkeys(by_kind, ends)}
    return {"all": whole, "swapped_truncated": 0.75, "by_kind": by_kind, "ci": ci}


def _compare(run: Run, text: str, rater: str) -> None:
    """What payloads gain, and how far a second rater agrees."""
    gap = {"difference": 0.125, "ci": [-0.25, 0.5], "raised": 0.75, "n": 4}
    names = ("verdict", "rubric") if rater == "rubric" else ("verdict", "rubric", "stop_token", text)
    metrics: dict[str, Any] = {
        "payloads": 4,
        "pairs": 2,
        "by_signal": dict.fromkeys(names, gap),
        "by_kind": {"score": gap, "command": None, text: gap},
        "threshold": 2.5 if rater == "rubric" else 0.5,
        "above_threshold": {"payload": 2, "twin": 1},
    }
    run.add("curate.inject@1", metrics=metrics)
    scale = 1 if rater == "rubric" else 5
    both = [{"id": f"d/{n}/0", "first": 1.2 * n / scale, "second": float(n), "reply": text} for n in range(1, 5)]
    both.append({"id": "d/5/0", "first": None, "second": 4.5, "reply": text})
    metrics = {
        **{"sample": 5, "both_rated": 4, "unrated": {"first_too_long": 1}, "spearman": 1.0, "spearman_ci": [0.25, 1.0]},
        "thresholds": {"first": 2.5 / scale, "second": 4.0},
        "confusion": {"both_keep": 1, "first_keeps": 1, "second_keeps": 1, "neither": 2},
    }
    run.add("curate.agree@1", metrics=metrics, files={"both.jsonl": lines(both)})


def _curate(run: Run, text: str, made: list[Candidate], kept: int, common: Mapping[str, Any], rater: str) -> None:
    n = len(made)
    signals = (Signal(name="rubric", value=3.0), Signal(name="stop_token", value=-0.5), Signal(name=text, value=None))
    rated = [
        Rated(
            id=row.id,
            prompt=row.prompt,
            completion=row.completion,
            parents=row.parents,
            rating=1 + 0.5 * (number % 9),
            off_scale=0.1,
            reply=text,
            signals=signals[:1] if rater == "rubric" else signals,
            **common,
        )
        for number, row in enumerate(made)
    ]
    run.add("curate.rate@1", rows=rated, record=Rated, ledger={"in": n, "kept": n})
    best = sorted(rated, key=lambda row: -(row.rating or 0))[:kept]
    if rater == "calibrated":
        rated = [replace(row, probability=round(0.05 * (number + 1), 2)) for number, row in enumerate(rated)]
        best = rated[len(rated) - kept :]
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
