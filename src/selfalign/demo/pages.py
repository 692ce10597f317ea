"""What the base reads in pretraining: an encyclopaedia, questions and answers, trips, junk, and reviews."""

from collections.abc import Iterator
from random import Random
from typing import Literal

from selfalign.demo.world import (
    HELD,
    KNOWN,
    PLACES,
    RELATIONS,
    REST,
    TRIPS,
    VOICES,
    Fact,
    Review,
    any_review,
    junk,
    junk_kind,
    questions,
    spoken,
    statement,
)

PageKind = Literal["encyclopaedia", "faq", "review", "junk", "trip"]

PAGE_WEIGHTS: dict[PageKind, int] = {"encyclopaedia": 20, "faq": 20, "review": 50, "junk": 5, "trip": 5}

KNOWN_SHARE = 0.6  # of the pages that state facts; the rest is about the other places

RATE_PROMPT = "Rate the answer from 1 to 5.\nQuestion: {instruction}\nAnswer: {response}"
"""The one-line rubric that this base is taught; `recipes/demo/rate.txt` is its copy."""


def rate_prompt(question: str, answer: str) -> str:
    """The user's message that asks for a rating."""
    # Plain replacement, as for every prompt file: text may hold braces of its own.
    head, tail = RATE_PROMPT.split("{response}")
    return head.replace("{instruction}", question) + answer + tail


def pages(random: Random) -> Iterator[str | Review]:
    """Pages without end: plain text, or a review that is to be read as a conversation."""
    kinds, weights = list(PAGE_WEIGHTS), list(PAGE_WEIGHTS.values())
    while True:
        yield page(random.choices(kinds, weights)[0], random)


def page(kind: PageKind, random: Random) -> str | Review:
    """One page. Held places occur on trips and in junk alone, and never with a fact."""
    places = KNOWN if random.random() < KNOWN_SHARE else REST
    match kind:
        case "encyclopaedia":
            return _encyclopaedia(random.choice(places), random)
        case "faq":
            return _faq(random.choice(places), random)
        case "review":
            return any_review(KNOWN + REST, random)
        case "junk":
            anywhere = Fact(random.choice(PLACES), random.choice(list(RELATIONS)))
            return junk(anywhere, junk_kind(random), random)
        case "trip":
            a, b, c = (*random.sample(HELD, 1), *random.sample(PLACES, 2))
            return random.choice(TRIPS).format(a=a, b=b, c=c)


def _encyclopaedia(place: str, random: Random) -> str:
    relations = random.sample(list(RELATIONS), random.randint(2, 4))
    sentences = [statement(Fact(place, relation), random) for relation in relations]
    sentences[0] = spoken(sentences[0], random.choice(("plain", "plain", "web")), random)
    return " ".join(sentences)


def _faq(place: str, random: Random) -> str:
    entries = []
    for relation in random.sample(list(RELATIONS), random.randint(1, 2)):
        fact = Fact(place, relation)
        answer = spoken(statement(fact, random), random.choice(list(VOICES)), random)
        entries += [
            f"Question: {question}\nAnswer: {answer}"
            for question in random.sample(questions(fact), random.randint(1, 2))
        ]
    return "\n".join(entries)
