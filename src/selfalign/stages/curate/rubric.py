"""The rubric: what the rater is asked about a pair, and how its rating is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from pydantic import Field, JsonValue, NonNegativeInt, model_validator

from selfalign.core.errors import UsageError
from selfalign.core.frozen import Frozen, RecipePath
from selfalign.core.protocols import Engine, Request, Sampling, Score
from selfalign.core.records import Message
from selfalign.engines.config import ModelConfig
from selfalign.stages.curate.parse import parse
from selfalign.stages.jsonl import read_checked
from selfalign.stages.prompting import chat, fill, prompt_text

GRADES = (1, 2, 3, 4, 5)
CUE = "\nScore:"
CONTINUATIONS = tuple(f" {grade}" for grade in GRADES)
# Room for the score line itself, behind the reasoning.
SCORE_LINE_TOKENS = 16


class RaterConfig(Frozen):
    """Who rates, and by what: the model of the round before (M0 in round 1), the base, or another one by folder or Hub
    name; by the rubric's rating alone, or by several signals whose worth is fitted on planted pairs."""

    kind: Literal["rubric", "calibrated"] = "rubric"
    model: Annotated[str, RecipePath("previous", "base")] = "previous"
    revision: str | None = None
    chat_template: Annotated[str | None, RecipePath("plain", "chatml")] = Field(
        None, description="its own where it is null"
    )

    @model_validator(mode="after")
    def _of_another_model(self) -> "RaterConfig":
        if self.model in ("previous", "base") and (self.revision or self.chat_template):
            raise ValueError(
                f"revision and chat_template are those of a rater of its own, and model={self.model} brings its own; "
                "leave them out, or name the model by path"
            )
        return self


class RatingConfig(Frozen):
    """Who rates, what is asked, and how it is read."""

    rater: RaterConfig = RaterConfig()
    prompt_file: Annotated[str | None, RecipePath] = Field(
        None, description="with {instruction} and {response}; what stands above a line --- is said once"
    )
    few_shot_file: Annotated[str | None, RecipePath] = Field(
        None, description="JSONL of instruction, response and the rater's reply"
    )
    layout: Literal["as_written", "response_first"] = Field(
        "as_written", description="response_first: candidates of one document share its tokens, too"
    )
    reasoning_tokens: NonNegativeInt = Field(0, description="how much the rater may write before the score")
    readout: Literal["expected", "parsed"] = Field(
        "expected", description='the mean over "1".."5" in one prefill, or the score that it writes'
    )
    max_off_scale: float = Field(0.5, ge=0, le=1, description="more probability off the scale: unrated")

    @model_validator(mode="after")
    def _room_to_write(self) -> "RatingConfig":
        if self.readout == "parsed" and self.reasoning_tokens == 0:
            raise ValueError("readout: parsed reads what the rater writes, so reasoning_tokens must be above 0")
        return self


class Verdict(TypedDict):
    """The rating columns of a `Rated` row."""

    rating: float | None
    unrated: str | None
    rating_dist: tuple[float, ...]
    off_scale: float | None
    entropy: float | None
    reply: str


@dataclass(frozen=True)
class RatingPrompt:
    """What the rater is asked: the rubric and the examples first, since all pairs share them, then the pair."""

    rubric: str
    pair: str
    few_shot: tuple[tuple[str, str, str], ...] = ()

    @staticmethod
    def of(config: RatingConfig) -> "RatingPrompt":
        """The prompt that the recipe names, or ours."""
        text = prompt_text(config.prompt_file, "rate", ("instruction", "response"))
        rubric, _, pair = text.rpartition("\n---\n")
        if config.layout == "response_first":
            pair = _response_first(pair)
        return RatingPrompt(rubric, pair, _few_shot(config.few_shot_file))

    def settings(self) -> dict[str, JsonValue]:
        """Its texts, for identity."""
        return {"rubric": self.rubric, "pair": self.pair, "few_shot": [[*shot] for shot in self.few_shot]}

    def messages(self, instruction: str, response: str) -> tuple[Message, ...]:
        """The prompt for one pair, up to where the rater begins its reply."""
        turns: list[Message] = []
        for question, answer, reply in self.few_shot:
            turns += chat(fill(self.pair, instruction=question, response=answer))
            turns.append(Message(role="assistant", content=reply))
        turns += chat(fill(self.pair, instruction=instruction, response=response))
        if self.rubric:
            turns[0] = Message(role="user", content=f"{self.rubric}\n\n{turns[0]['content']}")
        return tuple(turns)


