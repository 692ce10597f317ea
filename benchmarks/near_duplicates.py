"""Row 5: near-duplicate removal against datasketch, both exact-verified: `python benchmarks/near_duplicates.py`."""

import argparse
import json
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import pread
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np
from measure import Result, Work, by_turns, machine, median_ratio, publish
from numpy.random import Generator
from rich.table import Table

from selfalign.text.near_duplicates import SHINGLE_WORDS, near_duplicates
from selfalign.text.overlap import words

THRESHOLD = 0.8
DOCUMENTS = 50_000
ROUNDS = 5
MUST, AIM, MEMORY_MUST = 5.0, 15.0, 0.5


# The corpus


class _Prose:
    """Words and stock phrases as frequent as Zipf's law has them."""

    def __init__(self, random: Generator) -> None:
        self._random = random
        syllables = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er")]
        made: dict[str, None] = {}
        while len(made) < 50_000:
            made["".join(random.choice(syllables, 1 + min(2, len(made) // 60)))] = None
        self.words = np.array(list(made), object)
        self._phrases = [self._draw(int(n)) for n in random.integers(5, 10, 4_000)]

    def _draw(self, count: int) -> list[str]:
        drawn: list[str] = self.words[self.ranks(count, len(self.words))].tolist()
        return drawn

    def ranks(self, count: int, kinds: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """`count` numbers below `kinds`, n as often as 1 / (n + 1)."""
        return (kinds ** self._random.random(count)).astype(np.int64) - 1

    def sentences(self, count: int) -> list[str]:
        """At least `count` words in sentences, one in five of which holds a stock phrase."""
        tokens: list[str] = []
        while len(tokens) < count:
            sentence = self._draw(int(self._random.integers(6, 22)))
            if self._random.random() < 0.2:
                sentence[3:3] = self._phrases[self.ranks(1, len(self._phrases))[0]]
            sentence[0] = sentence[0].capitalize()
            sentence[-1] += "."
            tokens += sentence
        return tokens


def made_up(count: int, seed: int) -> Iterator[str]:
    """Texts like web segments, 600 to 3,000 characters, the same for a seed.

    Two in five carry a notice that others carry too; a quarter have typographic quotes and accents. One in five is an
    earlier text with 1 to 40 words changed, one in twenty is an earlier text unchanged; early texts come back most.
    """
    random = np.random.default_rng(seed)
    prose = _Prose(random)
    notices = [prose.sentences(int(n)) for n in random.integers(15, 60, 200)]
    originals: list[str] = []
    for _ in range(count):
        kind = random.random()
        if originals and kind < 0.25:
            text = originals[int(len(originals) * random.random() ** 2)]
            if kind < 0.2:
                tokens = text.split(" ")
                for place in random.integers(0, len(tokens), 1 + prose.ranks(1, 40)[0]):
                    tokens[place] = prose.words[random.integers(5_000)]
                text = " ".join(tokens)
        else:
            tokens = prose.sentences(int(random.integers(100, 500)))
            if random.random() < 0.4:
                tokens += notices[prose.ranks(1, len(notices))[0]]
            if random.random() < 0.25:
                tokens[::40] = [f"“{token}é”" for token in tokens[::40]]
            text = " ".join(tokens)[:3_000]
            originals.append(text)
        yield text


def texts_of(path: Path) -> Iterator[str]:
    """Texts of a file, or of all files of a folder: one a line, and of a line in JSON its longest string."""
    for file in sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield max(_strings(json.loads(line)), key=len, default="") if ".json" in file.suffixes[0] else line


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


# The sides


def ours(corpus: str, scratch: str) -> Work:
    """selfalign's own."""
    return lambda: near_duplicates(texts_of(Path(corpus)), THRESHOLD, Path(scratch)).tolist()


def datasketch(corpus: str, scratch: str) -> Work:
    """MinHash of 128 permutations, one LSH of what is kept, its candidates verified.

    Sets for verification wait in a file as hashes, as ours do, so that they do not count as its memory.
    """
    from datasketch import MinHash, MinHashLSH

    def work() -> list[int]:
        index = MinHashLSH(threshold=THRESHOLD, num_perm=128)
        duplicate_of: list[int] = []
        ends = array("q", [0])
        with TemporaryFile(dir=scratch, buffering=0) as sets:
            for number, text in enumerate(texts_of(Path(corpus))):
                shingles = list(shingles_of(text))
                hashes = np.sort(np.fromiter(map(hash, shingles), np.int64, len(shingles)))
                sets.write(hashes.data)
                ends.append(ends[-1] + hashes.nbytes)
                sketch = MinHash(num_perm=128)
                sketch.update_batch([shingle.encode() for shingle in shingles])
                for candidate in sorted(index.query(sketch)) if shingles else []:
                    start, end = ends[candidate], ends[candidate + 1]
                    other = np.frombuffer(pread(sets.fileno(), end - start, start), np.int64)
                    common = np.intersect1d(hashes, other, assume_unique=True).size
                    if common / (len(hashes) + len(other) - common) >= THRESHOLD:
                        duplicate_of.append(candidate)
                        break
                else:
                    duplicate_of.append(-1)
                    if shingles:
                        index.insert(number, sketch)
        return duplicate_of

    return work


def shingles_of(text: str) -> set[str]:
    """The definition, in plain Python."""
    tokens = words(text)
    last = max(len(tokens) - SHINGLE_WORDS, 0)
    return {" ".join(tokens[i : i + SHINGLE_WORDS]) for i in range(last + 1)} if tokens else set()
