"""Read seed pairs and corpus documents, and draw those that the run uses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from selfalign.core.errors import GateError
from selfalign.core.frozen import Frozen
from selfalign.core.identity import digest, seed_for
from selfalign.core.records import Document, Outcome, Pair, Record, SourceFile, rejected
from selfalign.core.stage import Context, MapStage, Process, Settings, WholeStage
from selfalign.core.store import Manifest, dropped
from selfalign.data.config import CorpusConfig, SeedConfig, SourceConfig
from selfalign.text.overlap import normalised

R = TypeVar("R", bound=Record)


class PrepareConfig(Frozen):
    """Both sources."""

    seed: SeedConfig
    corpus: CorpusConfig


@dataclass(frozen=True)
class _Read(MapStage):
    """Files → rows; one file is one shard, and its records are its units."""

    record: ClassVar[type[Record]] = SourceFile
    batch_rows: ClassVar[int] = 1
    config: SourceConfig

    def settings(self) -> Settings:
        return {"format": self.config.format}

    def units(self, row: SourceFile) -> int:
        return row.rows


@dataclass(frozen=True)
class ReadSeed(_Read):
    """The first turn of each conversation."""

    name: ClassVar[str] = "prepare.read_seed"
    output: ClassVar[type[Record]] = Pair

    def open(self, context: Context) -> Process:
        from selfalign.data.formats import read_pairs

        return Process(lambda files: [row for file in files for row in read_pairs(file, self.config.format)])


@dataclass(frozen=True)
class ReadCorpus(_Read):
    """The response of each single-turn conversation, or plain text."""

    name: ClassVar[str] = "prepare.read_corpus"
    output: ClassVar[type[Record]] = Document

    def open(self, context: Context) -> Process:
        from selfalign.data.formats import read_documents

        return Process(lambda files: [row for file in files for row in read_documents(file, self.config.format)])


@dataclass(frozen=True)
class PickSeed(WholeStage):
    """Draw the seed pairs and hold some of them out of all training, by the hash of their id.

    `split` is `train`, `held_out`, or `like_held_out` for a pair that shares its prompt with a held-out one: neither
    trained on, which would leak, nor measured, which would count it twice.
    """

    name: ClassVar[str] = "prepare.pick_seed"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Pair
    output: ClassVar[type[Record]] = Pair
    config: SeedConfig

    def settings(self) -> Settings:
        return self.config.model_dump(include={"sample", "sample_seed", "held_out"})

    def run(self, rows: Sequence[Pair], context: Context) -> Iterable[Outcome]:
        drawn = sampled(rows, self.config, context.seed)
        splits = self._splits(sorted((row for row in rows if row.id in drawn), key=lambda row: digest(row.id)))
        for row in rows:
            yield replace(row, split=splits[row.id]) if row.id in drawn else rejected(row.id, "not_sampled", row)

    def _splits(self, rows: Sequence[Pair]) -> dict[str, str]:
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
                f"prepare.seed: {kept} pairs were read from {self.config.path} and {self.config.held_out} are held "
                "out, so none is left to train on; " + dropped(manifest)
            )


@dataclass(frozen=True)
class PickCorpus(WholeStage):
    """Filter and draw the documents. No filter is on unless the recipe names it."""

    name: ClassVar[str] = "prepare.pick_corpus"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document
    config: CorpusConfig

    def settings(self) -> Settings:
        return self.config.model_dump(include={"sample", "sample_seed", "min_chars", "max_chars"})

    def run(self, rows: Sequence[Document], context: Context) -> Iterable[Outcome]:
        reasons = {row.id: self._reason(row) for row in rows}
        drawn = sampled([row for row in rows if not reasons[row.id]], self.config, context.seed)
        for row in rows:
            reason = reasons[row.id] or (None if row.id in drawn else "not_sampled")
            yield rejected(row.id, reason, row) if reason else row

    def check(self, manifest: Manifest) -> None:
        if not manifest.ledger["kept"]:
            raise GateError(f"prepare.corpus: no document is left of {self.config.path}; " + dropped(manifest))

    def _reason(self, row: Document) -> str | None:
        if self.config.min_chars is not None and len(row.text) < self.config.min_chars:
            return "too_short"
        if self.config.max_chars is not None and len(row.text) > self.config.max_chars:
            return "too_long"
        return None


def sampled(rows: Sequence[Record], config: SourceConfig, run_seed: int) -> set[str]:
    """Ids of `config.sample` rows, those whose seeds come first: adding rows elsewhere moves few of them."""
    seed = run_seed if config.sample_seed is None else config.sample_seed
    ids = sorted((row.id for row in rows), key=lambda id: seed_for(seed, id, "sample"))
    return set(ids[: config.sample])
