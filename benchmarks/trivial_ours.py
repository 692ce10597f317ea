"""Row 8's side of ours, a whole process: `python trivial_ours.py STEPS FOLDER` sends 16 rows through so many map steps.

The last step's texts are written to FOLDER/texts.json.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import JsonValue
from spending import backend

from selfalign.core.records import Document, Record
from selfalign.core.stage import Context, MapStage, Process, Rows, Step, WholeStage
from selfalign.core.store import Store
from selfalign.core.tables import read_kept
from selfalign.pipelines.runner import Runner, Silent

ROWS = 16


@dataclass(frozen=True)
class Load(WholeStage):
    """Makes the rows."""

    name: ClassVar[str] = "trivial.load"
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document

    def units(self, rows: Rows[Document], context: Context) -> int:
        return ROWS

    def run(self, rows: Rows[Document], context: Context) -> Iterable[Document]:
        return [Document(id=f"row/{n:02d}", source="made up", text=f"row {n}") for n in range(ROWS)]


@dataclass(frozen=True)
class Append(MapStage):
    """Writes its number behind each text."""

    name: ClassVar[str] = "trivial.append"
    record: ClassVar[type[Record]] = Document
    output: ClassVar[type[Record]] = Document
    number: int

    def settings(self) -> Mapping[str, JsonValue]:
        return {"number": self.number}

    def open(self, context: Context) -> Process:
        def run(rows: Sequence[Document]) -> Iterable[Document]:
            return [dataclasses.replace(row, text=f"{row.text}, {self.number}") for row in rows]

        return Process(run)


def main(count: int, folder: Path, where: str = "local") -> None:
    """Make the steps and run them."""
    steps = [Step("trivial.load", Load(), {}, 0)]
    for number in range(count):
        steps.append(Step(f"trivial.append@{number}", Append(number), {"rows": steps[-1]}, 0))
    chosen = backend(where)
    runner = Runner(steps, Store(folder), chosen, Silent())
    runner.run()
    chosen.close()
    texts = [row.text for shard in runner.artifact(steps[-1]).shards() for row in read_kept(shard, Document)]
    (folder / "texts.json").write_text(json.dumps(texts), "utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
