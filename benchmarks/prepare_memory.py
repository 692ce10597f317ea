"""How much memory preparation takes as a corpus of HTML grows: `python benchmarks/prepare_memory.py PAGES [COPIES…]`.

The pages of the folder are repeated so many times with noise in their words, filtered as the recipe of HTML pages does,
in one process; what is printed is the most that it held, after imports.
"""

import argparse
import random
import re
import sys
import tempfile
from pathlib import Path

from measure import Work, in_child
from rich.console import Console
from rich.table import Table

RECIPE = Path(__file__).parents[1] / "recipes" / "html-qwen2.5-0.5b.yaml"
_TAG = re.compile(r"(<[^>]*>)")
_WORD = re.compile(r"\b[a-z]{3,}\b")
_INVENTED = [a + b + c for a in ("ka", "lo", "mi") for b in ("ru", "te", "za") for c in ("bar", "den", "fin", "gor")]


def repeat(pages: Path, copies: int, to: Path) -> None:
    """Write the pages so often, a share of the words of each copy changed."""
    chance = random.Random(0)
    known = [(path.stem, _TAG.split(path.read_text(encoding="utf-8"))) for path in sorted(pages.glob("*.html"))]
    for copy in range(copies):
        for stem, parts in known:
            share = chance.choice([0.02, 0.1, 0.3])
            (to / f"{stem}-{copy:04d}.html").write_text(
                "".join(_noisy(part, share, chance) for part in parts), encoding="utf-8"
            )


def _noisy(part: str, share: float, chance: random.Random) -> str:
    if part.startswith("<"):
        return part
    return _WORD.sub(lambda word: chance.choice(_INVENTED) if chance.random() < share else word[0], part)


def prepare(corpus: str, run: str) -> Work:
    """The three steps of the corpus; gives the segments read and the documents picked."""
    from selfalign.backends.local import LocalBackend
    from selfalign.core.stage import Step
    from selfalign.core.store import Store, balanced
    from selfalign.pipelines.externals import Externals
    from selfalign.pipelines.runner import Runner, Silent
    from selfalign.recipe import load
    from selfalign.stages.prepare.filter import FilterCorpus
    from selfalign.stages.prepare.pick import PickCorpus
    from selfalign.stages.prepare.read import ReadCorpus
    from selfalign.text.language import language

    language("What is loaded once is no part of the growth.")
    config = load(RECIPE, [f"prepare.corpus.path={corpus}"]).recipe.prepare.corpus

    def work() -> list[int]:
        files = Externals().source(config, "prepare.corpus")
        read = Step("prepare.read_corpus", ReadCorpus(config), {"rows": files}, 0)
        filtered = Step("prepare.filter_corpus", FilterCorpus(config), {"rows": read}, 0)
        picked = Step("prepare.pick_corpus", PickCorpus(config=config), {"rows": filtered}, 0)
        runner = Runner([read, filtered, picked], Store(Path(run)), LocalBackend(), Silent())
        runner.run()
        manifests = [runner.artifact(step).manifest() for step in (read, picked)]
        return [ledger.in_ if n == 0 else ledger.kept for n, ledger in enumerate(balanced(m) for m in manifests if m)]

    return work


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", type=Path, metavar="PAGES")
    parser.add_argument("copies", type=int, nargs="*", metavar="COPIES", default=[17, 168])
    given = parser.parse_args(arguments)
    table = Table("copies", "segments", "documents picked", "CPU-s", "peak MiB")
    for copies in given.copies:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus"
            corpus.mkdir()
            repeat(given.pages, copies, corpus)
            spent = in_child("prepare_memory:prepare", str(corpus), str(Path(folder) / "run"))
        assert isinstance(spent.output, list)
        cells = [copies, *spent.output, f"{spent.cpu_s:.0f}", f"{spent.peak_bytes / 2**20:.0f}"]
        table.add_row(*map(str, cells))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
