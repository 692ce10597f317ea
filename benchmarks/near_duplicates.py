"""Row 5: near-duplicate removal against datasketch, both exact-verified.

`python benchmarks/run.py 5` measures the row; `python benchmarks/near_duplicates.py` with options looks at other texts.
"""

import argparse
import json
import statistics
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import pread
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np
from measure import Result, Work, by_turns, machine, median_ratio, show
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import TypeAdapter
from rich.table import Table

from selfalign.core.errors import UsageError
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
        drawn = random.integers(0, len(syllables), (60_000, 3)).tolist()
        made = ["".join(syllables[each] for each in word[: 1 if rank < 60 else 3]) for rank, word in enumerate(drawn)]
        self.words = np.array(list(dict.fromkeys(made))[:50_000], object)
        self._phrases = [self._draw(int(n)) for n in random.integers(5, 10, 4_000)]

    def _draw(self, count: int) -> list[str]:
        drawn: list[str] = self.words[self.ranks(count, len(self.words))].tolist()
        return drawn

    def ranks(self, count: int, kinds: int) -> NDArray[np.int64]:
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


def read(path: Path) -> Iterator[str]:
    """Texts of a file, or of all files in a folder: one a line, and where lines are JSON the longest string of each."""
    for file in sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield max(_strings(json.loads(line)), key=len, default="") if file.suffix == ".jsonl" else line


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def lines_of(path: str) -> Iterator[str]:
    """The texts of a corpus file, which both sides read."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        yield from lines


# The sides


def ours(corpus: str, scratch: str) -> Work:
    """selfalign's own."""
    return lambda: near_duplicates(lines_of(corpus), THRESHOLD, Path(scratch)).tolist()


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
            for number, text in enumerate(lines_of(corpus)):
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


# The row


@dataclass(frozen=True)
class Checked:
    """What is wrong with the texts that we drop, and what each side leaves in that the other found."""

    false_drops: int
    missed: int
    missed_by_datasketch: int
    repeatable: bool

    @property
    def holds(self) -> bool:
        """Whether we drop near-duplicates of kept texts only, and miss none that datasketch finds, every time."""
        return self.repeatable and self.false_drops == self.missed == 0


def check(texts: Sequence[str], ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> Checked:
    """Hold the outputs of all rounds against the definition and against each other.

    Sides that keep different texts may drop different ones, both rightly. So a pair that one side found is missed by
    the other where that keeps both texts.
    """
    mine, peer = ours[0], theirs[0]
    false_drops = 0
    for number, kept in enumerate(mine):
        if kept >= 0:
            one, other = shingles_of(texts[number]), shingles_of(texts[kept])
            similar = len(one & other) / len(one | other) >= THRESHOLD
            false_drops += not (similar and kept < number and mine[kept] < 0)
    repeatable = all(each == mine for each in ours) and all(each == peer for each in theirs)
    return Checked(false_drops, _missed(mine, peer), _missed(peer, mine), repeatable)


def _missed(by: Sequence[int], found: Sequence[int]) -> int:
    return sum(kept >= 0 and by[number] < 0 and by[kept] < 0 for number, kept in enumerate(found))


def measured(texts: Iterable[str], rounds: int) -> tuple[Result, Table]:
    """Measure both sides on the texts. Raises UsageError where datasketch is not installed."""
    if find_spec("datasketch") is None:
        raise UsageError("near-duplicate removal is measured against datasketch: pip install -e '.[bench]'")
    with TemporaryDirectory(prefix="near-duplicates-") as folder:
        corpus = Path(folder) / "corpus.txt"
        with corpus.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.writelines(" ".join(text.split()) + "\n" for text in texts)
        sides = {name: (f"near_duplicates:{name}", str(corpus), folder) for name in ("ours", "datasketch")}
        spent = by_turns(sides, rounds)
        outputs = {
            name: [TypeAdapter(list[int]).validate_python(each[name].output) for each in spent] for name in sides
        }
        held = check(list(lines_of(str(corpus))), outputs["ours"], outputs["datasketch"])

    cpu = {name: [each[name].cpu_s for each in spent] for name in sides}
    peak = {name: [each[name].peak_bytes / 2**20 for each in spent] for name in sides}
    memory = median_ratio(peak["ours"], peak["datasketch"])
    count = len(outputs["ours"][0])
    details = Table("", "CPU-s", "documents a CPU-s", "peak MiB", "dropped", "pairs missed")
    for name, missed in (("ours", held.missed), ("datasketch", held.missed_by_datasketch)):
        seconds = statistics.median(cpu[name])
        dropped = sum(kept >= 0 for kept in outputs[name][0])
        shown = f"{seconds:.2f}", f"{count / seconds:,.0f}", f"{statistics.median(peak[name]):.0f}", dropped, missed
        details.add_row(name, *map(str, shown))
    passed = held.holds and memory <= MEMORY_MUST
    result = Result(
        row="5",
        value=median_ratio(cpu["datasketch"], cpu["ours"]) if held.holds else None,
        unit="times datasketch's CPU-seconds",
        better="higher",
        must=MUST,
        aim=AIM,
        check=f"{count} documents, {held.false_drops} dropped wrongly, {held.missed} of datasketch's pairs missed, "
        f"{'the same' if held.repeatable else 'NOT the same'} every round; memory {memory:.2f} of datasketch's, "
        f"at most {MEMORY_MUST}",
        passed=passed,
        rounds=rounds,
        machine=machine(),
    )
    return result, details


def row() -> tuple[Result, Table]:
    """The row under its own conditions."""
    return measured(made_up(DOCUMENTS, seed=0), ROUNDS)


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--texts", type=Path, help="a file of texts, one a line or JSON Lines, or a folder of such files"
    )
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="how many texts to make up")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args(arguments)
    result, details = measured(read(given.texts) if given.texts else made_up(given.documents, seed=0), given.rounds)
    show(result, details)
    return 0 if result.is_met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
