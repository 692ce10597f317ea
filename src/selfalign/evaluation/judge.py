"""A judge of two replies to one prompt, asked in both orders, so that a liking for a place cancels out."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from selfalign.core.protocols import Engine, Request, Score
from selfalign.core.records import Message
from selfalign.evaluation.metrics import mean_interval

# After it hardly anything but a letter is likely. After "Better:" SmolLM2-135M put 97% on neither.
CUE = "The better one is Answer"
OPTIONS = (" A", " B")

Render = Callable[[str, str, str], tuple[Message, ...]]
"""The judge's prompt for a request and the answers that stand first and second."""


@dataclass(frozen=True, slots=True)
class Duel:
    """Two replies to one prompt."""

    id: str
    prompt: str
    ours: str
    theirs: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the judge said of a duel.

    `orders` are the probabilities, 0..1, that it prefers our reply: where that stands first, and where it stands
    second; None where it was not asked. `preference` is their mean, .5 for replies that are alike, and None for the
    reason `unjudged`. `off_scale` is the probability of neither answer, the larger one of the two orders.
    """

    id: str
    preference: float | None
    orders: tuple[float, float] | None = None
    off_scale: float | None = None
    unjudged: str | None = None

    @property
    def verdict(self) -> Literal["win", "tie", "loss"] | None:
        """A win or a loss in both orders, else a tie (Zheng et al., arXiv 2306.05685, section 3.4)."""
        if self.preference is None:
            return None
        low, high = sorted(self.orders or (0.5, 0.5))
        return "win" if low > 0.5 else "loss" if high < 0.5 else "tie"

    @property
    def consistent(self) -> bool:
        """Whether both orders say the same."""
        return self.orders is not None and len({(share > 0.5) - (share < 0.5) for share in self.orders}) == 1


def judge(
    engine: Engine, adapter: Path | None, duels: Sequence[Duel], render: Render, max_off_scale: float
) -> list[Judgement]:
    """Ask for each duel in both orders, by the probabilities of "A" and "B" after the cue; replies alike are a tie.

    No duel gets a verdict by default: where a prompt leaves no room, or where an order puts more than `max_off_scale`
    of the probability on neither answer, it has none.
    """
    asked = [duel for duel in duels if not _alike(duel)]
    opening = Message(role="assistant", content=CUE)
    requests = [
        Request(duel.id, (*render(duel.prompt, *answers), opening))
        for duel in asked
        for answers in ((duel.ours, duel.theirs), (duel.theirs, duel.ours))
    ]
    scores = engine.score(requests, [OPTIONS] * len(requests), adapter)
    told = {duel.id: read(duel.id, scores[2 * n], scores[2 * n + 1], max_off_scale) for n, duel in enumerate(asked)}
    return [told[duel.id] if duel.id in told else Judgement(duel.id, 0.5) for duel in duels]


def _alike(duel: Duel) -> bool:
    return duel.ours.strip() == duel.theirs.strip()


def read(id: str, first: Sequence[Score] | None, second: Sequence[Score] | None, max_off_scale: float) -> Judgement:
    """The judgement from the scores of "A" and "B", where our reply stood first and where it stood second."""
    if first is None or second is None:
        return Judgement(id, None, unjudged="too_long")
    shares_OA = [[math.exp(score.log_prob) for score in scores] for scores in (first, second)]
    # NaN fails the comparison too, which a half-precision overflow gives, and which no threshold would stop.
    if not all(sum(shares) > 0 for shares in shares_OA):
        return Judgement(id, None, off_scale=1.0, unjudged="off_scale")
    # Rounding hides the last bits, which differ between a row that ran in a batch and one that ran alone.
    off_scale = round(max(0.0, *(1 - sum(shares) for shares in shares_OA)), 4)
    if off_scale > max_off_scale:
        return Judgement(id, None, off_scale=off_scale, unjudged="off_scale")
    (a, b), (c, d) = shares_OA
    orders = round(a / (a + b), 4), round(d / (c + d), 4)
    return Judgement(id, round(sum(orders) / 2, 4), orders, off_scale)


def tally(judgements: Sequence[Judgement]) -> dict[str, JsonValue]:
    """The judgements as figures: `win_rate` is the mean preference, with its 95% interval.

    (By probability, as AlpacaEval weighs wins, arXiv 2404.04475.) Wins, ties and losses are those of both orders. Over
    the duels that were asked and judged, `consistent` is the share whose orders say the same, and `first_position`
    the mean probability of the answer that stood first: .5 is no liking for a place. `unjudged` counts by reason.
    """
    preferences = [each.preference for each in judgements if each.preference is not None]
    asked = [each.orders for each in judgements if each.orders is not None]
    verdicts = Counter(each.verdict for each in judgements)
    n = len(preferences)
    return {
        "win_rate": round(sum(preferences) / n, 4) if n else None,
        "ci": mean_interval(preferences).rounded() if n else None,
        "wins": verdicts["win"],
        "ties": verdicts["tie"],
        "losses": verdicts["loss"],
        "alike": n - len(asked),
        "consistent": round(sum(each.consistent for each in judgements) / len(asked), 4) if asked else None,
        "first_position": round(sum(a + 1 - b for a, b in asked) / 2 / len(asked), 4) if asked else None,
        "n": n,
        "unjudged": dict(sorted(Counter(each.unjudged for each in judgements if each.unjudged).items())),
    }
