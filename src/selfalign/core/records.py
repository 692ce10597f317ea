"""The rows that flow between steps, and what may happen to a row instead.

Every table column is a field here. Columns follow the ecosystem: `prompt` and `completion` (text in a pair, a
list of messages in a training example), `id`, `source`, `license`, `rating`, `rating_dist`, `model`,
`prompt_hash`, `parents`.
"""

from dataclasses import dataclass
from typing import Literal, TypedDict


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


class Signal(TypedDict):
    """One measured signal of a pair's quality; null where the pair left no room to measure it."""

    name: str
    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A row of a table. `id` is unique within its table; units split from a parent are called `parent/n`."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePart(Record):
    """Consecutive records of a file outside the run, few enough to be read at once; `id` is that of the first one.

    `sha256` is the whole file's. `rows` counts the part's records independently of how they parse, `first` is the
    number of its first one in the file, `offset` where that begins and `size` how far the part reaches, in decompressed
    bytes, and `line` where it begins. In a Parquet file `size` is an estimate, and there is no offset and no line.
    `format` is the file's, None where it has no well-formed row.
    """

    path: str
    sha256: str
    rows: int
    first: int = 0
    offset: int = 0
    size: int = 0
    line: int = 0
    format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Document(Record):
    """A piece of unlabelled text: a candidate response.

    A segment of a page has the `header` that it stands under, and `within` names those that enclose it,
    outermost first.
    """

    source: str
    license: str | None = None
    text: str
    header: str | None = None
    within: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(Record):
    """An instruction (`prompt`) and its response (`completion`)."""

    source: str
    license: str | None = None
    prompt: str
    completion: str
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedPair(Pair):
    """A pair that people wrote, with the labels that its source gives: `language` (as the source writes it), `rank`
    among the answers to its prompt (0 is the best), `quality` from 0 to 1; null where there is none.

    `split` is `train`, `held_out` or `like_held_out`, null before it is drawn.
    """

    language: str | None = None
    rank: int | None = None
    quality: float | None = None
    split: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Pair):
    """A pair whose instruction a model wrote. `model` is that model's identity."""

    model: str
    prompt_hash: str
    finish: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated(Candidate):
    """A candidate with the rater's verdict.

    `rating` is 1.0..5.0, or null with the reason in `unrated`; `rating_dist` the probabilities of "1".."5" before
    renormalisation, so that `off_scale` = 1 - their sum; `entropy` in nats, of the renormalised distribution;
    `reply` what the rater wrote. A calibrated rater weighs `signals`, and selection writes what they come to into
    `probability`, 0..1: that of a good pair, where good and bad ones are as many.
    """

    rating: float | None = None
    unrated: str | None = None
    rating_dist: tuple[float, ...] = ()
    off_scale: float | None = None
    entropy: float | None = None
    reply: str = ""
    signals: tuple[Signal, ...] = ()
    probability: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted(Pair):
    """A pair of known quality: `kind` is `seed`, `labelled`, or the way in which a seed pair was spoilt.

    `origin` is the seed pair that it was made of: pairs of one origin are never split between fitting and testing.
    """

    kind: str
    good: bool
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(Record):
    """A training row: the loss is on `completion` only. `kind` says where it came from."""

    kind: str
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A row that does not go on, with the reason; `row` is what is known of it, as far as it parsed.

    `rejected` rows were understood and filtered. `quarantined` rows are broken, or broke their worker:
    `detail` then says where (source, offset, SHA-256 of the bytes). `units` counts what is lost with it.
    """

    id: str
    reason: str
    row: Record | None = None
    detail: str | None = None
    units: int = 1
    outcome: Literal["rejected", "quarantined"] = "rejected"


def rejected(id: str, reason: str, row: Record | None = None, detail: str | None = None) -> Dropped:
    """A row that was understood and filtered."""
    return Dropped(id=id, reason=reason, row=row, detail=detail)


def quarantined(id: str, reason: str, detail: str, units: int = 1) -> Dropped:
    """A row that is broken, or that breaks whoever processes it."""
    return Dropped(id=id, reason=reason, detail=detail, units=units, outcome="quarantined")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """A row that goes on, with something about it that the ledger counts: an absent label, say."""

    row: Record
    note: str

    @property
    def id(self) -> str:
        """The row's."""
        return self.row.id


Outcome = Record | Dropped | Noted
