"""Read seed pairs and corpus documents out of files."""

from dataclasses import dataclass
from typing import ClassVar

from selfalign.core.errors import GateError
from selfalign.core.records import Document, Record, SeedPair, SourcePart
from selfalign.core.stage import Context, MapStage, Process, Settings
from selfalign.core.store import Manifest, dropped
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

    def check(self, manifest: Manifest) -> None:
        if not manifest.ledger["kept"]:
            what = "corpus" if self.output is Document else "prepared"
            raise GateError(
                f"{self.name}: nothing that {self.config.path} holds can be used; {dropped(manifest)}. `selfalign "
                f"export RUN --stage {what} --dropped` says what is wrong with each row, and where it stands"
                if manifest.ledger["in"]
                else f"{self.name}: {self.config.path} holds no record; name a file that does"
            )


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
