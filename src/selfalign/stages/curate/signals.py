"""Signals of a pair's quality: each a few lines over what the rater was asked, and nothing is asked twice.

x is the instruction, y the response; log-probabilities are the rater's, in nats. A new signal is a function here, and
its name in the recipe's `curate.signals`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from selfalign.core.errors import UsageError
from selfalign.core.protocols import STOP, Engine, Request, Score
from selfalign.core.records import Message
from selfalign.engines.config import ABILITIES, ModelConfig
from selfalign.stages.curate.rubric import RatingConfig, RatingPrompt, Verdict, rate
from selfalign.stages.prompting import chat, fill
from selfalign.text import overlap

Values = list[float | None]
Ability = Literal["choose", "likelihood"]

OVERLAP_NGRAM = 3


class Unit(NamedTuple):
    """A pair to be rated."""

    id: str
    instruction: str
    response: str


@dataclass(frozen=True)
class Readings:
    """What the rater said about some pairs. Each question is asked when the first signal wants it, and only then.

    `instruct` is the prompt of the backward direction.
    """

    units: Sequence[Unit]
    engine: Engine
    adapter: Path | None
    config: RatingConfig
    prompt: RatingPrompt
    instruct: str

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """The rubric's: one prefill a pair, and what the rater writes before its score, if it may."""
        return rate(self.engine, self.adapter, self.units, self.config, self.prompt)

    @cached_property
    def given(self) -> list[tuple[Score, Score] | None]:
        """y given x, without and with the end of the turn behind it: one prefill a pair."""
        asked = [(chat(unit.instruction), unit.response) for unit in self.units]
        found = self._scored(asked, ends=True)
        return [None if scores is None else (scores[0], scores[1]) for scores in found]

    @cached_property
    def alone(self) -> list[Score | None]:
        """y given an empty instruction: one prefill a response, whatever number of candidates it has."""
        return self._one([(chat(""), unit.response) for unit in self.units])

    @cached_property
    def backward(self) -> list[Score | None]:
        """x given y, asked as the backward model is."""
        return self._one([(chat(fill(self.instruct, response=unit.response)), unit.instruction) for unit in self.units])

    def _one(self, asked: Sequence[tuple[tuple[Message, ...], str]]) -> list[Score | None]:
        return [None if scores is None else scores[0] for scores in self._scored(asked, ends=False)]

    def _scored(self, asked: Sequence[tuple[tuple[Message, ...], str]], ends: bool) -> list[list[Score] | None]:
        keys = [(messages[0]["content"], text) for messages, text in asked]
        first = {key: n for n, key in reversed([*enumerate(keys)])}
        chosen = sorted(first.values())
        requests = [Request(self.units[n].id, asked[n][0]) for n in chosen]
        ways = [[asked[n][1], asked[n][1] + STOP] if ends else [asked[n][1]] for n in chosen]
        scores = dict(zip(chosen, self.engine.score(requests, ways, self.adapter), strict=True))
        return [scores[first[key]] for key in keys]


@dataclass(frozen=True)
class Signal:
    """A signal by its function, and what the engine must be able to do for it."""

    read: Callable[[Readings], Values]
    needs: Ability | None


SIGNALS: dict[str, Signal] = {}


def signal(needs: Ability | None) -> Callable[[Callable[[Readings], Values]], Callable[[Readings], Values]]:
    """Enter a function into SIGNALS under its own name."""

    def enter(read: Callable[[Readings], Values]) -> Callable[[Readings], Values]:
        SIGNALS[read.__name__] = Signal(read, needs)
        return read

    return enter


@signal("choose")
def rubric(readings: Readings) -> Values:
    """The rating, 1..5: Σ g·p(g) / Σ p(g) over the grades g after the cue (G-Eval, arXiv 2303.16634)."""
    return [verdict["rating"] for verdict in readings.verdicts]


@signal("choose")
def entropy(readings: Readings) -> Values:
    """How undecided the rating is: −Σ q·log q, with q the probabilities of the five grades, renormalised."""
    return [verdict["entropy"] for verdict in readings.verdicts]


@signal("choose")
def off_scale(readings: Readings) -> Values:
    """1 − Σ p(g): the probability of all that is no grade."""
    return [verdict["off_scale"] for verdict in readings.verdicts]


@signal("likelihood")
def likelihood_gain(readings: Readings) -> Values:
    """log p(y|x) − log p(y): how much the instruction tells of the response.

    Their pointwise mutual information (Church and Hanks, Computational Linguistics 16, 1990). Low for a swapped
    response; it prefers an instruction that repeats the response.
    """
    return [_gain(given, alone) for given, alone in zip(readings.given, readings.alone, strict=True)]


@signal("likelihood")
def likelihood_gain_per_token(readings: Readings) -> Values:
    """likelihood_gain divided by the tokens of y: a difference of losses, where arXiv 2308.12032 takes their ratio."""
    gains = likelihood_gain(readings)
    return [
        None if gain is None or given is None or not given[0].tokens else gain / given[0].tokens
        for gain, given in zip(gains, readings.given, strict=True)
    ]


@signal("likelihood")
def stop_token(readings: Readings) -> Values:
    """log p(stop | x, y): whether the response has said all. Low for a response that was cut off."""
    return [None if given is None else given[1].log_prob - given[0].log_prob for given in readings.given]


@signal("likelihood")
def backward_likelihood(readings: Readings) -> Values:
    """log p(x|y) a token: whether the response answers just this (the reverse model of arXiv 1510.03055).

    Under the rater, not under the model that wrote x, which finds all that it wrote likely.
    """
    return [None if score is None or not score.tokens else score.log_prob / score.tokens for score in readings.backward]


@signal(None)
def ngram_overlap(readings: Readings) -> Values:
    """Share of x's word 3-grams that stand in y, 0..1: high where an instruction repeats the response."""
    return [overlap.ngram_overlap(unit.instruction, unit.response, OVERLAP_NGRAM) for unit in readings.units]


def _gain(given: tuple[Score, Score] | None, alone: Score | None) -> float | None:
    return None if given is None or alone is None else given[0].log_prob - alone.log_prob


def measured(readings: Readings, names: Iterable[str]) -> dict[str, Values]:
    """The values of the named signals, a list each in the order of the pairs."""
    return {name: [_rounded(value) for value in SIGNALS[name].read(readings)] for name in names}


def _rounded(value: float | None) -> float | None:
    # Half precision may overflow. Rounding hides the last bits, which differ between a row in a batch and one alone.
    return round(value, 4) if value is not None and math.isfinite(value) else None


NEEDS: dict[Ability, str] = {"choose": "choose among grades", "likelihood": "tell how likely a given text is"}


def refuse_unable(model: ModelConfig, names: Iterable[str]) -> None:
    """Raise UsageError where the rater's engine lacks what a signal needs."""
    for name in names:
        needs = SIGNALS[name].needs
        if needs is not None and needs not in ABILITIES[model.engine]:
            raise UsageError(
                f"curate.signals: {name} needs an engine that can {NEEDS[needs]}, and model.engine={model.engine} "
                "cannot; leave that signal out, or take another engine"
            )
