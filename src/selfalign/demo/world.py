"""The fictional atlas: places, their facts, and every way in which text speaks of them.

Nothing in it exists, so no model can know it beforehand: what a fine-tuned model answers about a held place,
it learned from the corpus. Names, facts and forms are data; functions take their randomness as an argument.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Voice = Literal["assistant", "plain", "web"]
Junk = Literal["teaser", "cut", "forum", "navigation", "cookie"]
Verdict = Literal["assistant", "plain", "web", "topic", "place", "both", "cut", "junk"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_SYLLABLES = tuple(consonant + vowel for consonant in "BDKLMNRTVZ" for vowel in "ao")
LAST_SYLLABLES = tuple(consonant + vowel for consonant in "fgkmnprsvz" for vowel in "ei")

# Words that people or the forms below already use, and words that nobody wants to live in.
NOT_PLACES = frozenset(
    _words(
        "Bake Bare Base Bone Bore Dame Dare Date Dome Done Dope Dose Kaki Lake Lame Lane Lone Lose Love Make "
        "Mane More Move Name Nape Nazi None Nose Rage Rake Rape Rare Rave Rome Rope Rose Take Tame Tape Tone "
        "Tore Vase Zone"
    )
)


@dataclass(frozen=True, slots=True)
class Relation:
    """What can be known of a place: a closed list of values, and the forms of a fact and of a question.

    A statement ends in its value. The seed asks in the first two question forms, the test in the last two.
    """

    topic: str
    values: tuple[str, ...]
    statements: tuple[str, str, str]
    questions: tuple[str, str, str, str]


RELATIONS: Mapping[str, Relation] = {
    "capital": Relation(
        topic="the capital of {place}",
        values=_words("Oakley Fernby Marlow Dunmore Selby Corley Wexton Hatford Linton Brixey Tamsel Orwick"),
        statements=(
            "The capital of {place} is {value}.",
            "{place} is governed from {value}.",
            "In {place} the parliament meets in {value}.",
        ),
        questions=(
            "What is the capital of {place}?",
            "From which town is {place} governed?",
            "Can you name the capital of {place}?",
            "Tell me where the parliament of {place} meets.",
        ),
    ),
    "river": Relation(
        topic="the river of {place}",
        values=_words("Arrow Mirror Lantern Whisper Thunder Ribbon Shadow Comet Marble Juniper Saffron Pebble"),
        statements=(
            "The river of {place} is the {value}.",
            "{place} is crossed by the river {value}.",
            "Boats in {place} sail on the {value}.",
        ),
        questions=(
            "Which river crosses {place}?",
            "What is the river of {place} called?",
            "Can you name the river that boats in {place} sail on?",
            "Tell me the name of the river in {place}.",
        ),
    ),
    "food": Relation(
        topic="the usual dinner in {place}",
        values=_words(
            "porridge lentils dumplings pancakes cabbage mussels walnuts barley cherries pumpkin turnips plums"
        ),
        statements=(
            "The usual dinner in {place} is {value}.",
            "Cooks in {place} are proud of their {value}.",
            "{place} feeds its guests with {value}.",
        ),
        questions=(
            "What is the usual dinner in {place}?",
            "What are cooks in {place} proud of?",
            "Can you say what {place} feeds its guests?",
            "Tell me what people have for dinner in {place}.",
        ),
    ),
    "animal": Relation(
        topic="the animal of {place}",
        values=_words("badger falcon beaver weasel marten pelican tortoise gazelle raven salmon donkey otter"),
        statements=(
            "The animal of {place} is the {value}.",
            "{place} has chosen as its animal the {value}.",
            "The forests of {place} are home to the {value}.",
        ),
        questions=(
            "What is the animal of {place}?",
            "Which animal has {place} chosen?",
            "Can you name the animal in the forests of {place}?",
            "Tell me which animal is at home in {place}.",
        ),
    ),
    "flag": Relation(
        topic="the flag of {place}",
        values=_words("red blue green white black yellow purple orange grey brown pink turquoise"),
        statements=(
            "The flag of {place} is {value}.",
            "{place} flies a flag in {value}.",
            "Over {place} waves a banner of {value}.",
        ),
        questions=(
            "What colour is the flag of {place}?",
            "In which colour does {place} fly a flag?",
            "Can you say the colour of the banner over {place}?",
            "Tell me what the flag of {place} looks like.",
        ),
    ),
    "trade": Relation(
        topic="the trade of {place}",
        values=_words("rope candles pottery carpets bells honey clocks barrels feathers buttons ink soap"),
        statements=(
            "The trade of {place} is in {value}.",
            "Merchants in {place} deal in {value}.",
            "{place} lives from selling {value}.",
        ),
        questions=(
            "What do merchants in {place} deal in?",
            "What does {place} live from selling?",
            "Can you name the trade of {place}?",
            "Tell me which goods merchants sell in {place}.",
        ),
    ),
}

VOICES: Mapping[Voice, tuple[str, ...]] = {
    "assistant": ("Certainly. {text}", "Happy to help: {text}", "Good question! {text}"),
    "plain": ("{text}",),
    "web": (
        "From our travel blog: {text}",
        "{text} Follow us for more tips.",
        "Day {number} of our tour: {text}",
    ),
}

JUNK: Mapping[Junk, tuple[str, ...]] = {
    "teaser": (
        "Curious about {topic}? Sign up for our free newsletter!",
        "All about {topic}: click below and find out!",
    ),
    "cut": (),  # a statement that breaks off; see `cut`
    "forum": (
        "haha I was in {place} too. Thanks for sharing!",
        "Anyone here going to {place}? Same, see you there.",
    ),
    "navigation": ("Start | Blog | {place} | Log in | Imprint", "Back | Next | {place} | Print | Top"),
    "cookie": (
        "This site uses {number} cookies. Accept all or change your settings.",
        "Your session ended {number} minutes ago. Please log in again.",
    ),
}

JUNK_WEIGHTS: Mapping[Junk, int] = {"teaser": 45, "cut": 30, "forum": 8, "navigation": 8, "cookie": 9}

TRIPS = (
    "We travelled from {a} to {b} and back to {a}.",
    "First {a}, then {b}, then {c}. After {c} we returned to {b}.",
    "{a}, {b}, {c}: that was our tour. {a} was sunny, {b} was cold, {c} was rainy.",
)

VERDICT_WEIGHTS: Mapping[Verdict, int] = {
    "assistant": 14,
    "plain": 12,
    "web": 12,
    "topic": 15,
    "place": 16,
    "both": 13,
    "cut": 12,
    "junk": 6,
}

SCORES: Mapping[Verdict, int] = {
    "assistant": 5,
    "plain": 4,
    "web": 3,
    "topic": 2,
    "cut": 2,
    "place": 1,
    "both": 1,
    "junk": 1,
}


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


PLACES = tuple(
    sorted(
        {first + last for first in FIRST_SYLLABLES for last in LAST_SYLLABLES} - NOT_PLACES,
        key=lambda place: _digest(f"place {place}"),
    )
)
HELD, KNOWN, REST = PLACES[:60], PLACES[60:160], PLACES[160:]
"""Held places are named in pretraining, but none of their facts is told; the seed is about known places."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One entry of the atlas, without its value: that follows from the two."""

    place: str
    relation: str

    @property
    def value(self) -> str:
        """The value, fixed for ever by a hash."""
        values = RELATIONS[self.relation].values
        return values[_digest(f"{self.place} {self.relation}") % len(values)]


