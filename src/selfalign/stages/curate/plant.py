"""Pairs of known quality, to test and fit the rater on: held-out seed pairs, the same spoilt, and people's labels."""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import Field, StrictBool, model_validator

from selfalign.core.errors import GateError, UsageError
from selfalign.core.frozen import Frozen
from selfalign.core.identity import digest
from selfalign.core.records import Noted, Outcome, Pair, Planted, Record, SeedPair, rejected
from selfalign.core.stage import Context, Rows, Settings, WholeStage
from selfalign.core.store import Manifest
from selfalign.stages.curate.config import CurateConfig, Plant
from selfalign.stages.jsonl import read_checked
from selfalign.text.language import language, primary

ECHO_CHARS = 240
"""An echo is no longer than instructions are."""

GOOD_RATING = 4.0
"""A label's rating from here on is a good one: the grades that are written for the user (arXiv 2308.06259, table 1)."""

GOOD = "good"
"""What the ledger counts the good pairs under."""

BOILERPLATE = (
    "Home | About us | Products | Careers | Contact. Copyright, all rights reserved. Terms of use and privacy policy.",
    "This site uses cookies to give you the best experience. By going on you agree. Accept all / Settings",
    "Sign up for our weekly letter and never miss an offer! Enter your e-mail address below. Leave anytime.",
    "You must be logged in to reply to this topic. Log in or register. Last edited by admin. Page 1 of 7, next page",
    "Share this: Facebook, Twitter, Pinterest, E-mail. Related: ten things you did not know; our summer favourites.",
    "Add to cart. In stock, delivered in two to four working days. Customers also bought these items.",
    "Error 404. The page that you were looking for has been moved or does not exist any more. Back to the front page.",
    "Read more… Advertisement. Scroll down to continue reading. Subscribe now and get the first month for free.",
    "Posted by admin in News, 3 comments. Tags: general, update. Previous, next. Leave a comment below.",
    "Your browser is out of date and may not show all features of this website. Please update. Skip to main content.",
)


class Label(Frozen):
    """A person's verdict: of the seed pair called `id`, or of a pair of its own; `good`, or a `rating` from 1 to 5."""

    id: str | None = None
    prompt: str | None = None
    completion: str | None = None
    good: StrictBool | None = None
    rating: float | None = Field(None, ge=1, le=5)

    @model_validator(mode="after")
    def _whole(self) -> "Label":
        if (self.good is None) == (self.rating is None):
            raise ValueError("a label has either good (true or false) or a rating from 1 to 5")
        if (self.prompt is None) != (self.completion is None) or (self.id is None) == (self.prompt is None):
            raise ValueError("a label either names the id of a seed pair, or has a prompt and a completion of its own")
        return self

    @property
    def verdict(self) -> bool:
        """Whether the pair is a good one."""
        return bool(self.good) if self.rating is None else self.rating >= GOOD_RATING

    @property
    def key(self) -> str:
        """What it speaks of."""
        return self.id or _key(self.prompt, self.completion)


def _key(prompt: str | None, completion: str | None) -> str:
    return digest([prompt, completion])[:16]


def read_labels(path: Path) -> list[tuple[int, Label]]:
    """The labels of a JSONL file, one a pair, with their lines. Raises UsageError for one that cannot count."""
    rows = read_checked(path, Label, "curate.labels:")
    first: dict[str, tuple[int, Label]] = {}
    for number, label in rows:
        at, before = first.setdefault(label.key, (number, label))
        if before.verdict != label.verdict:
            raise UsageError(
                f"{path}:{number}: this pair is called {'good' if label.verdict else 'bad'}, and "
                f"{'good' if before.verdict else 'bad'} on line {at}; keep one of the two"
            )
    return [*first.values()]


def truncated(text: str, chance: random.Random) -> str:
    """The first 30 to 70 per cent of a text, ended after a word; where none ends there, the one nearest the middle.

    Empty where it has a single word.
    """
    text = text.strip()
    ends = [word.end() for word in re.finditer(r"\S+", text)][:-1]
    inside = [end for end in ends if 0.3 * len(text) <= end <= 0.7 * len(text)]
    if inside:
        return text[: chance.choice(inside)]
    return text[: min(ends, key=lambda end: abs(end - len(text) / 2))] if ends else ""


def echoed(response: str) -> str:
    """The beginning of a response, as an instruction that merely repeats it: its first sentence or more."""
    text = " ".join(response.split())
    if len(text) <= ECHO_CHARS:
        return text
    ends = [found.end() for found in re.finditer(r"[.!?](?=\s)", text[:ECHO_CHARS])]
    return text[: ends[-1]] if ends else text[:ECHO_CHARS].rpartition(" ")[0]


def spoilt(
    kind: Plant,
    pair: SeedPair,
    others: Sequence[SeedPair],
    languages: Mapping[str, str | None],
    chance: random.Random,
) -> tuple[str, str] | None:
    """Instruction and response of `pair`, spoilt in the way `kind`; None where it cannot be.

    `others` are pairs whose question and answer are not this pair's, `languages` those of all pairs, by id.
    """
    match kind:
        case "swapped":
            return (pair.prompt, chance.choice(others).completion) if others else None
        case "truncated":
            cut = truncated(pair.completion, chance)
            return (pair.prompt, cut) if cut else None
        case "echo":
            echo = echoed(pair.completion)
            return (echo, pair.completion) if echo and echo != pair.prompt else None
        case "boilerplate":
            return pair.prompt, "\n".join(chance.sample(BOILERPLATE, 3))
        case "language":
            own = languages[pair.id]
            foreign = [other for other in others if own is not None and languages[other.id] not in (None, own)]
            return (pair.prompt, chance.choice(foreign).completion) if foreign else None


