"""Measure a model on held-out pairs and on questions with known answers, with intervals and beside the base."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, model_validator

from selfalign.core.frozen import Frozen, RecipePath
from selfalign.core.ledger import Ledger
from selfalign.core.protocols import Engine, Request, Sampling
from selfalign.core.records import Message, Pair, SeedPair
from selfalign.core.stage import BuildStage, Built, Context, Log, Place, Settings
from selfalign.engines.config import ModelConfig
from selfalign.evaluation.metrics import (
    contains_match,
    exact_match,
    mean_interval,
    paired_difference,
    proportion_interval,
    rouge_l,
)
from selfalign.stages.jsonl import read_checked, read_lines, write_lines
from selfalign.stages.judge import JudgeConfig
from selfalign.stages.models import model_at, open_model
from selfalign.stages.prompting import chat, fill

Direction = Literal["backward", "forward"]


class EvaluateConfig(Frozen):
    """What is measured beside the held-out loss, which every recipe gets."""

    forward_questions: Annotated[str | None, RecipePath] = None
    backward_questions: Annotated[str | None, RecipePath] = None
    system: str | None = None
    max_new_tokens: PositiveInt = 256
    samples: PositiveInt = Field(5, description="held-out pairs whose replies are written for people")
    replies: NonNegativeInt = Field(
        0, description="at least so many replies to held-out pairs are compared with what people wrote, by ROUGE-L"
    )
    judge: JudgeConfig | None = None
    min_gain: float | None = None

    @property
    def replied(self) -> int:
        """How many held-out pairs get a reply."""
        return max(self.samples, self.replies)

    @model_validator(mode="after")
    def _judge_has_replies(self) -> "EvaluateConfig":
        if self.judge is not None and not self.replies:
            raise ValueError("judge compares replies to held-out pairs: set replies to their number too, such as 100")
        return self


class Question(Frozen):
    """A prompt with its answer: one of `answers` exactly, or all of `contains` and none of `excludes`."""

    prompt: str
    answers: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _can_be_wrong(self) -> "Question":
        phrases = (*self.answers, *self.contains, *self.excludes)
        if not phrases or not all(phrase.strip() for phrase in phrases):
            raise ValueError("a question needs answers, contains or excludes, and none of them empty")
        if self.answers and (self.contains or self.excludes):
            raise ValueError("answers are matched exactly, so contains and excludes go with other questions")
        return self

    def is_right(self, reply: str) -> bool:
        """Whether a reply answers it."""
        if self.answers:
            return exact_match(reply, self.answers)
        return contains_match(reply, self.contains, self.excludes)


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSONL file. Raises UsageError with file and line: a test must be whole or not run."""
    return [question for _, question in read_checked(path, Question, "the questions in")]


