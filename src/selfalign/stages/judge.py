"""Hold a model's replies against the base's: a judge compares them pair by pair."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field, JsonValue, model_validator

from selfalign.core.frozen import Frozen, RecipePath
from selfalign.core.ledger import Ledger
from selfalign.core.records import Message
from selfalign.core.stage import BuildStage, Built, Context, Log, Place, Settings
from selfalign.engines.config import ModelConfig
from selfalign.evaluation.judge import Duel, Judgement, judge, tally
from selfalign.stages.jsonl import read_lines, write_lines
from selfalign.stages.models import open_model
from selfalign.stages.prompting import chat, fill, prompt_text


class JudgeConfig(Frozen):
    """Who says which of two replies is better: the base, or another model by folder or Hub name."""

    model: Annotated[str, RecipePath("base")]
    revision: str | None = None
    chat_template: Annotated[str | None, RecipePath("plain", "chatml")] = Field(
        None, description="its own where it is null"
    )
    prompt_file: Annotated[str | None, RecipePath] = Field(None, description="with {instruction}, {first}, {second}")
    max_off_scale: float = Field(0.5, ge=0, le=1, description="more probability on neither answer: unjudged")

    @model_validator(mode="after")
    def _of_another_model(self) -> "JudgeConfig":
        if self.model == "base" and (self.revision or self.chat_template):
            raise ValueError(
                "revision and chat_template are those of a judge of its own, and model=base brings its own"
            )
        return self


@dataclass(frozen=True)
class Judge(BuildStage):
    """The replies of two evaluations to the same held-out prompts, compared in both orders.

    Inputs: `now` and `base`, the evaluations; `model`, the judge's.
    """

    name: ClassVar[str] = "evaluate.judge"
    config: JudgeConfig
    model: ModelConfig
    prompt: str = field(init=False)

    def __post_init__(self) -> None:
        # Read once, here: a file that changes while the run goes on must not slip under an identity made before.
        text = prompt_text(self.config.prompt_file, "judge", ("instruction", "first", "second"))
        object.__setattr__(self, "prompt", text)

    def settings(self) -> Settings:
        engine: dict[str, JsonValue] = {**self.model.loading()}
        return {"prompt": self.prompt, "max_off_scale": self.config.max_off_scale, "engine": engine}

    def build(self, context: Context, place: Place, log: Log) -> Built:
        now, base = _held_out(context, "now"), _held_out(context, "base")
        duels = [Duel(id, row["prompt"], row["reply"], base[id]["reply"]) for id, row in now.items()]
        # A prompt that left no room for a reply says nothing about either model.
        silent = {duel.id for duel in duels if "too_long" in (now[duel.id]["finish"], base[duel.id]["finish"])}
        engine, adapter = open_model(self.model, context)
        tokens = engine.tokens
        told = [Judgement(id, None, unjudged="no_reply") for id in sorted(silent)]
        judged = [duel for duel in duels if duel.id not in silent]
        told += judge(engine, adapter, judged, self._render, self.config.max_off_scale)
        by_id = {each.id: each for each in told}
        write_lines(place.draft / "judged.jsonl", [_row(duel, by_id[duel.id]) for duel in duels])
        metrics = tally(told)
        (place.draft / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True))
        unjudged = Counter(each.unjudged for each in told if each.unjudged is not None)
        ledger = Ledger(len(duels), len(duels), len(duels) - unjudged.total(), unjudged)
        return Built(("judged.jsonl", "metrics.json"), ledger, metrics, engine.tokens - tokens)

    def _render(self, instruction: str, first: str, second: str) -> tuple[Message, ...]:
        return chat(fill(self.prompt, instruction=instruction, first=first, second=second))


def _held_out(context: Context, role: str) -> dict[str, dict[str, Any]]:
    """The replies to held-out prompts, by id: questions have an answer already."""
    return {row["id"]: row for row in read_lines(context.path(role) / "replies.jsonl") if row["right"] is None}


def _row(duel: Duel, found: Judgement) -> dict[str, Any]:
    return {
        "id": duel.id,
        "prompt": duel.prompt,
        "ours": duel.ours,
        "base": duel.theirs,
        "preference": found.preference,
        "verdict": found.verdict,
        "orders": found.orders,
        "off_scale": found.off_scale,
        "unjudged": found.unjudged,
    }
