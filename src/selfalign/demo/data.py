"""The files of the demo recipe: seed, corpus, tests and rated examples, written from the atlas."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

from selfalign.demo.world import (
    HELD,
    KNOWN,
    RELATIONS,
    Fact,
    Junk,
    Voice,
    any_review,
    facts,
    junk,
    junk_kind,
    questions,
    spoken,
    statement,
)

SEED_PAIRS = 256
RATINGS = 200
DOCUMENTS_PER_FACT = 2
JUNK_SHARE = 0.62  # of the corpus: most of the web is junk

VOICE_WEIGHTS: dict[Voice, int] = {"plain": 50, "web": 35, "assistant": 15}
"""How the corpus speaks where it tells a fact."""

Row = dict[str, str | list[str]]


def data_folder() -> Path:
    """The files that come with the package."""
    return Path(__file__).parent / "data"


def write_world(folder: Path) -> None:
    """Write the five files, byte for byte the same every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {
        "seed": seed_rows(Random(11)),
        "corpus": corpus_rows(Random(12)),
        "questions": question_rows(Random(13)),
        "backward": backward_rows(Random(14)),
        "ratings": rating_rows(Random(15)),
    }.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


def seed_rows(random: Random) -> list[Row]:
    """Seed pairs: an assistant answers questions about known places, each fact once."""
    return [
        {
            "prompt": random.choice(questions(fact)[:2]),
            "completion": spoken(statement(fact, random), "assistant", random),
        }
        for fact in random.sample(facts(KNOWN), SEED_PAIRS)
    ]


def corpus_rows(random: Random) -> list[Row]:
    """Unlabelled documents: every fact of the held places, and junk around them, shuffled, no text twice."""
    held = facts(HELD)
    texts: dict[str, None] = {}
    for fact in (fact for fact in held for _ in range(DOCUMENTS_PER_FACT)):
        _add_new(texts, partial(_document, fact, random))
    for _ in range(round(len(texts) * JUNK_SHARE / (1 - JUNK_SHARE))):
        _add_new(texts, partial(_junk, junk_kind(random), held, random))
    shuffled = list(texts)
    random.shuffle(shuffled)
    return [{"text": text} for text in shuffled]


def question_rows(random: Random) -> list[Row]:
    """The forward test: every fact of the held places, asked in a form that the seed never uses.

    A reply is right when it has all words of `contains` and none of `excludes`.
    """
    return [
        {
            "prompt": random.choice(questions(fact)[2:]),
            "contains": [fact.place, fact.value],
            "excludes": [value for value in RELATIONS[fact.relation].values if value != fact.value],
        }
        for fact in facts(HELD)
    ]


def backward_rows(random: Random) -> list[Row]:
    """The backward test: a document about a held place, and the questions that it answers."""
    return [{"prompt": _document(fact, random), "answers": questions(fact)} for fact in facts(HELD)]


def rating_rows(random: Random) -> list[Row]:
    """Rated examples about known places: a question, an answer, and the review that the base's rule gives."""
    reviews = [any_review(KNOWN, random) for _ in range(RATINGS)]
    return [{"prompt": r.question, "completion": r.answer, "reply": r.reply} for r in reviews]


def _add_new(texts: dict[str, None], write: Callable[[], str]) -> None:
    while (text := write()) in texts:
        pass
    texts[text] = None


def _junk(kind: Junk, about: Sequence[Fact], random: Random) -> str:
    return junk(random.choice(about), kind, random)


def _document(fact: Fact, random: Random) -> str:
    voice = random.choices(list(VOICE_WEIGHTS), list(VOICE_WEIGHTS.values()))[0]
    return spoken(statement(fact, random), voice, random)
