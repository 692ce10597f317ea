"""Row 8's side of distilabel, a whole process in its own environment: `python trivial_distilabel.py STEPS FOLDER`.

It sends the same 16 rows through so many steps of its local pipeline, and writes the last one's texts to
FOLDER/texts.json.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts, Step, StepInput

ROWS = 16


class Append(Step):  # type: ignore[misc]
    """Writes its number behind each text."""

    number: int

    @property
    def inputs(self) -> list[str]:
        """The columns that it reads."""
        return ["text"]

    @property
    def outputs(self) -> list[str]:
        """The columns that it writes."""
        return ["text"]

    def process(self, rows: StepInput) -> Iterator[Any]:
        """One batch."""
        for row in rows:
            row["text"] = f"{row['text']}, {self.number}"
        yield rows


def main(count: int, folder: Path) -> None:
    """Make the steps and run them."""
    with Pipeline(name="trivial", cache_dir=folder / "cache") as pipeline:
        last = LoadDataFromDicts(data=[{"text": f"row {n}"} for n in range(ROWS)], batch_size=ROWS)
        for number in range(count):
            step = Append(name=f"append_{number}", number=number)
            last >> step
            last = step
    found = pipeline.run(use_cache=False)
    (folder / "texts.json").write_text(json.dumps([*found["default"]["train"]["text"]]), "utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
