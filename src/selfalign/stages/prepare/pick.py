"""Pick the seed pairs and documents that the run uses, by what they are among the others: duplicates, samples."""

import heapq
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from selfalign.core.errors import GateError
from selfalign.core.identity import digest, seed_for
from selfalign.core.keys import key_of
from selfalign.core.records import Document, Outcome, Record, SeedPair, rejected
from selfalign.core.stage import Context, Rows, Settings, WholeStage
from selfalign.core.store import Manifest, dropped
from selfalign.data.config import CorpusConfig, SeedConfig, SourceConfig
from selfalign.text.overlap import normalised

R = TypeVar("R", bound=Record)
Place = int
Left = Iterable[tuple[Place, R]]


@dataclass(frozen=True)
class PickSeed(WholeStage):
    """Draw the seed pairs and hold some of them out of all training, by the hash of their id.

    `split` is `train`, `held_out`, or `like_held_out` for a pair that shares its prompt with a held-out one: neither
    trained on, which would leak, nor measured, which would count it twice.
    """

    name: ClassVar[str] = "prepare.pick_seed"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = SeedPair
    output: ClassVar[type[Record]] = SeedPair
    config: SeedConfig

    def settings(self) -> Settings:
        return self.config.model_dump(include={"drop_duplicates", "top", "sample", "sample_seed", "held_out"})

    def run(self, rows: Rows[SeedPair], context: Context) -> Iterable[Outcome]:
        out = _Out(rows)
        if self.config.drop_duplicates:
            out.drop("duplicate", _duplicates(out.left(), lambda row: [row.prompt, row.completion]))
        if self.config.top is not None:
            best = heapq.nsmallest(self.config.top, out.left(), key=lambda placed: _worth(placed[1]))
            out.keep("not_top", {place for place, _ in best})
        out.sample(self.config, context.seed)
        splits = self._splits(sorted((row for _, row in out.left()), key=lambda row: digest(row.id)))
        return out.outcomes(lambda row: replace(row, split=splits[row.id]))

    def _splits(self, rows: Sequence[SeedPair]) -> dict[str, str]:
        splits: dict[str, str] = {}
        prompts: set[str] = set()
        for row in rows:
            prompt = normalised(row.prompt)
            if len(splits) < self.config.held_out and prompt not in prompts:
                splits[row.id] = "held_out"
                prompts.add(prompt)
        for row in rows:
            splits.setdefault(row.id, "like_held_out" if normalised(row.prompt) in prompts else "train")
        return splits

    def check(self, manifest: Manifest) -> None:
        kept = manifest.ledger["kept"]
        if not isinstance(kept, int) or kept <= self.config.held_out:
            raise GateError(
                f"prepare.seed: {kept} pairs were picked of {self.config.path} and {self.config.held_out} are held "
                "out, so none is left to train on; " + dropped(manifest)
            )


def _worth(row: SeedPair) -> tuple[float, float, str]:
    """The best first; what has no label comes after all that have one."""
    quality = float("inf") if row.quality is None else -row.quality
    return quality, float("inf") if row.rank is None else row.rank, row.id


@dataclass(frozen=True)
class PickCorpus(WholeStage):
    """Drop nested segments, duplicates and unusual lengths, and draw the documents, in this order."""

    name: ClassVar[str] = "prepare.pick_corpus"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document
    config: CorpusConfig

    def settings(self) -> Settings:
        keys = {"drop_nested", "drop_duplicates", "near_duplicates", "length_quantiles", "sample", "sample_seed"}
        return self.config.model_dump(include=keys)

    def run(self, rows: Rows[Document], context: Context) -> Iterable[Outcome]:
        config, out = self.config, _Out(rows)
        if config.drop_nested:
            out.drop("nested", _nested(rows))
        if config.drop_duplicates:
            out.drop("duplicate", _duplicates(out.left(), lambda row: [row.text]))
        if config.near_duplicates is not None:
            found = _near_duplicates(out.left, config.near_duplicates)
            out.drop("near_duplicate", found)
            out.detail(found)
        if config.length_quantiles is not None:
            out.drop("length_quantiles", _outside(out.left, config.length_quantiles))
        out.sample(config, context.seed)
        return out.outcomes(lambda row: row)

    def check(self, manifest: Manifest) -> None:
        if not manifest.ledger["kept"]:
            raise GateError(f"prepare.corpus: no document is left of {self.config.path}; " + dropped(manifest))


