"""Near-duplicates in a stream of texts: all that reach a Jaccard similarity of word 5-grams, and no other.

An exact prefix-filter join (Bayardo et al., WWW 2007, with PPJoin's positional bound, Xiao et al., WWW 2008), not a
sketch. Under any one order of all shingles two similar sets share one of the first few of each. Here the rarest come
first, and those of a single text lead nowhere: so text that is not repeated is compared with nothing.
"""

import os
import re
import unicodedata
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
from numpy.typing import NDArray

from selfalign.core.errors import StorageError
from selfalign.text.overlap import folded, words

SHINGLE_WORDS = 5

Hashes = NDArray[np.uint64]
Integers = NDArray[np.int64]

# Blocks fit a processor's cache, and are large enough that the number of calls does not count.
_BLOCK_CHARACTERS = 1 << 16
_BLOCK_SHINGLES = 1 << 16
_RUN_SHINGLES = 1 << 19
_BLOCK_PAIRS = 1 << 18
# A text's number in its block and a rank sort as one integer of 16 bits.
_BLOCK_TEXTS = 128
_MOST_RANK = 127
# More than the rounding of a bound, less than a shingle.
_SLACK = 1e-6


def near_duplicates(texts: Iterable[str], threshold: float, scratch: Path) -> Integers:
    """For each text the index of the first kept text before it that it is a near-duplicate of; -1 for a kept text.

    Near-duplicates have a Jaccard similarity of at least `threshold` (0 < threshold <= 1) between their sets of word
    5-grams, the words being those of `overlap.words`; a shorter text is one shingle, a text without words is like no
    other. The result is that of comparing all pairs in order, but for collisions of 64-bit hashes, and is the same in
    every process. `texts` is read once. About 12 bytes a word lie in unnamed files in `scratch` meanwhile. Memory grows
    by some 100 bytes a text, by 1 KiB for a kept one that others resemble, and with the longest text. Raises
    StorageError where `scratch` cannot hold the files.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, but a similarity to reach is above 0 and at most 1")
    with ExitStack() as files:
        with _explained(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
            sets = _Sets(files.enter_context(TemporaryFile(dir=scratch, buffering=0)))
            census = _Census(files.enter_context(TemporaryFile(dir=scratch, buffering=0)))
        shingler = _Shingler()
        for block in _blocks(texts):
            shingles, sizes = shingler(block)
            with _explained(scratch):
                sets.append(shingles, sizes)
                census.add(shingles)
        with _explained(scratch):
            return _joined(sets, census.ranks(), threshold)


@contextmanager
def _explained(scratch: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot keep the shingles of near-duplicate removal in {scratch}: {error.strerror}; they take about 12 "
            "bytes for each word of the texts"
        ) from error


# Texts to sets of shingles


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Some texts at a time, a long one alone."""
    block: list[str] = []
    characters = 0
    for text in texts:
        if block and characters + len(text) > _BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
        block.append(text)
        characters += len(text) + 1
    if block:
        yield block


# Odd, so that it has an inverse modulo 2**64; 5 modulo 8, so that its powers repeat as late as possible.
_BASE = 0x9E3779B97F4A7C1D
# Between words, within a word, or the first of a word whatever comes before it.
_GAP, _LETTER, _ALONE = 1, 2, 3
# Added where a character can join the one before it or stands for several: its text is folded first.
_FOLD = 4
# A long text is hashed in parts, which begin at white space.
_PART = re.compile(rf".{{1,{_BLOCK_CHARACTERS}}}\S*", re.DOTALL)


