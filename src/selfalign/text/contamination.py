"""Decontamination: which text of an evaluation set stands in a training text, so that its score is earned.

The overlap is that of GPT-3 (arXiv 2005.14165, appendix C): 13 words in a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfalign.text.overlap import normalised, words

NGRAM = 13
# Shorter evaluation texts are never looked for: labels ("Yes"), titles ("The Great Gatsby") and requests of four words
# ("Answer the following question.") come up by chance.
SHORTEST = 5

# Any odd number with its bits well mixed: equal hashes are compared word by word.
_BASE = 0x9E3779B97F4A7C15
_POWERS = np.array([pow(_BASE, k, 2**64) for k in range(NGRAM)], dtype=np.uint64)
_UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Match:
    """What a text shares with the evaluation text `name`: `words`, in the spelling of overlap.words."""

    name: str
    words: str

    def __str__(self) -> str:
        return f"{self.name}: {self.words}"


class Contamination:
    """Evaluation texts to look for, as (name, text). Picklable; 20 bytes a word, and their distinct words.

    A text of 13 words or more is found wherever 13 of its words stand in a row. One of 5 to 12 words is found only
    where it is the whole other text, but for case, spacing and final punctuation. A shorter one is not looked for.
    """

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        self._names: list[str] = []
        self._whole: dict[str, str] = {}
        self._vocabulary: dict[str, int] = {}
        tokens: list[NDArray[np.int32]] = []
        starts: list[NDArray[np.int64]] = []
        ends = [0]
        for name, text in texts:
            own = words(text)
            if len(own) >= NGRAM:
                ids = [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in own]
                self._names.append(name)
                tokens.append(np.array(ids, dtype=np.int32))
                starts.append(np.arange(ends[-1], ends[-1] + len(own) - NGRAM + 1))
                ends.append(ends[-1] + len(own))
            elif len(own) >= SHORTEST:
                self._whole.setdefault(normalised(text), name)
        self._tokens = np.concatenate([*tokens, np.empty(0, dtype=np.int32)])
        self._ends = np.array(ends[1:], dtype=np.int64)
        first = np.concatenate([*starts, np.empty(0, dtype=np.int64)])
        hashes = _hashes(self._tokens)[first]
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._starts = hashes[order], first[order]

    def find(self, text: str) -> Match | None:
        """The first overlap in `text`, and the first evaluation text that has it; None where there is none."""
        own = words(text)
        if len(own) < NGRAM:
            name = self._whole.get(normalised(text)) if len(own) >= SHORTEST else None
            return None if name is None else Match(name, " ".join(own))
        if not len(self._hashes):
            return None
        ids = np.array([self._vocabulary.get(word, _UNKNOWN) for word in own], dtype=np.int32)
        hashes = _hashes(ids)
        found = np.searchsorted(self._hashes, hashes)
        for i in np.flatnonzero(self._hashes.take(found, mode="clip") == hashes).tolist():
            last = np.searchsorted(self._hashes, hashes[i], side="right")
            for start in self._starts[found[i] : last].tolist():
                if np.array_equal(self._tokens[start : start + NGRAM], ids[i : i + NGRAM]):
                    name = self._names[np.searchsorted(self._ends, start, side="right")]
                    return Match(name, " ".join(own[i : i + NGRAM]))
        return None


def _hashes(ids: NDArray[np.int32]) -> NDArray[np.uint64]:
    """A hash of each 13 ids in a row; none for fewer."""
    if len(ids) < NGRAM:
        return np.empty(0, dtype=np.uint64)
    return np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), NGRAM) @ _POWERS