class _Out(Generic[R]):
    """Which rows are out already, by their place, and why; the rows themselves stay where they are.

    A byte a row, so that there may be many: 0 for one that is in, else 1 + the place of the reason in `_reasons`.
    """

    def __init__(self, rows: Rows[R]) -> None:
        self._rows = rows
        self._codes = bytearray(len(rows))
        self._reasons: list[str] = []
        self._details: dict[Place, str] = {}

    def left(self) -> Iterator[tuple[Place, R]]:
        """The rows that are still in, each with its place."""
        return ((place, row) for place, row in enumerate(self._rows) if not self._codes[place])

    def drop(self, reason: str, places: Iterable[Place]) -> None:
        """Take rows out."""
        self._reasons.append(reason)
        for place in places:
            self._codes[place] = len(self._reasons)

    def keep(self, reason: str, places: set[Place]) -> None:
        """Take all others out."""
        self.drop(reason, (place for place, _ in self.left() if place not in places))

    def detail(self, details: Mapping[Place, str]) -> None:
        """What is to be said of rows that are out."""
        self._details.update(details)

    def sample(self, config: SourceConfig, run_seed: int) -> None:
        """Draw `config.sample` rows, those whose seeds come first: adding rows elsewhere moves few of them."""
        if config.sample is None:
            return
        seed = run_seed if config.sample_seed is None else config.sample_seed
        seeds = ((seed_for(seed, row.id, "sample"), row.id, place) for place, row in self.left())
        self.keep("not_sampled", {place for *_, place in heapq.nsmallest(config.sample, seeds)})

    def outcomes(self, kept: Callable[[R], R]) -> Iterator[Outcome]:
        """Every row once."""
        for place, row in enumerate(self._rows):
            if code := self._codes[place]:
                yield rejected(row.id, self._reasons[code - 1], row, self._details.get(place))
            else:
                yield kept(row)


def _nested(rows: Rows[Document]) -> list[Place]:
    """Segments inside one that passed the filters too."""
    enclosing = {id for row in rows for id in row.within}
    enclosing &= {row.id for row in rows if row.id in enclosing}
    return [place for place, row in enumerate(rows) if not enclosing.isdisjoint(row.within)]


def _duplicates(left: Left[R], texts: Callable[[R], list[str]]) -> list[Place]:
    """Rows whose texts equal an earlier one's but for case, spacing and final punctuation (by hashes of 64 bits)."""
    import numpy as np

    keys, places = array("q"), array("Q")
    for place, row in left:
        keys.append(key_of(*(normalised(text) for text in texts(row))))
        places.append(place)
    again = np.ones(len(keys), np.bool_)
    again[np.unique(np.asarray(keys), return_index=True)[1]] = False
    found: list[Place] = np.asarray(places)[again].tolist()
    return found


def _near_duplicates(left: Callable[[], Left[Document]], threshold: float) -> dict[Place, str]:
    """Rows that resemble an earlier one, with its name."""
    from selfalign.text.near_duplicates import near_duplicates

    with tempfile.TemporaryDirectory(prefix="selfalign-") as scratch:
        of = near_duplicates((row.text for _, row in left()), threshold, Path(scratch))
    wanted = {int(n) for n in of if n >= 0}
    ids = {n: row.id for n, (_, row) in enumerate(left()) if n in wanted}
    return {place: f"of {ids[int(n)]}" for (place, _), n in zip(left(), of, strict=True) if n >= 0}


def _outside(left: Callable[[], Left[Document]], quantiles: tuple[float, float]) -> list[Place]:
    """Rows that are shorter or longer than these quantiles of all lengths."""
    import numpy as np

    lengths = np.fromiter((len(row.text) for _, row in left()), np.int64)
    if not lengths.size:
        return []
    low, high = np.quantile(lengths, quantiles)
    return [place for (place, _), length in zip(left(), lengths, strict=True) if not low <= length <= high]