def _random(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _character(letter: str) -> tuple[int, int]:
    """The kind of a character, and its value: the same for all that `words` makes one of, 0 between words."""
    match words(f"0{letter}0"):
        case ["0", "0"]:
            return _GAP, 0
        case [one] if len(one) == 3:
            kind, form = _LETTER, one[1]
        case ["0", two] if len(two) == 2:
            kind, form = _ALONE, two[0]
        case _:
            return _GAP + _FOLD, 0
    # Marks, and the vowels and finals of Hangul, are what Unicode composes with the character before.
    composes = any(unicodedata.category(each)[0] == "M" for each in (letter, form)) or "\u1160" <= form <= "\u11ff"
    return kind + _FOLD * composes, _random(form)


class _Shingler:
    """Sets of shingles. Many texts are hashed at once, with no Python object a word.

    The hash of a word is a polynomial modulo 2**64 over random values of its characters, and so a difference of two
    prefix sums over all characters, in which what stands between words counts 0.
    """

    def __init__(self) -> None:
        # Filled as characters come up; pages that are never touched take no memory.
        self._kinds = np.zeros(0x110000, np.uint8)
        self._values = np.zeros(0x110000, np.uint64)
        self._weights = np.array([_random(f"word {place}") | 1 for place in range(SHINGLE_WORDS)], np.uint64)
        self._powers = self._inverses = np.ones(1, np.uint64)

    def __call__(self, texts: Sequence[str]) -> tuple[Hashes, Integers]:
        """The texts' shingles, one set after the other, each ascending; and the size of each set."""
        if len(texts) == 1 and len(texts[0]) > _BLOCK_CHARACTERS:
            hashes = np.concatenate([self._words([part])[0] for part in _PART.findall(texts[0])])
            counts = np.array([len(hashes)])
        else:
            hashes, counts = self._words(texts)
        is_short = (counts > 0) & (counts < SHINGLE_WORDS)
        if is_short.any():
            missing = np.where(is_short, SHINGLE_WORDS - counts, 0)
            hashes, counts = np.insert(hashes, np.repeat(np.cumsum(counts), missing), 0), counts + missing
        shingles = np.zeros(len(hashes), np.uint64)
        for place, weight in enumerate(self._weights):
            shingles[: len(hashes) - place] += hashes[place:] * weight
        # The last words of a text begin no shingle.
        is_whole = np.ones(len(hashes), np.bool_)
        for place in range(1, SHINGLE_WORDS):
            is_whole[np.cumsum(counts)[counts > 0] - place] = False
        return _distinct(shingles[is_whole], np.maximum(counts - SHINGLE_WORDS + 1, 0))

    def _words(self, texts: Sequence[str]) -> tuple[Hashes, Integers]:
        """The hashes of all words of the texts, and the number of words of each text."""
        lengths, codes, kinds = self._characters(texts)
        if (to_fold := np.flatnonzero(kinds >= _FOLD)).size:
            numbers = set(np.searchsorted(np.cumsum(lengths), to_fold, "right").tolist())
            forms = [folded(text) if number in numbers else text for number, text in enumerate(texts)]
            lengths, codes, kinds = self._characters(forms)
            kinds %= _FOLD
        is_letter = kinds != _GAP
        is_first = is_letter.copy()
        is_first[1:] &= ~is_letter[:-1] | (kinds[1:] == _ALONE)
        starts = np.flatnonzero(is_first)

        powers, inverses = self._powers_to(len(codes))
        values = self._values.take(codes)
        values *= powers
        sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum(values, out=sums[1:])
        hashes = (sums[np.append(starts[1:], len(codes))] - sums[starts]) * inverses[starts]
        return hashes, np.diff(np.searchsorted(starts, np.cumsum(lengths)), prepend=0)

    def _characters(self, texts: Sequence[str]) -> tuple[Integers, NDArray[np.intp], NDArray[np.uint8]]:
        """The texts' lengths, with a line break after each; their code points, and the kinds of these."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
        codes = np.frombuffer("\n".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.intp)
        kinds = self._kinds.take(codes)
        if not kinds.all():
            for code in np.unique(codes[kinds == 0]).tolist():
                self._kinds[code], self._values[code] = _character(chr(code))
            kinds = self._kinds.take(codes)
        return lengths, codes, kinds

    def _powers_to(self, length: int) -> tuple[Hashes, Hashes]:
        """The powers 0..length - 1 of the base, and their inverses."""
        if length > len(self._powers):
            room = max(length, 2 * _BLOCK_CHARACTERS)
            self._powers, self._inverses = (
                np.cumprod(np.append(np.uint64(1), np.full(room - 1, base, np.uint64)), dtype=np.uint64)
                for base in (_BASE, pow(_BASE, -1, 1 << 64))
            )
        return self._powers[:length], self._inverses[:length]


def _distinct(shingles: Hashes, sizes: Integers) -> tuple[Hashes, Integers]:
    """Lists, one after the other, as sets: each sorted and without repetition."""
    ends = np.cumsum(sizes)
    begins = ends - sizes
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        shingles[begin:end].sort()
    is_new = np.ones(len(shingles), np.bool_)
    np.not_equal(shingles[1:], shingles[:-1], out=is_new[1:])
    is_new[begins[sizes > 0]] = True
    before = np.append(0, np.cumsum(is_new))
    return shingles[is_new], before[ends] - before[begins]


# What waits in files


class _Sets:
    """The sets of shingles, by the number of their text."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, shingles: Hashes, sizes: Integers) -> None:
        _write(self._file, shingles)
        self._ends.frombytes((np.cumsum(sizes) + self._ends[-1]).tobytes())

    def sizes(self, texts: Integers) -> Integers:
        ends = np.frombuffer(self._ends, np.int64)
        return ends[texts + 1] - ends[texts]

    def read(self, first: int, last: int) -> Hashes:
        """The sets of the texts first..last - 1, one after the other."""
        return np.frombuffer(_read(self._file, 8 * self._ends[first], 8 * self._ends[last]), np.uint64)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """All texts in order, some at a time: the first, and the first of the next block."""
        first = 0
        while first < len(self):
            fitting = bisect_right(self._ends, self._ends[first] + _BLOCK_SHINGLES) - 1
            last = min(max(fitting, first + 1), first + _BLOCK_TEXTS)
            yield first, last
            first = last


# 32 MiB. When the table of ranks is too small for all shingles that are shared, more is compared, never less.
_MOST_RANK_BITS = 25
_RANGE_BITS = 8


class _Census:
    """In how many texts each shingle is, found by sorting in a file: runs first, then one range of hashes at a time.

    Shingles count by their first 32 bits. Where two meet, one of a single text passes for shared, which does no harm.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._waiting: list[NDArray[np.uint32]] = []
        self._waiting_size = 0
        # Where each range begins in each run, in shingles from the file's beginning.
        self._bounds: list[Integers] = []
        self._size = 0

    def add(self, shingles: Hashes) -> None:
        self._waiting.append((shingles >> np.uint64(32)).astype(np.uint32))
        self._waiting_size += len(shingles)
        if self._waiting_size >= _RUN_SHINGLES:
            self._end_run()

    def _end_run(self) -> None:
        run = np.sort(np.concatenate(self._waiting))
        ranges = np.arange(1 << _RANGE_BITS, dtype=np.uint32) << np.uint32(32 - _RANGE_BITS)
        self._bounds.append(np.append(np.searchsorted(run, ranges), len(run)) + self._size)
        _write(self._file, run)
        self._size += len(run)
        self._waiting, self._waiting_size = [], 0

    def ranks(self) -> NDArray[np.uint8]:
        """By the first bits of a shingle (`_places`) 0 where each such shingle is of one text only; else 1 or more.

        The more texts have one of them, the higher. A rank is at most `_MOST_RANK`.
        """
        if self._waiting:
            self._end_run()
        # Four to eight shingles an entry: most of them are of one text only and leave no trace.
        bits = min(max(self._size.bit_length() - 2, _RANGE_BITS), _MOST_RANK_BITS)
        table = np.zeros(1 << bits, np.uint8)
        for number, part in enumerate(np.split(table, 1 << _RANGE_BITS)):
            runs = [_read(self._file, *(4 * bounds[number : number + 2]).tolist()) for bounds in self._bounds]
            shingles = np.sort(np.frombuffer(b"".join(runs), np.uint32))
            # Each as often as it is there, less one.
            shared = shingles[1:][shingles[1:] == shingles[:-1]]
            starts = np.flatnonzero(np.append(True, shared[1:] != shared[:-1])[: len(shared)])
            counts = np.minimum(np.diff(starts, append=len(shared)), _MOST_RANK).astype(np.uint8)
            np.maximum.at(part, shared[starts] >> np.uint32(32 - bits) & np.uint32(len(part) - 1), counts)
        return table


def _places(hashes: Hashes, table: NDArray[np.uint8]) -> Integers:
    """Where a table of ranks has its entries for shingles or keys."""
    return (hashes >> np.uint64(65 - len(table).bit_length())).view(np.int64)


def _write(file: IO[bytes], values: Hashes | NDArray[np.uint32]) -> None:
    # No buffer: what did not fit on the disk would come up again when the file is closed.
    left = values.view(np.uint8).data
    while left:
        left = left[file.write(left) :]


def _read(file: IO[bytes], begin: int, end: int) -> bytes:
    return os.pread(file.fileno(), end - begin, begin)


# The join

# A posting's key is a shingle with the size of its set for the low bits.
_SIZE_MASK = np.uint64(0xFFFF)
# Added to a rank when a kept text is indexed by such a shingle.
_INDEXED = _MOST_RANK + 1


def _joined(sets: _Sets, ranks: NDArray[np.uint8], threshold: float) -> Integers:
    duplicate_of = array("q", [-1]) * len(sets)
    shared = np.zeros(len(sets), np.uint32)
    index: list[_Run] = []
    for first, last in sets.blocks():
        shingles, sizes = sets.read(first, last), sets.sizes(np.arange(first, last))
        rank = ranks.take(_places(shingles, ranks))
        ends = np.cumsum(sizes)
        shared[first:last] = np.diff(np.append(0, np.cumsum(rank > 0))[ends], prepend=0)
        postings = _postings(first, sizes, shingles, rank, shared[first:last], threshold)
        if not len(postings.texts):
            continue
        block = _Run(postings.keys, postings.texts.astype(np.uint32))
        known = postings[ranks.take(_places(postings.keys, ranks)) >= _INDEXED]
        pairs = np.unique(np.concatenate([block.pairs(postings), *(run.pairs(known) for run in index)]))
        text, earlier = pairs >> 32, pairs & 0xFFFFFFFF
        # What both share with any text bounds what they share with each other.
        total = sets.sizes(text) + sets.sizes(earlier)
        fits = np.minimum(shared[text], shared[earlier]) * (1 + threshold) >= threshold * total - _SLACK
        for one, other in zip(text[fits].tolist(), earlier[fits].tolist(), strict=True):
            if duplicate_of[one] < 0 and duplicate_of[other] < 0:
                own = shingles[ends[one - first] - sizes[one - first] : ends[one - first]]
                if _similarity(own, sets.read(other, other + 1)) >= threshold:
                    duplicate_of[one] = other
        stays = np.frombuffer(duplicate_of, np.int64)[block.texts] < 0
        ranks[_places(block.keys[stays], ranks)] |= _INDEXED
        _insert(index, block.keys[stays], block.texts[stays])
    return np.frombuffer(duplicate_of, np.int64)


def _similarity(one: Hashes, other: Hashes) -> float:
    """Jaccard similarity of two sets."""
    common = np.intersect1d(one, other, assume_unique=True).size
    return common / (len(one) + len(other) - common)


@dataclass(frozen=True)
class _Postings:
    """By which shingles the texts of a block are found and find others: parallel arrays, ascending by key.

    From the key `lowest` to `highest` stand the sets that hold the same shingle and whose size can reach the threshold
    with this one.
    """

    texts: Integers
    keys: Hashes
    lowest: Hashes
    highest: Hashes

    def __getitem__(self, some: NDArray[np.bool_] | Integers) -> "_Postings":
        return _Postings(self.texts[some], self.keys[some], self.lowest[some], self.highest[some])


def _postings(
    first: int,
    sizes: Integers,
    shingles: Hashes,
    rank: NDArray[np.uint8],
    shared: NDArray[np.uint32],
    threshold: float,
) -> _Postings:
    """Postings of the texts from `first` on; none for a text that shares too little with all others together."""
    least = np.ceil(threshold * sizes - _SLACK).astype(np.int64)
    is_open = shared >= np.maximum(least, 1)
    chosen = np.repeat(is_open, sizes)
    shingles, rank = shingles[chosen], rank[chosen] & _MOST_RANK
    sizes = np.where(is_open, sizes, 0)
    text = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(len(text)) - (np.cumsum(sizes) - sizes)[text]
    # The one order of all shingles: the rarest first, and those of a rank by hash, as they already are.
    order = np.argsort((text << 8 | rank).astype(np.uint16), kind="stable")
    shingles, rank, size, least = shingles[order], rank[order], sizes[text], least[text]

    # Where two sets share this shingle and none before it, they share `size - place` at most, which bounds the other.
    most = np.floor((size - place) * ((1 + threshold) / threshold) - size + _SLACK).astype(np.int64)
    leads = (rank > 0) & (most >= least)
    keys, lowest, highest = (
        shingles[leads] & ~_SIZE_MASK | np.minimum(bound[leads].astype(np.uint64), _SIZE_MASK)
        for bound in (size, least, most)
    )
    return _Postings(text[leads] + first, keys, lowest, highest)[np.argsort(keys)]


@dataclass(frozen=True)
class _Run:
    """Texts by key, ascending."""

    keys: Hashes
    texts: NDArray[np.uint32]

    def pairs(self, postings: _Postings) -> Integers:
        """Texts of a block with earlier ones here that may be similar, as text << 32 | earlier."""
        begins = np.searchsorted(self.keys, postings.lowest)
        found = np.flatnonzero(self.keys.take(begins, mode="clip") <= postings.highest)
        texts, begins = postings.texts[found], begins[found]
        counts = np.searchsorted(self.keys, postings.highest[found], "right") - begins
        pairs = [np.empty(0, np.int64)]
        # Where thousands of texts have a shingle, a block has millions of pairs: not all at once.
        cuts = np.flatnonzero(np.diff(np.cumsum(counts) // _BLOCK_PAIRS)) + 1
        for some in np.split(np.arange(len(found)), cuts) if len(found) else []:
            ends = np.cumsum(counts[some])
            places = np.arange(ends[-1]) + np.repeat(begins[some] - ends + counts[some], counts[some])
            text, earlier = np.repeat(texts[some], counts[some]), self.texts[places]
            pairs.append(np.unique((text << 32 | earlier)[earlier < text]))
        return np.concatenate(pairs)


def _insert(index: list[_Run], keys: Hashes, texts: NDArray[np.uint32]) -> None:
    """Add a run, merged with the last ones of about its size: runs stay few, and a posting is moved few times."""
    while index and len(index[-1].keys) <= 4 * len(keys):
        last = index.pop()
        places = np.searchsorted(last.keys, keys)
        keys, texts = np.insert(last.keys, places, keys), np.insert(last.texts, places, texts)
    if len(keys):
        index.append(_Run(keys, texts))