@dataclass(frozen=True)
class Evaluate(BuildStage):
    """Held-out loss, matches on questions, and replies: some to read, or more to be compared with what people wrote.

    Inputs: `model` and, for an adapter, `adapter`; `seed`, the picked pairs; `questions` if there are any; `base`,
    the same measurement of the base, and `before`, that of the round before. With `epoch`, the model is the one that
    its training kept of that epoch, from 1.
    """

    name: ClassVar[str] = "evaluate"
    config: EvaluateConfig
    model: ModelConfig
    direction: Direction
    template: str = field(default="{response}")
    may_stop: bool = False
    epoch: int | None = None

    def settings(self) -> Settings:
        settings: dict[str, Frozen | JsonValue] = {
            "direction": self.direction,
            "max_new_tokens": self.config.max_new_tokens,
            "samples": self.config.replied,
            "engine": dict(self.model.loading()),
        }
        if self.direction == "backward":
            settings["template"] = self.template
        else:
            settings["system"] = self.config.system
        if self.may_stop:
            settings["min_gain"] = self.config.min_gain
        if self.epoch is not None:
            settings["epoch"] = self.epoch
        if self.config.replies:
            settings["rouge_l"] = True
        return settings

    def build(self, context: Context, place: Place, log: Log) -> Built:
        engine, adapter = self._open(context)
        tokens = engine.tokens
        pairs = [pair for pair in context.rows("seed", SeedPair) if pair.split == "held_out"]
        losses, unmeasured = self._losses(engine, adapter, pairs)
        questions = read_questions(context.path("questions")) if "questions" in context.inputs else []
        right, replies = self._answers(engine, adapter, questions, pairs)
        likeness = self._likeness(pairs, replies) if self.config.replies else {}
        base = _rows(context, "base")
        ledger = Ledger(len(pairs), len(pairs), len(losses), unmeasured)
        metrics: dict[str, JsonValue] = {
            "held_out": {**_mean("nats_per_token", losses), "unmeasured": dict(unmeasured)},
            "exact_match": _share(right) if questions else None,
            "against_base": _differences(Measured(losses, right, likeness), base) if base else None,
        }
        if self.config.replies:
            metrics["rouge_l"] = _mean("mean", likeness)
        write_lines(place.draft / "held_out.jsonl", [{"id": id, "nats_per_token": loss} for id, loss in losses.items()])
        write_lines(place.draft / "replies.jsonl", replies)
        (place.draft / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True))
        before = _rows(context, "before")
        stop = self._stop(losses, right, before) if self.may_stop and before else None
        names = ("held_out.jsonl", "replies.jsonl", "metrics.json")
        return Built(names, ledger, metrics, engine.tokens - tokens, stop)

    def _open(self, context: Context) -> tuple[Engine, Path | None]:
        if self.epoch is None:
            return open_model(self.model, context)
        from selfalign.engines.open import open_engine

        model, kept = model_at(self.model, context), f"epoch-{self.epoch}"
        if "adapter" in context.inputs:
            return open_engine(model), context.path("adapter") / kept
        return open_engine(model.model_copy(update={"path": str(context.path("model") / kept)})), None

    def _prompt(self, text: str) -> tuple[Message, ...]:
        if self.direction == "backward":
            return chat(fill(self.template, response=text))
        return chat(text, self.config.system)

    def _losses(
        self, engine: Engine, adapter: Path | None, pairs: Sequence[Pair]
    ) -> tuple[dict[str, float], Counter[str]]:
        """Nats a token of each held-out completion (of the instruction, when backward), and why some have none."""
        asked = [(p.completion, p.prompt) if self.direction == "backward" else (p.prompt, p.completion) for p in pairs]
        requests = [Request(p.id, self._prompt(a)) for p, (a, _) in zip(pairs, asked, strict=True)]
        scores = engine.score(requests, [[answer] for _, answer in asked], adapter)
        losses: dict[str, float] = {}
        unmeasured: Counter[str] = Counter()
        for pair, score in zip(pairs, scores, strict=True):
            if score is None or not score[0].tokens:
                unmeasured["too_long" if score is None else "no_tokens"] += 1
            elif not math.isfinite(score[0].log_prob):
                unmeasured["not_finite"] += 1
            else:
                losses[pair.id] = round(-score[0].log_prob / score[0].tokens, 5)
        return losses, unmeasured

    def _answers(
        self, engine: Engine, adapter: Path | None, questions: Sequence[Question], pairs: Sequence[Pair]
    ) -> tuple[dict[str, float], list[dict[str, JsonValue]]]:
        """Whether each question was answered right, and all replies; without questions, some to held-out prompts."""
        side = "completion" if self.direction == "backward" else "prompt"
        prompts = {f"question/{n:05d}": question.prompt for n, question in enumerate(questions)}
        prompts |= {pair.id: getattr(pair, side) for pair in pairs[: self.config.replied]}
        sampling = Sampling(temperature=0, top_p=1, max_new_tokens=self.config.max_new_tokens)
        requests = [Request(id, self._prompt(text)) for id, text in prompts.items()]
        written = dict(zip(prompts, engine.generate(requests, sampling, adapter), strict=True))
        right = {
            f"question/{n:05d}": float(question.is_right(written[f"question/{n:05d}"].text))
            for n, question in enumerate(questions)
        }
        replies: list[dict[str, JsonValue]] = [
            {"id": id, "prompt": prompts[id], "reply": reply.text, "finish": reply.finish, "right": right.get(id)}
            for id, reply in written.items()
        ]
        return right, replies

    def _likeness(self, pairs: Sequence[Pair], replies: Sequence[dict[str, JsonValue]]) -> dict[str, float]:
        """ROUGE-L of each held-out reply against what people wrote, entered into its row too."""
        truth = {pair.id: pair.prompt if self.direction == "backward" else pair.completion for pair in pairs}
        found: dict[str, float] = {}
        for row in replies:
            id, text = str(row["id"]), str(row["reply"])
            # A prompt that left no room for a reply has an empty one, which counts: it is like nothing.
            if row["right"] is None:
                row["rouge_l"] = found[id] = round(rouge_l(text, truth[id]), 5)
        return found

    def _stop(self, losses: Mapping[str, float], right: Mapping[str, float], before: "Measured") -> str | None:
        """Why the rounds should end: this one is not better than the one before by `evaluate.min_gain`."""
        if self.config.min_gain is None:
            return None
        now, then = (right, before.right) if right else (losses, before.losses)
        shared = sorted(now.keys() & then.keys())
        if not shared:
            return None
        gain = sum(now[id] - then[id] for id in shared) / len(shared) * (1 if right else -1)
        if gain >= self.config.min_gain:
            return None
        what = "exact match" if right else "held-out loss"
        return f"{what} gained {gain:+.4f} on the round before, evaluate.min_gain is {self.config.min_gain}"


@dataclass(frozen=True)
class Measured:
    """The rows of an evaluation, by id."""

    losses: Mapping[str, float]
    right: Mapping[str, float]
    rouge_l: Mapping[str, float]


def _rows(context: Context, role: str) -> Measured | None:
    if role not in context.inputs:
        return None
    folder = context.path(role)
    losses = {row["id"]: row["nats_per_token"] for row in read_lines(folder / "held_out.jsonl")}
    replies = read_lines(folder / "replies.jsonl")
    right = {row["id"]: row["right"] for row in replies if row["right"] is not None}
    return Measured(losses, right, {row["id"]: row["rouge_l"] for row in replies if "rouge_l" in row})


def _differences(model: Measured, base: Measured) -> dict[str, JsonValue]:
    """This model minus the base, paired by row."""
    found: dict[str, JsonValue] = {}
    for name, now, then in (
        ("held_out", model.losses, base.losses),
        ("exact_match", model.right, base.right),
        ("rouge_l", model.rouge_l, base.rouge_l),
    ):
        shared = sorted(now.keys() & then.keys())
        if shared:
            gap = paired_difference([now[id] for id in shared], [then[id] for id in shared])
            found[name] = {"difference": round(gap.mean, 4), "ci": gap.interval.rounded(), "n": gap.n}
    return found


def _mean(name: str, rows: Mapping[str, float]) -> dict[str, JsonValue]:
    values = list(rows.values())
    if not values:
        return {name: None, "ci": None, "n": 0}
    return {name: round(sum(values) / len(values), 4), "ci": mean_interval(values).rounded(), "n": len(values)}


def _share(right: Mapping[str, float]) -> dict[str, JsonValue]:
    hits, n = int(sum(right.values())), len(right)
    return {"share": round(hits / n, 4), "ci": proportion_interval(hits, n).rounded(), "n": n}
