"""Reads the rating out of a rater's reply. What is not plainly a rating is none: there is no default.

Policy: the last line with a `Score:` alone counts. `Score:` opens that line, bullets, markup and `Final` or
`Overall` aside, or follows a sentence in it when the rating ends the line. Its value is a decimal number of 1 to 5,
perhaps in markup, quotes or brackets, perhaps as `a/5` or `a out of 5`. More text may follow only when it is plainly
apart (after punctuation, or `points`, `because` …), does not hedge (`4, or higher`) and names no other number. All
else is unparsed: `3-4`, `8/10`, `10`, `four`, `~4`, `4+`, `4th`, `4,5`, `Clarity score: 4`, two `Score:` on one line.
"""

import re

_ANY_LABEL = re.compile(r"\bscore ?(\([^()]*\))? ?[:：]", re.IGNORECASE)
_OPENING = re.compile(r"[\s>#|•-]*(?:\d{1,2}[.)]\s+)?(?:the\s+)?(?:(?:final|overall)\s+)?", re.IGNORECASE)
_SENTENCE = re.compile(r".*[.!?]\s+(?:(?:final|overall)\s+)?", re.IGNORECASE | re.DOTALL)
# Only a scale that ends at five keeps the meaning of its numbers: "Score (1-10): 4" is no rating.
_OUT_OF_FIVE = re.compile(r"\(\s*(?:(?:from\s+)?[01]\s*(?:-|–|to)\s*5|(?:out\s+)?of\s+5|/\s*5)\s*\)", re.IGNORECASE)

_NUMBER = re.compile(r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?")
_FIFTHS = re.compile(r"\s*(?:/\s*|(?:out\s+)?of\s+)(?:5(?:\.0+)?|five)(?![0-9/%]|\.[0-9])(?!\w)", re.IGNORECASE)
_APART = re.compile(
    r"\s*(?:[.,;:!](?=\s|$)|\(|\s[-–—]\s|—|<[|/]|###|\b(?:points?|stars?|because|since|as|due\s+to)\b)",
    re.IGNORECASE,
)
_DOUBT = re.compile(r"\W*(?:or|maybe|perhaps|possibly|probably)\b", re.IGNORECASE)
# After a full stop these begin a new sentence; elsewhere they go on about the number.
_RANGE = re.compile(r"\W*(?:to|and|if|minus|plus|at\s+(?:least|most))\b", re.IGNORECASE)
_FIGURE = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_WORD_FIGURE = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)

_MARKUP = re.compile(r"[*_`\u200b\u2060\ufeff]+")
_PAIRS = (("<", ">"), ("[", "]"), ("(", ")"), ("{", "}"), ('"', '"'), ("'", "'"), ("“", "”"), ("「", "」"))


def parse(reply: str) -> float | None:
    """Rating on the last `Score:` line of a reply, 1.0..5.0; None where there is none."""
    for line in reversed(reply.splitlines()):
        # A space stands for markup, so that no two digits grow together. Single spaces keep matching linear.
        plain = " ".join(_MARKUP.sub(" ", line).split())
        if labels := list(_ANY_LABEL.finditer(plain)):
            return _rating(plain, labels[0]) if len(labels) == 1 else None
    return None


def _rating(line: str, label: re.Match[str]) -> float | None:
    before, after = line[: label.start()], line[label.end() :]
    value, rest = _value(after.strip())
    if value is None or not 1 <= value <= 5 or (label[1] and not _OUT_OF_FIVE.fullmatch(label[1])):
        return None
    plain = _ended(rest) or (bool(_OPENING.fullmatch(before)) and _harmless(rest, value))
    placed = _OPENING.fullmatch(before) or _SENTENCE.fullmatch(before)
    return value if plain and placed else None


def _value(text: str) -> tuple[float | None, str]:
    """The number that opens `text`, out of its brackets and its `/5`, and the text after it."""
    for opening, closing in _PAIRS:
        if text.startswith(opening):
            depth = len(text) - len(text.lstrip(opening))
            inside, closed, after = text[depth:].partition(closing * depth)
            value, rest = _bare(inside.strip())
            return (value, _without_fifths(after)) if closed and not rest.strip() else (None, "")
    return _bare(text)


def _bare(text: str) -> tuple[float | None, str]:
    number = _NUMBER.match(text)
    return (float(number[0]), _without_fifths(text[number.end() :])) if number else (None, "")


def _without_fifths(text: str) -> str:
    fifths = _FIFTHS.match(text)
    return text[fifths.end() :] if fifths else text


def _ended(rest: str) -> bool:
    return not rest.strip(" \t.!|。")


def _harmless(rest: str, value: float) -> bool:
    """Whether the text after a rating leaves no doubt about it."""
    apart = _APART.match(rest)
    if apart is None or _DOUBT.match(rest, apart.end()):
        return False
    if "." not in apart[0] and _RANGE.match(rest, apart.end()):
        return False
    told = re.sub(rf"(?<=[0-9]){_FIFTHS.pattern}", "", rest, flags=re.IGNORECASE)
    figures = [float(figure) for figure in _FIGURE.findall(told)]
    figures += [_WORDS[word.lower()] for word in _WORD_FIGURE.findall(told)]
    return all(figure == value for figure in figures)
