"""Which forward passes a call to score needs: as few tokens as possible, planned on token ids alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from selfalign.core.protocols import Score
from selfalign.engines.chat import common_prefix

if TYPE_CHECKING:
    from torch import Tensor

SHORTEST_PREFIX = 32
"""Tokens below which a shared beginning is not worth a forward pass of its own."""

WIDEST_GROUP = 256
"""Rows that share one beginning at most, so that planning stays linear in the rows."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One forward pass and what to read from it: each of `tails` begins after the last token of `context`.

    `tails` go by their numbers among the continuations of request number `request`.
    """

    request: int
    context: list[int]
    tokens: list[int]
    tails: list[tuple[int, list[int]]]

    def positions(self, shared: int) -> list[int]:
        """Where the logits of the tails stand, counted from token `shared` on."""
        return list(range(len(self.context) - 1 - shared, len(self.tokens) - shared))

    def read(self, logits_LV: "Tensor") -> list[tuple[int, Score]]:
        """Each tail's number and Score from the logits at `positions`."""
        logits_LV = logits_LV.float()
        total_L = logits_LV.logsumexp(-1)
        return [
            (way, Score(float((logits_LV[range(len(tail)), tail] - total_L[: len(tail)]).double().sum()), len(tail)))
            for way, tail in self.tails
        ]


def readings(request: int, context: list[int], tails: Sequence[list[int]]) -> list[Reading]:
    """The passes from which all of `tails` can be read, each after `context`.

    A tail is read where all but its last token went before. So options of one token each need no token of their own,
    and a text and the same text with its end need one pass.
    """
    found: list[Reading] = []
    # What begins others comes after them in this order, with nothing else between.
    for way in sorted((way for way, tail in enumerate(tails) if tail), key=lambda way: tails[way][:-1], reverse=True):
        before = context + tails[way][:-1]
        if not found or found[-1].tokens[: len(before)] != before:
            found.append(Reading(request, context, before, []))
        found[-1].tails.append((way, tails[way]))
    return found


def groups(rows: Sequence[list[int]], pass_tokens: int) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Which rows are left alone, and which begin alike, as (how many tokens they share, their numbers).

    Chosen so that most tokens are saved, where sharing costs one more forward pass, which is as dear as `pass_tokens`.
    """
    order = sorted(range(len(rows)), key=lambda row: rows[row])
    alike = [common_prefix([rows[one], rows[other]]) for one, other in pairwise(order)]
    # For the first n rows in this order: what can be saved, where their last group begins, and what it shares.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(rows) + 1):
        choices, shared = [(best[-1][0], end - 1, 0)], len(rows[order[end - 1]])
        for begin in range(end - 2, max(0, end - WIDEST_GROUP) - 1, -1):
            shared = min(shared, alike[begin])
            if shared < SHORTEST_PREFIX:
                break
            choices.append((best[begin][0] + shared * (end - begin - 1) - pass_tokens, begin, shared))
        best.append(max(choices, key=lambda choice: choice[0]))
    alone: list[int] = []
    found: list[tuple[int, list[int]]] = []
    end = len(rows)
    while end:
        _, begin, shared = best[end]
        if shared:
            found.append((shared, order[begin:end]))
        else:
            alone.append(order[begin])
        end = begin
    return alone, found