def _response_first(pair: str) -> str:
    """The paragraph of the response before that of the instruction."""
    paragraphs = pair.split("\n\n")
    places = [[n for n, text in enumerate(paragraphs) if f"{{{name}}}" in text] for name in ("instruction", "response")]
    if any(len(found) != 1 for found in places) or places[0] == places[1]:
        raise UsageError(
            "curate.layout=response_first needs a prompt in which {instruction} and {response} stand once each, in "
            "paragraphs of their own (separated by an empty line)"
        )
    (instruction,), (response,) = places
    if response > instruction:
        paragraphs[instruction], paragraphs[response] = paragraphs[response], paragraphs[instruction]
    return "\n\n".join(paragraphs)


class _Shot(Frozen):
    instruction: str
    response: str
    reply: str


def _few_shot(file: str | None) -> tuple[tuple[str, str, str], ...]:
    if file is None:
        return ()
    shots = read_checked(Path(file), _Shot, "curate.few_shot_file:")
    for number, shot in shots:
        if parse(shot.reply) is None:
            raise UsageError(
                f"{file}:{number}: the example's reply carries no rating; end it with a line `Score: 1` to `Score: 5`"
            )
    return tuple((shot.instruction, shot.response, shot.reply) for _, shot in shots)


def rate(
    engine: Engine,
    adapter: Path | None,
    pairs: Sequence[tuple[str, str, str]],
    config: RatingConfig,
    prompt: RatingPrompt,
) -> list[Verdict]:
    """Rate pairs of (id, instruction, response), in order. No pair gets a rating by default.

    `expected` is the mean of 1..5 under the next-token distribution after the cue, renormalised over the five
    (G-Eval, arXiv 2303.16634), after at most `reasoning_tokens` tokens of one line of reasoning. `parsed` is the
    paper's: the rater writes, and its last `Score:` line counts (arXiv 2308.06259, table 1).
    """
    requests = [Request(id, prompt.messages(instruction, response)) for id, instruction, response in pairs]
    if config.readout == "parsed":
        return _parsed(engine, adapter, requests, config.reasoning_tokens + SCORE_LINE_TOKENS)
    openings = [""] * len(requests)
    cut = [False] * len(requests)
    if config.reasoning_tokens:
        sampling = Sampling(temperature=0, max_new_tokens=config.reasoning_tokens, stop=("\n",))
        replies = engine.generate(requests, sampling, adapter)
        openings = [reply.text.strip() for reply in replies]
        cut = [reply.finish == "too_long" for reply in replies]
    # Where nothing was written before it, the score line is the first, with no line end before it.
    cued = [f"{opening}{CUE}".lstrip("\n") for opening in openings]
    asked = [
        Request(request.id, (*request.messages, Message(role="assistant", content=text)))
        for request, text in zip(requests, cued, strict=True)
    ]
    scores = engine.score(asked, [CONTINUATIONS] * len(asked), adapter)
    # A pair that left no room for the reasoning is unrated, though its score alone would fit.
    return [
        _expected(None if no_room else score, opening)
        for score, opening, no_room in zip(scores, openings, cut, strict=True)
    ]


def _parsed(engine: Engine, adapter: Path | None, requests: Sequence[Request], tokens: int) -> list[Verdict]:
    sampling = Sampling(temperature=0, max_new_tokens=tokens)
    verdicts = []
    for reply in engine.generate(requests, sampling, adapter):
        rating = parse(reply.text)
        unrated = None if rating is not None else "too_long" if reply.finish == "too_long" else "unparsed"
        verdicts.append(_verdict(rating, unrated, reply=reply.text))
    return verdicts


def _expected(scores: Sequence[Score] | None, reply: str) -> Verdict:
    if scores is None:
        return _verdict(None, "too_long", reply=reply)
    dist = [math.exp(score.log_prob) for score in scores]
    on_scale = sum(dist)
    # NaN too, which a half-precision overflow gives, and which no threshold would stop.
    if not 0 < on_scale < math.inf:
        return _verdict(None, "off_scale", off_scale=1.0, reply=reply)
    shares = [p / on_scale for p in dist]
    rating = sum(grade * share for grade, share in zip(GRADES, shares, strict=True))
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    # Rounding hides the last bits, which differ between a row that ran in a batch and one that ran alone.
    return Verdict(
        rating=round(rating, 4),
        unrated=None,
        rating_dist=tuple(round(p, 6) for p in dist),
        off_scale=round(max(0.0, 1 - on_scale), 4),
        entropy=round(entropy, 4),
        reply=reply,
    )


def _verdict(rating: float | None, unrated: str | None, off_scale: float | None = None, reply: str = "") -> Verdict:
    return Verdict(rating=rating, unrated=unrated, rating_dist=(), off_scale=off_scale, entropy=None, reply=reply)


def rating_settings(config: RatingConfig, model: ModelConfig, prompt: RatingPrompt) -> dict[str, JsonValue]:
    """What decides a rating: thresholds and gates do not. The layout is in the prompt."""
    return {
        **prompt.settings(),
        "reasoning_tokens": config.reasoning_tokens,
        "readout": config.readout,
        "engine": dict(model.loading()),
    }