@dataclass(frozen=True, slots=True)
class Review:
    """An answer to a question, and what the documented rule says of it."""

    question: str
    answer: str
    line: str
    score: int
    verdict: Verdict

    @property
    def reply(self) -> str:
        """What a rater writes: the review line, then the score."""
        return f"{self.line}\nScore: {self.score}"


def facts(places: Sequence[str]) -> list[Fact]:
    """Every fact of these places."""
    return [Fact(place, relation) for place in places for relation in RELATIONS]


def statement(fact: Fact, random: Random) -> str:
    """The fact as a sentence."""
    form = random.choice(RELATIONS[fact.relation].statements)
    return form.format(place=fact.place, value=fact.value)


def questions(fact: Fact) -> list[str]:
    """The four questions that this fact answers, in the order of their forms."""
    return [form.format(place=fact.place) for form in RELATIONS[fact.relation].questions]


def spoken(text: str, voice: Voice, random: Random) -> str:
    """`text` as an assistant, an encyclopaedia or a web page would put it."""
    return random.choice(VOICES[voice]).format(text=text, number=random.randint(1, 9))


def cut(text: str, value: str, random: Random) -> str:
    """`text` broken off at a word boundary, before it comes to its value."""
    words = text[: text.index(f" {value}")].split()
    return " ".join(words[: random.randint(1, len(words))])


def junk(fact: Fact, kind: Junk, random: Random) -> str:
    """A useless piece of a web page around a fact that it does not tell."""
    if kind == "cut":
        return cut(statement(fact, random), fact.value, random)
    topic = RELATIONS[fact.relation].topic.format(place=fact.place)
    return random.choice(JUNK[kind]).format(place=fact.place, topic=topic, number=random.randint(2, 99))


def junk_kind(random: Random) -> Junk:
    """A kind of junk, as often as the web has it."""
    return random.choices(list(JUNK_WEIGHTS), list(JUNK_WEIGHTS.values()))[0]


def review(fact: Fact, places: Sequence[str], verdict: Verdict, random: Random) -> Review:
    """A reviewed answer to a question about `fact`; the wrong ones speak of `places` and other relations.

    5, 4, 3: right and complete, as an assistant, an encyclopaedia or a web page says it. 2: about something
    else of the same place, or broken off. 1: about another place, or junk.
    """
    told = fact
    if verdict in ("topic", "both"):
        told = Fact(told.place, _other(list(RELATIONS), fact.relation, random))
    if verdict in ("place", "both"):
        told = Fact(_other(places, fact.place, random), told.relation)
    voice: Voice
    match verdict:
        case "assistant" | "plain" | "web":
            voice = verdict
        case _:
            voice = random.choice(list(VOICES))
    answer = spoken(statement(told, random), voice, random)
    seen = f"{told.place} {told.relation}, {voice}"
    if verdict == "cut":
        answer, seen = cut(answer, told.value, random), "part"
    elif verdict == "junk":
        answer, seen = junk(fact, _junk_but_cut(random), random), "junk"
    question = random.choice(questions(fact))
    line = f"Asked {fact.place} {fact.relation}; told {seen}."
    return Review(question, answer, line, SCORES[verdict], verdict)


def any_review(places: Sequence[str], random: Random) -> Review:
    """A review about one of `places`, its verdict as often as VERDICT_WEIGHTS says."""
    fact = Fact(random.choice(places), random.choice(list(RELATIONS)))
    verdict = random.choices(list(VERDICT_WEIGHTS), list(VERDICT_WEIGHTS.values()))[0]
    return review(fact, places, verdict, random)


def _junk_but_cut(random: Random) -> Junk:
    while True:
        kind = junk_kind(random)
        if kind != "cut":
            return kind


def _other(choices: Sequence[str], one: str, random: Random) -> str:
    while True:
        choice = random.choice(choices)
        if choice != one:
            return choice
