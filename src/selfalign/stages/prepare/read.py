"""Read seed pairs and corpus documents out of files."""

from dataclasses import dataclass
from typing import ClassVar

from selfalign.core.records import Document, Record, SeedPair, SourcePart
from selfalign.core.stage import Context, MapStage, Process, Settings
from selfalign.data.config import SeedConfig, SourceConfig


@dataclass(frozen=True)
class _Read(MapStage):
    """Parts of files → rows; their records are counted beforehand, and a record may hold several rows."""

    version: ClassVar[int] = 2
    record: ClassVar[type[Record]] = SourcePart
    batch_rows: ClassVar[int] = 16
    splits: ClassVar[bool] = True
    config: SourceConfig

    def settings(self) -> Settings:
        # The format is the parts', and so in what stands for them.
        return {}

    def units(self, row: SourcePart) -> int:
        return row.rows


@dataclass(frozen=True)
class ReadSeed(_Read):
    """The first turn of each conversation, or all of them."""

    name: ClassVar[str] = "prepare.read_seed"
    output: ClassVar[type[Record]] = SeedPair
    config: SeedConfig

    def settings(self) -> Settings:
        return {"turns": self.config.turns}

    def open(self, context: Context) -> Process:
        from selfalign.data.formats import read_pairs

        turns = self.config.turns
        return Process(lambda parts: [row for part in parts for row in read_pairs(part, turns)])


@dataclass(frozen=True)
class ReadCorpus(_Read):
    """The response of each single-turn conversation, plain text, or the segments of a page."""

    name: ClassVar[str] = "prepare.read_corpus"
    output: ClassVar[type[Record]] = Document

    def open(self, context: Context) -> Process:
        from selfalign.data.formats import read_documents

        return Process(lambda parts: [row for part in parts for row in read_documents(part)])