def _language(pair: SeedPair) -> str | None:
    return primary(pair.language) if pair.language else language(pair.completion)


def plant(pairs: Sequence[SeedPair], kinds: Sequence[Plant], chance: random.Random) -> Iterator[Outcome]:
    """Each pair as it is, and spoilt in each of the ways `kinds`; rejected where it cannot be."""
    languages = {pair.id: _language(pair) for pair in pairs} if "language" in kinds else {}
    for n, pair in enumerate(pairs):
        yield _planted(pair, pair.id, "seed", (pair.prompt, pair.completion), good=True)
        rest = (*pairs[n + 1 :], *pairs[:n])
        # Another answer to the same question is no spoilt one.
        others = [p for p in rest if p.completion != pair.completion and p.prompt != pair.prompt]
        for kind in kinds:
            texts = spoilt(kind, pair, others, languages, chance)
            id = f"{pair.id}/{kind}"
            yield rejected(id, "cannot_be_spoilt") if texts is None else _planted(pair, id, kind, texts)


def _planted(pair: Pair, id: str, kind: str, texts: tuple[str, str], good: bool = False) -> Outcome:
    planted = Planted(
        id=id,
        source=pair.source,
        license=pair.license,
        prompt=texts[0],
        completion=texts[1],
        parents=(pair.id,),
        kind=kind,
        good=good,
        origin=pair.id,
    )
    return Noted(row=planted, note=GOOD) if good else planted


@dataclass(frozen=True)
class PlantPairs(WholeStage):
    """Held-out seed pairs → planted pairs, with people's labels among them.

    Whole before any model is loaded, so that a seed too small to calibrate on is told at once.
    """

    name: ClassVar[str] = "curate.plant"
    seeded: ClassVar[bool] = True
    record: ClassVar[type[Record]] = SeedPair
    output: ClassVar[type[Record]] = Planted
    config: CurateConfig
    labels: tuple[tuple[int, Label], ...] = field(init=False)

    def __post_init__(self) -> None:
        # Read once, here: a file that changes while the run goes on must not slip under an identity made before.
        path = self.config.labels
        object.__setattr__(self, "labels", () if path is None else tuple(read_labels(Path(path))))

    def settings(self) -> Settings:
        labels = [label.model_dump(mode="json") for _, label in self.labels]
        return {"plants": [*self.config.plants], "labels": [*labels]}

    def gates(self) -> Settings:
        return {"min_pairs": self._wanted}

    @property
    def _wanted(self) -> int:
        return self.config.min_pairs if self.config.rater.kind == "calibrated" else 0

    def units(self, rows: Rows[SeedPair], context: Context) -> int:
        held_out = sum(row.split == "held_out" for row in rows)
        # What a label says of a seed pair by its texts is a label of that pair, and no pair of its own.
        seeds = {_key(row.prompt, row.completion) for row in rows}
        own = sum(label.id is None and label.key not in seeds for _, label in self.labels)
        return len(rows) + held_out * len(self.config.plants) + own

    def run(self, rows: Rows[SeedPair], context: Context) -> Iterable[Outcome]:
        labels = {label.key: (line, label) for line, label in self.labels}
        used: set[str] = set()
        held_out = []
        for row in rows:
            # A pair may stand in the seed twice, held out and not.
            keys = {row.id, _key(row.prompt, row.completion)} & labels.keys()
            used |= keys
            label = self._agreed(row, sorted((labels[key] for key in keys), key=lambda each: each[0]))
            if row.split != "held_out":
                yield rejected(row.id, "labelled_not_held_out" if label else row.split or "no_split")
            elif label is not None and not label.verdict:
                # A bad pair is no one to make others of: nobody knows what is left good in it.
                yield _planted(row, row.id, "labelled", (row.prompt, row.completion))
                yield from (rejected(f"{row.id}/{kind}", "labelled_bad") for kind in self.config.plants)
            else:
                held_out.append(row)
        unused = [each for key, each in labels.items() if key not in used]
        for line, label in unused:
            if label.prompt is None:
                raise UsageError(
                    f"{self.config.labels}:{line}: no seed pair of this run is called {label.id!r}; the ids are those "
                    "of `selfalign export --stage prepared`, or give prompt and completion instead"
                )
        yield from plant(held_out, self.config.plants, random.Random(context.seed_for("planted")))
        for _, label in unused:
            if label.prompt is not None and label.completion is not None:
                pair = Pair(id=f"label/{label.key}", source="labels", prompt=label.prompt, completion=label.completion)
                yield _planted(pair, pair.id, "labelled", (label.prompt, label.completion), good=label.verdict)

    def _agreed(self, row: SeedPair, found: Sequence[tuple[int, Label]]) -> Label | None:
        """The label of a seed pair, which may have one by its id and one by its texts."""
        if len({label.verdict for _, label in found}) == 2:
            (one, _), (other, _) = found
            raise UsageError(
                f"{self.config.labels}:{other}: this pair, {row.id}, has the other verdict on line {one}; "
                "keep one of the two"
            )
        return found[0][1] if found else None

    def check(self, manifest: Manifest) -> None:
        noted = manifest.ledger["noted"]
        good = noted.get(GOOD, 0) if isinstance(noted, dict) else 0
        assert isinstance(good, int)
        if good < self._wanted:
            raise GateError(
                f"calibration: {good} good pairs are held out or labelled to fit the rater on, and curate.min_pairs "
                f"wants {self._wanted}: {self._wanted - good} are missing; raise prepare.seed.held_out, give a larger "
                "seed, or label pairs (curate.labels)"
            )
